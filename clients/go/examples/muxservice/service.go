// Package muxservice is a service on [http.ServeMux] that calls byok-gate in middleware: its handler runs only for workspaces that may
// start. It also has a service in rollout: it calls and reports, and obeys its own checks. Its test needs no byok-gate.
package muxservice

import (
	"context"
	"net/http"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/gatehttp"
)

// Secrets fetch a workspace's or an organization's secrets of these names.
type Secrets func(ctx context.Context, organization string, scope byokgate.Scope, names []string) (byokgate.Found, error)

// New passes to start only workspaces that may start.
func New(gate byokgate.Decider, secrets Secrets, start func(allowed byokgate.Allowed)) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST /organizations/{organization}/workspaces", gatehttp.Middleware(gate, ask(secrets))(
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			allowed, passed := gatehttp.AllowedFor(r)
			if !passed {
				http.Error(w, "the gate was not asked", http.StatusInternalServerError)
				return
			}
			start(allowed)
			w.WriteHeader(http.StatusCreated)
		})))
	return mux
}

// NewReporting starts whatever its own check allows, and reports what byok-gate would have decided. The answer does not wait for it.
func NewReporting(reporter *byokgate.Reporter, secrets Secrets, check func(*http.Request) bool, start func()) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /organizations/{organization}/workspaces", func(w http.ResponseWriter, r *http.Request) {
		if request, err := ask(secrets)(r); err == nil {
			reporter.Go(r.Context(), request)
		}
		if !check(r) {
			http.Error(w, "refused", http.StatusUnprocessableEntity)
			return
		}
		start()
		w.WriteHeader(http.StatusCreated)
	})
	return mux
}

func ask(secrets Secrets) func(*http.Request) (byokgate.Request, error) {
	return func(r *http.Request) (byokgate.Request, error) {
		organization := r.PathValue("organization")
		return byokgate.Request{Checkpoint: byokgate.Create, Spec: byokgate.Spec{
			OrganizationID: organization, Runtime: r.FormValue("runtime"), Model: r.FormValue("model"),
			Lookup: func(ctx context.Context, scope byokgate.Scope, names []string) (byokgate.Found, error) {
				return secrets(ctx, organization, scope, names)
			},
		}}, nil
	}
}
