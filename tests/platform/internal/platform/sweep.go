package platform

import (
	"context"
	"encoding/json"
	"errors"
	"iter"

	"github.com/jackc/pgx/v5"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// Sweep checks the running workspaces periodically until the context ends, and records the state of each credential. It stops none: a
// tenant whose key died is notified, and the box keeps running until it is restarted.
func (s *Server) Sweep(ctx context.Context, gate *byokgate.Client, options byokgate.SweepOptions) {
	options.Store = sweepStore{s.store}
	for change, err := range gate.Sweep(ctx, s.running, options) {
		if err != nil {
			// The sweep could not do something, or learns nothing at all: an *byokgate.Undecided says what to check.
			s.log.Error("the sweep could not do all", "error", err.Error())
			continue
		}
		s.log.Warn("a running workspace's credential changed", "workspace_id", change.Spec.WorkspaceID, "from", string(change.From),
			"to", string(change.To), "code", string(change.Code), "decision_id", change.DecisionID)
		if err := s.store.noteHealth(ctx, change.Spec.WorkspaceID, string(change.To)); err != nil {
			s.log.Error("a credential's health could not be noted", "error", err.Error())
		}
	}
}

// running lists the workspaces that have a box.
func (s *Server) running(ctx context.Context) iter.Seq2[byokgate.Spec, error] {
	return func(yield func(byokgate.Spec, error) bool) {
		rows, err := s.store.all(ctx)
		if err != nil {
			yield(byokgate.Spec{}, err)
			return
		}
		for _, row := range rows {
			if row.Box != "" && !yield(s.spec(row), nil) {
				return
			}
		}
	}
}

// sweepStore keeps a sweep's records in the database.
type sweepStore struct{ store *Store }

func (s sweepStore) Load(ctx context.Context, workspaceID string) (byokgate.SweepRecord, error) {
	var record byokgate.SweepRecord
	var text []byte
	err := s.store.pool.QueryRow(ctx, `SELECT record FROM sweep_records WHERE workspace_id = $1`, workspaceID).Scan(&text)
	if errors.Is(err, pgx.ErrNoRows) {
		return record, nil
	}
	if err != nil {
		return record, err
	}
	return record, json.Unmarshal(text, &record)
}

func (s sweepStore) Save(ctx context.Context, workspaceID string, record byokgate.SweepRecord) error {
	text, err := json.Marshal(record)
	if err != nil {
		return err
	}
	_, err = s.store.pool.Exec(ctx, `INSERT INTO sweep_records VALUES ($1, $2)
		ON CONFLICT (workspace_id) DO UPDATE SET record = EXCLUDED.record`, workspaceID, text)
	return err
}

func (s *Store) noteHealth(ctx context.Context, id, health string) error {
	_, err := s.pool.Exec(ctx, `UPDATE workspaces SET credential_health = $2 WHERE id = $1`, id, health)
	return err
}
