//go:build go1.24

package byokgate

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// The target here is absent, broken or another service.

// impatient is long enough for every answer, on a busy machine too.
const impatient = 500 * time.Millisecond

// serveTCP hands each connection to handle, which need not close it.
func serveTCP(t *testing.T, handle func(net.Conn)) string {
	t.Helper()
	listener := listenTCP(t)
	var mu sync.Mutex
	var accepted []net.Conn
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			// Kept, since a connection that is collected as garbage is closed.
			mu.Lock()
			accepted = append(accepted, conn)
			mu.Unlock()
			go handle(conn)
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		mu.Lock()
		defer mu.Unlock()
		if len(accepted) == 0 {
			t.Error("the client never connected")
		}
		for _, conn := range accepted {
			conn.Close()
		}
	})
	return listener.Addr().String()
}

// serveHTTP2 serves plain HTTP/2, so that a test can send what no gRPC server sends.
func serveHTTP2(t *testing.T, handle http.HandlerFunc) string {
	t.Helper()
	listener := listenTCP(t)
	server := &http.Server{Handler: handle, Protocols: &http.Protocols{}}
	server.Protocols.SetUnencryptedHTTP2(true)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Close() })
	return listener.Addr().String()
}

// framed is a message as gRPC puts it on the wire.
func framed(t *testing.T, message proto.Message) []byte {
	t.Helper()
	text, err := proto.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(text))), text...)
}

func reset(conn net.Conn) {
	// Not closed in good order: what the peer gets is RST.
	_ = conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

// frame is one of HTTP/2's, on stream 0.
func frame(kind byte, payload ...byte) []byte {
	return append([]byte{0, 0, byte(len(payload)), kind, 0, 0, 0, 0, 0}, payload...)
}

func TestHostilePeersAreNeverAnAllow(t *testing.T) {
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	settings, goAway := frame(4), frame(7, 0, 0, 0, 0, 0, 0, 0, 11)
	resolve := framed(t, resolution("r1", "ACME_API_KEY"))
	// answered serves the first question properly and leaves Decide to the test.
	answered := func(decide http.HandlerFunc) func(*testing.T) string {
		return func(t *testing.T) string {
			return serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				w.Header().Set("Content-Type", "application/grpc")
				if r.URL.Path == byokgatev1.PolicyDecisionService_ResolveProvider_FullMethodName {
					w.Header().Set("Trailer:Grpc-Status", "0")
					_, _ = w.Write(resolve)
					return
				}
				decide(w, r)
			})
		}
	}
	allowed := framed(t, allow(byokgatev1.BillingMode_BILLING_MODE_BYOK))

	for name, test := range map[string]struct {
		start func(*testing.T) string
		want  int
	}{
		"nothing listens": {func(t *testing.T) string {
			listener := listenTCP(t)
			defer listener.Close()
			return listener.Addr().String()
		}, 503},
		"accepts and says nothing": {func(t *testing.T) string { return serveTCP(t, func(net.Conn) {}) }, 503},
		"resets":                   {func(t *testing.T) string { return serveTCP(t, reset) }, 503},
		"closes":                   {func(t *testing.T) string { return serveTCP(t, func(conn net.Conn) { conn.Close() }) }, 503},
		"resets after the preface": {func(t *testing.T) string {
			return serveTCP(t, func(conn net.Conn) {
				_, _ = io.CopyN(io.Discard, conn, int64(len(preface)))
				_, _ = conn.Write(settings)
				reset(conn)
			})
		}, 503},
		"GOAWAY at once, for ever": {func(t *testing.T) string {
			return serveTCP(t, func(conn net.Conn) {
				_, _ = conn.Write(append(append([]byte{}, settings...), goAway...))
			})
		}, 503},
		"settings and then nothing": {func(t *testing.T) string {
			return serveTCP(t, func(conn net.Conn) { _, _ = conn.Write(settings) })
		}, 503},
		"garbage, another each time": {func(t *testing.T) string {
			var count atomic.Uint32
			return serveTCP(t, func(conn net.Conn) {
				_, _ = fmt.Fprintf(conn, "%c%s", rune('a'+count.Add(1)%26), strings.Repeat("garbage", 8))
			})
		}, 503},
		"HTTP/1.1 with HTML": {func(t *testing.T) string {
			return serveTCP(t, func(conn net.Conn) {
				_, _ = bufio.NewReader(conn).ReadString('\n')
				_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\n<html")
			})
		}, 500},
		"speaks TLS": {func(t *testing.T) string {
			certificates := newCertificates(t)
			return serveGRPC(t, listenTCP(t), func(*grpc.Server) {}, certificates.serverOption(false))
		}, 500},
		"another service": {func(t *testing.T) string {
			return serveGRPC(t, listenTCP(t), func(*grpc.Server) {})
		}, 500},
		"200 with HTML": {func(t *testing.T) string {
			return serveHTTP2(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "text/html")
				_, _ = io.WriteString(w, "<html>welcome</html>")
			})
		}, 500},
		"404": {func(t *testing.T) string { return serveHTTP2(t, http.NotFound) }, 500},
		"trailers only, OK": {answered(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Grpc-Status", "0")
		}), 503},
		"a body without a status": {answered(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(allowed)
		}), 503},
		"a truncated allow": {answered(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer:Grpc-Status", "0")
			_, _ = w.Write(allowed[:len(allowed)-3])
		}), 503},
		"an allow, then an error status": {answered(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer:Grpc-Status", "13")
			_, _ = w.Write(allowed)
		}), 503},
		"two replies": {answered(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer:Grpc-Status", "0")
			_, _ = w.Write(append(append([]byte{}, allowed...), allowed...))
		}), 503},
		"an empty message": {answered(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer:Grpc-Status", "0")
			_, _ = w.Write([]byte{0, 0, 0, 0, 0})
		}), 503},
		"no protobuf": {answered(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer:Grpc-Status", "0")
			_, _ = w.Write([]byte("\x00\x00\x00\x00\x04\xff\xff\xff\xff"))
		}), 503},
		"an endless message": {answered(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte{0, 0x7f, 0xff, 0xff, 0xff})
			for {
				if _, err := w.Write(make([]byte, 64*1024)); err != nil {
					return
				}
			}
		}), 503},
		"headers and then nothing": {answered(func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}), 503},
		"a stream reset in the middle": {answered(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(allowed[:10])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}), 503},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client := newClient(t, test.start(t), WithTimeout(impatient))
			for _, checkpoint := range []Checkpoint{Create, Provision, Update} {
				request := acme()
				request.Checkpoint = checkpoint
				began := time.Now()
				allowed, err := client.Decide(background(), request)
				wantUndecided(t, allowed, err, test.want)
				if took := time.Since(began); took > impatient+grace {
					t.Errorf("took %v", took)
				}
			}
			for index, result := range client.BatchDecide(withTimeout(t, impatient), []Request{acme(), acme()}) {
				if allowed, err := result.Decision(); err == nil {
					t.Errorf("batch item %d: %v", index, allowed)
				}
			}
		})
	}
}

func withTimeout(t *testing.T, timeout time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(background(), timeout)
	t.Cleanup(cancel)
	return ctx
}

// A server that accepts the request and answers too late.
func TestAHungServerIsLeftAtTheDeadline(t *testing.T) {
	fake, address := startFake(t)
	ended := make(chan struct{})
	t.Cleanup(func() { close(ended) })
	fake.decide = func(ctx context.Context, _ *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
		if _, limited := ctx.Deadline(); !limited {
			t.Error("a question without a deadline")
		}
		<-ended
		return allow(byokgatev1.BillingMode_BILLING_MODE_BYOK), nil
	}
	client := newClient(t, address, WithTimeout(impatient))
	began := time.Now()
	allowed, err := client.Decide(background(), acme())
	undecided := wantUndecided(t, allowed, err, http.StatusServiceUnavailable)
	if status.Code(undecided.Unwrap()) != codes.DeadlineExceeded {
		t.Errorf("%v", undecided.Unwrap())
	}
	if took := time.Since(began); took < impatient/2 || took > impatient+grace {
		t.Errorf("took %v", took)
	}
	if asked := len(fake.requests()); asked != 1 {
		t.Errorf("asked %d times: a deadline is not to be retried", asked)
	}
}

func TestContextsThatAreOver(t *testing.T) {
	_, address := startFake(t)
	client, logs := newLoggedClient(t, address)
	cancelled, cancel := context.WithCancel(background())
	cancel()
	late, cancel := context.WithDeadline(background(), time.Now().Add(-time.Hour))
	defer cancel()
	for name, ctx := range map[string]context.Context{"cancelled": cancelled, "past": late} {
		allowed, err := client.Decide(ctx, acme())
		want, cause := http.StatusServiceUnavailable, context.DeadlineExceeded
		if name == "cancelled" {
			want, cause = statusClientClosed, context.Canceled
		}
		if wantUndecided(t, allowed, err, want); !errors.Is(err, cause) || !errors.Is(err, ErrUndecided) || errors.Is(err, ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
		for _, result := range client.BatchDecide(ctx, []Request{acme()}) {
			if allowed, err := result.Decision(); err == nil {
				t.Errorf("%s: %v", name, allowed)
			}
		}
		if _, err := client.ResolveProvider(ctx, "agent", "acme-large"); err == nil {
			t.Errorf("%s: an owner", name)
		}
		// A tenant who hangs up is not an error.
		if loud := strings.Contains(logs.take(), `"level":"ERROR"`); loud != (name == "past") {
			t.Errorf("%s: logged as an error: %v", name, loud)
		}
	}
}

func TestAClosedClientIsUndecided(t *testing.T) {
	_, address := startFake(t)
	client, err := New(address, WithLogger(discard))
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	allowed, err := client.Decide(background(), acme())
	wantUndecided(t, allowed, err, http.StatusServiceUnavailable)
}

// A server that restarts: refused requests are soon allowed again, without a new client.
func TestAServerThatComesBackIsFound(t *testing.T) {
	fake := newFake()
	listener := listenTCP(t)
	address := listener.Addr().String()
	serve := func(listener net.Listener) *grpc.Server {
		server := grpc.NewServer()
		byokgatev1.RegisterPolicyDecisionServiceServer(server, fake)
		go func() { _ = server.Serve(listener) }()
		return server
	}
	server := serve(listener)
	client := newClient(t, address)
	allowed, err := client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
	server.Stop()
	allowed, err = client.Decide(background(), acme())
	wantUndecided(t, allowed, err, http.StatusServiceUnavailable)

	listener, err = net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(serve(listener).Stop)
	began := time.Now()
	for {
		if allowed, err = client.Decide(background(), acme()); err == nil {
			break
		}
		if time.Since(began) > maxReconnectDelay+grace {
			t.Fatalf("not found after %v: %v", time.Since(began), err)
		}
	}
	wantAllowed(t, allowed, err, BYOK)
}
