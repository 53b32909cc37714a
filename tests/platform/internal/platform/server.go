package platform

import (
	"crypto/rand"
	"encoding/json"
	"net/http"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// maxBody is far above any workspace, and keeps a stray upload out of memory.
const maxBody = 1 << 20

type server struct {
	gate  *Gate
	store *Store
}

// Handler serves the platform's API.
func Handler(gate *Gate, store *Store) http.Handler {
	s := &server{gate: gate, store: store}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /workspaces", s.create)
	mux.HandleFunc("POST /workspaces/{id}/provision", s.provision)
	mux.HandleFunc("GET /workspaces", s.list)
	mux.HandleFunc("GET /workspaces/{id}", s.get)
	mux.HandleFunc("PUT /organization/secrets/{name}", s.putOrganizationSecret)
	return mux
}

type createPayload struct {
	Name    string            `json:"name"`
	Runtime string            `json:"runtime"`
	Model   string            `json:"model"`
	Secrets map[string]Secret `json:"secrets"`
}

// startedBody answers a create and a provision that were allowed.
type startedBody struct {
	ID          string `json:"id"`
	Status      string `json:"status"`
	BillingMode string `json:"billing_mode"`
	DecisionID  string `json:"decision_id"`
}

// create decides before anything is written: a workspace that could not work never exists.
func (s *server) create(w http.ResponseWriter, r *http.Request) {
	var payload createPayload
	if !readJSON(w, r, &payload) {
		return
	}
	id := rand.Text()
	allowed, refusal := s.gate.Decide(r.Context(), Question{
		Checkpoint:  byokgatev1.Checkpoint_CHECKPOINT_CREATE,
		WorkspaceID: id,
		Runtime:     payload.Runtime,
		Model:       payload.Model,
		Secrets:     Secrets{Workspace: payload.Secrets, Organization: s.store.organizationSecrets()},
	})
	if allowed == nil {
		refusal.write(w)
		return
	}
	s.store.insert(Row{
		ID:          id,
		Name:        payload.Name,
		Runtime:     payload.Runtime,
		Model:       payload.Model,
		Status:      StatusProvisioning,
		BillingMode: allowed.BillingMode,
		DecisionID:  allowed.DecisionID,
	}, payload.Secrets)
	writeJSON(w, http.StatusCreated, startedBody{
		ID: id, Status: StatusProvisioning, BillingMode: allowed.BillingMode, DecisionID: allowed.DecisionID,
	})
}

// provision starts, restarts or resumes. It decides before anything is stopped, so that a workspace that runs goes on
// running where a restart would be refused. It asks for a fresh observation, since the key may have died after the create.
func (s *server) provision(w http.ResponseWriter, r *http.Request) {
	row, found := s.store.row(r.PathValue("id"))
	if !found {
		http.Error(w, "no such workspace", http.StatusNotFound)
		return
	}
	allowed, refusal := s.gate.Decide(r.Context(), Question{
		Checkpoint:  byokgatev1.Checkpoint_CHECKPOINT_PROVISION,
		WorkspaceID: row.ID,
		Runtime:     row.Runtime,
		Model:       row.Model,
		Secrets:     Secrets{Workspace: s.store.workspaceSecrets(row.ID), Organization: s.store.organizationSecrets()},
		Fresh:       true,
	})
	if allowed == nil {
		s.store.change(row.ID, func(row *Row) { row.LastError = refusal.Body.Code + ": " + refusal.Body.Error })
		refusal.write(w)
		return
	}
	row = s.store.change(row.ID, func(row *Row) {
		row.Status, row.BillingMode, row.DecisionID, row.LastError = StatusOnline, allowed.BillingMode, allowed.DecisionID, ""
	})
	writeJSON(w, http.StatusOK, startedBody{
		ID: row.ID, Status: row.Status, BillingMode: row.BillingMode, DecisionID: row.DecisionID,
	})
}

func (s *server) list(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, s.store.all())
}

func (s *server) get(w http.ResponseWriter, r *http.Request) {
	row, found := s.store.row(r.PathValue("id"))
	if !found {
		http.Error(w, "no such workspace", http.StatusNotFound)
		return
	}
	writeJSON(w, http.StatusOK, row)
}

func (s *server) putOrganizationSecret(w http.ResponseWriter, r *http.Request) {
	var payload struct {
		Value Secret `json:"value"`
	}
	if !readJSON(w, r, &payload) {
		return
	}
	s.store.setOrganizationSecret(r.PathValue("name"), payload.Value)
	w.WriteHeader(http.StatusNoContent)
}

// readJSON answers 400 itself. The decoder's own words are kept back: they may quote the body, and the body holds secrets.
func readJSON(w http.ResponseWriter, r *http.Request, payload any) bool {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(payload); err != nil {
		http.Error(w, "the body is not the JSON that is expected here", http.StatusBadRequest)
		return false
	}
	return true
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// The status is sent: a caller that hung up is all that can go wrong now.
	_ = json.NewEncoder(w).Encode(body)
}
