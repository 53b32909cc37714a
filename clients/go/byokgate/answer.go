package byokgate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// Default messages.
const (
	noDecision   = "byok-gate made no decision, so nothing was started"
	noReason     = "byok-gate refused the workspace and gave no reason"
	tryAgain     = "try again; if this continues, contact the platform's operator"
	tellOperator = "contact the platform's operator"
)

const (
	// defaultRetryAfter applies if byok-gate does not say: about as long as its restart takes.
	defaultRetryAfter = time.Second
	// maxRetryAfter is longer than any pause that byok-gate requests. A longer one comes from a broken server, and would overflow in a sum.
	maxRetryAfter = 24 * time.Hour
)

// === Allowed ===

// Allowed says that the workspace may start. Only [Client.Decide], [Client.BatchDecide] and [Client.DecideUntil] make one that does.
//
// The zero Allowed is not an allow: its methods panic, so that a caller who ignored an error starts nothing and bills nobody.
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
	// NoBilling: nobody pays; no model calls are expected.
	NoBilling BillingMode = "NONE"
	// UnknownBilling is never part of an Allowed: not decided, or an unknown mode.
	UnknownBilling BillingMode = unspecified
)

// BillingMode is who pays. Never UnknownBilling.
func (a Allowed) BillingMode() BillingMode { a.mustBe(); return a.mode }

// DecisionID is the decision's id, which byok-gate's log carries too. Never empty.
func (a Allowed) DecisionID() string { return a.mustBe().GetDecisionId() }

// Provider is the owner of the model. Empty if none had to be derived.
func (a Allowed) Provider() string { return a.mustBe().GetResolution().GetProvider() }

// Warnings are what a person should know, for instance that the credential could not be verified.
func (a Allowed) Warnings() []Warning { return warnings(a.mustBe().GetWarnings()) }

// Unverified says that the workspace may start although its credential was not verified. A warning says why.
func (a Allowed) Unverified() bool { return unverified(a.mustBe()) }

// Details are the details of the decision.
func (a Allowed) Details() Details { return detailsFrom(a.mustBe()) }

// Reply is byok-gate's whole reply as JSON, for a person who looks for a fault. It holds no credential. Its form is protojson's, which is not
// stable to the byte.
func (a Allowed) Reply() []byte { return replyJSON(a.mustBe()) }

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
		panic("byokgate: the zero Allowed is no allow; the error of the call that returned it was ignored")
	}
	return a.response
}

func unverified(response *byokgatev1.DecideResponse) bool {
	return slices.ContainsFunc(response.GetWarnings(), func(warning *byokgatev1.Warning) bool {
		switch warning.GetCode() {
		case byokgatev1.WarningCode_WARNING_CODE_CREDENTIAL_UNVERIFIED, byokgatev1.WarningCode_WARNING_CODE_STALE_LIVENESS,
			byokgatev1.WarningCode_WARNING_CODE_REPORT_ONLY:
			return true
		}
		return false
	})
}

// === Details ===

// Details are the details of a decision: for a person, for a log, and for [Concerns]. They decide nothing.
type Details struct {
	// Provider owns the model. Empty if none was derived.
	Provider string
	// BillingMode is who pays; on a denial, who would have.
	BillingMode BillingMode
	// AcceptedEnv are the credential names that the provider accepts, in the order in which they are tried.
	AcceptedEnv []string
	// CredentialEnv is the name whose value was checked, and CredentialScope where it is stored. Empty and zero if none was.
	CredentialEnv   string
	CredentialScope Scope
	// ShadowsOrganization: the value hides one of the organization's.
	ShadowsOrganization bool
	// Fingerprint identifies the checked key. Empty unless byok-gate is configured to give one.
	Fingerprint string
	// Verdict is what is known of the credential. Empty if none had to be checked.
	Verdict Verdict
	// UpstreamStatus is the provider's HTTP status, EndpointHost the host that was probed. Zero and empty if there was no answer.
	UpstreamStatus int
	EndpointHost   string
	// ObservedAt is when the provider answered, Age how old that result was, ServedFrom where it came from (PROBE, CACHE, STALE, BREAKER).
	ObservedAt time.Time
	Age        time.Duration
	ServedFrom string
	// RelevantEnv and RelevantBaseURLEnv are the names that mattered.
	RelevantEnv        []string
	RelevantBaseURLEnv []string
	// RegistryRevision and CatalogueRevision identify the documents that decided.
	RegistryRevision  string
	CatalogueRevision string
	// Trace are the steps taken, if Request.Explain was set.
	Trace []TraceStep
}

// TraceStep is one step of a decision, in words.
type TraceStep struct{ Step, Detail string }

func detailsFrom(response *byokgatev1.DecideResponse) Details {
	resolution, liveness := response.GetResolution(), response.GetLiveness()
	found := Details{
		Provider:            resolution.GetProvider(),
		BillingMode:         billingMode(resolution.GetBillingMode()),
		AcceptedEnv:         filled(resolution.GetAcceptedEnv()),
		CredentialEnv:       resolution.GetCredentialEnv(),
		CredentialScope:     Scope(resolution.GetCredentialScope()),
		ShadowsOrganization: resolution.GetShadowsOrganization(),
		Fingerprint:         resolution.GetCredentialFingerprint(),
		UpstreamStatus:      int(liveness.GetUpstreamStatus()),
		EndpointHost:        liveness.GetEndpointHost(),
		Age:                 liveness.GetAge().AsDuration(),
		RelevantEnv:         filled(response.GetRelevantEnv()),
		RelevantBaseURLEnv:  filled(response.GetRelevantBaseUrlEnv()),
		RegistryRevision:    response.GetRegistryRevision(),
		CatalogueRevision:   response.GetCatalogueRevision(),
	}
	if verdict := liveness.GetVerdict(); verdict != byokgatev1.Verdict_VERDICT_UNSPECIFIED {
		found.Verdict = Verdict(shortName(verdict, verdictPrefix))
	}
	if served := liveness.GetServedFrom(); served != byokgatev1.ServedFrom_SERVED_FROM_UNSPECIFIED {
		found.ServedFrom = shortName(served, servedPrefix)
	}
	if at := liveness.GetObservedAt(); at != nil {
		found.ObservedAt = at.AsTime()
	}
	for _, step := range response.GetTrace() {
		found.Trace = append(found.Trace, TraceStep{step.GetStep(), step.GetDetail()})
	}
	return found
}

func replyJSON(response *byokgatev1.DecideResponse) []byte {
	text, err := protojson.Marshal(response)
	if err != nil {
		// Text that is not UTF-8: no reply that was read from the wire.
		return []byte("{}")
	}
	return text
}

// === Refusal ===

// Refusal is what a [*Denied] and an [*Undecided] have in common: the reason not to start, and the HTTP answer. Only types of this package
// implement it.
type Refusal interface {
	error
	// HTTPStatus is 422 for a denial, 503 if a retry may help, 400 for an invalid request, 500 for a misconfigured platform, and 499 for a
	// caller that hung up.
	HTTPStatus() int
	// Code is the reason for programs, such as MISSING_BYOK_CREDENTIAL or DECISION_UNAVAILABLE.
	Code() Code
	// Retryable says that the same request may be allowed later with nothing changed.
	Retryable() bool
	// RetryAfter is when to retry. Zero if that changes nothing.
	RetryAfter() time.Duration
	// OperatorHint is what the platform's operators should check. It is logged, and not part of the body. Empty if there is nothing.
	OperatorHint() string
	// Body is the answer's body.
	Body() Body
	// JSON is the body, as docs/denial-body.schema.json describes it.
	JSON() []byte

	sealed() *refusal
}

// Denied is byok-gate's decision against a workspace.
type Denied struct {
	refusal  refusal
	response *byokgatev1.DecideResponse
}

// Undecided says that there was no decision, so that nothing may start.
type Undecided struct {
	refusal    refusal
	reason     Reason
	cause      error
	violations []Violation
}

var (
	_ Refusal = (*Denied)(nil)
	_ Refusal = (*Undecided)(nil)
)

// RefusalOf is the refusal in an error of this package, however deep it is wrapped. Any other error, including nil, becomes an [*Undecided]
// without its text, which may hold what no tenant should read.
func RefusalOf(err error) Refusal {
	var refusal Refusal
	if errors.As(err, &refusal) && refusal.sealed() != nil {
		return refusal
	}
	made := &Undecided{cause: err, reason: ReasonInternal}
	if errors.Is(err, context.Canceled) {
		made = undecided(nil, ReasonCanceled, err)
	}
	return made
}

// Error is the code and the reason.
func (d *Denied) Error() string { return "byokgate: denied: " + d.sealed().text() }

// Is says that it is [ErrDenied] and its own code.
func (d *Denied) Is(target error) bool { return target == ErrDenied || target == error(d.Code()) }

// DecisionID is the decision's id, which byok-gate's log carries too.
func (d *Denied) DecisionID() string { return d.Body().DecisionID }

// Details are the details of the decision.
func (d *Denied) Details() Details {
	if d == nil {
		return Details{}
	}
	return detailsFrom(d.response)
}

// Reply is byok-gate's whole reply as JSON, for a person who looks for a fault. It holds no credential. Its form is protojson's, which is not
// stable to the byte.
func (d *Denied) Reply() []byte {
	if d == nil {
		return replyJSON(nil)
	}
	return replyJSON(d.response)
}

// HTTPStatus is described at [Refusal].
func (d *Denied) HTTPStatus() int { return d.sealed().status() }

// Code is described at [Refusal].
func (d *Denied) Code() Code { return d.sealed().code() }

// Retryable is described at [Refusal].
func (d *Denied) Retryable() bool { return d.sealed().retryable() }

// RetryAfter is described at [Refusal].
func (d *Denied) RetryAfter() time.Duration { return d.sealed().pause() }

// OperatorHint is described at [Refusal].
func (d *Denied) OperatorHint() string { return d.sealed().hint() }

// Body is described at [Refusal].
func (d *Denied) Body() Body { return d.sealed().content() }

// JSON is described at [Refusal].
func (d *Denied) JSON() []byte { return d.sealed().json() }

// LogValue is the code and what belongs to it.
func (d *Denied) LogValue() slog.Value { return d.sealed().logValue() }

func (d *Denied) sealed() *refusal {
	if d == nil {
		return nil
	}
	return &d.refusal
}

// Error is the code, the reason, and what to check.
func (u *Undecided) Error() string {
	text := "byokgate: undecided: " + u.sealed().text()
	if hint := u.OperatorHint(); hint != "" {
		text += "; " + hint
	}
	return text
}

// Is says that it is [ErrUndecided], and [context.Canceled] or [context.DeadlineExceeded] if that is the reason.
func (u *Undecided) Is(target error) bool {
	switch target {
	case ErrUndecided, error(u.Code()):
		return true
	case context.Canceled:
		return u.Reason() == ReasonCanceled
	case context.DeadlineExceeded:
		return u.Reason() == ReasonTimedOut
	}
	return false
}

// Unwrap is the cause, for instance a gRPC status or the context's error.
func (u *Undecided) Unwrap() error {
	if u == nil {
		return nil
	}
	return u.cause
}

// Reason is why there was no decision.
func (u *Undecided) Reason() Reason {
	if u == nil || u.reason == "" {
		return ReasonInternal
	}
	return u.reason
}

// Violations are the invalid fields of the request, for [ReasonBadRequest]. The slice is a copy.
func (u *Undecided) Violations() []Violation {
	if u == nil {
		return nil
	}
	return slices.Clone(u.violations)
}

// HTTPStatus is described at [Refusal].
func (u *Undecided) HTTPStatus() int { return u.sealed().status() }

// Code is described at [Refusal].
func (u *Undecided) Code() Code { return u.sealed().code() }

// Retryable is described at [Refusal].
func (u *Undecided) Retryable() bool { return u.sealed().retryable() }

// RetryAfter is described at [Refusal].
func (u *Undecided) RetryAfter() time.Duration { return u.sealed().pause() }

// OperatorHint is described at [Refusal].
func (u *Undecided) OperatorHint() string { return u.sealed().hint() }

// Body is described at [Refusal].
func (u *Undecided) Body() Body { return u.sealed().content() }

// JSON is described at [Refusal].
func (u *Undecided) JSON() []byte { return u.sealed().json() }

// LogValue is the code and what belongs to it.
func (u *Undecided) LogValue() slog.Value { return u.sealed().logValue() }

func (u *Undecided) sealed() *refusal {
	if u == nil {
		return nil
	}
	return &u.refusal
}

// refusal is the part that both have. Nil and its zero value are refusals too.
type refusal struct {
	httpStatus   int
	retryAfter   time.Duration
	operatorHint string
	body         Body
}

func (r *refusal) status() int {
	if r == nil || r.httpStatus == 0 {
		return http.StatusServiceUnavailable
	}
	return r.httpStatus
}

func (r *refusal) code() Code {
	if r == nil || r.body.Code == "" {
		return DecisionUnavailable
	}
	return r.body.Code
}

func (r *refusal) retryable() bool { return r.status() == http.StatusServiceUnavailable }

func (r *refusal) pause() time.Duration {
	if !r.retryable() {
		return 0
	}
	if r == nil || r.retryAfter <= 0 {
		return defaultRetryAfter
	}
	return min(r.retryAfter, maxRetryAfter)
}

func (r *refusal) hint() string {
	if r == nil {
		return ""
	}
	return r.operatorHint
}

func (r *refusal) content() Body {
	var body Body
	if r != nil {
		body = r.body
	}
	body.Code, body.Retryable = r.code(), r.retryable()
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
	for index := range body.Warnings {
		body.Warnings[index].EnvNames = append([]string{}, body.Warnings[index].EnvNames...)
	}
	return body
}

func (r *refusal) json() []byte {
	text, err := json.Marshal(r.content())
	if err != nil {
		// Strings, numbers, booleans and lists of them always marshal.
		panic(err)
	}
	return text
}

func (r *refusal) logValue() slog.Value {
	body := r.content()
	return slog.GroupValue(
		slog.String("code", string(body.Code)),
		slog.String("reason", body.Error),
		slog.String("provider", body.Provider),
		slog.String("decision_id", body.DecisionID),
	)
}

func (r *refusal) text() string { return string(r.code()) + ": " + r.content().Error }

// Body is the JSON of every refusal; docs/denial-body.schema.json describes it.
type Body struct {
	Error             string      `json:"error"`
	Code              Code        `json:"code"`
	Runtime           string      `json:"runtime"`
	Model             string      `json:"model"`
	Provider          string      `json:"provider"`
	MissingEnv        []string    `json:"missing_env"`
	CredentialEnv     string      `json:"credential_env,omitempty"`
	UpstreamStatus    int         `json:"upstream_status,omitempty"`
	EndpointHost      string      `json:"endpoint_host,omitempty"`
	BillingMode       BillingMode `json:"billing_mode"`
	Remedy            string      `json:"remedy"`
	Retryable         bool        `json:"retryable"`
	DecisionID        string      `json:"decision_id"`
	AlternativeModels []string    `json:"alternative_models"`
	Warnings          []Warning   `json:"warnings,omitempty"`
}

// Warning is what a person should know, although it did not decide.
type Warning struct {
	Code     WarningCode `json:"code"`
	Message  string      `json:"message"`
	EnvNames []string    `json:"env_names"`
}

// === How a Refusal is made ===

// denied passes a denial on unchanged, with any code. Spec may be nil.
func denied(spec *Spec, response *byokgatev1.DecideResponse, deny *byokgatev1.Deny) *Denied {
	runtime, model := spec.named()
	resolution, liveness := response.GetResolution(), response.GetLiveness()
	made := &Denied{
		response: response,
		refusal: refusal{
			httpStatus:   http.StatusUnprocessableEntity,
			operatorHint: deny.GetOperatorHint(),
			body: Body{
				Error:             deny.GetMessage(),
				Code:              denyCode(deny.GetCode()),
				Runtime:           runtime,
				Model:             model,
				Provider:          resolution.GetProvider(),
				MissingEnv:        filled(deny.GetMissingEnv()),
				CredentialEnv:     resolution.GetCredentialEnv(),
				EndpointHost:      liveness.GetEndpointHost(),
				BillingMode:       billingMode(resolution.GetBillingMode()),
				Remedy:            deny.GetRemedy(),
				DecisionID:        response.GetDecisionId(),
				AlternativeModels: filled(deny.GetAlternativeModels()),
				Warnings:          warnings(response.GetWarnings()),
			},
		},
	}
	if status := liveness.GetUpstreamStatus(); status >= 100 && status <= 599 {
		made.refusal.body.UpstreamStatus = int(status)
	}
	if made.refusal.body.Error == "" {
		made.refusal.body.Error = noReason
	}
	if made.refusal.body.Remedy == "" {
		made.refusal.body.Remedy = tellOperator
	}
	if deny.GetRetryable() {
		made.refusal.httpStatus = http.StatusServiceUnavailable
		made.refusal.retryAfter = deny.GetRetryAfter().AsDuration()
	}
	return made
}

// denyCode keeps the number of an unknown code, and of the one that is never sent.
func denyCode(code byokgatev1.DenyCode) Code {
	if code == byokgatev1.DenyCode_DENY_CODE_UNSPECIFIED {
		return denyPrefix + "0"
	}
	return Code(shortName(code, denyPrefix))
}

// undecided is for a reason with a fixed message. Spec may be nil.
func undecided(spec *Spec, reason Reason, cause error) *Undecided {
	runtime, model := spec.named()
	said := reasons[reason]
	made := &Undecided{
		reason: reason,
		cause:  cause,
		refusal: refusal{
			httpStatus:   said.httpStatus,
			operatorHint: said.hint,
			body:         Body{Code: DecisionUnavailable, Error: said.sentence, Runtime: runtime, Model: model},
		},
	}
	switch {
	case reason.miswired():
		made.refusal.body.Error = "the platform is not wired to byok-gate (" + string(reason) + ")"
		made.refusal.body.Remedy = "contact the platform's operator; retrying will not help"
	case reason == ReasonBadRequest:
		made.refusal.body.Remedy = "correct the field that is named"
	}
	return made
}

// unreadable is for an answer that this package cannot read, most likely from a newer byok-gate during a rollout.
func unreadable(spec *Spec, response *byokgatev1.DecideResponse, what string) *Undecided {
	made := undecided(spec, ReasonUnreadableReply, errors.New("byok-gate answered with "+what))
	made.refusal.body.Error = "byok-gate answered with " + what + ", which is taken for a no"
	made.refusal.body.DecisionID = response.GetDecisionId()
	return made
}

// unjudgeable is for an invalid request.
func unjudgeable(spec *Spec, cause error, violation Violation) *Undecided {
	made := undecided(spec, ReasonBadRequest, cause)
	made.violations = []Violation{violation}
	made.refusal.body.Error = "the workspace cannot be judged: " + violation.Field + ": " + violation.Description
	return made
}

// misused is for a call with invalid arguments from the platform's own code.
func misused(spec *Spec, what string, err error) *Undecided {
	made := undecided(spec, ReasonInvalidOption, fmt.Errorf("%s: %w", what, err))
	made.refusal.operatorHint = made.cause.Error()
	return made
}

// unsettled is for a registry that changes during every call.
func unsettled(spec *Spec) *Undecided {
	return undecided(spec, ReasonRegistryMoving, errors.New("byok-gate's registry kept changing"))
}

// missing is for a request that a batch did not answer.
func missing(spec *Spec) *Undecided { return unreadable(spec, nil, "no result for this workspace") }

// failed is for a gRPC error: byok-gate did not decide.
func (c *core) failed(ctx context.Context, spec *Spec, err error) *Undecided {
	said := status.Convert(err)
	found := detailsOf(said)
	fault := c.link.fault()
	reason := reasonFor(ctx, said, found, fault)
	if reason == ReasonUnauthenticated && c.token.unreadable() {
		reason = ReasonTokenUnreadable
	}
	if reason != ReasonCanceled && c.closed() {
		reason = ReasonClosed
	}
	made := undecided(spec, reason, err)
	made.violations = found.violations
	switch reason {
	case ReasonBadRequest:
		// Names the invalid field. byok-gate never repeats a credential's value.
		made.refusal.body.Error = "the workspace cannot be judged: " + said.Message()
	case ReasonUnreadableReply:
		made.refusal.body.Error = "byok-gate's answer cannot be read (" + said.Code().String() + "), so nothing was started"
	}
	if made.refusal.httpStatus == http.StatusServiceUnavailable {
		made.refusal.retryAfter = retryInfo(said)
	}
	if hint := hintFor(reason, said, found); hint != "" {
		made.refusal.operatorHint = hint
	} else if fault != nil && fault.reason == reason && fault.hint != "" {
		made.refusal.operatorHint = fault.hint
	}
	return made
}

// retryInfo is the pause that an overloaded byok-gate requests. Zero if it does not say.
func retryInfo(said *status.Status) time.Duration {
	for _, detail := range said.Details() {
		if info, is := detail.(*errdetails.RetryInfo); is {
			return min(info.GetRetryDelay().AsDuration(), maxRetryAfter)
		}
	}
	return 0
}

func warnings(given []*byokgatev1.Warning) []Warning {
	var list []Warning
	for _, warning := range given {
		list = append(list, Warning{
			Code:     WarningCode(shortName(warning.GetCode(), warningPrefix)),
			Message:  warning.GetMessage(),
			EnvNames: append([]string{}, filled(warning.GetEnvNames())...),
		})
	}
	return list
}

// filled is a copy that leaves empty names out: the body's schema has no place for them.
func filled(names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool { return name == "" })
}
