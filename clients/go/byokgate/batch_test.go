package byokgate

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

type batchStream = grpc.ServerStreamingServer[byokgatev1.BatchDecideResponse]

func retryIn(pause time.Duration) *errdetails.RetryInfo {
	return &errdetails.RetryInfo{RetryDelay: durationpb.New(pause)}
}

func decided(index int, response *byokgatev1.DecideResponse) *byokgatev1.BatchDecideResponse {
	return &byokgatev1.BatchDecideResponse{
		Index: uint32(index), Result: &byokgatev1.BatchDecideResponse_Response{Response: response},
	}
}

func said(index int, code codes.Code, message string) *byokgatev1.BatchDecideResponse {
	return &byokgatev1.BatchDecideResponse{
		Index: uint32(index), Result: &byokgatev1.BatchDecideResponse_Status{
			Status: &byokgatev1.ItemStatus{Code: int32(code), Message: message},
		},
	}
}

// batchOf are requests that differ in their workspace.
func batchOf(count int) []Request {
	requests := make([]Request, count)
	for index := range requests {
		requests[index] = acme()
		requests[index].Spec.WorkspaceID = fmt.Sprint(index)
	}
	return requests
}

// collect takes a whole batch and expects each index once.
func collectResults(t *testing.T, client *Client, requests []Request) map[int]string {
	t.Helper()
	got := map[int]string{}
	for index, result := range client.BatchDecide(background(), requests) {
		if _, twice := got[index]; twice || index < 0 || index >= len(requests) {
			t.Fatalf("index %d, of %d, after %v", index, len(requests), got)
		}
		switch allowed, err := result.Decision(); err := err.(type) {
		case nil:
			got[index] = "allow " + string(allowed.BillingMode())
		case Refusal:
			got[index] = fmt.Sprint(err.HTTPStatus(), " ", err.Code())
		default:
			t.Fatalf("%d: %T", index, err)
		}
	}
	if len(got) != len(requests) {
		t.Fatalf("%d results for %d requests: %v", len(got), len(requests), got)
	}
	return got
}

func wantResults(t *testing.T, got map[int]string, want ...string) {
	t.Helper()
	for index := range want {
		if got[index] != want[index] {
			t.Errorf("%d: %s, expected %s", index, got[index], want[index])
		}
	}
}

const (
	undecided503 = "503 " + string(DecisionUnavailable)
	undecided400 = "400 " + string(DecisionUnavailable)
	undecided500 = "500 " + string(DecisionUnavailable)
)

func TestEveryKindOfBatchResult(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	fake.batch = func(request *byokgatev1.BatchDecideRequest, stream batchStream) error {
		if len(request.GetRequests()) == 1 {
			// Item 9 alone, since an empty reply names no registry either.
			return stream.Send(decided(0, nil))
		}
		for _, reply := range []*byokgatev1.BatchDecideResponse{
			decided(9, nil),
			decided(4_000_000_000, allow(2)), // no such item
			decided(8, allow(99)),
			said(7, codes.OK, "fine"), // a status of OK decides nothing
			said(6, ^codes.Code(0), "of no known code"),
			said(5, codes.Unauthenticated, "-"),
			said(4, codes.InvalidArgument, "workspace_spec.model: too long"),
			said(3, codes.DeadlineExceeded, "late"),
			{Index: 2}, // neither
			decided(1, missingKey("ACME_API_KEY")),
			decided(0, allow(2)),
			decided(1, allow(2)), // a second answer for an item that has one
		} {
			if err := stream.Send(reply); err != nil {
				return err
			}
		}
		return nil // and nothing about item 10
	}
	wantResults(t, collectResults(t, client, batchOf(11)),
		"allow BYOK", "422 MISSING_BYOK_CREDENTIAL", undecided503, undecided503, undecided400, undecided500, undecided503, undecided503,
		undecided503, undecided503, undecided503)
}

// answerAll allows every item of a call.
func answerAll(request *byokgatev1.BatchDecideRequest, stream batchStream) error {
	for index := range request.GetRequests() {
		if err := stream.Send(decided(index, allow(2))); err != nil {
			return err
		}
	}
	return nil
}

func TestAnEmptyBatchAsksNothing(t *testing.T) {
	_, address := startFake(t)
	collectResults(t, newClient(t, address), nil)
}

func sum(sizes []int) (total, most int) {
	for _, size := range sizes {
		total, most = total+size, max(most, size)
	}
	return total, most
}

func TestALargeBatchBecomesSeveralCalls(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	var mu sync.Mutex
	var sizes []int
	fake.batch = func(request *byokgatev1.BatchDecideRequest, stream batchStream) error {
		mu.Lock()
		sizes = append(sizes, len(request.GetRequests()))
		mu.Unlock()
		return answerAll(request, stream)
	}
	requests := batchOf(2*maxBatchItems + 3)
	for index, result := range collectResults(t, client, requests) {
		if result != "allow BYOK" {
			t.Errorf("%d: %s", index, result)
		}
	}
	// How they fall into calls depends on when each was ready.
	if total, most := sum(sizes); total != len(requests) || most > maxBatchItems || len(sizes) < 3 {
		t.Errorf("calls of %v", sizes)
	}
	// By bytes: 64 KiB each, so that about 63 fit into one call.
	sizes = nil
	requests = batchOf(100)
	for index := range requests {
		requests[index].Spec.Lookup = Static(Found{"ACME_API_KEY": NewSecret(keyMark + strings.Repeat("x", 64*1024))}, nil)
	}
	collectResults(t, client, requests)
	if total, most := sum(sizes); total != len(requests) || most > 62 || len(sizes) < 2 {
		t.Errorf("calls of %v", sizes)
	}
}

// A server that goes down in the middle: its answers count, the rest is retried.
func TestABatchThatIsCutOffIsFinished(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	var sizes []int
	fake.batch = func(request *byokgatev1.BatchDecideRequest, stream batchStream) error {
		sizes = append(sizes, len(request.GetRequests()))
		if len(sizes) > 1 {
			return answerAll(request, stream)
		}
		if err := stream.Send(decided(1, missingKey("ACME_API_KEY"))); err != nil {
			return err
		}
		return status.Error(codes.Unavailable, "draining")
	}
	wantResults(t, collectResults(t, client, batchOf(3)), "allow BYOK", "422 MISSING_BYOK_CREDENTIAL", "allow BYOK")
	if fmt.Sprint(sizes) != "[3 2]" {
		t.Errorf("calls of %v", sizes)
	}
}

func TestABatchThatFails(t *testing.T) {
	for code, want := range map[codes.Code]string{
		codes.Unavailable: undecided503, codes.Internal: undecided503, codes.Unimplemented: undecided500,
		codes.InvalidArgument: undecided400, codes.ResourceExhausted: undecided503,
	} {
		fake, address := startFake(t)
		client := newClient(t, address, WithBatchTimeout(2*time.Second))
		fake.batch = func(_ *byokgatev1.BatchDecideRequest, stream batchStream) error {
			return status.Error(code, "-")
		}
		wantResults(t, collectResults(t, client, batchOf(2)), want, want)
	}
}

func TestABatchThatHangsEndsAtItsDeadline(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address, WithBatchTimeout(impatient))
	ended := make(chan struct{})
	t.Cleanup(func() { close(ended) })
	fake.batch = func(request *byokgatev1.BatchDecideRequest, stream batchStream) error {
		_ = stream.Send(decided(0, allow(2)))
		<-ended
		return nil
	}
	began := time.Now()
	wantResults(t, collectResults(t, client, batchOf(2)), "allow BYOK", undecided503)
	if took := time.Since(began); took > impatient+grace {
		t.Errorf("took %v", took)
	}
}

// An item whose answer comes from another registry is retried alone.
func TestABatchFollowsTheRegistry(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	var sizes []int
	fake.batch = func(request *byokgatev1.BatchDecideRequest, stream batchStream) error {
		sizes = append(sizes, len(request.GetRequests()))
		if len(sizes) > 1 {
			response := allow(2)
			response.RegistryRevision = "r2"
			return stream.Send(decided(0, response))
		}
		fake.name("r2", "ACME_API_KEY", "NEW_API_KEY")
		response := missingKey("NEW_API_KEY")
		response.RegistryRevision = "r2"
		if err := stream.Send(decided(1, response)); err != nil {
			return err
		}
		return stream.Send(decided(0, allow(2)))
	}
	wantResults(t, collectResults(t, client, batchOf(2)), "allow BYOK", "allow BYOK")
	if fmt.Sprint(sizes) != "[2 1]" {
		t.Errorf("calls of %v", sizes)
	}
}

func TestABatchOfRequestsThatCannotBeSent(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	fake.batch = answerAll
	requests := batchOf(3)
	requests[0].Spec.Lookup = nil
	requests[1].Spec.Model = "\xff"
	wantResults(t, collectResults(t, client, requests), undecided500, undecided400, "allow BYOK")
}

func TestLeavingABatchEndsIt(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	ended := make(chan error, 1)
	fake.batch = func(_ *byokgatev1.BatchDecideRequest, stream batchStream) error {
		_ = stream.Send(decided(0, allow(2)))
		<-stream.Context().Done()
		ended <- context.Cause(stream.Context())
		return nil
	}
	for range client.BatchDecide(background(), batchOf(3)) {
		break
	}
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("the call goes on although nobody listens")
	}
}

func TestResolveProvider(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	owner, err := client.ResolveProvider(background(), "agent", "acme-large", "ACME_API_KEY")
	if err != nil || owner.Provider != "acme" || owner.BillingMode != BYOK || len(owner.AcceptedEnv) != 1 {
		t.Errorf("%+v, %v", owner, err)
	}
	fake.resolve = func() (*byokgatev1.ResolveProviderResponse, error) {
		return &byokgatev1.ResolveProviderResponse{
			Result: &byokgatev1.ResolveProviderResponse_Deny{Deny: &byokgatev1.Deny{
				Code: byokgatev1.DenyCode_DENY_CODE_UNREGISTERED_MODEL_FOR_RUNTIME, Message: "nobody",
			}},
			RegistryRevision: "r1",
		}, nil
	}
	_, err = client.ResolveProvider(background(), "agent", "no-such-model")
	wantDenied(t, Allowed{}, err, "UNREGISTERED_MODEL_FOR_RUNTIME")
	fake.resolve = func() (*byokgatev1.ResolveProviderResponse, error) {
		return nil, status.Error(codes.Unimplemented, "-")
	}
	_, err = client.ResolveProvider(background(), "agent", "acme-large")
	wantUndecided(t, Allowed{}, err, http.StatusInternalServerError)
}

func TestListModels(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	fake.menu = func() (*byokgatev1.ListModelsResponse, error) {
		return &byokgatev1.ListModelsResponse{RegistryRevision: "r1", Models: []*byokgatev1.OfferedModel{
			{Runtime: "agent", Model: "acme-large", Provider: "acme", ProviderDisplayName: "Acme", BillingMode: 2, AcceptedEnv: []string{"ACME_API_KEY"}},
			{Runtime: "agent", Model: "of-tomorrow", BillingMode: 99, Withdrawn: true},
		}}, nil
	}
	for range 3 {
		models, err := client.ListModels(background(), "agent")
		want := "[{agent  acme-large acme Acme BYOK [ACME_API_KEY] false false} {agent  of-tomorrow   UNSPECIFIED [] true false}]"
		if err != nil || fmt.Sprint(models) != want {
			t.Errorf("%v, %v, expected %s", models, err, want)
		}
		models[0].Provider = "edited"
	}
	if fake.listed != 1 {
		t.Errorf("asked %d times", fake.listed)
	}
	// A decision by another registry ends the memory.
	fake.name("r2", "ACME_API_KEY")
	response := allow(2)
	response.RegistryRevision = "r2"
	fake.tell(response, nil)
	allowed, err := client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
	if _, err := client.ListModels(background(), "agent"); err != nil || fake.listed != 2 {
		t.Errorf("%v, asked %d times", err, fake.listed)
	}
	fake.menu = func() (*byokgatev1.ListModelsResponse, error) {
		said, err := status.New(codes.NotFound, "no runtime `x`").WithDetails(
			&errdetails.ErrorInfo{Domain: errorDomain, Reason: "UNKNOWN_RUNTIME"})
		if err != nil {
			t.Error(err)
		}
		return nil, said.Err()
	}
	_, err = client.ListModels(background(), "x")
	if got := wantUndecided(t, Allowed{}, err, http.StatusBadRequest); !strings.Contains(got.Body().Error, "no runtime `x`") {
		t.Errorf("%v", got)
	}
}

// A newer version may be held up by the registry, or by the configuration that is read together with it.
func TestRegistryStatusTellsWhyANewerVersionIsNotInForce(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	source := func(fault string) *byokgatev1.SourceStatus { return &byokgatev1.SourceStatus{LastReloadError: fault} }
	for _, told := range []struct{ registry, configuration, want string }{
		{"", "", ""}, {"of the registry", "", "of the registry"}, {"", "of the configuration", "of the configuration"},
	} {
		fake.registry = &byokgatev1.GetRegistryStatusResponse{
			Registry: source(told.registry), Configuration: source(told.configuration),
		}
		status, err := client.RegistryStatus(background())
		if err != nil || status.LastReloadError != told.want {
			t.Errorf("%q, %v, expected %q", status.LastReloadError, err, told.want)
		}
	}
}

// One lookup in 33 hangs forever: the others are not affected, and memory is bounded.
func TestALargeBatchWithLookupsThatHang(t *testing.T) {
	const items, hanging = 10_000, 300
	fake, address := startFake(t)
	client := newClient(t, address, WithLogger(discard), WithLookupBudget(5*time.Second, DefaultLookups))
	ended := make(chan struct{})
	defer close(ended)
	requests := batchOf(items)
	var looked, answered, most atomic.Int64
	for index := range requests {
		if index%(items/hanging) == 0 && index/(items/hanging) < hanging {
			requests[index].Spec.Lookup = func(context.Context, Scope, []string) (Found, error) { <-ended; return nil, nil }
			continue
		}
		requests[index].Spec.Lookup = func(_ context.Context, scope Scope, _ []string) (Found, error) {
			if scope == Organization {
				return nil, nil
			}
			held := looked.Add(1) - answered.Load()
			for seen := most.Load(); held > seen && !most.CompareAndSwap(seen, held); seen = most.Load() {
			}
			return Found{"ACME_API_KEY": NewSecret(liveKey)}, nil
		}
	}
	fake.batch = func(request *byokgatev1.BatchDecideRequest, stream batchStream) error {
		for index, asked := range request.GetRequests() {
			response := allow(2)
			if len(asked.GetWorkspaceSpec().GetUnreadableScopes()) > 0 {
				response = deny(&byokgatev1.Deny{Code: byokgatev1.DenyCode_DENY_CODE_CREDENTIAL_SCOPE_UNREADABLE, Retryable: true})
			} else {
				answered.Add(1)
			}
			if err := stream.Send(decided(index, response)); err != nil {
				return err
			}
		}
		return nil
	}
	// All that do not hang are answered before the first that does is given up.
	counted := map[string]int{}
	before := 0
	for index, result := range client.BatchDecide(background(), requests) {
		_, err := result.Decision()
		switch {
		case err == nil:
			counted["allowed"]++
			if counted["unreadable"] == 0 {
				before++
			}
		case errors.Is(err, CredentialScopeUnreadable):
			counted["unreadable"]++
		default:
			t.Fatalf("%d: %v", index, err)
		}
	}
	if counted["allowed"] != items-hanging || counted["unreadable"] != hanging {
		t.Errorf("%v", counted)
	}
	// Without room for slow ones, the places for lookups would be taken by those that hang before a tenth is through.
	if least := 2 * batchLookups * items / hanging; before < least {
		t.Errorf("only %d were answered before the first that hangs was given up, expected %d at least", before, least)
	}
	if bound := int64(batchInHand + batchLookups); most.Load() > bound {
		t.Errorf("%d requests held credentials at a time, expected %d at most", most.Load(), bound)
	}
	t.Logf("%d of %d were answered before the first that hangs was; %d held credentials at most", before, items-hanging, most.Load())
}

// A gate that is down is detected once, and not by each call.
func TestABatchFindsOutOnceThatTheGateIsAway(t *testing.T) {
	listener := listenTCP(t)
	address := listener.Addr().String()
	listener.Close()
	// Each item by itself would take two seconds, 32 at a time: most would find that the batch's time is over.
	client := newClient(t, address, WithLogger(discard), WithBatchTimeout(20*time.Second))
	looked := &store{}
	requests := batchOf(2000)
	for index := range requests {
		requests[index].Spec.Lookup = looked.lookup
		requests[index].Spec.Model = fmt.Sprint("model-", index)
	}
	for _, result := range client.BatchDecide(background(), requests) {
		var undecided *Undecided
		if _, err := result.Decision(); !errors.As(err, &undecided) || undecided.Reason() != ReasonUnreachable {
			t.Fatalf("%v", err)
		}
	}
	if lookups := looked.lookups(); len(lookups) > 0 {
		t.Errorf("%d lookups for a gate that is away", len(lookups))
	}
}

// The same where it goes away after it named the names: a few calls find it out, and no item waits for the batch's end.
func TestABatchWhoseGateGoesAwayInBetween(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address, WithLogger(discard), WithBatchTimeout(30*time.Second))
	var calls atomic.Int64
	fake.batch = func(*byokgatev1.BatchDecideRequest, batchStream) error {
		calls.Add(1)
		return status.Error(codes.Unavailable, "away")
	}
	for _, result := range client.BatchDecide(background(), batchOf(3000)) {
		var undecided *Undecided
		if _, err := result.Decision(); !errors.As(err, &undecided) || undecided.Reason() != ReasonUnreachable {
			t.Fatalf("%v", err)
		}
	}
	// At least a quarter of a second between two tries of a call, for two seconds, four calls at a time.
	if calls.Load() > 150 {
		t.Errorf("%d calls", calls.Load())
	}
}

// Items that byok-gate postpones are retried at the given time, and the others do not wait for them.
func TestABatchObeysRetryInfo(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address)
	const pause = 300 * time.Millisecond
	var mu sync.Mutex
	seen := map[string][]time.Time{}
	busy, err := anypb.New(retryIn(pause))
	if err != nil {
		t.Fatal(err)
	}
	fake.batch = func(request *byokgatev1.BatchDecideRequest, stream batchStream) error {
		for index, asked := range request.GetRequests() {
			id := asked.GetWorkspaceSpec().GetWorkspaceId()
			mu.Lock()
			seen[id] = append(seen[id], time.Now())
			tries := len(seen[id])
			mu.Unlock()
			reply := decided(index, allow(2))
			if id == "1" && tries < 3 {
				reply = said(index, codes.ResourceExhausted, "busy")
				reply.GetStatus().Details = []*anypb.Any{busy}
			}
			if err := stream.Send(reply); err != nil {
				return err
			}
		}
		return nil
	}
	var order []int
	for index, result := range client.BatchDecide(background(), batchOf(3)) {
		if _, err := result.Decision(); err != nil {
			t.Errorf("%d: %v", index, err)
		}
		order = append(order, index)
	}
	if len(order) != 3 || order[2] != 1 || len(seen["1"]) != 3 || len(seen["0"]) != 1 {
		t.Errorf("answered in order %v after %v", order, seen)
	}
	for try := 1; try < len(seen["1"]); try++ {
		if waited := seen["1"][try].Sub(seen["1"][try-1]); waited < pause {
			t.Errorf("asked again after %v, sooner than %v", waited, pause)
		}
	}
}

// A slow consumer delays nothing: all are answered while it is busy with the first.
func TestASlowConsumerHoldsUpNothing(t *testing.T) {
	fake, address := startFake(t)
	client := newClient(t, address, WithLogger(discard))
	const items = 2000
	var answered atomic.Int64
	fake.batch = func(request *byokgatev1.BatchDecideRequest, stream batchStream) error {
		answered.Add(int64(len(request.GetRequests())))
		return answerAll(request, stream)
	}
	count := 0
	for range client.BatchDecide(background(), batchOf(items)) {
		for end := time.Now().Add(20 * time.Second); count == 0 && answered.Load() < items; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d of %d were asked about while the consumer was busy", answered.Load(), items)
			}
		}
		count++
	}
	if count != items {
		t.Errorf("%d results", count)
	}
}
