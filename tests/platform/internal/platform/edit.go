package platform

import (
	"context"
	"errors"
	"net/http"
	"slices"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/gatehttp"
)

// EditedBody answers a change that was saved.
type EditedBody struct {
	// Restarted are the workspaces that run with the change.
	Restarted []string `json:"restarted"`
	// Kept go on running without it: their restart was refused, and is tried again where that may help.
	Kept []string `json:"kept"`
}

// patch changes the model, the runtime or both.
func (s *Server) patch(w http.ResponseWriter, r *http.Request) {
	var asked struct {
		Runtime *string `json:"runtime"`
		Model   *string `json:"model"`
	}
	if !readJSON(w, r, &asked) {
		return
	}
	row, found := s.rowOf(w, r)
	if !found {
		return
	}
	edit := func(row *Row) {
		if asked.Runtime != nil {
			row.Runtime = *asked.Runtime
		}
		if asked.Model != nil {
			row.Model = *asked.Model
		}
	}
	edit(&row)
	request := byokgate.Request{Checkpoint: byokgate.Update, Spec: s.spec(row)}
	if _, passed := gatehttp.Decide(w, r, s.gate, request); !passed {
		return
	}
	row, err := s.store.change(r.Context(), row.ID, edit)
	if err != nil {
		s.fault(w, err)
		return
	}
	s.restart(w, r, []Row{row})
}

func (s *Server) putWorkspaceSecret(w http.ResponseWriter, r *http.Request) {
	if secret, read := readSecret(w, r); read {
		s.editSecret(w, r, byokgate.Workspace, &secret)
	}
}

func (s *Server) deleteWorkspaceSecret(w http.ResponseWriter, r *http.Request) {
	s.editSecret(w, r, byokgate.Workspace, nil)
}

func (s *Server) putOrganizationSecret(w http.ResponseWriter, r *http.Request) {
	if secret, read := readSecret(w, r); read {
		s.editSecret(w, r, byokgate.Organization, &secret)
	}
}

func (s *Server) deleteOrganizationSecret(w http.ResponseWriter, r *http.Request) {
	s.editSecret(w, r, byokgate.Organization, nil)
}

// editSecret saves a secret, or deletes it if it is nil, unless that would break a workspace; then it restarts those that it
// reaches. One batch asks for all of them.
func (s *Server) editSecret(w http.ResponseWriter, r *http.Request, scope byokgate.Scope, secret *byokgate.Secret) {
	ctx := gatehttp.Context(r)
	at := place{scope: scope, owner: r.PathValue("id"), name: r.PathValue("name")}
	rows, err := s.reachedBy(ctx, at)
	if err != nil {
		s.fault(w, err)
		return
	}
	requests := make([]byokgate.Request, len(rows))
	for index, row := range rows {
		spec := s.spec(row)
		spec.Lookup = over(spec.Lookup, scope, map[string]*byokgate.Secret{at.name: secret})
		requests[index] = byokgate.Request{Checkpoint: byokgate.Update, Spec: spec}
	}
	for _, result := range s.gate.BatchDecide(ctx, requests) {
		if _, err := result.Decision(); err != nil && isAbout(err, at.name) {
			// Nothing is saved: one workspace that it would break is enough.
			gatehttp.Refuse(w, err)
			return
		}
	}
	if secret == nil {
		err = s.store.remove(ctx, at)
	} else {
		err = s.store.put(ctx, s.store.pool, at, *secret)
	}
	if err != nil {
		s.fault(w, err)
		return
	}
	s.restart(w, r, rows)
}

// reachedBy are the workspaces that a secret reaches.
func (s *Server) reachedBy(ctx context.Context, at place) ([]Row, error) {
	if at.scope == byokgate.Organization {
		return s.store.affectedBy(ctx, at.owner, at.name)
	}
	row, err := s.store.row(ctx, at.owner)
	return []Row{row}, err
}

// isAbout says whether a refusal has to do with this secret. A workspace that is refused for another reason (its model was
// withdrawn, say) is not made worse by the change. What could not be decided or read may have to do with it.
func isAbout(err error, name string) bool {
	var denied *byokgate.Denied
	if !errors.As(err, &denied) || denied.Retryable() {
		return true
	}
	return slices.Contains(denied.Body().MissingEnv, name) || denied.Response().GetResolution().GetCredentialEnv() == name
}

// restart restarts those of the workspaces that run, and answers.
func (s *Server) restart(w http.ResponseWriter, r *http.Request, rows []Row) {
	running := slices.DeleteFunc(slices.Clone(rows), func(row Row) bool { return row.Box == "" })
	replaced, kept, err := s.startAll(gatehttp.Context(r), running)
	if err != nil {
		s.fault(w, err)
		return
	}
	writeJSON(w, http.StatusOK, EditedBody{Restarted: append([]string{}, replaced...), Kept: append([]string{}, kept...)})
}

func readSecret(w http.ResponseWriter, r *http.Request) (byokgate.Secret, bool) {
	var asked struct {
		Value byokgate.Secret `json:"value"`
	}
	if !readJSON(w, r, &asked) {
		return byokgate.Secret{}, false
	}
	if !asked.Value.Readable() {
		http.Error(w, "value: is missing", http.StatusBadRequest)
		return byokgate.Secret{}, false
	}
	return asked.Value, true
}
