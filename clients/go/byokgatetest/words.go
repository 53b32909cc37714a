package byokgatetest

import (
	"strings"
	"time"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// words are what byok-gate says with a code: its own sentences, filled in for the workspace that was asked about.
type words struct {
	message, remedy string
	verdict         byokgatev1.Verdict
	// upstream is the provider's HTTP status. Zero if it gave none.
	upstream uint32
	// retryable: the same question may have another answer later.
	retryable bool
}

const (
	provider = "acme"
	host     = "api.acme.example"
	// noName stands where a sentence names a credential and the test named none; see [Gate.Names].
	noName = "ACME_API_KEY"

	retryAfter = 2 * time.Second
)

// what maps each code to its words. {runtime}, {model}, {env}, {any of} and {all of} are filled in.
var what = map[byokgate.Code]words{
	byokgate.RuntimeRequired:    {message: "the workspace names no runtime", remedy: "choose a runtime"},
	byokgate.RuntimeUnsupported: {message: "runtime `{runtime}` is unknown; the known runtimes are agent", remedy: "choose one of these runtimes"},
	byokgate.ModelRequired: {
		message: "the workspace names no model for runtime `{runtime}`; there is no default model",
		remedy:  "choose a model that the runtime offers",
	},
	byokgate.UnregisteredModelForRuntime: {
		message: "runtime `{runtime}` does not offer model `{model}`",
		remedy:  "runtime `{runtime}` offers acme-large and platform-small; ids are compared exactly: `a/b`, `a:b` and `b` are different models",
	},
	byokgate.AmbiguousProvider: {
		message: "model `{model}` on runtime `{runtime}` could belong to acme and other, and the credentials that are set do not tell which",
		remedy:  "set only the credential of the provider that is meant",
	},
	byokgate.DerivedProviderNotInRegistry: {
		message: "the owner of model `{model}` is not in the registry", remedy: "contact the platform's operator: this is a fault of byok-gate",
	},
	byokgate.ModelWithdrawn: {
		message: "model `{model}` of provider `acme` is withdrawn from runtime `{runtime}`",
		remedy:  "choose another model",
	},
	byokgate.CredentialScopeUnreadable: {
		message:   "{all of} could not be read from the workspace's secrets, so it is not known which credential the workspace would use",
		remedy:    "try again",
		retryable: true,
	},
	byokgate.MissingPlatformProxy: {
		message: "model `{model}` is billed to the platform, whose model proxy is not available",
		remedy:  "choose a model that takes the tenant's own key, or try again later",
	},
	byokgate.ProviderNotBYOK: {
		message: "model `{model}` belongs to provider `acme`, which authenticates by a cloud identity; a tenant cannot bring a credential for it",
		remedy:  "choose a model of another provider",
	},
	byokgate.OverrideNotAllowed: {message: "operator overrides are not allowed on this platform", remedy: "remove the override"},
	byokgate.OverrideConflictsWithModel: {
		message: "the override asks for the tenant's own key, but model `{model}` belongs to the platform",
		remedy:  "choose a model of a provider that takes the tenant's own key, or remove the override",
	},
	byokgate.MissingBYOKCredential: {
		message: "model `{model}` belongs to Acme AI (provider `acme`) and needs the tenant's own credential; {all of} {are} not set",
		remedy:  "set {any of} as a secret of the workspace or of the organization",
	},
	byokgate.MalformedBYOKCredential: {
		message: "{env} cannot be a credential of provider `acme`: it ends with a line break or another control character (after character 12); " +
			"it was not sent",
		remedy: "save {env} again without blanks or line breaks around it",
	},
	byokgate.InvalidBYOKCredential: {
		message: "api.acme.example refused {env} of provider `acme` with HTTP 401",
		remedy:  "check that the key is active; make a new one if it is not, and save it as {env}",
		verdict: byokgatev1.Verdict_VERDICT_INVALID, upstream: 401,
	},
	byokgate.ShadowedBYOKCredential: {
		message: "the workspace uses OTHER_TOKEN (of the workspace) for provider `acme` and not {env} (of the workspace): OTHER_TOKEN is no " +
			"credential of that provider",
		remedy: "remove OTHER_TOKEN from the workspace's secrets; or replace the value of OTHER_TOKEN with that of {env}",
	},
	byokgate.WrongCredentialName: {
		message: "the key in {env} is good, but the runtime sends {env} in `Authorization: Bearer`, but api.acme.example accepts it only in the header `x-api-key`",
		remedy:  "save the key as ACME_X_KEY and remove {env}",
		verdict: byokgatev1.Verdict_VERDICT_VALID, upstream: 200,
	},
	byokgate.ExposedCredential: {
		message: "OTHER_API_KEY would be sent to api.acme.example too, which is not its own vendor",
		remedy:  "remove OTHER_API_KEY from the workspace's and the organization's secrets, or choose another model",
	},
	byokgate.BYOKProbeTimeout: {
		message: "api.acme.example gave no usable answer in time, so {env} could not be verified",
		remedy:  "try again later; if this continues, check the provider's status page",
		verdict: byokgatev1.Verdict_VERDICT_TIMEOUT, retryable: true,
	},
	byokgate.BYOKProviderUnreachable: {
		message: "api.acme.example could not be reached, so {env} could not be verified",
		remedy:  "try again later; if this continues, contact the platform's operator",
		verdict: byokgatev1.Verdict_VERDICT_UNREACHABLE, retryable: true,
	},
	byokgate.BYOKProbeNotAttempted: {
		message: "{env} was not checked at api.acme.example: too many checks are waiting for this provider",
		remedy:  "try again later; if this continues, contact the platform's operator",
		verdict: byokgatev1.Verdict_VERDICT_NOT_ATTEMPTED, retryable: true,
	},
	byokgate.BYOKProviderRateLimited: {
		message: "api.acme.example limits the rate with HTTP 429, so {env} could not be verified",
		remedy:  "try again later; if this continues, check the provider's status page",
		verdict: byokgatev1.Verdict_VERDICT_RATE_LIMITED, upstream: 429, retryable: true,
	},
	byokgate.BYOKProviderError: {
		message: "api.acme.example failed with HTTP 500, so {env} could not be verified",
		remedy:  "try again later; if this continues, check the provider's status page",
		verdict: byokgatev1.Verdict_VERDICT_PROVIDER_ERROR, upstream: 500, retryable: true,
	},
	byokgate.BYOKUnexpectedResponse: {
		message: "{env} could not be verified: api.acme.example answered HTTP 404 (no such path), which does not show whether the key is good",
		remedy:  "try again later; if this continues, contact the platform's operator",
		verdict: byokgatev1.Verdict_VERDICT_UNEXPECTED_RESPONSE, upstream: 404, retryable: true,
	},
	byokgate.BYOKQuotaExhausted: {
		message: "api.acme.example says with HTTP 402 that the account of {env} is out of credit or suspended",
		remedy:  "add credit to the account with the provider, or use another key",
		verdict: byokgatev1.Verdict_VERDICT_QUOTA_EXHAUSTED, upstream: 402,
	},
	byokgate.BYOKNotVerifiable: {
		message: "{env} of provider `acme` cannot be checked (NO_SERVER_SURFACE)",
		remedy:  "choose a model of a provider whose keys can be checked",
		verdict: byokgatev1.Verdict_VERDICT_NO_SERVER_SURFACE,
	},
}

// deny is what byok-gate says with a code. A code that this package does not know is a plain denial, as of a newer byok-gate.
func deny(code byokgate.Code, runtime, model string, names []string) (*byokgatev1.Deny, *byokgatev1.Liveness, bool) {
	number, known := byokgatev1.DenyCode_value["DENY_CODE_"+string(code)]
	if !known {
		return nil, nil, false
	}
	said, described := what[code]
	if !described {
		said = words{message: "refused: " + string(code), remedy: "see what byok-gate says of " + string(code)}
	}
	if len(names) == 0 {
		names = []string{noName}
	}
	are := "are"
	if len(names) == 1 {
		are = "is"
	}
	fill := strings.NewReplacer("{are}", are, "{runtime}", runtime, "{model}", model, "{env}", names[0], "{any of}", joined(names, "or"),
		"{all of}", joined(names, "and"))
	made := &byokgatev1.Deny{
		Code: byokgatev1.DenyCode(number), Message: fill.Replace(said.message), Remedy: fill.Replace(said.remedy), Retryable: said.retryable,
	}
	if code == byokgate.MissingBYOKCredential {
		made.MissingEnv = names
	}
	var liveness *byokgatev1.Liveness
	if said.verdict != byokgatev1.Verdict_VERDICT_UNSPECIFIED {
		liveness = &byokgatev1.Liveness{Verdict: said.verdict, UpstreamStatus: said.upstream, EndpointHost: host}
	}
	return made, liveness, true
}

// joined is `A, B and C`.
func joined(list []string, last string) string {
	if len(list) == 1 {
		return list[0]
	}
	end := len(list) - 1
	return strings.Join(list[:end], ", ") + " " + last + " " + list[end]
}
