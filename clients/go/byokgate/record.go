package byokgate

import (
	"context"
	"log/slog"
	"time"
)

// Mode says how an answer is used.
type Mode string

const (
	// Enforce: the answer decides.
	Enforce Mode = "enforce"
	// ReportOnly: the answer decides nothing.
	ReportOnly Mode = "report_only"
)

// Outcome is the result of a request.
type Outcome string

// The outcomes. Those of a [Reporter] have their own names, so that a metric by outcome alone cannot mix them up.
const (
	OutcomeAllowed        Outcome = "allowed"
	OutcomeDenied         Outcome = "denied"
	OutcomeUndecided      Outcome = "undecided"
	OutcomeWouldAllow     Outcome = "would_allow"
	OutcomeWouldDeny      Outcome = "would_deny"
	OutcomeWouldUndecided Outcome = "would_be_undecided"
)

// Observation is one answer, as a metric counts it: all its fields but Took and Retries have few values.
type Observation struct {
	Mode       Mode
	Checkpoint Checkpoint
	Outcome    Outcome
	// Code is why not. Empty for an allow.
	Code Code
	// Reason is why there was no decision. Empty if there was one.
	Reason Reason
	// Provider owns the model. Empty if none was derived.
	Provider string
	// BillingMode is who pays, on an allow.
	BillingMode BillingMode
	// Unverified: allowed although the credential was not verified.
	Unverified bool
	// Retries is how often the call was retried, since byok-gate was down, overloaded, or named more credentials.
	Retries int
	// Took is the time from the call to the answer, lookups and retries included.
	Took time.Duration
}

// outcome by mode: allowed, denied, undecided.
func (m Mode) outcome(which int) Outcome {
	if m == ReportOnly {
		return [...]Outcome{OutcomeWouldAllow, OutcomeWouldDeny, OutcomeWouldUndecided}[which]
	}
	return [...]Outcome{OutcomeAllowed, OutcomeDenied, OutcomeUndecided}[which]
}

// message by mode, in the same order.
func (m Mode) message(which int) string {
	if m == ReportOnly {
		return [...]string{
			"byok-gate, report only: would have been allowed",
			"byok-gate, report only: would have been denied, was not",
			"byok-gate, report only: would have been refused as undecided, was not",
		}[which]
	}
	return [...]string{"byok-gate: allowed", "byok-gate: denied", "byok-gate: undecided, refused"}[which]
}

// record logs an answer and calls the observers, once.
func (c *Client) record(
	ctx context.Context, request *Request, allowed Allowed, refusal Refusal, took time.Duration, retries int,
) {
	which, level := 0, slog.LevelInfo
	var undecided *Undecided
	switch refusal := refusal.(type) {
	case nil:
	case *Denied:
		which, level = 1, slog.LevelWarn
	case *Undecided:
		which, level, undecided = 2, slog.LevelError, refusal
		if refusal.reason == ReasonCanceled {
			// A tenant who hangs up is nobody's fault.
			level = slog.LevelDebug
		}
	}
	warned := slog.LevelWarn
	if c.quiet {
		level, warned = slog.LevelDebug, slog.LevelDebug
	}
	if c.logs(ctx, level) || c.logs(ctx, warned) {
		c.write(ctx, request, allowed, refusal, undecided, level, warned, which, took, retries)
	}
	if c.observe == nil {
		return
	}
	observation := Observation{
		Mode: c.mode, Checkpoint: request.Checkpoint, Outcome: c.mode.outcome(which), Took: took, Retries: retries,
	}
	switch {
	case refusal == nil:
		observation.Provider, observation.BillingMode = allowed.Provider(), allowed.mode
		observation.Unverified = unverified(allowed.response)
	default:
		observation.Code, observation.Provider = refusal.Code(), refusal.sealed().body.Provider
		if undecided != nil {
			observation.Reason = undecided.Reason()
		}
	}
	hook(func() { c.observe(observation) }, func(thrown any) { c.fault(ctx, panicked("the observer", thrown)) })
}

func (c *Client) write(
	ctx context.Context, request *Request, allowed Allowed, refusal Refusal, undecided *Undecided, level, warned slog.Level, which int,
	took time.Duration, retries int,
) {
	spec := &request.Spec
	about := make([]slog.Attr, 0, 20)
	about = append(about,
		slog.String("mode", string(c.mode)), slog.String("checkpoint", request.Checkpoint.String()),
		slog.String("workspace_id", spec.WorkspaceID), slog.String("organization_id", spec.OrganizationID),
		slog.String("runtime", spec.Runtime), slog.String("model", spec.Model))
	var list []Warning
	if refusal == nil {
		list = warnings(allowed.response.GetWarnings())
	} else {
		list = refusal.sealed().body.Warnings
	}
	if c.logs(ctx, warned) {
		for _, warning := range list {
			c.logSafely(ctx, warned, "byok-gate: warning", append(about[:len(about):len(about)],
				slog.String("code", string(warning.Code)), slog.String("message", warning.Message))...)
		}
	}
	about = append(about, slog.Duration("took", took), slog.Int("retries", retries))
	if refusal == nil {
		about = append(about, slog.String("billing_mode", string(allowed.mode)), slog.String("provider", allowed.Provider()),
			slog.String("decision_id", allowed.response.GetDecisionId()))
	} else {
		body := refusal.sealed().body
		about = append(about, slog.String("code", string(refusal.Code())), slog.String("reason", body.Error),
			slog.String("provider", body.Provider), slog.String("decision_id", body.DecisionID),
			slog.Int("http_status", refusal.HTTPStatus()))
		if hint := refusal.OperatorHint(); hint != "" {
			about = append(about, slog.String("operator_hint", hint))
		}
	}
	if undecided != nil {
		about = append(about, slog.String("why", string(undecided.Reason())))
		if undecided.cause != nil {
			about = append(about, slog.String("cause", undecided.cause.Error()))
		}
	}
	c.logSafely(ctx, level, c.mode.message(which), about...)
}

// logs says whether such a line would be written. A handler that panics is not called again.
func (c *core) logs(ctx context.Context, level slog.Level) (enabled bool) {
	hook(func() { enabled = c.log.Enabled(ctx, level) }, nil)
	return enabled
}

// logSafely recovers from a handler that panics: a decision does not depend on its log line.
func (c *core) logSafely(ctx context.Context, level slog.Level, message string, attributes ...slog.Attr) {
	hook(func() { c.log.LogAttrs(ctx, level, message, attributes...) }, nil)
}

// fault logs that foreign code failed.
func (c *core) fault(ctx context.Context, err error) {
	c.logSafely(ctx, slog.LevelError, "byok-gate: a hook failed", slog.String("error", err.Error()))
}
