package main

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// What a UI shows, and which file byok-gate uses.
func TestTheMenuAndTheRegistrysFile(t *testing.T) {
	registry := filepath.Join(t.TempDir(), "providers.yaml")
	text := []byte(registryFor("http://127.0.0.1:1") + `      - name: open
`)
	text = slices.Concat(text[:0:0], []byte(`schema_version: 1
providers:
  - name: open
    display_name: Open AI Works
    deprecated: true
    protocol: openai
    auth_mode: third_party_anthropic_compat
    auth_env: [OPEN_API_KEY]
    model_prefix_match: "^open[:/]"
`), text[len("schema_version: 1\nproviders:\n"):])
	if err := os.WriteFile(registry, text, 0o600); err != nil {
		t.Fatal(err)
	}
	address := freeAddress(t)
	startGateWith(t, address, "serve", "--listen", address, "--registry", registry, "--allow-loopback-http")
	client, err := byokgate.New(address, byokgate.WithLogger(discard))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	menu, err := client.Menu(t.Context(), "agent")
	if err != nil {
		t.Fatal(err)
	}
	want := byokgate.OpenProvider{
		Runtime: "agent", Provider: "open", ProviderName: "Open AI Works", BillingMode: byokgate.BYOK, AcceptedEnv: []string{"OPEN_API_KEY"},
		ModelPattern: "^open[:/]", Deprecated: true,
	}
	if len(menu.Models) != 2 || len(menu.Open) != 1 || menu.Open[0].ProviderName != want.ProviderName || menu.Open[0].ModelPattern != want.ModelPattern ||
		!menu.Open[0].Deprecated || !slices.Equal(menu.Open[0].AcceptedEnv, want.AcceptedEnv) || menu.Open[0].BillingMode != want.BillingMode {
		t.Errorf("%+v", menu)
	}
	if models, err := client.ListModels(t.Context(), "agent"); err != nil || len(models) != 2 || models[0].ProviderName != "Acme AI" {
		t.Errorf("%+v, %v", models, err)
	}
	status, err := client.RegistryStatus(t.Context())
	hash := sha256.Sum256(text)
	if err != nil || status.SHA256 != hex.EncodeToString(hash[:]) || status.Source != registry || !slices.Contains(status.CredentialNames, "OPEN_API_KEY") {
		t.Errorf("%+v, %v", status, err)
	}
}
