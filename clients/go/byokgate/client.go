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
	// DefaultTimeout is how long one decision may take. byok-gate gives a provider three seconds to answer; a caller that waits a little
	// longer gets byok-gate's own verdict on a slow provider instead of a bare DEADLINE_EXCEEDED.
	DefaultTimeout = 4 * time.Second
	// DefaultBatchTimeout is how long one batch may take: byok-gate's own limit for one.
	DefaultBatchTimeout = 60 * time.Second

	// maxReconnectDelay is the longest pause between two attempts to connect. With gRPC's own, two minutes, a restarted byok-gate would go
	// unnoticed that long. A call with a short timeout retries for a second or less, and an attempt must fall into that time.
	maxReconnectDelay  = 250 * time.Millisecond
	baseReconnectDelay = 50 * time.Millisecond
	minConnectTimeout  = 2 * time.Second
	// Detects a peer that vanished without closing the connection before a request needs it.
	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 3 * time.Second
	// maxRounds is how often one request is decided at most while byok-gate's registry changes.
	maxRounds = 3
)

// Decider is the part of a [Client] that handlers need, for code that wraps it. A fake cannot make an [Allowed]; for tests use package
// byokgatetest, which gives a real Client.
type Decider interface {
	Decide(ctx context.Context, request Request) (Allowed, error)
}

// Client calls byok-gate. It is safe for concurrent use; a process needs one. A nil or zero Client decides nothing: every call is
// undecided.
type Client struct {
	*core
	// mode is in every log line and observation, so that an enforcing client's and a reporter's are never mixed up.
	mode Mode
	// quiet: answers are logged at DEBUG, since a sweep repeats them.
	quiet bool
	// traceless: the context already has its trace.
	traceless bool
}

var _ Decider = (*Client)(nil)

// core is shared by a client and its reporters.
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
	// lanes marks a call for the balancing, and says which requests may share a batch's call.
	lanes   lanes
	stopped atomic.Bool
}

// New makes a client for the byok-gate at target: host:port, dns:///host:port, or unix:///path. It does not connect yet: a platform can
// start without byok-gate, but starts no workspace until byok-gate is up.
//
// Beyond loopback it requires [WithTLS], [WithTLSFiles] or, explicitly, [WithInsecureNetwork]: the requests hold credentials.
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

// Close closes the connections. Calls in flight, and later ones, become Undecided.
func (c *Client) Close() error {
	if c == nil || c.core == nil {
		return nil
	}
	c.stopped.Store(true)
	return c.conn.Close()
}

// closed says that no call can be made.
func (c *core) closed() bool { return c == nil || c.stopped.Load() }

func (c *Client) unusable() bool { return c == nil || c.core.closed() }

var errClosed = errors.New("the client is closed, nil or zero")

// Decide asks whether the workspace may start. The error is a [*Denied] or an [*Undecided]; the [Allowed] is then the zero one, which is
// not an allow.
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

// refuse records a refusal without a call.
func (c *Client) refuse(ctx context.Context, request *Request, refusal Refusal) Refusal {
	c.record(ctx, request, Allowed{}, refusal, 0, 0)
	return refusal
}

// ask gets an answer that was made with every credential that could matter to it. Lookups get the caller's own context, without the
// metadata for byok-gate.
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

// prepare gives the names to fetch. Settled: no credential can matter in any registry.
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
		// The decision will say so too, and name every faulty field. If it were an allow, its names would be fetched before it counts.
		return nil, false, nil
	case err != nil:
		return nil, false, c.failed(ctx, spec, err)
	}
	return names, false, nil
}

// unread logs what could not be read.
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
