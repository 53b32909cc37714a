package gatehttp

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/internal/exported"
)

// Every function is called with nil and zero values: none panics, and none lets anything through. A function without a row fails the test.
func TestEveryFunctionTakesNilAndZero(t *testing.T) {
	request := httptest.NewRequest(http.MethodPost, "/", nil)
	answered := func(handler http.Handler) {
		t.Helper()
		response := httptest.NewRecorder()
		handler.ServeHTTP(response, request)
		if response.Code != http.StatusServiceUnavailable || response.Body.Len() == 0 {
			t.Errorf("answered %d %s", response.Code, response.Body)
		}
	}
	reached := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the handler was reached") })
	ask := func(*http.Request) (byokgate.Request, error) { return byokgate.Request{}, nil }
	var client *byokgate.Client
	rows := map[string]func(){
		"Decide": func() {
			for _, gate := range []byokgate.Decider{nil, client, &byokgate.Client{}} {
				for _, request := range []*http.Request{nil, request} {
					response := httptest.NewRecorder()
					if _, passed := Decide(response, request, gate, byokgate.Request{}); passed || response.Code != http.StatusServiceUnavailable {
						t.Errorf("%v, %d", passed, response.Code)
					}
					if _, passed := Decide(nil, request, gate, byokgate.Request{}); passed {
						t.Error("passed")
					}
				}
			}
		},
		"Report": func() {
			for _, reporter := range []*byokgate.Reporter{nil, {}} {
				if outcome, refusal := Report(nil, reporter, byokgate.Request{}).Verdict(); outcome != "" || refusal != nil {
					t.Errorf("%s, %v", outcome, refusal)
				}
			}
		},
		"Refuse": func() {
			Refuse(nil, nil)
			answered(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { Refuse(w, nil) }))
		},
		"AnswerFor": func() {
			var denied *byokgate.Denied
			for _, err := range []error{nil, errors.New("-"), denied} {
				if answer := AnswerFor(err); answer.Status != http.StatusServiceUnavailable || answer.Header.Get("Retry-After") != "1" {
					t.Errorf("%+v", answer)
				}
			}
		},
		"Middleware": func() {
			answered(Middleware(nil, ask)(reached))
			answered(Middleware(client, ask)(reached))
			answered(Middleware(client, nil)(reached))
			answered(Middleware(client, ask)(nil))
			answered(Middleware(nil, nil)(nil))
		},
		"AllowedFor": func() {
			for _, request := range []*http.Request{nil, request, {}} {
				if _, passed := AllowedFor(request); passed {
					t.Error("passed")
				}
			}
		},
		"TrustTrace": func() {
			if TrustTrace(nil) != nil || TrustTrace(&http.Request{}) == nil {
				t.Error("-")
			}
		},
	}
	for name, row := range rows {
		func() {
			defer func() {
				if thrown := recover(); thrown != nil {
					t.Errorf("%s panics: %v", name, thrown)
				}
			}()
			row()
		}()
	}
	names, err := exported.Functions(".")
	if err != nil || len(names) != len(rows) {
		t.Errorf("%v, %d rows for %q", err, len(rows), names)
	}
	for _, name := range names {
		if rows[name] == nil {
			t.Errorf("%s has no row here", name)
		}
	}
}
