package byokgateotel

import (
	"context"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/trace"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/byokgatetest"
)

func TestASpanGoesOnAndAnswersAreCounted(t *testing.T) {
	reader := metric.NewManualReader()
	options, err := Options(metric.NewMeterProvider(metric.WithReader(reader)))
	if err != nil {
		t.Fatal(err)
	}
	gate := byokgatetest.Start(t)
	gate.When(byokgatetest.Model("good")).Allow(byokgate.BYOK, byokgate.WarnCredentialUnverified)
	gate.Deny(byokgate.MissingBYOKCredential)
	client := gate.Client(options...)

	ctx, span := trace.NewTracerProvider().Tracer("test").Start(context.Background(), "POST /workspaces")
	defer span.End()
	for _, model := range []string{"good", "good", "bad"} {
		_, _ = client.Decide(ctx, byokgate.Request{
			Checkpoint: byokgate.Create, Spec: byokgate.Spec{Runtime: "agent", Model: model, Lookup: byokgate.Static(nil, nil)},
		})
	}
	for _, asked := range gate.Asked() {
		if id := span.SpanContext().TraceID().String(); !strings.Contains(asked.TraceParent, id) {
			t.Errorf("trace context %q without %s", asked.TraceParent, id)
		}
	}
	var collected metricdata.ResourceMetrics
	if err := reader.Collect(context.Background(), &collected); err != nil {
		t.Fatal(err)
	}
	counted := map[string]uint64{}
	for _, scope := range collected.ScopeMetrics {
		for _, instrument := range scope.Metrics {
			histogram, is := instrument.Data.(metricdata.Histogram[float64])
			if !is || instrument.Name != DecisionsName {
				continue
			}
			for _, point := range histogram.DataPoints {
				code, _ := point.Attributes.Value("code")
				outcome, _ := point.Attributes.Value("outcome")
				unverified, _ := point.Attributes.Value("unverified")
				counted[outcome.AsString()+" "+code.AsString()+" "+unverified.Emit()] += point.Count
			}
		}
	}
	if len(counted) != 2 || counted["allowed  true"] != 2 || counted["denied MISSING_BYOK_CREDENTIAL false"] != 1 {
		t.Errorf("%v", counted)
	}
	if _, err := Options(nil); err == nil {
		t.Error("no provider is taken")
	}
}
