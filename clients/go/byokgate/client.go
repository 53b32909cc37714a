package byokgate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

const (
	// DefaultTimeout is how long one decision may take. byok-gate gives a provider three seconds to answer; a caller that
	// waits a little longer reads byok-gate's own verdict on a slow provider instead of a bare DEADLINE_EXCEEDED.
	DefaultTimeout = 4 * time.Second
	// DefaultBatchTimeout is how long one batch may take: byok-gate's own limit for one.
	DefaultBatchTimeout = 60 * time.Second
	// MaxReconnectDelay is the longest pause between two attempts to connect. gRPC's own is two minutes: that long a
	// restarted byok-gate would go unnoticed.
	MaxReconnectDelay = time.Second

	baseReconnectDelay = 50 * time.Millisecond
	minConnectTimeout  = 2 * time.Second
	// A peer that vanished without closing the connection is found out before a request finds it.
	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 3 * time.Second
	// maxRounds is how often one request is decided at most while byok-gate's registry changes under it.
	maxRounds = 3
)

// Client asks byok-gate. It is safe for concurrent use; a process needs one.
type Client struct {
	conn    *grpc.ClientConn
	service byokgatev1.PolicyDecisionServiceClient
	config
	memory memory
	// mode is said in every log line and observation: an enforcing client's and a reporter's are never mixed up.
	mode Mode
}

// New makes ready to ask the byok-gate at target: host:port, or unix:///path. It does not connect yet: a platform starts
// without byok-gate, and starts no workspace until it is there.
//
// Beyond loopback it wants [WithTLS], [WithTLSFiles] or, by name, [WithInsecureNetwork]: the requests hold credentials.
func New(target string, options ...Option) (*Client, error) {
	client := &Client{
		config: config{timeout: DefaultTimeout, batchTimeout: DefaultBatchTimeout, log: slog.Default()},
		mode:   Enforce,
	}
	var faults []error
	for _, option := range options {
		faults = append(faults, option(&client.config))
	}
	where, err := parseTarget(target)
	if err != nil {
		err = fmt.Errorf("target %q %w", target, err)
	} else if client.tls == nil && !client.insecure && !where.private() {
		err = fmt.Errorf("target %q is beyond loopback, where credentials and tokens would cross the network in the clear; "+
			"use WithTLS or WithTLSFiles, or WithInsecureNetwork where the network is trusted", target)
	}
	if err := errors.Join(append(faults, err)...); err != nil {
		return nil, fmt.Errorf("byokgate: %w", err)
	}
	client.conn, err = grpc.NewClient(where.dial, client.dialOptions(where)...)
	if err != nil {
		return nil, fmt.Errorf("byokgate: target %q: %w", target, err)
	}
	client.service = byokgatev1.NewPolicyDecisionServiceClient(client.conn)
	return client, nil
}

// Close ends the connection. Calls under way become Undecided.
func (c *Client) Close() error { return c.conn.Close() }

// Decide asks whether the workspace may start. The error is a [*Denied] or an [*Undecided], and the [Allowed] then the zero
// one, which is no allow.
func (c *Client) Decide(ctx context.Context, request Request) (Allowed, error) {
	allowed, refusal := c.decide(ctx, request)
	if refusal != nil {
		return Allowed{}, refusal
	}
	return allowed, nil
}

func (c *Client) decide(ctx context.Context, request Request) (Allowed, Refusal) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	began := time.Now()
	allowed, refusal := c.ask(ctx, request)
	c.record(ctx, request, allowed, refusal, time.Since(began))
	return allowed, refusal
}

// ask gets an answer that was made with every credential that could matter to it.
func (c *Client) ask(ctx context.Context, request Request) (Allowed, Refusal) {
	held := newWallet()
	for range maxRounds {
		basis, refusal := c.prepare(ctx, request, held)
		if refusal != nil {
			return Allowed{}, refusal
		}
		response, err := retry(ctx, func() (*byokgatev1.DecideResponse, error) {
			return c.service.Decide(ctx, request.wire(held))
		})
		if err != nil {
			return Allowed{}, failed(request.Spec, err)
		}
		if c.stands(ctx, request, held, basis, response) {
			return read(request.Spec, response)
		}
	}
	return Allowed{}, unsettled(request.Spec)
}

// prepare fetches what matters to this request into held. The basis is what the choice of names rests on.
func (c *Client) prepare(ctx context.Context, request Request, held *wallet) (relevance, Refusal) {
	spec := request.Spec
	if err := request.check(); err != nil {
		return relevance{}, unjudgeable(spec, err, err.Error())
	}
	if spec.Lookup == nil {
		return relevance{}, miswired(spec, errors.New("the request has no Lookup"), "the request has no Lookup")
	}
	if spec.needsNoCredential() {
		return relevance{settled: true}, nil
	}
	basis, err := c.relevance(ctx, spec)
	if status.Code(err) == codes.InvalidArgument {
		// The decision will say so too, and name every field at fault. Whatever else it says does not stand: an empty basis
		// is no registry's.
		return relevance{}, nil
	} else if err != nil {
		return relevance{}, failed(spec, err)
	}
	held.fetch(ctx, spec.Lookup, basis.names)
	for _, scope := range scopes {
		if err := held.failed[scope]; err != nil {
			c.log.WarnContext(ctx, "byok-gate: credentials could not be read", "mode", string(c.mode), "scope", scope.String(),
				"workspace_id", spec.WorkspaceID, "organization_id", spec.OrganizationID, "error", err.Error())
		}
	}
	return basis, nil
}

// stands says whether a reply can be believed: it was made by the registry that named the names, and misses none that was
// not looked for. If it was not, the names are asked for again; where nothing new comes of that, it stands after all.
func (c *Client) stands(
	ctx context.Context, request Request, held *wallet, basis relevance, response *byokgatev1.DecideResponse,
) bool {
	if basis.settled {
		return true
	}
	if response.GetRegistryRevision() == basis.revision && held.has(response.GetDeny().GetMissingEnv()) {
		return true
	}
	c.memory.forget(basis.revision)
	again, err := c.relevance(ctx, request.Spec)
	return err == nil && again.revision == response.GetRegistryRevision() && held.has(again.names)
}

// unsettled is for a registry that changes more often than it can be asked.
func unsettled(spec Spec) *Undecided {
	made := undecided(spec, http.StatusServiceUnavailable, errors.New("byok-gate's registry kept changing"))
	made.body.Error = "byok-gate's registry changed while it was asked, so nothing was started"
	made.body.Remedy = "try again; if it goes on, bring all replicas of byok-gate to the same registry"
	return made
}

func (c *Client) dialOptions(where target) []grpc.DialOption {
	transport := insecure.NewCredentials()
	if c.tls != nil {
		transport = credentials.NewTLS(c.tls)
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		// gRPC honours HTTPS_PROXY, and these requests must not leave through it.
		grpc.WithNoProxy(),
		// DNS may carry a gRPC configuration: timeouts and retries are not for a name server to set.
		grpc.WithDisableServiceConfig(),
		// One connection for good: reconnecting after a quiet hour would cost the next caller.
		grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: baseReconnectDelay, Multiplier: 1.6, Jitter: 0.2, MaxDelay: MaxReconnectDelay},
			MinConnectTimeout: minConnectTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true,
		}),
		grpc.WithUnaryInterceptor(c.unaryTrace),
		grpc.WithStreamInterceptor(c.streamTrace),
	}
	if where.unix {
		// The socket's path is no authority: servers refuse it.
		options = append(options, grpc.WithAuthority("localhost"))
	}
	if c.token != nil {
		options = append(options, grpc.WithPerRPCCredentials(bearer{c.token}))
	}
	return options
}

// === Which names matter ===

// maxRemembered bounds the memory: models come from tenants.
const maxRemembered = 4096

// relevance is which names matter to a model, by which registry.
type relevance struct {
	names    []string
	revision string
	// settled: no credential can matter, by whatever registry.
	settled bool
}

// subject is what relevance depends on, but for the registry.
type subject struct{ runtime, model string }

// memory holds what one registry revision said.
type memory struct {
	mu       sync.Mutex
	revision string
	names    map[subject][]string
	menus    map[string]menu
}

func (m *memory) recall(about subject) (relevance, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	names, found := m.names[about]
	return relevance{names: names, revision: m.revision}, found
}

func (m *memory) keep(about subject, learnt relevance) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.turnTo(learnt.revision)
	if len(m.names) >= maxRemembered {
		clear(m.names)
	}
	m.names[about] = learnt.names
}

func (m *memory) recallMenu(runtime string) ([]Model, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	kept, found := m.menus[runtime]
	if !found || time.Since(kept.at) > MenuAge {
		return nil, false
	}
	return slices.Clone(kept.models), true
}

func (m *memory) keepMenu(runtime, revision string, models []Model) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.turnTo(revision)
	m.menus[runtime] = menu{models: slices.Clone(models), at: time.Now()}
}

// turnTo drops what another revision said.
func (m *memory) turnTo(revision string) {
	if m.revision != revision || m.names == nil {
		m.revision, m.names, m.menus = revision, map[subject][]string{}, map[string]menu{}
	}
}

// forget drops what this revision said, unless it is gone already.
func (m *memory) forget(revision string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.revision == revision {
		m.revision, m.names, m.menus = "", nil, nil
	}
}

// relevance asks byok-gate, or remembers.
func (c *Client) relevance(ctx context.Context, spec Spec) (relevance, error) {
	about := subject{spec.Runtime, spec.Model}
	if known, found := c.memory.recall(about); found {
		return known, nil
	}
	response, err := c.resolve(ctx, spec.Runtime, spec.Model)
	if err != nil {
		return relevance{}, err
	}
	learnt := relevance{names: response.GetRelevantEnv(), revision: response.GetRegistryRevision()}
	// A runtime is exempt by byok-gate's configuration, which no registry revision tells of.
	if response.GetResolution().GetSource() != byokgatev1.ResolutionSource_RESOLUTION_SOURCE_EXEMPT_RUNTIME {
		c.memory.keep(about, learnt)
	}
	return learnt, nil
}

// resolve asks who owns a model. An answer that says nothing is an error.
func (c *Client) resolve(
	ctx context.Context, runtime, model string, atHand ...string,
) (*byokgatev1.ResolveProviderResponse, error) {
	response, err := retry(ctx, func() (*byokgatev1.ResolveProviderResponse, error) {
		return c.service.ResolveProvider(ctx, &byokgatev1.ResolveProviderRequest{
			Runtime: runtime, Model: model, CredentialNames: atHand,
		})
	})
	if err != nil {
		return nil, err
	}
	if response.GetRegistryRevision() == "" || response.GetResult() == nil {
		return nil, status.Error(codes.Internal, "an answer about the model's owner that says nothing")
	}
	return response, nil
}
