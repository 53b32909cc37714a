package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/tests/platform/internal/platform"
)

// Everything at once: three replicas, three platforms on one database, three vendors, and a fault every few hundred milliseconds, chosen
// by a seed. tests/chaos/run says what is checked.

var (
	stormFor   = flag.Duration("storm", 0, "how long TestStorm rages; 0: it is left out")
	stormSeed  = flag.Uint64("storm-seed", 0, "what it draws its faults from; 0: a new one")
	stormTier  = flag.String("storm-store", "", "a server of Redis or Valkey that the replicas share; empty: they share nothing")
	stormDisk  = flag.String("storm-disk", "", "a small file system for one replica's log, which is filled up; empty: no disk is filled")
	stormGroup = flag.String("storm-group", "", "a control group that limits one replica's memory; empty: none is limited by the kernel")
)

const (
	stormReplicas = 3
	stormKeys     = 30
	stormOrgs     = 12
	stormCreators = 6
	// perSecond and inFlight are each replica's limits towards each vendor.
	perSecond = 20
	inFlight  = 4
	// maxRSS is what a replica may hold of memory.
	maxRSS = 64 << 20
	// fewDescriptors is what the last replica may have open.
	fewDescriptors = 64
	// recovery is how soon everything works again after the faults.
	recovery = time.Minute
	// validAge is how long a VALID counts at CREATE, with room for a replica that was stopped meanwhile.
	validAge = 30*time.Second + 10*time.Second
)

// === Misbehaving vendors ===

// liar is a vendor that sometimes gives wrong answers.
type liar struct {
	name, variable, url string
	server              *httptest.Server
	untrusted           atomic.Bool
	certificates        map[bool]*tls.Certificate

	mu   sync.Mutex
	mode string
	live map[string]bool
	// accepted is when it said yes to each key.
	accepted map[string][]time.Time
	calls    []time.Time
	now, max int
	trap     string
}

// modes are a liar's faults.
var modes = []string{"401", "429", "500", "hang", "half", "page", "everyone", "closing", "reset", "redirect", "wrong certificate"}

func startLiar(t *testing.T, name string, overTLS bool, trap string, ours, others tls.Certificate) *liar {
	t.Helper()
	l := &liar{
		name: name, variable: strings.ToUpper(name) + "_API_KEY", trap: trap,
		live: map[string]bool{}, accepted: map[string][]time.Time{},
		certificates: map[bool]*tls.Certificate{false: &ours, true: &others},
	}
	l.server = httptest.NewUnstartedServer(l)
	// Its log of broken connections is not needed.
	l.server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	if overTLS {
		l.server.EnableHTTP2 = true
		l.server.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			return &tls.Config{
				Certificates: []tls.Certificate{*l.certificates[l.untrusted.Load()]}, NextProtos: []string{"h2", "http/1.1"},
			}, nil
		}}
		l.server.StartTLS()
	} else {
		l.server.Start()
	}
	l.url = l.server.URL
	t.Cleanup(func() {
		l.set("")
		l.server.CloseClientConnections()
		l.server.Close()
	})
	for index := range stormKeys {
		l.live[l.key(index)] = index%2 == 0
	}
	return l
}

func (l *liar) key(index int) string {
	return fmt.Sprintf("%s%s-canary-%04d-of-the-storm", keyMark, l.name, index)
}

// set starts a mode; none is correct behaviour.
func (l *liar) set(mode string) {
	l.mu.Lock()
	l.mode = mode
	l.mu.Unlock()
	if wrong := mode == "wrong certificate"; l.untrusted.Swap(wrong) != wrong {
		l.server.CloseClientConnections()
	}
}

func (l *liar) flip(index int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.live[l.key(index)] = !l.live[l.key(index)]
}

func (l *liar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key := r.Header.Get("x-api-key")
	if bearer, found := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); found {
		key = bearer
	}
	l.mu.Lock()
	mode, live := l.mode, l.live[key]
	l.calls = append(l.calls, time.Now())
	l.now++
	l.max = max(l.max, l.now)
	yes := mode == "everyone" || live && (mode == "" || mode == "closing" || mode == "wrong certificate")
	if yes {
		l.accepted[key] = append(l.accepted[key], time.Now())
	}
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		l.now--
		l.mu.Unlock()
	}()
	w.Header().Set("Content-Type", "application/json")
	answer := func(status int, body string) {
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}
	switch mode {
	case "401":
		answer(http.StatusUnauthorized, `{"error":{"type":"authentication_error","code":"invalid_api_key","message":"nope"}}`)
		return
	case "429":
		w.Header().Set("Retry-After", "1")
		answer(http.StatusTooManyRequests, `{"error":{"type":"rate_limit_error","message":"slow down"}}`)
		return
	case "500":
		answer(http.StatusInternalServerError, `{"error":{"type":"api_error","message":"not now"}}`)
		return
	case "hang":
		select {
		case <-r.Context().Done():
		case <-time.After(6 * time.Second):
		}
		panic(http.ErrAbortHandler)
	case "half":
		w.Header().Set("Content-Length", "1000")
		answer(http.StatusOK, `{"object":"list","data":[`)
		panic(http.ErrAbortHandler)
	case "page":
		w.Header().Set("Content-Type", "text/html")
		answer(http.StatusOK, "<html><title>Sign in</title></html>")
		return
	case "reset":
		panic(http.ErrAbortHandler)
	case "redirect":
		w.Header().Set("Location", l.trap)
		answer(http.StatusFound, "")
		return
	case "closing":
		// Each answer is the last of its connection.
		w.Header().Set("Connection", "close")
	}
	if yes {
		answer(http.StatusOK, `{"object":"list","data":[{"id":"m"}]}`)
		return
	}
	answer(http.StatusUnauthorized, `{"error":{"type":"authentication_error","code":"invalid_api_key","message":"nope"}}`)
}

// acceptedWithin is whether it said yes to the key in this time.
func (l *liar) acceptedWithin(key string, from, to time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.accepted[key], func(at time.Time) bool { return !at.Before(from) && !at.After(to) })
}

// === A replica with faults ===

type replica struct {
	number  int
	address string
	folder  string
	log     string
	// errors is its standard error.
	errors string
	// disk is the small file system that its log is on.
	disk string
	// group is the control group that limits its memory.
	group string
	// good is the valid content of its files.
	good map[string][]byte

	mu       sync.Mutex
	command  *exec.Cmd
	ended    chan struct{}
	wanted   bool
	fullDisk bool
	kills    []time.Time
	// unlogged are the times in which its log was lost.
	unlogged [][2]time.Time
	maxRSS   int
	starts   int
}

func (r *replica) file(name string) string { return filepath.Join(r.folder, name) }

// run keeps it running, as an init system does, until it is told to stop.
func (r *replica) run(t *testing.T, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		r.mu.Lock()
		if !r.wanted {
			r.mu.Unlock()
			time.Sleep(20 * time.Millisecond)
			continue
		}
		if err := r.start(); err != nil {
			r.mu.Unlock()
			t.Error(err)
			return
		}
		ended := r.ended
		r.mu.Unlock()
		<-ended
		// An invalid file ends it at once.
		time.Sleep(200 * time.Millisecond)
	}
}

func (r *replica) start() error {
	arguments := []string{
		os.Getenv("BYOK_GATE_BIN"), "serve", "--listen", r.address, "--registry", r.file("providers.yaml"), "--config", r.file("config.yaml"),
		"--tls-cert", r.file("server.pem"), "--tls-key", r.file("server.key"), "--token-file", r.file("tokens"),
		"--probe-ca-file", r.file("vendors.pem"), "--allow-loopback-http", "--platform-proxy", "available",
	}
	environment := []string{"LC_ALL=C", "RUST_BACKTRACE=0"}
	switch r.number {
	case 1:
		// Its clock is this file's: seconds beside the truth.
		environment = append(environment, "LD_PRELOAD="+os.Getenv("LIBFAKETIME"), "FAKETIME_TIMESTAMP_FILE="+r.file("clock"),
			"FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1")
	case 2:
		arguments = append([]string{"prlimit", fmt.Sprintf("--nofile=%[1]d:%[1]d", fewDescriptors)}, arguments...)
	}
	if r.group != "" {
		arguments = append([]string{"sh", "-c", `echo $$ >"$0" && exec "$@"`, filepath.Join(r.group, "cgroup.procs")}, arguments...)
	}
	name := r.log
	if r.fullDisk && r.disk == "" {
		name = "/dev/full"
	}
	log, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	errors, err := os.OpenFile(r.errors, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer errors.Close()
	command := exec.Command(arguments[0], arguments[1:]...)
	command.Env, command.Stdout, command.Stderr = environment, log, errors
	if err := command.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		_ = command.Wait()
		close(ended)
	}()
	r.command, r.ended = command, ended
	r.starts++
	return nil
}

func (r *replica) signal(signal os.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.command != nil {
		_ = r.command.Process.Signal(signal)
	}
}

// kill ends it with SIGKILL; run starts it again, if it is wanted.
func (r *replica) kill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.command == nil {
		return
	}
	_ = r.command.Process.Kill()
	<-r.ended
	r.kills = append(r.kills, time.Now())
}

func (r *replica) want(wanted bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wanted = wanted
}

// loseLog fills its disk or makes room again. Without a disk of its own, its log goes to a device that is full, or to its file again.
func (r *replica) loseLog(t *testing.T, full bool) {
	if r.disk == "" && !full {
		r.kill()
	}
	r.mu.Lock()
	if r.fullDisk = full; full {
		// Lines that were not written yet are lost too.
		r.unlogged = append(r.unlogged, [2]time.Time{time.Now().Add(-unwritten), time.Now().Add(time.Hour)})
	}
	if r.disk != "" {
		fill(t, filepath.Join(r.disk, "filler"), full)
	}
	if !full {
		r.unlogged[len(r.unlogged)-1][1] = time.Now().Add(unwritten)
	}
	r.mu.Unlock()
	if r.disk == "" && full {
		r.kill()
	}
}

// fill makes a file as large as its disk has room for, to the last byte, or removes it.
func fill(t *testing.T, path string, full bool) {
	if !full {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
		return
	}
	file, err := os.Create(path)
	if err != nil {
		t.Error(err)
		return
	}
	defer file.Close()
	for size := 1 << 20; size > 0; {
		if _, err := file.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
}

// content is a file's valid content.
func (r *replica) content(name string) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.good[name]
}

func (r *replica) heal(t *testing.T) {
	r.mu.Lock()
	good := maps.Clone(r.good)
	r.mu.Unlock()
	for name, content := range good {
		replace(t, r.file(name), content)
	}
}

func (r *replica) hasEnded() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ended
}

// replacements counts the files that were replaced.
var replacements atomic.Int64

// replace replaces a file atomically, as careful tools do.
func replace(t *testing.T, path string, content []byte) {
	// A folder may be in its place.
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		_ = os.RemoveAll(path)
	}
	// A certificate may be turned while a fault of its file ends.
	replacement := fmt.Sprintf("%s.%d.new", path, replacements.Add(1))
	if err := os.WriteFile(replacement, content, 0o600); err != nil {
		t.Error(err)
		return
	}
	if err := os.Rename(replacement, path); err != nil {
		t.Error(err)
	}
}

func (r *replica) watchMemory() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.command == nil || r.command.Process == nil {
		return
	}
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.command.Process.Pid))
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "VmRSS:" {
			size, _ := strconv.Atoi(fields[1])
			r.maxRSS = max(r.maxRSS, size<<10)
		}
	}
}

// always is a certificate that is valid for a clock a day off.
func always(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = c.NotBefore.AddDate(-5, 0, 0), c.NotAfter.AddDate(5, 0, 0)
}

// === The storm ===

// written is an answer that started a workspace.
type written struct {
	id, decision, checkpoint string
	vendor                   *liar
	key                      string
	from, to                 time.Time
}

type storm struct {
	random   *rand.Rand
	ours     *authority
	vendors  []*liar
	replicas []*replica
	networks []*chaos
	database *pgxpool.Pool
	// store is nil if the replicas share nothing.
	store *sharedStore

	mu      sync.Mutex
	counts  map[string]int
	started []written
}

func TestStorm(t *testing.T) {
	if *stormFor == 0 {
		t.Skip("tests/chaos/run runs it")
	}
	seed := *stormSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d, for %v", seed, *stormFor)
	if os.Getenv("LIBFAKETIME") == "" {
		t.Fatal("LIBFAKETIME is not set: it names libfaketime's library (see tests/chaos/run)")
	}
	s := &storm{random: rand.New(rand.NewPCG(seed, 7)), counts: map[string]int{}}
	dir := t.TempDir()
	ours, others := certify(t, dir, "ca", nil), certify(t, dir, "other-ca", nil)
	s.ours = ours
	certifyAs(t, dir, "vendor", ours, always)
	certifyAs(t, dir, "impostor", others, always)
	pair := func(name string) tls.Certificate {
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		return pair
	}
	// Nothing may arrive here: redirects are not followed.
	var trapped atomic.Int64
	trap := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { trapped.Add(1) }))
	defer trap.Close()
	for index, name := range []string{"acme", "beta", "gamma"} {
		s.vendors = append(s.vendors, startLiar(t, name, index == 1, trap.URL, pair("vendor"), pair("impostor")))
	}

	var tier string
	if *stormTier != "" {
		s.store = startStore(t, *stormTier)
		tier = s.store.settings()
	}
	stopReplicas := make(chan struct{})
	var running sync.WaitGroup
	const token = keyMark + "token-of-the-storm"
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	for number := range stormReplicas {
		r := &replica{number: number, address: freeAddress(t), folder: t.TempDir(), log: filepath.Join(dir, fmt.Sprint("gate-", number, ".log")), wanted: true}
		r.errors = r.log + ".stderr"
		switch number {
		case 0:
			r.group = *stormGroup
		case 1:
			if r.disk = *stormDisk; r.disk != "" {
				r.log = filepath.Join(r.disk, "gate.log")
			}
		}
		certifyAs(t, r.folder, "server", ours, always)
		read := func(path string) []byte {
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			return content
		}
		r.good = map[string][]byte{
			"providers.yaml": []byte(s.registry()),
			"config.yaml":    fmt.Appendf(nil, "provider_limits: {per_second: %d, in_flight: %d}\nserver: {reload_interval: 1s}\n%s", perSecond, inFlight, tier),
			"server.pem":     read(r.file("server.pem")), "server.key": read(r.file("server.key")),
			"tokens": []byte(token + "\n"), "clock": []byte("+0"), "vendors.pem": read(filepath.Join(dir, "ca.pem")),
		}
		r.heal(t)
		s.replicas = append(s.replicas, r)
		running.Add(1)
		go func() {
			defer running.Done()
			r.run(t, stopReplicas)
		}()
	}
	stop := sync.OnceFunc(func() {
		close(stopReplicas)
		for _, r := range s.replicas {
			r.signal(syscall.SIGCONT)
			r.signal(syscall.SIGKILL)
		}
		running.Wait()
	})
	t.Cleanup(stop)

	// Each platform reaches each replica through a network of its own: the client's connection goes to one, and the next one to another.
	var servers []*platformServer
	for number := range stormReplicas {
		network := startChaos(t, s.replicas[number].address, seed+uint64(number))
		network.calm.Store(true)
		network.mu.Lock()
		network.targets = nil
		for _, r := range s.replicas {
			network.targets = append(network.targets, r.address)
		}
		network.mu.Unlock()
		s.networks = append(s.networks, network)
		servers = append(servers, s.startPlatform(t, network.address, dir))
	}
	eventually(t, "a create on each platform before the storm", func() bool {
		return !slices.ContainsFunc(servers, func(server *platformServer) bool {
			return server.create(t, s.spec(0, 0, 0)).status != http.StatusCreated
		})
	})

	ctx, cancel := context.WithTimeout(t.Context(), *stormFor)
	defer cancel()
	var all sync.WaitGroup
	for creator := range stormCreators {
		all.Add(1)
		random := rand.New(rand.NewPCG(seed, uint64(100+creator)))
		go func() {
			defer all.Done()
			s.create(ctx, t, servers[creator%len(servers)], random)
		}()
	}
	all.Add(2)
	go func() {
		defer all.Done()
		s.rage(ctx, t)
	}()
	go func() {
		defer all.Done()
		for round := 0; ctx.Err() == nil; round++ {
			for _, r := range s.replicas {
				r.watchMemory()
			}
			if s.store != nil && round%25 == 0 {
				// An error is one of its own faults.
				_ = s.store.wantNoSecrets(t)
			}
			time.Sleep(200 * time.Millisecond)
		}
	}()
	all.Wait()

	// === All faults are over: everything works again within a minute ===
	healed := time.Now()
	for end := healed.Add(recovery); ; time.Sleep(100 * time.Millisecond) {
		missing := s.notYet(t, servers, dir)
		if missing == "" {
			break
		}
		if time.Now().After(end) {
			t.Errorf("not within %v of the storm: %s", recovery, missing)
			break
		}
	}
	t.Logf("as before %v after the storm", time.Since(healed).Round(time.Millisecond))
	for _, server := range servers {
		server.handler.Close()
	}
	for _, r := range s.replicas {
		r.want(false)
		r.signal(syscall.SIGTERM)
		select {
		case <-r.hasEnded():
		case <-time.After(12 * time.Second):
			t.Errorf("replica %d did not leave within 12 s of SIGTERM", r.number)
		}
	}
	stop()
	s.judge(t, servers, trapped.Load())
}

func (s *storm) registry() string {
	registry, runtimes := "schema_version: 1\nproviders:\n", "runtimes:\n  agent:\n    providers:\n"
	for _, vendor := range s.vendors {
		registry += fmt.Sprintf(`  - name: %[1]s
    display_name: %[1]s
    protocol: openai
    auth_mode: third_party_anthropic_compat
    base_url_template: "%[2]s/v1"
    auth_env: [%[3]s]
    model_prefix_match: "^%[1]s[:/]"
`, vendor.name, vendor.url, vendor.variable)
		runtimes += fmt.Sprintf("      - {name: %[1]s, models: [%[1]s-large]}\n", vendor.name)
	}
	return registry + `  - name: platform
    display_name: Platform
    protocol: anthropic
    auth_mode: third_party_anthropic_compat
    auth_env: [PLATFORM_USAGE_TOKEN]
    model_prefix_match: "^platform/"
` + runtimes + "      - {name: platform, models: [platform-small]}\n"
}

func (s *storm) startPlatform(t *testing.T, address, dir string) *platformServer {
	t.Helper()
	schema, err := jsonschema.NewCompiler().Compile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	logs := &syncBuffer{}
	log := slog.New(slog.NewJSONHandler(logs, nil))
	gate, err := byokgate.New(address, byokgate.WithLogger(log), byokgate.WithTLSFiles(filepath.Join(dir, "ca.pem"), "", ""),
		byokgate.WithTokenFile(filepath.Join(dir, "token")))
	if err != nil {
		t.Fatal(err)
	}
	vault, err := platform.NewVault(encryptionKey)
	if err != nil {
		t.Fatal(err)
	}
	if s.database == nil {
		s.database = newDatabase(t)
	}
	handler := platform.NewServer(gate, platform.NewStore(s.database, vault, log), log)
	server := httptest.NewServer(handler)
	t.Cleanup(func() {
		server.Close()
		handler.Close()
		_ = gate.Close()
	})
	return &platformServer{url: server.URL, schema: schema, database: s.database, logs: logs, handler: handler, gate: gate}
}

// spec is a create with a vendor's key. Its name says which.
func (s *storm) spec(vendor, key, organization int) payload {
	v := s.vendors[vendor]
	return payload{
		OrganizationID: fmt.Sprint("org-", organization), Name: fmt.Sprint(vendor, " ", key), Runtime: "agent", Model: v.name + "-large",
		Secrets: map[string]string{v.variable: v.key(key)},
	}
}

// create creates workspaces of all kinds, and restarts existing ones.
func (s *storm) create(ctx context.Context, t *testing.T, server *platformServer, random *rand.Rand) {
	for ctx.Err() == nil {
		vendor, key := random.IntN(len(s.vendors)), random.IntN(stormKeys)
		spec := s.spec(vendor, key, random.IntN(stormOrgs))
		path, checkpoint, body := "/workspaces", "CREATE", any(spec)
		done := written{vendor: s.vendors[vendor], key: s.vendors[vendor].key(key)}
		switch random.IntN(8) {
		case 0:
			spec.Secrets, spec.Name = nil, "none"
			body, done.vendor = spec, nil
		case 1:
			spec.Secrets, spec.Model, spec.Name = nil, "platform-small", "platform"
			body, done.vendor = spec, nil
		case 2, 3:
			if before, any := s.anyStarted(random); any {
				path, checkpoint, body = "/workspaces/"+before.id+"/provision", "PROVISION", struct{}{}
				done.vendor, done.key, done.id = before.vendor, before.key, before.id
			}
		}
		done.from, done.checkpoint = time.Now(), checkpoint
		got, err := server.send(t.Context(), http.MethodPost, path, body)
		done.to = time.Now()
		if err != nil {
			t.Error(err)
			return
		}
		if got.took > byokgate.DefaultTimeout+10*time.Second {
			t.Errorf("%s took %v", path, got.took)
		}
		var refused byokgate.Body
		_ = json.Unmarshal(got.body, &refused)
		s.count(strings.TrimSpace(fmt.Sprintf("status %d %s %.60s", got.status, refused.Code, refused.Error)))
		if got.status == http.StatusCreated || got.status == http.StatusOK {
			var answer platform.StartedBody
			if err := json.Unmarshal(got.body, &answer); err != nil {
				t.Error(err)
				return
			}
			done.id, done.decision = answer.ID, answer.DecisionID
			if spec.Name == "none" && checkpoint == "CREATE" {
				t.Errorf("created without a key: %s", got.body)
			}
			s.mu.Lock()
			s.started = append(s.started, done)
			s.mu.Unlock()
		}
		time.Sleep(time.Duration(random.IntN(60)) * time.Millisecond)
	}
}

func (s *storm) anyStarted(random *rand.Rand) (written, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.started) == 0 {
		return written{}, false
	}
	return s.started[random.IntN(len(s.started))], true
}

func (s *storm) count(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what]++
}

// rage causes faults, several at a time, until the time is over; then it repairs everything.
func (s *storm) rage(ctx context.Context, t *testing.T) {
	var healing sync.WaitGroup
	busy := map[string]bool{}
	var mu sync.Mutex
	// during causes a fault for a while, and then repairs it. There is one of a kind at a time in one place.
	during := func(place, what string, length time.Duration, begin, end func()) {
		mu.Lock()
		defer mu.Unlock()
		if busy[place] {
			return
		}
		busy[place] = true
		s.count(what)
		begin()
		healing.Add(1)
		go func() {
			defer healing.Done()
			select {
			case <-time.After(length):
			case <-ctx.Done():
			}
			end()
			mu.Lock()
			busy[place] = false
			mu.Unlock()
		}()
	}
	draw := s.random
	for ctx.Err() == nil {
		replica := s.replicas[draw.IntN(len(s.replicas))]
		vendor := s.vendors[draw.IntN(len(s.vendors))]
		network := s.networks[draw.IntN(len(s.networks))]
		mode, key := modes[draw.IntN(len(modes))], draw.IntN(stormKeys)
		length := 200*time.Millisecond + time.Duration(draw.IntN(4000))*time.Millisecond
		file := []string{"providers.yaml", "config.yaml", "server.pem", "server.key", "tokens"}[draw.IntN(5)]
		fault, wait, jump := draw.IntN(6), draw.IntN(500), 3*3600+draw.IntN(86400)
		if draw.IntN(2) == 0 {
			jump = -jump
		}
		place := fmt.Sprint("process ", replica.number)
		nothing := func() {}
		kinds := 12
		if s.store != nil {
			kinds = 14
		}
		switch draw.IntN(kinds) {
		case 12, 13:
			s.troubleStore(t, during, fault, length, draw)
		case 0:
			during(place, "kill", length/4, func() { replica.want(false); replica.kill() }, func() { replica.want(true) })
		case 1:
			during(place, "stop", length, func() { replica.signal(syscall.SIGSTOP) }, func() { replica.signal(syscall.SIGCONT) })
		case 2, 3, 4:
			during(vendor.name, "vendor "+mode, length, func() { vendor.set(mode) }, func() { vendor.set("") })
		case 5:
			during(network.address, "bad network", length, func() { network.calm.Store(false) }, func() { network.calm.Store(true) })
		case 6, 7:
			path := replica.file(file)
			during(path, "file "+fileFaults[fault], length, func() { spoil(path, replica.content(file), fileFaults[fault]) },
				func() { replace(t, path, replica.content(file)) })
		case 8:
			during(fmt.Sprint("certificate ", replica.number), "certificate turned", 0, func() { s.turn(t, replica) }, nothing)
		case 9:
			during(place, "full disk under the log", length, func() { replica.loseLog(t, true) }, func() { replica.loseLog(t, false) })
		case 10:
			clocked := s.replicas[1]
			during("clock", "clock jumped", length, func() { replace(t, clocked.file("clock"), fmt.Appendf(nil, "%+d", jump)) },
				func() { replace(t, clocked.file("clock"), []byte("+0")) })
		case 11:
			switch {
			case fault < 2:
				s.count("key flipped")
				vendor.flip(key)
			case fault < 4:
				s.count("database connections cut")
				_, _ = s.database.Exec(context.Background(),
					"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
			default:
				var idle []net.Conn
				during(fmt.Sprint("idle ", replica.number), "a hundred idle connections", length, func() {
					for range 100 {
						if conn, err := net.DialTimeout("tcp", replica.address, time.Second); err == nil {
							idle = append(idle, conn)
						}
					}
				}, func() {
					for _, conn := range idle {
						conn.Close()
					}
				})
			}
		}
		time.Sleep(time.Duration(wait) * time.Millisecond)
	}
	healing.Wait()
	for _, r := range s.replicas {
		r.heal(t)
	}
}

// troubleStore causes a fault of the store that the replicas share.
func (s *storm) troubleStore(
	t *testing.T, during func(place, what string, length time.Duration, begin, end func()), fault int, length time.Duration, draw *rand.Rand,
) {
	store := s.store
	name := slices.Sorted(maps.Keys(storeFaults))[draw.IntN(len(storeFaults))]
	switch fault {
	case 0:
		during("store", "store killed", length, store.kill, func() { store.start(t) })
	case 1:
		during("store", "store stopped", length, func() { store.signal(syscall.SIGSTOP) }, func() { store.signal(syscall.SIGCONT) })
	default:
		does := func(command []string) {
			if command == nil {
				return
			}
			if err := store.does(command...); err != nil {
				t.Errorf("the store: %v", err)
			}
		}
		during("store", "store "+name, length, func() { does(storeFaults[name][0]) }, func() { does(storeFaults[name][1]) })
	}
}

// fileFaults are faults of files: a full disk leaves an empty one, an interrupted copy a truncated one.
var fileFaults = []string{"emptied", "torn", "garbage", "gone", "a folder", "not text"}

func spoil(path string, good []byte, how string) {
	switch how {
	case "emptied":
		_ = os.Truncate(path, 0)
	case "torn":
		_ = os.WriteFile(path, good[:len(good)/2], 0o600)
	case "garbage":
		_ = os.WriteFile(path, []byte("{{ not what it was }} ["), 0o600)
	case "gone":
		_ = os.Remove(path)
	case "a folder":
		_ = os.Remove(path)
		_ = os.Mkdir(path, 0o700)
	case "not text":
		_ = os.WriteFile(path, bytes.Repeat([]byte{0xff, 0}, 4096), 0o600)
	}
}

// turn gives a replica another certificate with another key, one file after the other.
func (s *storm) turn(t *testing.T, r *replica) {
	// The moment between the two is the fault.
	dir := t.TempDir()
	certifyAs(t, dir, "server", s.ours, always)
	for _, name := range []string{"server.pem", "server.key"} {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
			return
		}
		r.mu.Lock()
		r.good[name] = content
		r.mu.Unlock()
		replace(t, r.file(name), content)
		time.Sleep(20 * time.Millisecond)
	}
}

// notYet says what is still wrong.
func (s *storm) notYet(t *testing.T, servers []*platformServer, dir string) string {
	for index, server := range servers {
		for vendor := range s.vendors {
			live, dead := s.aKey(vendor, true), s.aKey(vendor, false)
			if got, err := server.send(t.Context(), http.MethodPost, "/workspaces", s.spec(vendor, live, 0)); err != nil || got.status != http.StatusCreated {
				return fmt.Sprintf("platform %d: a good key of %s: %d %s %v", index, s.vendors[vendor].name, got.status, got.body, err)
			}
			if got, err := server.send(t.Context(), http.MethodPost, "/workspaces", s.spec(vendor, dead, 0)); err != nil || got.status != 422 {
				return fmt.Sprintf("platform %d: a dead key of %s: %d %s %v", index, s.vendors[vendor].name, got.status, got.body, err)
			}
		}
	}
	for _, r := range s.replicas {
		client, err := byokgate.New(r.address, byokgate.WithLogger(discard), byokgate.WithTLSFiles(filepath.Join(dir, "ca.pem"), "", ""),
			byokgate.WithTokenFile(filepath.Join(dir, "token")))
		if err != nil {
			return err.Error()
		}
		status, err := client.RegistryStatus(t.Context())
		_ = client.Close()
		if err != nil {
			return fmt.Sprintf("replica %d: %v", r.number, err)
		}
		if status.LastReloadError != "" {
			return fmt.Sprintf("replica %d: %v", r.number, status.LastReloadError)
		}
	}
	return ""
}

// aKey is a live or a dead key.
func (s *storm) aKey(vendor int, live bool) int {
	v := s.vendors[vendor]
	v.mu.Lock()
	defer v.mu.Unlock()
	for index := range stormKeys {
		if v.live[v.key(index)] == live {
			return index
		}
	}
	return 0
}

// === What must hold afterwards ===

type stormEvent struct {
	Event       string   `json:"event"`
	Outcome     string   `json:"outcome"`
	DecisionID  string   `json:"decision_id"`
	WorkspaceID string   `json:"workspace_id"`
	Checkpoint  string   `json:"checkpoint"`
	Verdict     string   `json:"verdict"`
	ServedFrom  string   `json:"served_from"`
	Warnings    []string `json:"warnings"`
	Model       string   `json:"model"`
	Billing     string   `json:"billing_mode"`
}

// unverified are the verdicts that policy allows, with a warning.
var unverified = []string{"RATE_LIMITED", "PROVIDER_ERROR", "UNEXPECTED_RESPONSE", "QUOTA_EXHAUSTED", "NOT_CALIBRATED"}

func (s *storm) judge(t *testing.T, servers []*platformServer, trapped int64) {
	t.Helper()
	began := time.Now().Add(-*stormFor - 2*recovery)
	events := map[string]stormEvent{}
	for _, r := range s.replicas {
		told := 0
		for _, name := range []string{r.log, r.errors} {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(text, []byte(keyMark)) {
				t.Errorf("%s gives a credential or a token away", filepath.Base(name))
			}
			if at := bytes.Index(text, []byte("panicked")); at >= 0 {
				t.Errorf("%s: a panic: %.300s", filepath.Base(name), text[at:])
			}
			for line := range bytes.Lines(text) {
				var event stormEvent
				if json.Unmarshal(line, &event) != nil {
					continue
				}
				switch event.Event {
				case "decision":
					events[event.DecisionID] = event
				case "log_lines_dropped":
					told++
				}
			}
		}
		// A process that is killed while its disk is full can tell nobody.
		if filled := len(r.unlogged); r.disk != "" && filled > 3 {
			t.Logf("replica %d: its disk was full %d times, and it said %d times that lines were lost", r.number, filled, told)
			if told < filled/4 {
				t.Errorf("replica %d said %d times that lines were lost", r.number, told)
			}
		}
	}
	excused := func(from, to time.Time) bool {
		for _, r := range s.replicas {
			if slices.ContainsFunc(r.kills, func(at time.Time) bool { return at.After(from.Add(-unwritten)) && at.Before(to.Add(unwritten)) }) ||
				slices.ContainsFunc(r.unlogged, func(span [2]time.Time) bool { return span[1].After(from) && span[0].Before(to) }) {
				return true
			}
		}
		return false
	}
	var verified, warned, lost int
	ids := map[string]written{}
	for _, done := range s.started {
		ids[done.decision] = done
		event, found := events[done.decision]
		switch {
		case !found && excused(done.from, done.to):
			lost++
			continue
		case !found:
			t.Errorf("started without a line in any log: %+v", done)
			continue
		case event.Outcome != "ALLOW" || event.WorkspaceID != done.id:
			t.Errorf("started by %+v: %+v", event, done)
			continue
		}
		if done.vendor == nil {
			if event.Model != "platform-small" || event.Billing != "PLATFORM_MANAGED" {
				t.Errorf("started without a key: %+v", event)
			}
			continue
		}
		if event.Billing != "BYOK" {
			t.Errorf("a vendor's model is billed to another: %+v", event)
		}
		// What was accepted before, and how long ago at most.
		from := began
		if done.checkpoint == "CREATE" {
			from = done.from.Add(-validAge)
		}
		switch {
		case event.Verdict == "VALID":
			verified++
			if !done.vendor.acceptedWithin(done.key, from, done.to) {
				t.Errorf("VALID, and the vendor has not accepted it: %+v %+v", event, done)
			}
		case slices.Contains(unverified, event.Verdict) && len(event.Warnings) > 0:
			warned++
		default:
			t.Errorf("an allow that policy does not give: %+v %+v", event, done)
		}
	}
	// Rows, and those that a platform started by itself since.
	rows, err := s.database.Query(context.Background(), "SELECT id, name, decision_id FROM workspaces")
	if err != nil {
		t.Fatal(err)
	}
	total, unlogged := 0, 0
	for rows.Next() {
		var id, name, decision string
		if err := rows.Scan(&id, &name, &decision); err != nil {
			t.Fatal(err)
		}
		total++
		event, found := events[decision]
		if _, known := ids[decision]; !found && !known {
			unlogged++
			if at := decidedAt(t, decision); time.Since(at).Abs() < 2*time.Hour && !excused(at, at) {
				t.Errorf("a row without an allow in any log: %s %s %s", id, name, decision)
			}
		}
		if found && (event.Outcome != "ALLOW" || event.WorkspaceID != id) {
			t.Errorf("a row by %+v: %s %s", event, id, name)
		}
		if name == "none" {
			t.Errorf("a row without a key: %s", id)
		}
	}
	rows.Close()
	kills := 0
	for _, r := range s.replicas {
		kills += len(r.kills)
		t.Logf("replica %d: %d starts, %d kills, at most %d MiB", r.number, r.starts, len(r.kills), r.maxRSS>>20)
		if r.maxRSS > maxRSS {
			t.Errorf("replica %d held %d MiB", r.number, r.maxRSS>>20)
		}
		r.wantNeverOutOfMemory(t)
	}
	for _, server := range servers {
		if strings.Contains(server.logs.String(), keyMark) {
			t.Error("a platform logged a key")
		}
	}
	if s.store != nil {
		s.store.wantShared(t)
	}
	if trapped > 0 {
		t.Errorf("%d requests followed a redirect", trapped)
	}
	for _, vendor := range s.vendors {
		vendor.wantWithinLimits(t, kills)
	}
	for _, what := range slices.Sorted(maps.Keys(s.counts)) {
		t.Logf("%5d %s", s.counts[what], what)
	}
	t.Logf("%d started: %d verified, %d warned, %d whose line died with a process; %d rows, %d of them by decisions of which only the row is left",
		len(s.started), verified, warned, lost, total, unlogged)
	if verified == 0 || warned == 0 {
		t.Errorf("a storm in which nothing happened: %d verified, %d warned", verified, warned)
	}
}

// wantNeverOutOfMemory expects that the kernel never killed it for its memory.
func (r *replica) wantNeverOutOfMemory(t *testing.T) {
	if r.group == "" {
		return
	}
	// The names of cgroup 1 and 2.
	for _, name := range []string{"memory.oom_control", "memory.events"} {
		text, err := os.ReadFile(filepath.Join(r.group, name))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) == 2 && fields[0] == "oom_kill" {
				t.Logf("replica %d: killed %s times by the kernel for its memory", r.number, fields[1])
				if fields[1] != "0" {
					t.Errorf("replica %d was out of memory %s times", r.number, fields[1])
				}
				return
			}
		}
	}
	t.Errorf("%s does not say how often its memory was not enough", r.group)
}

// wantWithinLimits expects no more calls than all replicas together may make, each anew after a kill.
func (l *liar) wantWithinLimits(t *testing.T, kills int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	// A probe is one call in the header of the client, one in the others after a refusal, and what tells two headers apart.
	const callsOfAProbe, window = 4, 10
	most := 0
	for from, to := 0, 0; to < len(l.calls); to++ {
		for l.calls[to].Sub(l.calls[from]) > window*time.Second {
			from++
		}
		most = max(most, to-from+1)
	}
	// A restarted replica gets its first second's calls again: in ten seconds a replica starts a few times at most.
	limit := callsOfAProbe * perSecond * stormReplicas * (window + 4)
	if most > limit {
		t.Errorf("%s was called %d times in %d s; all replicas together may %d times", l.name, most, window, limit)
	}
	// In addition to each replica's probes: one made-up key, and calls of a killed replica that have not ended yet.
	if atOnce := 2 * stormReplicas * (inFlight + 2); l.max > atOnce {
		t.Errorf("%s had %d calls at once; all replicas together may have %d", l.name, l.max, atOnce)
	}
	t.Logf("%s: %d calls, at most %d in %d s and %d at once", l.name, len(l.calls), most, window, l.max)
}
