package byokgate

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

func later(pause time.Duration) *byokgatev1.DecideResponse {
	return deny(&byokgatev1.Deny{
		Code: byokgatev1.DenyCode_DENY_CODE_BYOK_PROBE_NOT_ATTEMPTED, Message: "-", Retryable: true, RetryAfter: durationpb.New(pause),
	})
}

func TestDecideUntilObeysRetryAfter(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	const pause = 30 * time.Millisecond
	var asked atomic.Int32
	var last time.Time
	fake.decide = func(context.Context, *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
		if waited := time.Since(last); !last.IsZero() && waited < pause {
			t.Errorf("asked again after %v", waited)
		}
		last = time.Now()
		if asked.Add(1) < 4 {
			return later(pause), nil
		}
		return allow(2), nil
	}
	var told []int
	allowed, err := client.DecideUntil(background(), acme(), RetryPolicy{OnRefusal: func(attempt int, refusal Refusal, after time.Duration) {
		if refusal.Code() != BYOKProbeNotAttempted || after < pause {
			t.Errorf("%v, %v", refusal, after)
		}
		told = append(told, attempt)
		panic("not the client's fault")
	}})
	wantAllowed(t, allowed, err, BYOK)
	if !slices.Equal(told, []int{1, 2, 3}) {
		t.Errorf("told of %v", told)
	}
}

func TestDecideUntilEnds(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	asked := func() int { return len(fake.requests()) }

	// Asking again would change nothing.
	fake.tell(missingKey("ACME_API_KEY"), nil)
	allowed, err := client.DecideUntil(background(), acme(), RetryPolicy{})
	wantDenied(t, allowed, err, MissingBYOKCredential)
	if asked() != 1 {
		t.Errorf("asked %d times", asked())
	}
	// The attempts are spent.
	fake.tell(later(time.Millisecond), nil)
	allowed, err = client.DecideUntil(background(), acme(), RetryPolicy{MaxAttempts: 3})
	wantDenied(t, allowed, err, BYOKProbeNotAttempted)
	if asked() != 4 {
		t.Errorf("asked %d times", asked())
	}
	// The pause is too long: for the policy, and for the context, which is not waited for.
	fake.tell(later(time.Hour), nil)
	allowed, err = client.DecideUntil(background(), acme(), RetryPolicy{})
	if wantDenied(t, allowed, err, BYOKProbeNotAttempted); errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	allowed, err = client.DecideUntil(withTimeout(t, time.Minute), acme(), RetryPolicy{MaxPause: 2 * time.Hour})
	if wantDenied(t, allowed, err, BYOKProbeNotAttempted); !errors.Is(err, context.DeadlineExceeded) || RefusalOf(err).HTTPStatus() != http.StatusServiceUnavailable {
		t.Errorf("%v", err)
	}
	// The caller gives up during a pause.
	fake.tell(later(30*time.Second), nil)
	ctx, cancel := context.WithCancel(background())
	_, err = client.DecideUntil(ctx, acme(), RetryPolicy{OnRefusal: func(int, Refusal, time.Duration) { cancel() }})
	if !errors.Is(err, context.Canceled) || !errors.Is(err, BYOKProbeNotAttempted) {
		t.Errorf("%v", err)
	}
}

func TestPausesOfTheCaller(t *testing.T) {
	const after = 2 * time.Second
	_, refusal := read(nil, later(after))
	spread := map[time.Duration]bool{}
	for range 50 {
		for attempt, least := range map[int]time.Duration{0: after, 1: after, 3: after, 4: 2 * after, 5: 4 * after} {
			pause := Pause(refusal, attempt)
			if pause < least || pause > least+time.Second+1 {
				t.Errorf("attempt %d: %v", attempt, pause)
			}
			spread[pause] = true
		}
		if pause := Pause(refusal, 1_000_000); pause < defaultMaxPause || pause > 2*defaultMaxPause+time.Second+1 {
			t.Errorf("%v", pause)
		}
	}
	if len(spread) < 20 {
		t.Errorf("hardly any jitter: %v", slices.Collect(maps.Keys(spread)))
	}
	_, never := read(nil, missingKey())
	if Pause(nil, 1) != 0 || Pause(never, 1) != 0 {
		t.Error("a pause before what changes nothing")
	}
}

// === Secrets that change ===

func TestOverlay(t *testing.T) {
	stored := &store{found: map[Scope]Found{
		Workspace: {"A": NewSecret("old"), "B": NewSecret("kept"), "C": NewSecret("gone"), "X": NewSecret("not asked for")}, Organization: {"A": NewSecret("shared")},
	}}
	fresh := NewSecret("new")
	changes := map[string]*Secret{"A": &fresh, "C": nil}
	lookup := Overlay(stored.lookup, Workspace, changes)
	changes["B"] = nil // the caller's own to change
	found, err := lookup(background(), Workspace, []string{"A", "B", "C", "D"})
	if err != nil || len(found) != 2 || found["A"].Reveal() != "new" || found["B"].Reveal() != "kept" {
		t.Errorf("%v, %v", len(found), err)
	}
	if found, err = lookup(background(), Organization, []string{"A"}); err != nil || found["A"].Reveal() != "shared" {
		t.Errorf("%v", err)
	}
	// A store that is down has no say in what the change covers, and all in the rest.
	stored.failed = map[Scope]error{Workspace: errors.New("down")}
	if found, err = lookup(background(), Workspace, []string{"A", "C"}); err != nil || len(found) != 1 {
		t.Errorf("%v, %v", len(found), err)
	}
	if _, err = lookup(background(), Workspace, []string{"A", "D"}); err == nil {
		t.Error("unreadable was taken for absent")
	}
	if want := []string{"ORGANIZATION A", "WORKSPACE B,D", "WORKSPACE D"}; !slices.Equal(stored.lookups(), want) {
		t.Errorf("looked up %q", stored.lookups())
	}
	// Without a store nothing is known of what the change does not cover, and what is not known is not absent.
	alone := Overlay(nil, Workspace, map[string]*Secret{"A": &fresh})
	if found, err = alone(background(), Workspace, []string{"A"}); err != nil || len(found) != 1 {
		t.Errorf("%v", err)
	}
	for scope, name := range map[Scope]string{Workspace: "B", Organization: "A"} {
		if found, err = alone(background(), scope, []string{name}); !errors.Is(err, errNoStored) || found != nil {
			t.Errorf("%v, %v", found, err)
		}
	}
}

func TestWhatARefusalConcernsAndWhatMayBeDeleted(t *testing.T) {
	refusalFor := func(code byokgatev1.DenyCode, edit func(*byokgatev1.DecideResponse)) error {
		response := deny(&byokgatev1.Deny{Code: code, Retryable: code == byokgatev1.DenyCode_DENY_CODE_CREDENTIAL_SCOPE_UNREADABLE})
		response.RelevantEnv = []string{"ACME_API_KEY", "ACME_TOKEN"}
		if edit != nil {
			edit(response)
		}
		_, refusal := read(nil, response)
		return refusal
	}
	missing := refusalFor(13, func(r *byokgatev1.DecideResponse) { r.GetDeny().MissingEnv = []string{"ACME_API_KEY", "ACME_TOKEN"} })
	dead := refusalFor(15, func(r *byokgatev1.DecideResponse) { r.Resolution.CredentialEnv = "ACME_API_KEY" })
	withdrawn, unreadable, ambiguous, tomorrow := refusalFor(7, nil), refusalFor(8, nil), refusalFor(5, nil), refusalFor(99, nil)
	away := error(undecided(nil, ReasonUnreachable, nil))
	for name, test := range map[string]struct {
		err  error
		name string
		want bool
	}{
		"none":                        {nil, "ACME_API_KEY", false},
		"missing":                     {missing, "ACME_API_KEY", true},
		"missing, another":            {missing, "SMTP_PASSWORD", false},
		"dead":                        {dead, "ACME_API_KEY", true},
		"dead, beside it":             {dead, "ACME_TOKEN", false},
		"withdrawn":                   {withdrawn, "ACME_API_KEY", false},
		"unreadable":                  {unreadable, "ACME_TOKEN", true},
		"unreadable, another":         {unreadable, "SMTP_PASSWORD", false},
		"ambiguous":                   {ambiguous, "ACME_TOKEN", true},
		"a code of tomorrow's":        {tomorrow, "ACME_API_KEY", false},
		"away":                        {away, "SMTP_PASSWORD", true},
		"an error of somebody else's": {errors.New("-"), "ACME_API_KEY", true},
	} {
		if got := Concerns(test.err, test.name); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	for name, test := range map[string]struct {
		after, before error
		name          string
		want          bool
	}{
		"a working key that is needed": {missing, nil, "ACME_API_KEY", false},
		"a dead key":                   {missing, dead, "ACME_API_KEY", true},
		"a key beside a dead one":      {missing, dead, "ACME_TOKEN", false},
		"a key that is not needed":     {nil, nil, "ACME_API_KEY", true},
		"another secret":               {missing, nil, "SMTP_PASSWORD", true},
		"the gate is away":             {away, away, "ACME_API_KEY", true},
		"its store is down":            {unreadable, nil, "ACME_API_KEY", true},
		"what would answer is dead":    {dead, nil, "ACME_API_KEY", false},
	} {
		if got := MayDelete(test.after, test.before, test.name); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
