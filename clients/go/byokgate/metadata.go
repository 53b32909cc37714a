package byokgate

import (
	"context"
	"regexp"

	"google.golang.org/grpc/metadata"
)

// traceKey is the context's key for a trace context.
type traceKey struct{}

type traceContext struct{ parent, state string }

// maxTraceState is the minimum that the W3C requires to be propagated.
const maxTraceState = 512

var (
	traceParent = regexp.MustCompile(`^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$`)
	traceState  = regexp.MustCompile(`^[ -~]*$`)
)

// ContextWithTrace makes calls with this context carry a W3C trace context: the values of a request's traceparent and
// tracestate headers. Malformed values are left out. If a tracing library keeps the trace context, see [WithTraceContext].
func ContextWithTrace(ctx context.Context, traceparent, tracestate string) context.Context {
	return context.WithValue(orBackground(ctx), traceKey{}, traceContext{traceparent, tracestate})
}

// traced adds the trace context to the call's metadata. It runs on the caller's own goroutine, since the hook is the caller's.
func (c *Client) traced(ctx context.Context) context.Context {
	if c.traceless {
		return ctx
	}
	found, _ := ctx.Value(traceKey{}).(traceContext)
	if c.trace != nil {
		hook(func() {
			if parent, state := c.trace(ctx); parent != "" {
				found = traceContext{parent, state}
			}
		}, func(thrown any) { c.fault(ctx, panicked("the hook of WithTraceContext", thrown)) })
	}
	if found.parent == "" || !traceParent.MatchString(found.parent) {
		return ctx
	}
	ctx = metadata.AppendToOutgoingContext(ctx, "traceparent", found.parent)
	if found.state != "" && len(found.state) <= maxTraceState && traceState.MatchString(found.state) {
		ctx = metadata.AppendToOutgoingContext(ctx, "tracestate", found.state)
	}
	return ctx
}

// orBackground replaces a nil context.
func orBackground(ctx context.Context) context.Context {
	if ctx == nil {
		return context.Background()
	}
	return ctx
}
