package main

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
	"github.com/byok-gate/byok-gate/tests/platform/internal/platform"
)

// What stands in byok-gate's place here is absent, broken or newer than the platform, which the real one cannot be made to be.

// impatient is long enough for every answer that comes at all, on a busy machine too.
const impatient = 500 * time.Millisecond

const fakeDecision = "01900000-0000-7000-8000-000000000001"

// fakeGate answers as it is told, and keeps what it was asked.
type fakeGate struct {
	byokgatev1.UnimplementedPolicyDecisionServiceServer

	mu       sync.Mutex
	registry func() (*byokgatev1.GetRegistryStatusResponse, error)
	decide   func(context.Context) (*byokgatev1.DecideResponse, error)
	asked    []*byokgatev1.DecideRequest
	listed   int
}

func (f *fakeGate) GetRegistryStatus(
	context.Context, *byokgatev1.GetRegistryStatusRequest,
) (*byokgatev1.GetRegistryStatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listed++
	return f.registry()
}

func (f *fakeGate) Decide(ctx context.Context, request *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
	f.mu.Lock()
	f.asked = append(f.asked, request)
	decide := f.decide
	f.mu.Unlock()
	return decide(ctx)
}

// tell makes byok-gate answer with response from now on.
func (f *fakeGate) tell(response *byokgatev1.DecideResponse, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.decide = func(context.Context) (*byokgatev1.DecideResponse, error) { return response, err }
}

// startFake serves a byok-gate that knows names and allows.
func startFake(t *testing.T) (*fakeGate, string) {
	t.Helper()
	fake := &fakeGate{}
	fake.registry = func() (*byokgatev1.GetRegistryStatusResponse, error) {
		return registryStatus("r1", "ACME_API_KEY"), nil
	}
	fake.tell(allow(byokgatev1.BillingMode_BILLING_MODE_BYOK), nil)
	return fake, serveGRPC(t, func(server *grpc.Server) { byokgatev1.RegisterPolicyDecisionServiceServer(server, fake) })
}

func serveGRPC(t *testing.T, register func(*grpc.Server)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	register(server)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return listener.Addr().String()
}

func registryStatus(revision string, names ...string) *byokgatev1.GetRegistryStatusResponse {
	return &byokgatev1.GetRegistryStatusResponse{
		Registry:        &byokgatev1.SourceStatus{Revision: revision},
		CredentialNames: names,
	}
}

func allow(mode byokgatev1.BillingMode) *byokgatev1.DecideResponse {
	return &byokgatev1.DecideResponse{
		DecisionId:       fakeDecision,
		Decision:         &byokgatev1.DecideResponse_Allow{Allow: &byokgatev1.Allow{}},
		Resolution:       &byokgatev1.Resolution{Provider: "acme", BillingMode: mode},
		RegistryRevision: "r1",
	}
}

func deny(deny *byokgatev1.Deny, mode byokgatev1.BillingMode) *byokgatev1.DecideResponse {
	return &byokgatev1.DecideResponse{
		DecisionId:       fakeDecision,
		Decision:         &byokgatev1.DecideResponse_Deny{Deny: deny},
		Resolution:       &byokgatev1.Resolution{Provider: "acme", BillingMode: mode},
		RegistryRevision: "r1",
	}
}

func TestGateIsDown(t *testing.T) {
	server := startPlatform(t, freeAddress(t), platform.DefaultTimeout)
	got := server.create(t, acme(liveKey))
	wantDenial(t, got, http.StatusServiceUnavailable, unavailable(acme(), true))
	if got.header.Get("Retry-After") != "1" || got.took > platform.DefaultTimeout {
		t.Errorf("Retry-After %q after %v", got.header.Get("Retry-After"), got.took)
	}
	server.wantNoRow(t)
}

func TestGateIsSlow(t *testing.T) {
	// A peer that accepts and then says nothing, not even that it speaks HTTP/2.
	mute := func(t *testing.T) string {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var accepted []net.Conn
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				// Kept, since a connection that is collected as garbage is closed.
				mu.Lock()
				accepted = append(accepted, conn)
				mu.Unlock()
			}
		}()
		t.Cleanup(func() {
			listener.Close()
			mu.Lock()
			defer mu.Unlock()
			if len(accepted) == 0 {
				t.Error("the platform never connected")
			}
			for _, conn := range accepted {
				conn.Close()
			}
		})
		return listener.Addr().String()
	}
	// A byok-gate that takes the question and answers when nobody waits any more: not at the deadline, which it knows too and
	// might be the first to see, but at the test's end.
	pondering := func(t *testing.T) string {
		fake, address := startFake(t)
		ended := make(chan struct{})
		t.Cleanup(func() { close(ended) })
		fake.decide = func(ctx context.Context) (*byokgatev1.DecideResponse, error) {
			if _, limited := ctx.Deadline(); !limited {
				t.Error("a question without a deadline")
			}
			<-ended
			return allow(byokgatev1.BillingMode_BILLING_MODE_BYOK), nil
		}
		return address
	}
	for name, start := range map[string]func(*testing.T) string{"mute": mute, "pondering": pondering} {
		t.Run(name, func(t *testing.T) {
			server := startPlatform(t, start(t), impatient)
			got := server.create(t, acme(liveKey))
			wantDenial(t, got, http.StatusServiceUnavailable, unavailable(acme(), true))
			// Well under any other limit that could have ended it.
			if got.header.Get("Retry-After") != "1" || got.took < impatient/2 || got.took > impatient+time.Second {
				t.Errorf("Retry-After %q after %v", got.header.Get("Retry-After"), got.took)
			}
			server.wantNoRow(t)
		})
	}
}

func TestAnotherServiceIsOnThePort(t *testing.T) {
	address := serveGRPC(t, func(*grpc.Server) {})
	server := startPlatform(t, address, platform.DefaultTimeout)
	wantDenial(t, server.create(t, acme(liveKey)), http.StatusInternalServerError, unavailable(acme(), false))
	server.wantNoRow(t)
}

func TestEveryGRPCErrorRefuses(t *testing.T) {
	expected := map[codes.Code]int{
		codes.InvalidArgument:  http.StatusBadRequest,
		codes.Unauthenticated:  http.StatusInternalServerError,
		codes.PermissionDenied: http.StatusInternalServerError,
		codes.Unimplemented:    http.StatusInternalServerError,
	}
	fake, address := startFake(t)
	server := startPlatform(t, address, platform.DefaultTimeout)
	// 1 to 16 are gRPC's own; 17 is none, and what a broken peer could send.
	for code := codes.Canceled; code <= codes.Unauthenticated+1; code++ {
		t.Run(code.String(), func(t *testing.T) {
			want, listed := expected[code]
			if !listed {
				want = http.StatusServiceUnavailable
			}
			fake.tell(nil, status.Error(code, "workspace_spec.model: is too long"))
			body := unavailable(acme(), want == http.StatusServiceUnavailable)
			if want == http.StatusBadRequest {
				body.Error = "workspace_spec.model: is too long"
			}
			wantDenial(t, server.create(t, acme(liveKey)), want, body)
			server.wantNoRow(t)
		})
	}
}

func TestAnswersThatCannotBeReadRefuse(t *testing.T) {
	newer := deny(&byokgatev1.Deny{Code: 999, Message: "a reason of tomorrow's", Remedy: "-"}, byokgatev1.BillingMode_BILLING_MODE_BYOK)
	unknownMember := &byokgatev1.DecideResponse{DecisionId: fakeDecision, RegistryRevision: "r1"}
	// Field 2000, a message: a third member that a newer byok-gate might have in its `decision`.
	unknownMember.ProtoReflect().SetUnknown([]byte{0x82, 0x7d, 0x00})
	allowOfNobody := allow(0)
	allowOfNobody.Resolution = nil
	for name, response := range map[string]*byokgatev1.DecideResponse{
		"empty":                         {},
		"only an id":                    {DecisionId: fakeDecision, RegistryRevision: "r1"},
		"a decision of an unknown kind": unknownMember,
		"allow, unknown billing mode":   allow(99),
		"allow, negative billing mode":  allow(-1),
		"allow, no billing mode":        allow(byokgatev1.BillingMode_BILLING_MODE_UNSPECIFIED),
		"allow, no resolution":          allowOfNobody,
		"deny, unknown code":            newer,
		"deny, no code":                 deny(&byokgatev1.Deny{}, byokgatev1.BillingMode_BILLING_MODE_BYOK),
	} {
		t.Run(name, func(t *testing.T) {
			fake, address := startFake(t)
			fake.tell(response, nil)
			server := startPlatform(t, address, platform.DefaultTimeout)
			want := unavailable(acme(), true)
			want.DecisionID = response.GetDecisionId()
			wantDenial(t, server.create(t, acme(liveKey)), http.StatusServiceUnavailable, want)
			server.wantNoRow(t)
		})
	}
}

func TestEveryBillingModeOfAnAllow(t *testing.T) {
	fake, address := startFake(t)
	for number, name := range byokgatev1.BillingMode_name {
		if number == 0 {
			continue
		}
		server := startPlatform(t, address, platform.DefaultTimeout)
		fake.tell(allow(byokgatev1.BillingMode(number)), nil)
		wantStarted(t, server.create(t, acme(liveKey)), http.StatusCreated,
			started{Status: "provisioning", BillingMode: strings.TrimPrefix(name, "BILLING_MODE_")})
	}
}

func TestEveryDenyCode(t *testing.T) {
	fake, address := startFake(t)
	server := startPlatform(t, address, platform.DefaultTimeout)
	for number, name := range byokgatev1.DenyCode_name {
		if number == 0 {
			continue
		}
		t.Run(name, func(t *testing.T) {
			fake.tell(deny(&byokgatev1.Deny{Code: byokgatev1.DenyCode(number), Message: "no", Remedy: "none"},
				byokgatev1.BillingMode_BILLING_MODE_BYOK), nil)
			want := denial(strings.TrimPrefix(name, "DENY_CODE_"), "no", "none")
			want.AlternativeModels = []string{}
			wantDenial(t, server.create(t, acme(liveKey)), http.StatusUnprocessableEntity, want)
			server.wantNoRow(t)
		})
	}
}

func TestRetryableDenial(t *testing.T) {
	for name, test := range map[string]struct {
		retryAfter *durationpb.Duration
		header     string
	}{
		"rounded up":     {durationpb.New(2001 * time.Millisecond), "3"},
		"whole":          {durationpb.New(7 * time.Second), "7"},
		"below a second": {durationpb.New(time.Millisecond), "1"},
		"zero":           {durationpb.New(0), "1"},
		"negative":       {durationpb.New(-time.Hour), "1"},
		"absent":         {nil, "1"},
	} {
		t.Run(name, func(t *testing.T) {
			fake, address := startFake(t)
			response := deny(&byokgatev1.Deny{
				Code:       byokgatev1.DenyCode_DENY_CODE_BYOK_PROBE_TIMEOUT,
				Message:    "no answer in time",
				Remedy:     "try again",
				Retryable:  true,
				RetryAfter: test.retryAfter,
			}, 99)
			response.Warnings = []*byokgatev1.Warning{
				{Code: byokgatev1.WarningCode_WARNING_CODE_CONFLICTING_CREDENTIAL, Message: "two", EnvNames: []string{"ACME_API_KEY"}},
				{Code: 999, Message: "of tomorrow's"},
			}
			fake.tell(response, nil)
			server := startPlatform(t, address, platform.DefaultTimeout)
			got := server.create(t, acme(liveKey))
			want := denial("BYOK_PROBE_TIMEOUT", "no answer in time", "try again")
			want.Retryable, want.AlternativeModels = true, []string{}
			// The mode only informs here: a denial is not less of one because a newer byok-gate has a new name for who pays.
			want.BillingMode = "UNSPECIFIED"
			want.Warnings = []platform.Warning{
				{Code: "CONFLICTING_CREDENTIAL", Message: "two", EnvNames: []string{"ACME_API_KEY"}},
				{Code: "UNSPECIFIED", Message: "of tomorrow's", EnvNames: []string{}},
			}
			wantDenial(t, got, http.StatusServiceUnavailable, want)
			if header := got.header.Get("Retry-After"); header != test.header {
				t.Errorf("Retry-After is %q, expected %q", header, test.header)
			}
			server.wantNoRow(t)
		})
	}
}

func TestRefusedProvisionKeepsTheStatus(t *testing.T) {
	fake, address := startFake(t)
	server := startPlatform(t, address, platform.DefaultTimeout)
	created := wantStarted(t, server.create(t, acme(liveKey)), http.StatusCreated, started{Status: "provisioning", BillingMode: "BYOK"})
	refusal := deny(&byokgatev1.Deny{
		Code: byokgatev1.DenyCode_DENY_CODE_INVALID_BYOK_CREDENTIAL, Message: "dead", Remedy: "rotate",
	}, byokgatev1.BillingMode_BILLING_MODE_BYOK)

	for _, state := range []string{"provisioning", "online"} {
		before := server.row(t, created.ID)
		fake.tell(refusal, nil)
		if got := server.provision(t, created.ID); got.status != http.StatusUnprocessableEntity {
			t.Fatalf("status %d: %s", got.status, got.body)
		}
		before.Status, before.LastError = state, "INVALID_BYOK_CREDENTIAL: dead"
		if after := server.row(t, created.ID); after != before {
			t.Errorf("row is %+v, expected %+v", after, before)
		}
		fake.tell(allow(byokgatev1.BillingMode_BILLING_MODE_BYOK), nil)
		wantStarted(t, server.provision(t, created.ID), http.StatusOK, started{ID: created.ID, Status: "online", BillingMode: "BYOK"})
	}
}

func TestWhatIsSent(t *testing.T) {
	fake, address := startFake(t)
	fake.registry = func() (*byokgatev1.GetRegistryStatusResponse, error) {
		return registryStatus("r1", "ACME_API_KEY", "ACME_OTHER_KEY"), nil
	}
	server := startPlatform(t, address, platform.DefaultTimeout)
	server.setOrganizationSecret(t, "ACME_API_KEY", otherKey)
	server.setOrganizationSecret(t, "DATABASE_PASSWORD", keyMark+"password-1")
	spec := acme(liveKey)
	spec.Secrets["ACME_OTHER_KEY"] = ""
	spec.Secrets["SMTP_PASSWORD"] = keyMark + "password-2"
	created := wantStarted(t, server.create(t, spec), http.StatusCreated, started{Status: "provisioning", BillingMode: "BYOK"})
	wantStarted(t, server.provision(t, created.ID), http.StatusOK, started{ID: created.ID, Status: "online", BillingMode: "BYOK"})

	want := &byokgatev1.DecideRequest{
		Checkpoint: byokgatev1.Checkpoint_CHECKPOINT_CREATE,
		WorkspaceSpec: &byokgatev1.WorkspaceSpec{
			WorkspaceId: created.ID,
			Runtime:     "agent",
			Model:       "acme-large",
			Credentials: []*byokgatev1.Credential{
				{EnvName: "ACME_API_KEY", Scope: byokgatev1.Scope_SCOPE_WORKSPACE, Value: liveKey},
				{EnvName: "ACME_OTHER_KEY", Scope: byokgatev1.Scope_SCOPE_WORKSPACE},
				{EnvName: "ACME_API_KEY", Scope: byokgatev1.Scope_SCOPE_ORGANIZATION, Value: otherKey},
			},
		},
	}
	again := proto.CloneOf(want)
	again.Checkpoint, again.MaxLivenessAge = byokgatev1.Checkpoint_CHECKPOINT_PROVISION, durationpb.New(0)
	if len(fake.asked) != 2 || !proto.Equal(fake.asked[0], want) || !proto.Equal(fake.asked[1], again) {
		t.Errorf("asked %v, expected %v and %v", fake.asked, want, again)
	}
	if fake.listed != 1 {
		t.Errorf("the names were asked for %d times", fake.listed)
	}
}

func TestNamesAreAskedForUntilThereAreSome(t *testing.T) {
	fake, address := startFake(t)
	server := startPlatform(t, address, platform.DefaultTimeout)
	known := fake.registry
	for name, registry := range map[string]func() (*byokgatev1.GetRegistryStatusResponse, error){
		"an error": func() (*byokgatev1.GetRegistryStatusResponse, error) {
			return nil, status.Error(codes.Unavailable, "starting")
		},
		"none": func() (*byokgatev1.GetRegistryStatusResponse, error) { return registryStatus("r1"), nil },
	} {
		t.Run(name, func(t *testing.T) {
			fake.registry = registry
			wantDenial(t, server.create(t, acme(liveKey)), http.StatusServiceUnavailable, unavailable(acme(), true))
			server.wantNoRow(t)
		})
	}
	if len(fake.asked) != 0 {
		t.Errorf("asked for decisions without knowing the names: %v", fake.asked)
	}
	fake.registry = known
	wantStarted(t, server.create(t, acme(liveKey)), http.StatusCreated, started{Status: "provisioning", BillingMode: "BYOK"})
}

// The registry gains a name after the platform asked for the names: its credential must still be sent.
func TestNamesFollowTheRegistry(t *testing.T) {
	fake, address := startFake(t)
	server := startPlatform(t, address, platform.DefaultTimeout)
	spec := acme()
	spec.Secrets = map[string]string{"NEW_API_KEY": liveKey}
	server.create(t, spec)

	fake.registry = func() (*byokgatev1.GetRegistryStatusResponse, error) { return registryStatus("r2", "NEW_API_KEY"), nil }
	response := allow(byokgatev1.BillingMode_BILLING_MODE_BYOK)
	response.RegistryRevision = "r2"
	fake.tell(response, nil)
	server.create(t, spec)
	var sent []int
	for _, request := range fake.asked {
		sent = append(sent, len(request.GetWorkspaceSpec().GetCredentials()))
	}
	if !slices.Equal(sent, []int{0, 0, 1}) || fake.listed != 2 {
		t.Errorf("credentials sent: %v, names asked for %d times", sent, fake.listed)
	}
	if rows := server.rows(t); len(rows) != 2 {
		t.Errorf("%d rows for two creates", len(rows))
	}
}

// Requests that never come to a question for byok-gate are no denials, and have no denial's body.
func TestRequestsThatAreNoQuestion(t *testing.T) {
	fake, address := startFake(t)
	server := startPlatform(t, address, platform.DefaultTimeout)
	for what, test := range map[string]struct {
		got  answer
		want int
	}{
		"create, no object":          {server.call(t, http.MethodPost, "/workspaces", "text"), http.StatusBadRequest},
		"create, secret not a text":  {server.call(t, http.MethodPost, "/workspaces", map[string]any{"secrets": map[string]any{"A": 1}}), http.StatusBadRequest},
		"provision, no such row":     {server.provision(t, "none"), http.StatusNotFound},
		"get, no such row":           {server.call(t, http.MethodGet, "/workspaces/none", nil), http.StatusNotFound},
		"organization secret, no {}": {server.call(t, http.MethodPut, "/organization/secrets/A", 1), http.StatusBadRequest},
	} {
		if test.got.status != test.want || strings.HasPrefix(test.got.header.Get("Content-Type"), "application/json") {
			t.Errorf("%s: status %d, expected %d: %s", what, test.got.status, test.want, test.got.body)
		}
	}
	if len(fake.asked) != 0 {
		t.Errorf("byok-gate was asked: %v", fake.asked)
	}
	server.wantNoRow(t)
}

// The schema is written by hand; its lists must be the proto's.
func TestSchemaListsWhatTheProtoLists(t *testing.T) {
	written, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	type enum struct {
		Enum []string `json:"enum"`
	}
	var schema struct {
		Properties struct {
			Code        enum `json:"code"`
			BillingMode enum `json:"billing_mode"`
		} `json:"properties"`
		Defs struct {
			Warning struct {
				Properties struct {
					Code enum `json:"code"`
				} `json:"properties"`
			} `json:"warning"`
		} `json:"$defs"`
	}
	if err := json.Unmarshal(written, &schema); err != nil {
		t.Fatal(err)
	}
	names := func(known map[int32]string, prefix string, more ...string) []string {
		for _, name := range known {
			more = append(more, strings.TrimPrefix(name, prefix))
		}
		slices.Sort(more)
		return more
	}
	codes := names(byokgatev1.DenyCode_name, "DENY_CODE_", platform.DecisionUnavailable)
	// Never in a body: an answer with it is DECISION_UNAVAILABLE.
	codes = slices.DeleteFunc(codes, func(name string) bool { return name == "UNSPECIFIED" })
	for what, lists := range map[string][2][]string{
		"code":          {schema.Properties.Code.Enum, codes},
		"billing_mode":  {schema.Properties.BillingMode.Enum, names(byokgatev1.BillingMode_name, "BILLING_MODE_")},
		"warnings.code": {schema.Defs.Warning.Properties.Code.Enum, names(byokgatev1.WarningCode_name, "WARNING_CODE_")},
	} {
		slices.Sort(lists[0])
		if !reflect.DeepEqual(lists[0], lists[1]) {
			t.Errorf("%s: the schema has %v, the proto %v", what, lists[0], lists[1])
		}
	}
}
