package byokgate

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// Faults in the caller's code: none ends the process, blocks a caller, or counts as an answer.

// faults are what foreign code can do instead of returning.
var faults = map[string]func(){
	"panics with a value":   func() { panic(keyMark + "thrown") },
	"panics in the runtime": func() { var none []int; _ = none[len(keyMark)] },
	"ends its goroutine":    runtime.Goexit,
}

func TestALookupThatFailsInOtherWaysIsUnreadable(t *testing.T) {
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			fake, address := startFake(t)
			client, logs := newLoggedClient(t, address)
			request := with(func(_ context.Context, scope Scope, _ []string) (Found, error) {
				if scope == Organization {
					fault()
				}
				return Found{"ACME_API_KEY": NewSecret(liveKey)}, nil
			})
			wantUnreadable := func(asked *byokgatev1.DecideRequest) {
				t.Helper()
				spec := asked.GetWorkspaceSpec()
				if got := spec.GetUnreadableScopes(); len(got) != 1 || got[0] != byokgatev1.Scope_SCOPE_ORGANIZATION || len(spec.GetCredentials()) != 1 {
					t.Errorf("sent %v", spec)
				}
			}
			allowed, err := client.Decide(background(), request)
			wantAllowed(t, allowed, err, BYOK)
			wantUnreadable(fake.requests()[0])
			fake.batch = func(batch *byokgatev1.BatchDecideRequest, stream batchStream) error {
				wantUnreadable(batch.GetRequests()[0])
				return answerAll(batch, stream)
			}
			wantResults(t, collectResults(t, client, []Request{request, acme()}), "allow BYOK", "allow BYOK")
			if !strings.Contains(logs.String(), "the lookup ") {
				t.Errorf("the fault is not in the log:\n%s", logs)
			}
		})
	}
}

// badHandler is a log handler with a fault.
type badHandler struct{ fault func() }

func (badHandler) Enabled(context.Context, slog.Level) bool    { return true }
func (h badHandler) Handle(context.Context, slog.Record) error { h.fault(); return nil }
func (h badHandler) WithAttrs([]slog.Attr) slog.Handler        { return h }
func (h badHandler) WithGroup(string) slog.Handler             { return h }
func (h badHandler) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	h.fault()
	return ctx
}
func (h badHandler) HandleRPC(context.Context, stats.RPCStats) { h.fault() }
func (h badHandler) TagConn(context.Context, *stats.ConnTagInfo) context.Context {
	h.fault()
	return nil
}
func (h badHandler) HandleConn(context.Context, stats.ConnStats) { h.fault() }

func TestHooksThatPanicChangeNothing(t *testing.T) {
	fault := faults["panics with a value"]
	for name, option := range map[string]Option{
		"the trace hook":    WithTraceContext(func(context.Context) (string, string) { fault(); return "", "" }),
		"the observer":      WithObserver(func(Observation) { fault() }),
		"the log handler":   WithLogger(slog.New(badHandler{fault})),
		"the stats handler": WithStatsHandler(badHandler{fault}),
	} {
		t.Run(name, func(t *testing.T) {
			fake, address := startFake(t)
			fake.batch = answerAll
			client := newClient(t, address, option)
			allowed, err := client.Decide(background(), acme())
			wantAllowed(t, allowed, err, BYOK)
			wantResults(t, collectResults(t, client, batchOf(2)), "allow BYOK", "allow BYOK")
			if report := reporting(t, client).Report(background(), acme()); verdict(report) != "would_allow" {
				t.Errorf("%v", report)
			}
		})
	}
}

// A hook that ends its goroutine ends the caller's, which starts nothing then; the client goes on.
func TestHooksThatEndTheirGoroutine(t *testing.T) {
	for name, option := range map[string]Option{
		"the trace hook":  WithTraceContext(func(context.Context) (string, string) { runtime.Goexit(); return "", "" }),
		"the observer":    WithObserver(func(Observation) { runtime.Goexit() }),
		"the log handler": WithLogger(slog.New(badHandler{runtime.Goexit})),
	} {
		fake, address := startFake(t)
		fake.batch = answerAll
		client := newClient(t, address, option)
		reporter := reporting(t, client)
		for what, use := range map[string]func(){
			"Decide":      func() { _, _ = client.Decide(background(), acme()) },
			"BatchDecide": func() { client.BatchDecide(background(), batchOf(2))(func(int, Result) bool { return true }) },
			"Go":          func() { reporter.Go(background(), acme()) },
		} {
			ended := make(chan struct{})
			returned := false
			go func() {
				defer close(ended)
				use()
				returned = true
			}()
			<-ended
			if returned && what != "Go" {
				t.Errorf("%s: %s returned", name, what)
			}
		}
		if err := reporter.Wait(withTimeout(t, 10*time.Second)); err != nil {
			t.Errorf("%s: a question of Go is pending for ever", name)
		}
	}
}

func TestDialersWithFaults(t *testing.T) {
	for name, dial := range map[string]func(context.Context, string) (net.Conn, error){
		"panics":     func(context.Context, string) (net.Conn, error) { panic("-") },
		"goes":       func(context.Context, string) (net.Conn, error) { runtime.Goexit(); return nil, nil },
		"nothing":    func(context.Context, string) (net.Conn, error) { return nil, nil },
		"refuses":    func(context.Context, string) (net.Conn, error) { return nil, errors.New("no") },
		"nil answer": func(context.Context, string) (net.Conn, error) { var none *net.TCPConn; return none, errors.New("no") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client := newClient(t, "127.0.0.1:1", WithDialer(dial), WithTimeout(impatient))
			allowed, err := client.Decide(background(), acme())
			wantReason(t, wantUndecided(t, allowed, err, http.StatusServiceUnavailable), ReasonUnreachable)
		})
	}
}

func TestTLSCallbacksThatPanic(t *testing.T) {
	ours := newCertificates(t)
	address := serveGRPC(t, listenTCP(t), func(server *grpc.Server) {
		byokgatev1.RegisterPolicyDecisionServiceServer(server, newFake())
	}, ours.serverOption(false))
	client := newClient(t, address, WithTimeout(impatient), WithTLS(&tls.Config{
		RootCAs: ours.pool, VerifyConnection: func(tls.ConnectionState) error { panic("-") },
	}))
	if allowed, err := client.Decide(background(), acme()); err == nil {
		t.Errorf("%v", allowed)
	}
}

func TestNilAndZeroValues(t *testing.T) {
	var absent *Client
	closed, err := New("127.0.0.1:1", WithLogger(discard))
	if err != nil {
		t.Fatal(err)
	}
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	for name, client := range map[string]*Client{"nil": absent, "zero": {}, "closed": closed} {
		allowed, err := client.Decide(background(), acme())
		wantReason(t, wantUndecided(t, allowed, err, http.StatusServiceUnavailable), ReasonClosed)
		allowed, err = client.DecideUntil(background(), acme(), RetryPolicy{})
		wantReason(t, wantUndecided(t, allowed, err, http.StatusServiceUnavailable), ReasonClosed)
		wantResults(t, collectResults(t, client, batchOf(2)), undecided503, undecided503)
		if _, err := client.ResolveProvider(background(), "agent", "acme-large"); !errors.Is(err, ErrUndecided) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := client.ListModels(background(), "agent"); !errors.Is(err, ErrUndecided) {
			t.Errorf("%s: %v", name, err)
		}
		reporter := reporting(t, client)
		if report := reporter.Report(background(), acme()); verdict(report) != "would_be_undecided DECISION_UNAVAILABLE" {
			t.Errorf("%s: %v", name, report)
		}
		reporter.Go(background(), acme())
		if err := reporter.Wait(background()); err != nil {
			t.Error(err)
		}
		_ = reporter.Counts()
		if err := client.Close(); name != "closed" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	var nobody *Reporter
	if nobody.Go(background(), acme()) || nobody.Wait(background()) != nil || verdict(nobody.Report(background(), acme())) != "" {
		t.Error("a nil Reporter does something")
	}
	var denied *Denied
	var undecided *Undecided
	for _, refusal := range []Refusal{denied, undecided} {
		if refusal.HTTPStatus() != 503 || refusal.Code() != DecisionUnavailable || !refusal.Retryable() || refusal.RetryAfter() <= 0 ||
			refusal.Error() == "" || len(refusal.JSON()) == 0 || refusal.OperatorHint() != "" || refusal.Body().Error == "" {
			t.Errorf("%T: %v", refusal, refusal)
		}
		if RefusalOf(refusal).HTTPStatus() != 503 {
			t.Errorf("%T", refusal)
		}
	}
	if undecided.Unwrap() != nil || undecided.Violations() != nil || undecided.Reason() != ReasonInternal || denied.Details().Provider != "" {
		t.Error("nil refusals say something")
	}
	fake, address := startFake(t)
	var none context.Context
	allowed, err := newClient(t, address).Decide(none, acme())
	wantAllowed(t, allowed, err, BYOK)
	if len(fake.requests()) != 1 {
		t.Error("not asked")
	}
}

// A store that hangs forever blocks a bounded number of goroutines, and later lookups fail at once.
func TestLookupsThatNeverReturnAreBounded(t *testing.T) {
	const atOnce, decisions = 6, 10
	fake, address := startFake(t)
	client, logs := newLoggedClient(t, address, WithLookupBudget(20*time.Millisecond, atOnce))
	ended := make(chan struct{})
	var running atomic.Int32
	request := with(func(context.Context, Scope, []string) (Found, error) {
		running.Add(1)
		<-ended
		return nil, nil
	})
	for range decisions {
		allowed, err := client.Decide(background(), request)
		wantAllowed(t, allowed, err, BYOK)
	}
	if running.Load() != atOnce {
		t.Errorf("%d lookups are under way, expected %d", running.Load(), atOnce)
	}
	for _, asked := range fake.requests() {
		if len(asked.GetWorkspaceSpec().GetUnreadableScopes()) != 2 {
			t.Errorf("sent %v", asked)
		}
	}
	if !strings.Contains(logs.String(), errLookupMany.Error()) {
		t.Error("the bound is not in the log")
	}
	// They make room when they come back.
	close(ended)
	for end := time.Now().Add(10 * time.Second); client.lookups.running.Load() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no room was made")
		}
	}
	if _, err := client.Decide(background(), acme()); err != nil {
		t.Error(err)
	}
	if last := fake.requests()[decisions]; len(last.GetWorkspaceSpec().GetCredentials()) != 1 {
		t.Errorf("sent %v", last)
	}
}

func TestFilesThatAreNoFiles(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, option := range map[string]Option{
		"a pipe as a token":   WithTokenFile(pipe),
		"a pipe as a CA":      WithTLSFiles(pipe, "", ""),
		"a device as a token": WithTokenFile("/dev/zero"),
		"a folder as a token": WithTokenFile(t.TempDir()),
	} {
		if _, err := New("localhost:1", option); err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A renewed authority is trusted from the next connection on, and half a renewal changes nothing.
func TestTheAuthorityIsReadAgain(t *testing.T) {
	first, second := newCertificates(t), newCertificates(t)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	write := func(text []byte) {
		t.Helper()
		if err := os.WriteFile(ca, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func(from *certificates) []byte {
		text, err := os.ReadFile(from.file("ca.pem"))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	write(read(first))
	files := &tlsFiles{ca: ca}
	old, err := files.config()
	if err != nil {
		t.Fatal(err)
	}
	write(nil)
	if got, err := files.config(); err != nil || got != old {
		t.Errorf("half a renewal: %v", err)
	}
	if err := os.Remove(ca); err != nil {
		t.Fatal(err)
	}
	if got, err := files.config(); err != nil || got != old {
		t.Errorf("no file: %v", err)
	}
	write(read(second))
	address := serveGRPC(t, listenTCP(t), func(server *grpc.Server) {
		byokgatev1.RegisterPolicyDecisionServiceServer(server, newFake())
	}, second.serverOption(false))
	write(read(first))
	client := newClient(t, address, WithTLSFiles(ca, "", ""), WithTimeout(time.Second))
	allowed, err := client.Decide(background(), acme())
	wantReason(t, wantUndecided(t, allowed, err, http.StatusInternalServerError), ReasonTLSUntrusted)
	write(read(second))
	for end := time.Now().Add(maxReconnectDelay + grace); ; {
		if allowed, err = client.Decide(background(), acme()); err == nil || time.Now().After(end) {
			break
		}
	}
	wantAllowed(t, allowed, err, BYOK)
}

// watcher is a stats handler that records its events.
type watcher struct {
	mu   sync.Mutex
	told []stats.RPCStats
}

func (w *watcher) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (w *watcher) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (w *watcher) HandleConn(context.Context, stats.ConnStats)                       {}
func (w *watcher) HandleRPC(_ context.Context, event stats.RPCStats) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told = append(w.told, event)
}

func TestAStatsHandlerSeesNoCredential(t *testing.T) {
	fake, address := startFake(t)
	seen := &watcher{}
	client := newClient(t, address, WithStatsHandler(seen), WithToken(NewSecret(keyMark+"token")), WithUserAgent("platform/1.2"))
	allowed, err := client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
	if got := fake.metadata.Get("user-agent"); len(got) != 1 || !strings.HasPrefix(got[0], "platform/1.2 byok-gate-go/"+Version+" grpc-go/") {
		t.Errorf("user agent %q", got)
	}
	sizes := 0
	for _, event := range seen.told {
		switch event := event.(type) {
		case *stats.OutPayload:
			if event.Payload != nil {
				t.Errorf("%+v", event)
			}
			sizes += event.Length
		case *stats.InPayload:
			if event.Payload != nil {
				t.Errorf("%+v", event)
			}
		case *stats.OutHeader:
			if len(event.Header.Get("authorization")) != 0 {
				t.Error("the token is shown")
			}
		}
	}
	if sizes == 0 {
		t.Error("the handler was told of nothing")
	}
	// gRPC of today does not tell of the token. One of tomorrow may.
	header := metadata.Pairs("authorization", "Bearer "+keyMark+"token", "other", "kept")
	payloadless{seen}.HandleRPC(background(), &stats.OutHeader{Header: header})
	last := seen.told[len(seen.told)-1].(*stats.OutHeader).Header
	if len(last.Get("authorization")) != 0 || len(last.Get("other")) != 1 || len(header.Get("authorization")) != 1 {
		t.Errorf("told of %v, of %v", last, header)
	}
}

// What is given out is a copy.
func TestSlicesThatAreGivenOut(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	for range 2 {
		owner, err := client.ResolveProvider(background(), "agent", "acme-large")
		if err != nil || len(owner.RelevantEnv) != 1 || owner.RelevantEnv[0] != "ACME_API_KEY" || owner.AcceptedEnv[0] != "ACME_API_KEY" {
			t.Fatalf("%+v, %v", owner, err)
		}
		owner.RelevantEnv[0], owner.AcceptedEnv[0] = "EDITED", "EDITED"
	}
	request := with(func(_ context.Context, _ Scope, names []string) (Found, error) {
		for index := range names {
			names[index] = "EDITED"
		}
		return Found{"ACME_API_KEY": NewSecret(liveKey), "EDITED": NewSecret(liveKey)}, nil
	})
	for range 2 {
		allowed, err := client.Decide(background(), request)
		wantAllowed(t, allowed, err, BYOK)
	}
	for _, asked := range fake.requests() {
		for _, sent := range asked.GetWorkspaceSpec().GetCredentials() {
			if sent.GetEnvName() != "ACME_API_KEY" {
				t.Errorf("sent %v", sent.GetEnvName())
			}
		}
	}
}
