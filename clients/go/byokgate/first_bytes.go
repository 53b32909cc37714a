package byokgate

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/status"
)

// The first bytes show what answers at the target: an HTTP/2 server always starts with a SETTINGS frame (RFC 9113, 3.4); for all others
// gRPC only says that a frame was too large.

// Kinds of peers that are not byok-gate, or speak to it in another way.
var (
	errSpeaksTLS = errors.New("the other side speaks TLS")
	errNoTLS     = errors.New("the other side ends each TLS handshake")
	errNoHTTP2   = errors.New("the other side speaks TLS without HTTP/2")
	errSilent    = errors.New("the other side closed the connection without a reply")
)

// notHTTP2 is a peer that speaks something else.
type notHTTP2 struct {
	says string
	// once: it came once, and may be noise.
	once bool
}

func (n *notHTTP2) Error() string { return "the other side does not speak HTTP/2" }

// sameBytes is how many first bytes two connections must share to count as another service. The rest may be a version, a time or a salt.
const sameBytes = 4

// banners holds the first bytes of the last connection.
type banners struct {
	mu   sync.Mutex
	last [sameBytes]byte
}

// again says whether the previous connection began the same way.
func (b *banners) again(first []byte) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	before := b.last
	b.last = [sameBytes]byte(first)
	return b.last == before
}

func (b *banners) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.last = [sameBytes]byte{}
}

// awayProxy is a proxy that answers in byok-gate's place that it cannot reach it.
type awayProxy struct{ httpStatus int }

func (a *awayProxy) Error() string { return fmt.Sprint("a proxy answers HTTP ", a.httpStatus) }

const (
	frameHeader  = 9
	typeSettings = 4
	typeGoAway   = 7
	// firstBytes is enough to recognize a protocol and its version, and fits into a log line.
	firstBytes = 40
)

// recognized classifies a server's first bytes. Nil, and nothing more to read: HTTP/2.
func recognized(first []byte) (err error, more bool) {
	switch {
	case len(first) >= 2 && (first[0] == 0x15 || first[0] == 0x16) && first[1] == 3:
		return errSpeaksTLS, false
	case len(first) < 4:
		return nil, true
	case first[3] == typeSettings, first[3] == typeGoAway && first[0] == 0:
		return nil, false
	}
	more = len(first) < firstBytes
	if code, is := http1Status(first); is && passing(code) {
		return &awayProxy{code}, more
	}
	return &notHTTP2{says: strings.TrimSpace(string(first))}, more
}

var statusLine = regexp.MustCompile(`^HTTP/1\.[01] ([1-5][0-9]{2})`)

func http1Status(first []byte) (code int, is bool) {
	found := statusLine.FindSubmatch(first)
	if found == nil {
		return 0, false
	}
	code, _ = strconv.Atoi(string(found[1]))
	return code, true
}

// passing says that an HTTP status may come from a proxy whose backend is down or slow: the same request may succeed later with nothing
// changed. byok-gate itself sends none of these, and a server that sends another one is not a proxy to it.
func passing(httpStatus int) bool {
	switch httpStatus {
	case 408, 425, 429:
		return true
	case 501, 505:
		return false
	}
	return httpStatus >= 500
}

var (
	unexpectedStatus = regexp.MustCompile(`unexpected HTTP status code received from server: ([0-9]{3})`)
	// noGRPC is gRPC's text for an HTTP answer that is not gRPC.
	noGRPC = regexp.MustCompile(`received unexpected content-type|missing HTTP content-type|missing HTTP status`)
)

// plainHTTP is the HTTP status of an answer over HTTP/2 that is not gRPC. gRPC gives it only as text.
func plainHTTP(said *status.Status) (httpStatus int, is bool) {
	if found := unexpectedStatus.FindStringSubmatch(said.Message()); found != nil {
		httpStatus, _ = strconv.Atoi(found[1])
		return httpStatus, true
	}
	return 200, noGRPC.MatchString(said.Message())
}

// === Peers that close without a reply ===

const (
	// enoughSilence closed connections in a row are diagnosed: one may be a byok-gate that is stopping.
	enoughSilence = 2
	// diagnosisTime is how long that may take, and diagnosisAge how long its result counts.
	diagnosisTime = 300 * time.Millisecond
	diagnosisAge  = 10 * time.Second
)

// silence is what is known of a peer that closes each connection without a reply. Some HTTP/1.1 servers do so, and servers that want TLS.
type silence struct {
	mu    sync.Mutex
	count int
	// found is the result of the last diagnosis, at that time.
	found error
	at    time.Time
}

func (s *silence) broken() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count, s.found, s.at = 0, nil, time.Time{}
}

// again says what one more silent close means. Look diagnoses the peer.
func (s *silence) again(look func(context.Context) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count++; s.count < enoughSilence {
		return errSilent
	}
	if s.at.IsZero() || time.Since(s.at) > diagnosisAge {
		ctx, cancel := context.WithTimeout(context.Background(), diagnosisTime)
		defer cancel()
		s.found, s.at = look(ctx), time.Now()
	}
	if s.found != nil {
		return s.found
	}
	return errSilent
}

// whoIsThere checks whether a peer that closes on HTTP/2 speaks HTTP/1.1 or TLS. It sends no data of the caller.
func whoIsThere(ctx context.Context, dial func(context.Context) (net.Conn, error)) error {
	greeted := func(use func(net.Conn) error) error {
		conn, err := dial(ctx)
		if err != nil {
			return nil
		}
		defer conn.Close()
		if deadline, limited := ctx.Deadline(); limited {
			_ = conn.SetDeadline(deadline)
		}
		return use(conn)
	}
	if found := greeted(func(conn net.Conn) error {
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: byok-gate\r\nConnection: close\r\n\r\n"); err != nil {
			return nil
		}
		said, _ := io.ReadAll(io.LimitReader(conn, 1024))
		if bytes.Contains(said, []byte("gRPC over HTTP/2")) {
			// byok-gate's own answer: it is up again.
			return nil
		}
		if len(said) > firstBytes {
			said = said[:firstBytes]
		}
		found, _ := recognized(said)
		return found
	}); found != nil {
		return found
	}
	return greeted(func(conn net.Conn) error {
		// Nothing is sent over it, so there is nothing to verify.
		greeting := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err := greeting.HandshakeContext(ctx); err == nil || isRemoteAlert(err) {
			return errSpeaksTLS
		}
		return nil
	})
}

// isRemoteAlert: the standard library gives the other side's alert only as text.
func isRemoteAlert(err error) bool {
	var operation *net.OpError
	return errors.As(err, &operation) && operation.Op == "remote error"
}

// isCutOff says that the other side closed a connection without a reply.
func isCutOff(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
