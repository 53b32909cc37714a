package byokgate

import (
	"context"
	"sync"
)

// SweepMemory is a [SweepStore] in memory: it does not outlive its process, so that a restart reports anew what is not well.
type SweepMemory struct {
	mu      sync.Mutex
	records map[string]SweepRecord
}

// NewSweepMemory is an empty one.
func NewSweepMemory() *SweepMemory { return &SweepMemory{records: map[string]SweepRecord{}} }

// Load implements [SweepStore].
func (m *SweepMemory) Load(_ context.Context, workspaceID string) (SweepRecord, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.records[workspaceID], nil
}

// Save implements [SweepStore].
func (m *SweepMemory) Save(_ context.Context, workspaceID string, record SweepRecord) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.records[workspaceID] = record
	return nil
}
