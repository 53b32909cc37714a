//go:build go1.25

package byokgate

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// world is a fleet, its keys, and a byok-gate that remembers a good key for 30 seconds and a bad one for 10, in a test's own time.
type world struct {
	mu    sync.Mutex
	dead  map[string]bool
	storm bool
	// remembered is until when byok-gate does not ask the provider about a key.
	remembered map[string]time.Time
	probed     map[string][]time.Time
	fleet      []Spec
}

const (
	worldKeys       = 100
	worldWorkspaces = 1000
	validAge        = 30 * time.Second
	invalidAge      = 10 * time.Second
)

func newWorld() *world {
	w := &world{dead: map[string]bool{}, remembered: map[string]time.Time{}, probed: map[string][]time.Time{}}
	for index := range worldWorkspaces {
		// A key is shared by workspaces of several models and organizations.
		w.fleet = append(w.fleet, Spec{
			WorkspaceID: fmt.Sprint("ws-", index), OrganizationID: fmt.Sprint("org-", index%7), Runtime: "agent", Model: fmt.Sprint("acme-", index%3),
		})
	}
	return w
}

func keyOf(spec *Spec) string {
	var index int
	_, _ = fmt.Sscanf(spec.WorkspaceID, "ws-%d", &index)
	return fmt.Sprint("key-", index%worldKeys)
}

func (w *world) running(context.Context) iter.Seq2[Spec, error] {
	return func(yield func(Spec, error) bool) {
		for _, spec := range w.fleet {
			if !yield(spec, nil) {
				return
			}
		}
	}
}

func (w *world) gather(_ context.Context, spec *Spec) (*wallet, error) {
	return &wallet{found: []*byokgatev1.Credential{{EnvName: "ACME_API_KEY", Scope: 1, Value: keyOf(spec)}}}, nil
}

func (w *world) ask(_ context.Context, spec Spec) sighting {
	time.Sleep(300 * time.Millisecond) // in the test's own time: a provider takes that long
	w.mu.Lock()
	defer w.mu.Unlock()
	key := keyOf(&spec)
	if w.storm {
		return sighting{}
	}
	if now := time.Now(); now.After(w.remembered[key]) {
		w.probed[key] = append(w.probed[key], now)
		w.remembered[key] = now.Add(validAge)
		if w.dead[key] {
			w.remembered[key] = now.Add(invalidAge)
		}
	} else if w.dead[key] && now.Add(invalidAge).Before(w.remembered[key]) {
		// Remembered as good.
		return sighting{health: Healthy}
	}
	if w.dead[key] {
		return sighting{health: Dead, code: InvalidBYOKCredential, decisionID: "d"}
	}
	return sighting{health: Healthy}
}

// sweeping starts one in this world, and gives what it reports.
func (w *world) sweeping(ctx context.Context, options SweepOptions, took func(Change) bool) {
	s := &sweep{options: options.orDefaults(), running: w.running, ask: w.ask, gather: w.gather}
	s.yield = func(change Change, err error) bool {
		if err != nil {
			panic(err)
		}
		return took(change)
	}
	s.run(ctx)
}

func TestASweepReportsADeadKeyOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		ctx, cancel := context.WithCancel(background())
		const period = 10 * time.Minute
		var died time.Time
		var changes []Change
		var last time.Time
		go func() {
			time.Sleep(25 * time.Minute) // in the test's own time
			w.mu.Lock()
			w.dead["key-7"], died = true, time.Now()
			w.mu.Unlock()
			time.Sleep(40 * time.Minute)
			w.mu.Lock()
			if len(changes) != worldWorkspaces/worldKeys {
				t.Errorf("%d changes, expected one for each of the %d workspaces", len(changes), worldWorkspaces/worldKeys)
			}
			if late := last.Sub(died); late > period+validAge+defaultConfirmAfter+time.Second {
				t.Errorf("the last was reported %v after the key died", late)
			}
			delete(w.dead, "key-7")
			w.mu.Unlock()
			time.Sleep(25 * time.Minute)
			cancel()
		}()
		w.sweeping(ctx, SweepOptions{Period: period}, func(change Change) bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			changes, last = append(changes, change), time.Now()
			return true
		})
		if len(changes) != 2*worldWorkspaces/worldKeys {
			t.Fatalf("%d changes", len(changes))
		}
		for index, change := range changes {
			from, to := Healthy, Dead
			if index >= worldWorkspaces/worldKeys {
				from, to = Dead, Healthy
			}
			if change.From != from || change.To != to || keyOf(&change.Spec) != "key-7" || (to == Dead && (change.Code != InvalidBYOKCredential || change.DecisionID != "d")) {
				t.Errorf("%+v", change)
			}
		}
		// One probe for each key in each period, and one more where it was refused.
		for key, probed := range w.probed {
			for _, begin := range probed {
				within := 0
				for _, at := range probed {
					if at.Sub(begin) >= 0 && at.Sub(begin) < period-time.Minute {
						within++
					}
				}
				if most := map[bool]int{false: 1, true: 2}[key == "key-7"]; within > most {
					t.Fatalf("%s was asked about %d times in a period: %v", key, within, probed)
				}
			}
		}
	})
}

func TestASweepSaysNothingInAStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		ctx, cancel := context.WithTimeout(background(), 2*time.Hour)
		defer cancel()
		go func() {
			time.Sleep(15 * time.Minute)
			w.mu.Lock()
			// One key dies and is seen dead once; then nothing can be found out for an hour, and it was a mistake.
			w.dead["key-3"] = true
			w.mu.Unlock()
			time.Sleep(10 * time.Minute)
			w.mu.Lock()
			w.storm = true
			delete(w.dead, "key-3")
			w.mu.Unlock()
			time.Sleep(time.Hour)
			w.mu.Lock()
			w.storm = false
			w.mu.Unlock()
		}()
		changes := 0
		// The second look comes too late to see it dead.
		w.sweeping(ctx, SweepOptions{ConfirmAfter: 11 * time.Minute}, func(change Change) bool { changes++; return true })
		if changes != 0 {
			t.Errorf("%d changes in a storm", changes)
		}
	})
}

// killed is a process that ends in the middle of a change.
type killed struct{}

func TestASweepThatIsKilledLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.fleet = w.fleet[:20] // one workspace for each key
		store := NewSweepMemory()
		options := SweepOptions{Store: store}
		sweepFor := func(length time.Duration, took func(Change) bool) {
			ctx, cancel := context.WithTimeout(background(), length)
			defer cancel()
			defer func() {
				if thrown := recover(); thrown != nil && thrown != (killed{}) {
					panic(thrown)
				}
			}()
			w.sweeping(ctx, options, took)
		}
		none := func(change Change) bool { t.Errorf("%+v", change); return true }
		sweepFor(15*time.Minute, none)
		// Killed between the first look and the second: the suspicion is kept, and confirmed by the next process.
		w.dead["key-5"] = true
		ctx, cancel := context.WithCancel(background())
		go func() {
			for record := (SweepRecord{}); record.Suspect != Dead; record, _ = store.Load(background(), "ws-5") {
				time.Sleep(time.Second)
			}
			cancel()
		}()
		w.sweeping(ctx, options, none)
		var reported []Change
		// Killed while the change is reported: reported again.
		sweepFor(15*time.Minute, func(change Change) bool { reported = append(reported, change); panic(killed{}) })
		sweepFor(30*time.Minute, func(change Change) bool { reported = append(reported, change); return true })
		// And not a third time.
		sweepFor(30*time.Minute, none)
		if len(reported) != 2 || reported[0].Spec.WorkspaceID != "ws-5" || reported[1].Spec.WorkspaceID != "ws-5" || reported[1].To != Dead {
			t.Errorf("%+v", reported)
		}
		// A process without a memory finds out what is not well, and nothing else.
		options.Store = nil
		reported = nil
		sweepFor(15*time.Minute, func(change Change) bool { reported = append(reported, change); return true })
		if len(reported) != 1 || reported[0].From != Unknown || reported[0].To != Dead {
			t.Errorf("%+v", reported)
		}
	})
}

// A suspicion is confirmed by a look at the workspace itself, not by one at another with the same credentials: its own may have been
// replaced in between.
func TestASweepLooksAtTheWorkspaceItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		// Two workspaces of one question.
		w.fleet = []Spec{w.fleet[0], w.fleet[3*worldKeys]}
		store := NewSweepMemory()
		for _, spec := range w.fleet {
			record := SweepRecord{Health: Healthy, Suspect: Dead, Code: InvalidBYOKCredential, Seen: time.Now().Add(-time.Hour)}
			if err := store.Save(background(), spec.WorkspaceID, record); err != nil {
				t.Fatal(err)
			}
		}
		var reported []string
		s := &sweep{options: SweepOptions{Store: store}.orDefaults(), running: w.running, gather: w.gather}
		s.ask = func(_ context.Context, spec Spec) sighting {
			if spec.WorkspaceID == w.fleet[0].WorkspaceID {
				return sighting{health: Dead, code: InvalidBYOKCredential}
			}
			return sighting{health: Healthy}
		}
		s.yield = func(change Change, err error) bool {
			reported = append(reported, change.Spec.WorkspaceID)
			return true
		}
		ctx, cancel := context.WithTimeout(background(), 5*time.Minute)
		defer cancel()
		s.run(ctx)
		if len(reported) != 1 || reported[0] != w.fleet[0].WorkspaceID {
			t.Errorf("reported %v", reported)
		}
	})
}

// A loop that is left with a change has taken it.
func TestASweepThatIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.dead["key-1"] = true
		store := NewSweepMemory()
		left := 0
		w.sweeping(background(), SweepOptions{Store: store}, func(Change) bool { left++; return false })
		dead := 0
		for _, record := range store.records {
			if record.Health == Dead {
				dead++
			}
		}
		if left != 1 || dead != 1 {
			t.Errorf("%d changes, %d records", left, dead)
		}
	})
}

// === What a decision means to a sweep ===

func TestWhatASweepMakesOfADecision(t *testing.T) {
	verdict := func(response *byokgatev1.DecideResponse, verdict byokgatev1.Verdict, warned ...byokgatev1.WarningCode) *byokgatev1.DecideResponse {
		response.Liveness = &byokgatev1.Liveness{Verdict: verdict}
		for _, code := range warned {
			response.Warnings = append(response.Warnings, &byokgatev1.Warning{Code: code})
		}
		return response
	}
	denial := func(code byokgatev1.DenyCode, retryable bool) *byokgatev1.DecideResponse {
		return deny(&byokgatev1.Deny{Code: code, Retryable: retryable})
	}
	const unverified, stale = byokgatev1.WarningCode_WARNING_CODE_CREDENTIAL_UNVERIFIED, byokgatev1.WarningCode_WARNING_CODE_STALE_LIVENESS
	fake, address := startFake(t)
	client := newClient(t, address)
	for name, test := range map[string]struct {
		reply *byokgatev1.DecideResponse
		want  Health
	}{
		"alive":                     {verdict(allow(2), 1), Healthy},
		"the platform's":            {allow(1), Healthy},
		"stale":                     {verdict(allow(2), 1, stale), Unknown},
		"out of credit":             {verdict(allow(2), 4, unverified), Unknown},
		"429":                       {verdict(allow(2), 5, unverified), Unknown},
		"5xx":                       {verdict(allow(2), 6, unverified), Unknown},
		"says nothing":              {verdict(allow(2), 7, unverified), Unknown},
		"timeout":                   {verdict(allow(2), 8, unverified), Unknown},
		"unreachable":               {verdict(allow(2), 9, unverified), Unknown},
		"not attempted":             {verdict(allow(2), 10, unverified), Unknown},
		"OAuth":                     {verdict(allow(2), 11, unverified), Unverifiable},
		"not calibrated":            {verdict(allow(2), 12, unverified), Unverifiable},
		"switched off":              {verdict(allow(2), 13, unverified), Unverifiable},
		"a verdict of tomorrow's":   {verdict(allow(2), 99, unverified), Unknown},
		"report only, refused":      {verdict(allow(2), 2, byokgatev1.WarningCode_WARNING_CODE_REPORT_ONLY), Unknown},
		"refused":                   {denial(15, false), Dead},
		"malformed":                 {denial(14, false), Dead},
		"shadowed":                  {denial(24, false), Dead},
		"under a wrong name":        {denial(25, false), Dead},
		"denied, not verifiable":    {denial(23, false), Unverifiable},
		"exposed":                   {denial(26, false), Unknown},
		"missing":                   {missingKey("ACME_API_KEY"), Missing},
		"denied, timeout":           {denial(16, true), Unknown},
		"denied, 429":               {denial(19, true), Unknown},
		"unreadable":                {denial(8, true), Unknown},
		"no longer in the registry": {denial(4, false), Unknown},
		"no decision":               {&byokgatev1.DecideResponse{}, Unknown},
	} {
		fake.tell(test.reply, nil)
		if seen := client.look(background(), acme().Spec); seen.health != test.want {
			t.Errorf("%s: %q", name, seen.health)
		}
	}
	for _, asked := range fake.requests() {
		if asked.GetCheckpoint() != byokgatev1.Checkpoint_CHECKPOINT_AUDIT {
			t.Fatalf("asked at %v", asked.GetCheckpoint())
		}
	}
}

// brokenStore fails as it is told to.
type brokenStore struct{ load, save error }

func (b brokenStore) Load(context.Context, string) (SweepRecord, error) { return SweepRecord{}, b.load }
func (b brokenStore) Save(context.Context, string, SweepRecord) error   { return b.save }

func TestWhatASweepCannotDoIsSaid(t *testing.T) {
	fake, address := startFake(t)
	fake.tell(missingKey("ACME_API_KEY"), nil)
	client, logs := newLoggedClient(t, address)
	broken := errors.New("the database is away")
	one := func(context.Context) iter.Seq2[Spec, error] {
		return func(yield func(Spec, error) bool) { yield(acme().Spec, nil) }
	}
	for what, test := range map[string]struct {
		running func(context.Context) iter.Seq2[Spec, error]
		store   SweepStore
	}{
		"listing": {func(context.Context) iter.Seq2[Spec, error] {
			return func(yield func(Spec, error) bool) { yield(Spec{}, broken) }
		}, nil},
		"loading":       {one, brokenStore{load: broken}},
		"saving":        {one, brokenStore{save: broken}},
		"nothing lists": {nil, nil},
	} {
		var said []error
		for change, err := range client.Sweep(withTimeout(t, 20*time.Second), test.running, SweepOptions{Store: test.store, Lookups: 1000}) {
			if said = append(said, err); err == nil {
				t.Errorf("%s: %+v", what, change)
			}
			break
		}
		if len(said) != 1 || (test.running != nil && !errors.Is(said[0], broken)) {
			t.Errorf("%s: %v", what, said)
		}
	}
	// One look of many is no line at WARN.
	for _, line := range []string{`"level":"WARN"`, `"level":"ERROR"`, `"level":"INFO"`} {
		if strings.Contains(logs.String(), line) {
			t.Errorf("a sweep is loud:\n%s", logs)
		}
	}
	var closed *Client
	for _, err := range closed.Sweep(background(), one, SweepOptions{}) {
		if !errors.Is(err, ErrUndecided) {
			t.Errorf("%v", err)
		}
	}
}
