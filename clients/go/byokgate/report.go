package byokgate

import (
	"context"
	"maps"
	"sync"
)

// Reporter asks byok-gate without obeying it: to see what would be denied before it is. It makes no [Allowed], so that code
// which needs one does not compile with a Reporter in a client's place; its log lines, outcomes and counts have names of
// their own.
type Reporter struct {
	client *Client

	mu     sync.Mutex
	counts Counts
}

// Counts are how often a [Reporter] saw what, since it was made.
type Counts struct {
	// WouldAllow is how many would have been allowed.
	WouldAllow uint64
	// WouldRefuse is how many would have been refused, by code: a denial's, or DECISION_UNAVAILABLE.
	WouldRefuse map[string]uint64
}

// Report is what would have come of a request. It decides nothing.
type Report struct {
	refusal Refusal
	asked   bool
}

// WithReportOnly gives a reporter that asks over this client's connection, with its settings. The client itself goes on to
// enforce.
func (c *Client) WithReportOnly() *Reporter {
	return &Reporter{client: &Client{conn: c.conn, service: c.service, config: c.config, mode: ReportOnly}}
}

// Report asks, logs and counts. It takes as long as [Client.Decide] would; run it in a goroutine where that must not show.
func (r *Reporter) Report(ctx context.Context, request Request) Report {
	_, refusal := r.client.decide(ctx, request)
	r.mu.Lock()
	defer r.mu.Unlock()
	if refusal == nil {
		r.counts.WouldAllow++
		return Report{asked: true}
	}
	if r.counts.WouldRefuse == nil {
		r.counts.WouldRefuse = map[string]uint64{}
	}
	r.counts.WouldRefuse[refusal.Code()]++
	return Report{refusal: refusal, asked: true}
}

// Counts are those so far.
func (r *Reporter) Counts() Counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Counts{WouldAllow: r.counts.WouldAllow, WouldRefuse: maps.Clone(r.counts.WouldRefuse)}
}

// WouldRefuse is why the request would have been refused. Nil if it would not have been, or if nothing was asked (the zero
// Report). It is no error to act on, and no permission either.
func (r Report) WouldRefuse() Refusal { return r.refusal }

// String is for people.
func (r Report) String() string {
	switch {
	case !r.asked:
		return "byok-gate, report only: nothing was asked"
	case r.refusal == nil:
		return "byok-gate, report only: would have been allowed"
	default:
		return "byok-gate, report only: would have been refused: " + r.refusal.Code()
	}
}
