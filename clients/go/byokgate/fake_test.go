package byokgate

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// Every value in these tests begins with it, so that one search shows whether a log or a body gave one away.
const keyMark = "made-up-"

const (
	liveKey      = keyMark + "live-key-1"
	fakeDecision = "01900000-0000-7000-8000-000000000001"
)

// fakeGate answers by script, and records its calls: the real byok-gate cannot act as a broken, newer or restarting one.
type fakeGate struct {
	byokgatev1.UnimplementedPolicyDecisionServiceServer

	mu       sync.Mutex
	resolve  func() (*byokgatev1.ResolveProviderResponse, error)
	decide   func(context.Context, *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error)
	batch    func(*byokgatev1.BatchDecideRequest, grpc.ServerStreamingServer[byokgatev1.BatchDecideResponse]) error
	menu     func() (*byokgatev1.ListModelsResponse, error)
	registry *byokgatev1.GetRegistryStatusResponse
	asked    []*byokgatev1.DecideRequest
	resolved int
	listed   int
	metadata metadata.MD
}

func (f *fakeGate) ResolveProvider(
	context.Context, *byokgatev1.ResolveProviderRequest,
) (*byokgatev1.ResolveProviderResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resolved++
	return f.resolve()
}

func (f *fakeGate) Decide(ctx context.Context, request *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
	f.mu.Lock()
	f.asked = append(f.asked, request)
	f.metadata, _ = metadata.FromIncomingContext(ctx)
	decide := f.decide
	f.mu.Unlock()
	return decide(ctx, request)
}

func (f *fakeGate) BatchDecide(
	request *byokgatev1.BatchDecideRequest, stream grpc.ServerStreamingServer[byokgatev1.BatchDecideResponse],
) error {
	f.mu.Lock()
	batch := f.batch
	f.mu.Unlock()
	return batch(request, stream)
}

func (f *fakeGate) ListModels(context.Context, *byokgatev1.ListModelsRequest) (*byokgatev1.ListModelsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listed++
	return f.menu()
}

func (f *fakeGate) GetRegistryStatus(
	context.Context, *byokgatev1.GetRegistryStatusRequest,
) (*byokgatev1.GetRegistryStatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.registry, nil
}

// tell sets the response.
func (f *fakeGate) tell(response *byokgatev1.DecideResponse, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.decide = func(context.Context, *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
		return response, err
	}
}

// name makes it name these names as relevant, by this revision.
func (f *fakeGate) name(revision string, names ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resolve = func() (*byokgatev1.ResolveProviderResponse, error) { return resolution(revision, names...), nil }
}

func (f *fakeGate) requests() []*byokgatev1.DecideRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*byokgatev1.DecideRequest(nil), f.asked...)
}

// newFake names ACME_API_KEY and allows.
func newFake() *fakeGate {
	fake := &fakeGate{}
	fake.name("r1", "ACME_API_KEY")
	fake.tell(allow(byokgatev1.BillingMode_BILLING_MODE_BYOK), nil)
	return fake
}

// startFake serves one on a port of loopback.
func startFake(t testing.TB) (*fakeGate, string) {
	t.Helper()
	fake := newFake()
	return fake, serveGRPC(t, listenTCP(t), func(server *grpc.Server) {
		byokgatev1.RegisterPolicyDecisionServiceServer(server, fake)
	})
}

func listenTCP(t testing.TB) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return listener
}

func serveGRPC(t testing.TB, listener net.Listener, register func(*grpc.Server), options ...grpc.ServerOption) string {
	t.Helper()
	server := grpc.NewServer(options...)
	register(server)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return listener.Addr().String()
}

func resolution(revision string, names ...string) *byokgatev1.ResolveProviderResponse {
	return &byokgatev1.ResolveProviderResponse{
		Result: &byokgatev1.ResolveProviderResponse_Resolution{Resolution: &byokgatev1.Resolution{
			Provider: "acme", BillingMode: byokgatev1.BillingMode_BILLING_MODE_BYOK, AcceptedEnv: names,
			Source: byokgatev1.ResolutionSource_RESOLUTION_SOURCE_DERIVED, MatchedBy: byokgatev1.MatchedBy_MATCHED_BY_EXACT_MODEL,
		}},
		RelevantEnv: names, RegistryRevision: revision,
	}
}

func allow(mode byokgatev1.BillingMode) *byokgatev1.DecideResponse {
	return &byokgatev1.DecideResponse{
		DecisionId:       fakeDecision,
		Decision:         &byokgatev1.DecideResponse_Allow{Allow: &byokgatev1.Allow{BillingMode: mode}},
		Resolution:       derived(mode),
		RegistryRevision: "r1",
		RelevantEnv:      []string{"ACME_API_KEY"},
	}
}

func deny(deny *byokgatev1.Deny) *byokgatev1.DecideResponse {
	return &byokgatev1.DecideResponse{
		DecisionId:       fakeDecision,
		Decision:         &byokgatev1.DecideResponse_Deny{Deny: deny},
		Resolution:       derived(byokgatev1.BillingMode_BILLING_MODE_BYOK),
		RegistryRevision: "r1",
		RelevantEnv:      []string{"ACME_API_KEY"},
	}
}

func derived(mode byokgatev1.BillingMode) *byokgatev1.Resolution {
	return &byokgatev1.Resolution{
		Provider: "acme", BillingMode: mode, Source: byokgatev1.ResolutionSource_RESOLUTION_SOURCE_DERIVED,
		MatchedBy: byokgatev1.MatchedBy_MATCHED_BY_EXACT_MODEL,
	}
}

func missingKey(names ...string) *byokgatev1.DecideResponse {
	return deny(&byokgatev1.Deny{
		Code: byokgatev1.DenyCode_DENY_CODE_MISSING_BYOK_CREDENTIAL, Message: "no key", Remedy: "set one", MissingEnv: names,
	})
}

// acme is a create on the vendor's model with a live key.
func acme() Request {
	return Request{Checkpoint: Create, Spec: Spec{
		WorkspaceID: "ws-1", OrganizationID: "org-1", Runtime: "agent", Model: "acme-large",
		Lookup: Static(Found{"ACME_API_KEY": NewSecret(liveKey)}, nil),
	}}
}

// newClient logs into a buffer in which no value may be found at the end.
func newClient(t testing.TB, target string, options ...Option) *Client {
	t.Helper()
	client, _ := newLoggedClient(t, target, options...)
	return client
}

func newLoggedClient(t testing.TB, target string, options ...Option) (*Client, *syncBuffer) {
	t.Helper()
	logs := &syncBuffer{}
	options = append([]Option{WithLogger(slog.New(slog.NewJSONHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug})))}, options...)
	client, err := New(target, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
		if strings.Contains(logs.String(), keyMark) {
			t.Error("the client logged a credential")
		}
		if t.Failed() {
			t.Logf("the client logged:\n%s", logs)
		}
	})
	return client, logs
}

// wantUndecided expects no decision, by the deadline and with this status.
func wantUndecided(t *testing.T, allowed Allowed, err error, httpStatus int) *Undecided {
	t.Helper()
	var undecided *Undecided
	if !errors.As(err, &undecided) {
		t.Fatalf("got %v, %v, expected an *Undecided", allowed, err)
	}
	if allowed != (Allowed{}) {
		t.Fatalf("an Allowed beside an error: %v", allowed)
	}
	if undecided.HTTPStatus() != httpStatus || undecided.Code() != DecisionUnavailable {
		t.Fatalf("status %d, code %s, expected %d: %v", undecided.HTTPStatus(), undecided.Code(), httpStatus, err)
	}
	return undecided
}

func wantReason(t *testing.T, undecided *Undecided, reason Reason) {
	t.Helper()
	if undecided.Reason() != reason || (undecided.HTTPStatus() == http.StatusInternalServerError && undecided.OperatorHint() == "") {
		t.Errorf("%s, %q, expected %s", undecided.Reason(), undecided.OperatorHint(), reason)
	}
}

func wantDenied(t *testing.T, allowed Allowed, err error, code Code) *Denied {
	t.Helper()
	var denied *Denied
	if !errors.As(err, &denied) || denied.Code() != code {
		t.Fatalf("got %v, %v, expected a *Denied with %s", allowed, err, code)
	}
	if allowed != (Allowed{}) {
		t.Fatalf("an Allowed beside an error: %v", allowed)
	}
	return denied
}

func wantAllowed(t *testing.T, allowed Allowed, err error, mode BillingMode) {
	t.Helper()
	if err != nil {
		t.Fatalf("got %v, expected an allow", err)
	}
	if allowed.BillingMode() != mode || allowed.DecisionID() != fakeDecision {
		t.Fatalf("got %v, expected billing %s", allowed, mode)
	}
}

// background is for calls that must end by the client's own deadline alone.
func background() context.Context { return context.Background() }

// syncBuffer collects output that is written by one goroutine and read by another.
type syncBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *syncBuffer) Write(written []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(written)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}

// take returns what was written, and clears it.
func (b *syncBuffer) take() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.buffer.Reset()
	return b.buffer.String()
}

func ptr[T any](value T) *T { return &value }

// discard logs nothing.
var discard = slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.Level(100)}))

// grace is how much later than its deadline an answer may come on a busy machine.
const grace = 2 * time.Second
