package byokgate

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/byok-gate/byok-gate/clients/go/internal/exported"
)

// Every exported function is called with nil and zero values. None panics, except those of an Allowed, which must not pass for an allow. A function without a row here fails the test.
func TestEveryFunctionTakesNilAndZero(t *testing.T) {
	var (
		none      context.Context
		client    *Client
		reporter  *Reporter
		denied    *Denied
		undecided *Undecided
		memory    *SweepMemory
		secret    *Secret
	)
	bare := &Client{}
	closed, err := New("127.0.0.1:1", WithLogger(discard))
	if err != nil {
		t.Fatal(err)
	}
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	clients := []*Client{client, bare, closed}
	want := func(what string, held bool) {
		t.Helper()
		if !held {
			t.Error(what)
		}
	}
	refused := func(what string, err error) {
		t.Helper()
		want(what, errors.Is(err, ErrUndecided))
	}
	option := func(what string, options ...Option) {
		t.Helper()
		_, err := New("localhost:1", options...)
		want(what, err != nil)
	}
	panics := func(what string, use func()) {
		t.Helper()
		thrown := false
		hook(use, func(any) { thrown = true })
		want(what+" does not panic", thrown)
	}
	rows := map[string]func(){
		"New":            func() { _, err := New(""); want("New", err != nil) },
		"AtMost":         func() { want("AtMost", *AtMost(0) == 0) },
		"Fresh":          func() { want("Fresh", *Fresh() == 0) },
		"NewSecret":      func() { want("NewSecret", NewSecret("").Readable()) },
		"Unreadable":     func() { want("Unreadable", !Unreadable().Readable()) },
		"NewSweepMemory": func() { want("NewSweepMemory", NewSweepMemory() != nil) },
		"RoundRobin":     func() { want("RoundRobin", RoundRobin().kind == balanceRoundRobin) },
		"OneConnection":  func() { want("OneConnection", OneConnection().kind == balanceOneConnection) },
		"Codes":          func() { want("Codes", len(Codes()) > 0) },
		"Verdicts":       func() { want("Verdicts", len(Verdicts()) > 0) },
		"WarningCodes":   func() { want("WarningCodes", len(WarningCodes()) > 0) },
		"ByOrganization": func() {
			for _, key := range []Secret{{}, NewSecret("")} {
				option("ByOrganization", WithBalancing(ByOrganization(key)))
			}
		},
		"Concerns": func() {
			want("Concerns", !Concerns(nil) && !Concerns(nil, "A") && Concerns(denied, "A") && Concerns(errors.New("-")))
		},
		"MayDelete": func() {
			want("MayDelete", MayDelete(nil, nil) && MayDelete(denied, denied, "A") && MayDelete(undecided, nil))
		},
		"ContextWithTrace": func() { want("ContextWithTrace", ContextWithTrace(none, "", "") != nil) },
		"Overlay": func() {
			for _, changes := range []map[string]*Secret{nil, {}} {
				found, err := Overlay(nil, Workspace, changes)(background(), Workspace, []string{"A"})
				want("Overlay without a store", found == nil && errors.Is(err, errNoStored))
				found, err = Overlay(Static(nil, nil), 0, changes)(none, 0, nil)
				want("Overlay of nothing", len(found) == 0 && err == nil)
			}
		},
		"Static": func() {
			found, err := Static(nil, nil)(none, 0, nil)
			want("Static", len(found) == 0 && err == nil)
		},
		"Pause": func() {
			want("Pause of nil", Pause(nil, 0) == 0)
			for _, attempt := range []int{math.MinInt, -1, 0, 1, 16, math.MaxInt} {
				for _, refusal := range []Refusal{denied, undecided, &Denied{}, &Undecided{}} {
					pause := Pause(refusal, attempt)
					want("Pause of nothing", pause >= defaultRetryAfter && pause <= 2*defaultMaxPause+maxSpread)
					want("Pause of a first attempt", attempt > patientAttempts || pause <= 2*defaultRetryAfter)
				}
			}
		},
		"RefusalOf": func() {
			for _, err := range []error{nil, denied, undecided, errors.New("-")} {
				want("RefusalOf", RefusalOf(err).HTTPStatus() == http.StatusServiceUnavailable)
			}
		},
		// Options.
		"WithBalancing": func() {
			made, err := New("localhost:1", WithBalancing(Balancing{}))
			want("WithBalancing", err == nil && made.Close() == nil)
		},
		"WithBatchTimeout":    func() { option("WithBatchTimeout", WithBatchTimeout(0)) },
		"WithDialer":          func() { option("WithDialer", WithDialer(nil)) },
		"WithInsecureNetwork": func() { option("WithInsecureNetwork", WithInsecureNetwork(), nil) },
		"WithLogger":          func() { option("WithLogger", WithLogger(nil)) },
		"WithLookupBudget":    func() { option("WithLookupBudget", WithLookupBudget(0, 0)) },
		"WithObserver":        func() { option("WithObserver", WithObserver(nil)) },
		"WithStatsHandler":    func() { option("WithStatsHandler", WithStatsHandler(nil)) },
		"WithTLS":             func() { option("WithTLS", WithTLS(nil)) },
		"WithTLSFiles": func() {
			made, err := New("localhost:1", WithTLSFiles("", "", ""))
			want("WithTLSFiles", err == nil && made.Close() == nil)
		},
		"WithTimeout":      func() { option("WithTimeout", WithTimeout(0)) },
		"WithToken":        func() { option("WithToken", WithToken(Secret{})) },
		"WithTokenFile":    func() { option("WithTokenFile", WithTokenFile("")) },
		"WithTraceContext": func() { option("WithTraceContext", WithTraceContext(nil)) },
		"WithUserAgent":    func() { option("WithUserAgent", WithUserAgent("")) },
		// The client's.
		"Client.Close": func() { want("Close", client.Close() == nil && bare.Close() == nil) },
		"Client.Decide": func() {
			for _, one := range clients {
				_, err := one.Decide(none, Request{})
				refused("Decide", err)
			}
		},
		"Client.DecideUntil": func() {
			for _, one := range clients {
				_, err := one.DecideUntil(none, Request{}, RetryPolicy{MaxAttempts: -1})
				refused("DecideUntil", err)
			}
		},
		"Client.BatchDecide": func() {
			for _, one := range clients {
				one.BatchDecide(none, nil)(func(int, Result) bool { t.Error("a result of nothing"); return false })
				one.BatchDecide(none, []Request{{}})(nil)
				for _, result := range one.BatchDecide(none, []Request{{}}) {
					_, err := result.Decision()
					refused("BatchDecide", err)
				}
			}
		},
		"Client.ListModels": func() {
			for _, one := range clients {
				_, err := one.ListModels(none, "")
				refused("ListModels", err)
			}
		},
		"Client.Menu": func() {
			for _, one := range clients {
				_, err := one.Menu(none, "")
				refused("Menu", err)
			}
		},
		"Client.RegistryStatus": func() {
			for _, one := range clients {
				_, err := one.RegistryStatus(none)
				refused("RegistryStatus", err)
			}
		},
		"Client.ResolveProvider": func() {
			for _, one := range clients {
				_, err := one.ResolveProvider(none, "", "")
				refused("ResolveProvider", err)
			}
		},
		"Client.ReportOnly": func() {
			for _, one := range clients {
				made, err := one.ReportOnly(ReportOptions{})
				want("ReportOnly", err == nil && made != nil)
			}
		},
		"Client.Sweep": func() {
			for _, one := range clients {
				one.Sweep(none, nil, SweepOptions{})(nil)
				for _, err := range one.Sweep(none, nil, SweepOptions{}) {
					refused("Sweep", err)
				}
			}
		},
		"Client.SweepCounts": func() { want("SweepCounts", client.SweepCounts().Rounds == 0 && bare.SweepCounts().Rounds == 0) },
		// The reporter's.
		"Reporter.BatchReport": func() {
			for _, one := range []*Reporter{reporter, {}} {
				one.BatchReport(none, []Request{{}})(nil)
				one.BatchReport(none, []Request{{}})(func(int, Report) bool { t.Error("a report of nothing"); return false })
			}
		},
		"Reporter.Counts": func() { want("Counts", reporter.Counts().Dropped == 0 && (&Reporter{}).Counts().Dropped == 0) },
		"Reporter.Go":     func() { want("Go", !reporter.Go(none, Request{}) && !(&Reporter{}).Go(none, Request{})) },
		"Reporter.Report": func() {
			want("Report", verdict(reporter.Report(none, Request{})) == "" && verdict((&Reporter{}).Report(none, Request{})) == "")
		},
		"Reporter.Wait": func() { want("Wait", reporter.Wait(none) == nil && (&Reporter{}).Wait(none) == nil) },
		"Report.String": func() { want("Report.String", Report{}.String() != "") },
		"Report.Verdict": func() {
			outcome, refusal := Report{}.Verdict()
			want("Verdict", outcome == "" && refusal == nil)
		},
		"Result.Decision": func() {
			_, err := Result{}.Decision()
			refused("Decision", err)
		},
		// An Allowed that nobody made.
		"Allowed.BillingMode": func() { panics("BillingMode", func() { Allowed{}.BillingMode() }) },
		"Allowed.DecisionID":  func() { panics("DecisionID", func() { Allowed{}.DecisionID() }) },
		"Allowed.Details":     func() { panics("Details", func() { Allowed{}.Details() }) },
		"Allowed.Provider":    func() { panics("Provider", func() { Allowed{}.Provider() }) },
		"Allowed.Reply":       func() { panics("Reply", func() { Allowed{}.Reply() }) },
		"Allowed.Unverified":  func() { panics("Unverified", func() { Allowed{}.Unverified() }) },
		"Allowed.Warnings":    func() { panics("Warnings", func() { Allowed{}.Warnings() }) },
		"Allowed.LogValue":    func() { want("LogValue", Allowed{}.LogValue().String() != "") },
		"Allowed.MarshalJSON": func() { _, err := json.Marshal(Allowed{}); want("MarshalJSON", err != nil) },
		"Allowed.String":      func() { want("String", strings.Contains(Allowed{}.String(), "no allow")) },
		// Refusals that nobody made.
		"Denied.DecisionID": func() { want("DecisionID", denied.DecisionID() == "" && (&Denied{}).DecisionID() == "") },
		"Denied.Details":    func() { want("Details", denied.Details().Provider == "" && (&Denied{}).Details().Provider == "") },
		"Denied.Reply":      func() { want("Reply", string(denied.Reply()) == "{}" && string((&Denied{}).Reply()) == "{}") },
		"Denied.Is":         func() { want("Is", errors.Is(denied, ErrDenied) && !errors.Is(denied, nil)) },
		"Undecided.Is":      func() { want("Is", errors.Is(undecided, ErrUndecided) && !errors.Is(undecided, context.Canceled)) },
		"Undecided.Reason": func() {
			want("Reason", undecided.Reason() == ReasonInternal && (&Undecided{}).Reason() == ReasonInternal)
		},
		"Undecided.Unwrap":     func() { want("Unwrap", undecided.Unwrap() == nil) },
		"Undecided.Violations": func() { want("Violations", undecided.Violations() == nil) },
		// Others.
		"Checkpoint.String": func() { want("String", Checkpoint(0).String() != "" && Checkpoint(math.MaxInt32).String() != "") },
		"Scope.String":      func() { want("String", Scope(0).String() != "" && Scope(-1).String() != "") },
		"Code.Error":        func() { want("Error", Code("").Error() == "") },
		"Secret.Format":     func() { want("Format", !strings.Contains(slog.AnyValue(Secret{}).String(), "nil")) },
		"Secret.GoString":   func() { want("GoString", Secret{}.GoString() == redacted) },
		"Secret.LogValue":   func() { want("LogValue", Secret{}.LogValue().String() == redacted) },
		"Secret.MarshalJSON": func() {
			text, err := json.Marshal(Secret{})
			want("MarshalJSON", err == nil && string(text) == `"`+redacted+`"`)
		},
		"Secret.MarshalText": func() {
			text, err := Secret{}.MarshalText()
			want("MarshalText", err == nil && string(text) == redacted)
		},
		"Secret.Readable": func() { want("Readable", !Secret{}.Readable()) },
		"Secret.Reveal":   func() { want("Reveal", Secret{}.Reveal() == "") },
		"Secret.String":   func() { want("String", Secret{}.String() == redacted) },
		"Secret.UnmarshalJSON": func() {
			want("UnmarshalJSON", secret.UnmarshalJSON(nil) != nil && (&Secret{}).UnmarshalJSON(nil) != nil && json.Unmarshal([]byte("null"), &Secret{}) != nil)
		},
		"SweepMemory.Load": func() {
			_, err := memory.Load(none, "")
			zero, ok := (&SweepMemory{}).Load(none, "")
			want("Load", err != nil && ok == nil && zero == SweepRecord{})
		},
		"SweepMemory.Save": func() {
			want("Save", memory.Save(none, "", SweepRecord{}) != nil && (&SweepMemory{}).Save(none, "", SweepRecord{}) == nil)
		},
	}
	// What both refusals have.
	for name, refusal := range map[string]Refusal{"Denied": denied, "Undecided": undecided} {
		for _, refusal := range []Refusal{refusal, map[string]Refusal{"Denied": &Denied{}, "Undecided": &Undecided{}}[name]} {
			for method, use := range map[string]func() bool{
				"Body": func() bool { return refusal.Body().Error != "" }, "Code": func() bool { return refusal.Code() == DecisionUnavailable },
				"Error": func() bool { return refusal.Error() != "" }, "HTTPStatus": func() bool { return refusal.HTTPStatus() == 503 },
				"JSON": func() bool { return json.Valid(refusal.JSON()) }, "OperatorHint": func() bool { return refusal.OperatorHint() == "" },
				"RetryAfter": func() bool { return refusal.RetryAfter() > 0 }, "Retryable": refusal.Retryable,
				"LogValue": func() bool { return refusal.(slog.LogValuer).LogValue().String() != "" },
			} {
				before := rows[name+"."+method]
				rows[name+"."+method] = func() {
					if before != nil {
						before()
					}
					want(name+"."+method, use())
				}
			}
		}
	}
	for name, row := range rows {
		hook(row, func(thrown any) { t.Errorf("%s panics: %v", name, thrown) })
	}
	names, err := exported.Functions(".")
	if err != nil || len(names) == 0 {
		t.Fatal(err)
	}
	for _, name := range names {
		if rows[name] == nil {
			t.Errorf("%s has no row here", name)
		}
		delete(rows, name)
	}
	for name := range rows {
		t.Errorf("there is no %s", name)
	}
}

// Invalid numbers are refused, and those from the wire overflow nothing.
func TestNumbersThatCannotBeMeant(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	wantOption := func(says string, err error) {
		t.Helper()
		var undecided *Undecided
		if !errors.As(err, &undecided) || undecided.Reason() != ReasonInvalidOption || undecided.HTTPStatus() != http.StatusInternalServerError ||
			!strings.Contains(undecided.OperatorHint(), says) || undecided.Retryable() {
			t.Errorf("%q: %v", says, err)
		}
	}
	for says, timeout := range map[string]time.Duration{
		"Request.Timeout: -1s is not above zero": -time.Second, "Request.Timeout: 4ns is below 1ms": 4, "Request.Timeout: -2562047h47m16.8": math.MinInt64,
	} {
		request := acme()
		request.Timeout = timeout
		_, err := client.Decide(background(), request)
		wantOption(says, err)
	}
	_, err := client.DecideUntil(background(), acme(), RetryPolicy{MaxAttempts: -1})
	wantOption("RetryPolicy.MaxAttempts: -1 is below zero", err)
	_, err = client.DecideUntil(background(), acme(), RetryPolicy{MaxPause: -time.Second})
	wantOption("RetryPolicy.MaxPause: -1s is below zero", err)
	if asked := len(fake.requests()); asked != 0 {
		t.Errorf("asked %d times", asked)
	}
	for says, options := range map[string]ReportOptions{
		"ReportOptions.Queue: -1 is below zero": {Queue: -1}, "ReportOptions.Concurrent: -1 is below zero": {Concurrent: -1},
		"is above 1048576": {Queue: math.MaxInt}, "is above 4096": {Concurrent: math.MaxInt},
		"default\nbyokgate: ReportOptions.Concurrent": {Queue: math.MinInt, Concurrent: math.MinInt},
	} {
		if made, err := client.ReportOnly(options); made != nil || err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", says, err)
		}
	}
	request := acme()
	request.Timeout = math.MaxInt64
	allowed, err := client.Decide(background(), request)
	wantAllowed(t, allowed, err, BYOK)

	// A byok-gate that is broken may name any time.
	for given, want := range map[time.Duration]time.Duration{math.MaxInt64: maxRetryAfter, 48 * time.Hour: maxRetryAfter, -time.Hour: defaultRetryAfter, math.MinInt64: defaultRetryAfter} {
		fake.tell(later(given), nil)
		_, err := client.Decide(background(), acme())
		refusal := RefusalOf(err)
		if refusal.RetryAfter() != want {
			t.Errorf("%v: ask again after %v", given, refusal.RetryAfter())
		}
		for _, attempt := range []int{math.MinInt, 1, math.MaxInt} {
			if pause := Pause(refusal, attempt); pause < want {
				t.Errorf("%v: Pause %v", given, pause)
			}
		}
	}
	before := len(fake.requests())
	fake.tell(nil, busyFor(math.MaxInt64))
	if _, err = client.Decide(background(), acme()); RefusalOf(err).RetryAfter() != maxRetryAfter {
		t.Errorf("%v", RefusalOf(err).RetryAfter())
	}
	if asked := len(fake.requests()) - before; asked != 1 {
		t.Errorf("asked %d times, although the pause is for ever", asked)
	}
}

// busyFor is a byok-gate at one of its limits.
func busyFor(pause time.Duration) error {
	said, err := status.New(codes.ResourceExhausted, "busy").WithDetails(retryIn(pause))
	if err != nil {
		panic(err)
	}
	return said.Err()
}
