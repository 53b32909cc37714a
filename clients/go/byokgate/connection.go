package byokgate

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/stats"
)

// link keeps why the last connection could not be made or broke: gRPC gives callers only text, and "byok-gate is down" and "the certificate
// is for another name" are for different people.
type link struct {
	last atomic.Pointer[connectionFault]
	// cutOff counts TLS handshakes in a row that the other side closed without an alert.
	cutOff  atomic.Int32
	silence silence
	banners banners
}

// enoughCutOff handshakes are not a restart of byok-gate any more.
const enoughCutOff = 2

func (l *link) fault() *connectionFault { return l.last.Load() }
func (l *link) note(err error)          { l.last.Store(faultOf(err)) }

// answered clears it: byok-gate itself answered.
func (l *link) answered() {
	if l.last.Load() != nil {
		l.last.Store(nil)
	}
}

// dialer connects, and notes why it could not.
func (l *link) dialer(to target, dial func(context.Context, string) (net.Conn, error)) func(context.Context, string) (net.Conn, error) {
	own := dial == nil
	if own {
		dial = func(ctx context.Context, address string) (net.Conn, error) {
			plain := net.Dialer{Control: limitUnsentTime}
			if to.unix {
				return plain.DialContext(ctx, "unix", address)
			}
			return plain.DialContext(ctx, "tcp", address)
		}
	}
	connect := func(ctx context.Context, address string) (net.Conn, error) {
		var conn net.Conn
		var err error
		if own {
			conn, err = dial(ctx, address)
		} else {
			conn, err = within(ctx, "the dialer", func() (net.Conn, error) { return dial(ctx, address) })
			if err == nil && conn == nil {
				err = errors.New("the dialer gave no connection")
			}
		}
		if err != nil {
			return nil, err
		}
		return conn, nil
	}
	return func(ctx context.Context, address string) (net.Conn, error) {
		if to.fixed != "" {
			address = to.fixed
		}
		conn, err := connect(ctx, address)
		if err != nil {
			l.note(err)
			return nil, err
		}
		return &dialled{Conn: conn, again: func(ctx context.Context) (net.Conn, error) { return connect(ctx, address) }}, nil
	}
}

// dialled is a connection that can be made once more.
type dialled struct {
	net.Conn
	again func(context.Context) (net.Conn, error)
}

// watchedCredentials wrap others and record what goes wrong. They are made anew for each connection, so that renewed files are used.
type watchedCredentials struct {
	credentials.TransportCredentials
	fresh func() (credentials.TransportCredentials, error)
	link  *link
	tls   bool
}

func (w *watchedCredentials) ClientHandshake(
	ctx context.Context, authority string, raw net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	made, err := w.fresh()
	if err != nil {
		w.link.note(err)
		return nil, nil, err
	}
	conn, info, err := made.ClientHandshake(ctx, authority, raw)
	if err != nil {
		if w.tls && isCutOff(err) {
			// A listener without TLS does this, and so does a process that is being killed.
			if w.link.cutOff.Add(1) >= enoughCutOff {
				err = fmt.Errorf("%w: %w", errNoTLS, err)
			}
		}
		if w.tls && strings.Contains(err.Error(), "ALPN") {
			err = fmt.Errorf("%w: %w", errNoHTTP2, err)
		}
		w.link.note(err)
		return nil, nil, err
	}
	w.link.cutOff.Store(0)
	watched := &watchedConn{Conn: conn, link: w.link, plain: !w.tls, open: true}
	if from, is := raw.(*dialled); is {
		watched.again = from.again
	}
	if secured, is := info.(credentials.TLSInfo); is && w.tls && secured.State.NegotiatedProtocol == "" {
		// Older gRPC goes on, and fails at the first byte; newer refuses it.
		watched.unnegotiated = true
	}
	return watched, info, nil
}

func (w *watchedCredentials) Clone() credentials.TransportCredentials {
	cloned := *w
	cloned.TransportCredentials = w.TransportCredentials.Clone()
	return &cloned
}

// watchedConn records what gRPC does not understand: a TLS alert after the handshake, or the wrong protocol. Only one goroutine reads.
type watchedConn struct {
	net.Conn
	link *link
	// plain: no TLS of ours.
	plain bool
	// open: the first bytes have not shown yet what the other side speaks.
	open  bool
	first []byte
	// unnegotiated: over TLS, HTTP/2 was not agreed upon.
	unnegotiated bool
	again        func(context.Context) (net.Conn, error)
	// compared: this connection's first bytes were equal to the last one's.
	compared, alike bool
}

// heard classifies a server's first bytes. An unknown protocol must come twice, since a network may garble bytes.
func (c *watchedConn) heard(what error) error {
	other, is := what.(*notHTTP2)
	if !is || strings.HasPrefix(other.says, "HTTP/") {
		return what
	}
	if !c.compared {
		c.compared, c.alike = true, c.link.banners.again(c.first)
	}
	other.once = !c.alike
	return other
}

func (c *watchedConn) Read(into []byte) (int, error) {
	size, err := c.Conn.Read(into)
	if c.open && size > 0 {
		c.first = append(c.first, into[:min(size, firstBytes-len(c.first))]...)
		c.link.silence.broken()
		var what error
		if what, c.open = recognized(c.first); what != nil {
			c.link.note(c.heard(what))
		} else if !c.open {
			c.link.banners.forget()
		}
	}
	if err != nil {
		switch {
		case isRemoteAlert(err):
			c.link.note(err)
		case len(c.first) > 0 || !c.open || !isCutOff(err):
		case c.unnegotiated:
			c.link.note(errNoHTTP2)
		case c.plain && c.again != nil:
			c.link.note(c.link.silence.again(func(ctx context.Context) error { return whoIsThere(ctx, c.again) }))
		}
	}
	return size, err
}

func (c *core) dialOptions(to target) ([]grpc.DialOption, error) {
	balancing, err := c.balancing.orDefault(to)
	if err != nil {
		return nil, err
	}
	c.lanes = balancing.lanes
	watched := &watchedCredentials{
		TransportCredentials: insecure.NewCredentials(), link: &c.link,
		fresh: func() (credentials.TransportCredentials, error) { return insecure.NewCredentials(), nil },
	}
	if c.tls != nil {
		watched.tls = true
		watched.TransportCredentials = credentials.NewTLS(&tls.Config{})
		watched.fresh = func() (credentials.TransportCredentials, error) {
			config, err := c.tls()
			if err != nil {
				return nil, err
			}
			return credentials.NewTLS(config), nil
		}
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(watched),
		grpc.WithContextDialer(c.link.dialer(to, c.dial)),
		// gRPC honours HTTPS_PROXY, and these requests must not leave through it.
		grpc.WithNoProxy(),
		// DNS may carry a gRPC configuration: a name server must not set timeouts and retries.
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultServiceConfig(balancing.serviceConfig),
		// Connections stay open: a reconnect after a quiet hour would delay the next caller.
		grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: baseReconnectDelay, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxReconnectDelay},
			MinConnectTimeout: minConnectTimeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true,
		}),
		grpc.WithUserAgent(c.userAgent + "byok-gate-go/" + Version),
	}
	if to.authority != "" {
		options = append(options, grpc.WithAuthority(to.authority))
	}
	if c.token != nil {
		options = append(options, grpc.WithPerRPCCredentials(bearer{c.token}))
	}
	if c.stats != nil {
		options = append(options, grpc.WithStatsHandler(payloadless{c.stats}))
	}
	return options, nil
}

// === What others may watch ===

// payloadless passes a call's statistics on without the payloads, which hold credentials.
type payloadless struct{ to stats.Handler }

func (p payloadless) TagRPC(ctx context.Context, info *stats.RPCTagInfo) (tagged context.Context) {
	tagged = ctx
	hook(func() {
		if made := p.to.TagRPC(ctx, info); made != nil {
			tagged = made
		}
	}, nil)
	return tagged
}

func (p payloadless) HandleRPC(ctx context.Context, event stats.RPCStats) {
	switch full := event.(type) {
	case *stats.InPayload:
		bare := *full
		bare.Payload = nil
		event = &bare
	case *stats.OutPayload:
		bare := *full
		bare.Payload = nil
		event = &bare
	case *stats.OutHeader:
		bare := *full
		// The token.
		bare.Header = bare.Header.Copy()
		delete(bare.Header, "authorization")
		event = &bare
	}
	hook(func() { p.to.HandleRPC(ctx, event) }, nil)
}

func (p payloadless) TagConn(ctx context.Context, info *stats.ConnTagInfo) (tagged context.Context) {
	tagged = ctx
	hook(func() {
		if made := p.to.TagConn(ctx, info); made != nil {
			tagged = made
		}
	}, nil)
	return tagged
}

func (p payloadless) HandleConn(ctx context.Context, event stats.ConnStats) {
	hook(func() { p.to.HandleConn(ctx, event) }, nil)
}
