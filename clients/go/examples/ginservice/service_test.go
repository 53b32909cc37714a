package ginservice

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/clients/go/byokgatetest"
)

// start has a byok-gate in which ACME_API_KEY matters to acme-large.
func start(t *testing.T) (*byokgatetest.Gate, *Service, func(method, path, body string) *httptest.ResponseRecorder) {
	gate := byokgatetest.Start(t)
	gate.Names("acme-large", "ACME_API_KEY")
	service := New(gate.Client())
	handler := service.Handler()
	return gate, service, func(method, path, body string) *httptest.ResponseRecorder {
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, httptest.NewRequest(method, path, strings.NewReader(body)))
		return answer
	}
}

const payload = `{"runtime": "agent", "model": "acme-large", "secrets": {"ACME_API_KEY": "made-up-key"}}`

func read[T any](t *testing.T, answer *httptest.ResponseRecorder, status int) T {
	t.Helper()
	var body T
	if answer.Code != status || json.Unmarshal(answer.Body.Bytes(), &body) != nil {
		t.Fatalf("%d: %s", answer.Code, answer.Body)
	}
	return body
}

func TestCreate(t *testing.T) {
	gate, service, call := start(t)
	gate.Allow(byokgate.BYOK)
	if made := read[Workspace](t, call(http.MethodPost, "/workspaces", payload), http.StatusCreated); made.Billing != byokgate.BYOK {
		t.Errorf("%+v", made)
	}
	if asked := gate.Asked(); len(asked) != 1 || asked[0].Checkpoint != byokgate.Create || asked[0].Credentials[0].Value.Reveal() != "made-up-key" {
		t.Errorf("%+v", asked)
	}

	gate.Deny(byokgate.MissingBYOKCredential)
	body := read[byokgate.Body](t, call(http.MethodPost, "/workspaces", payload), http.StatusUnprocessableEntity)
	if body.Code != byokgate.MissingBYOKCredential || body.MissingEnv[0] != "ACME_API_KEY" {
		t.Errorf("%+v", body)
	}
	gate.Deny(byokgate.BYOKProbeTimeout)
	if answer := call(http.MethodPost, "/workspaces", payload); answer.Code != http.StatusServiceUnavailable || answer.Header().Get("Retry-After") != "2" {
		t.Errorf("%d, %v", answer.Code, answer.Header())
	}
	gate.Down()
	if answer := call(http.MethodPost, "/workspaces", payload); answer.Code != http.StatusServiceUnavailable {
		t.Errorf("%d", answer.Code)
	}
	if len(service.workspaces) != 1 {
		t.Errorf("%d workspaces after one allow", len(service.workspaces))
	}
}

func TestARefusedRestartKeepsTheBox(t *testing.T) {
	gate, service, call := start(t)
	gate.When(byokgatetest.At(byokgate.Create)).Allow(byokgate.BYOK)
	gate.When(byokgatetest.At(byokgate.Provision)).Deny(byokgate.InvalidBYOKCredential).Then().Allow(byokgate.BYOK)
	made := read[Workspace](t, call(http.MethodPost, "/workspaces", payload), http.StatusCreated)
	read[byokgate.Body](t, call(http.MethodPost, "/workspaces/"+made.ID+"/restart", ""), http.StatusUnprocessableEntity)
	if box := service.workspaces[made.ID].Box; box != made.Box {
		t.Error("the box was stopped although its restart was refused")
	}
	if again := read[Workspace](t, call(http.MethodPost, "/workspaces/"+made.ID+"/restart", ""), http.StatusOK); again.Box == made.Box {
		t.Error("the box was not restarted")
	}
}

func TestASecretIsDecidedBeforeItIsSaved(t *testing.T) {
	gate, service, call := start(t)
	gate.Allow(byokgate.BYOK)
	made := read[Workspace](t, call(http.MethodPost, "/workspaces", payload), http.StatusCreated)
	held := func(name string) string { return service.workspaces[made.ID].secrets[name].Reveal() }
	path := "/workspaces/" + made.ID + "/secrets/"

	gate.Deny(byokgate.InvalidBYOKCredential)
	read[byokgate.Body](t, call(http.MethodPut, path+"ACME_API_KEY", `{"value": "made-up-dead-key"}`), http.StatusUnprocessableEntity)
	if held("ACME_API_KEY") != "made-up-key" {
		t.Error("a dead key was saved over a live one")
	}
	// What was asked about is the workspace as it would be.
	if asked := gate.Asked(); asked[1].Checkpoint != byokgate.Update || asked[1].Credentials[0].Value.Reveal() != "made-up-dead-key" {
		t.Errorf("%+v", asked[1])
	}
	// The key is dead, and an unrelated secret is saved all the same.
	if answer := call(http.MethodPut, path+"SMTP_PASSWORD", `{"value": "made-up-password"}`); answer.Code != http.StatusNoContent {
		t.Errorf("%d: %s", answer.Code, answer.Body)
	}
	gate.Allow(byokgate.BYOK)
	if answer := call(http.MethodPut, path+"ACME_API_KEY", `{"value": "made-up-new-key"}`); answer.Code != http.StatusNoContent || held("ACME_API_KEY") != "made-up-new-key" {
		t.Errorf("%d: %s", answer.Code, answer.Body)
	}
}
