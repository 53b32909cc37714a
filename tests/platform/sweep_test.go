package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// A running fleet, the real byok-gate and a vendor: a key that dies is reported once for each workspace that has it, a storm of 500s or 429s
// reports nothing, and nothing is stopped.
func TestARunningFleetIsSwept(t *testing.T) {
	const keys, workspaces = 5, 30
	key := func(index int) string { return fmt.Sprint(keyMark, "sweep-", index%keys) }
	vendor := startVendor(t)
	for index := range keys {
		vendor.repair(key(index))
	}
	// Lifetimes of a second, so that the test need not wait for half a minute.
	config := filepath.Join(t.TempDir(), "byok-gate.yaml")
	if err := os.WriteFile(config, []byte("cache: {valid: 1s, refused: 1s, inconclusive: 1s, rate_limited_max: 1s}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	address := freeAddress(t)
	gate := startGateWith(t, address, append(serveArguments(t, address, vendor.url), "--config", config)...)
	server := startPlatform(t, gate.address, byokgate.DefaultTimeout)
	boxes := map[string]string{}
	for index := range workspaces {
		row := server.online(t, key(index))
		boxes[row.ID] = row.Box
	}

	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		server.handler.Sweep(ctx, server.gate, byokgate.SweepOptions{Period: 2 * time.Second, ConfirmAfter: 1500 * time.Millisecond, Lookups: 1000})
	}()
	defer func() {
		cancel()
		<-ended
	}()
	count := func(sql string) (found int) {
		t.Helper()
		if err := server.database.QueryRow(t.Context(), sql).Scan(&found); err != nil {
			t.Fatal(err)
		}
		return found
	}
	until := func(what string, done func() bool) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); !done(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("not within 30 s: %s", what)
			}
		}
	}
	changes := func() int { return strings.Count(server.logs.String(), "a running workspace's credential changed") }
	looks := func() int { return strings.Count(gate.output.String(), `"checkpoint":"AUDIT"`) }
	// Rounds that start and end from now on: one check of each key in each. There may be no probe, since byok-gate has a breaker.
	rounds := func(number int) {
		t.Helper()
		enough := looks() + (number+1)*keys
		until(fmt.Sprint(number, " rounds"), func() bool { return looks() >= enough })
	}
	until("all are seen", func() bool { return count(`SELECT count(*) FROM sweep_records`) == workspaces })
	if changes() != 0 {
		t.Errorf("%d changes of a fleet that is well", changes())
	}

	vendor.revoke(key(0))
	until("the dead key is reported", func() bool {
		return count(`SELECT count(*) FROM workspaces WHERE credential_health = 'dead'`) == workspaces/keys
	})
	for _, storm := range []int{http.StatusInternalServerError, http.StatusTooManyRequests} {
		vendor.answerAll(storm)
		rounds(2)
		vendor.answerAll(0)
	}
	rounds(2)
	if changes() != workspaces/keys {
		t.Errorf("%d changes, expected %d: one for each workspace with the dead key", changes(), workspaces/keys)
	}
	for _, row := range server.rows(t) {
		if row.Box != boxes[row.ID] {
			t.Errorf("the sweep touched the box of %s", row.ID)
		}
	}
	vendor.repair(key(0))
	until("the repaired key is reported", func() bool {
		return count(`SELECT count(*) FROM workspaces WHERE credential_health = 'healthy'`) == workspaces/keys
	})
	if changes() != 2*workspaces/keys {
		t.Errorf("%d changes", changes())
	}
}
