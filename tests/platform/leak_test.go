package main

import (
	"context"
	"iter"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// After Close no goroutine of the client is left, even from abandoned work.
func TestTheClientLeavesNothingBehind(t *testing.T) {
	vendor := startVendor(t, liveKey)
	gate := startGate(t, freeAddress(t), vendor.url)
	before := goleak.IgnoreCurrent()
	client, err := byokgate.New(gate.address, byokgate.WithLogger(discard))
	if err != nil {
		t.Fatal(err)
	}
	spec := byokgate.Spec{
		WorkspaceID: "ws-1", Runtime: "agent", Model: "acme-large",
		Lookup: byokgate.Static(byokgate.Found{"ACME_API_KEY": byokgate.NewSecret(liveKey)}, nil),
	}
	request := byokgate.Request{Checkpoint: byokgate.Provision, Spec: spec}
	if _, err := client.Decide(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	requests := make([]byokgate.Request, 500)
	for index := range requests {
		requests[index] = request
	}
	for range client.BatchDecide(t.Context(), requests) {
		break // left half way
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	_, _ = client.Decide(gone, request)
	reporter, err := client.ReportOnly(byokgate.ReportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		reporter.Go(t.Context(), request)
	}
	if err := reporter.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	dead := spec
	dead.Lookup = byokgate.Static(nil, nil)
	running := func(context.Context) iter.Seq2[byokgate.Spec, error] {
		return func(yield func(byokgate.Spec, error) bool) { yield(dead, nil) }
	}
	for range client.Sweep(t.Context(), running, byokgate.SweepOptions{ConfirmAfter: time.Millisecond, Lookups: 1000}) {
		break // left with a change
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	// The vendor is a server in this process, and byok-gate keeps its connections to it.
	goleak.VerifyNone(t, before, goleak.IgnoreAnyFunction("net/http.(*conn).serve"))
}
