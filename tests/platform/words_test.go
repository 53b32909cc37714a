package main

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/byokgatetest"
)

// byokgatetest returns the real byok-gate's texts, so that a platform's tests see the same messages and retries as its tenants.
func TestTheTestGateSaysWhatTheRealOneSays(t *testing.T) {
	vendor := startVendor(t, liveKey)
	real, err := byokgate.New(startGate(t, freeAddress(t), vendor.url).address, byokgate.WithLogger(discard))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { real.Close() })
	asked := func(edit func(*byokgate.Spec), values ...string) byokgate.Request {
		found := byokgate.Found{}
		for _, value := range values {
			found["ACME_API_KEY"] = byokgate.NewSecret(value)
		}
		spec := byokgate.Spec{Runtime: "agent", Model: "acme-large", Lookup: byokgate.Static(found, nil)}
		if edit != nil {
			edit(&spec)
		}
		return byokgate.Request{Checkpoint: byokgate.Create, Spec: spec}
	}
	unread := func(context.Context, byokgate.Scope, []string) (byokgate.Found, error) {
		return nil, errors.New("down")
	}
	for code, request := range map[byokgate.Code]byokgate.Request{
		byokgate.RuntimeRequired:             asked(func(s *byokgate.Spec) { s.Runtime = "" }),
		byokgate.RuntimeUnsupported:          asked(func(s *byokgate.Spec) { s.Runtime = "nowhere" }),
		byokgate.ModelRequired:               asked(func(s *byokgate.Spec) { s.Model = "" }),
		byokgate.UnregisteredModelForRuntime: asked(func(s *byokgate.Spec) { s.Model = "nothing" }),
		byokgate.MissingBYOKCredential:       asked(nil),
		byokgate.InvalidBYOKCredential:       asked(nil, deadKey),
		byokgate.MalformedBYOKCredential:     asked(nil, "made-up-key1\n"),
		byokgate.CredentialScopeUnreadable:   asked(func(s *byokgate.Spec) { s.Lookup = unread }),
		byokgate.MissingPlatformProxy:        asked(func(s *byokgate.Spec) { s.Model, s.PlatformProxy = "platform-small", byokgate.ProxyAbsent }),
		byokgate.OverrideConflictsWithModel:  asked(func(s *byokgate.Spec) { s.Model, s.OperatorOverride = "platform-small", byokgate.OverrideBYOK }),
	} {
		t.Run(string(code), func(t *testing.T) {
			gate := byokgatetest.Start(t)
			gate.Names("acme-large", "ACME_API_KEY")
			gate.Deny(code)
			_, fromReal := real.Decide(t.Context(), request)
			_, fromTest := gate.Client().Decide(t.Context(), request)
			var said, told *byokgate.Denied
			if !errors.As(fromReal, &said) || !errors.As(fromTest, &told) || said.Code() != code {
				t.Fatalf("%v, %v", fromReal, fromTest)
			}
			host := strings.TrimPrefix(vendor.url, "http://")
			for what, words := range map[string][2]string{
				"message": {said.Body().Error, told.Body().Error}, "remedy": {said.Body().Remedy, told.Body().Remedy},
			} {
				if got := strings.ReplaceAll(words[1], "api.acme.example", host); got != words[0] {
					t.Errorf("%s: %q, and the real one says %q", what, got, words[0])
				}
			}
			if said.Retryable() != told.Retryable() || said.RetryAfter() != told.RetryAfter() || said.HTTPStatus() != told.HTTPStatus() {
				t.Errorf("retryable %v after %v, and the real one's %v after %v", told.Retryable(), told.RetryAfter(), said.Retryable(), said.RetryAfter())
			}
		})
	}
}

// The README says for each code whether it is retryable.
func TestTheTestGateRetriesWhatTheREADMESaysIsRetryable(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	gate := byokgatetest.Start(t)
	client := gate.Client()
	for _, code := range byokgate.Codes() {
		_, row, found := strings.Cut(string(text), "\n| `"+string(code)+"` |")
		if !found {
			t.Errorf("%s is not in the README", code)
			continue
		}
		row, _, _ = strings.Cut(row, "\n")
		gate.Deny(code)
		_, err := client.Decide(t.Context(), byokgate.Request{
			Checkpoint: byokgate.Create, Spec: byokgate.Spec{Runtime: "agent", Model: "m", Lookup: byokgate.Static(nil, nil)},
		})
		if retryable := byokgate.RefusalOf(err).Retryable(); retryable != strings.Contains(row, "*Retry.*") {
			t.Errorf("%s: retryable %v, and the README says%s", code, retryable, row)
		}
	}
}
