package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/tests/platform/internal/platform"
)

// Every key in these tests begins with it, so that one search shows whether a log or a body gave a key away.
const keyMark = "made-up-"

const (
	healthName = "byokgate.v1.PolicyDecisionService"
	schemaFile = "../../docs/denial-body.schema.json"
	// impatient is long enough for every answer, on a busy machine too.
	impatient = 500 * time.Millisecond
)

// === The vendor ===

// vendor is an AI provider's API as far as a liveness check sees it: it knows which keys are alive.
type vendor struct {
	url string

	mu    sync.Mutex
	live  map[string]bool
	asked map[string]int
	// storm is the status that everybody gets. Zero: the right one.
	storm int
}

func startVendor(t *testing.T, live ...string) *vendor {
	t.Helper()
	v := &vendor{live: map[string]bool{}, asked: map[string]int{}}
	for _, key := range live {
		v.live[key] = true
	}
	server := httptest.NewServer(v)
	t.Cleanup(server.Close)
	v.url = server.URL
	return v
}

func (v *vendor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/models") {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"error":{"type":"not_found_error","message":"no such path"}}`)
		return
	}
	key := r.Header.Get("x-api-key")
	if bearer, found := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); found {
		key = bearer
	}
	v.mu.Lock()
	v.asked[key]++
	live, storm := v.live[key], v.storm
	v.mu.Unlock()
	if storm != 0 {
		w.WriteHeader(storm)
		fmt.Fprint(w, `{"error":{"type":"overloaded_error","message":"not now"}}`)
		return
	}
	if !live {
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"error":{"type":"authentication_error","code":"invalid_api_key","message":"nope"}}`)
		return
	}
	fmt.Fprint(w, `{"object":"list","data":[{"id":"m"}]}`)
}

func (v *vendor) revoke(key string) { v.set(key, false) }
func (v *vendor) repair(key string) { v.set(key, true) }

// answerAll gives everybody this status, or the right one if it is zero.
func (v *vendor) answerAll(status int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.storm = status
}

func (v *vendor) set(key string, live bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.live[key] = live
}

func (v *vendor) askedWith(key string) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.asked[key]
}

// === byok-gate ===

// gateProcess is the real byok-gate.
type gateProcess struct {
	address string
	command *exec.Cmd
	output  *syncBuffer
	// ended is closed when the process has; failure is how, and only read after that.
	ended   chan struct{}
	failure error
}

// registryFor is the registry of these tests: one vendor's model and one platform model.
func registryFor(vendorURL string) string {
	return `schema_version: 1
providers:
  - name: acme
    display_name: Acme AI
    protocol: openai
    auth_mode: third_party_anthropic_compat
    base_url_template: "` + vendorURL + `/v1"
    auth_env: [ACME_API_KEY]
    model_prefix_match: "^acme[:/]"
  - name: platform
    display_name: Platform
    protocol: anthropic
    auth_mode: third_party_anthropic_compat
    auth_env: [PLATFORM_USAGE_TOKEN]
    model_prefix_match: "^platform/"
runtimes:
  agent:
    providers:
      - name: acme
        models: [acme-large]
      - name: platform
        models: [platform-small]
`
}

// startGate starts byok-gate on address and waits until it serves. It is stopped at the test's end at the latest.
func startGate(t *testing.T, address, vendorURL string) *gateProcess {
	t.Helper()
	return startGateWith(t, address, serveArguments(t, address, vendorURL)...)
}

// startGateWith is startGate with the test's own command line.
func startGateWith(t *testing.T, address string, arguments ...string) *gateProcess {
	t.Helper()
	output := &syncBuffer{}
	gate := runGate(t, address, output, arguments...)
	gate.output = output
	t.Cleanup(func() {
		gate.stop(t)
		if strings.Contains(gate.output.String(), keyMark) {
			t.Error("byok-gate printed a key")
		}
		if t.Failed() {
			t.Logf("byok-gate printed:\n%s", gate.output)
		}
	})
	gate.waitUntilServing(t)
	return gate
}

// startMortalGate starts one that may be killed at any time. It logs to the end of a file, which outlives it.
func startMortalGate(t *testing.T, address, vendorURL, logFile string) *gateProcess {
	t.Helper()
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	gate := runGate(t, address, log, serveArguments(t, address, vendorURL)...)
	t.Cleanup(func() { gate.kill(t) })
	gate.waitUntilServing(t)
	return gate
}

func serveArguments(t *testing.T, address, vendorURL string) []string {
	t.Helper()
	registry := filepath.Join(t.TempDir(), "providers.yaml")
	if err := os.WriteFile(registry, []byte(registryFor(vendorURL)), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{
		"serve", "--listen", address, "--registry", registry, "--allow-loopback-http", "--platform-proxy", "available",
	}
}

// runGate starts a process that writes to output, and waits for nothing.
func runGate(t *testing.T, address string, output io.Writer, arguments ...string) *gateProcess {
	t.Helper()
	binary := os.Getenv("BYOK_GATE_BIN")
	if binary == "" {
		t.Fatal("BYOK_GATE_BIN is not set: it names the byok-gate binary to test against (see ./run)")
	}
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("BYOK_GATE_BIN: %v", err)
	}
	gate := &gateProcess{address: address, ended: make(chan struct{})}
	gate.command = exec.Command(binary, arguments...)
	// Not this process's environment: a setting or a proxy of the machine would change the decisions.
	gate.command.Env = []string{"LC_ALL=C"}
	gate.command.Stdout, gate.command.Stderr = output, output
	if err := gate.command.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		gate.failure = gate.command.Wait()
		close(gate.ended)
	}()
	return gate
}

func (g *gateProcess) waitUntilServing(t *testing.T) {
	t.Helper()
	conn, err := grpc.NewClient(g.address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(),
		// The first attempt comes too early, and gRPC's own pause after it is a second.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1, MaxDelay: 20 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	health := healthv1.NewHealthClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	for {
		answer, err := health.Check(ctx, &healthv1.HealthCheckRequest{Service: healthName})
		if err == nil && answer.GetStatus() == healthv1.HealthCheckResponse_SERVING {
			return
		}
		select {
		case <-g.ended:
			t.Fatalf("byok-gate ended before it served: %v", g.failure)
		case <-ctx.Done():
			t.Fatalf("byok-gate does not serve: %v, %v", answer.GetStatus(), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// kill ends it without notice, if it is not ended already.
func (g *gateProcess) kill(t *testing.T) {
	t.Helper()
	_ = g.command.Process.Kill()
	<-g.ended
}

// stop stops byok-gate and expects a clean exit.
func (g *gateProcess) stop(t *testing.T) {
	t.Helper()
	select {
	case <-g.ended:
	default:
		if err := g.command.Process.Signal(syscall.SIGTERM); err != nil {
			t.Errorf("SIGTERM: %v", err)
		}
	}
	select {
	case <-g.ended:
	case <-time.After(12 * time.Second):
		_ = g.command.Process.Kill()
		<-g.ended
		t.Error("byok-gate was still there 12 s after SIGTERM")
		return
	}
	if g.failure != nil {
		t.Errorf("byok-gate ended badly: %v", g.failure)
	}
}

// freeAddress is one on which nothing listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// === The platform ===

// platformServer is the platform under test, over HTTP.
type platformServer struct {
	url    string
	schema *jsonschema.Schema
	// database is its own, for faults that only a store can have.
	database *pgxpool.Pool
	logs     *syncBuffer
	handler  *platform.Server
	gate     *byokgate.Client
}

// answer is the platform's, read in full.
type answer struct {
	status int
	header http.Header
	body   []byte
	took   time.Duration
}

type payload struct {
	OrganizationID string            `json:"organization_id"`
	Name           string            `json:"name"`
	Runtime        string            `json:"runtime"`
	Model          string            `json:"model"`
	Secrets        map[string]string `json:"secrets,omitempty"`
}

// anyVendor is the host of a vendor that a test starts, on whatever port.
const anyVendor = "127.0.0.1"

// organization is the default organization of the tests' workspaces.
const organization = "org-1"

// encryptionKey is the platform's.
var encryptionKey = []byte("made-up-encryption-key-32-bytes!")

// newDatabase is an empty one with the platform's tables, for one test.
func newDatabase(t *testing.T) *pgxpool.Pool {
	t.Helper()
	cluster := os.Getenv("PLATFORM_DATABASE")
	if cluster == "" {
		t.Fatal("PLATFORM_DATABASE is not set: it says how to reach PostgreSQL (see ./run)")
	}
	admin, err := pgx.Connect(t.Context(), cluster)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(t.Context())
	name := "test_" + strings.ToLower(rand.Text())
	if _, err := admin.Exec(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatal(err)
	}
	pool, err := pgxpool.New(t.Context(), cluster+" dbname="+name+" pool_max_conns=16")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	if _, err := pool.Exec(t.Context(), platform.Schema); err != nil {
		t.Fatal(err)
	}
	return pool
}

func startPlatform(t *testing.T, gateAddress string, timeout time.Duration) *platformServer {
	t.Helper()
	schema, err := jsonschema.NewCompiler().Compile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	logs := &syncBuffer{}
	log := slog.New(slog.NewJSONHandler(logs, nil))
	gate, err := byokgate.New(gateAddress, byokgate.WithTimeout(timeout), byokgate.WithLogger(log))
	if err != nil {
		t.Fatal(err)
	}
	vault, err := platform.NewVault(encryptionKey)
	if err != nil {
		t.Fatal(err)
	}
	database := newDatabase(t)
	handler := platform.NewServer(gate, platform.NewStore(database, vault, log), log)
	server := httptest.NewServer(handler)
	t.Cleanup(func() {
		server.Close()
		handler.Close()
		if err := gate.Close(); err != nil {
			t.Error(err)
		}
		if strings.Contains(logs.String(), keyMark) {
			t.Error("the platform logged a key")
		}
		if t.Failed() {
			t.Logf("the platform logged:\n%s", logs)
		}
	})
	return &platformServer{url: server.URL, schema: schema, database: database, logs: logs, handler: handler, gate: gate}
}

// breakStore is a fault that only a store can have.
func (p *platformServer) breakStore(t *testing.T, sql string, arguments ...any) {
	t.Helper()
	if _, err := p.database.Exec(t.Context(), sql, arguments...); err != nil {
		t.Fatal(err)
	}
}

func (p *platformServer) call(t *testing.T, method, path string, body any) answer {
	t.Helper()
	got, err := p.send(t.Context(), method, path, body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return got
}

// send checks what is true of every answer. It may run on any goroutine.
func (p *platformServer) send(ctx context.Context, method, path string, body any) (answer, error) {
	sent, err := json.Marshal(body)
	if err != nil {
		return answer{}, err
	}
	request, err := http.NewRequestWithContext(ctx, method, p.url+path, bytes.NewReader(sent))
	if err != nil {
		return answer{}, err
	}
	began := time.Now()
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	got := answer{status: response.StatusCode, header: response.Header}
	if got.body, err = io.ReadAll(response.Body); err != nil {
		return answer{}, err
	}
	got.took = time.Since(began)
	if bytes.Contains(got.body, []byte(keyMark)) {
		return answer{}, fmt.Errorf("the answer gives a key away: %s", got.body)
	}
	if got.status >= 300 && got.header.Get("Content-Type") == "application/json" {
		instance, err := jsonschema.UnmarshalJSON(bytes.NewReader(got.body))
		if err != nil {
			return answer{}, err
		}
		if err := p.schema.Validate(instance); err != nil {
			return answer{}, fmt.Errorf("a body that its schema refuses: %w\n%s", err, got.body)
		}
	}
	if hasRetryAfter := got.header.Get("Retry-After") != ""; hasRetryAfter != (got.status == http.StatusServiceUnavailable) {
		return answer{}, fmt.Errorf("status %d with Retry-After %q", got.status, got.header.Get("Retry-After"))
	}
	return got, nil
}

func (p *platformServer) create(t *testing.T, body payload) answer {
	t.Helper()
	return p.call(t, http.MethodPost, "/workspaces", body)
}

func (p *platformServer) provision(t *testing.T, id string) answer {
	t.Helper()
	return p.call(t, http.MethodPost, "/workspaces/"+id+"/provision", struct{}{})
}

func (p *platformServer) restart(t *testing.T, id string) answer {
	t.Helper()
	return p.call(t, http.MethodPost, "/workspaces/"+id+"/restart", struct{}{})
}

// setSecret writes a secret of either scope: below workspaces/ID or organizations/ID.
func (p *platformServer) setSecret(t *testing.T, owner, name, value string) answer {
	t.Helper()
	return p.call(t, http.MethodPut, "/"+owner+"/secrets/"+name, map[string]string{"value": value})
}

func (p *platformServer) deleteSecret(t *testing.T, owner, name string) answer {
	t.Helper()
	return p.call(t, http.MethodDelete, "/"+owner+"/secrets/"+name, struct{}{})
}

func (p *platformServer) patch(t *testing.T, id string, changes map[string]string) answer {
	t.Helper()
	return p.call(t, http.MethodPatch, "/workspaces/"+id, changes)
}

// setOrganizationSecret expects success.
func (p *platformServer) setOrganizationSecret(t *testing.T, name, value string) platform.EditedBody {
	t.Helper()
	return decode[platform.EditedBody](t, p.setSecret(t, "organizations/"+organization, name, value), http.StatusOK)
}

func (p *platformServer) rows(t *testing.T) []platform.Row {
	t.Helper()
	return decode[[]platform.Row](t, p.call(t, http.MethodGet, "/workspaces", nil), http.StatusOK)
}

func (p *platformServer) row(t *testing.T, id string) platform.Row {
	t.Helper()
	return decode[platform.Row](t, p.call(t, http.MethodGet, "/workspaces/"+id, nil), http.StatusOK)
}

func (p *platformServer) wantNoRow(t *testing.T) {
	t.Helper()
	if rows := p.rows(t); len(rows) != 0 {
		t.Errorf("a refused create left rows behind: %+v", rows)
	}
}

// === Expectations ===

var decisionID = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// decode expects the status and a body with no field that the type does not know.
func decode[T any](t *testing.T, got answer, status int) T {
	t.Helper()
	var body T
	if got.status != status {
		t.Fatalf("status %d, expected %d: %s", got.status, status, got.body)
	}
	decoder := json.NewDecoder(bytes.NewReader(got.body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&body); err != nil {
		t.Fatalf("%v: %s", err, got.body)
	}
	return body
}

// wantStarted expects an allow, and returns it.
func wantStarted(t *testing.T, got answer, status int, want platform.StartedBody) platform.StartedBody {
	t.Helper()
	body := decode[platform.StartedBody](t, got, status)
	if body.ID == "" || !decisionID.MatchString(body.DecisionID) {
		t.Errorf("no ids: %+v", body)
	}
	if want.ID == "" {
		want.ID = body.ID
	}
	want.DecisionID = body.DecisionID
	if body != want {
		t.Errorf("got %+v, expected %+v", body, want)
	}
	return body
}

// wantDenial expects exactly this body. Error and Remedy, which are prose, must contain the given words.
func wantDenial(t *testing.T, got answer, status int, want byokgate.Body) {
	t.Helper()
	body := decode[byokgate.Body](t, got, status)
	for _, prose := range []struct{ name, got, want string }{
		{"error", body.Error, want.Error},
		{"remedy", body.Remedy, want.Remedy},
	} {
		if prose.got == "" || !strings.Contains(prose.got, prose.want) {
			t.Errorf("%s is %q, expected it to say %q", prose.name, prose.got, prose.want)
		}
	}
	if decided := want.Code != byokgate.DecisionUnavailable; decided && !decisionID.MatchString(body.DecisionID) {
		t.Errorf("decision_id %q is no UUID of version 7", body.DecisionID)
	} else if decided {
		want.DecisionID = body.DecisionID
	}
	want.Error, want.Remedy = body.Error, body.Remedy
	if want.EndpointHost == anyVendor && strings.HasPrefix(body.EndpointHost, "127.0.0.1:") {
		want.EndpointHost = body.EndpointHost
	}
	if !reflect.DeepEqual(body, want) {
		t.Errorf("got\n%+v, expected\n%+v", body, want)
	}
}

// unavailable is the body without a decision about spec.
func unavailable(spec payload, retryable bool) byokgate.Body {
	return byokgate.Body{
		Code:              byokgate.DecisionUnavailable,
		Runtime:           spec.Runtime,
		Model:             spec.Model,
		MissingEnv:        []string{},
		BillingMode:       "UNSPECIFIED",
		Retryable:         retryable,
		AlternativeModels: []string{},
	}
}

// eventually repeats attempt until it returns done, for at most five seconds.
func eventually(t *testing.T, what string, attempt func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if attempt() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within five seconds: %s", what)
		}
	}
}

// discard is for clients whose log the test does not check.
var discard = slog.New(slog.DiscardHandler)

// syncBuffer collects output that is written by one goroutine and read by another.
type syncBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *syncBuffer) Write(written []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(written)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}
