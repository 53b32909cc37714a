package byokgate

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// store is a secret store that records its lookups.
type store struct {
	mu     sync.Mutex
	found  map[Scope]Found
	failed map[Scope]error
	asked  []string
}

func (s *store) lookup(_ context.Context, scope Scope, names []string) (Found, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, scope.String()+" "+strings.Join(names, ","))
	return s.found[scope], s.failed[scope]
}

// lookups are those so far; the two scopes are asked at a time, so that only their sorted order is settled.
func (s *store) lookups() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	slices.Sort(s.asked)
	return s.asked
}

func with(lookup Lookup) Request {
	request := acme()
	request.Spec.Lookup = lookup
	return request
}

func TestWhatIsSent(t *testing.T) {
	fake, address := startFake(t)
	fake.name("r1", "ACME_TOKEN", "ACME_API_KEY", "ACME_OLD")
	client := newClient(t, address)
	secrets := &store{found: map[Scope]Found{
		Workspace: {
			"ACME_API_KEY": NewSecret(liveKey), "ACME_TOKEN": NewSecret(" "), "ACME_OLD": Unreadable(),
			"SMTP_PASSWORD": NewSecret(keyMark + "password"),
		},
		Organization: {"ACME_API_KEY": NewSecret(keyMark + "\xff\n")},
	}}
	request := with(secrets.lookup)
	request.Spec.OperatorOverride, request.Spec.PlatformProxy = OverrideBYOK, ProxyAbsent
	request.Spec.TenantBaseURLEnv = []string{"ACME_BASE_URL"}
	request.MaxLivenessAge, request.Explain = ptr(time.Duration(0)), true
	allowed, err := client.Decide(background(), request)
	wantAllowed(t, allowed, err, BYOK)

	want := &byokgatev1.DecideRequest{
		Checkpoint: byokgatev1.Checkpoint_CHECKPOINT_CREATE,
		WorkspaceSpec: &byokgatev1.WorkspaceSpec{
			WorkspaceId: "ws-1", OrganizationId: "org-1", Runtime: "agent", Model: "acme-large",
			Credentials: []*byokgatev1.Credential{
				{EnvName: "ACME_API_KEY", Scope: byokgatev1.Scope_SCOPE_WORKSPACE, Value: liveKey},
				{EnvName: "ACME_OLD", Scope: byokgatev1.Scope_SCOPE_WORKSPACE, Unreadable: true},
				{EnvName: "ACME_TOKEN", Scope: byokgatev1.Scope_SCOPE_WORKSPACE, Value: " "},
				{EnvName: "ACME_API_KEY", Scope: byokgatev1.Scope_SCOPE_ORGANIZATION, Value: keyMark + "\uFFFD\n"},
			},
			OperatorOverride: byokgatev1.OperatorOverride_OPERATOR_OVERRIDE_BYOK,
			PlatformProxy:    byokgatev1.PlatformProxy_PLATFORM_PROXY_ABSENT,
			TenantBaseUrlEnv: []string{"ACME_BASE_URL"},
		},
		MaxLivenessAge: durationpb.New(0),
		Explain:        true,
	}
	if got := fake.requests(); len(got) != 1 || !proto.Equal(got[0], want) {
		t.Errorf("sent %v, expected %v", got, want)
	}
	lookups := []string{"ORGANIZATION ACME_TOKEN,ACME_API_KEY,ACME_OLD", "WORKSPACE ACME_TOKEN,ACME_API_KEY,ACME_OLD"}
	if !slices.Equal(secrets.lookups(), lookups) {
		t.Errorf("looked up %q, expected %q", secrets.lookups(), lookups)
	}
}

func TestNothingIsFetchedThatCannotMatter(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	secrets := &store{}
	fake.name("r1") // a model that the platform owns
	platforms := allow(byokgatev1.BillingMode_BILLING_MODE_PLATFORM_MANAGED)
	platforms.RelevantEnv = nil
	fake.tell(platforms, nil)
	allowed, err := client.Decide(background(), with(secrets.lookup))
	wantAllowed(t, allowed, err, PlatformManaged)
	// An override settles it, whatever names matter to the model.
	fake.name("r1", "ACME_API_KEY")
	fake.tell(allow(byokgatev1.BillingMode_BILLING_MODE_BYOK), nil)
	for _, override := range []OperatorOverride{OverridePlatformManaged, OverrideDisabled} {
		request := with(secrets.lookup)
		request.Spec.OperatorOverride = override
		allowed, err = client.Decide(background(), request)
		wantAllowed(t, allowed, err, BYOK)
	}
	// Who owns a model for which there is no owner is settled without a secret, too.
	fake.resolve = func() (*byokgatev1.ResolveProviderResponse, error) {
		return &byokgatev1.ResolveProviderResponse{
			Result:           &byokgatev1.ResolveProviderResponse_Deny{Deny: &byokgatev1.Deny{Code: 4}},
			RegistryRevision: "r1",
		}, nil
	}
	fake.tell(platforms, nil)
	request := with(secrets.lookup)
	request.Spec.Model = "no-such-model"
	if _, err = client.Decide(background(), request); err != nil {
		t.Error(err)
	}
	if len(secrets.asked) != 0 {
		t.Errorf("looked up %q", secrets.asked)
	}
	if asked := len(fake.requests()); asked != 4 {
		t.Errorf("%d decisions", asked)
	}
}

func TestAFailingLookupIsUnreadableAndNeverAbsent(t *testing.T) {
	fake, address := startFake(t)
	client, logs := newLoggedClient(t, address)
	secrets := &store{
		// Found beside an error: half a scope is not the scope.
		found:  map[Scope]Found{Organization: {"ACME_API_KEY": NewSecret(liveKey)}, Workspace: {"ACME_API_KEY": NewSecret(liveKey)}},
		failed: map[Scope]error{Organization: errors.New("connection refused")},
	}
	if _, err := client.Decide(background(), with(secrets.lookup)); err != nil {
		t.Fatal(err)
	}
	spec := fake.requests()[0].GetWorkspaceSpec()
	if got := spec.GetUnreadableScopes(); !slices.Equal(got, []byokgatev1.Scope{byokgatev1.Scope_SCOPE_ORGANIZATION}) {
		t.Errorf("unreadable scopes %v", got)
	}
	if got := spec.GetCredentials(); len(got) != 1 || got[0].GetScope() != byokgatev1.Scope_SCOPE_WORKSPACE {
		t.Errorf("credentials %v", got)
	}
	if !strings.Contains(logs.String(), "connection refused") {
		t.Error("the fault is not in the log")
	}
}

func TestALookupThatHangsIsUnreadable(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address, WithTimeout(impatient))
	ended := make(chan struct{})
	t.Cleanup(func() { close(ended) })
	request := with(func(ctx context.Context, scope Scope, _ []string) (Found, error) {
		if _, limited := ctx.Deadline(); !limited {
			t.Error("a lookup without a deadline")
		}
		if scope == Workspace {
			<-ended // deaf to its context
		}
		return nil, nil
	})
	began := time.Now()
	if _, err := client.Decide(background(), request); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > impatient+grace {
		t.Errorf("took %v", took)
	}
	if got := fake.requests()[0].GetWorkspaceSpec().GetUnreadableScopes(); !slices.Equal(got, []byokgatev1.Scope{byokgatev1.Scope_SCOPE_WORKSPACE}) {
		t.Errorf("unreadable scopes %v", got)
	}
}

func TestRequestsThatCannotBeSent(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	noLookup := with(nil)
	allowed, err := client.Decide(background(), noLookup)
	wantUndecided(t, allowed, err, http.StatusInternalServerError)
	for field, edit := range map[string]func(*Spec){
		"workspace_id":        func(spec *Spec) { spec.WorkspaceID = "\xff" },
		"organization_id":     func(spec *Spec) { spec.OrganizationID = "\xff" },
		"runtime":             func(spec *Spec) { spec.Runtime = "\xff" },
		"model":               func(spec *Spec) { spec.Model = "\xff" },
		"tenant_base_url_env": func(spec *Spec) { spec.TenantBaseURLEnv = []string{"\xff"} },
	} {
		request := acme()
		edit(&request.Spec)
		allowed, err := client.Decide(background(), request)
		if got := wantUndecided(t, allowed, err, http.StatusBadRequest).Body().Error; !strings.Contains(got, field) {
			t.Errorf("%s: %q", field, got)
		}
	}
	if len(fake.requests()) != 0 {
		t.Error("byok-gate was asked")
	}
}

func TestNamesAreRememberedForOneRegistry(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	for range 5 {
		allowed, err := client.Decide(background(), acme())
		wantAllowed(t, allowed, err, BYOK)
	}
	if fake.resolved != 1 {
		t.Errorf("the names were asked for %d times", fake.resolved)
	}
	other := acme()
	other.Spec.Model = "acme-small"
	if _, err := client.Decide(background(), other); err != nil || fake.resolved != 2 {
		t.Errorf("%v, the names were asked for %d times", err, fake.resolved)
	}
}

func TestNamesAreAskedForUntilThereIsAnAnswer(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address, WithTimeout(impatient))
	known := fake.resolve
	for name, resolve := range map[string]func() (*byokgatev1.ResolveProviderResponse, error){
		"an error":    func() (*byokgatev1.ResolveProviderResponse, error) { return nil, status.Error(codes.Internal, "-") },
		"empty":       func() (*byokgatev1.ResolveProviderResponse, error) { return &byokgatev1.ResolveProviderResponse{}, nil },
		"no revision": func() (*byokgatev1.ResolveProviderResponse, error) { return resolution("", "ACME_API_KEY"), nil },
		"neither nor": func() (*byokgatev1.ResolveProviderResponse, error) {
			return &byokgatev1.ResolveProviderResponse{RegistryRevision: "r1"}, nil
		},
	} {
		fake.resolve = resolve
		allowed, err := client.Decide(background(), acme())
		if got := wantUndecided(t, allowed, err, http.StatusServiceUnavailable); got.Body().DecisionID != "" {
			t.Errorf("%s: a decision", name)
		}
	}
	if len(fake.requests()) != 0 {
		t.Errorf("asked for decisions without knowing the names: %v", fake.requests())
	}
	fake.resolve = known
	allowed, err := client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
}

// A request that is refused before the names are known: the decision names the fields, and could not be an allow.
func TestABadRequestIsLeftToTheDecision(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	fake.resolve = func() (*byokgatev1.ResolveProviderResponse, error) {
		return nil, status.Error(codes.InvalidArgument, "model: bad")
	}
	fake.tell(nil, status.Error(codes.InvalidArgument, "workspace_spec.model: bad"))
	allowed, err := client.Decide(background(), acme())
	if got := wantUndecided(t, allowed, err, http.StatusBadRequest); !strings.Contains(got.Body().Error, "workspace_spec.model") {
		t.Errorf("%v", got)
	}
	// Were it an allow after all, it is believed once the names that it comes with were looked for.
	asked := len(fake.requests())
	fake.tell(allow(byokgatev1.BillingMode_BILLING_MODE_BYOK), nil)
	allowed, err = client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
	if got := fake.requests()[asked:]; len(got) != 2 || len(got[1].GetWorkspaceSpec().GetCredentials()) != 1 {
		t.Errorf("asked %v", got)
	}
}

// The registry gains a name after the client asked for the names: its credential is fetched before a "missing" is believed,
// and so it is before an allow that might rest on the wrong owner.
func TestNamesFollowTheRegistry(t *testing.T) {
	for name, stale := range map[string]*byokgatev1.DecideResponse{
		"missing": missingKey("NEW_API_KEY"),
		"allow":   allow(byokgatev1.BillingMode_BILLING_MODE_PLATFORM_MANAGED),
	} {
		t.Run(name, func(t *testing.T) {
			fake, address := startFake(t)
			client := newClient(t, address)
			allowed, err := client.Decide(background(), acme())
			wantAllowed(t, allowed, err, BYOK)

			stale.RegistryRevision = "r2"
			stale.RelevantEnv = []string{"ACME_API_KEY", "NEW_API_KEY"}
			fresh := allow(byokgatev1.BillingMode_BILLING_MODE_BYOK)
			fresh.RegistryRevision, fresh.RelevantEnv = "r2", stale.RelevantEnv
			fake.decide = func(_ context.Context, request *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
				for _, sent := range request.GetWorkspaceSpec().GetCredentials() {
					if sent.GetEnvName() == "NEW_API_KEY" {
						return fresh, nil
					}
				}
				return stale, nil
			}
			secrets := &store{found: map[Scope]Found{Workspace: {"NEW_API_KEY": NewSecret(liveKey)}}}
			allowed, err = client.Decide(background(), with(secrets.lookup))
			wantAllowed(t, allowed, err, BYOK)
			// What was fetched already is not fetched again.
			want := []string{"ORGANIZATION ACME_API_KEY", "ORGANIZATION NEW_API_KEY", "WORKSPACE ACME_API_KEY", "WORKSPACE NEW_API_KEY"}
			if !slices.Equal(secrets.lookups(), want) {
				t.Errorf("looked up %q", secrets.lookups())
			}
		})
	}
}

// Another registry with the same names: it is names that are compared, and the reply stands at once.
func TestANewRegistryWithTheSameNames(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	if _, err := client.Decide(background(), acme()); err != nil {
		t.Fatal(err)
	}
	response := missingKey("ACME_API_KEY")
	response.RegistryRevision = "r2"
	fake.tell(response, nil)
	allowed, err := client.Decide(background(), acme())
	wantDenied(t, allowed, err, MissingBYOKCredential)
	if len(fake.requests()) != 2 || fake.resolved != 1 {
		t.Errorf("%d decisions, names asked for %d times", len(fake.requests()), fake.resolved)
	}
}

// Two replicas with two registries behind one balancer: after each was heard once, they cost no refusal and no second call.
func TestTwoRevisionsBehindOneBalancer(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	replies := map[bool]*byokgatev1.DecideResponse{false: allow(2), true: allow(2)}
	replies[true].RegistryRevision, replies[true].RelevantEnv = "r2", []string{"ACME_API_KEY", "NEW_API_KEY"}
	var turn atomic.Int32
	fake.decide = func(context.Context, *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
		return replies[turn.Add(1)%2 == 0], nil
	}
	secrets := &store{found: map[Scope]Found{Workspace: {"NEW_API_KEY": NewSecret(liveKey)}}}
	const decisions = 20
	for range decisions {
		allowed, err := client.Decide(background(), with(secrets.lookup))
		wantAllowed(t, allowed, err, BYOK)
	}
	if asked := len(fake.requests()); asked != decisions+1 || fake.resolved != 1 {
		t.Errorf("%d calls for %d decisions, names asked for %d times", asked, decisions, fake.resolved)
	}
}

func TestManyColdCallersAskForTheNamesOnce(t *testing.T) {
	fake, address := startFake(t)
	hold := make(chan struct{})
	fake.resolve = func() (*byokgatev1.ResolveProviderResponse, error) {
		<-hold
		return resolution("r1", "ACME_API_KEY"), nil
	}
	client := newClient(t, address, WithTimeout(30*time.Second), WithLogger(discard))
	const callers = 1000
	var waiting sync.WaitGroup
	var refused atomic.Int32
	for range callers {
		waiting.Add(1)
		go func() {
			defer waiting.Done()
			if _, err := client.Decide(background(), acme()); err != nil {
				refused.Add(1)
			}
		}()
	}
	// One that gives up takes nobody along.
	gone, cancel := context.WithCancel(background())
	cancel()
	allowed, err := client.Decide(gone, acme())
	wantUndecided(t, allowed, err, statusClientClosed)
	close(hold)
	waiting.Wait()
	if refused.Load() != 0 || fake.resolved != 1 {
		t.Errorf("%d of %d refused, names asked for %d times", refused.Load(), callers, fake.resolved)
	}
}

// A configuration that no revision tells of: a runtime is no longer exempt.
func TestAMissingNameThatWasNotLookedForIsLookedFor(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	exempt := resolution("r1")
	exempt.GetResolution().Source = byokgatev1.ResolutionSource_RESOLUTION_SOURCE_EXEMPT_RUNTIME
	fake.resolve = func() (*byokgatev1.ResolveProviderResponse, error) { return exempt, nil }
	exempted := allow(byokgatev1.BillingMode_BILLING_MODE_NONE)
	exempted.RelevantEnv, exempted.Resolution.Source = nil, exempt.GetResolution().GetSource()
	fake.tell(exempted, nil)
	for range 2 {
		allowed, err := client.Decide(background(), acme())
		wantAllowed(t, allowed, err, NoBilling)
	}
	if fake.resolved != 2 {
		t.Errorf("an exemption was remembered: asked %d times", fake.resolved)
	}
	fake.resolve = func() (*byokgatev1.ResolveProviderResponse, error) {
		// The change comes between this answer and the decision.
		fake.resolve = func() (*byokgatev1.ResolveProviderResponse, error) { return resolution("r1", "ACME_API_KEY"), nil }
		return exempt, nil
	}
	fake.decide = func(_ context.Context, request *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
		if len(request.GetWorkspaceSpec().GetCredentials()) == 0 {
			return missingKey("ACME_API_KEY"), nil
		}
		return allow(byokgatev1.BillingMode_BILLING_MODE_BYOK), nil
	}
	allowed, err := client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
}

// A registry that names another credential in every reply: none counts.
func TestARegistryThatNeverSettlesIsUndecided(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	fake.decide = func(_ context.Context, request *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
		response := allow(byokgatev1.BillingMode_BILLING_MODE_BYOK)
		response.RelevantEnv = []string{"NAME_" + strconv.Itoa(len(fake.requests()))}
		return response, nil
	}
	allowed, err := client.Decide(background(), acme())
	undecided := wantUndecided(t, allowed, err, http.StatusServiceUnavailable)
	if asked := len(fake.requests()); asked != maxRounds || undecided.Reason() != ReasonRegistryMoving {
		t.Errorf("asked %d times, %s", asked, undecided.Reason())
	}
}

func TestTheMemoryIsBounded(t *testing.T) {
	const exact, prefix = byokgatev1.MatchedBy_MATCHED_BY_EXACT_MODEL, byokgatev1.MatchedBy_MATCHED_BY_PREFIX
	var held memory
	held.keep(subject{model: "listed"}, "r1", []string{"A"}, exact)
	for model := range maxRemembered + 10 {
		held.keep(subject{model: strconv.Itoa(model)}, "r1", []string{"A"}, prefix)
		held.keep(subject{model: "junk" + strconv.Itoa(model)}, "r1", []string{"A"}, byokgatev1.MatchedBy_MATCHED_BY_UNSPECIFIED)
	}
	if kept := len(held.generations[0].matched); kept != maxRemembered || len(held.generations[0].listed) != 1 {
		t.Errorf("%d models are remembered", kept)
	}
	// What tenants make up does not push out what the registry lists.
	if names, found := held.recall(subject{model: "listed"}); !found || !slices.Equal(names, []string{"A"}) {
		t.Errorf("%v, %v", names, found)
	}
	if _, found := held.recall(subject{model: "junk1"}); found {
		t.Error("a model that nobody owns is remembered")
	}
	held.keep(subject{model: strings.Repeat("x", maxSubjectBytes+1)}, "r1", nil, exact)
	if len(held.generations[0].listed) != 1 {
		t.Error("a model of any length is remembered")
	}
	// Two registries, and no third.
	for _, revision := range []string{"r2", "r3", "r4"} {
		held.keep(subject{model: "listed"}, revision, []string{revision}, exact)
	}
	if names, _ := held.recall(subject{model: "listed"}); len(held.generations) != 2 || !slices.Equal(names, []string{"r4", "r3"}) {
		t.Errorf("%d generations, names %v", len(held.generations), names)
	}
	// One that was not heard of for long takes no part.
	held.generations[1].heard = time.Now().Add(-2 * generationAge)
	if names, _ := held.recall(subject{model: "listed"}); !slices.Equal(names, []string{"r4"}) {
		t.Errorf("names %v", names)
	}
}

// === Retries ===

func TestWhatIsRetried(t *testing.T) {
	busy, err := status.New(codes.ResourceExhausted, "busy").WithDetails(retryIn(time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		fault   error
		retried bool
	}{
		"away":                     {status.Error(codes.Unavailable, "draining"), true},
		"busy, with a time":        {busy.Err(), true},
		"busy, without one":        {status.Error(codes.ResourceExhausted, "busy"), false},
		"a fault":                  {status.Error(codes.Internal, "-"), false},
		"unknown":                  {status.Error(codes.Unknown, "-"), false},
		"a deadline":               {status.Error(codes.DeadlineExceeded, "-"), false},
		"cancelled":                {status.Error(codes.Canceled, "-"), false},
		"aborted":                  {status.Error(codes.Aborted, "-"), false},
		"a bad request":            {status.Error(codes.InvalidArgument, "-"), false},
		"another service, perhaps": {status.Error(codes.Unimplemented, "-"), false},
		"no leave":                 {status.Error(codes.PermissionDenied, "-"), false},
	} {
		t.Run(name, func(t *testing.T) {
			fake, address := startFake(t)
			client := newClient(t, address)
			var calls atomic.Int32
			fake.decide = func(context.Context, *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
				if calls.Add(1) <= 2 {
					return nil, test.fault
				}
				return allow(byokgatev1.BillingMode_BILLING_MODE_BYOK), nil
			}
			allowed, err := client.Decide(background(), acme())
			if test.retried {
				wantAllowed(t, allowed, err, BYOK)
			} else if err == nil || calls.Load() != 1 {
				t.Errorf("%v, %v after %d calls", allowed, err, calls.Load())
			}
		})
	}
}

func TestRetriesEndWithinTheirPartOfTheTime(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address, WithTimeout(impatient))
	fake.tell(nil, status.Error(codes.Unavailable, "draining"))
	began := time.Now()
	allowed, err := client.Decide(background(), acme())
	wantUndecided(t, allowed, err, http.StatusServiceUnavailable)
	if took := time.Since(began); took > impatient {
		t.Errorf("took %v of %v", took, impatient)
	}
	if asked := len(fake.requests()); asked < 2 {
		t.Errorf("asked %d times", asked)
	}
	if window := retryWindow(background()); window != maxRetryTime {
		t.Errorf("without a deadline: %v", window)
	}
}

func TestPausesGrowAndAreBounded(t *testing.T) {
	away := status.Error(codes.Unavailable, "-")
	for attempt := range 200 {
		pause, again := (&core{}).retryPause(away, attempt)
		if most := min(lastPause, firstPause<<min(attempt, 8)); !again || pause > most || pause < most/2 {
			t.Errorf("attempt %d: %v, %v, expected %v to %v", attempt, pause, again, most/2, most)
		}
	}
	if _, again := (&core{}).retryPause(nil, 0); again {
		t.Error("a success is repeated")
	}
}

// A number that does not fit the wire is refused there, and never truncated to a valid one.
func TestNumbersThatDoNotFitAreNotCutOff(t *testing.T) {
	if strconv.IntSize == 32 {
		t.Skip("every int fits")
	}
	beyond := 1 << 16 << 16
	request := Request{Checkpoint: Checkpoint(beyond + 1), Spec: Spec{
		Runtime: "agent", Model: "acme-large", OperatorOverride: OperatorOverride(beyond + 1), PlatformProxy: PlatformProxy(beyond + 1),
	}}
	sent := request.wire(&wallet{}, Enforce)
	spec := sent.GetWorkspaceSpec()
	if sent.GetCheckpoint() != -1 || spec.GetOperatorOverride() != -1 || spec.GetPlatformProxy() != -1 {
		t.Errorf("%v", sent)
	}
}

// A server that uses a request's memory for the next one, as fasthttp does, changes strings that are kept beyond it.
func TestNothingIsKeptOfARequestsMemory(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	texts := [][]byte{[]byte("agent"), []byte("acme-large"), []byte("ws-1"), []byte("org-1"), []byte("ACME_BASE_URL")}
	borrowed := func(index int) string { return unsafe.String(&texts[index][0], len(texts[index])) }
	request := func() Request {
		made := acme()
		made.Spec.Runtime, made.Spec.Model, made.Spec.WorkspaceID, made.Spec.OrganizationID = borrowed(0), borrowed(1), borrowed(2), borrowed(3)
		made.Spec.TenantBaseURLEnv = []string{borrowed(4)}
		return made
	}
	asked := make(chan struct{})
	answer := make(chan struct{})
	fake.decide = func(context.Context, *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
		// Of another registry than that which named the credentials: the client learns of it from the decision.
		response := allow(byokgatev1.BillingMode_BILLING_MODE_BYOK)
		response.RegistryRevision = "r2"
		return response, nil
	}
	allowed, err := client.Decide(background(), request())
	wantAllowed(t, allowed, err, BYOK)
	fake.menu = func() (*byokgatev1.ListModelsResponse, error) {
		return &byokgatev1.ListModelsResponse{RegistryRevision: "r2"}, nil
	}
	if _, err := client.ListModels(background(), borrowed(0)); err != nil {
		t.Fatal(err)
	}
	// In the background: the handler has returned, and its memory is another's, before the question is put.
	reporter, err := client.ReportOnly(ReportOptions{Concurrent: 1})
	if err != nil {
		t.Fatal(err)
	}
	first := request()
	first.Spec.Lookup = func(context.Context, Scope, []string) (Found, error) {
		asked <- struct{}{}
		<-answer
		return nil, nil
	}
	reporter.Go(background(), first)
	<-asked
	<-asked
	reporter.Go(background(), request())
	for _, text := range texts {
		for index := range text {
			text[index] = 'X'
		}
	}
	close(answer)
	if err := reporter.Wait(withTimeout(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	for _, generation := range client.memory.generations {
		if _, found := generation.recall(subject{"agent", "acme-large"}); !found || len(generation.listed) != 1 {
			t.Errorf("the names of %s are not remembered under the model that they were asked for", generation.revision)
		}
	}
	if _, found := client.memory.recallMenu(menuKey{"agent", false}); !found {
		t.Error("the menu is not remembered under its runtime")
	}
	for index, sent := range fake.requests() {
		if spec := sent.GetWorkspaceSpec(); spec.GetModel() != "acme-large" || spec.GetWorkspaceId() != "ws-1" || spec.GetOrganizationId() != "org-1" ||
			spec.GetRuntime() != "agent" || spec.GetTenantBaseUrlEnv()[0] != "ACME_BASE_URL" {
			t.Errorf("question %d: %v", index, spec)
		}
	}
}
