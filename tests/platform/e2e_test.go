package main

import (
	"net/http"
	"sync"
	"testing"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/tests/platform/internal/platform"
)

const (
	liveKey  = keyMark + "live-key-1"
	otherKey = keyMark + "live-key-2"
	deadKey  = keyMark + "dead-key-1"
)

// acme is a workspace on the vendor's model, with its own key if there is one.
func acme(keys ...string) payload {
	spec := payload{OrganizationID: organization, Name: "a workspace", Runtime: "agent", Model: "acme-large"}
	for _, key := range keys {
		spec.Secrets = map[string]string{"ACME_API_KEY": key}
	}
	return spec
}

// denial is the body of a denial of the vendor's model.
func denial(code, message, remedy string, missing ...string) byokgate.Body {
	return byokgate.Body{
		Error:             message,
		Code:              byokgate.Code(code),
		Runtime:           "agent",
		Model:             "acme-large",
		Provider:          "acme",
		MissingEnv:        append([]string{}, missing...),
		BillingMode:       "BYOK",
		Remedy:            remedy,
		AlternativeModels: []string{"platform-small"},
	}
}

func missingKey() byokgate.Body {
	return denial("MISSING_BYOK_CREDENTIAL", "ACME_API_KEY", "ACME_API_KEY", "ACME_API_KEY")
}

func invalidKey() byokgate.Body {
	body := denial("INVALID_BYOK_CREDENTIAL", "ACME_API_KEY", "ACME_API_KEY")
	body.CredentialEnv, body.UpstreamStatus, body.EndpointHost = "ACME_API_KEY", http.StatusUnauthorized, anyVendor
	return body
}

func TestCreate(t *testing.T) {
	vendor := startVendor(t, liveKey, otherKey)
	gate := startGate(t, freeAddress(t), vendor.url)
	unregistered := denial("UNREGISTERED_MODEL_FOR_RUNTIME", "no-such-model", "agent")
	unregistered.Model, unregistered.Provider, unregistered.BillingMode = "no-such-model", "", "UNSPECIFIED"

	for _, test := range []struct {
		name         string
		spec         payload
		organization string // the organization's ACME_API_KEY
		denied       *byokgate.Body
		billing      byokgate.BillingMode
	}{
		{name: "no credential", spec: acme(), denied: ptr(missingKey())},
		{name: "blank credential", spec: acme(" \t"), denied: ptr(missingKey())},
		{name: "blank credential hides the organization's", spec: acme(" "), organization: liveKey, denied: ptr(missingKey())},
		{name: "dead key", spec: acme(deadKey), denied: ptr(invalidKey())},
		{name: "organization's dead key", spec: acme(), organization: deadKey, denied: ptr(invalidKey())},
		{
			name:   "unknown model",
			spec:   payload{OrganizationID: organization, Name: "a workspace", Runtime: "agent", Model: "no-such-model"},
			denied: &unregistered,
		},
		{name: "good key", spec: acme(liveKey), billing: "BYOK"},
		{name: "organization's good key", spec: acme(), organization: otherKey, billing: "BYOK"},
		{name: "good key over the organization's dead one", spec: acme(liveKey), organization: deadKey, billing: "BYOK"},
		{
			name:    "platform model without a key",
			spec:    payload{OrganizationID: organization, Name: "a workspace", Runtime: "agent", Model: "platform-small"},
			billing: "PLATFORM_MANAGED",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			// Its own platform, so that rows and organization secrets of one case do not affect the next.
			server := startPlatform(t, gate.address, byokgate.DefaultTimeout)
			if test.organization != "" {
				server.setOrganizationSecret(t, "ACME_API_KEY", test.organization)
			}
			got := server.create(t, test.spec)
			if test.denied != nil {
				wantDenial(t, got, http.StatusUnprocessableEntity, *test.denied)
				server.wantNoRow(t)
				return
			}
			body := wantStarted(t, got, http.StatusCreated, platform.StartedBody{Status: "provisioning", BillingMode: test.billing})
			want := platform.Row{
				ID:             body.ID,
				OrganizationID: organization,
				Name:           test.spec.Name,
				Runtime:        test.spec.Runtime,
				Model:          test.spec.Model,
				Status:         "provisioning",
				BillingMode:    string(test.billing),
				DecisionID:     body.DecisionID,
			}
			if rows := server.rows(t); len(rows) != 1 || rows[0] != want {
				t.Errorf("rows are %+v, expected only %+v", rows, want)
			}
		})
	}
	for _, key := range []string{liveKey, otherKey, deadKey} {
		if vendor.askedWith(key) == 0 {
			t.Errorf("the vendor was never asked about %s", key)
		}
	}
}

// The key dies between create and provision, which must be noticed although the create's result is still cached.
func TestKeyRevokedAfterCreate(t *testing.T) {
	vendor := startVendor(t, liveKey)
	gate := startGate(t, freeAddress(t), vendor.url)
	server := startPlatform(t, gate.address, byokgate.DefaultTimeout)
	created := wantStarted(t, server.create(t, acme(liveKey)), http.StatusCreated, platform.StartedBody{Status: "provisioning", BillingMode: "BYOK"})

	// byok-gate probes one key at most once a second, so the first provision may use the create's result.
	vendor.revoke(liveKey)
	var before platform.Row
	var refused answer
	eventually(t, "provision is refused after the key was revoked", func() bool {
		before = server.row(t, created.ID)
		refused = server.provision(t, created.ID)
		return refused.status != http.StatusOK
	})
	wantDenial(t, refused, http.StatusUnprocessableEntity, invalidKey())
	after := server.row(t, created.ID)
	body := decode[byokgate.Body](t, refused, http.StatusUnprocessableEntity)
	before.LastError = "INVALID_BYOK_CREDENTIAL: " + body.Error
	if after != before {
		t.Errorf("a refused provision changed the row: %+v, expected %+v", after, before)
	}

	vendor.repair(liveKey)
	eventually(t, "provision is allowed after the key was repaired", func() bool {
		got := server.provision(t, created.ID)
		if got.status != http.StatusOK {
			wantDenial(t, got, http.StatusUnprocessableEntity, invalidKey())
			return false
		}
		body := wantStarted(t, got, http.StatusOK, platform.StartedBody{ID: created.ID, Status: "online", BillingMode: "BYOK"})
		want := after
		row := server.row(t, created.ID)
		want.Status, want.DecisionID, want.LastError, want.Box = "online", body.DecisionID, "", row.Box
		if row != want || row.Box == after.Box {
			t.Errorf("row is %+v, expected %+v", row, want)
		}
		return true
	})
}

// A running workspace whose restart is refused goes on running, and a new value under the same name is a new key.
func TestOrganizationKeyRotatedAfterCreate(t *testing.T) {
	vendor := startVendor(t, liveKey, otherKey)
	gate := startGate(t, freeAddress(t), vendor.url)
	server := startPlatform(t, gate.address, byokgate.DefaultTimeout)
	server.setOrganizationSecret(t, "ACME_API_KEY", liveKey)
	created := wantStarted(t, server.create(t, acme()), http.StatusCreated, platform.StartedBody{Status: "provisioning", BillingMode: "BYOK"})
	online := platform.StartedBody{ID: created.ID, Status: "online", BillingMode: "BYOK"}
	wantStarted(t, server.provision(t, created.ID), http.StatusOK, online)

	vendor.revoke(liveKey)
	eventually(t, "restart is refused after the organization's key was revoked", func() bool {
		got := server.provision(t, created.ID)
		if got.status == http.StatusOK {
			return false
		}
		wantDenial(t, got, http.StatusUnprocessableEntity, invalidKey())
		return true
	})
	if row := server.row(t, created.ID); row.Status != "online" || row.LastError == "" {
		t.Errorf("a refused restart left %+v", row)
	}

	server.setOrganizationSecret(t, "ACME_API_KEY", otherKey)
	wantStarted(t, server.provision(t, created.ID), http.StatusOK, online)
	if row := server.row(t, created.ID); row.LastError != "" {
		t.Errorf("an allowed restart left %+v", row)
	}
}

// A fleet that starts at once on one key must not look like an attack to the vendor.
func TestManyCreatesAskTheVendorOnce(t *testing.T) {
	const creates = 50
	vendor := startVendor(t, liveKey)
	gate := startGate(t, freeAddress(t), vendor.url)
	server := startPlatform(t, gate.address, byokgate.DefaultTimeout)

	answers := make([]answer, creates)
	failures := make([]error, creates)
	var all sync.WaitGroup
	for i := range creates {
		all.Add(1)
		go func() {
			defer all.Done()
			answers[i], failures[i] = server.send(t.Context(), http.MethodPost, "/workspaces", acme(liveKey))
		}()
	}
	all.Wait()
	ids, decisions := map[string]bool{}, map[string]bool{}
	for i, got := range answers {
		if failures[i] != nil {
			t.Fatal(failures[i])
		}
		body := wantStarted(t, got, http.StatusCreated, platform.StartedBody{Status: "provisioning", BillingMode: "BYOK"})
		ids[body.ID], decisions[body.DecisionID] = true, true
	}
	if rows := server.rows(t); len(rows) != creates || len(ids) != creates || len(decisions) != creates {
		t.Errorf("%d rows, %d ids and %d decisions for %d creates", len(rows), len(ids), len(decisions), creates)
	}
	// Not zero either: an allow without a probe would prove nothing.
	if asked := vendor.askedWith(liveKey); asked != 1 {
		t.Errorf("the vendor was asked %d times about one key", asked)
	}
}

// byok-gate goes down and comes back; the platform refuses in between, and needs no restart.
func TestGateRestarts(t *testing.T) {
	vendor := startVendor(t, liveKey)
	address := freeAddress(t)
	gate := startGate(t, address, vendor.url)
	server := startPlatform(t, address, byokgate.DefaultTimeout)
	created := wantStarted(t, server.create(t, acme(liveKey)), http.StatusCreated, platform.StartedBody{Status: "provisioning", BillingMode: "BYOK"})

	gate.stop(t)
	before := server.row(t, created.ID)
	for what, got := range map[string]answer{
		"create":    server.create(t, acme(liveKey)),
		"provision": server.provision(t, created.ID),
	} {
		wantDenial(t, got, http.StatusServiceUnavailable, unavailable(acme(), true))
		if got.header.Get("Retry-After") != "1" || got.took > byokgate.DefaultTimeout {
			t.Errorf("%s: Retry-After %q after %v", what, got.header.Get("Retry-After"), got.took)
		}
	}
	before.LastError = server.row(t, created.ID).LastError
	if rows := server.rows(t); len(rows) != 1 || rows[0] != before || before.LastError == "" {
		t.Errorf("rows are %+v, expected only %+v with an error", rows, before)
	}

	startGate(t, address, vendor.url)
	eventually(t, "create is allowed after byok-gate came back", func() bool {
		return server.create(t, acme(liveKey)).status == http.StatusCreated
	})
	wantStarted(t, server.provision(t, created.ID), http.StatusOK, platform.StartedBody{ID: created.ID, Status: "online", BillingMode: "BYOK"})
}

func ptr[T any](value T) *T { return &value }
