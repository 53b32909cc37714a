package byokgate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// Version is this package's. It is part of the user agent.
const Version = "0.1.0"

const (
	// DefaultTimeout is how long one decision may take. byok-gate gives a provider three seconds to answer; a caller that
	// waits a little longer reads byok-gate's own verdict on a slow provider instead of a bare DEADLINE_EXCEEDED.
	DefaultTimeout = 4 * time.Second
	// DefaultBatchTimeout is how long one batch may take: byok-gate's own limit for one.
	DefaultBatchTimeout = 60 * time.Second

	// maxReconnectDelay is the longest pause between two attempts to connect. gRPC's own is two minutes: that long a
	// restarted byok-gate would go unnoticed. A call with a short timeout goes on trying for a second or less, and must meet such an attempt.
	maxReconnectDelay  = 250 * time.Millisecond
	baseReconnectDelay = 50 * time.Millisecond
	minConnectTimeout  = 2 * time.Second
	// A peer that vanished without closing the connection is found out before a request finds it.
	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 3 * time.Second
	// maxRounds is how often one request is decided at most while byok-gate's registry changes under it.
	maxRounds = 3
)

// Decider is what handlers need of a [Client]: an interface for those who wrap it. A fake of one cannot make an [Allowed]; for tests there
// is package byokgatetest, which gives a real Client.
type Decider interface {
	Decide(ctx context.Context, request Request) (Allowed, error)
}

// Client asks byok-gate. It is safe for concurrent use; a process needs one. A nil or zero Client decides nothing: all that it is asked is
// undecided.
type Client struct {
	*core
	// mode is said in every log line and observation: an enforcing client's and a reporter's are never mixed up.
	mode Mode
	// quiet: answers are logged at DEBUG, since they are one of many looks at the same thing.
	quiet bool
	// traceless: the context has its trace already.
	traceless bool
}

var _ Decider = (*Client)(nil)

// core is what a client and its reporters share.
type core struct {
	config
	conn    *grpc.ClientConn
	service byokgatev1.PolicyDecisionServiceClient
	link    link
	lookups lookups
	memory  memory
	flights singleflight.Group
	counts  counts
	sweeps  sweepCounts
	// lanes says how a call is marked for the balancing, and which requests may share a batch's call.
	lanes   lanes
	stopped atomic.Bool
}

// New makes ready to ask the byok-gate at target: host:port, dns:///host:port, or unix:///path. It does not connect yet: a platform starts
// without byok-gate, and starts no workspace until it is there.
//
// Beyond loopback it wants [WithTLS], [WithTLSFiles] or, by name, [WithInsecureNetwork]: the requests hold credentials.
func New(target string, options ...Option) (*Client, error) {
	made := &core{config: config{
		timeout: DefaultTimeout, batchTimeout: DefaultBatchTimeout, log: slog.Default(),
		lookupTime: DefaultLookupTime, lookupsAtOnce: DefaultLookups,
	}}
	var faults []error
	for _, option := range options {
		if option == nil {
			faults = append(faults, errors.New("an option is nil"))
			continue
		}
		faults = append(faults, option(&made.config))
	}
	where, err := parseTarget(target)
	if err != nil {
		err = fmt.Errorf("target %q %w", target, err)
	} else if made.tls == nil && !made.insecure && !where.private() {
		err = fmt.Errorf("target %q is beyond loopback, where credentials and tokens would cross the network in the clear; "+
			"use WithTLS or WithTLSFiles, or WithInsecureNetwork where the network is trusted", target)
	}
	if err := errors.Join(append(faults, err)...); err != nil {
		return nil, fmt.Errorf("byokgate: %w", err)
	}
	made.lookups.perCall, made.lookups.most = made.lookupTime, int64(made.lookupsAtOnce)
	dial, err := made.dialOptions(where)
	if err == nil {
		made.conn, err = grpc.NewClient(where.dial, dial...)
	}
	if err != nil {
		return nil, fmt.Errorf("byokgate: target %q: %w", target, err)
	}
	made.service = byokgatev1.NewPolicyDecisionServiceClient(made.conn)
	return &Client{core: made, mode: Enforce}, nil
}

// Close ends the connections. Calls under way, and later ones, become Undecided.
func (c *Client) Close() error {
	if c == nil || c.core == nil {
		return nil
	}
	c.stopped.Store(true)
	return c.conn.Close()
}

// closed says that nothing can be asked.
func (c *core) closed() bool { return c == nil || c.stopped.Load() }

func (c *Client) unusable() bool { return c == nil || c.core.closed() }

var errClosed = errors.New("the client is closed, nil or zero")

// Decide asks whether the workspace may start. The error is a [*Denied] or an [*Undecided], and the [Allowed] then the zero
// one, which is no allow.
func (c *Client) Decide(ctx context.Context, request Request) (Allowed, error) {
	allowed, refusal := c.decide(orBackground(ctx), &request)
	if refusal != nil {
		return Allowed{}, refusal
	}
	return allowed, nil
}

func (c *Client) decide(ctx context.Context, request *Request) (Allowed, Refusal) {
	if c.unusable() {
		return Allowed{}, undecided(&request.Spec, ReasonClosed, errClosed)
	}
	timeout := c.timeout
	if request.Timeout != 0 {
		if err := checkTimeout(request.Timeout); err != nil {
			return Allowed{}, c.refuse(ctx, request, misused(&request.Spec, "Request.Timeout", err))
		}
		timeout = request.Timeout
	}
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	began := time.Now()
	allowed, refusal, retries := c.ask(c.lanes.marked(c.traced(limited), &request.Spec), ctx, request)
	c.record(limited, request, allowed, refusal, time.Since(began), retries)
	return allowed, refusal
}

// refuse records a refusal for which nobody was asked.
func (c *Client) refuse(ctx context.Context, request *Request, refusal Refusal) Refusal {
	c.record(ctx, request, Allowed{}, refusal, 0, 0)
	return refusal
}

// ask gets an answer that was made with every credential that could matter to it. Lookups get the caller's own context, without what is sent
// along to byok-gate.
func (c *Client) ask(ctx, callers context.Context, request *Request) (allowed Allowed, refusal Refusal, retries int) {
	spec := &request.Spec
	var held wallet
	names, settled, refusal := c.prepare(ctx, spec)
	if refusal != nil {
		return Allowed{}, refusal, 0
	}
	for range maxRounds {
		deadline, _ := ctx.Deadline()
		c.lookups.fetch(callers, deadline, &held, spec.Lookup, names)
		c.unread(ctx, spec, &held)
		message := request.wire(&held, c.mode)
		response, repeated, err := retry(ctx, c.core, func() (*byokgatev1.DecideResponse, error) {
			return c.service.Decide(ctx, message)
		})
		retries += repeated
		if err != nil {
			return Allowed{}, c.failed(ctx, spec, err), retries
		}
		if names = c.learn(spec, &held, response); settled || len(names) == 0 {
			allowed, refusal = read(spec, response)
			return allowed, refusal, retries
		}
		retries++
	}
	return Allowed{}, unsettled(spec), retries
}

// prepare gives the names to fetch. Settled: no credential can matter, by whatever registry.
func (c *Client) prepare(ctx context.Context, spec *Spec) (names []string, settled bool, refusal Refusal) {
	if violation, sound := spec.check(); !sound {
		return nil, false, unjudgeable(spec, errors.New(violation.Field+": "+violation.Description), violation)
	}
	if spec.Lookup == nil {
		return nil, false, undecided(spec, ReasonLookupMissing, errors.New("the request has no Lookup"))
	}
	if spec.needsNoCredential() {
		return nil, true, nil
	}
	names, err := c.names(ctx, spec)
	switch {
	case status.Code(err) == codes.InvalidArgument:
		// The decision will say so too, and name every field at fault. Were it an allow, the names that it comes with would be fetched
		// before it is believed.
		return nil, false, nil
	case err != nil:
		return nil, false, c.failed(ctx, spec, err)
	}
	return names, false, nil
}

// unread says in the log what could not be read.
func (c *Client) unread(ctx context.Context, spec *Spec, held *wallet) {
	if err := held.failure(); err != nil {
		level := slog.LevelWarn
		if c.quiet {
			level = slog.LevelDebug
		}
		c.logSafely(ctx, level, "byok-gate: credentials could not be read",
			slog.String("mode", string(c.mode)), slog.String("workspace_id", spec.WorkspaceID),
			slog.String("organization_id", spec.OrganizationID), slog.String("error", err.Error()))
	}
}
