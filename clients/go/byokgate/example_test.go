package byokgate_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log"
	"log/slog"
	"time"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// The values that a create brings along stand for the workspace's scope; the organization's come from the store.
func ExampleClient_Decide() {
	client, err := byokgate.New("unix:///run/byok-gate/gate.sock")
	if err != nil {
		panic(err)
	}
	defer client.Close()

	payload := byokgate.Found{"ANTHROPIC_API_KEY": byokgate.NewSecret("made-up-key")}
	allowed, err := client.Decide(context.Background(), byokgate.Request{
		Checkpoint: byokgate.Create,
		Spec: byokgate.Spec{
			Runtime: "claude-code",
			Model:   "claude-opus-4-7",
			Lookup: func(_ context.Context, scope byokgate.Scope, names []string) (byokgate.Found, error) {
				if scope == byokgate.Workspace {
					return payload, nil
				}
				return organizationSecrets(names)
			},
		},
	})
	var denied *byokgate.Denied
	var undecided *byokgate.Undecided
	switch {
	case err == nil:
		fmt.Println("create it, billed to", allowed.BillingMode())
	case errors.As(err, &denied):
		fmt.Println("refused:", denied.Code(), denied.HTTPStatus())
	case errors.As(err, &undecided):
		fmt.Println("no decision, so no workspace:", undecided.HTTPStatus())
	}
	// Output: no decision, so no workspace: 503
}

func organizationSecrets([]string) (byokgate.Found, error) { return nil, nil }

// A running fleet. The platform decides what the loop's body does; a sweep stops nothing.
func ExampleClient_Sweep() {
	client, err := byokgate.New("unix:///run/byok-gate/gate.sock")
	if err != nil {
		log.Fatal(err)
	}
	running := func(ctx context.Context) iter.Seq2[byokgate.Spec, error] {
		return func(yield func(byokgate.Spec, error) bool) {
			// SELECT ... WHERE box IS NOT NULL
			yield(byokgate.Spec{WorkspaceID: "ws-1", Runtime: "claude-code", Model: "claude-opus-4-7", Lookup: byokgate.Static(nil, nil)}, nil)
		}
	}
	ctx, stop := context.WithTimeout(context.Background(), time.Hour)
	defer stop()
	for change, err := range client.Sweep(ctx, running, byokgate.SweepOptions{}) {
		var blind *byokgate.Undecided
		switch {
		case errors.As(err, &blind):
			// The sweep learns nothing until this is fixed. It comes once.
			slog.Error("page somebody", "reason", blind.Reason(), "check", blind.OperatorHint())
		case err != nil:
			slog.Warn("the sweep could not do all", "error", err)
		default:
			slog.Warn("tell the tenant", "workspace", change.Spec.WorkspaceID, "from", change.From, "to", change.To, "code", change.Code)
		}
	}
}
