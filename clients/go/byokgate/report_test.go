package byokgate

import (
	"fmt"
	"maps"
	"reflect"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// observations are what an observer was told, without the time.
type observations struct {
	mu   sync.Mutex
	told []Observation
}

func (o *observations) observe(told Observation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if told.Took <= 0 {
		panic("took no time")
	}
	told.Took = 0
	o.told = append(o.told, told)
}

func TestReportOnlyIsNeverEnforcement(t *testing.T) {
	fake, address := startFake(t)
	seen := &observations{}
	client, logs := newLoggedClient(t, address, WithObserver(seen.observe))
	reporter := client.ReportOnly(ReportOptions{})
	ask := func(response *byokgatev1.DecideResponse, fault error) (Report, error) {
		fake.tell(response, fault)
		report := reporter.Report(background(), acme())
		_, err := client.Decide(background(), acme())
		return report, err
	}

	allowed, err := ask(allow(2), nil)
	if err != nil || verdict(allowed) != "would_allow" || allowed.String() != "byok-gate, report only: would have been allowed, billing BYOK" {
		t.Errorf("%v, %v", allowed, err)
	}
	denied, err := ask(missingKey("ACME_API_KEY"), nil)
	if err == nil || verdict(denied) != "would_deny MISSING_BYOK_CREDENTIAL" {
		t.Errorf("%v, %v", denied, err)
	}
	undecided, err := ask(nil, status.Error(codes.Internal, "-"))
	if err == nil || verdict(undecided) != "would_be_undecided DECISION_UNAVAILABLE" {
		t.Errorf("%v, %v", undecided, err)
	}

	counts := reporter.Counts()
	if want := map[Code]uint64{"MISSING_BYOK_CREDENTIAL": 1, DecisionUnavailable: 1}; counts.WouldAllow != 1 || !maps.Equal(counts.WouldRefuse, want) {
		t.Errorf("counts %+v", counts)
	}
	counts.WouldRefuse["EDITED"] = 1
	if len(reporter.Counts().WouldRefuse) != 2 {
		t.Error("Counts is not a copy")
	}
	want := []Observation{
		{Mode: ReportOnly, Checkpoint: Create, Outcome: "would_allow", Provider: "acme", BillingMode: BYOK},
		{Mode: Enforce, Checkpoint: Create, Outcome: "allowed", Provider: "acme", BillingMode: BYOK},
		{Mode: ReportOnly, Checkpoint: Create, Outcome: "would_deny", Code: "MISSING_BYOK_CREDENTIAL", Provider: "acme"},
		{Mode: Enforce, Checkpoint: Create, Outcome: "denied", Code: "MISSING_BYOK_CREDENTIAL", Provider: "acme"},
		{Mode: ReportOnly, Checkpoint: Create, Outcome: "would_be_undecided", Code: DecisionUnavailable, Reason: ReasonUnreadableReply},
		{Mode: Enforce, Checkpoint: Create, Outcome: "undecided", Code: DecisionUnavailable, Reason: ReasonUnreadableReply},
	}
	if !reflect.DeepEqual(seen.told, want) {
		t.Errorf("observed\n%+v, expected\n%+v", seen.told, want)
	}
	for _, line := range strings.Split(strings.TrimSpace(logs.String()), "\n") {
		reports := strings.Contains(line, `"mode":"report_only"`)
		if reports != strings.Contains(line, "report only: would have been") {
			t.Errorf("a line that could be mistaken: %s", line)
		}
	}
	if !strings.Contains((Report{}).String(), "nothing was asked") {
		t.Errorf("the zero Report says %v", Report{})
	}
	if refused := fmt.Sprint(denied); !strings.Contains(refused, "report only") {
		t.Errorf("a report that could be mistaken: %s", refused)
	}
}

func verdict(report Report) string {
	outcome, refusal := report.Verdict()
	if refusal == nil {
		return string(outcome)
	}
	return string(outcome) + " " + string(refusal.Code())
}

// No method of a Reporter or a Report leads to an Allowed, so that code which needs one does not compile with them.
func TestAReporterHasNoAllowed(t *testing.T) {
	for _, kind := range []reflect.Type{reflect.TypeFor[*Reporter](), reflect.TypeFor[Report](), reflect.TypeFor[Counts]()} {
		for index := range kind.NumMethod() {
			method := kind.Method(index)
			for place := range method.Type.NumOut() {
				if result := method.Type.Out(place); result == reflect.TypeFor[Allowed]() || result == reflect.TypeFor[Result]() {
					t.Errorf("%v.%s gives an %v", kind, method.Name, result)
				}
			}
		}
	}
}

func TestWarningsAreLogged(t *testing.T) {
	fake, address := startFake(t)
	client, logs := newLoggedClient(t, address)
	response := allow(2)
	response.Warnings = []*byokgatev1.Warning{{
		Code: byokgatev1.WarningCode_WARNING_CODE_CREDENTIAL_UNVERIFIED, Message: "TIMEOUT", EnvNames: []string{"ACME_API_KEY"},
	}}
	fake.tell(response, nil)
	allowed, err := client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
	if got := allowed.Warnings(); len(got) != 1 || got[0].Code != "CREDENTIAL_UNVERIFIED" {
		t.Errorf("warnings %v", got)
	}
	if !strings.Contains(logs.String(), `"level":"WARN","msg":"byok-gate: warning"`) {
		t.Errorf("an unverified allow is silent:\n%s", logs)
	}
}
