// Package traces shows the trace of one create in a collector: the platform's own span, from its language's OpenTelemetry SDK,
// and byok-gate's spans below it, down to the provider. The receiver is the OpenTelemetry Collector's own.
package traces

import (
	"bufio"
	"context"
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
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/consumer/consumertest"
	"go.opentelemetry.io/collector/pdata/ptrace"
	"go.opentelemetry.io/collector/receiver"
	"go.opentelemetry.io/collector/receiver/otlpreceiver"
	"go.opentelemetry.io/collector/receiver/receivertest"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

const (
	key      = "made-up-key-of-a-tenant"
	service  = "byokgate.v1.PolicyDecisionService"
	registry = `schema_version: 1
providers:
  - name: acme
    display_name: Acme AI
    protocol: openai
    auth_mode: third_party_anthropic_compat
    base_url_template: "%s/v1"
    auth_env: [ACME_API_KEY]
    model_prefix_match: "^acme[:/]"
runtimes:
  agent:
    providers:
      - name: acme
        models: [acme-large]
`
	// patience is long enough for a debug build on a busy machine.
	patience = 20 * time.Second
)

// collector is the OpenTelemetry Collector's receiver for OTLP over gRPC.
type collector struct {
	address string
	sink    consumertest.TracesSink
	running receiver.Traces
}

func startCollector(t *testing.T) *collector {
	t.Helper()
	c := &collector{address: freeAddress(t)}
	factory := otlpreceiver.NewFactory()
	config := factory.CreateDefaultConfig()
	given := confmap.NewFromStringMap(map[string]any{
		"protocols": map[string]any{"grpc": map[string]any{"endpoint": c.address}},
	})
	if err := given.Unmarshal(config); err != nil {
		t.Fatal(err)
	}
	var err error
	c.running, err = factory.CreateTraces(t.Context(), receivertest.NewNopSettings(factory.Type()), config, &c.sink)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.running.Start(t.Context(), componenttest.NewNopHost()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.stop(t) })
	return c
}

func (c *collector) stop(t *testing.T) {
	t.Helper()
	if err := c.running.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
}

// seen is a span, with the name of the service that sent it.
type seen struct {
	ptrace.Span
	service string
}

// spans are those that came so far, by name.
func (c *collector) spans() map[string][]seen {
	found := map[string][]seen{}
	for _, traces := range c.sink.AllTraces() {
		for _, resource := range traces.ResourceSpans().All() {
			name, _ := resource.Resource().Attributes().Get("service.name")
			for _, scope := range resource.ScopeSpans().All() {
				for _, span := range scope.Spans().All() {
					found[span.Name()] = append(found[span.Name()], seen{span, name.AsString()})
				}
			}
		}
	}
	return found
}

func (c *collector) json(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, traces := range c.sink.AllTraces() {
		text, err := (&ptrace.JSONMarshaler{}).MarshalTraces(traces)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(append(text, '\n'))
	}
	return all.String()
}

// startGate starts byok-gate, which sends its spans to the collector, with one provider that refuses every key. Its log is read only if
// requested.
func startGate(t *testing.T, collector string, listens bool) (*byokgate.Client, *exec.Cmd) {
	t.Helper()
	vendor := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"error":{"type":"authentication_error","code":"invalid_api_key","message":"nope"}}`)
	}))
	t.Cleanup(vendor.Close)
	file := filepath.Join(t.TempDir(), "providers.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, registry, vendor.URL), 0o600); err != nil {
		t.Fatal(err)
	}
	binary := os.Getenv("BYOK_GATE_BIN")
	if binary == "" {
		t.Fatal("BYOK_GATE_BIN is not set: it names the byok-gate binary to test (see ./run)")
	}
	gate := exec.Command(binary, "serve", "--listen", "127.0.0.1:0", "--registry", file, "--allow-loopback-http", "--no-calibration")
	gate.Env = []string{
		"BYOK_GATE__TRACING__OTLP_ENDPOINT=http://" + collector,
		// Spans without a caller's trace are not checked here.
		"BYOK_GATE__TRACING__SAMPLE_RATIO=0",
		"BYOK_GATE__TRACING__EXPORT_INTERVAL=20ms",
		"BYOK_GATE__SERVER__WORKER_THREADS=1",
	}
	gate.Stderr = os.Stderr
	output, err := gate.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := gate.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = gate.Process.Kill() })
	lines := bufio.NewReader(output)
	var listening struct{ Event, Address string }
	for listening.Event != "listening" {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			t.Fatal("it ended before it listened")
		}
		_ = json.Unmarshal(line, &listening)
	}
	if listens {
		go func() { _, _ = io.Copy(io.Discard, lines) }()
	}
	trace := byokgate.WithTraceContext(func(ctx context.Context) (string, string) {
		carrier := propagation.MapCarrier{}
		propagation.TraceContext{}.Inject(ctx, carrier)
		return carrier["traceparent"], carrier["tracestate"]
	})
	client, err := byokgate.New(listening.Address, trace, byokgate.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client, gate
}

// stop stops it, and expects a clean exit in time.
func stop(t *testing.T, gate *exec.Cmd) {
	t.Helper()
	if err := gate.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- gate.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("byok-gate ended badly: %v", err)
		}
	case <-time.After(patience):
		t.Error("byok-gate does not end")
	}
}

func create() byokgate.Request {
	secrets := byokgate.Found{"ACME_API_KEY": byokgate.NewSecret(key)}
	return byokgate.Request{
		Checkpoint: byokgate.Create,
		Spec:       byokgate.Spec{Runtime: "agent", Model: "acme-large", Lookup: byokgate.Static(secrets, nil)},
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

func TestACreateIsOneTraceFromThePlatformToTheProvider(t *testing.T) {
	collector := startCollector(t)
	client, gate := startGate(t, collector.address, true)

	exporter, err := otlptracegrpc.New(t.Context(), otlptracegrpc.WithEndpoint(collector.address), otlptracegrpc.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	platform := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter))
	ctx, span := platform.Tracer("platform").Start(t.Context(), "POST /workspaces")
	if _, err := client.Decide(ctx, create()); err == nil || !strings.Contains(err.Error(), "INVALID_BYOK_CREDENTIAL") {
		t.Fatalf("%v is not the denial", err)
	}
	span.End()
	if err := platform.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	stop(t, gate)

	spans := collector.spans()
	parent := ptrace.NewSpan()
	for depth, name := range []string{"POST /workspaces", service + "/Decide", "cache", "probe", "GET"} {
		if len(spans[name]) == 0 || name != "GET" && len(spans[name]) > 1 {
			t.Fatalf("%d spans %q in\n%s", len(spans[name]), name, collector.json(t))
		}
		// A host without a row is probed with each key header, so there may be several requests.
		for _, span := range spans[name] {
			below := span.TraceID() == parent.TraceID() && span.ParentSpanID() == parent.SpanID()
			if depth > 0 && (!below || span.service != "byok-gate") {
				t.Errorf("%q of %q is not below %q in\n%s", name, span.service, parent.Name(), collector.json(t))
			}
		}
		parent = spans[name][0].Span
	}
	if strings.Contains(collector.json(t), key) {
		t.Error("a key is in a trace")
	}
	t.Logf("%s", collector.json(t))
}

// Nobody reads the log, so its pipe is full after a few hundred decisions, and half way the collector stops. No caller notices,
// although all share one of the gate's threads with the exporter.
func TestDecisionsGoOnWithoutTheCollectorAndTheLogsReader(t *testing.T) {
	const callers, calls = 16, 500
	collector := startCollector(t)
	client, gate := startGate(t, collector.address, false)
	platform := sdktrace.NewTracerProvider()
	var done atomic.Int64
	var slowest [callers]time.Duration
	var calling sync.WaitGroup
	for caller := range callers {
		calling.Go(func() {
			for range calls {
				ctx, span := platform.Tracer("platform").Start(t.Context(), "POST /workspaces")
				began := time.Now()
				_, err := client.Decide(ctx, create())
				slowest[caller] = max(slowest[caller], time.Since(began))
				span.End()
				if err == nil || !strings.Contains(err.Error(), "INVALID_BYOK_CREDENTIAL") {
					t.Errorf("%v is not the denial", err)
					return
				}
				if done.Add(1) == callers*calls/2 {
					collector.stop(t)
				}
			}
		})
	}
	calling.Wait()
	stop(t, gate)
	t.Logf("%d decisions, the slowest took %v", done.Load(), slices.Max(slowest[:]))
	if len(collector.spans()[service+"/Decide"]) == 0 {
		t.Error("nothing came while it was there")
	}
}
