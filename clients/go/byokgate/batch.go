package byokgate

import (
	"context"
	"errors"
	"io"
	"iter"
	"slices"
	"sync"
	"time"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// A batch is a pipeline. Each request's names and credentials are fetched separately, so that a lookup that hangs blocks no other; ready
// requests go out in calls of up to 256, several at a time; credentials are released as soon as their call is answered. All stages share
// whether byok-gate is down, so that it is found out once.

const (
	// maxBatchItems and maxBatchBytes are byok-gate's limits for one call, the second minus room for framing.
	maxBatchItems = 256
	maxBatchBytes = 4*1024*1024 - 64*1024
	// batchPatience is how long a ready request waits for others.
	batchPatience = 50 * time.Millisecond
	// batchCalls is how many calls are in flight at a time: few and full, or many and small if each organization has its own lane.
	batchCalls       = 4
	batchCallsInLane = 128
	// batchLookups is how many requests' credentials are fetched at a time: the secret store has other users. A lookup that has not answered
	// after slowLookup counts as slow and frees its slot.
	batchLookups = 32
	slowLookup   = 100 * time.Millisecond
	batchSlow    = 1024
	// batchInHand is how many requests hold credentials at a time.
	batchInHand = (batchCalls + 1) * maxBatchItems
	// batchTries is how often an item that byok-gate postponed is retried.
	batchTries = 8
)

// Result is the result of one request of a batch. The zero Result is not an allow.
type Result struct {
	allowed Allowed
	refusal Refusal
}

// Decision is the answer, as [Client.Decide] gives it.
func (r Result) Decision() (Allowed, error) {
	switch {
	case r.refusal != nil:
		return Allowed{}, r.refusal
	case r.allowed.response == nil:
		return Allowed{}, missing(nil)
	default:
		return r.allowed, nil
	}
}

// BatchDecide decides for many workspaces at once, for a fleet's restart. It yields one result for each request, by its index, as soon as
// it is ready, in any order. Leaving the loop ends the batch: the requests that were not yielded are undecided. A slow consumer delays only
// itself.
func (c *Client) BatchDecide(ctx context.Context, requests []Request) iter.Seq2[int, Result] {
	return func(yield func(int, Result) bool) {
		if len(requests) == 0 || yield == nil {
			return
		}
		if c.unusable() {
			for index := range requests {
				if !yield(index, Result{refusal: undecided(&requests[index].Spec, ReasonClosed, errClosed)}) {
					return
				}
			}
			return
		}
		b := &batch{
			client: c, began: time.Now(),
			requests: slices.Clone(requests),
			events:   make(chan event, batchLookups),
			// Room for all: results hold no credentials, and a slow consumer must not keep credentials in memory.
			results: make(chan settled, len(requests)),
			lookups: make(chan struct{}, batchLookups),
			slow:    make(chan struct{}, batchSlow),
			hands:   make(chan struct{}, batchInHand),
			calls:   make(chan struct{}, batchCalls),
		}
		if c.lanes.key != nil {
			b.calls = make(chan struct{}, batchCallsInLane)
		}
		defer b.work.Wait()
		var cancel context.CancelFunc
		b.ctx, cancel = context.WithTimeout(c.traced(orBackground(ctx)), c.batchTimeout)
		defer cancel()
		b.gate.window = retryWindow(b.ctx)
		b.start(b.coordinate)
		b.start(b.feed)
		b.yield(yield)
	}
}

type batch struct {
	client   *Client
	ctx      context.Context
	began    time.Time
	requests []Request
	gate     presence
	events   chan event
	results  chan settled
	// Slots: to look up, to look up slowly, to hold credentials, to call.
	lookups, slow, hands, calls chan struct{}
	work                        sync.WaitGroup
}

// item is one request in progress.
type item struct {
	index   int
	request *Request
	held    wallet
	// names are those to look up next.
	names   []string
	known   bool
	settled bool
	wire    *byokgatev1.DecideRequest
	size    int
	rounds  int
	tries   int
}

// event tells the coordinator that an item is ready, has failed, or is to be prepared (again).
type event struct {
	about *item
	what  happening
	after time.Duration
}

type happening int

const (
	isReady happening = iota
	isRefused
	isAgain
)

// settled is a result.
type settled struct {
	about *item
	Result
}

func (b *batch) start(work func()) {
	b.work.Add(1)
	go func() {
		defer b.work.Done()
		work()
	}()
}

// take waits for a slot. False: the batch is over.
func (b *batch) take(places chan struct{}) bool {
	select {
	case places <- struct{}{}:
		return true
	case <-b.ctx.Done():
		return false
	}
}

func (b *batch) tell(told event) {
	select {
	case b.events <- told:
	case <-b.ctx.Done():
	}
}

func (b *batch) settle(about *item, allowed Allowed, refusal Refusal) {
	about.wire, about.held = nil, wallet{}
	b.results <- settled{about, Result{allowed, refusal}}
}

// yield passes results on, and reports the rest as undecided at the end.
func (b *batch) yield(yield func(int, Result) bool) {
	c := b.client
	done := make([]bool, len(b.requests))
	give := func(came settled) bool {
		done[came.about.index] = true
		c.record(b.ctx, came.about.request, came.allowed, came.refusal, time.Since(b.began), came.about.tries)
		return yield(came.about.index, came.Result)
	}
	for range b.requests {
		select {
		case came := <-b.results:
			if !give(came) {
				return
			}
			continue
		case <-b.ctx.Done():
		}
		// Results that came in time count.
		for more := true; more; {
			select {
			case came := <-b.results:
				if !give(came) {
					return
				}
			default:
				more = false
			}
		}
		over := status.FromContextError(b.ctx.Err()).Err()
		for index := range done {
			if done[index] {
				continue
			}
			about := &item{index: index, request: &b.requests[index]}
			if !give(settled{about, Result{refusal: c.failed(b.ctx, &about.request.Spec, over)}}) {
				return
			}
		}
		return
	}
}

// feed adds the requests, a few at a time.
func (b *batch) feed() {
	for index := range b.requests {
		if !b.take(b.lookups) {
			return
		}
		about := &item{index: index, request: &b.requests[index]}
		b.start(func() { b.prepare(about) })
	}
}

// prepare fetches an item's credentials. It has a lookup slot, and returns it.
func (b *batch) prepare(about *item) {
	c, spec := b.client, &about.request.Spec
	fast, inHand, done := true, false, false
	refuse := func(refusal Refusal) {
		done = true
		if inHand {
			<-b.hands
		}
		b.settle(about, Allowed{}, refusal)
		b.tell(event{about: about, what: isRefused})
	}
	defer func() {
		if !done && b.ctx.Err() == nil {
			// Most likely a log handler that ended its goroutine.
			refuse(undecided(spec, ReasonInternal, errors.New("the goroutine that fetched the credentials was ended")))
		}
		if fast {
			<-b.lookups
		}
	}()
	if away := b.gate.gone(); away != nil {
		refuse(c.failed(b.ctx, spec, away))
		return
	}
	if !about.known {
		names, settled, refusal := c.prepare(b.ctx, spec)
		if refusal != nil {
			if gone, is := refusal.(*Undecided); is && status.Code(gone.cause) == codes.Unavailable {
				b.gate.giveUp(gone.cause)
			}
			refuse(refusal)
			return
		}
		about.names, about.settled, about.known = names, settled, true
	}
	if inHand = b.take(b.hands); !inHand {
		return
	}
	if names := about.held.lacks(about.names); len(names) > 0 {
		ctx, cancel := context.WithTimeout(b.ctx, min(c.lookups.perCall, time.Until(b.deadline())/2))
		defer cancel()
		searching := c.lookups.start(ctx, spec.Lookup, names)
		soon, stop := context.WithTimeout(ctx, slowLookup)
		defer stop()
		got := unanswered()
		if late := searching.collect(soon, &got, len(scopes)); late > 0 {
			select {
			case b.slow <- struct{}{}:
				<-b.lookups
				fast = false
				defer func() { <-b.slow }()
			default:
				// All slow slots are taken: this one keeps its slot.
			}
			searching.collect(ctx, &got, late)
		}
		about.held.keep(names, got)
		c.unread(b.ctx, spec, &about.held)
	}
	about.wire = about.request.wire(&about.held, c.mode)
	about.size = proto.Size(about.wire)
	done = true
	b.tell(event{about: about, what: isReady})
}

func (b *batch) deadline() time.Time {
	deadline, _ := b.ctx.Deadline()
	return deadline
}

// pile is a set of requests that can go out together.
type pile struct {
	items []*item
	bytes int
	since time.Time
}

// coordinate makes calls from the ready items.
func (b *batch) coordinate() {
	unprepared := len(b.requests)
	piles := map[string]*pile{}
	flush := func(lane string) {
		items := piles[lane].items
		delete(piles, lane)
		// In the requests' order, as far as they go together, so that a log is readable.
		slices.SortFunc(items, func(a, b *item) int { return a.index - b.index })
		b.start(func() { b.call(lane, items) })
	}
	patience := time.NewTimer(batchPatience)
	defer patience.Stop()
	for {
		select {
		case told := <-b.events:
			switch told.what {
			case isRefused:
				unprepared--
			case isAgain:
				unprepared++
				b.start(func() {
					if sleep(b.ctx, told.after) && b.take(b.lookups) {
						b.prepare(told.about)
					}
				})
			case isReady:
				unprepared--
				lane := b.client.lanes.of(&told.about.request.Spec)
				if full := piles[lane]; full != nil && full.bytes+told.about.size > maxBatchBytes {
					flush(lane)
				}
				heap := piles[lane]
				if heap == nil {
					heap = &pile{since: time.Now()}
					piles[lane] = heap
				}
				heap.items, heap.bytes = append(heap.items, told.about), heap.bytes+told.about.size
				if len(heap.items) == maxBatchItems {
					flush(lane)
				}
			}
		case <-patience.C:
			patience.Reset(batchPatience)
		case <-b.ctx.Done():
			return
		}
		for lane, heap := range piles {
			// No other item is coming, or none is worth the wait.
			if unprepared == 0 || time.Since(heap.since) >= batchPatience {
				flush(lane)
			}
		}
	}
}

// call retries these items until each has its answer, as long as byok-gate is up.
func (b *batch) call(lane string, items []*item) {
	if !b.take(b.calls) {
		return
	}
	defer func() { <-b.calls }()
	c := b.client
	ctx := inLane(b.ctx, lane)
	for attempt := 0; len(items) > 0; attempt++ {
		var err error
		if err = b.gate.gone(); err == nil {
			items, err = b.ask(ctx, items)
		}
		if b.ctx.Err() != nil || len(items) == 0 {
			return
		}
		pause, again := c.retryPause(err, attempt)
		switch status.Code(err) {
		case codes.Unavailable:
			again = again && !b.gate.away(err)
		default:
			again = again && attempt < batchTries
		}
		if again && pause < time.Until(b.deadline()) && sleep(b.ctx, pause) {
			continue
		}
		for _, about := range items {
			refusal := missing(&about.request.Spec)
			if err != nil {
				refusal = c.failed(b.ctx, &about.request.Spec, err)
			}
			b.finish(about, Allowed{}, refusal)
		}
		return
	}
}

// finish ends an item that holds credentials.
func (b *batch) finish(about *item, allowed Allowed, refusal Refusal) {
	b.settle(about, allowed, refusal)
	<-b.hands
}

// again releases an item's credentials and prepares it anew. False: it was postponed too often.
func (b *batch) again(about *item, after time.Duration) bool {
	if after >= time.Until(b.deadline()) {
		return false
	}
	about.tries++
	about.wire = nil
	<-b.hands
	b.tell(event{about: about, what: isAgain, after: after})
	return true
}

// ask makes one call and ends the items that it answers. It returns the items without an answer, and the reason if the call failed.
func (b *batch) ask(ctx context.Context, items []*item) ([]*item, error) {
	// Ends the stream on every return.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := b.client
	request := &byokgatev1.BatchDecideRequest{Requests: make([]*byokgatev1.DecideRequest, len(items))}
	for place, about := range items {
		request.Requests[place] = about.wire
	}
	open := slices.Clone(items)
	stream, err := c.service.BatchDecide(ctx, request)
	for err == nil {
		var reply *byokgatev1.BatchDecideResponse
		if reply, err = stream.Recv(); err != nil {
			break
		}
		b.gate.here()
		c.link.answered()
		place := reply.GetIndex()
		if uint64(place) >= uint64(len(open)) || open[place] == nil {
			// No such item, or one that already has its answer.
			continue
		}
		about := open[place]
		open[place] = nil
		b.hear(about, reply)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	left := slices.DeleteFunc(open, func(about *item) bool { return about == nil })
	return left, err
}

// hear reads one item's answer.
func (b *batch) hear(about *item, reply *byokgatev1.BatchDecideResponse) {
	c, spec := b.client, &about.request.Spec
	switch result := reply.GetResult().(type) {
	case *byokgatev1.BatchDecideResponse_Response:
		names := c.learn(spec, &about.held, result.Response)
		if !about.settled && len(names) > 0 {
			about.names, about.rounds = names, about.rounds+1
			if about.rounds < maxRounds && b.again(about, 0) {
				return
			}
			b.finish(about, Allowed{}, unsettled(spec))
			return
		}
		allowed, refusal := read(spec, result.Response)
		b.finish(about, allowed, refusal)
	case *byokgatev1.BatchDecideResponse_Status:
		err := itemError(result.Status)
		if pause, again := c.retryPause(err, about.tries); again && about.tries < batchTries && b.again(about, pause) {
			return
		}
		b.finish(about, Allowed{}, c.failed(b.ctx, spec, err))
	default:
		b.finish(about, Allowed{}, missing(spec))
	}
}

// itemError is never nil: a status that says OK is no decision either.
func itemError(said *byokgatev1.ItemStatus) error {
	code := codes.Code(uint32(said.GetCode()))
	if code == codes.OK {
		code = codes.Unknown
	}
	return status.ErrorProto(&spb.Status{Code: int32(code), Message: said.GetMessage(), Details: said.GetDetails()})
}

// === Whether byok-gate is up ===

// presence says whether byok-gate is up. Once it has been down for longer than the window, it counts as down for the rest of the batch.
type presence struct {
	window time.Duration

	mu    sync.Mutex
	since time.Time
	lost  error
}

// gone is why byok-gate is not called any more. Nil if it is.
func (p *presence) gone() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lost
}

func (p *presence) here() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.since = time.Time{}
}

// away says whether byok-gate has been down for too long.
func (p *presence) away(err error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.since.IsZero() {
		p.since = time.Now()
	}
	if p.lost == nil && time.Since(p.since) > p.window {
		p.lost = err
	}
	return p.lost != nil
}

// giveUp is for a call that has retried for the whole window.
func (p *presence) giveUp(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lost == nil {
		p.lost = err
	}
}
