package byokgate

import (
	"context"
	"errors"
	"io"
	"iter"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

const (
	// maxBatchItems and maxBatchBytes are byok-gate's limits for one call, the second less some room for framing. More
	// requests become more calls.
	maxBatchItems = 256
	maxBatchBytes = 4*1024*1024 - 64*1024
	// batchLookups is how many requests' credentials are fetched at a time: a secret store is shared with everyone else.
	batchLookups = 16
)

// Result is what came of one request of a batch. The zero Result is no allow.
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
		return Allowed{}, missing(Spec{})
	default:
		return r.allowed, nil
	}
}

// item is one request of a batch on its way.
type item struct {
	index   int
	request Request
	held    *wallet
	basis   relevance
	wire    *byokgatev1.DecideRequest
	began   time.Time
	// failure is why the last call had no reply for it, if it had none.
	failure error
}

// BatchDecide asks about many workspaces at once, for a fleet's restart. It yields one result for each request, by its index,
// as soon as there is one and in no promised order. Leaving the loop ends the batch: the requests that were not yielded are
// undecided.
func (c *Client) BatchDecide(ctx context.Context, requests []Request) iter.Seq2[int, Result] {
	return func(yield func(int, Result) bool) {
		ctx, cancel := context.WithTimeout(ctx, c.batchTimeout)
		defer cancel()
		pending := make([]*item, len(requests))
		for index, request := range requests {
			pending[index] = &item{index: index, request: request, held: newWallet(), began: time.Now()}
		}
		// settle yields a result. It says whether the loop goes on.
		settle := func(about *item, allowed Allowed, refusal Refusal) bool {
			c.record(ctx, about.request, allowed, refusal, time.Since(about.began))
			return yield(about.index, Result{allowed, refusal})
		}
		window, began := retryWindow(ctx), time.Now()
		for round := range maxRounds {
			ready, refused := c.prepareAll(ctx, pending)
			for about, refusal := range refused {
				if !settle(about, Allowed{}, refusal) {
					return
				}
			}
			var left []*item
			away := false
			for _, call := range calls(ready) {
				unanswered, err, goOn := c.askBatch(ctx, call, &left, settle)
				if !goOn {
					return
				}
				if _, again := retryPause(err, round); again && len(unanswered) > 0 {
					for _, about := range unanswered {
						about.failure = err
					}
					left, away = append(left, unanswered...), true
					continue
				}
				for _, about := range unanswered {
					about.failure = err
					if !settle(about, Allowed{}, about.unanswered()) {
						return
					}
				}
			}
			if pending = left; len(pending) == 0 {
				return
			}
			if away && (time.Since(began) > window || !sleep(ctx, lastPause)) {
				break
			}
		}
		for _, about := range pending {
			refusal := unsettled(about.request.Spec)
			if about.failure != nil {
				refusal = about.unanswered()
			}
			if !settle(about, Allowed{}, refusal) {
				return
			}
		}
	}
}

// unanswered is for an item that the last call had no reply for.
func (i *item) unanswered() *Undecided {
	if i.failure != nil {
		return failed(i.request.Spec, i.failure)
	}
	return missing(i.request.Spec)
}

// askBatch makes one call and settles what it answers. Items whose reply does not stand go to left; those without a reply
// are returned, with the reason if the call failed.
func (c *Client) askBatch(
	ctx context.Context, items []*item, left *[]*item, settle func(*item, Allowed, Refusal) bool,
) (unanswered []*item, failure error, goOn bool) {
	// Ends the stream however this function is left.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	request := &byokgatev1.BatchDecideRequest{}
	open := map[uint32]*item{}
	for place, about := range items {
		request.Requests = append(request.Requests, about.wire)
		open[uint32(place)] = about // at most maxBatchItems
	}
	stream, err := c.service.BatchDecide(ctx, request)
	for err == nil {
		var reply *byokgatev1.BatchDecideResponse
		if reply, err = stream.Recv(); err != nil {
			break
		}
		about, waiting := open[reply.GetIndex()]
		if !waiting {
			// No such item, or one that has its answer: nothing that could be acted on.
			continue
		}
		delete(open, reply.GetIndex())
		var allowed Allowed
		var refusal Refusal
		switch result := reply.GetResult().(type) {
		case *byokgatev1.BatchDecideResponse_Response:
			if !c.stands(ctx, about.request, about.held, about.basis, result.Response) {
				about.failure = nil
				*left = append(*left, about)
				continue
			}
			allowed, refusal = read(about.request.Spec, result.Response)
		case *byokgatev1.BatchDecideResponse_Status:
			refusal = failed(about.request.Spec, itemError(result.Status))
		default:
			refusal = missing(about.request.Spec)
		}
		if !settle(about, allowed, refusal) {
			return nil, nil, false
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	for _, place := range sortedKeys(open) {
		unanswered = append(unanswered, open[place])
	}
	return unanswered, err, true
}

// itemError is never nil: a status that says OK is no decision either.
func itemError(said *byokgatev1.ItemStatus) error {
	code := codes.Code(uint32(said.GetCode()))
	if code == codes.OK {
		code = codes.Unknown
	}
	return status.Error(code, said.GetMessage())
}

// missing is for a request that a batch did not answer.
func missing(spec Spec) *Undecided {
	return unreadable(spec, nil, "no result for this workspace")
}

// prepareAll fetches credentials, several requests at a time. Requests that cannot be asked about are in refused.
func (c *Client) prepareAll(ctx context.Context, items []*item) (ready []*item, refused map[*item]Refusal) {
	var all sync.WaitGroup
	refusals := make([]Refusal, len(items))
	slots := make(chan struct{}, batchLookups)
	for place, about := range items {
		slots <- struct{}{}
		all.Add(1)
		go func() {
			defer func() { <-slots; all.Done() }()
			about.basis, refusals[place] = c.prepare(ctx, about.request, about.held)
			about.wire = about.request.wire(about.held)
		}()
	}
	all.Wait()
	refused = map[*item]Refusal{}
	for place, about := range items {
		if refusals[place] != nil {
			refused[about] = refusals[place]
			continue
		}
		ready = append(ready, about)
	}
	return ready, refused
}

// calls divides items by the limits of one call.
func calls(items []*item) [][]*item {
	var divided [][]*item
	size := 0
	for _, about := range items {
		bytes := proto.Size(about.wire)
		if last := len(divided) - 1; last >= 0 && len(divided[last]) < maxBatchItems && size+bytes <= maxBatchBytes {
			divided[last] = append(divided[last], about)
			size += bytes
			continue
		}
		divided, size = append(divided, []*item{about}), bytes
	}
	return divided
}
