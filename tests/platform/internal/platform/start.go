package platform

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"time"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/gatehttp"
)

// start starts, restarts or resumes: byok-gate treats them alike.
func (s *Server) start(w http.ResponseWriter, r *http.Request) {
	row, found := s.rowOf(w, r)
	if !found {
		return
	}
	row, err := s.startRow(r.Context(), row)
	var refusal byokgate.Refusal
	switch {
	case errors.As(err, &refusal):
		gatehttp.Refuse(w, refusal)
	case err != nil:
		s.fault(w, err)
	default:
		writeJSON(w, http.StatusOK, started(row))
	}
}

// startRow decides before anything is stopped, so that a running box keeps running if its restart is refused.
func (s *Server) startRow(ctx context.Context, row Row) (Row, error) {
	allowed, err := s.gate.Decide(ctx, s.provision(row))
	if err != nil {
		return row, s.refused(ctx, row.ID, err)
	}
	return s.replaceBox(ctx, row.ID, allowed)
}

// startAll is startRow for a fleet: one batch, and each box is replaced as soon as its own answer arrives.
func (s *Server) startAll(ctx context.Context, rows []Row) (replaced, kept []string, failure error) {
	requests := make([]byokgate.Request, len(rows))
	for index, row := range rows {
		requests[index] = s.provision(row)
	}
	for index, result := range s.gate.BatchDecide(ctx, requests) {
		id := rows[index].ID
		allowed, err := result.Decision()
		if err != nil {
			kept = append(kept, id)
			var refusal byokgate.Refusal
			if err = s.refused(ctx, id, err); !errors.As(err, &refusal) {
				return replaced, kept, err
			}
			continue
		}
		if _, err := s.replaceBox(ctx, id, allowed); err != nil {
			return replaced, kept, err
		}
		replaced = append(replaced, id)
	}
	return replaced, kept, nil
}

// provision requests a fresh result, since the key may have died after the create.
func (s *Server) provision(row Row) byokgate.Request {
	return byokgate.Request{Checkpoint: byokgate.Provision, MaxLivenessAge: byokgate.Fresh(), Spec: s.spec(row)}
}

// spec is a stored workspace.
func (s *Server) spec(row Row) byokgate.Spec {
	return byokgate.Spec{
		WorkspaceID:    row.ID,
		OrganizationID: row.OrganizationID,
		Runtime:        row.Runtime,
		Model:          row.Model,
		Lookup:         s.store.lookup(row.ID, row.OrganizationID),
	}
}

// replaceBox needs an allow to stop the old box and start a new one.
func (s *Server) replaceBox(ctx context.Context, id string, allowed byokgate.Allowed) (Row, error) {
	return s.store.change(ctx, id, func(row *Row) {
		row.Status, row.Box, row.LastError = StatusOnline, rand.Text(), ""
		row.BillingMode, row.DecisionID = string(allowed.BillingMode()), allowed.DecisionID()
	})
}

// refused records why, touches nothing else, and retries later if that may help. It returns the refusal.
func (s *Server) refused(ctx context.Context, id string, err error) error {
	var refusal byokgate.Refusal
	if !errors.As(err, &refusal) {
		return err
	}
	body := refusal.Body()
	if _, err := s.store.change(ctx, id, func(row *Row) { row.LastError = string(body.Code) + ": " + body.Error }); err != nil {
		return err
	}
	if refusal.Retryable() {
		s.startLater(id, byokgate.Pause(refusal, 1))
	}
	return refusal
}

// startLater retries a start at byok-gate's RetryAfter, as long as it is refused as retryable. Once for each workspace, even if it was
// refused several times.
func (s *Server) startLater(id string, after time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.queued[id] || s.ctx.Err() != nil {
		return
	}
	s.queued[id] = true
	s.work.Add(1)
	go func() {
		defer s.work.Done()
		select {
		case <-time.After(after):
		case <-s.ctx.Done():
			return
		}
		s.mu.Lock()
		delete(s.queued, id)
		s.mu.Unlock()
		row, err := s.store.row(s.ctx, id)
		if err == nil && row.Status != StatusPaused {
			_, err = s.startRow(s.ctx, row)
		}
		var refusal byokgate.Refusal
		if err != nil && !errors.As(err, &refusal) {
			s.log.Error("a later start failed", "workspace_id", id, "error", err.Error())
		}
	}()
}

// pause stops the box. It makes no call: a stopped box bills nobody.
func (s *Server) pause(w http.ResponseWriter, r *http.Request) {
	row, err := s.store.change(r.Context(), r.PathValue("id"), func(row *Row) { row.Status, row.Box = StatusPaused, "" })
	if err != nil {
		s.fault(w, err)
		return
	}
	writeJSON(w, http.StatusOK, row)
}
