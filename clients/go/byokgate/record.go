package byokgate

import (
	"context"
	"log/slog"
	"time"
)

// Mode says what an answer is for.
type Mode string

const (
	// Enforce: the answer decides.
	Enforce Mode = "enforce"
	// ReportOnly: the answer decides nothing.
	ReportOnly Mode = "report_only"
)

// Outcome is what came of a request.
type Outcome string

// The outcomes. Those of a [Reporter] have names of their own, so that a metric by outcome alone cannot mix them up.
const (
	OutcomeAllowed        Outcome = "allowed"
	OutcomeDenied         Outcome = "denied"
	OutcomeUndecided      Outcome = "undecided"
	OutcomeWouldAllow     Outcome = "would_allow"
	OutcomeWouldDeny      Outcome = "would_deny"
	OutcomeWouldUndecided Outcome = "would_be_undecided"
)

// Observation is one answer, as a metric counts it: all its fields but Took have few values.
type Observation struct {
	Mode       Mode
	Checkpoint Checkpoint
	Outcome    Outcome
	// Code is why not. Empty for an allow.
	Code string
	// Took is from the question to the answer, lookups and retries included.
	Took time.Duration
}

// outcomes by mode: allowed, denied, undecided.
var outcomes = map[Mode][3]Outcome{
	Enforce:    {OutcomeAllowed, OutcomeDenied, OutcomeUndecided},
	ReportOnly: {OutcomeWouldAllow, OutcomeWouldDeny, OutcomeWouldUndecided},
}

// messages by mode, in the same order.
var messages = map[Mode][3]string{
	Enforce: {"byok-gate: allowed", "byok-gate: denied", "byok-gate: undecided, refused"},
	ReportOnly: {
		"byok-gate, report only: would have been allowed",
		"byok-gate, report only: would have been denied, was not",
		"byok-gate, report only: would have been refused as undecided, was not",
	},
}

// record logs an answer and tells the observer of it, once.
func (c *Client) record(ctx context.Context, request Request, allowed Allowed, refusal Refusal, took time.Duration) {
	spec := request.Spec
	log := c.log.With(
		"mode", string(c.mode), "checkpoint", request.Checkpoint.String(),
		"workspace_id", spec.WorkspaceID, "organization_id", spec.OrganizationID, "runtime", spec.Runtime, "model", spec.Model,
		"took", took)
	observation := Observation{Mode: c.mode, Checkpoint: request.Checkpoint, Took: took}
	which := 0
	level, attributes := slog.LevelInfo, []any(nil)
	var warned []Warning
	switch refusal := refusal.(type) {
	case nil:
		warned = allowed.Warnings()
		attributes = []any{"billing_mode", string(allowed.mode), "provider", allowed.Provider(), "decision_id", allowed.DecisionID()}
	case *Denied:
		which, level = 1, slog.LevelWarn
		warned = refusal.body.Warnings
		attributes = refusalAttributes(refusal)
	case *Undecided:
		which, level = 2, slog.LevelError
		attributes = append(refusalAttributes(refusal), "cause", refusal.cause.Error())
	}
	if refusal != nil {
		observation.Code = refusal.Code()
	}
	observation.Outcome = outcomes[c.mode][which]
	for _, warning := range warned {
		log.WarnContext(ctx, "byok-gate: warning", "code", warning.Code, "message", warning.Message)
	}
	log.Log(ctx, level, messages[c.mode][which], attributes...)
	if c.observe != nil {
		c.observe(observation)
	}
}

func refusalAttributes(refusal Refusal) []any {
	body := refusal.Body()
	return []any{
		"code", body.Code, "reason", body.Error, "provider", body.Provider, "decision_id", body.DecisionID,
		"http_status", refusal.HTTPStatus(),
	}
}
