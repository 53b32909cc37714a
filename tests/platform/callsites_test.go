package main

import (
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/tests/platform/internal/platform"
)

// Each call site of a platform, against the real byok-gate and a real PostgreSQL.

// online is a running workspace, with its own key if there is one.
func (p *platformServer) online(t *testing.T, keys ...string) platform.Row {
	t.Helper()
	created := wantStarted(t, p.create(t, acme(keys...)), http.StatusCreated, platform.StartedBody{Status: "provisioning", BillingMode: "BYOK"})
	wantStarted(t, p.provision(t, created.ID), http.StatusOK, platform.StartedBody{ID: created.ID, Status: "online", BillingMode: "BYOK"})
	return p.row(t, created.ID)
}

// wantUntouched expects that nothing changed except, perhaps, the last refusal.
func (p *platformServer) wantUntouched(t *testing.T, before platform.Row) {
	t.Helper()
	after := p.row(t, before.ID)
	after.LastError = before.LastError
	if after != before {
		t.Errorf("row is %+v, expected %+v", after, before)
	}
}

// wantRestarted expects a new box for these, and the old one for the others.
func (p *platformServer) wantRestarted(t *testing.T, got answer, restarted, kept []platform.Row) {
	t.Helper()
	body := decode[platform.EditedBody](t, got, http.StatusOK)
	for _, list := range []struct {
		what string
		got  []string
		want []platform.Row
	}{{"restarted", body.Restarted, restarted}, {"kept", body.Kept, kept}} {
		var want []string
		for _, row := range list.want {
			want = append(want, row.ID)
		}
		slices.Sort(list.got)
		slices.Sort(want)
		if !slices.Equal(list.got, want) {
			t.Errorf("%s %q, expected %q", list.what, list.got, want)
		}
	}
	for _, before := range restarted {
		if after := p.row(t, before.ID); after.Box == before.Box || after.Status != "online" || after.LastError != "" {
			t.Errorf("not restarted: %+v", after)
		}
	}
	for _, before := range kept {
		if after := p.row(t, before.ID); after.Box != before.Box || after.Status != before.Status || after.LastError == "" {
			t.Errorf("not kept as it was: %+v, before %+v", after, before)
		}
	}
}

func startAll(t *testing.T, keys ...string) (*vendor, *platformServer) {
	t.Helper()
	vendor := startVendor(t, keys...)
	gate := startGate(t, freeAddress(t), vendor.url)
	return vendor, startPlatform(t, gate.address, byokgate.DefaultTimeout)
}

func TestARefusedRestartKeepsTheBox(t *testing.T) {
	vendor, server := startAll(t, liveKey)
	row := server.online(t, liveKey)
	vendor.revoke(liveKey)
	var refused answer
	eventually(t, "restart is refused after the key was revoked", func() bool {
		row = server.row(t, row.ID)
		refused = server.restart(t, row.ID)
		return refused.status != http.StatusOK
	})
	wantDenial(t, refused, http.StatusUnprocessableEntity, invalidKey())
	server.wantUntouched(t, row)

	// Paused, it has no box to keep; resuming calls byok-gate too.
	decode[platform.Row](t, server.call(t, http.MethodPost, "/workspaces/"+row.ID+"/pause", nil), http.StatusOK)
	resume := func() answer { return server.call(t, http.MethodPost, "/workspaces/"+row.ID+"/resume", nil) }
	wantDenial(t, resume(), http.StatusUnprocessableEntity, invalidKey())
	if row := server.row(t, row.ID); row.Box != "" || row.Status != "paused" {
		t.Errorf("a refused resume left %+v", row)
	}
	vendor.repair(liveKey)
	eventually(t, "resume is allowed after the key was repaired", func() bool { return resume().status == http.StatusOK })
	if row := server.row(t, row.ID); row.Box == "" || row.Status != "online" {
		t.Errorf("an allowed resume left %+v", row)
	}
}

// A retryable refusal is retried without another request, and the box runs until then.
func TestARetryableRefusalIsTriedAgain(t *testing.T) {
	_, server := startAll(t, liveKey)
	row := server.online(t, liveKey)
	server.breakStore(t, `ALTER TABLE workspace_secrets RENAME TO gone`)
	refused := server.restart(t, row.ID)
	want := denial("CREDENTIAL_SCOPE_UNREADABLE", "ACME_API_KEY", "")
	want.Retryable = true
	wantDenial(t, refused, http.StatusServiceUnavailable, want)
	server.wantUntouched(t, row)

	server.breakStore(t, `ALTER TABLE gone RENAME TO workspace_secrets`)
	eventually(t, "the restart is made up for", func() bool {
		after := server.row(t, row.ID)
		return after.Box != row.Box && after.LastError == ""
	})
}

// An unreadable value never counts as "no key", in either scope and at each checkpoint.
func TestFaultsOfTheStore(t *testing.T) {
	_, server := startAll(t, liveKey, otherKey)
	own := server.online(t, liveKey)
	server.setOrganizationSecret(t, "ACME_API_KEY", otherKey)
	shared := server.online(t)
	unreadable := denial("CREDENTIAL_SCOPE_UNREADABLE", "ACME_API_KEY", "")
	unreadable.Retryable = true
	rows := len(server.rows(t))

	for _, fault := range []struct {
		name, break_, repair string
		// The affected scope. A workspace's own key hides the organization's, so a fault there does not matter.
		own, shared bool
	}{
		{
			"the workspace scope cannot be read",
			`ALTER TABLE workspace_secrets RENAME TO gone`, `ALTER TABLE gone RENAME TO workspace_secrets`, true, true,
		},
		{
			"the organization scope cannot be read",
			`ALTER TABLE organization_secrets RENAME TO gone`, `ALTER TABLE gone RENAME TO organization_secrets`, false, true,
		},
		{
			"the workspace's row does not decrypt",
			`UPDATE workspace_secrets SET encrypted_value = set_byte(encrypted_value, 20, get_byte(encrypted_value, 20) # 1)`,
			`UPDATE workspace_secrets SET encrypted_value = set_byte(encrypted_value, 20, get_byte(encrypted_value, 20) # 1)`,
			true, false,
		},
		{
			"the organization's row does not decrypt",
			`UPDATE organization_secrets SET encrypted_value = set_byte(encrypted_value, 20, get_byte(encrypted_value, 20) # 1)`,
			`UPDATE organization_secrets SET encrypted_value = set_byte(encrypted_value, 20, get_byte(encrypted_value, 20) # 1)`,
			false, true,
		},
	} {
		t.Run(fault.name, func(t *testing.T) {
			server.breakStore(t, fault.break_)
			defer server.breakStore(t, fault.repair)
			for _, test := range []struct {
				row    platform.Row
				struck bool
			}{{own, fault.own}, {shared, fault.shared}} {
				before := server.row(t, test.row.ID)
				got := server.restart(t, test.row.ID)
				if !test.struck {
					wantStarted(t, got, http.StatusOK, platform.StartedBody{ID: test.row.ID, Status: "online", BillingMode: "BYOK"})
					continue
				}
				wantDenial(t, got, http.StatusServiceUnavailable, unreadable)
				server.wantUntouched(t, before)
			}
			// A create's own scope is its payload: only the organization's can fail it.
			if got := server.create(t, acme()); fault.name == "the organization scope cannot be read" || fault.name == "the organization's row does not decrypt" {
				wantDenial(t, got, http.StatusServiceUnavailable, unreadable)
				if got := len(server.rows(t)); got != rows {
					t.Errorf("%d rows, expected %d", got, rows)
				}
			} else {
				decode[platform.StartedBody](t, got, http.StatusCreated)
				rows++
			}
		})
	}
}

// A ciphertext that is copied to another place does not decrypt there: no tenant gets another's key.
func TestASecretIsBoundToItsPlace(t *testing.T) {
	_, server := startAll(t, liveKey)
	row := server.online(t, liveKey)
	thief := server.online(t, liveKey)
	server.breakStore(t, `UPDATE workspace_secrets SET encrypted_value =
		(SELECT encrypted_value FROM workspace_secrets WHERE workspace_id = $1) WHERE workspace_id = $2`, row.ID, thief.ID)
	want := denial("CREDENTIAL_SCOPE_UNREADABLE", "ACME_API_KEY", "")
	want.Retryable = true
	wantDenial(t, server.restart(t, thief.ID), http.StatusServiceUnavailable, want)
	var clear int
	err := server.database.QueryRow(t.Context(), `SELECT count(*) FROM workspace_secrets WHERE position($1 IN encrypted_value) > 0`,
		[]byte(keyMark)).Scan(&clear)
	if err != nil || clear != 0 {
		t.Errorf("%d values stand there in the clear: %v", clear, err)
	}
}

func TestModelAndRuntimeAreDecidedBeforeTheyAreSaved(t *testing.T) {
	_, server := startAll(t, liveKey)
	row := server.online(t, liveKey)
	unregistered := denial("UNREGISTERED_MODEL_FOR_RUNTIME", "no-such-model", "agent")
	unregistered.Model, unregistered.Provider, unregistered.BillingMode = "no-such-model", "", "UNSPECIFIED"
	wantDenial(t, server.patch(t, row.ID, map[string]string{"model": "no-such-model"}), http.StatusUnprocessableEntity, unregistered)
	server.wantUntouched(t, row)
	unsupported := denial("RUNTIME_UNSUPPORTED", "elsewhere", "")
	unsupported.Runtime, unsupported.Provider, unsupported.BillingMode = "elsewhere", "", "UNSPECIFIED"
	unsupported.AlternativeModels = []string{}
	wantDenial(t, server.patch(t, row.ID, map[string]string{"runtime": "elsewhere"}), http.StatusUnprocessableEntity, unsupported)
	server.wantUntouched(t, row)

	server.wantRestarted(t, server.patch(t, row.ID, map[string]string{"model": "platform-small"}), []platform.Row{row}, nil)
	if row := server.row(t, row.ID); row.Model != "platform-small" || row.BillingMode != "PLATFORM_MANAGED" {
		t.Errorf("row is %+v", row)
	}
	// And back, to a vendor whose key it no longer has.
	row = server.row(t, row.ID)
	server.wantRestarted(t, server.deleteSecret(t, "workspaces/"+row.ID, "ACME_API_KEY"), []platform.Row{row}, nil)
	before := server.row(t, row.ID)
	wantDenial(t, server.patch(t, row.ID, map[string]string{"model": "acme-large"}), http.StatusUnprocessableEntity, missingKey())
	server.wantUntouched(t, before)
}

func TestAWorkspaceSecretIsDecidedBeforeItIsSaved(t *testing.T) {
	vendor, server := startAll(t, liveKey, otherKey)
	row := server.online(t, liveKey)
	owner := "workspaces/" + row.ID
	wantDenial(t, server.setSecret(t, owner, "ACME_API_KEY", deadKey), http.StatusUnprocessableEntity, invalidKey())
	wantDenial(t, server.setSecret(t, owner, "ACME_API_KEY", " "), http.StatusUnprocessableEntity, missingKey())
	wantDenial(t, server.deleteSecret(t, owner, "ACME_API_KEY"), http.StatusUnprocessableEntity, missingKey())
	server.wantUntouched(t, row)
	server.wantRestarted(t, server.restartAsEdit(t, row), []platform.Row{row}, nil) // the old key is still there

	row = server.row(t, row.ID)
	server.wantRestarted(t, server.setSecret(t, owner, "ACME_API_KEY", otherKey), []platform.Row{row}, nil)
	if vendor.askedWith(otherKey) == 0 {
		t.Error("the vendor was not asked about the new key")
	}
	// A secret that has nothing to do with the model is saved even while the workspace could not start.
	vendor.revoke(otherKey)
	eventually(t, "the restart after another secret is refused", func() bool {
		row = server.row(t, row.ID)
		got := server.setSecret(t, owner, "SMTP_PASSWORD", keyMark+"smtp")
		return len(decode[platform.EditedBody](t, got, http.StatusOK).Kept) == 1
	})
	server.wantUntouched(t, row)
}

// restartAsEdit restarts by an empty change.
func (p *platformServer) restartAsEdit(t *testing.T, row platform.Row) answer {
	t.Helper()
	return p.patch(t, row.ID, map[string]string{"model": row.Model})
}

// One organization secret, all its workspaces: one batch, one probe, and nothing saved that would break one.
func TestAnOrganizationSecretFansOut(t *testing.T) {
	const fleet = 20
	vendor, server := startAll(t, liveKey, otherKey)
	server.setOrganizationSecret(t, "ACME_API_KEY", liveKey)
	var sharing []platform.Row
	for range fleet {
		sharing = append(sharing, server.online(t))
	}
	apart := server.online(t, otherKey) // a key of its own
	elsewhere := acme(liveKey)
	elsewhere.OrganizationID = "org-2"
	decode[platform.StartedBody](t, server.create(t, elsewhere), http.StatusCreated)

	owner := "organizations/" + organization
	wantDenial(t, server.setSecret(t, owner, "ACME_API_KEY", deadKey), http.StatusUnprocessableEntity, invalidKey())
	wantDenial(t, server.deleteSecret(t, owner, "ACME_API_KEY"), http.StatusUnprocessableEntity, missingKey())
	for _, row := range append(sharing, apart) {
		server.wantUntouched(t, row)
	}
	// One probe, in one header: the vendor has accepted keys in it, so a dead key is not tried in another one as well.
	if asked := vendor.askedWith(deadKey); asked != 1 {
		t.Errorf("the vendor was asked %d times about one dead key", asked)
	}
	before := vendor.askedWith(otherKey)
	server.wantRestarted(t, server.setSecret(t, owner, "ACME_API_KEY", otherKey), sharing, nil)
	server.wantUntouched(t, apart)
	// Twice at most: the restarts request a fresh result, once a second for one key.
	if asked := vendor.askedWith(otherKey) - before; asked > 2 {
		t.Errorf("the vendor was asked %d times about one key for %d workspaces", asked, fleet)
	}
}

func TestAnImportCreatesWhatMayExist(t *testing.T) {
	_, server := startAll(t, liveKey)
	const each = 100 // more than one batch in all
	var asked []payload
	for index := range each {
		good, dead, none := acme(liveKey), acme(deadKey), acme()
		good.Name, dead.Name, none.Name = fmt.Sprint("good ", index), fmt.Sprint("dead ", index), fmt.Sprint("none ", index)
		asked = append(asked, good, dead, none)
	}
	results := decode[[]platform.ImportedBody](t, server.call(t, http.MethodPost, "/import", asked), http.StatusOK)
	if len(results) != len(asked) {
		t.Fatalf("%d results for %d", len(results), len(asked))
	}
	created := map[string]string{}
	for index, result := range results {
		code := ""
		if result.Refusal != nil {
			code = string(result.Refusal.Code)
		}
		want := []string{"", "INVALID_BYOK_CREDENTIAL", "MISSING_BYOK_CREDENTIAL"}[index%3]
		if code != want || (result.ID == "") != (want != "") {
			t.Errorf("%s: %+v, expected %q", asked[index].Name, result, want)
		}
		if result.ID != "" {
			created[result.ID] = asked[index].Name
		}
	}
	rows := server.rows(t)
	for _, row := range rows {
		if created[row.ID] != row.Name || row.BillingMode != "BYOK" {
			t.Errorf("row %+v", row)
		}
	}
	if len(rows) != each {
		t.Errorf("%d rows, expected %d", len(rows), each)
	}
}

// A model without a unique owner until a name is available: the client must learn which names to fetch from the refusal to name an
// owner.
func TestAnAmbiguousModelIsSettledByACredential(t *testing.T) {
	vendor := startVendor(t, liveKey)
	address := freeAddress(t)
	arguments := serveArguments(t, address, vendor.url)
	registry := arguments[slices.Index(arguments, "--registry")+1]
	text := strings.Replace(registryFor(vendor.url), "runtimes:", `  - name: other
    display_name: Other
    protocol: openai
    auth_mode: third_party_anthropic_compat
    base_url_template: "`+vendor.url+`/v1"
    auth_env: [OTHER_API_KEY]
    model_prefix_match: "^acme"
runtimes:`, 1)
	text = strings.Replace(text, "      - name: platform", "      - name: other\n      - name: platform", 1)
	if err := os.WriteFile(registry, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	startGateWith(t, address, arguments...)
	server := startPlatform(t, address, byokgate.DefaultTimeout)
	spec := acme(liveKey)
	spec.Model = "acme/new"
	wantStarted(t, server.create(t, spec), http.StatusCreated, platform.StartedBody{Status: "provisioning", BillingMode: "BYOK"})
	spec.Secrets = nil
	ambiguous := denial("AMBIGUOUS_PROVIDER", "acme/new", "")
	ambiguous.Model, ambiguous.Provider, ambiguous.BillingMode = "acme/new", "", "UNSPECIFIED"
	wantDenial(t, server.create(t, spec), http.StatusUnprocessableEntity, ambiguous)
}
