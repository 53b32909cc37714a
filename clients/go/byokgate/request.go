package byokgate

import (
	"context"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// Request is for one decision.
type Request struct {
	// Checkpoint is required.
	Checkpoint Checkpoint
	// Spec is the workspace as it would start.
	Spec Spec
	// MaxLivenessAge is how old a cached result for the credential may be: [Fresh] or [AtMost]. Nil: byok-gate's own lifetimes.
	MaxLivenessAge *time.Duration
	// Explain adds the steps of the decision to the Details of the answer.
	Explain bool
	// Timeout is how long this decision may take, lookups and retries included. Zero: the client's own; see [WithTimeout]. The context's
	// deadline applies too. In a batch it is ignored. One below a millisecond is refused ([ReasonInvalidOption]).
	Timeout time.Duration
}

// Fresh requests a new probe. byok-gate makes one at most once a second for each credential, and once a minute where it costs money.
func Fresh() *time.Duration { return AtMost(0) }

// AtMost requests a result that is no older than that.
func AtMost(age time.Duration) *time.Duration { return &age }

// Checkpoint is when the decision is made in a workspace's life. The zero Checkpoint is refused.
type Checkpoint int

const (
	// Create is a new workspace, before its row is written.
	Create Checkpoint = iota + 1
	// Provision is the start, restart or resume of a workspace, before the old one is stopped.
	Provision
	// Update is a change of model, runtime or secret, before it is saved.
	Update
	// Audit checks a running workspace again: Provision's policy, counted separately, since nothing is to start. See [Client.Sweep].
	Audit
)

// Spec is a workspace: the effective runtime and model, after templates and stored settings.
type Spec struct {
	// WorkspaceID is the platform's own id. May be empty at Create.
	WorkspaceID string
	// OrganizationID is the platform's id of the tenant. May be empty on a single-tenant platform.
	OrganizationID string
	// Runtime is the runtime's name.
	Runtime string
	// Model is the model's id.
	Model string
	// Lookup fetches credentials. Required; use [Static] if they are in memory.
	Lookup Lookup
	// OperatorOverride is the operator's explicit exception for this workspace, if any.
	OperatorOverride OperatorOverride
	// PlatformProxy says whether the platform's metered proxy can serve this workspace. The zero value leaves it to
	// byok-gate's configuration.
	PlatformProxy PlatformProxy
	// TenantBaseURLEnv names the base-URL variables that the tenant set, not those that the platform injects.
	TenantBaseURLEnv []string
}

// Lookup fetches the credentials of these names from one scope. It may be called from several goroutines at a time.
//
// A name that is not in Found has no row there. A row that exists but cannot be decrypted is [Unreadable]. An error means that the scope
// could not be read at all; byok-gate then denies if it could matter. The error is logged, so it must not hold a value. A lookup that takes
// more than half of the remaining time, or more than [WithLookupBudget] allows, counts as failed, and so does one that panics.
type Lookup func(ctx context.Context, scope Scope, names []string) (Found, error)

// Found are the credentials that exist, by name. The client reads it once, when the lookup returns.
type Found map[string]Secret

// Static looks credentials up in memory: a create's payload, or a test's. The maps are read at each call, so they must not change
// meanwhile.
func Static(workspace, organization Found) Lookup {
	return func(_ context.Context, scope Scope, _ []string) (Found, error) {
		if scope == Workspace {
			return workspace, nil
		}
		return organization, nil
	}
}

// Scope is where a credential is stored.
type Scope int

const (
	// Workspace is the workspace's own secrets. A row here hides the organization's of the same name, even when it is blank.
	Workspace Scope = iota + 1
	// Organization is the secrets that an organization's workspaces share.
	Organization
)

// scopes are all that there are.
var scopes = [...]Scope{Workspace, Organization}

// OperatorOverride is an operator's explicit exception. It always adds a warning, and byok-gate may be configured to refuse it.
type OperatorOverride int

const (
	// NoOverride derives who pays from the model.
	NoOverride OperatorOverride = iota
	// OverridePlatformManaged bills the platform, even if the model belongs to another provider.
	OverridePlatformManaged
	// OverrideBYOK requires the tenant's own credential.
	OverrideBYOK
	// OverrideDisabled expects no model calls and checks nothing.
	OverrideDisabled
)

// PlatformProxy says whether the platform's metered proxy can serve a workspace.
type PlatformProxy int

const (
	// ProxyAsConfigured leaves it to byok-gate's configuration, which is "absent" unless it says otherwise.
	ProxyAsConfigured PlatformProxy = iota
	// ProxyAvailable: platform-managed models can be served.
	ProxyAvailable
	// ProxyAbsent: they cannot.
	ProxyAbsent
)

// String is the checkpoint's name on the wire, without the prefix of its enum.
func (c Checkpoint) String() string {
	return shortName(byokgatev1.Checkpoint(c), checkpointPrefix)
}

// String is the scope's name on the wire, without the prefix of its enum.
func (s Scope) String() string { return shortName(byokgatev1.Scope(s), scopePrefix) }

// kept outlives the request that it comes from: see subject.kept.
func (s Spec) kept() Spec {
	for _, text := range []*string{&s.WorkspaceID, &s.OrganizationID, &s.Runtime, &s.Model} {
		*text = strings.Clone(*text)
	}
	s.TenantBaseURLEnv = slices.Clone(s.TenantBaseURLEnv)
	for index, name := range s.TenantBaseURLEnv {
		s.TenantBaseURLEnv[index] = strings.Clone(name)
	}
	return s
}

// needsNoCredential says that no credential can change the answer, as far as the client knows.
func (s *Spec) needsNoCredential() bool {
	return s.OperatorOverride == OverridePlatformManaged || s.OperatorOverride == OverrideDisabled
}

// named is what a refusal says of the workspace. The spec may be nil.
func (s *Spec) named() (runtime, model string) {
	if s == nil {
		return "", ""
	}
	return s.Runtime, s.Model
}

const notUTF8 = "is not valid UTF-8"

// check refuses only what could not be sent. byok-gate refuses everything else, so that its messages are the same everywhere.
func (s *Spec) check() (Violation, bool) {
	switch {
	case !utf8.ValidString(s.WorkspaceID):
		return Violation{"workspace_spec.workspace_id", notUTF8}, false
	case !utf8.ValidString(s.OrganizationID):
		return Violation{"workspace_spec.organization_id", notUTF8}, false
	case !utf8.ValidString(s.Runtime):
		return Violation{"workspace_spec.runtime", notUTF8}, false
	case !utf8.ValidString(s.Model):
		return Violation{"workspace_spec.model", notUTF8}, false
	}
	for _, name := range s.TenantBaseURLEnv {
		if !utf8.ValidString(name) {
			return Violation{"workspace_spec.tenant_base_url_env", notUTF8}, false
		}
	}
	return Violation{}, true
}

// wire is the request with these credentials.
func (r *Request) wire(held *wallet, mode Mode) *byokgatev1.DecideRequest {
	request := &byokgatev1.DecideRequest{
		Checkpoint: byokgatev1.Checkpoint(wireNumber(int(r.Checkpoint))),
		WorkspaceSpec: &byokgatev1.WorkspaceSpec{
			WorkspaceId:      r.Spec.WorkspaceID,
			OrganizationId:   r.Spec.OrganizationID,
			Runtime:          r.Spec.Runtime,
			Model:            r.Spec.Model,
			Credentials:      held.credentials(),
			UnreadableScopes: held.unreadableScopes(),
			OperatorOverride: byokgatev1.OperatorOverride(wireNumber(int(r.Spec.OperatorOverride))),
			PlatformProxy:    byokgatev1.PlatformProxy(wireNumber(int(r.Spec.PlatformProxy))),
			TenantBaseUrlEnv: r.Spec.TenantBaseURLEnv,
		},
		Explain:    r.Explain,
		ReportOnly: mode == ReportOnly,
	}
	if r.MaxLivenessAge != nil {
		request.MaxLivenessAge = durationpb.New(*r.MaxLivenessAge)
	}
	return request
}

// wireNumber is an enum's number on the wire. A value that does not fit becomes -1, which byok-gate refuses: truncated, it would be another
// number.
func wireNumber(number int) int32 {
	if number != int(int32(number)) {
		return -1
	}
	return int32(number)
}
