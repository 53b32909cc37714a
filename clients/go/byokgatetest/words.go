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
	byokgate.RuntimeRequired:    {message: "the workspace names no runtime", remedy: "set the workspace's runtime"},
	byokgate.RuntimeUnsupported: {message: "runtime `{runtime}` is not in the registry, which knows agent", remedy: "use one of the registry's runtimes, or add this one to the registry or to `exempt_runtimes`"},
	byokgate.ModelRequired: {
		message: "the workspace names no model for runtime `{runtime}`; there are no default models",
		remedy:  "choose a model; ListModels shows what the runtime offers",
	},
	byokgate.UnregisteredModelForRuntime: {
		message: "no provider of runtime `{runtime}` owns model `{model}`",
		remedy: "choose a model that runtime `{runtime}` offers (ListModels shows them); ids are compared exactly, so `a/b`, `a:b` and `b` are " +
			"different models",
	},
	byokgate.AmbiguousProvider: {
		message: "model `{model}` on runtime `{runtime}` could belong to acme and other, and the credentials at hand single none out",
		remedy:  "keep the credential of the one provider that is meant, or make the registry's patterns disjoint",
	},
	byokgate.DerivedProviderNotInRegistry: {
		message: "the owner of model `{model}` is not in the registry", remedy: "report a fault of byok-gate",
	},
	byokgate.ModelWithdrawn: {
		message: "model `{model}` of provider `acme` is withdrawn from runtime `{runtime}`",
		remedy:  "choose another model; ListModels shows which are withdrawn",
	},
	byokgate.CredentialScopeUnreadable: {
		message:   "{all of} could not be read, and which credential answers for the model depends on it; unreadable is not taken for absent",
		remedy:    "try again; if it goes on, repair the platform's secret store or its encryption key",
		retryable: true,
	},
	byokgate.MissingPlatformProxy: {
		message: "model `{model}` is billed to the platform, and the platform's model proxy is absent",
		remedy:  "choose a model with a key of the tenant's own, or wire the platform's proxy and say that it is AVAILABLE",
	},
	byokgate.ProviderNotBYOK: {
		message: "model `{model}` belongs to provider `acme`, which authenticates by ambient cloud identity; a tenant cannot bring a credential " +
			"for it",
		remedy: "choose a model of another provider",
	},
	byokgate.OverrideNotAllowed: {
		message: "this service is configured to refuse operator overrides",
		remedy:  "remove the override, or set `operator_overrides: honour` in the service's configuration",
	},
	byokgate.OverrideConflictsWithModel: {
		message: "the operator override asks for BYOK, but model `{model}` belongs to the platform",
		remedy:  "pick a model of a provider that takes the tenant's own key, or remove the override",
	},
	byokgate.MissingBYOKCredential: {
		message: "model `{model}` belongs to Acme AI (provider `acme`) and needs the tenant's own credential; none of {all of} holds a value",
		remedy:  "set {any of} as a secret of the workspace or of the organization, then try again",
	},
	byokgate.MalformedBYOKCredential: {
		message: "the value of {env} cannot be a key for provider `acme`: it ends in a line break or another control character (byte 12); it " +
			"was not sent",
		remedy: "save {env} again without the line break or control character at its end",
	},
	byokgate.InvalidBYOKCredential: {
		message: "{env} was found for provider `acme` but refused by api.acme.example with HTTP 401",
		remedy:  "check that the key is active, rotate it with the provider and save it as {env}",
		verdict: byokgatev1.Verdict_VERDICT_INVALID, upstream: 401,
	},
	byokgate.BYOKProbeTimeout: {
		message: "api.acme.example gave no usable answer in time, so {env} could not be verified",
		remedy:  "try again later; if it goes on, look at the provider's status page",
		verdict: byokgatev1.Verdict_VERDICT_TIMEOUT, retryable: true,
	},
	byokgate.BYOKProviderUnreachable: {
		message: "api.acme.example could not be reached, so {env} could not be verified",
		remedy:  "try again later; if it goes on, check DNS, the service's way out to port 443 and the provider's base URL",
		verdict: byokgatev1.Verdict_VERDICT_UNREACHABLE, retryable: true,
	},
	byokgate.BYOKProbeNotAttempted: {
		message: "this service did not ask api.acme.example about {env}: too many questions to this provider wait already",
		remedy:  "try again later; if it goes on, look at this service's log",
		verdict: byokgatev1.Verdict_VERDICT_NOT_ATTEMPTED, retryable: true,
	},
	byokgate.BYOKProviderRateLimited: {
		message: "api.acme.example limits the rate with HTTP 429, so {env} could not be verified",
		remedy:  "try again later; if it goes on, look at the provider's status page",
		verdict: byokgatev1.Verdict_VERDICT_RATE_LIMITED, upstream: 429, retryable: true,
	},
	byokgate.BYOKProviderError: {
		message: "api.acme.example failed with HTTP 500, so {env} could not be verified",
		remedy:  "try again later; if it goes on, look at the provider's status page",
		verdict: byokgatev1.Verdict_VERDICT_PROVIDER_ERROR, upstream: 500, retryable: true,
	},
	byokgate.BYOKUnexpectedResponse: {
		message: "the answer of api.acme.example with HTTP 404 says nothing about {env}, which could not be verified",
		remedy:  "try again later; if it goes on, check the provider's base URL in the registry and its row in the probe catalogue",
		verdict: byokgatev1.Verdict_VERDICT_UNEXPECTED_RESPONSE, upstream: 404, retryable: true,
	},
	byokgate.BYOKQuotaExhausted: {
		message: "api.acme.example says that the account behind {env} is out of credit or suspended with HTTP 402",
		remedy:  "add credit to the account with the provider, or use another key",
		verdict: byokgatev1.Verdict_VERDICT_QUOTA_EXHAUSTED, upstream: 402,
	},
	byokgate.BYOKNotVerifiable: {
		message: "{env} for provider `acme` cannot be verified (NO_SERVER_SURFACE)",
		remedy:  "choose a provider whose keys can be verified, or let the policy group `unverifiable` allow",
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
	fill := strings.NewReplacer("{runtime}", runtime, "{model}", model, "{env}", names[0], "{any of}", joined(names, "or"),
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
