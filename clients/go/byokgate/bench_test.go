package byokgate

import (
	"context"
	"io"
	"log/slog"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// cannedGate answers at once, without reading the request.
type cannedGate struct {
	byokgatev1.UnimplementedPolicyDecisionServiceServer
	names    *byokgatev1.ResolveProviderResponse
	response *byokgatev1.DecideResponse
}

func (g *cannedGate) ResolveProvider(
	context.Context, *byokgatev1.ResolveProviderRequest,
) (*byokgatev1.ResolveProviderResponse, error) {
	return g.names, nil
}

func (g *cannedGate) Decide(context.Context, *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
	return g.response, nil
}

func startCanned(b *testing.B) string {
	return serveGRPC(b, listenTCP(b), func(server *grpc.Server) {
		byokgatev1.RegisterPolicyDecisionServiceServer(server, &cannedGate{names: resolution("r1", "ACME_API_KEY"), response: allow(2)})
	})
}

func bareQuestion() *byokgatev1.DecideRequest {
	return &byokgatev1.DecideRequest{
		Checkpoint: byokgatev1.Checkpoint_CHECKPOINT_CREATE,
		WorkspaceSpec: &byokgatev1.WorkspaceSpec{
			WorkspaceId: "ws-1", OrganizationId: "org-1", Runtime: "agent", Model: "acme-large",
			Credentials: []*byokgatev1.Credential{{EnvName: "ACME_API_KEY", Scope: byokgatev1.Scope_SCOPE_WORKSPACE, Value: liveKey}},
		},
	}
}

// The cost of the generated code alone, with the same request.
func BenchmarkBareStub(b *testing.B) {
	conn, err := grpc.NewClient(startCanned(b), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	stub := byokgatev1.NewPolicyDecisionServiceClient(conn)
	b.ReportAllocs()
	for range b.N {
		ctx, cancel := context.WithTimeout(context.Background(), DefaultTimeout)
		response, err := stub.Decide(ctx, bareQuestion())
		cancel()
		if err != nil || response.GetAllow() == nil {
			b.Fatal(response, err)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	for name, log := range map[string]*slog.Logger{
		"log=none": discard, "log=json": slog.New(slog.NewJSONHandler(io.Discard, nil)),
	} {
		b.Run(name, func(b *testing.B) {
			client, err := New(startCanned(b), WithLogger(log))
			if err != nil {
				b.Fatal(err)
			}
			defer client.Close()
			b.ReportAllocs()
			for range b.N {
				if allowed, err := client.Decide(context.Background(), acme()); err != nil || allowed.BillingMode() != BYOK {
					b.Fatal(allowed, err)
				}
			}
		})
	}
}

// The client's additional cost: the names, the two timed lookups, the caller's own map of secrets.
func TestADecisionAddsFewAllocations(t *testing.T) {
	// 12, and one for the runtime's own.
	const most = 13
	address := serveGRPC(t, listenTCP(t), func(server *grpc.Server) {
		byokgatev1.RegisterPolicyDecisionServiceServer(server, &cannedGate{names: resolution("r1", "ACME_API_KEY"), response: allow(2)})
	})
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stub := byokgatev1.NewPolicyDecisionServiceClient(conn)
	client, err := New(address, WithLogger(discard))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	bare := func() {
		ctx, cancel := context.WithTimeout(context.Background(), DefaultTimeout)
		defer cancel()
		if _, err := stub.Decide(ctx, bareQuestion()); err != nil {
			t.Fatal(err)
		}
	}
	whole := func() {
		if _, err := client.Decide(context.Background(), acme()); err != nil {
			t.Fatal(err)
		}
	}
	bare()
	whole()
	// Both ends are in this process, and the runtime allocates when it likes: the least of a few looks.
	least := 1000.0
	for range 5 {
		least = min(least, testing.AllocsPerRun(50, whole)-testing.AllocsPerRun(50, bare))
	}
	if least > most {
		t.Errorf("%v allocations more than the stub alone, expected %d at most", least, most)
	}
	t.Logf("%v allocations more", least)
}
