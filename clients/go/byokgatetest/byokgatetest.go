// Package byokgatetest is a byok-gate for the tests of its callers: a real gRPC server in memory that answers by rules, and records its
// calls. The client is a real one, so a test sees the same timing, retries, bodies and statuses as production.
//
//	gate := byokgatetest.Start(t)
//	handler := NewServer(gate.Client())
//	gate.Allow(byokgate.BYOK)                     // an allow,
//	gate.Deny(byokgate.MissingBYOKCredential)     // a denial with byok-gate's own words,
//	gate.Down()                                   // or nobody there
//
// Rules answer for some workspaces and not for others:
//
//	gate.When(byokgatetest.Model("claude-opus-4-7")).Deny(byokgate.BYOKProbeTimeout).Then().Allow(byokgate.BYOK)
//
// A program that links this package outside of a test does not start: it could allow anything.
package byokgatetest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

func init() { mustBeTest() }

func mustBeTest() {
	if !testing.Testing() {
		panic("byokgatetest is for tests alone, and this is no test: it makes a byok-gate that allows what it is told to")
	}
}

// clientTimeout is the client's timeout unless an option sets another: a gate that is down is then noticed within a second.
const clientTimeout = 2 * time.Second

// Gate is a byok-gate that answers by rules. It is safe for concurrent use.
type Gate struct {
	t testing.TB

	mu       sync.Mutex
	listener *bufconn.Listener
	server   *grpc.Server
	// refusal is why nobody can connect. Nil: they can.
	refusal   error
	rules     []*Rule
	otherwise *Rule
	names     map[string][]string
	menu      []byokgate.Model
	asked     []Asked
	decisions int
	ended     bool
}

// Start starts one. It ends with the test.
func Start(t testing.TB) *Gate {
	mustBeTest()
	if t == nil {
		panic("byokgatetest: Start needs the test that it is for")
	}
	t.Helper()
	gate := &Gate{t: t, names: map[string][]string{}}
	gate.Up()
	t.Cleanup(func() {
		gate.Down()
		gate.mu.Lock()
		defer gate.mu.Unlock()
		gate.ended = true
	})
	return gate
}

// Client is a client of this gate, which is closed with the test. It logs only with an option.
func (g *Gate) Client(options ...byokgate.Option) *byokgate.Client {
	g.t.Helper()
	options = append([]byokgate.Option{
		byokgate.WithLogger(slog.New(silent{})), byokgate.WithTimeout(clientTimeout), byokgate.WithDialer(g.dial),
	}, options...)
	client, err := byokgate.New("127.0.0.1:50051", options...)
	if err != nil {
		g.t.Fatalf("byokgatetest: %v", err)
	}
	g.t.Cleanup(func() { _ = client.Close() })
	return client
}

func (g *Gate) dial(ctx context.Context, _ string) (net.Conn, error) {
	g.mu.Lock()
	listener, refusal := g.listener, g.refusal
	g.mu.Unlock()
	if refusal != nil {
		return nil, refusal
	}
	return listener.DialContext(ctx)
}

// Down closes all connections and accepts no more, as if byok-gate were down.
func (g *Gate) Down() {
	g.mu.Lock()
	server := g.server
	g.server, g.refusal = nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	g.mu.Unlock()
	if server != nil {
		server.Stop()
	}
}

// Up accepts connections again.
func (g *Gate) Up() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.server != nil {
		return
	}
	g.listener, g.server, g.refusal = bufconn.Listen(1<<20), grpc.NewServer(), nil
	byokgatev1.RegisterPolicyDecisionServiceServer(g.server, &service{gate: g})
	go func(server *grpc.Server, listener *bufconn.Listener) { _ = server.Serve(listener) }(g.server, g.listener)
}

// === Rules ===

// Match says whether a rule applies to a call. A nil one matches all.
type Match func(Asked) bool

// Model matches these models.
func Model(models ...string) Match {
	return func(asked Asked) bool { return slices.Contains(models, asked.Model) }
}

// Organization matches these organizations.
func Organization(ids ...string) Match {
	return func(asked Asked) bool { return slices.Contains(ids, asked.OrganizationID) }
}

// Workspace matches these workspaces.
func Workspace(ids ...string) Match {
	return func(asked Asked) bool { return slices.Contains(ids, asked.WorkspaceID) }
}

// At matches these checkpoints.
func At(checkpoints ...byokgate.Checkpoint) Match {
	return func(asked Asked) bool { return slices.Contains(checkpoints, asked.Checkpoint) }
}

// All matches calls that all of these match.
func All(matches ...Match) Match {
	return func(asked Asked) bool {
		return !slices.ContainsFunc(matches, func(match Match) bool { return match != nil && !match(asked) })
	}
}

// Rule sets the answers to the calls that it matches. A rule without an answer is skipped.
type Rule struct {
	gate  *Gate
	match Match
	// steps answer one call each, the last one all that follow.
	steps []step
	used  int
	// next starts a new step with the next setting.
	next bool
}

type step struct {
	after time.Duration
	reply func(Asked, *Gate) (*byokgatev1.DecideResponse, error)
}

// When starts a rule. Rules are tried in the order of their creation, and the first that matches answers. A call that no rule matches gets
// the answer that [Gate.Allow], [Gate.Deny] or [Gate.Fail] set last.
func (g *Gate) When(match Match) *Rule {
	rule := &Rule{gate: g, match: match}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.rules = append(g.rules, rule)
	return rule
}

// Forget drops all rules and settings, but not the recorded calls.
func (g *Gate) Forget() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.rules, g.otherwise = nil, nil
}

func (g *Gate) all() *Rule {
	rule := &Rule{gate: g}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.otherwise = rule
	return rule
}

// Allow allows calls that no rule matches.
func (g *Gate) Allow(mode byokgate.BillingMode, warnings ...byokgate.WarningCode) *Rule {
	return g.all().Allow(mode, warnings...)
}

// Deny denies calls that no rule matches.
func (g *Gate) Deny(code byokgate.Code, options ...DenyOption) *Rule {
	return g.all().Deny(code, options...)
}

// Fail makes calls that no rule matches end without a decision.
func (g *Gate) Fail(reason byokgate.Reason) *Rule { return g.all().Fail(reason) }

// say sets the current step's answer.
func (r *Rule) say(reply func(Asked, *Gate) (*byokgatev1.DecideResponse, error)) *Rule {
	r.gate.mu.Lock()
	defer r.gate.mu.Unlock()
	r.present().reply = reply
	return r
}

// present is the step that settings apply to. Locked.
func (r *Rule) present() *step {
	if len(r.steps) == 0 || r.next {
		r.steps, r.next = append(r.steps, step{}), false
	}
	return &r.steps[len(r.steps)-1]
}

// Allow answers with an allow.
func (r *Rule) Allow(mode byokgate.BillingMode, warnings ...byokgate.WarningCode) *Rule {
	number, known := byokgatev1.BillingMode_value["BILLING_MODE_"+string(mode)]
	if !known || number == 0 {
		r.gate.t.Fatalf("byokgatetest: no allow has the billing mode %q", mode)
	}
	var warned []*byokgatev1.Warning
	for _, code := range warnings {
		warned = append(warned, &byokgatev1.Warning{
			Code: byokgatev1.WarningCode(byokgatev1.WarningCode_value["WARNING_CODE_"+string(code)]), Message: "byokgatetest was told to warn of " + string(code),
		})
	}
	return r.say(func(asked Asked, g *Gate) (*byokgatev1.DecideResponse, error) {
		response := g.reply(asked)
		response.Decision = &byokgatev1.DecideResponse_Allow{Allow: &byokgatev1.Allow{BillingMode: byokgatev1.BillingMode(number)}}
		response.Resolution.BillingMode = byokgatev1.BillingMode(number)
		response.Warnings = warned
		if mode == byokgate.BYOK {
			response.Liveness = &byokgatev1.Liveness{
				Verdict: byokgatev1.Verdict_VERDICT_VALID, UpstreamStatus: 200, EndpointHost: host,
				ServedFrom: byokgatev1.ServedFrom_SERVED_FROM_PROBE,
			}
			if slices.Contains(warnings, byokgate.WarnCredentialUnverified) {
				response.Liveness = &byokgatev1.Liveness{Verdict: byokgatev1.Verdict_VERDICT_NO_SERVER_SURFACE}
			}
		}
		return response, nil
	})
}

// DenyOption adds details to a denial.
type DenyOption func(*byokgatev1.Deny, *byokgatev1.DecideResponse)

// Missing sets the names of which one is needed.
func Missing(names ...string) DenyOption {
	return func(deny *byokgatev1.Deny, _ *byokgatev1.DecideResponse) { deny.MissingEnv = names }
}

// Words sets the message and the remedy.
func Words(message, remedy string) DenyOption {
	return func(deny *byokgatev1.Deny, _ *byokgatev1.DecideResponse) { deny.Message, deny.Remedy = message, remedy }
}

// Alternatives sets models that need no key.
func Alternatives(models ...string) DenyOption {
	return func(deny *byokgatev1.Deny, _ *byokgatev1.DecideResponse) { deny.AlternativeModels = models }
}

// RetryAfter sets when to retry, for a retryable denial. With zero or less, the client uses its own default.
func RetryAfter(pause time.Duration) DenyOption {
	return func(deny *byokgatev1.Deny, _ *byokgatev1.DecideResponse) { deny.RetryAfter = durationpb.New(pause) }
}

// Verdict sets what is known of the credential, if a code has several: FORBIDDEN besides INVALID.
func Verdict(verdict byokgate.Verdict) DenyOption {
	return func(_ *byokgatev1.Deny, response *byokgatev1.DecideResponse) {
		response.Liveness = &byokgatev1.Liveness{
			Verdict: byokgatev1.Verdict(byokgatev1.Verdict_value["VERDICT_"+string(verdict)]), EndpointHost: host,
		}
	}
}

// Deny answers with a denial: byok-gate's own message, and retryable if byok-gate's is.
func (r *Rule) Deny(code byokgate.Code, options ...DenyOption) *Rule {
	if _, _, known := deny(code, "", "", nil); !known {
		r.gate.t.Fatalf("byokgatetest: byok-gate denies nothing with the code %q", code)
	}
	return r.say(func(asked Asked, g *Gate) (*byokgatev1.DecideResponse, error) {
		names := g.named(asked.Model)
		response := g.reply(asked)
		made, liveness, _ := deny(code, asked.Runtime, asked.Model, names)
		response.Resolution.BillingMode = byokgatev1.BillingMode_BILLING_MODE_BYOK
		if response.Liveness = liveness; liveness != nil {
			response.Resolution.CredentialEnv, response.Resolution.CredentialScope = noName, byokgatev1.Scope_SCOPE_WORKSPACE
			if len(names) > 0 {
				response.Resolution.CredentialEnv = names[0]
			}
		}
		if made.GetRetryable() {
			made.RetryAfter = durationpb.New(retryAfter)
		}
		for _, option := range options {
			if option != nil {
				option(made, response)
			}
		}
		response.Decision = &byokgatev1.DecideResponse_Deny{Deny: made}
		return response, nil
	})
}

// Fail answers without a decision, for one of the reasons that come from byok-gate or the network. Misconfiguration comes from the client's
// options.
func (r *Rule) Fail(reason byokgate.Reason) *Rule {
	if reason == byokgate.ReasonUnreadableReply {
		return r.say(func(Asked, *Gate) (*byokgatev1.DecideResponse, error) { return &byokgatev1.DecideResponse{}, nil })
	}
	if reason == byokgate.ReasonRegistryMoving {
		return r.say(func(asked Asked, g *Gate) (*byokgatev1.DecideResponse, error) {
			response := g.reply(asked)
			response.RelevantEnv = []string{fmt.Sprint("NAME_", response.GetDecisionId()[24:])}
			response.Decision = &byokgatev1.DecideResponse_Deny{Deny: &byokgatev1.Deny{Code: byokgatev1.DenyCode_DENY_CODE_MISSING_BYOK_CREDENTIAL}}
			return response, nil
		})
	}
	failure, known := failures[reason]
	if !known {
		r.gate.t.Fatalf("byokgatetest: %s is no failure of byok-gate's; Gate.Down is for one that is not there", reason)
	}
	return r.say(func(Asked, *Gate) (*byokgatev1.DecideResponse, error) { return nil, failure() })
}

// failures are byok-gate's errors.
var failures = map[byokgate.Reason]func() error{
	byokgate.ReasonUnreachable:      failure(codes.Unavailable, ""),
	byokgate.ReasonTimedOut:         failure(codes.DeadlineExceeded, "DEADLINE"),
	byokgate.ReasonOverloaded:       failure(codes.ResourceExhausted, "LIMIT_REACHED", &errdetails.RetryInfo{RetryDelay: durationpb.New(10 * time.Second)}),
	byokgate.ReasonDraining:         failure(codes.Unavailable, "DRAINING", &errdetails.RetryInfo{RetryDelay: durationpb.New(time.Second)}),
	byokgate.ReasonBadRequest:       failure(codes.InvalidArgument, "BAD_REQUEST", badRequest),
	byokgate.ReasonUnauthenticated:  failure(codes.Unauthenticated, "TOKEN_UNKNOWN"),
	byokgate.ReasonPermissionDenied: failure(codes.PermissionDenied, "METHOD_NOT_ALLOWED"),
	byokgate.ReasonNotAGate:         failure(codes.Unimplemented, ""),
	byokgate.ReasonInternal:         failure(codes.Internal, "INTERNAL"),
}

var badRequest = &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
	{Field: "workspace_spec.model", Description: "byokgatetest was told to refuse it"},
}}

func failure(code codes.Code, reason string, details ...protoadapt.MessageV1) func() error {
	return func() error {
		said := status.New(code, "byokgatetest was told to fail")
		if code == codes.InvalidArgument {
			said = status.New(code, "workspace_spec.model: byokgatetest was told to refuse it")
		}
		all := details
		if reason != "" {
			all = append([]protoadapt.MessageV1{&errdetails.ErrorInfo{Domain: "byok-gate", Reason: reason}}, details...)
		}
		if with, err := said.WithDetails(all...); err == nil {
			said = with
		}
		return said.Err()
	}
}

// After delays the current answer. The caller's own deadline may end the call earlier.
func (r *Rule) After(pause time.Duration) *Rule {
	r.gate.t.Helper()
	if pause < 0 {
		r.gate.t.Fatalf("byokgatetest: After(%v): nothing is answered before it is asked", pause)
	}
	r.gate.mu.Lock()
	defer r.gate.mu.Unlock()
	r.present().after = pause
	return r
}

// Then starts the answer to the next call: each is given once, and the last to all that follow.
func (r *Rule) Then() *Rule {
	r.gate.mu.Lock()
	defer r.gate.mu.Unlock()
	r.next = true
	return r
}

// Names sets the credential names that matter to a model: the client fetches them before it calls. For a model without names, no lookup
// runs.
func (g *Gate) Names(model string, names ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.names[model] = slices.Clone(names)
}

// Menu sets the answer of ListModels.
func (g *Gate) Menu(models ...byokgate.Model) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.menu = slices.Clone(models)
}

func (g *Gate) named(model string) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.names[model])
}

// === Recorded calls ===

// Asked is one call as it came over the wire.
type Asked struct {
	Checkpoint       byokgate.Checkpoint
	WorkspaceID      string
	OrganizationID   string
	Runtime          string
	Model            string
	Credentials      []Credential
	UnreadableScopes []byokgate.Scope
	OperatorOverride byokgate.OperatorOverride
	PlatformProxy    byokgate.PlatformProxy
	TenantBaseURLEnv []string
	// MaxLivenessAge is nil if none was set.
	MaxLivenessAge *time.Duration
	Explain        bool
	ReportOnly     bool
	// Batch: it came in one.
	Batch bool
	// TraceParent is the W3C trace context's. Empty without one.
	TraceParent string
}

// Credential is one that was sent.
type Credential struct {
	Name  string
	Scope byokgate.Scope
	// Value is unreadable if the caller said so.
	Value byokgate.Secret
}

// Asked returns every call so far, in order. The slice is a copy.
func (g *Gate) Asked() []Asked {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.asked)
}

func questionOf(ctx context.Context, request *byokgatev1.DecideRequest, batch bool) Asked {
	spec := request.GetWorkspaceSpec()
	asked := Asked{
		Checkpoint: byokgate.Checkpoint(request.GetCheckpoint()), WorkspaceID: spec.GetWorkspaceId(),
		OrganizationID: spec.GetOrganizationId(), Runtime: spec.GetRuntime(), Model: spec.GetModel(),
		OperatorOverride: byokgate.OperatorOverride(spec.GetOperatorOverride()), PlatformProxy: byokgate.PlatformProxy(spec.GetPlatformProxy()),
		TenantBaseURLEnv: spec.GetTenantBaseUrlEnv(), Explain: request.GetExplain(), ReportOnly: request.GetReportOnly(), Batch: batch,
	}
	for _, sent := range spec.GetCredentials() {
		value := byokgate.NewSecret(sent.GetValue())
		if sent.GetUnreadable() {
			value = byokgate.Unreadable()
		}
		asked.Credentials = append(asked.Credentials, Credential{sent.GetEnvName(), byokgate.Scope(sent.GetScope()), value})
	}
	for _, scope := range spec.GetUnreadableScopes() {
		asked.UnreadableScopes = append(asked.UnreadableScopes, byokgate.Scope(scope))
	}
	if age := request.GetMaxLivenessAge(); age != nil {
		given := age.AsDuration()
		asked.MaxLivenessAge = &given
	}
	if sent, _ := metadata.FromIncomingContext(ctx); len(sent.Get("traceparent")) == 1 {
		asked.TraceParent = sent.Get("traceparent")[0]
	}
	return asked
}

// === The service ===

type service struct {
	byokgatev1.UnimplementedPolicyDecisionServiceServer
	gate *Gate
}

const revision = "byokgatetest"

// reply has the fields that all answers share.
func (g *Gate) reply(asked Asked) *byokgatev1.DecideResponse {
	names := g.named(asked.Model)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.decisions++
	return &byokgatev1.DecideResponse{
		DecisionId:       fmt.Sprintf("01900000-0000-7000-8000-%012x", g.decisions),
		Resolution:       owner(names),
		RegistryRevision: revision, CatalogueRevision: revision, RelevantEnv: names,
	}
}

func owner(names []string) *byokgatev1.Resolution {
	return &byokgatev1.Resolution{
		Provider: provider, AcceptedEnv: names, BillingMode: byokgatev1.BillingMode_BILLING_MODE_BYOK,
		Source: byokgatev1.ResolutionSource_RESOLUTION_SOURCE_DERIVED, MatchedBy: byokgatev1.MatchedBy_MATCHED_BY_EXACT_MODEL,
	}
}

// answer finds the rule, and returns its answer.
func (g *Gate) answer(ctx context.Context, request *byokgatev1.DecideRequest, batch bool) (*byokgatev1.DecideResponse, error) {
	asked := questionOf(ctx, request, batch)
	g.mu.Lock()
	g.asked = append(g.asked, asked)
	rules, otherwise := slices.Clone(g.rules), g.otherwise
	g.mu.Unlock()
	if otherwise != nil {
		rules = append(rules, otherwise)
	}
	for _, rule := range rules {
		if rule.match != nil && !rule.match(asked) {
			continue
		}
		g.mu.Lock()
		if len(rule.steps) == 0 {
			g.mu.Unlock()
			continue
		}
		now := rule.steps[min(rule.used, len(rule.steps)-1)]
		rule.used++
		g.mu.Unlock()
		if now.after > 0 {
			timer := time.NewTimer(now.after)
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-ctx.Done():
				return nil, status.FromContextError(ctx.Err()).Err()
			}
		}
		if now.reply != nil {
			return now.reply(asked, g)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.ended {
		g.t.Errorf("byokgatetest: no rule says how to answer %s of %q on %q; begin with Gate.Allow, Gate.Deny or Gate.Fail",
			asked.Checkpoint, asked.Model, asked.Runtime)
	}
	return nil, failures[byokgate.ReasonInternal]()
}

func (s *service) Decide(ctx context.Context, request *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
	return s.gate.answer(ctx, request, false)
}

func (s *service) BatchDecide(
	request *byokgatev1.BatchDecideRequest, stream grpc.ServerStreamingServer[byokgatev1.BatchDecideResponse],
) error {
	var all sync.WaitGroup
	var sending sync.Mutex
	for index, one := range request.GetRequests() {
		all.Add(1)
		go func() {
			defer all.Done()
			response, err := s.gate.answer(stream.Context(), one, true)
			reply := &byokgatev1.BatchDecideResponse{Index: uint32(index), Result: &byokgatev1.BatchDecideResponse_Response{Response: response}}
			if err != nil {
				said := status.Convert(err).Proto()
				reply.Result = &byokgatev1.BatchDecideResponse_Status{
					Status: &byokgatev1.ItemStatus{Code: said.GetCode(), Message: said.GetMessage(), Details: said.GetDetails()},
				}
			}
			sending.Lock()
			defer sending.Unlock()
			_ = stream.Send(reply)
		}()
	}
	all.Wait()
	return nil
}

func (s *service) ResolveProvider(
	_ context.Context, request *byokgatev1.ResolveProviderRequest,
) (*byokgatev1.ResolveProviderResponse, error) {
	names := s.gate.named(request.GetModel())
	return &byokgatev1.ResolveProviderResponse{
		Result:      &byokgatev1.ResolveProviderResponse_Resolution{Resolution: owner(names)},
		RelevantEnv: names, RegistryRevision: revision,
	}, nil
}

func (s *service) ListModels(_ context.Context, request *byokgatev1.ListModelsRequest) (*byokgatev1.ListModelsResponse, error) {
	s.gate.mu.Lock()
	defer s.gate.mu.Unlock()
	response := &byokgatev1.ListModelsResponse{RegistryRevision: revision}
	for _, model := range s.gate.menu {
		if runtime := request.GetRuntime(); runtime != "" && runtime != model.Runtime {
			continue
		}
		response.Models = append(response.Models, &byokgatev1.OfferedModel{
			Runtime: model.Runtime, Model: model.Model, Provider: model.Provider, ProviderDisplayName: model.ProviderName,
			BillingMode: byokgatev1.BillingMode(byokgatev1.BillingMode_value["BILLING_MODE_"+string(model.BillingMode)]),
			AcceptedEnv: model.AcceptedEnv, Withdrawn: model.Withdrawn,
		})
	}
	return response, nil
}

// silent logs nothing.
type silent struct{}

func (silent) Enabled(context.Context, slog.Level) bool  { return false }
func (silent) Handle(context.Context, slog.Record) error { return nil }
func (s silent) WithAttrs([]slog.Attr) slog.Handler      { return s }
func (s silent) WithGroup(string) slog.Handler           { return s }
