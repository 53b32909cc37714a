package byokgatetest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/byokgatetest"
)

func about(model string) byokgate.Request {
	return byokgate.Request{Checkpoint: byokgate.Create, Spec: byokgate.Spec{
		WorkspaceID: "ws-1", OrganizationID: "org-1", Runtime: "agent", Model: model,
		Lookup: byokgate.Static(byokgate.Found{"ACME_API_KEY": byokgate.NewSecret("made-up-key")}, nil),
	}}
}

func TestAnAllowADenialAndDown(t *testing.T) {
	gate := byokgatetest.Start(t)
	client := gate.Client()

	gate.Allow(byokgate.BYOK)
	if allowed, err := client.Decide(context.Background(), about("m")); err != nil || allowed.BillingMode() != byokgate.BYOK || allowed.DecisionID() == "" {
		t.Errorf("%v, %v", allowed, err)
	}
	gate.Deny(byokgate.MissingBYOKCredential)
	if _, err := client.Decide(context.Background(), about("m")); !errors.Is(err, byokgate.MissingBYOKCredential) || !errors.Is(err, byokgate.ErrDenied) {
		t.Errorf("%v", err)
	}
	gate.Down()
	var undecided *byokgate.Undecided
	if _, err := client.Decide(context.Background(), about("m")); !errors.As(err, &undecided) || undecided.Reason() != byokgate.ReasonUnreachable {
		t.Errorf("%v", err)
	}
	gate.Up()
	gate.Allow(byokgate.PlatformManaged)
	if allowed, err := client.Decide(context.Background(), about("m")); err != nil || allowed.BillingMode() != byokgate.PlatformManaged {
		t.Errorf("%v, %v", allowed, err)
	}
}

func TestEveryCode(t *testing.T) {
	gate := byokgatetest.Start(t)
	gate.Names("m", "ACME_API_KEY", "ACME_TOKEN")
	client := gate.Client()
	retryable := 0
	for _, code := range byokgate.Codes() {
		gate.Deny(code)
		_, err := client.Decide(context.Background(), about("m"))
		var denied *byokgate.Denied
		if !errors.As(err, &denied) || denied.Code() != code {
			t.Errorf("%s: %v", code, err)
			continue
		}
		body := denied.Body()
		if body.Error == "" || body.Remedy == "" || strings.ContainsAny(body.Error+body.Remedy, "{}") || strings.HasPrefix(body.Error, "refused: ") {
			t.Errorf("%s has no words of byok-gate's: %+v", code, body)
		}
		if denied.Retryable() {
			retryable++
			if denied.HTTPStatus() != 503 || denied.RetryAfter() != 2*time.Second {
				t.Errorf("%s: %d, %v", code, denied.HTTPStatus(), denied.RetryAfter())
			}
		}
	}
	if retryable != 7 {
		t.Errorf("%d codes are retryable", retryable)
	}
	gate.Deny(byokgate.MissingBYOKCredential, byokgatetest.Missing("X"), byokgatetest.Words("message", "remedy"), byokgatetest.Alternatives("free"))
	_, err := client.Decide(context.Background(), about("m"))
	if body := byokgate.RefusalOf(err).Body(); body.Error != "message" || body.Remedy != "remedy" || body.AlternativeModels[0] != "free" {
		// X was not looked for, so the client asks again before it believes that it is missing; the answer is the same.
		t.Errorf("%+v", body)
	}
}

func TestEveryFailure(t *testing.T) {
	gate := byokgatetest.Start(t)
	client := gate.Client(byokgate.WithTimeout(400 * time.Millisecond))
	for _, reason := range []byokgate.Reason{
		byokgate.ReasonUnreachable, byokgate.ReasonTimedOut, byokgate.ReasonOverloaded, byokgate.ReasonDraining, byokgate.ReasonBadRequest,
		byokgate.ReasonUnauthenticated, byokgate.ReasonPermissionDenied, byokgate.ReasonNotAGate, byokgate.ReasonInternal,
		byokgate.ReasonUnreadableReply, byokgate.ReasonRegistryMoving,
	} {
		gate.Fail(reason)
		_, err := client.Decide(context.Background(), about("m"))
		var undecided *byokgate.Undecided
		if !errors.As(err, &undecided) || undecided.Reason() != reason {
			t.Errorf("%s: %v", reason, err)
		}
	}
	gate.Fail(byokgate.ReasonBadRequest)
	_, err := client.Decide(context.Background(), about("m"))
	var undecided *byokgate.Undecided
	if !errors.As(err, &undecided) || len(undecided.Violations()) != 1 || undecided.Violations()[0].Field != "workspace_spec.model" {
		t.Errorf("%v", err)
	}
	gate.Allow(byokgate.BYOK).After(time.Minute)
	if _, err := client.Decide(context.Background(), about("m")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("slow: %v", err)
	}
}

func TestRulesInOrder(t *testing.T) {
	gate := byokgatetest.Start(t)
	client := gate.Client()
	gate.When(byokgatetest.All(byokgatetest.Model("a"), byokgatetest.Organization("org-2"))).Deny(byokgate.ModelWithdrawn)
	gate.When(byokgatetest.Model("a", "b")).Deny(byokgate.BYOKProbeTimeout, byokgatetest.RetryAfter(time.Millisecond)).
		Then().Fail(byokgate.ReasonInternal).Then().Allow(byokgate.BYOK, byokgate.WarnCredentialUnverified)
	gate.When(func(asked byokgatetest.Asked) bool { return asked.Explain }).Allow(byokgate.NoBilling)
	gate.Deny(byokgate.UnregisteredModelForRuntime)

	other, explained := about("a"), about("c")
	other.Spec.OrganizationID, explained.Explain = "org-2", true
	for index, test := range []struct {
		request byokgate.Request
		want    string
	}{
		{other, "MODEL_WITHDRAWN"}, {about("a"), "BYOK_PROBE_TIMEOUT"}, {about("b"), "DECISION_UNAVAILABLE"}, {about("a"), "BYOK"}, {about("a"), "BYOK"},
		{explained, "NONE"}, {about("c"), "UNREGISTERED_MODEL_FOR_RUNTIME"},
	} {
		allowed, err := client.Decide(context.Background(), test.request)
		got := ""
		if err != nil {
			got = string(byokgate.RefusalOf(err).Code())
		} else {
			got = string(allowed.BillingMode())
			if index == 3 && (!allowed.Unverified() || allowed.Warnings()[0].Code != byokgate.WarnCredentialUnverified) {
				t.Errorf("%v", allowed.Warnings())
			}
		}
		if got != test.want {
			t.Errorf("%d: %s, expected %s", index, got, test.want)
		}
	}
	gate.Forget()
	gate.Allow(byokgate.BYOK)
	if _, err := client.Decide(context.Background(), other); err != nil {
		t.Error(err)
	}
}

func TestWhatWasAsked(t *testing.T) {
	const trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	gate := byokgatetest.Start(t)
	gate.Names("m", "ACME_API_KEY")
	gate.Allow(byokgate.BYOK)
	client := gate.Client()
	request := about("m")
	request.MaxLivenessAge = byokgate.Fresh()
	if _, err := client.Decide(byokgate.ContextWithTrace(context.Background(), trace, ""), request); err != nil {
		t.Fatal(err)
	}
	reporter, err := client.ReportOnly(byokgate.ReportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for range reporter.BatchReport(context.Background(), []byokgate.Request{about("other")}) {
	}
	asked := gate.Asked()
	if len(asked) != 2 {
		t.Fatalf("%+v", asked)
	}
	first, second := asked[0], asked[1]
	if first.WorkspaceID != "ws-1" || first.Checkpoint != byokgate.Create || first.TraceParent != trace || *first.MaxLivenessAge != 0 || first.Batch ||
		len(first.Credentials) != 1 || first.Credentials[0].Name != "ACME_API_KEY" || first.Credentials[0].Scope != byokgate.Workspace ||
		first.Credentials[0].Value.Reveal() != "made-up-key" || strings.Contains(fmt.Sprintf("%+v", first), "made-up-key") {
		t.Errorf("%+v", first)
	}
	if !second.ReportOnly || !second.Batch || len(second.Credentials) != 0 {
		t.Errorf("%+v", second)
	}
}

func TestTheMenu(t *testing.T) {
	gate := byokgatetest.Start(t)
	gate.Menu(byokgate.Model{Runtime: "agent", Model: "m", Provider: "acme", BillingMode: byokgate.BYOK, AcceptedEnv: []string{"ACME_API_KEY"}},
		byokgate.Model{Runtime: "other", Model: "n"})
	models, err := gate.Client().ListModels(context.Background(), "agent")
	if err != nil || len(models) != 1 || models[0].Provider != "acme" || models[0].BillingMode != byokgate.BYOK {
		t.Errorf("%+v, %v", models, err)
	}
	gate.Names("m", "ACME_API_KEY")
	owner, err := gate.Client().ResolveProvider(context.Background(), "agent", "m")
	if err != nil || !slices.Equal(owner.RelevantEnv, []string{"ACME_API_KEY"}) {
		t.Errorf("%+v, %v", owner, err)
	}
}

// complaints is a test that only listens to what it is told.
type complaints struct {
	testing.TB
	told []string
}

func (c *complaints) Helper() {}
func (c *complaints) Errorf(format string, arguments ...any) {
	c.told = append(c.told, fmt.Sprintf(format, arguments...))
}
func (c *complaints) Fatalf(format string, arguments ...any) {
	panic(fmt.Sprintf(format, arguments...))
}

func TestWhatATestForgotIsSaid(t *testing.T) {
	heard := &complaints{TB: t}
	gate := byokgatetest.Start(heard)
	if _, err := gate.Client().Decide(context.Background(), about("m")); !errors.Is(err, byokgate.ErrUndecided) {
		t.Errorf("%v", err)
	}
	if len(heard.told) != 1 || !strings.Contains(heard.told[0], "no rule says how to answer CREATE of \"m\"") {
		t.Errorf("%q", heard.told)
	}
	for what, wrong := range map[string]func(){
		"denies nothing with the code": func() { gate.Deny("NO_SUCH_CODE") },
		"is no failure of byok-gate's": func() { gate.Fail(byokgate.ReasonTLSUntrusted) },
		"no allow has the billing":     func() { gate.Allow(byokgate.UnknownBilling) },
	} {
		func() {
			defer func() {
				if said := fmt.Sprint(recover()); !strings.Contains(said, what) {
					t.Errorf("%s, expected %q", said, what)
				}
			}()
			wrong()
		}()
	}
}

// A program that links the package does not start.
func TestItCannotBeLinkedIntoAProgram(t *testing.T) {
	// Below this module, so that it is found there.
	folder, err := os.MkdirTemp(".", "testdata-program-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	source := "package main\n\nimport _ \"github.com/byok-gate/byok-gate/clients/go/byokgatetest\"\n\nfunc main() { println(\"started\") }\n"
	if err := os.WriteFile(filepath.Join(folder, "main.go"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	output, err := exec.Command("go", "run", "./"+folder).CombinedOutput()
	if err == nil || !strings.Contains(string(output), "byokgatetest is for tests alone") || strings.Contains(string(output), "started") {
		t.Errorf("%v\n%s", err, output)
	}
}

// A nil or invalid argument does not crash the test binary from another goroutine: it is ignored, or fails the test.
func TestNilAndNumbersThatCannotBeMeant(t *testing.T) {
	gate := byokgatetest.Start(t)
	gate.When(nil).Deny(byokgate.MissingBYOKCredential, nil, byokgatetest.RetryAfter(-time.Hour), byokgatetest.Missing(), byokgatetest.Alternatives(), byokgatetest.Words("", "-"))
	_, err := gate.Client().Decide(context.Background(), about("m"))
	if !errors.Is(err, byokgate.MissingBYOKCredential) {
		t.Errorf("%v", err)
	}
	gate.Forget()
	gate.When(byokgatetest.All()).Allow(byokgate.BYOK)
	gate.When(byokgatetest.All(nil, byokgatetest.Model("m"))).Fail(byokgate.ReasonInternal)
	if _, err := gate.Client().Decide(context.Background(), about("m")); err != nil {
		t.Errorf("%v", err)
	}
	gate.Menu()
	gate.Names("")
	for name, use := range map[string]func(*byokgatetest.Gate){
		"a negative pause":  func(gate *byokgatetest.Gate) { gate.Allow(byokgate.BYOK).After(-time.Second) },
		"no billing mode":   func(gate *byokgatetest.Gate) { gate.Allow("") },
		"no code":           func(gate *byokgatetest.Gate) { gate.Deny("") },
		"no reason":         func(gate *byokgatetest.Gate) { gate.Fail("") },
		"an option of none": func(gate *byokgatetest.Gate) { gate.Client(nil) },
	} {
		failing := &failed{TB: t}
		func() {
			defer func() {
				if thrown := recover(); thrown != nil && thrown != failing {
					t.Errorf("%s: panics with %v", name, thrown)
				}
			}()
			use(byokgatetest.Start(failing))
		}()
		if failing.said == "" {
			t.Errorf("%s: the test did not fail", name)
		}
	}
	defer func() {
		if thrown, is := recover().(string); !is || thrown != "byokgatetest: Start needs the test that it is for" {
			t.Errorf("Start(nil): %v", thrown)
		}
	}()
	byokgatetest.Start(nil)
}

// failed is a test that may fail without failing this one.
type failed struct {
	testing.TB
	said string
}

func (f *failed) Fatalf(format string, arguments ...any) {
	f.said = fmt.Sprintf(format, arguments...)
	panic(f)
}
