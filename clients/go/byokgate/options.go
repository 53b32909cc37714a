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

// Option configures a client. An option that is not valid makes [New] fail.
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

// shortestTimeout is below any time in which an answer can come. Shorter ones are numbers whose unit was forgotten.
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

// notNegative is why a setting is refused whose zero stands for its default.
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

// WithLookupBudget sets how long one lookup may take, and how many may be under way at a time. Defaults: [DefaultLookupTime] and
// [DefaultLookups]. What is over counts as unreadable, never as absent.
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

// WithTLS encrypts, with a configuration that must verify the server. One with Certificates shows them (mTLS). A configuration that goes below
// TLS 1.2, names weak cipher suites, verifies nothing or writes its keys down is refused.
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

// WithTLSFiles encrypts. The server's certificate must come from an authority in ca (empty: one of the system's). With cert
// and key the client shows a certificate too (mTLS). All are read again for each connection, so that they can be renewed; where they cannot
// be read, as half way through a renewal, what was read last stands.
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

// WithTokenFile sends a bearer token with every call. The file is looked at again once a second, in the background, and at once where
// byok-gate does not know the token, so that the token can be rotated; a trailing newline is not part of it. Where the file cannot be read,
// the token that was read last is sent.
func WithTokenFile(path string) Option {
	return func(c *config) error {
		value, err := readToken(path)
		if err != nil {
			return fmt.Errorf("WithTokenFile: %w", err)
		}
		return c.setToken("WithTokenFile", &token{path: path, value: value, looked: time.Now()})
	}
}

// WithBalancing says to which of several replicas a question goes. Default: [ByOrganization] for a dns:/// target or a host's name if package
// affinity is linked in, under a key that all callers of the target share, and [RoundRobin] if it is not; [OneConnection] for a socket or an
// address, where there is nothing to choose.
func WithBalancing(balancing Balancing) Option {
	return func(c *config) error {
		c.balancing = balancing
		return nil
	}
}

// WithDialer makes connections in another way, for instance through a tunnel. The address is host:port, or a socket's path.
func WithDialer(dial func(ctx context.Context, address string) (net.Conn, error)) Option {
	return func(c *config) error {
		if dial == nil {
			return errors.New("WithDialer: no dialer")
		}
		c.dial = dial
		return nil
	}
}

// WithStatsHandler tells a handler, such as OpenTelemetry's, of calls and connections. It gets neither what is sent and received nor the
// token: these hold credentials. There is no option for interceptors, which would see both.
func WithStatsHandler(handler stats.Handler) Option {
	return func(c *config) error {
		if handler == nil {
			return errors.New("WithStatsHandler: no handler")
		}
		c.stats = handler
		return nil
	}
}

// WithUserAgent says who calls, before this package's own name and version: for instance my-platform/1.2.
func WithUserAgent(name string) Option {
	return func(c *config) error {
		if name == "" || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r > '~' }) || len(name) > 128 {
			return fmt.Errorf("WithUserAgent: %q is no name of 1 to 128 printable ASCII characters", name)
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

// WithObserver is told of every answer, for metrics. It is called before the answer is returned, and must not block. Several are told in the
// order in which they are given.
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

// WithTraceContext says where a call's W3C trace context is found, as the values of the headers traceparent and tracestate.
// Package byokgateotel has it for OpenTelemetry.
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
