package byokgate

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc/stats"
)

// Option configures a client. An invalid option makes [New] fail.
type Option func(*config) error

type config struct {
	timeout       time.Duration
	batchTimeout  time.Duration
	lookupTime    time.Duration
	lookupsAtOnce int
	tls           func() (*tls.Config, error)
	insecure      bool
	token         *token
	balancing     Balancing
	dial          func(context.Context, string) (net.Conn, error)
	stats         stats.Handler
	userAgent     string
	log           *slog.Logger
	observe       func(Observation)
	trace         func(context.Context) (traceparent, tracestate string)
}

// shortestTimeout is too short for any answer. A shorter timeout is a number without its unit.
const shortestTimeout = time.Millisecond

func checkTimeout(timeout time.Duration) error {
	switch {
	case timeout <= 0:
		return fmt.Errorf("%v is not above zero; there is no call without a deadline", timeout)
	case timeout < shortestTimeout:
		return fmt.Errorf("%v is below %v, in which nothing can be answered; is a unit missing, as in 4*time.Second?", timeout, shortestTimeout)
	}
	return nil
}

// notNegative refuses a negative setting whose zero means the default.
func notNegative(given any) error {
	return fmt.Errorf("%v is below zero; leave it out for the default", given)
}

// WithTimeout sets how long one decision may take, lookups and retries included. Default: [DefaultTimeout]. Request.Timeout sets it for one
// request.
func WithTimeout(timeout time.Duration) Option {
	return func(c *config) error {
		if err := checkTimeout(timeout); err != nil {
			return fmt.Errorf("WithTimeout: %w", err)
		}
		c.timeout = timeout
		return nil
	}
}

// WithBatchTimeout sets how long one batch may take. Default: [DefaultBatchTimeout].
func WithBatchTimeout(timeout time.Duration) Option {
	return func(c *config) error {
		if err := checkTimeout(timeout); err != nil {
			return fmt.Errorf("WithBatchTimeout: %w", err)
		}
		c.batchTimeout = timeout
		return nil
	}
}

// WithLookupBudget sets how long one lookup may take, and how many may run at a time. Defaults: [DefaultLookupTime] and [DefaultLookups].
// Beyond that, credentials count as unreadable, never as absent.
func WithLookupBudget(perCall time.Duration, atOnce int) Option {
	return func(c *config) error {
		if err := checkTimeout(perCall); err != nil {
			return fmt.Errorf("WithLookupBudget: perCall: %w", err)
		}
		if atOnce <= 0 {
			return fmt.Errorf("WithLookupBudget: atOnce: %d is not above zero; no credential could be looked up", atOnce)
		}
		c.lookupTime, c.lookupsAtOnce = perCall, atOnce
		return nil
	}
}

// WithTLS uses TLS, with a configuration that must verify the server. One with Certificates shows them (mTLS). A configuration that allows
// less than TLS 1.2, names weak cipher suites, verifies nothing or logs its keys is refused.
func WithTLS(tlsConfig *tls.Config) Option {
	return func(c *config) error {
		if err := checkTLS(tlsConfig); err != nil {
			return fmt.Errorf("WithTLS: %w", err)
		}
		shielded := shieldedTLS(tlsConfig)
		c.tls = func() (*tls.Config, error) { return shielded, nil }
		return nil
	}
}

// WithTLSFiles uses TLS. The server's certificate must come from an authority in ca (empty: one of the system's). With cert and key the
// client shows a certificate too (mTLS). All are reloaded for each connection, so that they can be renewed; if that fails, for example in
// the middle of a renewal, the last ones are used.
func WithTLSFiles(ca, cert, key string) Option {
	return func(c *config) error {
		files := &tlsFiles{ca: ca, cert: cert, key: key}
		if _, err := files.config(); err != nil {
			return fmt.Errorf("WithTLSFiles: %w", err)
		}
		c.tls = files.config
		return nil
	}
}

// WithInsecureNetwork dials without TLS beyond loopback. Whoever can read that network reads every credential and the token.
func WithInsecureNetwork() Option {
	return func(c *config) error {
		c.insecure = true
		return nil
	}
}

// WithToken sends a bearer token with every call.
func WithToken(secret Secret) Option {
	return func(c *config) error {
		value, err := checkToken(secret.Reveal())
		if err != nil {
			return fmt.Errorf("WithToken: the token %w", err)
		}
		return c.setToken("WithToken", &token{value: value})
	}
}

// WithTokenFile sends a bearer token with every call. The file is reloaded once a second, in the background, and at once if byok-gate does
// not know the token, so that the token can be rotated; a trailing newline is not part of it. If the file cannot be read, the last token is
// sent.
func WithTokenFile(path string) Option {
	return func(c *config) error {
		value, err := readToken(path)
		if err != nil {
			return fmt.Errorf("WithTokenFile: %w", err)
		}
		return c.setToken("WithTokenFile", &token{path: path, value: value, looked: time.Now()})
	}
}

// WithBalancing says which of several replicas gets a call. Default: [ByOrganization] for a dns:/// target or a host's name if package
// affinity is linked in, under a key that all callers of the target share, and [RoundRobin] if it is not; [OneConnection] for a socket or
// an address.
func WithBalancing(balancing Balancing) Option {
	return func(c *config) error {
		c.balancing = balancing
		return nil
	}
}

// WithDialer replaces the dialer, for instance by a tunnel. The address is host:port, or a socket's path.
func WithDialer(dial func(ctx context.Context, address string) (net.Conn, error)) Option {
	return func(c *config) error {
		if dial == nil {
			return errors.New("WithDialer: no dialer")
		}
		c.dial = dial
		return nil
	}
}

// WithStatsHandler passes calls and connections to a handler, such as OpenTelemetry's. It gets neither payloads nor the token: these hold
// credentials. There is no option for interceptors, which would see both.
func WithStatsHandler(handler stats.Handler) Option {
	return func(c *config) error {
		if handler == nil {
			return errors.New("WithStatsHandler: no handler")
		}
		c.stats = handler
		return nil
	}
}

// WithUserAgent puts the caller's name before this package's own name and version: for instance my-platform/1.2.
func WithUserAgent(name string) Option {
	return func(c *config) error {
		if name == "" || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r > '~' }) || len(name) > 128 {
			return fmt.Errorf("WithUserAgent: %q is not a name of 1 to 128 printable ASCII characters", name)
		}
		c.userAgent = name + " "
		return nil
	}
}

// WithLogger sets where decisions are logged. Default: [slog.Default]. No value of a credential is ever logged.
func WithLogger(log *slog.Logger) Option {
	return func(c *config) error {
		if log == nil {
			return errors.New("WithLogger: no logger; give one whose handler is never enabled to log nothing")
		}
		c.log = log
		return nil
	}
}

// WithObserver adds a function that gets every answer, for metrics. It is called before the answer is returned, and must not block. Several
// are called in the order of the options.
func WithObserver(observe func(Observation)) Option {
	return func(c *config) error {
		if observe == nil {
			return errors.New("WithObserver: no observer")
		}
		if before := c.observe; before != nil {
			c.observe = func(told Observation) {
				before(told)
				observe(told)
			}
			return nil
		}
		c.observe = observe
		return nil
	}
}

// WithTraceContext sets a function that returns a call's W3C trace context, as the values of the headers traceparent and tracestate.
// Package byokgateotel has one for OpenTelemetry.
func WithTraceContext(extract func(context.Context) (traceparent, tracestate string)) Option {
	return func(c *config) error {
		if extract == nil {
			return errors.New("WithTraceContext: no function that finds the trace context")
		}
		c.trace = extract
		return nil
	}
}

func (c *config) setToken(option string, token *token) error {
	if c.token != nil {
		return fmt.Errorf("%s: there is a token already", option)
	}
	c.token = token
	return nil
}
