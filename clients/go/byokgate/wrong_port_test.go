//go:build go1.24

package byokgate

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Other services at the target: a clearly wrong one is the platform's misconfiguration (500, with what to check), and a state that may
// pass is retryable.

// banner is a server that speaks first.
func banner(text string) func(*testing.T) string {
	return func(t *testing.T) string {
		return serveTCP(t, func(conn net.Conn) {
			_, _ = io.WriteString(conn, text)
			_, _ = io.Copy(io.Discard, conn)
		})
	}
}

// replying is a server that answers whatever it is sent.
func replying(text string) func(*testing.T) string {
	return func(t *testing.T) string {
		return serveTCP(t, func(conn net.Conn) {
			_, _ = conn.Read(make([]byte, 1024))
			_, _ = io.WriteString(conn, text)
			conn.Close()
		})
	}
}

// plainWeb speaks HTTP/2 without gRPC.
func plainWeb(httpStatus int, contentType, body string) func(*testing.T) string {
	return func(t *testing.T) string {
		return serveHTTP2(t, func(w http.ResponseWriter, _ *http.Request) {
			if contentType != "" {
				w.Header().Set("Content-Type", contentType)
			}
			w.Header().Set("Location", "/login")
			w.WriteHeader(httpStatus)
			_, _ = io.WriteString(w, body)
		})
	}
}

// refusing is gRPC that is not byok-gate's: its refusals carry no details of byok-gate's.
func refusing(code codes.Code) func(*testing.T) string {
	return func(t *testing.T) string {
		return serveGRPC(t, listenTCP(t), func(*grpc.Server) {}, grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
			return status.Error(code, "no")
		}))
	}
}

func TestWhatElseMayListenThere(t *testing.T) {
	const html, json = "text/html; charset=utf-8", "application/json"
	certificates := newCertificates(t)
	trusting := WithTLSFiles(certificates.file("ca.pem"), "", "")
	pair, err := tls.LoadX509KeyPair(certificates.file("server.pem"), certificates.file("server.key"))
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]struct {
		start   func(*testing.T) string
		options []Option
		reason  Reason
		says    string
	}{
		// Servers that speak first.
		"SSH":         {banner("SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"), nil, ReasonNotAGate, `it begins with "SSH-2.0-OpenSSH_9.2p1 Debian-2"`},
		"SMTP":        {banner("220 mail.example ESMTP Postfix\r\n"), nil, ReasonNotAGate, "220 mail.example"},
		"MySQL":       {banner("\x4a\x00\x00\x00\x0a8.0.36\x00\x08\x00\x00\x00"), nil, ReasonNotAGate, "it begins with"},
		"NATS":        {banner("INFO {\"server_id\":\"N\",\"version\":\"2.10\"}\r\n"), nil, ReasonNotAGate, "INFO {"},
		"POP3":        {banner("+OK ready\r\n"), nil, ReasonNotAGate, "+OK ready"},
		"garbage":     {banner("\x00\xff\x13garbage garbage garbage"), nil, ReasonNotAGate, "garbage"},
		"three bytes": {banner("hi\n"), nil, ReasonTimedOut, ""},
		// Servers that answer in a protocol of their own.
		"Redis":                 {replying("-ERR unknown command 'PRI'\r\n"), nil, ReasonNotAGate, "-ERR unknown command"},
		"memcached":             {replying("ERROR\r\n"), nil, ReasonNotAGate, "ERROR"},
		"HTTP/1.1, 400":         {replying("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"), nil, ReasonNotAGate, "HTTP/1.1"},
		"HTTP/1.1, 505":         {replying("HTTP/1.1 505 HTTP Version Not Supported\r\nContent-Length: 0\r\n\r\n"), nil, ReasonNotAGate, "HTTP/1.1"},
		"HTTP/1.0, no backend":  {replying("HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"), nil, ReasonUnreachable, "HTTP 503"},
		"HTTP/1.1, bad gateway": {replying("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"), nil, ReasonUnreachable, "HTTP 502"},
		"TLS alert":             {replying("\x15\x03\x03\x00\x02\x02\x0a"), nil, ReasonTLSMismatch, "WithTLS"},
		// Servers that close on HTTP/2 without a reply.
		"a web server that closes on HTTP/2": {func(t *testing.T) string { return serveTCP(t, closingOnHTTP2) }, nil, ReasonNotAGate, "--admin-listen"},
		"TLS that closes on plain text": {func(t *testing.T) string {
			return serveGRPC(t, listenTCP(t), func(*grpc.Server) {}, certificates.serverOption(false))
		}, nil, ReasonTLSMismatch, "WithTLS"},
		"closes on everybody":    {func(t *testing.T) string { return serveTCP(t, func(conn net.Conn) { conn.Close() }) }, nil, ReasonUnreachable, "closed the connection at once"},
		"resets everybody":       {func(t *testing.T) string { return serveTCP(t, reset) }, nil, ReasonUnreachable, ""},
		"byok-gate, but closing": {closingFor(2), nil, "", ""},
		// HTTP/2 without gRPC.
		"200 HTML":            {plainWeb(200, html, "<html>"), nil, ReasonNotAGate, "HTTP 200"},
		"200 JSON":            {plainWeb(200, json, "{}"), nil, ReasonNotAGate, "HTTP 200"},
		"204":                 {plainWeb(204, "", ""), nil, ReasonNotAGate, "HTTP 20"},
		"301":                 {plainWeb(301, html, ""), nil, ReasonNotAGate, "HTTP 301"},
		"302 to a login":      {plainWeb(302, html, ""), nil, ReasonNotAGate, "HTTP 302"},
		"307":                 {plainWeb(307, "", ""), nil, ReasonNotAGate, "HTTP 307"},
		"400 HTML":            {plainWeb(400, html, ""), nil, ReasonNotAGate, "HTTP 400"},
		"401 HTML":            {plainWeb(401, html, "log in"), nil, ReasonNotAGate, "HTTP 401"},
		"401 JSON":            {plainWeb(401, json, "{}"), nil, ReasonNotAGate, "wants a login"},
		"403 HTML":            {plainWeb(403, html, ""), nil, ReasonNotAGate, "HTTP 403"},
		"403 JSON":            {plainWeb(403, json, "{}"), nil, ReasonNotAGate, "HTTP 403"},
		"404 HTML":            {plainWeb(404, html, ""), nil, ReasonNotAGate, "HTTP 404"},
		"404 JSON":            {plainWeb(404, json, "{}"), nil, ReasonNotAGate, "HTTP 404"},
		"404 text":            {plainWeb(404, "text/plain", "default backend - 404"), nil, ReasonNotAGate, "route"},
		"405":                 {plainWeb(405, "", ""), nil, ReasonNotAGate, "HTTP 405"},
		"407":                 {plainWeb(407, html, ""), nil, ReasonNotAGate, "HTTP 407"},
		"415":                 {plainWeb(415, json, "{}"), nil, ReasonNotAGate, "HTTP 415"},
		"501":                 {plainWeb(501, html, ""), nil, ReasonNotAGate, "HTTP 501"},
		"408, slow":           {plainWeb(408, html, ""), nil, ReasonUnreachable, "HTTP 408"},
		"429, a limit":        {plainWeb(429, html, ""), nil, ReasonUnreachable, "HTTP 429"},
		"500":                 {plainWeb(500, html, ""), nil, ReasonUnreachable, "HTTP 500"},
		"502, no backend":     {plainWeb(502, html, ""), nil, ReasonUnreachable, "HTTP 502"},
		"503, no backend":     {plainWeb(503, html, ""), nil, ReasonUnreachable, "HTTP 503"},
		"503 JSON":            {plainWeb(503, json, "{}"), nil, ReasonUnreachable, "HTTP 503"},
		"504, a slow backend": {plainWeb(504, html, ""), nil, ReasonUnreachable, "HTTP 504"},
		// gRPC that is not byok-gate.
		"gRPC, another service":            {refusing(codes.Unimplemented), nil, ReasonNotAGate, "is not byok-gate"},
		"gRPC, a proxy that wants a login": {refusing(codes.Unauthenticated), nil, ReasonUnauthenticated, "does not sign its refusals"},
		"gRPC, a proxy that forbids":       {refusing(codes.PermissionDenied), nil, ReasonPermissionDenied, "does not sign its refusals"},
		"gRPC, a proxy without a backend":  {refusing(codes.Unavailable), nil, ReasonUnreachable, "check that byok-gate runs"},
		// A client that speaks TLS.
		"TLS client, SSH":  {banner("SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"), []Option{trusting}, ReasonNotAGate, "SSH-2"},
		"TLS client, SMTP": {banner("220 mail.example ESMTP Postfix\r\n"), []Option{trusting}, ReasonNotAGate, "220 m"},
		"TLS client, HTTP": {replying("HTTP/1.1 400 Bad Request\r\n\r\n"), []Option{trusting}, ReasonTLSMismatch, "WithTLS"},
		"TLS, HTTP/1.1 only": {func(t *testing.T) string {
			listener := tls.NewListener(listenTCP(t), &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}})
			server := &http.Server{Handler: http.NotFoundHandler()}
			go func() { _ = server.Serve(listener) }()
			t.Cleanup(func() { server.Close() })
			return listener.Addr().String()
		}, []Option{trusting}, ReasonNotAGate, "HTTP/2"},
		"TLS, no ALPN": {func(t *testing.T) string {
			listener := tls.NewListener(listenTCP(t), &tls.Config{Certificates: []tls.Certificate{pair}})
			go func() {
				for {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					go closingOnHTTP2(conn)
				}
			}()
			t.Cleanup(func() { listener.Close() })
			return listener.Addr().String()
		}, []Option{trusting}, ReasonNotAGate, "HTTP/2"},
	}
	for name, row := range rows {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client := newClient(t, row.start(t), append([]Option{WithTimeout(2 * time.Second)}, row.options...)...)
			allowed, err := client.Decide(background(), acme())
			if row.reason == "" {
				wantAllowed(t, allowed, err, BYOK)
				return
			}
			want := http.StatusServiceUnavailable
			if row.reason.miswired() {
				want = http.StatusInternalServerError
			}
			undecided := wantUndecided(t, allowed, err, want)
			wantReason(t, undecided, row.reason)
			if hint := undecided.OperatorHint(); !strings.Contains(hint, row.says) {
				t.Errorf("%q does not say %q", hint, row.says)
			}
			// What stands there is for the operator, and not for the tenant.
			if body := string(undecided.JSON()); strings.Contains(body, "HTTP ") || strings.Contains(body, "SSH") {
				t.Errorf("the body says %s", body)
			}
			for _, result := range client.BatchDecide(withTimeout(t, 2*time.Second), []Request{acme()}) {
				_, err := result.Decision()
				if got := RefusalOf(err).HTTPStatus(); got != want {
					t.Errorf("in a batch: %d, %v", got, err)
				}
			}
		})
	}
}

// closingOnHTTP2 is an HTTP/1.1 server that closes without a reply on unreadable input, like hyper.
func closingOnHTTP2(conn net.Conn) {
	defer conn.Close()
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err == nil && strings.HasSuffix(line, " HTTP/1.1\r\n") {
		_, _ = io.WriteString(conn, "HTTP/1.1 302 Found\r\nLocation: /status\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
	}
}

// closingFor closes this many connections, like a stopping byok-gate, and then is byok-gate.
func closingFor(connections int32) func(*testing.T) string {
	return func(t *testing.T) string {
		listener := listenTCP(t)
		_, address := startFake(t)
		var count atomic.Int32
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				if count.Add(1) <= connections {
					conn.Close()
					continue
				}
				go func() {
					defer conn.Close()
					behind, err := net.Dial("tcp", address)
					if err != nil {
						return
					}
					defer behind.Close()
					go func() { _, _ = io.Copy(behind, conn); behind.Close() }()
					_, _ = io.Copy(conn, behind)
				}()
			}
		}()
		t.Cleanup(func() { listener.Close() })
		return listener.Addr().String()
	}
}

// byok-gate's own answer over HTTP/1.1 is not another service: it came up in between.
func TestAGateThatIsBackIsNoWebServer(t *testing.T) {
	var count atomic.Int32
	address := serveTCP(t, func(conn net.Conn) {
		defer conn.Close()
		line, _ := bufio.NewReader(conn).ReadString('\n')
		if count.Add(1); strings.HasSuffix(line, " HTTP/1.1\r\n") {
			fmt.Fprint(conn, "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n"+
				"this port speaks gRPC over HTTP/2, without TLS\n")
		}
	})
	client := newClient(t, address, WithTimeout(2*time.Second))
	allowed, err := client.Decide(background(), acme())
	wantReason(t, wantUndecided(t, allowed, err, http.StatusServiceUnavailable), ReasonUnreachable)
	if count.Load() < enoughSilence+1 {
		t.Error("nobody looked who is there")
	}
}

func TestFirstBytesInPieces(t *testing.T) {
	for text, want := range map[string]bool{
		"\x00\x00\x12\x04\x00\x00\x00\x00\x00": true, "\x00\x00\x00\x04": true, "SSH-2.0": false, "HTTP/1.1 404 Not Found": false, "": true, "SS": true,
	} {
		for cut := range len(text) + 1 {
			if err, more := recognized([]byte(text[:cut])); cut == len(text) && (err == nil) != want {
				t.Errorf("%q: %v, %v", text, err, more)
			}
		}
	}
}
