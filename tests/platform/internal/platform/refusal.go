package platform

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// DecisionUnavailable is the body's code where byok-gate made no decision, or none that this platform can read.
const DecisionUnavailable = "DECISION_UNAVAILABLE"

const (
	billingPrefix    = "BILLING_MODE_"
	checkpointPrefix = "CHECKPOINT_"
	denyPrefix       = "DENY_CODE_"
	warningPrefix    = "WARNING_CODE_"
	unspecified      = "UNSPECIFIED"
)

// Allowed says that the workspace may start. Only read makes one.
type Allowed struct {
	BillingMode string
	DecisionID  string
}

// Refusal is the HTTP answer for a workspace that must not start.
type Refusal struct {
	Status int
	// RetryAfter is zero where trying again changes nothing.
	RetryAfter time.Duration
	Body       DenialBody
}

// DenialBody is the JSON of every refusal; docs/denial-body.schema.json describes it for those who read it.
type DenialBody struct {
	Error             string    `json:"error"`
	Code              string    `json:"code"`
	Runtime           string    `json:"runtime"`
	Model             string    `json:"model"`
	Provider          string    `json:"provider"`
	MissingEnv        []string  `json:"missing_env"`
	BillingMode       string    `json:"billing_mode"`
	Remedy            string    `json:"remedy"`
	Retryable         bool      `json:"retryable"`
	DecisionID        string    `json:"decision_id"`
	AlternativeModels []string  `json:"alternative_models"`
	Warnings          []Warning `json:"warnings,omitempty"`
}

// Warning is what a person should know although it did not decide.
type Warning struct {
	Code     string   `json:"code"`
	Message  string   `json:"message"`
	EnvNames []string `json:"env_names"`
}

// read turns byok-gate's answer into ours. It fails closed: a newer byok-gate may say what this code does not know, and a
// broken one may say nothing, and neither is an allow.
func read(question Question, response *byokgatev1.DecideResponse) (*Allowed, *Refusal) {
	switch decision := response.GetDecision().(type) {
	case *byokgatev1.DecideResponse_Allow:
		switch mode := response.GetResolution().GetBillingMode(); mode {
		case byokgatev1.BillingMode_BILLING_MODE_PLATFORM_MANAGED,
			byokgatev1.BillingMode_BILLING_MODE_BYOK,
			byokgatev1.BillingMode_BILLING_MODE_NONE:
			return &Allowed{BillingMode: shortName(mode, billingPrefix), DecisionID: response.GetDecisionId()}, nil
		default:
			return nil, unreadable(question, response, "an allow that does not say who pays")
		}
	case *byokgatev1.DecideResponse_Deny:
		if shortName(decision.Deny.GetCode(), denyPrefix) == unspecified {
			return nil, unreadable(question, response, "a denial for an unknown reason")
		}
		return nil, denied(question, response, decision.Deny)
	default:
		return nil, unreadable(question, response, "neither an allow nor a denial")
	}
}

// denied passes a denial on as it is.
func denied(question Question, response *byokgatev1.DecideResponse, deny *byokgatev1.Deny) *Refusal {
	refusal := &Refusal{
		Status: http.StatusUnprocessableEntity,
		Body: DenialBody{
			Error:             deny.GetMessage(),
			Code:              shortName(deny.GetCode(), denyPrefix),
			Runtime:           question.Runtime,
			Model:             question.Model,
			Provider:          response.GetResolution().GetProvider(),
			MissingEnv:        list(deny.GetMissingEnv()),
			BillingMode:       shortName(response.GetResolution().GetBillingMode(), billingPrefix),
			Remedy:            deny.GetRemedy(),
			Retryable:         deny.GetRetryable(),
			DecisionID:        response.GetDecisionId(),
			AlternativeModels: list(deny.GetAlternativeModels()),
		},
	}
	for _, warning := range response.GetWarnings() {
		refusal.Body.Warnings = append(refusal.Body.Warnings, Warning{
			Code:     shortName(warning.GetCode(), warningPrefix),
			Message:  warning.GetMessage(),
			EnvNames: list(warning.GetEnvNames()),
		})
	}
	if deny.GetRetryable() {
		refusal.Status = http.StatusServiceUnavailable
		refusal.RetryAfter = deny.GetRetryAfter().AsDuration()
	}
	return refusal
}

// unreadable refuses after an answer that this code cannot read, most likely of a newer byok-gate during a rollout.
func unreadable(question Question, response *byokgatev1.DecideResponse, what string) *Refusal {
	refusal := unavailable(question, http.StatusServiceUnavailable, "byok-gate answered with "+what+", which is taken for a no",
		"try again; if it goes on, bring the platform and byok-gate to versions that know each other")
	refusal.Body.DecisionID = response.GetDecisionId()
	return refusal
}

// noDecision refuses after a gRPC error: byok-gate did not decide, so nothing may start.
func noDecision(question Question, err error) *Refusal {
	switch code := status.Code(err); code {
	case codes.InvalidArgument:
		// Names the field at fault. byok-gate never repeats a credential's value.
		return unavailable(question, http.StatusBadRequest, "the workspace cannot be judged: "+status.Convert(err).Message(),
			"correct the field that is named")
	case codes.Unauthenticated, codes.PermissionDenied, codes.Unimplemented:
		return unavailable(question, http.StatusInternalServerError, "the platform is not wired to byok-gate ("+code.String()+")",
			"tell the platform's operator; trying again changes nothing")
	default:
		return unavailable(question, http.StatusServiceUnavailable, "byok-gate made no decision ("+code.String()+"), so nothing was started",
			"try again; if it goes on, tell the platform's operator")
	}
}

func unavailable(question Question, httpStatus int, message, remedy string) *Refusal {
	return &Refusal{
		Status: httpStatus,
		Body: DenialBody{
			Error:             message,
			Code:              DecisionUnavailable,
			Runtime:           question.Runtime,
			Model:             question.Model,
			MissingEnv:        []string{},
			BillingMode:       unspecified,
			Remedy:            remedy,
			Retryable:         httpStatus == http.StatusServiceUnavailable,
			AlternativeModels: []string{},
		},
	}
}

// write answers. Every 503 says when to try again: in whole seconds, which is all that Retry-After can say, rounded up and
// never 0, which would invite a busy loop.
func (r *Refusal) write(w http.ResponseWriter) {
	if r.Status == http.StatusServiceUnavailable {
		seconds := max(1, (r.RetryAfter+time.Second-1)/time.Second)
		w.Header().Set("Retry-After", strconv.FormatInt(int64(seconds), 10))
	}
	writeJSON(w, r.Status, r.Body)
}

// shortName is an enum value's name without the prefix that its enum gives it. A number that this code does not know is
// UNSPECIFIED, which is never an allow.
func shortName(value protoreflect.Enum, prefix string) string {
	known := value.Descriptor().Values().ByNumber(value.Number())
	if known == nil {
		return unspecified
	}
	return strings.TrimPrefix(string(known.Name()), prefix)
}

// list is never nil, so that JSON has [] and not null.
func list(names []string) []string {
	return append([]string{}, names...)
}
