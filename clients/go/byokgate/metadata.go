package byokgate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// maxTokenBytes is far above any bearer token, and keeps a wrong file out of a header.
const maxTokenBytes = 8 * 1024

// bearer sends a token with every call. Whether the connection may carry one is settled when the client is made.
type bearer struct {
	token func() (string, error)
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := b.token()
	if err != nil {
		return nil, err
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (bearer) RequireTransportSecurity() bool { return false }

// checkToken does not quote the token.
func checkToken(token string) (string, error) {
	switch {
	case token == "":
		return "", errors.New("is empty")
	case len(token) > maxTokenBytes:
		return "", fmt.Errorf("is longer than %d bytes", maxTokenBytes)
	case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return "", errors.New("holds white space, control characters or non-ASCII")
	}
	return token, nil
}

// tokenFile reads the file for every call: a rotated token is used at once, and a file is read in microseconds.
func tokenFile(path string) (string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	token, err := checkToken(strings.TrimRight(string(text), "\r\n"))
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return token, nil
}

// === W3C trace context ===

// traceKey is the context's key for a trace context.
type traceKey struct{}

type traceContext struct{ parent, state string }

// maxTraceState is what the W3C asks to be propagated at least.
const maxTraceState = 512

var (
	traceParent = regexp.MustCompile(`^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$`)
	traceState  = regexp.MustCompile(`^[ -~]*$`)
)

// ContextWithTrace makes calls with this context carry a W3C trace context: the values of a request's traceparent and
// tracestate headers. Values that are not well formed are left out. Where a tracing library keeps the trace context, see
// [WithTraceContext].
func ContextWithTrace(ctx context.Context, traceparent, tracestate string) context.Context {
	return context.WithValue(ctx, traceKey{}, traceContext{traceparent, tracestate})
}

// traced adds the trace context to what is sent.
func (c *Client) traced(ctx context.Context) context.Context {
	found, _ := ctx.Value(traceKey{}).(traceContext)
	if c.trace != nil {
		if parent, state := c.trace(ctx); parent != "" {
			found = traceContext{parent, state}
		}
	}
	if !traceParent.MatchString(found.parent) {
		return ctx
	}
	ctx = metadata.AppendToOutgoingContext(ctx, "traceparent", found.parent)
	if found.state != "" && len(found.state) <= maxTraceState && traceState.MatchString(found.state) {
		ctx = metadata.AppendToOutgoingContext(ctx, "tracestate", found.state)
	}
	return ctx
}

func (c *Client) unaryTrace(
	ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	return invoke(c.traced(ctx), method, request, reply, conn, options...)
}

func (c *Client) streamTrace(
	ctx context.Context, description *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer,
	options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	return open(c.traced(ctx), description, conn, method, options...)
}
