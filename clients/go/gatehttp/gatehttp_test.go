package gatehttp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// fakeGate answers with what stands in it: each test is one answer.
type fakeGate struct {
	byokgatev1.UnimplementedPolicyDecisionServiceServer
	response *byokgatev1.DecideResponse
	fault    error
	trace    []string
}

func (f *fakeGate) ResolveProvider(
	context.Context, *byokgatev1.ResolveProviderRequest,
) (*byokgatev1.ResolveProviderResponse, error) {
	return &byokgatev1.ResolveProviderResponse{
		Result:           &byokgatev1.ResolveProviderResponse_Resolution{Resolution: &byokgatev1.Resolution{}},
		RegistryRevision: "r1",
	}, nil
}

func (f *fakeGate) Decide(ctx context.Context, _ *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
	sent, _ := metadata.FromIncomingContext(ctx)
	f.trace = append(sent.Get("traceparent"), sent.Get("tracestate")...)
	return f.response, f.fault
}

func start(t *testing.T) (*fakeGate, *byokgate.Client) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fake, server := &fakeGate{}, grpc.NewServer()
	byokgatev1.RegisterPolicyDecisionServiceServer(server, fake)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	client, err := byokgate.New(listener.Addr().String(), byokgate.WithLogger(slog.New(slog.NewTextHandler(io.Discard, nil))), byokgate.WithTimeout(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return fake, client
}

func request() byokgate.Request {
	return byokgate.Request{Checkpoint: byokgate.Create, Spec: byokgate.Spec{
		Runtime: "agent", Model: "acme-large", Lookup: byokgate.Static(nil, nil),
	}}
}

func denial(deny *byokgatev1.Deny) *byokgatev1.DecideResponse {
	return &byokgatev1.DecideResponse{
		DecisionId: "d-1", Decision: &byokgatev1.DecideResponse_Deny{Deny: deny}, RegistryRevision: "r1",
	}
}

func allowance() *byokgatev1.DecideResponse {
	return &byokgatev1.DecideResponse{
		DecisionId: "d-1", Decision: &byokgatev1.DecideResponse_Allow{Allow: &byokgatev1.Allow{BillingMode: byokgatev1.BillingMode_BILLING_MODE_BYOK}}, RegistryRevision: "r1",
		Resolution: &byokgatev1.Resolution{BillingMode: byokgatev1.BillingMode_BILLING_MODE_BYOK},
	}
}

func TestPassOrAFinishedAnswer(t *testing.T) {
	fake, client := start(t)
	for name, test := range map[string]struct {
		response   *byokgatev1.DecideResponse
		fault      error
		status     int
		retryAfter string
		code       string
	}{
		"allowed": {allowance(), nil, 201, "", ""},
		"denied": {
			denial(&byokgatev1.Deny{Code: byokgatev1.DenyCode_DENY_CODE_INVALID_BYOK_CREDENTIAL}), nil, 422, "", "INVALID_BYOK_CREDENTIAL",
		},
		"denied for now": {
			denial(&byokgatev1.Deny{
				Code: byokgatev1.DenyCode_DENY_CODE_BYOK_PROBE_TIMEOUT, Retryable: true, RetryAfter: durationpb.New(2001 * time.Millisecond),
			}), nil, 503, "3", "BYOK_PROBE_TIMEOUT",
		},
		"a bad request": {nil, status.Error(codes.InvalidArgument, "-"), 400, "", "DECISION_UNAVAILABLE"},
		"mis-wired":     {nil, status.Error(codes.Unauthenticated, "-"), 500, "", "DECISION_UNAVAILABLE"},
		"away":          {nil, status.Error(codes.Unavailable, "-"), 503, "1", "DECISION_UNAVAILABLE"},
		"empty":         {&byokgatev1.DecideResponse{RegistryRevision: "r1"}, nil, 503, "1", "DECISION_UNAVAILABLE"},
	} {
		t.Run(name, func(t *testing.T) {
			fake.response, fake.fault = test.response, test.fault
			rows := 0
			answer := httptest.NewRecorder()
			http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				allowed, passed := Decide(w, r, client, request())
				if !passed {
					return
				}
				rows++
				w.WriteHeader(http.StatusCreated)
				_, _ = io.WriteString(w, string(allowed.BillingMode()))
			}).ServeHTTP(answer, httptest.NewRequest(http.MethodPost, "/workspaces", nil))
			if answer.Code != test.status || answer.Header().Get("Retry-After") != test.retryAfter {
				t.Errorf("status %d, Retry-After %q", answer.Code, answer.Header().Get("Retry-After"))
			}
			if test.code == "" {
				if rows != 1 || answer.Body.String() != "BYOK" {
					t.Errorf("%d rows, %s", rows, answer.Body)
				}
				return
			}
			var body byokgate.Body
			if err := json.Unmarshal(answer.Body.Bytes(), &body); err != nil || body.Code != byokgate.Code(test.code) || body.Model != "acme-large" {
				t.Errorf("%v, %s", err, answer.Body)
			}
			if rows != 0 || answer.Header().Get("Content-Type") != "application/json" || answer.Header().Get("Cache-Control") != "no-store" {
				t.Errorf("%d rows, %v", rows, answer.Header())
			}
		})
	}
}

func TestOtherErrorsAreRefusedWithoutTheirWords(t *testing.T) {
	hungUp := httptest.NewRecorder()
	Refuse(hungUp, fmt.Errorf("row: %w", context.Canceled))
	if hungUp.Code != 499 || hungUp.Header().Get("Retry-After") != "" {
		t.Errorf("a caller that hung up: %d, %v", hungUp.Code, hungUp.Header())
	}
	var nobody *byokgate.Denied
	for _, err := range []error{nil, errors.New("password is hunter2"), nobody} {
		answer := httptest.NewRecorder()
		Refuse(answer, err)
		var body byokgate.Body
		if answer.Code != 503 || json.Unmarshal(answer.Body.Bytes(), &body) != nil || body.Code != "DECISION_UNAVAILABLE" ||
			body.Error != "byok-gate made no decision, so nothing was started" {
			t.Errorf("%v: %d, %s", err, answer.Code, answer.Body)
		}
	}
	// One of ours is found however deep it is wrapped.
	answer := httptest.NewRecorder()
	fake, client := start(t)
	fake.response = denial(&byokgatev1.Deny{Code: byokgatev1.DenyCode_DENY_CODE_MODEL_REQUIRED})
	_, err := client.Decide(context.Background(), request())
	Refuse(answer, fmt.Errorf("import: %w", err))
	if answer.Code != 422 {
		t.Errorf("status %d", answer.Code)
	}
}

func TestReportNeverAnswers(t *testing.T) {
	fake, client := start(t)
	fake.response = denial(&byokgatev1.Deny{Code: byokgatev1.DenyCode_DENY_CODE_MODEL_REQUIRED})
	reporter, err := client.ReportOnly(byokgate.ReportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	report := Report(httptest.NewRequest(http.MethodPost, "/", nil), reporter, request())
	if outcome, refusal := report.Verdict(); outcome != byokgate.OutcomeWouldDeny || refusal.Code() != byokgate.ModelRequired {
		t.Errorf("%v", report)
	}
}

func TestTheTraceContextGoesOnWhereItIsTrusted(t *testing.T) {
	const parent, state = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "vendor=1"
	fake, client := start(t)
	fake.response = allowance()
	incoming := httptest.NewRequest(http.MethodPost, "/", nil)
	incoming.Header.Set("traceparent", parent)
	incoming.Header.Set("tracestate", state)
	for _, test := range []struct {
		incoming *http.Request
		want     []string
	}{{incoming, nil}, {TrustTrace(incoming), []string{parent, state}}} {
		if _, passed := Decide(httptest.NewRecorder(), test.incoming, client, request()); !passed {
			t.Fatal("refused")
		}
		if fmt.Sprint(fake.trace) != fmt.Sprint(test.want) {
			t.Errorf("sent %q, expected %q", fake.trace, test.want)
		}
	}
}

func TestRetryAfterIsNeverZero(t *testing.T) {
	for pause, want := range map[time.Duration]string{
		-time.Hour: "1", 0: "1", time.Millisecond: "1", time.Second: "1", 1001 * time.Millisecond: "2", 7 * time.Second: "7",
	} {
		if got := retryAfter(pause); got != want {
			t.Errorf("%v: %s, expected %s", pause, got, want)
		}
	}
}

func TestMiddlewareLetsThroughWhatMayStart(t *testing.T) {
	fake, client := start(t)
	created := 0
	handler := Middleware(client, func(r *http.Request) (byokgate.Request, error) {
		if r.URL.Path == "/nonsense" {
			return byokgate.Request{}, errors.New("no such form")
		}
		return request(), nil
	})(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		allowed, passed := AllowedFor(r)
		if !passed {
			t.Error("no allow in the context")
		}
		created++
		_, _ = io.WriteString(w, allowed.DecisionID())
	}))
	ask := func(path string) *httptest.ResponseRecorder {
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, httptest.NewRequest(http.MethodPost, path, nil))
		return answer
	}
	fake.response = allowance()
	if answer := ask("/workspaces"); answer.Code != 200 || answer.Body.String() != "d-1" || created != 1 {
		t.Errorf("%d, %s", answer.Code, answer.Body)
	}
	fake.response = denial(&byokgatev1.Deny{Code: byokgatev1.DenyCode_DENY_CODE_MODEL_REQUIRED})
	if answer := ask("/workspaces"); answer.Code != 422 || created != 1 {
		t.Errorf("%d, %d created", answer.Code, created)
	}
	if answer := ask("/nonsense"); answer.Code != 503 || created != 1 {
		t.Errorf("%d, %d created", answer.Code, created)
	}
	if _, passed := AllowedFor(httptest.NewRequest(http.MethodPost, "/", nil)); passed {
		t.Error("an allow without the middleware")
	}
}
