package affinity

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

const (
	name          = "gate.test"
	organizations = 200
)

// === A name server with one name ===

// nameServer answers with the addresses that were set last.
type nameServer struct {
	mu        sync.Mutex
	addresses []string
}

var names = &nameServer{}

func (n *nameServer) tell(addresses ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addresses = addresses
}

func (n *nameServer) serve(conn net.PacketConn) {
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
		if !strings.HasPrefix(question.Name.String(), name+".") {
			answer.RCode = dnsmessage.RCodeNameError
		} else if question.Type == dnsmessage.TypeA {
			n.mu.Lock()
			for _, address := range n.addresses {
				body := &dnsmessage.AResource{}
				copy(body.A[:], net.ParseIP(address).To4())
				answer.Answers = append(answer.Answers, dnsmessage.Resource{
					Header: dnsmessage.ResourceHeader{Name: question.Name, Type: question.Type, Class: question.Class, TTL: 1}, Body: body,
				})
			}
			n.mu.Unlock()
		}
		if packed, err := answer.Pack(); err == nil {
			_, _ = conn.WriteTo(packed, from)
		}
	}
}

func TestMain(m *testing.M) {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go names.serve(conn)
	// The resolver that gRPC uses.
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var dialer net.Dialer
		return dialer.DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
	code := m.Run()
	conn.Close()
	os.Exit(code)
}

// === Replicas ===

// replica counts who asked it.
type replica struct {
	byokgatev1.UnimplementedPolicyDecisionServiceServer
	address string
	server  *grpc.Server

	mu    sync.Mutex
	asked map[string]int
	lanes map[string]bool
}

func (r *replica) ResolveProvider(
	context.Context, *byokgatev1.ResolveProviderRequest,
) (*byokgatev1.ResolveProviderResponse, error) {
	return &byokgatev1.ResolveProviderResponse{
		Result: &byokgatev1.ResolveProviderResponse_Resolution{Resolution: &byokgatev1.Resolution{
			Source: byokgatev1.ResolutionSource_RESOLUTION_SOURCE_DERIVED, MatchedBy: byokgatev1.MatchedBy_MATCHED_BY_EXACT_MODEL,
		}},
		RegistryRevision: "r1",
	}, nil
}

func (r *replica) note(ctx context.Context, request *byokgatev1.DecideRequest) *byokgatev1.DecideResponse {
	sent, _ := metadata.FromIncomingContext(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked[request.GetWorkspaceSpec().GetOrganizationId()]++
	for _, lane := range sent.Get(byokgate.AffinityHeader) {
		r.lanes[lane] = true
	}
	const mode = byokgatev1.BillingMode_BILLING_MODE_PLATFORM_MANAGED
	return &byokgatev1.DecideResponse{
		DecisionId: "d", Decision: &byokgatev1.DecideResponse_Allow{Allow: &byokgatev1.Allow{BillingMode: mode}},
		Resolution: &byokgatev1.Resolution{BillingMode: mode}, RegistryRevision: "r1",
	}
}

func (r *replica) Decide(ctx context.Context, request *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
	return r.note(ctx, request), nil
}

func (r *replica) BatchDecide(
	request *byokgatev1.BatchDecideRequest, stream grpc.ServerStreamingServer[byokgatev1.BatchDecideResponse],
) error {
	for index, one := range request.GetRequests() {
		reply := &byokgatev1.BatchDecideResponse{
			Index: uint32(index), Result: &byokgatev1.BatchDecideResponse_Response{Response: r.note(stream.Context(), one)},
		}
		if err := stream.Send(reply); err != nil {
			return err
		}
	}
	return nil
}

// startReplicas listens on addresses of loopback, all on one port, and tells the name server.
func startReplicas(t *testing.T, count int) (replicas []*replica, target string) {
	t.Helper()
	var addresses []string
	port := "0"
	for index := range count {
		address := "127.0.0." + strconv.Itoa(10+index)
		listener, err := net.Listen("tcp", net.JoinHostPort(address, port))
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ = net.SplitHostPort(listener.Addr().String())
		made := &replica{address: address, server: grpc.NewServer(), asked: map[string]int{}, lanes: map[string]bool{}}
		byokgatev1.RegisterPolicyDecisionServiceServer(made.server, made)
		go func() { _ = made.server.Serve(listener) }()
		t.Cleanup(made.server.Stop)
		replicas, addresses = append(replicas, made), append(addresses, address)
	}
	names.tell(addresses...)
	return replicas, "dns:///" + net.JoinHostPort(name, port)
}

func dial(t *testing.T, target string, options ...byokgate.Option) *byokgate.Client {
	t.Helper()
	options = append(options, byokgate.WithInsecureNetwork(), byokgate.WithLogger(slog.New(slog.NewTextHandler(io.Discard, nil))))
	client, err := byokgate.New(target, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func about(organization string) byokgate.Request {
	return byokgate.Request{Checkpoint: byokgate.Provision, Spec: byokgate.Spec{
		OrganizationID: organization, Runtime: "agent", Model: "m", Lookup: byokgate.Static(nil, nil),
	}}
}

func organizationOf(index int) string { return "organization-" + strconv.Itoa(index) }

// askForAll asks for each organization, one by one and in a batch.
func askForAll(t *testing.T, client *byokgate.Client) {
	t.Helper()
	var requests []byokgate.Request
	for index := range organizations {
		requests = append(requests, about(organizationOf(index)))
		if _, err := client.Decide(t.Context(), requests[index]); err != nil {
			t.Fatal(err)
		}
	}
	for _, result := range client.BatchDecide(t.Context(), requests) {
		if _, err := result.Decision(); err != nil {
			t.Fatal(err)
		}
	}
}

// homes are the replicas that each organization called, by index. More than one is an error.
func homes(t *testing.T, replicas []*replica) map[string]int {
	t.Helper()
	found := map[string]int{}
	for place, replica := range replicas {
		replica.mu.Lock()
		for organization := range replica.asked {
			if before, twice := found[organization]; twice {
				t.Errorf("%s asked the replicas %d and %d", organization, before, place)
			}
			found[organization] = place
		}
		replica.asked = map[string]int{}
		replica.mu.Unlock()
	}
	return found
}

func TestAnOrganizationAsksOneReplica(t *testing.T) {
	for what, options := range map[string][]byokgate.Option{
		"by default": nil,
		"with a key": {byokgate.WithBalancing(byokgate.ByOrganization(byokgate.NewSecret("made-up-key")))},
	} {
		t.Run(what, func(t *testing.T) {
			replicas, target := startReplicas(t, 5)
			askForAll(t, dial(t, target, options...))
			// Another process agrees.
			askForAll(t, dial(t, target, options...))
			before := homes(t, replicas)
			if len(before) != organizations {
				t.Fatalf("%d organizations asked", len(before))
			}
			shares := make([]int, len(replicas))
			for _, place := range before {
				shares[place]++
			}
			if slices.Min(shares) < organizations/20 {
				t.Errorf("shares of %v", shares)
			}
			for _, replica := range replicas {
				for lane := range replica.lanes {
					if len(lane) != 3 || strings.Trim(lane, "0123456789abcdef") != "" {
						t.Errorf("lane %q", lane)
					}
				}
			}

			// One is lost: its organizations move, and no others. Nobody is refused.
			client := dial(t, target, options...)
			askForAll(t, client)
			homes(t, replicas)
			replicas[2].server.Stop()
			askForAll(t, client)
			after := homes(t, replicas)
			moved := 0
			for organization, place := range before {
				if after[organization] != place {
					moved++
					if place != 2 {
						t.Errorf("%s moved from %d to %d, which were not lost", organization, place, after[organization])
					}
				}
			}
			if moved != shares[2] {
				t.Errorf("%d moved, expected %d", moved, shares[2])
			}
		})
	}
}

func TestTheOtherWaysToBalance(t *testing.T) {
	for what, test := range map[string]struct {
		balancing byokgate.Balancing
		asked     int
	}{"round robin": {byokgate.RoundRobin(), 3}, "one connection": {byokgate.OneConnection(), 1}} {
		t.Run(what, func(t *testing.T) {
			replicas, target := startReplicas(t, 3)
			client := dial(t, target, byokgate.WithBalancing(test.balancing))
			// A round robin is over those that are connected.
			for end := time.Now().Add(10 * time.Second); ; {
				if _, err := client.Decide(t.Context(), about("organization")); err != nil {
					t.Fatal(err)
				}
				asked := 0
				for _, replica := range replicas {
					replica.mu.Lock()
					if asked += min(1, len(replica.asked)); len(replica.lanes) > 0 {
						t.Error("marked with a lane although nothing hashes on it")
					}
					replica.mu.Unlock()
				}
				if asked > test.asked {
					t.Fatalf("%d replicas were asked", asked)
				}
				if asked == test.asked {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("%d replicas were asked, expected %d", asked, test.asked)
				}
			}
		})
	}
}

// A socket or an address is one connection, and no lane is marked: there is nothing to choose.
func TestOneAddressIsOneConnection(t *testing.T) {
	replicas, target := startReplicas(t, 1)
	client := dial(t, strings.Replace(strings.TrimPrefix(target, "dns:///"), name, replicas[0].address, 1))
	askForAll(t, client)
	if len(replicas[0].lanes) != 0 {
		t.Errorf("lanes %v", replicas[0].lanes)
	}
}

func TestAKeyIsNeeded(t *testing.T) {
	_, err := byokgate.New("dns:///localhost:1", byokgate.WithBalancing(byokgate.ByOrganization(byokgate.Unreadable())))
	if err == nil || !strings.Contains(err.Error(), "the key is empty") || errors.Unwrap(err) == nil {
		t.Errorf("%v", err)
	}
}

// A gRPC that reads the setting but ignores it, like all below 1.80, would silently send everything to one replica.
func TestARingHashThatDoesNotHeedTheHeaderIsNotReliedOn(t *testing.T) {
	const name = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"
	if os.Getenv(name) != "false" {
		again := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
		again.Env = append(os.Environ(), name+"=false")
		if output, err := again.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, output)
		}
		return
	}
	_, err := byokgate.New("dns:///localhost:1", byokgate.WithBalancing(byokgate.ByOrganization(byokgate.NewSecret("made-up-key"))))
	if err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("%v", err)
	}
	// By default it goes round then.
	replicas, target := startReplicas(t, 1)
	client := dial(t, target)
	if _, err := client.Decide(t.Context(), about("organization")); err != nil || len(replicas[0].lanes) != 0 {
		t.Errorf("%v, lanes %v", err, replicas[0].lanes)
	}
}
