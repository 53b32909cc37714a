// Package byokgateotel connects byok-gate's client with OpenTelemetry: byok-gate's spans become children of the caller's, and answers are
// counted. It is a separate module, so that the client needs no OpenTelemetry.
//
//	options, err := byokgateotel.Options(otel.GetMeterProvider())
//	gate, err := byokgate.New(target, options...)
//
// The client makes no spans: byok-gate does, and the caller's span has the decision's id. For spans of the calls themselves, use
// WithStatsHandler with otelgrpc.NewClientHandler, which gets no payload.
package byokgateotel

import (
	"context"
	"fmt"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// The instruments, as OpenTelemetry names them.
const (
	// DecisionsName is a histogram of seconds from call to answer, with the attributes mode, checkpoint, outcome, code, reason, provider,
	// billing_mode and unverified. Its count is the number of answers.
	DecisionsName = "byokgate.client.decision.duration"
	// RetriesName counts retries, by mode and checkpoint.
	RetriesName = "byokgate.client.retries"
)

// buckets separate an answer from the cache, one from a provider, and a timeout.
var buckets = []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 4, 10, 60}

// Options are both: [TraceContext], and counting with this provider's meter.
func Options(provider metric.MeterProvider) ([]byokgate.Option, error) {
	if provider == nil {
		return nil, fmt.Errorf("byokgateotel: no meter provider; otel.GetMeterProvider() is the global one")
	}
	meter := provider.Meter("github.com/byok-gate/byok-gate/clients/go/byokgate", metric.WithInstrumentationVersion(byokgate.Version))
	decisions, err := meter.Float64Histogram(DecisionsName, metric.WithUnit("s"), metric.WithExplicitBucketBoundaries(buckets...),
		metric.WithDescription("Time from a question to byok-gate's answer, lookups and retries included."))
	if err != nil {
		return nil, fmt.Errorf("byokgateotel: %w", err)
	}
	retries, err := meter.Int64Counter(RetriesName, metric.WithUnit("{retry}"),
		metric.WithDescription("How often a question to byok-gate was put again."))
	if err != nil {
		return nil, fmt.Errorf("byokgateotel: %w", err)
	}
	observe := byokgate.WithObserver(func(told byokgate.Observation) {
		asked := []attribute.KeyValue{
			attribute.String("mode", string(told.Mode)), attribute.String("checkpoint", told.Checkpoint.String()),
		}
		if told.Retries > 0 {
			retries.Add(context.Background(), int64(told.Retries), metric.WithAttributes(asked...))
		}
		decisions.Record(context.Background(), told.Took.Seconds(), metric.WithAttributes(append(asked,
			attribute.String("outcome", string(told.Outcome)), attribute.String("code", string(told.Code)),
			attribute.String("reason", string(told.Reason)), attribute.String("provider", told.Provider),
			attribute.String("billing_mode", string(told.BillingMode)), attribute.Bool("unverified", told.Unverified))...))
	})
	return []byokgate.Option{TraceContext(), observe}, nil
}

// TraceContext sends the span of the call's context, in W3C format.
func TraceContext() byokgate.Option {
	return byokgate.WithTraceContext(func(ctx context.Context) (traceparent, tracestate string) {
		carrier := propagation.MapCarrier{}
		propagation.TraceContext{}.Inject(ctx, carrier)
		return carrier["traceparent"], carrier["tracestate"]
	})
}
