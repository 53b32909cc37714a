package platform

import (
	"maps"
	"sync"
)

// A workspace's status.
const (
	StatusProvisioning = "provisioning"
	StatusOnline       = "online"
)

// Row is one workspace.
type Row struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	Runtime     string `json:"runtime"`
	Model       string `json:"model"`
	Status      string `json:"status"`
	BillingMode string `json:"billing_mode"`
	// DecisionID is that of the decision by which it may run. byok-gate's log has the reasons.
	DecisionID string `json:"decision_id"`
	// LastError is why it was last refused. Empty since it was last allowed.
	LastError string `json:"last_error"`
}

// Store holds rows and secrets in memory.
type Store struct {
	mu           sync.Mutex
	ids          []string
	rows         map[string]Row
	workspace    map[string]map[string]Secret
	organization map[string]Secret
}

// NewStore is an empty one.
func NewStore() *Store {
	return &Store{rows: map[string]Row{}, workspace: map[string]map[string]Secret{}, organization: map[string]Secret{}}
}

func (s *Store) insert(row Row, secrets map[string]Secret) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ids = append(s.ids, row.ID)
	s.rows[row.ID] = row
	s.workspace[row.ID] = maps.Clone(secrets)
}

// change returns the row as it is afterwards.
func (s *Store) change(id string, edit func(*Row)) Row {
	s.mu.Lock()
	defer s.mu.Unlock()
	row := s.rows[id]
	edit(&row)
	s.rows[id] = row
	return row
}

func (s *Store) row(id string) (Row, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	row, found := s.rows[id]
	return row, found
}

// all is in the order in which they were created.
func (s *Store) all() []Row {
	s.mu.Lock()
	defer s.mu.Unlock()
	rows := make([]Row, 0, len(s.ids))
	for _, id := range s.ids {
		rows = append(rows, s.rows[id])
	}
	return rows
}

func (s *Store) setOrganizationSecret(name string, value Secret) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.organization[name] = value
}

func (s *Store) workspaceSecrets(id string) map[string]Secret {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.workspace[id])
}

func (s *Store) organizationSecrets() map[string]Secret {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.organization)
}
