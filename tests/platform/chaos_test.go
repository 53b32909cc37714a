package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

const (
	kills        = 100
	chaosCreates = 1000
	// chaosCreators are the handlers that create at a time.
	chaosCreators = 8
)

// === What must always hold ===

// allows are the allows in byok-gate's own log, by decision id, with the workspace.
func allows(t *testing.T, logs ...string) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, text := range logs {
		for line := range strings.Lines(text) {
			var event struct {
				Event       string `json:"event"`
				Outcome     string `json:"outcome"`
				DecisionID  string `json:"decision_id"`
				WorkspaceID string `json:"workspace_id"`
			}
			// A killed process may leave half a line.
			if json.Unmarshal([]byte(line), &event) == nil && event.Event == "decision" && event.Outcome == "ALLOW" {
				found[event.DecisionID] = event.WorkspaceID
			}
		}
	}
	return found
}

// unwritten is how long before a kill a decision may have been made whose line died with the process: byok-gate writes its log
// at once, or, with many lines, every 20 ms; the rest is room for a busy machine.
const unwritten = 500 * time.Millisecond

// wantRowsWithAnAllow expects, for each row, an allow for that very workspace in byok-gate's log, and that nothing was created
// with a key that is not alive. A kill may take the last moment's lines with it, and no others.
func (p *platformServer) wantRowsWithAnAllow(t *testing.T, kills []time.Time, logs ...string) int {
	t.Helper()
	allowed := allows(t, logs...)
	rows := p.rows(t)
	lost := 0
	for _, row := range rows {
		workspace, found := allowed[row.DecisionID]
		decided := decidedAt(t, row.DecisionID)
		diedWithIt := slices.ContainsFunc(kills, func(kill time.Time) bool {
			return kill.Add(-unwritten).Before(decided) && decided.Before(kill)
		})
		switch {
		case found && workspace == row.ID:
		case !found && diedWithIt:
			lost++
		default:
			t.Errorf("a row without an allow: %+v", row)
		}
		if !strings.HasPrefix(row.Name, "good") {
			t.Errorf("a row that must not be: %+v", row)
		}
	}
	// Only if it was killed between its answer and the write right after it.
	if lost > len(kills)/5 {
		t.Errorf("%d of %d rows have no line in the log", lost, len(rows))
	}
	t.Logf("%d rows, %d of them without a line in the log", len(rows), lost)
	return len(rows)
}

// decidedAt is when a decision was made: its id, a UUID of version 7, begins with that.
func decidedAt(t *testing.T, id string) time.Time {
	t.Helper()
	millis, err := strconv.ParseInt(strings.ReplaceAll(id, "-", "")[:12], 16, 64)
	if err != nil {
		t.Fatalf("%q is not a decision's id: %v", id, err)
	}
	return time.UnixMilli(millis)
}

// mixed is the nth create: a good key, a dead one and none at all take turns.
func mixed(index int) payload {
	spec := [...]payload{acme(liveKey), acme(deadKey), acme()}[index%3]
	spec.Name = fmt.Sprint([...]string{"good", "dead", "none"}[index%3], " ", index)
	return spec
}

// === byok-gate killed ===

// byok-gate is killed with SIGKILL while the platform creates in a loop, again and again.
func TestKilledWhileThePlatformCreates(t *testing.T) {
	vendor := startVendor(t, liveKey)
	address := freeAddress(t)
	logFile := filepath.Join(t.TempDir(), "byok-gate.log")
	gate := startMortalGate(t, address, vendor.url, logFile)
	server := startPlatform(t, address, byokgate.DefaultTimeout)

	// One creator measures and never pauses for long; the others keep the connection busy.
	var created, refused, done atomic.Int64
	stop := make(chan struct{})
	var creators sync.WaitGroup
	var mu sync.Mutex
	var successes []time.Time
	for creator := range chaosCreators / 2 {
		creators.Add(1)
		go func() {
			defer creators.Done()
			for index := creator; ; index += chaosCreators / 2 {
				select {
				case <-stop:
					return
				default:
				}
				got, err := server.send(t.Context(), http.MethodPost, "/workspaces", mixed(index))
				done.Add(1)
				switch {
				case err != nil:
					t.Error(err)
					return
				case got.status == http.StatusCreated:
					created.Add(1)
					mu.Lock()
					successes = append(successes, time.Now())
					mu.Unlock()
				default:
					refused.Add(1)
				}
				if got.took > byokgate.DefaultTimeout+time.Second {
					t.Errorf("a create took %v", got.took)
				}
			}
		}()
	}
	firstAfter := func(since time.Time) (time.Time, bool) {
		mu.Lock()
		defer mu.Unlock()
		place := slices.IndexFunc(successes, func(at time.Time) bool { return at.After(since) })
		if place < 0 {
			return time.Time{}, false
		}
		return successes[place], true
	}

	var recovered []time.Duration
	var killed []time.Time
	for range kills {
		eventually(t, "a create before the kill", func() bool {
			_, any := firstAfter(time.Now().Add(-time.Second))
			return any
		})
		// In the middle of one create or several.
		time.Sleep(rand.N(30 * time.Millisecond))
		gate.kill(t)
		killed = append(killed, time.Now())
		gate = startMortalGate(t, address, vendor.url, logFile)
		back := time.Now()
		var first time.Time
		for end := back.Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) {
			var any bool
			if first, any = firstAfter(back); any {
				break
			}
			if time.Now().After(end) {
				t.Fatal("no create within ten seconds of byok-gate's return")
			}
		}
		recovered = append(recovered, first.Sub(back))
	}
	close(stop)
	creators.Wait()
	gate.kill(t)
	killed = append(killed, time.Now())

	log, err := os.ReadFile(logFile)
	if err != nil {
		t.Fatal(err)
	}
	rows := server.wantRowsWithAnAllow(t, killed, string(log))
	if int64(rows) != created.Load() || rows == 0 {
		t.Errorf("%d rows for %d creates that were answered with 201", rows, created.Load())
	}
	if strings.Contains(string(log), keyMark) {
		t.Error("byok-gate logged a key")
	}
	slices.Sort(recovered)
	t.Logf("%d kills, %d creates (%d created, %d refused); from \"serving again\" to the first create: median %v, longest %v",
		kills, done.Load(), created.Load(), refused.Load(), recovered[len(recovered)/2], recovered[len(recovered)-1])
	// The client's pause before it connects again is capped at a second; the rest is room for a busy machine.
	if longest := recovered[len(recovered)-1]; longest > time.Second+2*time.Second {
		t.Errorf("the longest recovery took %v", longest)
	}
}

// === A bad network ===

// chaos is a TCP proxy with network faults.
type chaos struct {
	address string
	// Each connection goes to one of these, or to the next one where that does not listen.
	targets []string
	// calm turns the faults off.
	calm atomic.Bool

	mu     sync.Mutex
	random *rand.Rand
	open   map[net.Conn]bool
	counts map[string]int
}

// The faults, as shares of a hundred chunks in either direction. The rest passes unchanged.
var faults = []struct {
	name  string
	share int
}{{"delay", 12}, {"reset", 2}, {"half-close", 1}, {"garbage", 1}, {"truncate", 1}, {"stall", 1}}

func startChaos(t *testing.T, target string, seed uint64) *chaos {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	proxy := &chaos{
		address: listener.Addr().String(), targets: []string{target}, random: rand.New(rand.NewPCG(seed, 1)),
		open: map[net.Conn]bool{}, counts: map[string]int{},
	}
	var all sync.WaitGroup
	all.Add(1)
	go func() {
		defer all.Done()
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			all.Add(1)
			go func() {
				defer all.Done()
				proxy.join(near)
			}()
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		proxy.mu.Lock()
		for conn := range proxy.open {
			conn.Close()
		}
		proxy.mu.Unlock()
		all.Wait()
	})
	return proxy
}

// join copies in both directions until both have ended.
func (c *chaos) join(near net.Conn) {
	var far net.Conn
	c.mu.Lock()
	targets, first := c.targets, c.random.IntN(len(c.targets))
	c.mu.Unlock()
	for index := range targets {
		var err error
		if far, err = net.DialTimeout("tcp", targets[(first+index)%len(targets)], time.Second); err == nil {
			break
		}
	}
	if far == nil {
		near.Close()
		return
	}
	c.mu.Lock()
	c.open[near], c.open[far] = true, true
	c.counts["connections"]++
	c.mu.Unlock()
	var both sync.WaitGroup
	both.Add(2)
	go func() { defer both.Done(); c.pass(near, far) }()
	go func() { defer both.Done(); c.pass(far, near) }()
	both.Wait()
	c.mu.Lock()
	delete(c.open, near)
	delete(c.open, far)
	c.mu.Unlock()
	near.Close()
	far.Close()
}

// pass copies, with faults. Each fault except a delay ends the direction.
func (c *chaos) pass(from, to net.Conn) {
	chunk := make([]byte, 32*1024)
	for {
		size, err := from.Read(chunk)
		if err != nil {
			_ = to.(*net.TCPConn).CloseWrite()
			return
		}
		fault, number := c.draw()
		switch fault {
		case "delay":
			time.Sleep(time.Duration(number%50) * time.Millisecond)
		case "reset":
			for _, conn := range []net.Conn{from, to} {
				_ = conn.(*net.TCPConn).SetLinger(0)
				conn.Close()
			}
			return
		case "half-close":
			_ = to.(*net.TCPConn).CloseWrite()
			_, _ = io.Copy(io.Discard, from)
			return
		case "garbage":
			noise := make([]byte, 1+number%64)
			for index := range noise {
				noise[index] = byte(c.number())
			}
			_, _ = to.Write(noise)
		case "truncate":
			_, _ = to.Write(chunk[:size/2])
			from.Close()
			to.Close()
			return
		case "stall":
			// Nothing passes any more, without an error.
			time.Sleep(time.Second)
			from.Close()
			to.Close()
			return
		}
		if _, err := to.Write(chunk[:size]); err != nil {
			from.Close()
			return
		}
	}
}

func (c *chaos) draw() (fault string, number int) {
	if c.calm.Load() {
		return "", 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	number = c.random.IntN(1 << 20)
	share := c.random.IntN(100)
	for _, candidate := range faults {
		if share -= candidate.share; share < 0 {
			c.counts[candidate.name]++
			return candidate.name, number
		}
	}
	return "", number
}

func (c *chaos) number() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.random.IntN(256)
}

func TestCreatesOverABadNetwork(t *testing.T) {
	vendor := startVendor(t, liveKey)
	gate := startGate(t, freeAddress(t), vendor.url)
	proxy := startChaos(t, gate.address, 20)
	server := startPlatform(t, proxy.address, byokgate.DefaultTimeout)

	var next, created atomic.Int64
	var mu sync.Mutex
	statuses := map[int]int{}
	var slowest time.Duration
	var creators sync.WaitGroup
	for range chaosCreators {
		creators.Add(1)
		go func() {
			defer creators.Done()
			for {
				index := int(next.Add(1)) - 1
				if index >= chaosCreates {
					return
				}
				got, err := server.send(t.Context(), http.MethodPost, "/workspaces", mixed(index))
				if err != nil {
					t.Error(err)
					return
				}
				if got.status == http.StatusCreated {
					created.Add(1)
				}
				mu.Lock()
				statuses[got.status]++
				slowest = max(slowest, got.took)
				mu.Unlock()
			}
		}()
	}
	creators.Wait()
	proxy.calm.Store(true)
	began := time.Now()
	eventually(t, "a create once the network is good again", func() bool {
		return server.create(t, mixed(0)).status == http.StatusCreated
	})
	took := time.Since(began)
	created.Add(1)

	// Its log is complete once it has stopped.
	gate.stop(t)
	rows := server.wantRowsWithAnAllow(t, nil, gate.output.String())
	if int64(rows) != created.Load() {
		t.Errorf("%d rows for %d creates that were answered with 201", rows, created.Load())
	}
	proxy.mu.Lock()
	defer proxy.mu.Unlock()
	t.Logf("%d creates by status: %v; slowest %v; first good create after it ended: %v; the network's doing: %v",
		chaosCreates, statuses, slowest, took, proxy.counts)
	for _, fault := range faults {
		if proxy.counts[fault.name] == 0 {
			t.Errorf("the network never did a %s", fault.name)
		}
	}
	if slowest > byokgate.DefaultTimeout+time.Second {
		t.Errorf("a create took %v", slowest)
	}
	for status := range statuses {
		if !slices.Contains([]int{201, 422, 503}, status) {
			t.Errorf("%d creates with status %d", statuses[status], status)
		}
	}
}
