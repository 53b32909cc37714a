package platform

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// Schema makes the tables.
//
//go:embed schema.sql
var Schema string

// A workspace's status.
const (
	StatusProvisioning = "provisioning"
	StatusOnline       = "online"
	StatusPaused       = "paused"
)

// Row is one workspace.
type Row struct {
	ID             string `json:"id"`
	OrganizationID string `json:"organization_id"`
	Name           string `json:"name"`
	Runtime        string `json:"runtime"`
	Model          string `json:"model"`
	Status         string `json:"status"`
	BillingMode    string `json:"billing_mode"`
	DecisionID     string `json:"decision_id"`
	Box            string `json:"box"`
	LastError      string `json:"last_error"`
}

// Store keeps workspaces and their secrets in PostgreSQL.
type Store struct {
	pool  *pgxpool.Pool
	vault *Vault
	log   *slog.Logger
}

// errNoRow says that there is no such workspace.
var errNoRow = errors.New("no such workspace")

// NewStore works on a database that has the Schema.
func NewStore(pool *pgxpool.Pool, vault *Vault, log *slog.Logger) *Store {
	return &Store{pool: pool, vault: vault, log: log}
}

const columns = `id, organization_id, name, runtime, model, status, billing_mode, decision_id, box, last_error`

// insert writes the row and its secrets, or neither.
func (s *Store) insert(ctx context.Context, row Row, secrets byokgate.Found) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO workspaces (`+columns+`) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)`,
			row.ID, row.OrganizationID, row.Name, row.Runtime, row.Model, row.Status, row.BillingMode, row.DecisionID, row.Box,
			row.LastError)
		for name, secret := range secrets {
			if err != nil {
				break
			}
			err = s.put(ctx, tx, place{byokgate.Workspace, row.ID, name}, secret)
		}
		return err
	})
}

// change returns the row as it is afterwards. Nobody else changes it in between.
func (s *Store) change(ctx context.Context, id string, edit func(*Row)) (Row, error) {
	var row Row
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		var err error
		if row, err = one(ctx, tx, `SELECT `+columns+` FROM workspaces WHERE id = $1 FOR UPDATE`, id); err != nil {
			return err
		}
		edit(&row)
		_, err = tx.Exec(ctx, `UPDATE workspaces SET runtime = $2, model = $3, status = $4, billing_mode = $5, decision_id = $6,
			box = $7, last_error = $8 WHERE id = $1`,
			row.ID, row.Runtime, row.Model, row.Status, row.BillingMode, row.DecisionID, row.Box, row.LastError)
		return err
	})
	return row, err
}

func (s *Store) row(ctx context.Context, id string) (Row, error) {
	return one(ctx, s.pool, `SELECT `+columns+` FROM workspaces WHERE id = $1`, id)
}

// all is in the order in which they were created.
func (s *Store) all(ctx context.Context) ([]Row, error) {
	return many(ctx, s.pool, `SELECT `+columns+` FROM workspaces ORDER BY seq`)
}

// affectedBy are the organization's workspaces that have no secret of that name of their own.
func (s *Store) affectedBy(ctx context.Context, organization, name string) ([]Row, error) {
	return many(ctx, s.pool, `SELECT `+columns+` FROM workspaces WHERE organization_id = $1 AND NOT EXISTS (
		SELECT FROM workspace_secrets WHERE workspace_id = workspaces.id AND workspace_secrets.name = $2) ORDER BY seq`,
		organization, name)
}

// === Secrets ===

// executor is a pool or a transaction.
type executor interface {
	Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error)
}

var (
	upsert = map[byokgate.Scope]string{
		byokgate.Workspace: `INSERT INTO workspace_secrets VALUES ($1, $2, $3)
			ON CONFLICT (workspace_id, name) DO UPDATE SET encrypted_value = EXCLUDED.encrypted_value`,
		byokgate.Organization: `INSERT INTO organization_secrets VALUES ($1, $2, $3)
			ON CONFLICT (organization_id, name) DO UPDATE SET encrypted_value = EXCLUDED.encrypted_value`,
	}
	remove = map[byokgate.Scope]string{
		byokgate.Workspace:    `DELETE FROM workspace_secrets WHERE workspace_id = $1 AND name = $2`,
		byokgate.Organization: `DELETE FROM organization_secrets WHERE organization_id = $1 AND name = $2`,
	}
	fetch = map[byokgate.Scope]string{
		byokgate.Workspace:    `SELECT name, encrypted_value FROM workspace_secrets WHERE workspace_id = $1 AND name = ANY($2)`,
		byokgate.Organization: `SELECT name, encrypted_value FROM organization_secrets WHERE organization_id = $1 AND name = ANY($2)`,
	}
)

func (s *Store) put(ctx context.Context, on executor, at place, secret byokgate.Secret) error {
	_, err := on.Exec(ctx, upsert[at.scope], at.owner, at.name, s.vault.seal(at, secret))
	return err
}

func (s *Store) remove(ctx context.Context, at place) error {
	_, err := s.pool.Exec(ctx, remove[at.scope], at.owner, at.name)
	return err
}

// lookup is what byok-gate's client calls for the names that matter. A failed query fails the lookup; a row that does not decrypt is
// unreadable. Neither means "no secret".
func (s *Store) lookup(workspace, organization string) byokgate.Lookup {
	owners := map[byokgate.Scope]string{byokgate.Workspace: workspace, byokgate.Organization: organization}
	return func(ctx context.Context, scope byokgate.Scope, names []string) (byokgate.Found, error) {
		owner := owners[scope]
		rows, err := s.pool.Query(ctx, fetch[scope], owner, names)
		if err != nil {
			return nil, err
		}
		found := byokgate.Found{}
		var name string
		var sealed []byte
		_, err = pgx.ForEachRow(rows, []any{&name, &sealed}, func() error {
			secret, err := s.vault.open(place{scope, owner, name}, sealed)
			if err != nil {
				s.log.Error("a secret does not decrypt", "scope", scope.String(), "owner", owner, "name", name)
			}
			found[name] = secret
			return nil
		})
		return found, err
	}
}

// === Rows ===

// queryer is a pool or a transaction.
type queryer interface {
	Query(ctx context.Context, sql string, arguments ...any) (pgx.Rows, error)
}

func many(ctx context.Context, on queryer, sql string, arguments ...any) ([]Row, error) {
	rows, err := on.Query(ctx, sql, arguments...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Row])
}

func one(ctx context.Context, on queryer, sql string, arguments ...any) (Row, error) {
	rows, err := many(ctx, on, sql, arguments...)
	if err != nil {
		return Row{}, err
	}
	if len(rows) != 1 {
		return Row{}, fmt.Errorf("%w: %q", errNoRow, arguments)
	}
	return rows[0], nil
}
