package byokgate

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// CodeDecisionUnavailable is the code where byok-gate made no decision, or none that this package can read.
const CodeDecisionUnavailable = "DECISION_UNAVAILABLE"

// What is said where nothing better is known.
const (
	noDecision = "byok-gate made no decision, so nothing was started"
	tryAgain   = "try again; if it goes on, tell the platform's operator"
)

// defaultRetryAfter is when to ask again where byok-gate does not say: about as long as its restart takes.
const defaultRetryAfter = time.Second

// === Allowed ===

// Allowed says that the workspace may start. Only [Client.Decide] and [Client.BatchDecide] make one that does.
//
// The zero Allowed is no allow: its methods panic, so that a caller who overlooked an error starts nothing and bills nobody.
type Allowed struct {
	// response is nil in the zero value, and nothing outside this package can set it.
	response *byokgatev1.DecideResponse
	mode     BillingMode
}

// BillingMode is who pays for a workspace's model calls.
type BillingMode string

const (
	// PlatformManaged: the platform pays, through its metered proxy.
	PlatformManaged BillingMode = "PLATFORM_MANAGED"
	// BYOK: the tenant pays, with a key of its own.
	BYOK BillingMode = "BYOK"
	// NoBilling: nobody; no model calls are expected.
	NoBilling BillingMode = "NONE"
	// UnknownBilling is never part of an Allowed: not settled, or a mode that this package does not know.
	UnknownBilling BillingMode = unspecified
)

// BillingMode is who pays. Never UnknownBilling.
func (a Allowed) BillingMode() BillingMode { a.mustBe(); return a.mode }

// DecisionID is the decision's id, which byok-gate's log carries too. Never empty.
func (a Allowed) DecisionID() string { return a.mustBe().GetDecisionId() }

// Provider is the owner of the model. Empty where none had to be derived.
func (a Allowed) Provider() string { return a.mustBe().GetResolution().GetProvider() }

// Warnings are what a person should know, for instance that the credential could not be verified.
func (a Allowed) Warnings() []Warning { return warnings(a.mustBe().GetWarnings()) }

// Response is a copy of byok-gate's whole reply. It holds no credential.
func (a Allowed) Response() *byokgatev1.DecideResponse { return proto.CloneOf(a.mustBe()) }

// String is for people.
func (a Allowed) String() string {
	if a.response == nil {
		return "byokgate: no allow (the zero Allowed)"
	}
	return fmt.Sprintf("byokgate: allowed, billing %s (decision %s)", a.mode, a.response.GetDecisionId())
}

// LogValue is its id and who pays.
func (a Allowed) LogValue() slog.Value {
	if a.response == nil {
		return slog.StringValue(a.String())
	}
	return slog.GroupValue(
		slog.String("decision_id", a.response.GetDecisionId()),
		slog.String("billing_mode", string(a.mode)),
	)
}

// MarshalJSON is its id and who pays. The zero Allowed does not marshal.
func (a Allowed) MarshalJSON() ([]byte, error) {
	if a.response == nil {
		return nil, errors.New("byokgate: the zero Allowed is no allow")
	}
	return json.Marshal(struct {
		DecisionID  string      `json:"decision_id"`
		BillingMode BillingMode `json:"billing_mode"`
	}{a.response.GetDecisionId(), a.mode})
}

func (a Allowed) mustBe() *byokgatev1.DecideResponse {
	if a.response == nil {
		panic("byokgate: the zero Allowed is no allow; the error of the call that it came from was not heeded")
	}
	return a.response
}

// === Refusal ===

// Refusal is what a [*Denied] and an [*Undecided] have in common: the reason not to start, ready to be answered with.
type Refusal interface {
	error
	// HTTPStatus is 422 for a denial, 503 where a retry may help, 400 for a request that cannot be judged, and 500 where the
	// platform is not wired to byok-gate.
	HTTPStatus() int
	// Code is the machine's reason, such as MISSING_BYOK_CREDENTIAL or DECISION_UNAVAILABLE.
	Code() string
	// Retryable says that the same request may be allowed later with nothing changed.
	Retryable() bool
	// RetryAfter is when to ask again. Zero where that changes nothing.
	RetryAfter() time.Duration
	// Body is the answer's body.
	Body() Body
	// JSON is the body, as docs/denial-body.schema.json describes it.
	JSON() []byte
}

// Denied is byok-gate's decision against a workspace.
type Denied struct {
	refusal
	response *byokgatev1.DecideResponse
}

// Undecided says that there was no decision, so that nothing may start.
type Undecided struct {
	refusal
	cause error
}

var (
	_ Refusal = (*Denied)(nil)
	_ Refusal = (*Undecided)(nil)
)

// Error is the code and the reason.
func (d *Denied) Error() string { return "byokgate: denied: " + d.text() }

// DecisionID is the decision's id, which byok-gate's log carries too.
func (d *Denied) DecisionID() string { return d.body.DecisionID }

// Response is a copy of byok-gate's whole reply. It holds no credential.
func (d *Denied) Response() *byokgatev1.DecideResponse { return proto.CloneOf(d.response) }

// Error is the code and the reason.
func (u *Undecided) Error() string { return "byokgate: undecided: " + u.text() }

// Unwrap is what went wrong: for instance a gRPC status, or the context's error.
func (u *Undecided) Unwrap() error { return u.cause }

// refusal is the part that both have. Its zero value is a refusal too.
type refusal struct {
	httpStatus int
	retryAfter time.Duration
	body       Body
}

// HTTPStatus is described at [Refusal].
func (r *refusal) HTTPStatus() int {
	if r.httpStatus == 0 {
		return http.StatusServiceUnavailable
	}
	return r.httpStatus
}

// Code is described at [Refusal].
func (r *refusal) Code() string {
	if r.body.Code == "" {
		return CodeDecisionUnavailable
	}
	return r.body.Code
}

// Retryable is described at [Refusal].
func (r *refusal) Retryable() bool { return r.HTTPStatus() == http.StatusServiceUnavailable }

// RetryAfter is described at [Refusal].
func (r *refusal) RetryAfter() time.Duration {
	if !r.Retryable() {
		return 0
	}
	if r.retryAfter <= 0 {
		return defaultRetryAfter
	}
	return r.retryAfter
}

// Body is described at [Refusal].
func (r *refusal) Body() Body {
	body := r.body
	body.Code, body.Retryable = r.Code(), r.Retryable()
	if body.BillingMode == "" {
		body.BillingMode = UnknownBilling
	}
	if body.Error == "" {
		body.Error = noDecision
	}
	if body.Remedy == "" {
		body.Remedy = tryAgain
	}
	// Copies, and never nil, so that JSON has [] and not null.
	body.MissingEnv = append([]string{}, body.MissingEnv...)
	body.AlternativeModels = append([]string{}, body.AlternativeModels...)
	body.Warnings = slices.Clone(body.Warnings)
	return body
}

// JSON is described at [Refusal].
func (r *refusal) JSON() []byte {
	text, err := json.Marshal(r.Body())
	if err != nil {
		// Strings, booleans and lists of them always marshal.
		panic(err)
	}
	return text
}

// LogValue is the code and what belongs to it.
func (r *refusal) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("code", r.Code()),
		slog.String("reason", r.body.Error),
		slog.String("provider", r.body.Provider),
		slog.String("decision_id", r.body.DecisionID),
	)
}

func (r *refusal) text() string { return r.Code() + ": " + r.Body().Error }

// Body is the JSON of every refusal; docs/denial-body.schema.json describes it for those who read it.
type Body struct {
	Error             string      `json:"error"`
	Code              string      `json:"code"`
	Runtime           string      `json:"runtime"`
	Model             string      `json:"model"`
	Provider          string      `json:"provider"`
	MissingEnv        []string    `json:"missing_env"`
	BillingMode       BillingMode `json:"billing_mode"`
	Remedy            string      `json:"remedy"`
	Retryable         bool        `json:"retryable"`
	DecisionID        string      `json:"decision_id"`
	AlternativeModels []string    `json:"alternative_models"`
	Warnings          []Warning   `json:"warnings,omitempty"`
}

// Warning is what a person should know although it did not decide.
type Warning struct {
	Code     string   `json:"code"`
	Message  string   `json:"message"`
	EnvNames []string `json:"env_names"`
}

// === How a Refusal is made ===

// denied passes a denial on as it is.
func denied(spec Spec, response *byokgatev1.DecideResponse, deny *byokgatev1.Deny) *Denied {
	made := &Denied{
		response: response,
		refusal: refusal{
			httpStatus: http.StatusUnprocessableEntity,
			body: Body{
				Error:             deny.GetMessage(),
				Code:              shortName(deny.GetCode(), denyPrefix),
				Runtime:           spec.Runtime,
				Model:             spec.Model,
				Provider:          response.GetResolution().GetProvider(),
				MissingEnv:        filled(deny.GetMissingEnv()),
				BillingMode:       billingMode(response.GetResolution().GetBillingMode()),
				Remedy:            deny.GetRemedy(),
				DecisionID:        response.GetDecisionId(),
				AlternativeModels: filled(deny.GetAlternativeModels()),
				Warnings:          warnings(response.GetWarnings()),
			},
		},
	}
	if deny.GetRetryable() {
		made.httpStatus = http.StatusServiceUnavailable
		made.retryAfter = deny.GetRetryAfter().AsDuration()
	}
	return made
}

// unreadable is for an answer that this package cannot read, most likely of a newer byok-gate during a rollout.
func unreadable(spec Spec, response *byokgatev1.DecideResponse, what string) *Undecided {
	made := undecided(spec, http.StatusServiceUnavailable, errors.New("byok-gate answered with "+what))
	made.body.Error = "byok-gate answered with " + what + ", which is taken for a no"
	made.body.Remedy = "try again; if it goes on, bring the platform and byok-gate to versions that know each other"
	made.body.DecisionID = response.GetDecisionId()
	return made
}

// failed is for a gRPC error: byok-gate did not decide.
func failed(spec Spec, err error) *Undecided {
	said := status.Convert(err)
	switch said.Code() {
	case codes.InvalidArgument:
		// Names the field at fault. byok-gate never repeats a credential's value.
		return unjudgeable(spec, err, said.Message())
	case codes.Unauthenticated, codes.PermissionDenied, codes.Unimplemented:
		return miswired(spec, err, said.Code().String())
	default:
		made := undecided(spec, http.StatusServiceUnavailable, err)
		made.body.Error = "byok-gate made no decision (" + said.Code().String() + "), so nothing was started"
		made.retryAfter = retryInfo(said)
		return made
	}
}

// unjudgeable is for a request that is at fault itself.
func unjudgeable(spec Spec, cause error, field string) *Undecided {
	made := undecided(spec, http.StatusBadRequest, cause)
	made.body.Error = "the workspace cannot be judged: " + field
	made.body.Remedy = "correct the field that is named"
	return made
}

// miswired is for a fault of the platform's own that no tenant can help.
func miswired(spec Spec, cause error, what string) *Undecided {
	made := undecided(spec, http.StatusInternalServerError, cause)
	made.body.Error = "the platform is not wired to byok-gate (" + what + ")"
	made.body.Remedy = "tell the platform's operator; trying again changes nothing"
	return made
}

func undecided(spec Spec, httpStatus int, cause error) *Undecided {
	return &Undecided{
		cause: cause,
		refusal: refusal{
			httpStatus: httpStatus,
			body:       Body{Code: CodeDecisionUnavailable, Runtime: spec.Runtime, Model: spec.Model},
		},
	}
}

// retryInfo is when an overloaded byok-gate asks to be asked again. Zero if it does not say.
func retryInfo(said *status.Status) time.Duration {
	for _, detail := range said.Details() {
		if info, is := detail.(*errdetails.RetryInfo); is {
			return info.GetRetryDelay().AsDuration()
		}
	}
	return 0
}

func warnings(given []*byokgatev1.Warning) []Warning {
	var list []Warning
	for _, warning := range given {
		list = append(list, Warning{
			Code:     shortName(warning.GetCode(), warningPrefix),
			Message:  warning.GetMessage(),
			EnvNames: append([]string{}, filled(warning.GetEnvNames())...),
		})
	}
	return list
}

// filled leaves empty names out: the body's schema has no place for them.
func filled(names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool { return name == "" })
}
