package byokgate

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// Option configures a client. An option that does not stand makes [New] fail.
type Option func(*config) error

type config struct {
	timeout      time.Duration
	batchTimeout time.Duration
	tls          *tls.Config
	insecure     bool
	token        func() (string, error)
	log          *slog.Logger
	observe      func(Observation)
	trace        func(context.Context) (traceparent, tracestate string)
}

// WithTimeout sets how long one decision may take, lookups and retries included. Default: [DefaultTimeout].
func WithTimeout(timeout time.Duration) Option {
	return func(c *config) error {
		if timeout <= 0 {
			return fmt.Errorf("WithTimeout: %v is not above zero; there is no call without a deadline", timeout)
		}
		c.timeout = timeout
		return nil
	}
}

// WithBatchTimeout sets how long one batch may take. Default: [DefaultBatchTimeout].
func WithBatchTimeout(timeout time.Duration) Option {
	return func(c *config) error {
		if timeout <= 0 {
			return fmt.Errorf("WithBatchTimeout: %v is not above zero; there is no call without a deadline", timeout)
		}
		c.batchTimeout = timeout
		return nil
	}
}

// WithTLS encrypts, with a configuration that must verify the server. One with Certificates shows them (mTLS).
func WithTLS(tlsConfig *tls.Config) Option {
	return func(c *config) error {
		if err := checkTLS(tlsConfig); err != nil {
			return fmt.Errorf("WithTLS: %w", err)
		}
		c.tls = tlsConfig.Clone()
		return nil
	}
}

// WithTLSFiles encrypts. The server's certificate must come from an authority in ca (empty: one of the system's). With cert
// and key the client shows a certificate too (mTLS); it is read again for each connection, so that it can be renewed.
func WithTLSFiles(ca, cert, key string) Option {
	return func(c *config) error {
		tlsConfig, err := tlsFromFiles(ca, cert, key)
		if err != nil {
			return fmt.Errorf("WithTLSFiles: %w", err)
		}
		c.tls = tlsConfig
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
func WithToken(token Secret) Option {
	return func(c *config) error {
		value, err := checkToken(token.Reveal())
		if err != nil {
			return fmt.Errorf("WithToken: the token %w", err)
		}
		return c.setToken("WithToken", func() (string, error) { return value, nil })
	}
}

// WithTokenFile sends a bearer token with every call. The file is read each time, so that the token can be rotated; a
// trailing newline is not part of it.
func WithTokenFile(path string) Option {
	return func(c *config) error {
		if _, err := tokenFile(path); err != nil {
			return fmt.Errorf("WithTokenFile: %w", err)
		}
		return c.setToken("WithTokenFile", func() (string, error) { return tokenFile(path) })
	}
}

// WithLogger sets where decisions are logged. Default: [slog.Default]. No value of a credential is ever logged.
func WithLogger(log *slog.Logger) Option {
	return func(c *config) error {
		if log == nil {
			return errors.New("WithLogger: no logger; slog.New(slog.DiscardHandler) logs nothing")
		}
		c.log = log
		return nil
	}
}

// WithObserver is told of every answer, for metrics. It is called before the answer is returned, and must not block.
func WithObserver(observe func(Observation)) Option {
	return func(c *config) error {
		c.observe = observe
		return nil
	}
}

// WithTraceContext says where a call's W3C trace context is found, as the values of the headers traceparent and tracestate.
// With OpenTelemetry: inject the context into a propagation.MapCarrier and return its two entries.
func WithTraceContext(extract func(context.Context) (traceparent, tracestate string)) Option {
	return func(c *config) error {
		c.trace = extract
		return nil
	}
}

func (c *config) setToken(option string, token func() (string, error)) error {
	if c.token != nil {
		return fmt.Errorf("%s: there is a token already", option)
	}
	c.token = token
	return nil
}
