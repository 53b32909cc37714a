package byokgate

import (
	"context"
	"errors"
	"maps"
	"sync"
)

// SweepMemory is a [SweepStore] in memory: it does not outlive its process, so a restart reports unhealthy workspaces again.
type SweepMemory struct {
	mu      sync.Mutex
	records map[string]SweepRecord
}

var errNoMemory = errors.New("the SweepMemory is nil; NewSweepMemory makes one")

// NewSweepMemory returns an empty one.
func NewSweepMemory() *SweepMemory { return &SweepMemory{records: map[string]SweepRecord{}} }

// keep drops all others.
func (m *SweepMemory) keep(known map[string]bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.records, func(id string, _ SweepRecord) bool { return !known[id] })
}

// Load implements [SweepStore].
func (m *SweepMemory) Load(_ context.Context, workspaceID string) (SweepRecord, error) {
	if m == nil {
		return SweepRecord{}, errNoMemory
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.records[workspaceID], nil
}

// Save implements [SweepStore].
func (m *SweepMemory) Save(_ context.Context, workspaceID string, record SweepRecord) error {
	if m == nil {
		return errNoMemory
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.records == nil {
		m.records = map[string]SweepRecord{}
	}
	m.records[workspaceID] = record
	return nil
}
