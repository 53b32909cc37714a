package routers

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/byokgatetest"
)

// The same answers with every router: an allowed workspace starts, a refused one gets the whole answer, and nothing starts by mistake.
func TestTheSameAnswersInEveryRouter(t *testing.T) {
	for name, serve := range map[string]func(byokgate.Decider, Start) func(*http.Request) *http.Response{
		"chi": func(gate byokgate.Decider, start Start) func(*http.Request) *http.Response {
			return recorded(Chi(gate, start))
		},
		"mux": func(gate byokgate.Decider, start Start) func(*http.Request) *http.Response {
			return recorded(Mux(gate, start))
		},
		"echo": func(gate byokgate.Decider, start Start) func(*http.Request) *http.Response {
			return recorded(Echo(gate, start))
		},
		"fiber": func(gate byokgate.Decider, start Start) func(*http.Request) *http.Response {
			app := Fiber(gate, start)
			return func(r *http.Request) *http.Response {
				response, err := app.Test(r, 10_000)
				if err != nil {
					t.Fatal(err)
				}
				return response
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			gate := byokgatetest.Start(t)
			gate.Names("acme-large", "ACME_API_KEY")
			var started []byokgate.BillingMode
			call := serve(gate.Client(), func(allowed byokgate.Allowed) { started = append(started, allowed.BillingMode()) })
			post := func() (int, http.Header, string) {
				t.Helper()
				request := httptest.NewRequest(http.MethodPost, "/workspaces", strings.NewReader("runtime=agent&model=acme-large&key=made-up"))
				request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
				response := call(request)
				defer response.Body.Close()
				body, err := io.ReadAll(response.Body)
				if err != nil {
					t.Fatal(err)
				}
				return response.StatusCode, response.Header, string(body)
			}
			gate.Deny(byokgate.MissingBYOKCredential)
			if status, header, body := post(); status != http.StatusUnprocessableEntity || !strings.Contains(body, `"code":"MISSING_BYOK_CREDENTIAL"`) ||
				header.Get("Content-Type") != "application/json" || header.Get("Cache-Control") != "no-store" || header.Get("Retry-After") != "" {
				t.Errorf("%d, %v, %s", status, header, body)
			}
			gate.Deny(byokgate.BYOKProbeTimeout, byokgatetest.RetryAfter(3*time.Second))
			if status, header, body := post(); status != http.StatusServiceUnavailable || header.Get("Retry-After") != "3" || !strings.Contains(body, `"retryable":true`) {
				t.Errorf("%d, %v, %s", status, header, body)
			}
			gate.Fail(byokgate.ReasonUnauthenticated)
			if status, _, body := post(); status != http.StatusInternalServerError || strings.Contains(body, "token") {
				t.Errorf("%d, %s", status, body)
			}
			gate.Down()
			if status, _, _ := post(); status != http.StatusServiceUnavailable {
				t.Errorf("%d", status)
			}
			if len(started) != 0 {
				t.Fatalf("started %v", started)
			}
			gate.Up()
			gate.Allow(byokgate.BYOK)
			if status, _, body := post(); status != http.StatusCreated || len(started) != 1 || started[0] != byokgate.BYOK {
				t.Errorf("%d, %s, %v", status, body, started)
			}
			asked := gate.Asked()
			if last := asked[len(asked)-1]; last.Model != "acme-large" || len(last.Credentials) != 1 || last.Credentials[0].Value.Reveal() != "made-up" {
				t.Errorf("%+v", last)
			}
		})
	}
}

// A route that has lost its middleware starts nothing.
func TestWithoutTheMiddlewareNothingStarts(t *testing.T) {
	response := httptest.NewRecorder()
	created(func(byokgate.Allowed) { t.Error("started") })(response, httptest.NewRequest(http.MethodPost, "/workspaces", nil))
	if response.Code != http.StatusServiceUnavailable {
		t.Errorf("%d", response.Code)
	}
}

func recorded(handler http.Handler) func(*http.Request) *http.Response {
	return func(r *http.Request) *http.Response {
		response := httptest.NewRecorder()
		handler.ServeHTTP(response, r)
		return response.Result()
	}
}
