package byokgate

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"sync"
)

// Reporter calls byok-gate without obeying it, to see what would be denied. It makes no [Allowed], so that code which needs one
// does not compile with a Reporter in place of a client; its log lines, outcomes and counts have their own names, and byok-gate
// records and counts its calls separately.
type Reporter struct {
	client *Client
	queue  int
	slots  chan struct{}

	mu      sync.Mutex
	pending int
	// idle is closed when nothing is pending. Nil if nothing waits for it.
	idle chan struct{}
}

// ReportOptions are a [Reporter]'s.
type ReportOptions struct {
	// A number below zero, or far above what a process can hold, is refused.

	// Queue is how many calls of [Reporter.Go] may be pending; more are dropped and counted. Zero: 256.
	Queue int
	// Concurrent is how many of these run at a time. Zero: 8.
	Concurrent int
}

const (
	defaultReportQueue      = 256
	defaultReportConcurrent = 8
	maxReportQueue          = 1 << 20
	maxReportConcurrent     = 1 << 12
)

// Counts are the results of a client's [Reporter]s, since the client was made.
type Counts struct {
	// WouldAllow is how many would have been allowed.
	WouldAllow uint64
	// Unverified is how many of these had an unverified credential.
	Unverified uint64
	// WouldRefuse is how many would have been refused, by code: a denial's, or DECISION_UNAVAILABLE.
	WouldRefuse map[Code]uint64
	// Dropped is how many were not sent, since the queue of [Reporter.Go] was full.
	Dropped uint64
}

// counts are shared by all reporters of a client.
type counts struct {
	mu   sync.Mutex
	seen Counts
}

// Report is what the decision would have been. It decides nothing.
type Report struct {
	refusal Refusal
	mode    BillingMode
	asked   bool
}

// ReportOnly returns a reporter that uses this client's connections and settings. The client itself still enforces. The error
// names an invalid option.
func (c *Client) ReportOnly(options ReportOptions) (*Reporter, error) {
	var faults []error
	count := func(name string, given *int, otherwise, most int) {
		switch {
		case *given == 0:
			*given = otherwise
		case *given < 0:
			faults = append(faults, fmt.Errorf("byokgate: ReportOptions.%s: %w", name, notNegative(*given)))
		case *given > most:
			faults = append(faults, fmt.Errorf("byokgate: ReportOptions.%s: %d is above %d", name, *given, most))
		}
	}
	count("Queue", &options.Queue, defaultReportQueue, maxReportQueue)
	count("Concurrent", &options.Concurrent, defaultReportConcurrent, maxReportConcurrent)
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	reporter := &Reporter{client: &Client{mode: ReportOnly}, queue: options.Queue, slots: make(chan struct{}, options.Concurrent)}
	if c != nil {
		reporter.client.core = c.core
	}
	return reporter, nil
}

// none says that there is no reporter: nil and the zero one make no calls.
func (r *Reporter) none() bool { return r == nil || r.client == nil }

// Report calls, logs and counts. It takes as long as [Client.Decide] would; [Reporter.Go] does not wait.
func (r *Reporter) Report(ctx context.Context, request Request) Report {
	if r.none() {
		return Report{}
	}
	allowed, refusal := r.client.decide(orBackground(ctx), &request)
	return r.count(allowed, refusal)
}

// Go calls in the background, for a handler that returns meanwhile: the call outlives the context's end, but keeps its values.
// It never blocks. It returns false if the queue is full: the call is then dropped and counted.
//
// The request's Lookup runs after the handler has returned, so it must not use anything that ends with the handler.
func (r *Reporter) Go(ctx context.Context, request Request) bool {
	if r.none() {
		return false
	}
	if ctx = orBackground(ctx); !r.client.unusable() {
		// The hook is the caller's: it runs while the caller's goroutine and context exist.
		ctx = r.client.traced(ctx)
	}
	ctx = context.WithoutCancel(ctx)
	request.Spec = request.Spec.kept()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pending >= r.queue {
		r.client.drop()
		return false
	}
	r.pending++
	go func() {
		defer r.done()
		r.slots <- struct{}{}
		defer func() { <-r.slots }()
		untraced := *r.client
		untraced.traceless = true
		allowed, refusal := untraced.decide(ctx, &request)
		r.count(allowed, refusal)
	}()
	return true
}

func (r *Reporter) done() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pending--; r.pending == 0 && r.idle != nil {
		close(r.idle)
		r.idle = nil
	}
}

// Wait returns when no call of [Reporter.Go] is pending, or with the context's error.
func (r *Reporter) Wait(ctx context.Context) error {
	if r.none() {
		return nil
	}
	r.mu.Lock()
	if r.pending == 0 {
		r.mu.Unlock()
		return nil
	}
	if r.idle == nil {
		r.idle = make(chan struct{})
	}
	idle := r.idle
	r.mu.Unlock()
	ctx = orBackground(ctx)
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// BatchReport calls for many workspaces at once, like [Client.BatchDecide], and decides nothing.
func (r *Reporter) BatchReport(ctx context.Context, requests []Request) iter.Seq2[int, Report] {
	return func(yield func(int, Report) bool) {
		if r.none() || yield == nil {
			return
		}
		for index, result := range r.client.BatchDecide(ctx, requests) {
			if !yield(index, r.count(result.allowed, result.refusal)) {
				return
			}
		}
	}
}

func (r *Reporter) count(allowed Allowed, refusal Refusal) Report {
	if refusal == nil && allowed.response == nil {
		refusal = missing(nil)
	}
	if core := r.client.core; core != nil {
		core.counts.mu.Lock()
		defer core.counts.mu.Unlock()
		seen := &core.counts.seen
		switch {
		case refusal == nil:
			seen.WouldAllow++
			if unverified(allowed.response) {
				seen.Unverified++
			}
		default:
			if seen.WouldRefuse == nil {
				seen.WouldRefuse = map[Code]uint64{}
			}
			seen.WouldRefuse[refusal.Code()]++
		}
	}
	return Report{refusal: refusal, mode: allowed.mode, asked: true}
}

func (c *Client) drop() {
	if c.core == nil {
		return
	}
	c.counts.mu.Lock()
	defer c.counts.mu.Unlock()
	c.counts.seen.Dropped++
}

// Counts returns the counts so far, of all reporters of the client.
func (r *Reporter) Counts() Counts {
	if r.none() || r.client.core == nil {
		return Counts{}
	}
	held := &r.client.counts
	held.mu.Lock()
	defer held.mu.Unlock()
	seen := held.seen
	seen.WouldRefuse = maps.Clone(seen.WouldRefuse)
	return seen
}

// Verdict is what the decision would have been, with the refusal if it was one. The outcome is empty if no call was made (the
// zero Report). It is neither an error to act on nor a permission.
func (r Report) Verdict() (Outcome, Refusal) {
	if !r.asked {
		return "", nil
	}
	switch r.refusal.(type) {
	case nil:
		return OutcomeWouldAllow, nil
	case *Denied:
		return OutcomeWouldDeny, r.refusal
	default:
		return OutcomeWouldUndecided, r.refusal
	}
}

// String is for people.
func (r Report) String() string {
	switch outcome, refusal := r.Verdict(); outcome {
	case "":
		return "byok-gate, report only: nothing was asked"
	case OutcomeWouldAllow:
		return "byok-gate, report only: would have been allowed, billing " + string(r.mode)
	default:
		return "byok-gate, report only: would have been refused: " + string(refusal.Code())
	}
}
