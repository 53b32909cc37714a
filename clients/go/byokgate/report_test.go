package byokgate

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

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
	reporter := reporting(t, client)
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

// The question outlives the handler and its context, is bounded, and what is dropped is counted. All reporters of a client share the counts.
func TestReportsInTheBackground(t *testing.T) {
	fake, address := startFake(t)
	hold := make(chan struct{})
	fake.decide = func(context.Context, *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
		<-hold
		return missingKey("ACME_API_KEY"), nil
	}
	hooked := make(chan context.Context, 10)
	client := newClient(t, address, WithTraceContext(func(ctx context.Context) (string, string) { hooked <- ctx; return "", "" }))
	const queue = 3
	reporter, err := client.ReportOnly(ReportOptions{Queue: queue, Concurrent: 2})
	if err != nil {
		t.Fatal(err)
	}
	type key struct{}
	handler, cancel := context.WithCancel(context.WithValue(background(), key{}, "a value"))
	var looked atomic.Int32
	request := with(func(ctx context.Context, _ Scope, _ []string) (Found, error) {
		if ctx.Value(key{}) != "a value" || ctx.Err() != nil {
			t.Error("the context is not the handler's, or ended with it")
		}
		looked.Add(1)
		return nil, nil
	})
	for number := range queue + 2 {
		if taken := reporter.Go(handler, request); taken != (number < queue) {
			t.Errorf("question %d: %v", number, taken)
		}
	}
	// The handler returns. Its hook was asked while it was there, and not again.
	cancel()
	if len(hooked) != queue+2 {
		t.Errorf("the trace hook was asked %d times", len(hooked))
	}
	if err := reporter.Wait(withTimeout(t, time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	close(hold)
	if err := reporter.Wait(background()); err != nil {
		t.Fatal(err)
	}
	counts := reporting(t, client).Counts()
	if counts.Dropped != 2 || counts.WouldRefuse[MissingBYOKCredential] != queue || looked.Load() != 2*queue {
		t.Errorf("%+v, %d lookups", counts, looked.Load())
	}
	if len(hooked) != queue+2 {
		t.Errorf("the trace hook was asked %d times", len(hooked))
	}
	for _, asked := range fake.requests() {
		if !asked.GetReportOnly() {
			t.Error("not marked as report only on the wire")
		}
	}
	if _, err := client.Decide(background(), acme()); err == nil {
		t.Error("the client does not enforce")
	}
	if last := fake.requests()[queue]; last.GetReportOnly() {
		t.Error("an enforcing question is marked as report only")
	}
}

func TestABatchOfReports(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	fake.batch = func(request *byokgatev1.BatchDecideRequest, stream batchStream) error {
		for index, asked := range request.GetRequests() {
			if !asked.GetReportOnly() {
				t.Error("not marked as report only on the wire")
			}
			reply := decided(index, allow(2))
			if index == 1 {
				reply = decided(index, missingKey("ACME_API_KEY"))
			}
			if err := stream.Send(reply); err != nil {
				return err
			}
		}
		return nil
	}
	reporter := reporting(t, client)
	got := map[int]string{}
	for index, report := range reporter.BatchReport(background(), batchOf(3)) {
		got[index] = verdict(report)
	}
	if fmt.Sprint(got) != "map[0:would_allow 1:would_deny MISSING_BYOK_CREDENTIAL 2:would_allow]" {
		t.Errorf("%v", got)
	}
	if counts := reporter.Counts(); counts.WouldAllow != 2 || counts.WouldRefuse[MissingBYOKCredential] != 1 {
		t.Errorf("%+v", counts)
	}
}

// reporting is a client's reporter.
func reporting(t *testing.T, client *Client) *Reporter {
	t.Helper()
	reporter, err := client.ReportOnly(ReportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return reporter
}
