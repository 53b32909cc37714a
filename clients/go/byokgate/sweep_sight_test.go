//go:build go1.25

package byokgate

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// A sweep that learns nothing reports it; a round never starts before the last is over.

// fleet lists these workspaces, all with acme's key.
func fleet(ids ...string) func(context.Context) iter.Seq2[Spec, error] {
	return func(context.Context) iter.Seq2[Spec, error] {
		return func(yield func(Spec, error) bool) {
			for _, id := range ids {
				spec := acme().Spec
				if spec.WorkspaceID = id; !yield(spec, nil) {
					return
				}
			}
		}
	}
}

// heard is a sweep's output.
type heard struct {
	mu      sync.Mutex
	states  []SweepState
	errors  []error
	changes []Change
}

func (h *heard) onState(state SweepState) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.states = append(h.states, state)
}

func (h *heard) reasons() (list []Reason) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, state := range h.states {
		list = append(list, state.Reason)
	}
	return list
}

// sweepInBackground begins one, and ends it with the test.
func sweepInBackground(
	t *testing.T, client *Client, running func(context.Context) iter.Seq2[Spec, error], options SweepOptions,
) *heard {
	t.Helper()
	h := &heard{}
	options.OnState = h.onState
	ctx, cancel := context.WithCancel(background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for change, err := range client.Sweep(ctx, running, options) {
			h.mu.Lock()
			if err != nil {
				h.errors = append(h.errors, err)
			} else {
				h.changes = append(h.changes, change)
			}
			h.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return h
}

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !done(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// signed is a refusal as byok-gate makes it.
func signed(code codes.Code, reason string) error {
	said, err := status.New(code, "no").WithDetails(&errdetails.ErrorInfo{Domain: errorDomain, Reason: reason})
	if err != nil {
		panic(err)
	}
	return said.Err()
}

func TestASweepThatIsMisWiredSaysSo(t *testing.T) {
	ours, others := newCertificates(t), newCertificates(t)
	secured := func(t *testing.T) string {
		return serveGRPC(t, listenTCP(t), func(server *grpc.Server) {
			byokgatev1.RegisterPolicyDecisionServiceServer(server, newFake())
		}, ours.serverOption(true))
	}
	refusing := func(code codes.Code, reason string) func(*testing.T) string {
		return func(t *testing.T) string {
			fake, address := startFake(t)
			fake.resolve = func() (*byokgatev1.ResolveProviderResponse, error) { return nil, signed(code, reason) }
			return address
		}
	}
	for name, test := range map[string]struct {
		start   func(*testing.T) string
		options []Option
		want    Reason
	}{
		"a wrong token":              {refusing(codes.Unauthenticated, "TOKEN_UNKNOWN"), nil, ReasonUnauthenticated},
		"a role that may not":        {refusing(codes.PermissionDenied, "METHOD_NOT_ALLOWED"), nil, ReasonPermissionDenied},
		"another authority":          {secured, []Option{WithTLSFiles(others.file("ca.pem"), "", "")}, ReasonTLSUntrusted},
		"no client certificate":      {secured, []Option{WithTLSFiles(ours.file("ca.pem"), "", "")}, ReasonClientCertificate},
		"TLS, and a client without":  {secured, nil, ReasonTLSMismatch},
		"another port: SSH":          {banner("SSH-2.0-OpenSSH_9.2p1\r\n"), nil, ReasonNotAGate},
		"another port: HTTP/1.1":     {func(t *testing.T) string { return serveTCP(t, closingOnHTTP2) }, nil, ReasonNotAGate},
		"another port: a web server": {plainWeb(302, "text/html", ""), nil, ReasonNotAGate},
		"no gate at all": {func(t *testing.T) string {
			listener := listenTCP(t)
			defer listener.Close()
			return listener.Addr().String()
		}, nil, ReasonUnreachable},
		"a gate that hangs": {func(t *testing.T) string { return serveTCP(t, func(net.Conn) {}) }, []Option{WithTimeout(100 * time.Millisecond)}, ReasonTimedOut},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, logs := newLoggedClient(t, test.start(t), test.options...)
			h := sweepInBackground(t, client, fleet("ws-1", "ws-2"), SweepOptions{Period: 20 * time.Millisecond, Lookups: 1e6})
			undecided := func() uint64 { return client.SweepCounts().Undecided[test.want] }
			until(t, "it is told", func() bool { return len(h.reasons()) > 0 })
			enough := undecided() + 2
			until(t, "two more looks", func() bool { return undecided() >= enough })
			h.mu.Lock()
			defer h.mu.Unlock()
			if len(h.states) != 1 || h.states[0].Reason != test.want || h.states[0].Since.IsZero() {
				t.Errorf("%+v", h.states)
			}
			var said *Undecided
			if len(h.errors) != 1 || !errors.As(h.errors[0], &said) || said.Reason() != test.want || said.OperatorHint() == "" && test.want.miswired() {
				t.Errorf("%v", h.errors)
			}
			if !errors.Is(h.states[0].Err, h.errors[0]) || len(h.changes) != 0 {
				t.Errorf("%v, %v", h.states[0].Err, h.changes)
			}
			if lines := strings.Count(logs.String(), "byok-gate: the sweep learns nothing"); lines != 1 || !strings.Contains(logs.String(), `"level":"ERROR"`) {
				t.Errorf("%d lines", lines)
			}
		})
	}
}

// A sweep that becomes misconfigured: reported once for each change, from any stage, and its end.
func TestASweepSaysWhenItFindsOutAgain(t *testing.T) {
	fake, address := startFake(t)
	client, logs := newLoggedClient(t, address)
	h := sweepInBackground(t, client, fleet("ws-1", "ws-2", "ws-3"), SweepOptions{Period: 20 * time.Millisecond, Lookups: 1e6})
	alive := func(health Health) uint64 { return client.SweepCounts().Seen[health] }
	until(t, "it sees", func() bool { return alive(Healthy) > 3 })
	if got := h.reasons(); len(got) != 0 {
		t.Errorf("told of %v", got)
	}
	// The names are known, so that the call itself detects it.
	fake.tell(nil, signed(codes.Unauthenticated, "TOKEN_UNKNOWN"))
	until(t, "the token is told", func() bool { return len(h.reasons()) == 1 })
	fake.tell(nil, signed(codes.PermissionDenied, "METHOD_NOT_ALLOWED"))
	until(t, "the role is told", func() bool { return len(h.reasons()) == 2 })
	fake.tell(allow(2), nil)
	until(t, "the end is told", func() bool { return len(h.reasons()) == 3 })
	if got := h.reasons(); !slices.Equal(got, []Reason{ReasonUnauthenticated, ReasonPermissionDenied, ""}) {
		t.Errorf("told of %q", got)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.errors) != 2 || h.states[2].Err != nil {
		t.Errorf("%v, %v", h.errors, h.states[2].Err)
	}
	counts := client.SweepCounts()
	if counts.Undecided[ReasonUnauthenticated] == 0 || counts.Undecided[ReasonPermissionDenied] == 0 || counts.Questions == 0 || counts.Rounds < 2 ||
		counts.Workspaces < 6 || counts.Changes != 0 || counts.Skipped != 0 {
		t.Errorf("%+v", counts)
	}
	counts.Seen[Healthy], counts.Undecided[ReasonUnauthenticated] = 0, 0
	if again := client.SweepCounts(); again.Seen[Healthy] == 0 || again.Undecided[ReasonUnauthenticated] == 0 {
		t.Error("the counts are given out, and not copies of them")
	}
	if !strings.Contains(logs.String(), "the sweep learns again") {
		t.Error("its end is not in the log")
	}
}

// sighted is a sweep that sees what it is told to.
func sighted(see func(context.Context, Spec) sighting, fleet func(context.Context) iter.Seq2[Spec, error], options SweepOptions) (*sweep, *heard) {
	h := &heard{}
	options.OnState = h.onState
	s := &sweep{options: options.orDefaults(), running: fleet, ask: see, counts: &sweepCounts{}}
	s.gather = func(_ context.Context, spec *Spec) (*wallet, error) {
		return &wallet{found: []*byokgatev1.Credential{{EnvName: "ACME_API_KEY", Scope: 1, Value: keyMark + spec.WorkspaceID}}}, nil
	}
	s.yield = func(change Change, err error) bool {
		if err != nil {
			h.errors = append(h.errors, err)
		} else {
			h.changes = append(h.changes, change)
		}
		return true
	}
	return s, h
}

// A passing error is reported only if it lasts, and one misconfigured replica is reported once.
func TestASweepDoesNotFlap(t *testing.T) {
	cause := errors.New("-")
	for name, test := range map[string]struct {
		// reasons are those of the looks, one after the other; an empty one is a decision. They are repeated.
		reasons []Reason
		want    []Reason
	}{
		"a restart":                       {[]Reason{"", "", "", "", ReasonUnreachable}, nil},
		"one replica of three mis-wired":  {[]Reason{"", ReasonUnauthenticated, ""}, []Reason{ReasonUnauthenticated}},
		"away, with reasons in turn":      {[]Reason{ReasonUnreachable, ReasonTimedOut, ReasonOverloaded}, []Reason{ReasonUnreachable}},
		"a caller that gives up":          {[]Reason{ReasonCanceled}, nil},
		"mis-wired in two ways, in turns": {[]Reason{ReasonNotAGate, ReasonUnauthenticated}, []Reason{ReasonNotAGate, ReasonUnauthenticated}},
	} {
		synctest.Test(t, func(t *testing.T) {
			looks := 0
			s, h := sighted(func(context.Context, Spec) sighting {
				reason := test.reasons[looks%len(test.reasons)]
				looks++
				if reason == "" {
					return sighting{decided: true, health: Healthy}
				}
				return sighting{refusal: undecided(nil, reason, cause)}
			}, fleet("ws-1", "ws-2", "ws-3", "ws-4"), SweepOptions{Period: time.Minute, Concurrent: 1})
			ctx, cancel := context.WithTimeout(background(), time.Hour)
			defer cancel()
			s.run(ctx)
			synctest.Wait()
			if got := h.reasons(); !slices.Equal(got, test.want) {
				t.Errorf("%s: told of %q", name, got)
			}
			if looks < 200 {
				t.Errorf("%s: %d looks", name, looks)
			}
		})
	}
}

func TestASecretStoreThatIsAwayIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away := errors.New("the database is away")
		began := time.Now()
		s, h := sighted(func(context.Context, Spec) sighting { return sighting{decided: true, health: Healthy} }, fleet("ws-1", "ws-2"), SweepOptions{})
		well := s.gather
		s.gather = func(ctx context.Context, spec *Spec) (*wallet, error) {
			switch minute := time.Since(began).Minutes(); {
			case minute > 55 || minute < 15 && spec.WorkspaceID == "ws-1":
				return well(ctx, spec)
			default:
				return nil, away
			}
		}
		ctx, cancel := context.WithTimeout(background(), 2*time.Hour)
		defer cancel()
		s.run(ctx)
		synctest.Wait()
		if got := h.reasons(); !slices.Equal(got, []Reason{ReasonLookupFailed, ""}) {
			t.Errorf("told of %q", got)
		}
		if len(h.errors) != 1 || !errors.Is(h.errors[0], away) || s.counts.seen.Unreadable < 8 {
			t.Errorf("%v, %+v", h.errors, s.counts.seen)
		}
	})
}

// byok-gate hangs: no round starts before the last is over, and delayed calls do not come all at once.
func TestARoundIsNotAddedToAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const period, keys = time.Second, 20
		began := time.Now()
		hangsFrom, hangsUntil := began.Add(5*time.Second), began.Add(19*time.Second)
		var mu sync.Mutex
		asked := map[string][]time.Time{}
		var ids []string
		for index := range keys {
			ids = append(ids, fmt.Sprint("ws-", index))
		}
		s, _ := sighted(func(ctx context.Context, spec Spec) sighting {
			mu.Lock()
			asked[spec.WorkspaceID] = append(asked[spec.WorkspaceID], time.Now())
			mu.Unlock()
			if now := time.Now(); now.After(hangsFrom) && now.Before(hangsUntil) {
				pause := time.NewTimer(min(sweepTimePerQuestion, hangsUntil.Sub(now)))
				defer pause.Stop()
				select {
				case <-pause.C:
				case <-ctx.Done():
				}
				return sighting{refusal: undecided(nil, ReasonTimedOut, errors.New("-"))}
			}
			return sighting{decided: true, health: Healthy}
		}, fleet(ids...), SweepOptions{Period: period, Lookups: 1e6})
		most := 0
		s.options.Store = watchedStore{NewSweepMemory(), func() { most = max(most, len(s.due)+s.busy) }}
		ctx, cancel := context.WithTimeout(background(), 40*time.Second)
		defer cancel()
		s.run(ctx)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		for id, times := range asked {
			for index, at := range times[1:] {
				if apart := at.Sub(times[index]); apart < period {
					t.Errorf("%s was asked about twice within %v", id, apart)
				}
			}
			if len(times) < 20 {
				t.Errorf("%s was asked about %d times", id, len(times))
			}
		}
		if len(asked) != keys || most > keys {
			t.Errorf("%d keys, %d questions in hand", len(asked), most)
		}
	})
}

type watchedStore struct {
	SweepStore
	watch func()
}

func (w watchedStore) Load(ctx context.Context, id string) (SweepRecord, error) {
	w.watch()
	return w.SweepStore.Load(ctx, id)
}

// A second look that comes late is one, however many rounds pass before it.
func TestASweepConfirmsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, h := sighted(nil, fleet("ws-1"), SweepOptions{Period: time.Minute, ConfirmAfter: 10*time.Minute + time.Second})
		s.ask = func(context.Context, Spec) sighting {
			return sighting{decided: true, health: Dead, code: InvalidBYOKCredential}
		}
		ctx, cancel := context.WithTimeout(background(), 15*time.Minute)
		defer cancel()
		s.run(ctx)
		synctest.Wait()
		// 15 rounds, and the one look that confirmed.
		if s.counts.seen.Questions != 16 || len(h.changes) != 1 {
			t.Errorf("%d questions, %d changes", s.counts.seen.Questions, len(h.changes))
		}
	})
}

func TestASweepReportsWhatItSeesFirstUnlessItIsWell(t *testing.T) {
	for health, code := range map[Health]Code{Healthy: "", Unverifiable: "", Dead: InvalidBYOKCredential, Missing: MissingBYOKCredential} {
		synctest.Test(t, func(t *testing.T) {
			s, h := sighted(func(context.Context, Spec) sighting { return sighting{decided: true, health: health, code: code} }, fleet("ws-1", "ws-2"), SweepOptions{})
			ctx, cancel := context.WithTimeout(background(), time.Hour)
			defer cancel()
			s.run(ctx)
			synctest.Wait()
			want := 2
			if health == Healthy {
				want = 0
			}
			if len(h.changes) != want || s.counts.seen.Changes != uint64(want) {
				t.Fatalf("%s: %+v", health, h.changes)
			}
			for _, change := range h.changes {
				if change.From != Unknown || change.To != health || change.Code != code || change.Since.IsZero() {
					t.Errorf("%s: %+v", health, change)
				}
			}
		})
	}
}

// A dead key is Dead under every code: shadowed by another, or under a name that is not read.
func TestASweepTellsOfAKeyThatDiedBehindAnother(t *testing.T) {
	for code, number := range map[Code]byokgatev1.DenyCode{
		ShadowedBYOKCredential: byokgatev1.DenyCode_DENY_CODE_SHADOWED_BYOK_CREDENTIAL, WrongCredentialName: byokgatev1.DenyCode_DENY_CODE_WRONG_CREDENTIAL_NAME,
		InvalidBYOKCredential: byokgatev1.DenyCode_DENY_CODE_INVALID_BYOK_CREDENTIAL, MalformedBYOKCredential: byokgatev1.DenyCode_DENY_CODE_MALFORMED_BYOK_CREDENTIAL,
	} {
		t.Run(string(code), func(t *testing.T) {
			t.Parallel()
			fake, address := startFake(t)
			client := newClient(t, address)
			h := sweepInBackground(t, client, fleet("ws-1", "ws-2"), SweepOptions{
				Period: 20 * time.Millisecond, ConfirmAfter: 5 * time.Millisecond, Lookups: 1e6,
			})
			until(t, "both are seen well", func() bool { return client.SweepCounts().Seen[Healthy] >= 2 })
			fake.tell(deny(&byokgatev1.Deny{Code: number, Message: "-"}), nil)
			until(t, "both are reported", func() bool { return client.SweepCounts().Changes >= 2 })
			dead := client.SweepCounts().Seen[Dead]
			until(t, "more looks", func() bool { return client.SweepCounts().Seen[Dead] >= dead+2 })
			fake.tell(allow(2), nil)
			until(t, "both are well again", func() bool { return client.SweepCounts().Changes >= 4 })
			h.mu.Lock()
			defer h.mu.Unlock()
			if len(h.changes) < 4 || len(h.errors) != 0 {
				t.Fatalf("%+v, %v", h.changes, h.errors)
			}
			for index, change := range h.changes[:4] {
				from, to, why := Healthy, Dead, code
				if index >= 2 {
					from, to, why = Dead, Healthy, ""
				}
				if change.From != from || change.To != to || change.Code != why || change.DecisionID != fakeDecision {
					t.Errorf("%+v", change)
				}
			}
		})
	}
}

// A record is kept by a workspace's id: two that share one would overwrite each other's.
func TestASweepRefusesIDsThatAreNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seen := map[string]int{}
		s, h := sighted(func(_ context.Context, spec Spec) sighting {
			seen[spec.WorkspaceID]++
			return sighting{decided: true, health: Healthy}
		}, fleet("ws-1", "", "ws-2", "ws-1", "", ""), SweepOptions{})
		ctx, cancel := context.WithTimeout(background(), 25*time.Minute)
		defer cancel()
		s.run(ctx)
		synctest.Wait()
		const rounds = 3
		if len(seen) != 2 || seen["ws-1"] != rounds || seen["ws-2"] != rounds {
			t.Errorf("looked at %v", seen)
		}
		if len(h.errors) != 2*rounds || !strings.Contains(h.errors[0].Error(), `3 without a WorkspaceID`) || !strings.Contains(h.errors[0].Error(), `model "acme-large"`) ||
			!strings.Contains(h.errors[1].Error(), `1 with the WorkspaceID of another`) || !strings.Contains(h.errors[1].Error(), `"ws-1"`) {
			t.Errorf("%v", h.errors)
		}
		if counts := s.counts.seen; counts.Skipped != 4*rounds || counts.Workspaces != 2*rounds || counts.Faults != 2*rounds {
			t.Errorf("%+v", counts)
		}
	})
}

// One workspace with an invalid request is reported once, and delays none that shares its credentials.
func TestAWorkspacesOwnFaultIsItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seen := map[string]int{}
		began := time.Now()
		s, h := sighted(func(_ context.Context, spec Spec) sighting {
			seen[spec.WorkspaceID]++
			if spec.WorkspaceID == "ws-1" && time.Since(began) < time.Hour {
				return sighting{refusal: undecided(nil, ReasonBadRequest, errors.New("workspace_spec.workspace_id: too long"))}
			}
			return sighting{decided: true, health: Dead, code: InvalidBYOKCredential}
		}, fleet("ws-1", "ws-2"), SweepOptions{})
		s.gather = func(_ context.Context, spec *Spec) (*wallet, error) {
			return &wallet{found: []*byokgatev1.Credential{{EnvName: "ACME_API_KEY", Scope: 1, Value: "shared"}}}, nil
		}
		ctx, cancel := context.WithTimeout(background(), 2*time.Hour)
		defer cancel()
		s.run(ctx)
		synctest.Wait()
		if len(h.errors) != 1 || !strings.Contains(h.errors[0].Error(), `workspace "ws-1" cannot be checked`) || errors.Is(h.errors[0], ErrUndecided) || len(h.states) != 0 {
			t.Errorf("%v, %v", h.errors, h.states)
		}
		if len(h.changes) != 2 || h.changes[0].Spec.WorkspaceID != "ws-2" || h.changes[0].Since.Sub(began) > 30*time.Minute || seen["ws-1"] < 12 {
			t.Errorf("%+v, %v", h.changes, seen)
		}
	})
}

// === Invalid options and callbacks ===

func TestSweepOptionsThatCannotBeMeant(t *testing.T) {
	client, err := New("127.0.0.1:1", WithLogger(discard))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for says, options := range map[string]SweepOptions{
		"Period: -1ns is below zero":                               {Period: -1},
		"Period: 5ns is below 1ms":                                 {Period: 5},
		"ConfirmAfter: -1s is below zero":                          {ConfirmAfter: -time.Second},
		"ConfirmAfter: 20ns is below 1ms":                          {ConfirmAfter: 20},
		"Lookups: NaN is not from":                                 {Lookups: math.NaN()},
		"Lookups: +Inf is not from":                                {Lookups: math.Inf(1)},
		"Lookups: -Inf is not from":                                {Lookups: math.Inf(-1)},
		"Lookups: -1 is not from":                                  {Lookups: -1},
		"Lookups: 1e-12 is not from":                               {Lookups: 1e-12},
		"Lookups: 5e-324 is not from":                              {Lookups: math.SmallestNonzeroFloat64},
		"Lookups: 1.7976931348623157e+308":                         {Lookups: math.MaxFloat64},
		"Concurrent: -1 is below zero":                             {Concurrent: -1},
		"is above 1024":                                            {Concurrent: math.MaxInt},
		"below zero; leave it out for the default\nConcurrent: -2": {Period: -1, Concurrent: -2},
	} {
		said := 0
		for change, err := range client.Sweep(background(), fleet("ws-1"), options) {
			var undecided *Undecided
			if said++; !errors.As(err, &undecided) || undecided.Reason() != ReasonInvalidOption || !strings.Contains(err.Error(), says) ||
				undecided.HTTPStatus() != 500 || change.To != Unknown {
				t.Errorf("%q: %v", says, err)
			}
		}
		if said != 1 {
			t.Errorf("%q: %d errors", says, said)
		}
	}
	for _, options := range []SweepOptions{
		{}, {Period: time.Millisecond, ConfirmAfter: time.Hour, Lookups: 0.001, Concurrent: 1024}, {Lookups: 1e6}, {Period: math.MaxInt64},
	} {
		if err := options.check(); err != nil {
			t.Errorf("%+v: %v", options, err)
		}
	}
}

// panickyStore is a store with a fault.
type panickyStore struct{ SweepStore }

func (panickyStore) Load(context.Context, string) (SweepRecord, error) { panic(keyMark + "thrown") }

func TestWhatASweepIsGivenMayFail(t *testing.T) {
	_, address := startFake(t)
	client := newClient(t, address)
	var none *SweepMemory
	for name, test := range map[string]struct {
		running func(context.Context) iter.Seq2[Spec, error]
		store   SweepStore
		says    string
	}{
		"nothing lists":         {nil, nil, "nothing lists"},
		"a nil iterator":        {func(context.Context) iter.Seq2[Spec, error] { return nil }, nil, "nothing lists"},
		"a listing that panics": {func(context.Context) iter.Seq2[Spec, error] { panic(keyMark + "thrown") }, nil, "the listing panicked with a string"},
		"an iterator that does": {func(context.Context) iter.Seq2[Spec, error] {
			return func(func(Spec, error) bool) { panic(keyMark + "thrown") }
		}, nil, "the listing panicked"},
		"a store that panics": {fleet("ws-1"), panickyStore{}, "the store panicked with a string"},
		"a nil memory":        {fleet("ws-1"), none, "NewSweepMemory makes one"},
		"a store of nothing":  {fleet("ws-1"), struct{ SweepStore }{}, "the store panicked"},
		"a workspace, no Lookup": {func(context.Context) iter.Seq2[Spec, error] {
			return func(yield func(Spec, error) bool) { yield(Spec{WorkspaceID: "ws-1"}, nil) }
		}, nil, "LOOKUP_MISSING"},
	} {
		said := 0
		for change, err := range client.Sweep(withTimeout(t, 20*time.Second), test.running, SweepOptions{Store: test.store, Lookups: 1e6, Period: 10 * time.Millisecond}) {
			if said++; err == nil || !strings.Contains(err.Error(), test.says) || strings.Contains(err.Error(), keyMark) {
				t.Errorf("%s: %+v, %v", name, change, err)
			}
			break
		}
		if said != 1 {
			t.Errorf("%s: %d", name, said)
		}
	}
	// A zero memory works, and one that panics in OnState changes nothing.
	var zero SweepMemory
	if err := zero.Save(background(), "ws-1", SweepRecord{Health: Dead}); err != nil {
		t.Error(err)
	}
	if got, err := zero.Load(background(), "ws-1"); err != nil || got.Health != Dead {
		t.Errorf("%v, %v", got, err)
	}
	synctest.Test(t, func(t *testing.T) {
		s, h := sighted(func(context.Context, Spec) sighting {
			return sighting{refusal: undecided(nil, ReasonNotAGate, errors.New("-"))}
		}, fleet("ws-1"), SweepOptions{})
		logged := 0
		s.log = func(context.Context, slog.Level, string, ...slog.Attr) { logged++ }
		s.options.OnState = func(SweepState) { panic(keyMark + "thrown") }
		ctx, cancel := context.WithTimeout(background(), time.Hour)
		defer cancel()
		s.run(ctx)
		synctest.Wait()
		if len(h.errors) != 1 || logged != 2 {
			t.Errorf("%v, %d lines", h.errors, logged)
		}
	})
	// A listing that ends its goroutine ends the caller's, and no other.
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range client.Sweep(background(), func(context.Context) iter.Seq2[Spec, error] { runtime.Goexit(); return nil }, SweepOptions{}) {
			t.Error("a change")
		}
	}()
	<-ended
}

// A sweep without a store of its own forgets what runs no more; a client that is closed ends it.
func TestASweepEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		round := 0
		s, _ := sighted(func(context.Context, Spec) sighting { return sighting{decided: true, health: Healthy} }, func(ctx context.Context) iter.Seq2[Spec, error] {
			round++
			return fleet(fmt.Sprint("ws-", round))(ctx)
		}, SweepOptions{})
		ctx, cancel := context.WithTimeout(background(), 5*time.Hour)
		defer cancel()
		s.run(ctx)
		synctest.Wait()
		if round < 30 || len(s.memory.records) > 2 || len(s.asked) > 2 {
			t.Errorf("%d rounds, %d records, %d asked", round, len(s.memory.records), len(s.asked))
		}
	})
	_, address := startFake(t)
	client, err := New(address, WithLogger(discard))
	if err != nil {
		t.Fatal(err)
	}
	var said []error
	for _, err := range client.Sweep(background(), func(ctx context.Context) iter.Seq2[Spec, error] {
		client.Close()
		return fleet("ws-1")(ctx)
	}, SweepOptions{Period: 10 * time.Millisecond, Lookups: 1e6}) {
		said = append(said, err)
	}
	var undecided *Undecided
	if len(said) != 1 || !errors.As(said[0], &undecided) || undecided.Reason() != ReasonClosed {
		t.Errorf("%v", said)
	}
}
