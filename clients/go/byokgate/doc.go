// Package byokgate asks byok-gate whether an AI-agent workspace may start and who pays for its model calls, and fails closed:
// whatever is not plainly an allow is an error.
//
//	client, err := byokgate.New("unix:///run/byok-gate/gate.sock")
//	...
//	allowed, err := client.Decide(ctx, byokgate.Request{
//		Checkpoint: byokgate.Create,
//		Spec: byokgate.Spec{
//			Runtime: "claude-code",
//			Model:   "claude-opus-4-7",
//			Lookup:  secrets.lookup, // called for the names that matter, and only for those
//		},
//	})
//	if err != nil {
//		return err // *Denied or *Undecided; nothing was written, nothing was stopped
//	}
//	insert(row, allowed.BillingMode(), allowed.DecisionID())
//
// # What a caller owes
//
// Decide before a row is written and before a running workspace is stopped. On an error keep what runs running. Where
// [Refusal.Retryable] says so, ask again after [Refusal.RetryAfter]; [Client.DecideUntil] does that.
//
// # The three answers
//
// [Allowed] is made by this package alone, from a reply that says "allow" and names a billing mode that this package knows.
// Its zero value is no allow: every question put to it panics. [*Denied] is byok-gate's decision against the workspace.
// [*Undecided] means that there was no decision: byok-gate is away, hung or mis-wired, or its reply cannot be read. Both are
// errors with an HTTP status and a JSON body (docs/denial-body.schema.json), found with [errors.As]; package gatehttp writes
// them. [errors.Is] tells codes apart: errors.Is(err, byokgate.MissingBYOKCredential). A code that this package does not know
// is a denial with byok-gate's own words.
//
// # Credentials
//
// Values leave the caller as late and as few as possible. The client first asks byok-gate which names matter for the model
// (none, if the platform owns it), remembers that, learns from each decision whether others matter by now, and calls
// [Lookup] for those names. A lookup that fails is reported as unreadable, never as "no credential there". A [Secret] cannot
// be printed, logged or marshalled.
//
// # Time
//
// Every call has a deadline: the context's, and [DefaultTimeout] at the latest. A call that finds byok-gate away is repeated
// for a part of that time, so that a restart of byok-gate goes unnoticed; nothing else is repeated.
//
// # Many, and again
//
// [Client.BatchDecide] asks about a fleet, [Client.Sweep] looks at a running one again and again. A sweep that finds nothing out says so: an error
// of its loop that is an [*Undecided] is for whoever is on call.
//
// # Faults of the caller's own
//
// A lookup, a hook or a log handler that panics or ends its goroutine, a file that hangs, a nil client: none ends the process,
// hangs a caller, or is taken for an answer.
//
// # Switching it on
//
// [Client.ReportOnly] gives a [Reporter], which asks, logs and counts but has no answer that could be taken for an
// [Allowed]: the platform's own checks go on deciding.
package byokgate
