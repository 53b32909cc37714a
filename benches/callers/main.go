// Command callers is a fleet of workspaces that all start at once, and their vendors. It calls byok-gate with its Go client and obeys
// RetryAfter; the last line of its output is JSON.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	_ "github.com/byok-gate/byok-gate/clients/go/affinity"
	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// name is shared by all replicas, like a headless Service's.
const name = "gate.test"

// How a vendor may be disturbed.
const (
	hangs   = "hangs"
	limited = "429"
)

// vendor accepts every key, and counts.
type vendor struct {
	latency time.Duration
	how     string

	mu    sync.Mutex
	calls map[string]int
}

func (v *vendor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v.mu.Lock()
	v.calls[r.Header.Get("Authorization")]++
	v.mu.Unlock()
	latency := v.latency
	if v.how == hangs {
		latency = time.Hour
	}
	select {
	case <-time.After(latency):
	case <-r.Context().Done():
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if v.how == limited {
		w.WriteHeader(http.StatusTooManyRequests)
		fmt.Fprint(w, `{"error": {"code": "rate_limit_exceeded"}}`)
		return
	}
	fmt.Fprint(w, `{"data": []}`)
}

// serveNames answers every DNS query with these addresses.
func serveNames(conn net.PacketConn, gates *names) {
	packet := make([]byte, 512)
	for {
		size, from, err := conn.ReadFrom(packet)
		if err != nil {
			return
		}
		var asked dnsmessage.Message
		if asked.Unpack(packet[:size]) != nil || len(asked.Questions) != 1 {
			continue
		}
		question := asked.Questions[0]
		answer := dnsmessage.Message{
			Header:    dnsmessage.Header{ID: asked.ID, Response: true, RecursionAvailable: true},
			Questions: asked.Questions,
		}
		if question.Type == dnsmessage.TypeA && strings.HasPrefix(question.Name.String(), name) {
			for _, address := range gates.all() {
				body := &dnsmessage.AResource{}
				copy(body.A[:], net.ParseIP(address).To4())
				answer.Answers = append(answer.Answers, dnsmessage.Resource{
					Header: dnsmessage.ResourceHeader{Name: question.Name, Type: question.Type, Class: question.Class, TTL: 1}, Body: body,
				})
			}
		}
		if packed, err := answer.Pack(); err == nil {
			_, _ = conn.WriteTo(packed, from)
		}
	}
}

// told is the result of one workspace.
type told struct {
	allowed bool
	tries   int
	after   time.Duration
	code    string
}

// report is the JSON.
type report struct {
	Workspaces  int            `json:"workspaces"`
	Credentials int            `json:"credentials"`
	Allowed     int            `json:"allowed"`
	Seconds     float64        `json:"seconds"`
	Tries       float64        `json:"tries"`
	MostTries   int            `json:"most_tries"`
	Calls       int            `json:"calls"`
	CallsEach   float64        `json:"calls_each"`
	Refusals    map[string]int `json:"refusals"`
	NotAllowed  map[string]int `json:"not_allowed"`
	PlatformP50 float64        `json:"platform_p50_ms"`
	PlatformP99 float64        `json:"platform_p99_ms"`
	PlatformBad int            `json:"platform_refused"`
	Decided     []float64      `json:"decided_at"`
}

func main() {
	log.SetFlags(0)
	gates := flag.String("gates", "", "addresses of the replicas, of one port")
	port := flag.Int("port", 0, "that port")
	vendors := flag.String("vendors", "", "ports for the vendors")
	workspaces := flag.Int("workspaces", 0, "")
	credentials := flag.Int("credentials", 0, "")
	latency := flag.Duration("latency", 0, "of a vendor")
	disturbed := flag.String("disturbed", "", "what the first vendor does: hangs or 429")
	kill := flag.Int("kill", 0, "the process that is killed half way")
	balance := flag.String("balance", "organization", "organization or round-robin")
	attempts := flag.Int("attempts", 30, "of a workspace")
	rounds := flag.Int("rounds", 1, "how often the whole fleet asks")
	pause := flag.Duration("pause", 0, "between rounds")
	joins := flag.String("joins", "", "the address of a replica that is there from the middle round on")
	flag.Parse()

	fleet := &fleet{kill: *kill, half: *workspaces * *rounds / 2}
	for index, port := range strings.Split(*vendors, ",") {
		vendor := &vendor{latency: *latency, calls: map[string]int{}}
		if index == 0 {
			vendor.how = *disturbed
		}
		fleet.vendors = append(fleet.vendors, vendor)
		listener, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err != nil {
			log.Fatal(err)
		}
		go func() { log.Fatal(http.Serve(listener, vendor)) }()
	}
	names := &names{addresses: strings.Split(*gates, ",")}
	fleet.client = dial(names, *port, *balance)
	defer fleet.client.Close()

	// Connections are made first: only the burst is measured.
	if _, err := fleet.client.Decide(context.Background(), platform()); err != nil {
		log.Fatal(err)
	}
	var said report
	for round := range *rounds {
		if round > 0 {
			time.Sleep(*pause)
		}
		if round == *rounds/2 && *joins != "" {
			names.add(*joins)
			fmt.Println("joined")
		}
		said = fleet.storm(*workspaces, *credentials, *attempts).after(said)
	}
	line, err := json.Marshal(said)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(line))
}

// names are the addresses of the one name.
type names struct {
	mu        sync.Mutex
	addresses []string
}

func (n *names) add(address string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addresses = append(n.addresses, address)
}

func (n *names) all() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.addresses)
}

// after is the sum of this round and those before it; of times, the longest.
func (r report) after(before report) report {
	if before.Workspaces == 0 {
		return r
	}
	workspaces := r.Workspaces + before.Workspaces
	r.Tries = (r.Tries*float64(r.Workspaces) + before.Tries*float64(before.Workspaces)) / float64(workspaces)
	r.Workspaces, r.Allowed = workspaces, r.Allowed+before.Allowed
	r.MostTries = max(r.MostTries, before.MostTries)
	r.PlatformP50, r.PlatformP99 = max(r.PlatformP50, before.PlatformP50), max(r.PlatformP99, before.PlatformP99)
	r.PlatformBad += before.PlatformBad
	if before.Seconds > r.Seconds {
		r.Seconds, r.Decided = before.Seconds, before.Decided
	}
	for _, pair := range []struct{ to, from map[string]int }{{r.Refusals, before.Refusals}, {r.NotAllowed, before.NotAllowed}} {
		for code, many := range pair.from {
			pair.to[code] += many
		}
	}
	return r
}

func dial(gates *names, port int, balance string) *byokgate.Client {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go serveNames(conn, gates)
	// The resolver that gRPC uses.
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var dialer net.Dialer
		return dialer.DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
	options := []byokgate.Option{
		byokgate.WithInsecureNetwork(), byokgate.WithLogger(slog.New(slog.NewTextHandler(io.Discard, nil))),
	}
	if balance == "round-robin" {
		options = append(options, byokgate.WithBalancing(byokgate.RoundRobin()))
	}
	client, err := byokgate.New("dns:///"+name+":"+strconv.Itoa(port), options...)
	if err != nil {
		log.Fatal(err)
	}
	return client
}

// fleet is all of them.
type fleet struct {
	client  *byokgate.Client
	vendors []*vendor
	kill    int
	half    int

	mu       sync.Mutex
	done     int
	refusals map[string]int
}

func platform() byokgate.Request {
	return byokgate.Request{Checkpoint: byokgate.Provision, Spec: byokgate.Spec{
		OrganizationID: "organization", Runtime: "agent", Model: "platform-1", Lookup: byokgate.Static(nil, nil),
	}}
}

func (f *fleet) storm(workspaces, credentials, attempts int) report {
	f.refusals = map[string]int{}
	stop, stopped := make(chan struct{}), make(chan report)
	go func() { stopped <- f.platformModels(stop) }()
	results := make([]told, workspaces)
	var all sync.WaitGroup
	began := time.Now()
	for workspace := range workspaces {
		all.Go(func() { results[workspace] = f.start(workspace%credentials, attempts, began) })
	}
	all.Wait()
	close(stop)
	said := <-stopped
	said.Workspaces, said.Credentials, said.Refusals, said.NotAllowed = workspaces, credentials, f.refusals, map[string]int{}
	tries := 0
	for _, one := range results {
		tries += one.tries
		said.MostTries = max(said.MostTries, one.tries)
		if !one.allowed {
			said.NotAllowed[one.code]++
			continue
		}
		said.Allowed++
		said.Decided = append(said.Decided, one.after.Seconds())
	}
	slices.Sort(said.Decided)
	said.Seconds = quantile(said.Decided, 1)
	said.Decided = thinned(said.Decided, 200)
	said.Tries = float64(tries) / float64(workspaces)
	for _, vendor := range f.vendors {
		vendor.mu.Lock()
		for _, calls := range vendor.calls {
			said.Calls += calls
		}
		vendor.mu.Unlock()
	}
	said.CallsEach = float64(said.Calls) / float64(credentials)
	return said
}

// start retries for one workspace until it may start, or a retry would change nothing.
func (f *fleet) start(credential, attempts int, began time.Time) told {
	said := told{tries: 1}
	vendor := strconv.Itoa(credential % len(f.vendors))
	key := "made-up-" + strconv.Itoa(credential)
	request := byokgate.Request{Checkpoint: byokgate.Provision, Spec: byokgate.Spec{
		OrganizationID: "organization-" + strconv.Itoa(credential), Runtime: "agent", Model: "vendor-" + vendor + "/large",
		Lookup: byokgate.Static(byokgate.Found{"VENDOR_" + vendor + "_API_KEY": byokgate.NewSecret(key)}, nil),
	}}
	refused := func(refusal byokgate.Refusal) {
		f.mu.Lock()
		f.refusals[string(refusal.Code())]++
		f.mu.Unlock()
	}
	policy := byokgate.RetryPolicy{MaxAttempts: attempts, MaxPause: 5 * time.Minute, OnRefusal: func(_ int, refusal byokgate.Refusal, _ time.Duration) {
		said.tries++
		refused(refusal)
	}}
	_, err := f.client.DecideUntil(context.Background(), request, policy)
	said.after = time.Since(began)
	if said.allowed = err == nil; !said.allowed {
		refusal := byokgate.RefusalOf(err)
		refused(refusal)
		said.code = string(refusal.Code())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.done++
	if f.done == f.half && f.kill != 0 {
		_ = syscall.Kill(f.kill, syscall.SIGKILL)
	}
	return said
}

// platformModels keeps requesting decisions about a platform model, which waits for no provider.
func (f *fleet) platformModels(stop <-chan struct{}) report {
	var said report
	var took []float64
	for {
		select {
		case <-stop:
			slices.Sort(took)
			said.PlatformP50, said.PlatformP99 = quantile(took, 0.5), quantile(took, 0.99)
			return said
		case <-time.After(10 * time.Millisecond):
		}
		began := time.Now()
		if _, err := f.client.Decide(context.Background(), platform()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			said.PlatformBad++
		}
		took = append(took, float64(time.Since(began).Microseconds())/1000)
	}
}

func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// thinned keeps this many of them, including the first and the last.
func thinned(sorted []float64, many int) []float64 {
	if len(sorted) <= many {
		return sorted
	}
	kept := make([]float64, many)
	for index := range kept {
		kept[index] = sorted[index*(len(sorted)-1)/(many-1)]
	}
	return kept
}
