package platform

import (
	"context"
	"net/http"
	"slices"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/gatehttp"
)

// EditedBody answers a change that was saved.
type EditedBody struct {
	// Restarted are the workspaces that run with the change.
	Restarted []string `json:"restarted"`
	// Kept go on running without it: their restart was refused, and is retried if that may help.
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

// editSecret saves a secret, or deletes it if it is nil, unless that would break a workspace; then it restarts the affected ones.
// One batch decides for all of them.
func (s *Server) editSecret(w http.ResponseWriter, r *http.Request, scope byokgate.Scope, secret *byokgate.Secret) {
	ctx := r.Context()
	at := place{scope: scope, owner: r.PathValue("id"), name: r.PathValue("name")}
	rows, err := s.reachedBy(ctx, at)
	if err != nil {
		s.fault(w, err)
		return
	}
	requests := make([]byokgate.Request, len(rows))
	for index, row := range rows {
		spec := s.spec(row)
		spec.Lookup = byokgate.Overlay(spec.Lookup, scope, map[string]*byokgate.Secret{at.name: secret})
		requests[index] = byokgate.Request{Checkpoint: byokgate.Update, Spec: spec}
	}
	for index, result := range s.gate.BatchDecide(ctx, requests) {
		_, err := result.Decision()
		if err == nil || !byokgate.Concerns(err, at.name) {
			continue
		}
		if secret == nil {
			// A useless key may be deleted.
			requests[index].Spec.Lookup = s.spec(rows[index]).Lookup
			if _, before := s.gate.Decide(ctx, requests[index]); byokgate.MayDelete(err, before, at.name) {
				continue
			}
		}
		// Nothing is saved: one workspace that it would break is enough.
		gatehttp.Refuse(w, err)
		return
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

// reachedBy are the workspaces that a secret affects.
func (s *Server) reachedBy(ctx context.Context, at place) ([]Row, error) {
	if at.scope == byokgate.Organization {
		return s.store.affectedBy(ctx, at.owner, at.name)
	}
	row, err := s.store.row(ctx, at.owner)
	return []Row{row}, err
}

// restart restarts those of the workspaces that run, and answers.
func (s *Server) restart(w http.ResponseWriter, r *http.Request, rows []Row) {
	running := slices.DeleteFunc(slices.Clone(rows), func(row Row) bool { return row.Box == "" })
	replaced, kept, err := s.startAll(r.Context(), running)
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
