package muxservice

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/byokgatetest"
)

func post(handler http.Handler) int {
	form := url.Values{"runtime": {"agent"}, "model": {"acme-large"}}
	request := httptest.NewRequest(http.MethodPost, "/organizations/org-1/workspaces", strings.NewReader(form.Encode()))
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	answer := httptest.NewRecorder()
	handler.ServeHTTP(answer, request)
	return answer.Code
}

// secrets has a store in which the organization's secrets cannot be read.
func secrets(_ context.Context, _ string, scope byokgate.Scope, _ []string) (byokgate.Found, error) {
	if scope == byokgate.Organization {
		return nil, errors.New("the store is down")
	}
	return nil, nil
}

func TestOnlyWhatMayStartStarts(t *testing.T) {
	gate := byokgatetest.Start(t)
	gate.Names("acme-large", "ACME_API_KEY")
	started := 0
	handler := New(gate.Client(), secrets, func(allowed byokgate.Allowed) {
		if allowed.BillingMode() != byokgate.BYOK {
			t.Errorf("%v", allowed)
		}
		started++
	})
	gate.Allow(byokgate.BYOK)
	if status := post(handler); status != http.StatusCreated || started != 1 {
		t.Errorf("%d, %d started", status, started)
	}
	asked := gate.Asked()[0]
	if asked.OrganizationID != "org-1" || len(asked.UnreadableScopes) != 1 || asked.UnreadableScopes[0] != byokgate.Organization {
		t.Errorf("%+v", asked)
	}
	gate.Deny(byokgate.CredentialScopeUnreadable)
	if status := post(handler); status != http.StatusServiceUnavailable || started != 1 {
		t.Errorf("%d, %d started", status, started)
	}
	gate.Fail(byokgate.ReasonUnauthenticated)
	if status := post(handler); status != http.StatusInternalServerError || started != 1 {
		t.Errorf("%d, %d started", status, started)
	}
}

func TestReportingRefusesNobody(t *testing.T) {
	gate := byokgatetest.Start(t)
	gate.Deny(byokgate.MissingBYOKCredential)
	reporter, err := gate.Client().ReportOnly(byokgate.ReportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var started atomic.Int32
	handler := NewReporting(reporter, secrets, func(*http.Request) bool { return true }, func() { started.Add(1) })
	for range 3 {
		if status := post(handler); status != http.StatusCreated {
			t.Errorf("%d", status)
		}
	}
	if err := reporter.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if counts := reporter.Counts(); started.Load() != 3 || counts.WouldRefuse[byokgate.MissingBYOKCredential] != 3 || counts.Dropped != 0 {
		t.Errorf("%d started, %+v", started.Load(), counts)
	}
	for _, asked := range gate.Asked() {
		if !asked.ReportOnly {
			t.Errorf("%+v", asked)
		}
	}
}
