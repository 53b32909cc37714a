package byokgate

import (
	"context"
	"slices"
	"time"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

const (
	// menuAge is how long [Client.ListModels] may answer from memory: as long as an operator who looks whether a change has
	// arrived can be expected to wait.
	menuAge = 30 * time.Second
	// maxMenus is more than any registry has runtimes.
	maxMenus = 256
)

// menuKey is what was asked for.
type menuKey struct{ runtime string }

// menu is what a runtime offers, as of a moment.
type menu struct {
	models []Model
	at     time.Time
}

// Owner is who owns a model, by names alone: what a UI shows before it asks a person for a key.
type Owner struct {
	// Provider is the owner's name in the registry. Empty for an exempt runtime.
	Provider string
	// BillingMode is who would pay.
	BillingMode BillingMode
	// AcceptedEnv are the credential names of which one is needed. Empty if the platform owns the model.
	AcceptedEnv []string
	// RelevantEnv are the names that could change the owner or answer for it.
	RelevantEnv []string
	// RelevantBaseURLEnv are the base-URL variables that matter: what to look for among those that the tenant set.
	RelevantBaseURLEnv []string
	// Warnings are what a person should know, for instance that the model is withdrawn.
	Warnings []Warning
}

// Model is one model on a runtime's menu.
type Model struct {
	Runtime      string
	Model        string
	Provider     string
	ProviderName string
	BillingMode  BillingMode
	// AcceptedEnv are the credential names of which one is needed. Empty if the platform owns the model.
	AcceptedEnv []string
	// Withdrawn: not for new workspaces; those that have it keep it.
	Withdrawn bool
}

func cloneModels(models []Model) []Model {
	models = slices.Clone(models)
	for index := range models {
		models[index].AcceptedEnv = slices.Clone(models[index].AcceptedEnv)
	}
	return models
}

// ResolveProvider asks who owns a model, with the names (not values) of the credentials at hand. No secret is sent and no
// provider is called. The error is a [*Denied] where nobody owns it, or nobody that a workspace could start with.
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

// ListModels asks what a runtime offers, or, for an empty name, what each does. The answer is remembered for as long as
// byok-gate is seen to decide by the same registry, and for half a minute at most.
func (c *Client) ListModels(ctx context.Context, runtime string) ([]Model, error) {
	spec := &Spec{Runtime: runtime}
	if c.unusable() {
		return nil, undecided(spec, ReasonClosed, errClosed)
	}
	about := menuKey{runtime}
	if models, found := c.memory.recallMenu(about); found {
		return models, nil
	}
	ctx, cancel := context.WithTimeout(c.traced(orBackground(ctx)), c.timeout)
	defer cancel()
	response, _, err := retry(ctx, c.core, func() (*byokgatev1.ListModelsResponse, error) {
		return c.service.ListModels(ctx, &byokgatev1.ListModelsRequest{Runtime: runtime})
	})
	if err != nil {
		return nil, c.failed(ctx, spec, err)
	}
	models := make([]Model, 0, len(response.GetModels()))
	for _, offered := range response.GetModels() {
		models = append(models, Model{
			Runtime:      offered.GetRuntime(),
			Model:        offered.GetModel(),
			Provider:     offered.GetProvider(),
			ProviderName: offered.GetProviderDisplayName(),
			BillingMode:  billingMode(offered.GetBillingMode()),
			AcceptedEnv:  slices.Clone(offered.GetAcceptedEnv()),
			Withdrawn:    offered.GetWithdrawn(),
		})
	}
	if revision := response.GetRegistryRevision(); revision != "" {
		c.memory.keepMenu(about, revision, models)
	}
	return models, nil
}
