package byokgate

import (
	"cmp"
	"context"
	"slices"
	"time"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

const (
	// menuAge is how long [Client.ListModels] may answer from its cache: as long as an operator can be expected to wait for a
	// change to show.
	menuAge = 30 * time.Second
	// maxMenus is more than any registry has runtimes.
	maxMenus = 256
)

// menuKey identifies a request.
type menuKey struct {
	runtime string
	details bool
}

// menu is what a runtime offered at that time.
type menu struct {
	Menu
	at time.Time
}

// Menu is what a runtime offers.
type Menu struct {
	Models []Model
	// Open are the runtime's providers that list no model: they own every model that matches their pattern.
	Open []OpenProvider
}

// OpenProvider is a provider of a runtime that lists no model.
type OpenProvider struct {
	Runtime      string
	RuntimeName  string
	Provider     string
	ProviderName string
	BillingMode  BillingMode
	// AcceptedEnv are the credential names of which one is needed.
	AcceptedEnv []string
	// ModelPattern is an RE2 regular expression, matched anywhere in a model's id.
	ModelPattern string
	// Deprecated says that the registry marks it so.
	Deprecated bool
}

// Owner is who owns a model, by names alone: for a UI, before a person enters a key.
type Owner struct {
	// Provider is the owner's name in the registry. Empty for an exempt runtime.
	Provider string
	// BillingMode is who would pay.
	BillingMode BillingMode
	// AcceptedEnv are the credential names of which one is needed. Empty if the platform owns the model.
	AcceptedEnv []string
	// RelevantEnv are the names that could change the owner or be used for it.
	RelevantEnv []string
	// RelevantBaseURLEnv are the base-URL variables that matter, among those that the tenant set.
	RelevantBaseURLEnv []string
	// Warnings are what a person should know, for instance that the model is withdrawn.
	Warnings []Warning
}

// Model is one model on a runtime's menu.
type Model struct {
	Runtime string
	// RuntimeName is the runtime's name for people. Only from Client.Menu.
	RuntimeName  string
	Model        string
	Provider     string
	ProviderName string
	BillingMode  BillingMode
	// AcceptedEnv are the credential names of which one is needed. Empty if the platform owns the model.
	AcceptedEnv []string
	// Withdrawn: not for new workspaces; existing ones keep it.
	Withdrawn bool
	// Deprecated says that the registry marks the provider so. Only from Client.Menu.
	Deprecated bool
}

func (m Menu) clone() Menu {
	m.Models, m.Open = slices.Clone(m.Models), slices.Clone(m.Open)
	for index := range m.Models {
		m.Models[index].AcceptedEnv = slices.Clone(m.Models[index].AcceptedEnv)
	}
	for index := range m.Open {
		m.Open[index].AcceptedEnv = slices.Clone(m.Open[index].AcceptedEnv)
	}
	return m
}

// ResolveProvider asks who owns a model, with the names (not values) of the available credentials. No secret is sent and no
// provider is called. The error is a [*Denied] if the model has no owner, or none that a workspace could start with.
func (c *Client) ResolveProvider(ctx context.Context, runtime, model string, credentialNames ...string) (Owner, error) {
	spec := &Spec{Runtime: runtime, Model: model}
	if c.unusable() {
		return Owner{}, undecided(spec, ReasonClosed, errClosed)
	}
	ctx, cancel := context.WithTimeout(c.traced(orBackground(ctx)), c.timeout)
	defer cancel()
	response, err := c.resolve(ctx, runtime, model, credentialNames...)
	if err != nil {
		return Owner{}, c.failed(ctx, spec, err)
	}
	if deny := response.GetDeny(); deny != nil {
		return Owner{}, denied(spec, nil, deny)
	}
	return Owner{
		Provider:           response.GetResolution().GetProvider(),
		BillingMode:        billingMode(response.GetResolution().GetBillingMode()),
		AcceptedEnv:        filled(response.GetResolution().GetAcceptedEnv()),
		RelevantEnv:        filled(response.GetRelevantEnv()),
		RelevantBaseURLEnv: filled(response.GetRelevantBaseUrlEnv()),
		Warnings:           warnings(response.GetWarnings()),
	}, nil
}

// ListModels returns what a runtime offers, or, for an empty name, what each does. The answer is cached while byok-gate's
// decisions come from the same registry, and for half a minute at most.
func (c *Client) ListModels(ctx context.Context, runtime string) ([]Model, error) {
	menu, err := c.menu(ctx, menuKey{runtime, false})
	return menu.Models, err
}

// Menu is [Client.ListModels] with more for a UI: the providers that list no model, names for people, and what is deprecated.
func (c *Client) Menu(ctx context.Context, runtime string) (Menu, error) {
	return c.menu(ctx, menuKey{runtime, true})
}

func (c *Client) menu(ctx context.Context, about menuKey) (Menu, error) {
	spec := &Spec{Runtime: about.runtime}
	if c.unusable() {
		return Menu{}, undecided(spec, ReasonClosed, errClosed)
	}
	if known, found := c.memory.recallMenu(about); found {
		return known, nil
	}
	ctx, cancel := context.WithTimeout(c.traced(orBackground(ctx)), c.timeout)
	defer cancel()
	response, _, err := retry(ctx, c.core, func() (*byokgatev1.ListModelsResponse, error) {
		return c.service.ListModels(ctx, &byokgatev1.ListModelsRequest{Runtime: about.runtime, Details: about.details})
	})
	if err != nil {
		return Menu{}, c.failed(ctx, spec, err)
	}
	made := Menu{Models: make([]Model, 0, len(response.GetModels()))}
	for _, offered := range response.GetModels() {
		made.Models = append(made.Models, Model{
			Runtime:      offered.GetRuntime(),
			RuntimeName:  offered.GetRuntimeDisplayName(),
			Model:        offered.GetModel(),
			Provider:     offered.GetProvider(),
			ProviderName: offered.GetProviderDisplayName(),
			BillingMode:  billingMode(offered.GetBillingMode()),
			AcceptedEnv:  slices.Clone(offered.GetAcceptedEnv()),
			Withdrawn:    offered.GetWithdrawn(),
			Deprecated:   offered.GetDeprecated(),
		})
	}
	for _, open := range response.GetOpenProviders() {
		made.Open = append(made.Open, OpenProvider{
			Runtime:      open.GetRuntime(),
			RuntimeName:  open.GetRuntimeDisplayName(),
			Provider:     open.GetProvider(),
			ProviderName: open.GetProviderDisplayName(),
			BillingMode:  billingMode(open.GetBillingMode()),
			AcceptedEnv:  slices.Clone(open.GetAcceptedEnv()),
			ModelPattern: open.GetModelPattern(),
			Deprecated:   open.GetDeprecated(),
		})
	}
	if revision := response.GetRegistryRevision(); revision != "" {
		c.memory.keepMenu(about, revision, made)
	}
	return made, nil
}

// RegistryStatus is the state of byok-gate's registry and catalogue.
type RegistryStatus struct {
	// Revision and CatalogueRevision are content hashes, as decisions carry them.
	Revision, CatalogueRevision string
	// SHA256 is that of the registry's file, in hex, so that a platform that ships the file can compare it with its own.
	SHA256 string
	// Source is the file, or "embedded". LoadedAt is when it was read.
	Source   string
	LoadedAt time.Time
	// LastReloadError is why a newer version of the registry, or of the configuration that is read with it, is not in force. Empty if there is
	// none.
	LastReloadError string
	// CredentialNames are all that some provider accepts, or some runtime reads.
	CredentialNames []string
}

// RegistryStatus returns the state of byok-gate's registry and catalogue.
func (c *Client) RegistryStatus(ctx context.Context) (RegistryStatus, error) {
	if c.unusable() {
		return RegistryStatus{}, undecided(nil, ReasonClosed, errClosed)
	}
	ctx, cancel := context.WithTimeout(c.traced(orBackground(ctx)), c.timeout)
	defer cancel()
	response, _, err := retry(ctx, c.core, func() (*byokgatev1.GetRegistryStatusResponse, error) {
		return c.service.GetRegistryStatus(ctx, &byokgatev1.GetRegistryStatusRequest{})
	})
	if err != nil {
		return RegistryStatus{}, c.failed(ctx, nil, err)
	}
	registry := response.GetRegistry()
	return RegistryStatus{
		Revision: registry.GetRevision(), CatalogueRevision: response.GetCatalogue().GetRevision(), SHA256: registry.GetSha256(),
		Source: registry.GetSource(), LoadedAt: registry.GetLoadedAt().AsTime(),
		LastReloadError: cmp.Or(registry.GetLastReloadError(), response.GetConfiguration().GetLastReloadError()),
		CredentialNames: slices.Clone(response.GetCredentialNames()),
	}, nil
}
