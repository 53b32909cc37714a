package byokgate

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

func TestEveryBillingModeOfAnAllow(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	for number, name := range byokgatev1.BillingMode_name {
		fake.tell(allow(byokgatev1.BillingMode(number)), nil)
		allowed, err := client.Decide(background(), acme())
		if number == 0 {
			wantUndecided(t, allowed, err, http.StatusServiceUnavailable)
			continue
		}
		wantAllowed(t, allowed, err, BillingMode(strings.TrimPrefix(name, "BILLING_MODE_")))
		if allowed.Provider() != "acme" || allowed.Details().Provider != "acme" {
			t.Errorf("%s: %v", name, allowed)
		}
	}
}

func TestRepliesThatCannotBeReadAreUndecided(t *testing.T) {
	unknownMember := &byokgatev1.DecideResponse{DecisionId: fakeDecision, RegistryRevision: "r1"}
	// Field 2000, a message: a third member that a newer byok-gate might have in its `decision`.
	unknownMember.ProtoReflect().SetUnknown([]byte{0x82, 0x7d, 0x00})
	allowOfNobody := allow(byokgatev1.BillingMode_BILLING_MODE_BYOK)
	allowOfNobody.Resolution = nil
	allowOfTwoMinds := allow(byokgatev1.BillingMode_BILLING_MODE_BYOK)
	allowOfTwoMinds.Resolution.BillingMode = byokgatev1.BillingMode_BILLING_MODE_PLATFORM_MANAGED
	allowWithoutID := allow(byokgatev1.BillingMode_BILLING_MODE_BYOK)
	allowWithoutID.DecisionId = ""
	for name, response := range map[string]*byokgatev1.DecideResponse{
		"empty":                         {},
		"only an id":                    {DecisionId: fakeDecision, RegistryRevision: "r1"},
		"a decision of an unknown kind": unknownMember,
		"allow, unknown billing mode":   allow(99),
		"allow, negative billing mode":  allow(-1),
		"allow, no billing mode":        allow(byokgatev1.BillingMode_BILLING_MODE_UNSPECIFIED),
		"allow, no resolution":          allowOfNobody,
		"allow, another resolution":     allowOfTwoMinds,
		"allow, no id":                  allowWithoutID,
	} {
		t.Run(name, func(t *testing.T) {
			fake, address := startFake(t)
			fake.tell(response, nil)
			client := newClient(t, address)
			allowed, err := client.Decide(background(), acme())
			undecided := wantUndecided(t, allowed, err, http.StatusServiceUnavailable)
			if undecided.Body().DecisionID != response.GetDecisionId() && response.GetRegistryRevision() != "" {
				t.Errorf("decision id %q, expected %q", undecided.Body().DecisionID, response.GetDecisionId())
			}
		})
	}
}

// The members of the oneof, as Go values that no message from the wire can hold.
func TestReadOfGoValuesThatNoWireHolds(t *testing.T) {
	for name, response := range map[string]*byokgatev1.DecideResponse{
		"nil":       nil,
		"nil allow": {DecisionId: fakeDecision, Decision: &byokgatev1.DecideResponse_Allow{}, Resolution: &byokgatev1.Resolution{BillingMode: 2}},
		"nil deny":  {DecisionId: fakeDecision, Decision: &byokgatev1.DecideResponse_Deny{}},
	} {
		if allowed, refusal := read(nil, response); refusal == nil || allowed != (Allowed{}) {
			t.Errorf("%s: %v, %v", name, allowed, refusal)
		}
	}
}

func TestEveryDenyCode(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	for number, name := range byokgatev1.DenyCode_name {
		if number == 0 {
			continue
		}
		fake.tell(deny(&byokgatev1.Deny{
			Code: byokgatev1.DenyCode(number), Message: "no", Remedy: "none", MissingEnv: []string{"ACME_API_KEY", ""},
			AlternativeModels: []string{"platform-small"},
		}), nil)
		allowed, err := client.Decide(background(), acme())
		denied := wantDenied(t, allowed, err, Code(strings.TrimPrefix(name, "DENY_CODE_")))
		want := Body{
			Error: "no", Code: denied.Code(), Runtime: "agent", Model: "acme-large", Provider: "acme",
			MissingEnv: []string{"ACME_API_KEY"}, BillingMode: BYOK, Remedy: "none", DecisionID: fakeDecision,
			AlternativeModels: []string{"platform-small"},
		}
		if !reflect.DeepEqual(denied.Body(), want) {
			t.Errorf("%s: body\n%+v, expected\n%+v", name, denied.Body(), want)
		}
		if denied.HTTPStatus() != http.StatusUnprocessableEntity || denied.Retryable() || denied.RetryAfter() != 0 {
			t.Errorf("%s: status %d, retryable %v after %v", name, denied.HTTPStatus(), denied.Retryable(), denied.RetryAfter())
		}
		if want := "byokgate: denied: " + string(denied.Code()) + ": no"; err.Error() != want {
			t.Errorf("%q, expected %q", err, want)
		}
	}
}

func TestRetryableDenial(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	for name, test := range map[string]struct {
		retryAfter *durationpb.Duration
		want       time.Duration
	}{
		"given":    {durationpb.New(7 * time.Second), 7 * time.Second},
		"zero":     {durationpb.New(0), defaultRetryAfter},
		"negative": {durationpb.New(-time.Hour), defaultRetryAfter},
		"absent":   {nil, defaultRetryAfter},
	} {
		response := deny(&byokgatev1.Deny{
			Code: byokgatev1.DenyCode_DENY_CODE_BYOK_PROBE_TIMEOUT, Message: "late", Remedy: "-", Retryable: true,
			RetryAfter: test.retryAfter,
		})
		response.Warnings = []*byokgatev1.Warning{{Code: 999, Message: "of tomorrow's"}}
		fake.tell(response, nil)
		allowed, err := client.Decide(background(), acme())
		denied := wantDenied(t, allowed, err, "BYOK_PROBE_TIMEOUT")
		if denied.HTTPStatus() != http.StatusServiceUnavailable || !denied.Body().Retryable || denied.RetryAfter() != test.want {
			t.Errorf("%s: status %d, retry after %v", name, denied.HTTPStatus(), denied.RetryAfter())
		}
		warned := []Warning{{Code: "WARNING_CODE_999", Message: "of tomorrow's", EnvNames: []string{}}}
		if !reflect.DeepEqual(denied.Body().Warnings, warned) {
			t.Errorf("%s: warnings %+v", name, denied.Body().Warnings)
		}
	}
	if asked := len(fake.requests()); asked != 4 {
		t.Errorf("a retryable denial is an answer, and was asked for %d times instead of 4", asked)
	}
}

func TestEveryGRPCErrorIsUndecided(t *testing.T) {
	expected := map[codes.Code]int{
		codes.InvalidArgument:  http.StatusBadRequest,
		codes.Unauthenticated:  http.StatusInternalServerError,
		codes.PermissionDenied: http.StatusInternalServerError,
		codes.Unimplemented:    http.StatusInternalServerError,
	}
	fake, address := startFake(t)
	client := newClient(t, address, WithTimeout(time.Second))
	// 1 to 16 are gRPC's own; 17 is none, and what a broken peer could send.
	for code := codes.Canceled; code <= codes.Unauthenticated+1; code++ {
		want, listed := expected[code]
		if !listed {
			want = http.StatusServiceUnavailable
		}
		fake.tell(nil, status.Error(code, "workspace_spec.model: is too long"))
		allowed, err := client.Decide(background(), acme())
		undecided := wantUndecided(t, allowed, err, want)
		if status.Code(errors.Unwrap(err)) != code {
			t.Errorf("%v: unwraps to %v", code, errors.Unwrap(err))
		}
		names := strings.Contains(undecided.Body().Error, "workspace_spec.model")
		if names != (code == codes.InvalidArgument) {
			t.Errorf("%v: %q", code, undecided.Body().Error)
		}
		if (undecided.RetryAfter() == 0) != (want != http.StatusServiceUnavailable) {
			t.Errorf("%v: retry after %v", code, undecided.RetryAfter())
		}
	}
}

func TestRetryInfoIsPassedOn(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	busy, err := status.New(codes.ResourceExhausted, "busy").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(9 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	fake.tell(nil, busy.Err())
	allowed, err := client.Decide(background(), acme())
	if got := wantUndecided(t, allowed, err, http.StatusServiceUnavailable).RetryAfter(); got != 9*time.Second {
		t.Errorf("retry after %v", got)
	}
}

func TestTheZeroAllowedIsNoAllow(t *testing.T) {
	var zero Allowed
	for name, ask := range map[string]func(){
		"BillingMode": func() { zero.BillingMode() },
		"DecisionID":  func() { zero.DecisionID() },
		"Provider":    func() { zero.Provider() },
		"Warnings":    func() { zero.Warnings() },
		"Unverified":  func() { zero.Unverified() },
		"Details":     func() { zero.Details() },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s of the zero Allowed answers", name)
				}
			}()
			ask()
		}()
	}
	if text, err := json.Marshal(zero); err == nil {
		t.Errorf("the zero Allowed marshals: %s", text)
	}
	if !strings.Contains(zero.String(), "no allow") || strings.Contains(fmt.Sprintf("%v %+v", zero, &zero), "billing") {
		t.Errorf("the zero Allowed prints as %v", zero)
	}
	if strings.Contains(zero.LogValue().String(), "billing") {
		t.Errorf("the zero Allowed logs as %v", zero.LogValue())
	}
	if allowed, err := (Result{}).Decision(); err == nil || allowed != (Allowed{}) {
		t.Errorf("the zero Result is %v, %v", allowed, err)
	}
}

// What a caller sees of an allow, in logs and in JSON.
func TestAnAllowShowsItself(t *testing.T) {
	allowed, refusal := read(nil, allow(byokgatev1.BillingMode_BILLING_MODE_BYOK))
	if refusal != nil {
		t.Fatal(refusal)
	}
	text, err := json.Marshal(allowed)
	if want := `{"decision_id":"` + fakeDecision + `","billing_mode":"BYOK"}`; err != nil || string(text) != want {
		t.Errorf("%s, %v, expected %s", text, err, want)
	}
	if allowed.LogValue().Kind() != slog.KindGroup || !strings.Contains(allowed.String(), "billing BYOK") {
		t.Errorf("%v, %v", allowed, allowed.LogValue())
	}
	// A copy: a caller's edit does not reach the answer.
	allowed.Details().RelevantEnv[0] = "OTHER"
	if allowed.Details().RelevantEnv[0] != "ACME_API_KEY" {
		t.Error("Details are not a copy")
	}
}

// A caller that makes one of these by hand gets a refusal, never an allow.
func TestZeroRefusalsRefuse(t *testing.T) {
	for _, refusal := range []Refusal{&Denied{}, &Undecided{}} {
		body := Body{Error: noDecision, Remedy: tryAgain, Code: DecisionUnavailable, BillingMode: UnknownBilling, Retryable: true, MissingEnv: []string{}, AlternativeModels: []string{}}
		if refusal.HTTPStatus() != http.StatusServiceUnavailable || !reflect.DeepEqual(refusal.Body(), body) || refusal.RetryAfter() <= 0 {
			t.Errorf("%T: status %d, body %+v", refusal, refusal.HTTPStatus(), refusal.Body())
		}
		var read Body
		if err := json.Unmarshal(refusal.JSON(), &read); err != nil || !reflect.DeepEqual(read, body) {
			t.Errorf("%T: %s, %v", refusal, refusal.JSON(), err)
		}
		if refusal.Error() == "" {
			t.Errorf("%T says nothing", refusal)
		}
	}
}

// The body is a copy: a handler that edits it does not change what the next one reads.
func TestABodyIsACopy(t *testing.T) {
	_, refusal := read(nil, missingKey("ACME_API_KEY"))
	refusal.Body().MissingEnv[0] = "OTHER"
	if got := refusal.Body().MissingEnv[0]; got != "ACME_API_KEY" {
		t.Errorf("missing_env is now %q", got)
	}
}

// An unknown code is a denial, with byok-gate's message and retry pause: as "no decision" a caller would retry forever.
func TestADenialForAnUnknownReasonIsADenial(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	for number, code := range map[byokgatev1.DenyCode]Code{999: "DENY_CODE_999", 0: "DENY_CODE_0", -1: "DENY_CODE_-1"} {
		for _, retryable := range []bool{false, true} {
			fake.tell(deny(&byokgatev1.Deny{
				Code: number, Message: "a reason of tomorrow's", Remedy: "what to do tomorrow", Retryable: retryable, RetryAfter: durationpb.New(7 * time.Second),
			}), nil)
			allowed, err := client.Decide(background(), acme())
			denied := wantDenied(t, allowed, err, code)
			status, after := http.StatusUnprocessableEntity, time.Duration(0)
			if retryable {
				status, after = http.StatusServiceUnavailable, 7*time.Second
			}
			if body := denied.Body(); body.Error != "a reason of tomorrow's" || body.Remedy != "what to do tomorrow" || denied.HTTPStatus() != status || denied.RetryAfter() != after {
				t.Errorf("%s: %+v, %d after %v", code, body, denied.HTTPStatus(), denied.RetryAfter())
			}
			if !errors.Is(err, ErrDenied) || errors.Is(err, ErrUndecided) || errors.Is(err, MissingBYOKCredential) || !errors.Is(err, code) {
				t.Errorf("%v", err)
			}
		}
	}
	// Without content it is one, too.
	fake.tell(deny(&byokgatev1.Deny{}), nil)
	allowed, err := client.Decide(background(), acme())
	if body := wantDenied(t, allowed, err, "DENY_CODE_0").Body(); body.Error == "" || body.Remedy == "" {
		t.Errorf("%+v", body)
	}
}
