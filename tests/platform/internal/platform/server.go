// Package platform is an example of a platform that calls byok-gate: an HTTP service that keeps workspaces and their secrets in
// PostgreSQL, small enough to copy from. Four files do what a caller must do:
//
//   - server.go decides before a row is written, for one workspace and for an import of many.
//   - start.go decides before a running box is stopped, and retries retryable refusals.
//   - edit.go decides before a change is saved, for all affected workspaces.
//   - sweep.go checks running workspaces, since a key may die later.
//
// store.go has the lookups by which byok-gate's client fetches secrets.
package platform

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"sync"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/gatehttp"
)

// maxBody is far above any import, and keeps a stray upload out of memory.
const maxBody = 4 << 20

// Server is the platform.
type Server struct {
	gate  *byokgate.Client
	store *Store
	log   *slog.Logger
	mux   *http.ServeMux

	// Workspaces to start later; see start.go.
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup
	mu     sync.Mutex
	queued map[string]bool
}

// NewServer serves the platform's API until it is closed.
func NewServer(gate *byokgate.Client, store *Store, log *slog.Logger) *Server {
	s := &Server{gate: gate, store: store, log: log, mux: http.NewServeMux(), queued: map[string]bool{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.mux.HandleFunc("POST /workspaces", s.create)
	s.mux.HandleFunc("POST /import", s.importAll)
	s.mux.HandleFunc("GET /workspaces", s.list)
	s.mux.HandleFunc("GET /workspaces/{id}", s.get)
	for _, path := range []string{"provision", "restart", "resume"} {
		s.mux.HandleFunc("POST /workspaces/{id}/"+path, s.start)
	}
	s.mux.HandleFunc("POST /workspaces/{id}/pause", s.pause)
	s.mux.HandleFunc("PATCH /workspaces/{id}", s.patch)
	s.mux.HandleFunc("PUT /workspaces/{id}/secrets/{name}", s.putWorkspaceSecret)
	s.mux.HandleFunc("DELETE /workspaces/{id}/secrets/{name}", s.deleteWorkspaceSecret)
	s.mux.HandleFunc("PUT /organizations/{id}/secrets/{name}", s.putOrganizationSecret)
	s.mux.HandleFunc("DELETE /organizations/{id}/secrets/{name}", s.deleteOrganizationSecret)
	return s
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Close cancels later starts, and waits for running ones.
func (s *Server) Close() {
	s.cancel()
	s.work.Wait()
}

// payload is a requested workspace.
type payload struct {
	OrganizationID string         `json:"organization_id"`
	Name           string         `json:"name"`
	Runtime        string         `json:"runtime"`
	Model          string         `json:"model"`
	Secrets        byokgate.Found `json:"secrets"`
}

// StartedBody answers a create and a start that were allowed.
type StartedBody struct {
	ID          string               `json:"id"`
	Status      string               `json:"status"`
	BillingMode byokgate.BillingMode `json:"billing_mode"`
	DecisionID  string               `json:"decision_id"`
}

// ImportedBody answers an import: one for each workspace, in order.
type ImportedBody struct {
	// ID is empty for a workspace that was refused.
	ID string `json:"id"`
	// Refusal is why. Absent for one that was created.
	Refusal *byokgate.Body `json:"refusal,omitempty"`
}

// create decides before anything is written: a workspace that could not work never exists.
func (s *Server) create(w http.ResponseWriter, r *http.Request) {
	var asked payload
	if !readJSON(w, r, &asked) {
		return
	}
	id := rand.Text()
	allowed, passed := gatehttp.Decide(w, r, s.gate, s.creation(id, asked))
	if !passed {
		return
	}
	row, err := s.insert(r.Context(), id, asked, allowed)
	if err != nil {
		s.fault(w, err)
		return
	}
	writeJSON(w, http.StatusCreated, started(row))
}

// importAll decides about all of them at once and creates those that may exist.
func (s *Server) importAll(w http.ResponseWriter, r *http.Request) {
	var asked []payload
	if !readJSON(w, r, &asked) {
		return
	}
	ids := make([]string, len(asked))
	requests := make([]byokgate.Request, len(asked))
	for index := range asked {
		ids[index] = rand.Text()
		requests[index] = s.creation(ids[index], asked[index])
	}
	results := make([]ImportedBody, len(asked))
	for index, result := range s.gate.BatchDecide(r.Context(), requests) {
		allowed, err := result.Decision()
		if err != nil {
			results[index].Refusal = bodyOf(err)
			continue
		}
		if _, err := s.insert(r.Context(), ids[index], asked[index], allowed); err != nil {
			s.fault(w, err)
			return
		}
		results[index].ID = ids[index]
	}
	writeJSON(w, http.StatusOK, results)
}

// creation is the request for a new workspace: its own scope is the payload.
func (s *Server) creation(id string, asked payload) byokgate.Request {
	stored := s.store.lookup(id, asked.OrganizationID)
	return byokgate.Request{Checkpoint: byokgate.Create, Spec: byokgate.Spec{
		WorkspaceID:    id,
		OrganizationID: asked.OrganizationID,
		Runtime:        asked.Runtime,
		Model:          asked.Model,
		Lookup: func(ctx context.Context, scope byokgate.Scope, names []string) (byokgate.Found, error) {
			if scope == byokgate.Workspace {
				return asked.Secrets, nil
			}
			return stored(ctx, scope, names)
		},
	}}
}

// insert needs an allow to write: there is no row without one.
func (s *Server) insert(ctx context.Context, id string, asked payload, allowed byokgate.Allowed) (Row, error) {
	row := Row{
		ID:             id,
		OrganizationID: asked.OrganizationID,
		Name:           asked.Name,
		Runtime:        asked.Runtime,
		Model:          asked.Model,
		Status:         StatusProvisioning,
		BillingMode:    string(allowed.BillingMode()),
		DecisionID:     allowed.DecisionID(),
	}
	return row, s.store.insert(ctx, row, asked.Secrets)
}

func (s *Server) list(w http.ResponseWriter, r *http.Request) {
	rows, err := s.store.all(r.Context())
	if err != nil {
		s.fault(w, err)
		return
	}
	writeJSON(w, http.StatusOK, rows)
}

func (s *Server) get(w http.ResponseWriter, r *http.Request) {
	if row, found := s.rowOf(w, r); found {
		writeJSON(w, http.StatusOK, row)
	}
}

// rowOf writes the answer itself if there is none.
func (s *Server) rowOf(w http.ResponseWriter, r *http.Request) (Row, bool) {
	row, err := s.store.row(r.Context(), r.PathValue("id"))
	if err != nil {
		s.fault(w, err)
		return Row{}, false
	}
	return row, true
}

// fault answers for the platform's own faults. The store's error stays in the log.
func (s *Server) fault(w http.ResponseWriter, err error) {
	if errors.Is(err, errNoRow) {
		http.Error(w, errNoRow.Error(), http.StatusNotFound)
		return
	}
	s.log.Error("the store failed", "error", err.Error())
	http.Error(w, "the store failed", http.StatusInternalServerError)
}

func started(row Row) StartedBody {
	return StartedBody{
		ID: row.ID, Status: row.Status, BillingMode: byokgate.BillingMode(row.BillingMode), DecisionID: row.DecisionID,
	}
}

// bodyOf is a refusal's body, for an answer with several.
func bodyOf(err error) *byokgate.Body {
	var refusal byokgate.Refusal = &byokgate.Undecided{}
	_ = errors.As(err, &refusal)
	body := refusal.Body()
	return &body
}

// readJSON answers 400 itself, without the decoder's error: it may quote the body, which holds secrets.
func readJSON(w http.ResponseWriter, r *http.Request, into any) bool {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(into); err != nil {
		http.Error(w, "the body is not the JSON that is expected here", http.StatusBadRequest)
		return false
	}
	return true
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// The status is sent: now only a caller that hung up can go wrong.
	_ = json.NewEncoder(w).Encode(body)
}
