// Package byokgate asks byok-gate whether an AI-agent workspace may start and who pays for its model calls, and fails closed:
// anything but a clear allow is an error.
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
// # What a caller must do
//
// Decide before a row is written and before a running workspace is stopped. On an error keep a running workspace running. If
// [Refusal.Retryable] is true, retry after [Refusal.RetryAfter]; [Client.DecideUntil] does that.
//
// # The three answers
//
// Only this package makes an [Allowed], from a reply that says "allow" and names a known billing mode. Its zero value is not an
// allow: its methods panic. [*Denied] is byok-gate's decision against the workspace. [*Undecided] means that there was no
// decision: byok-gate is down, hangs or is misconfigured, or its reply cannot be read. Both are errors with an HTTP status and
// a JSON body (docs/denial-body.schema.json), found with [errors.As]; package gatehttp writes them. [errors.Is] checks for a
// code: errors.Is(err, byokgate.MissingBYOKCredential). An unknown code is a denial with byok-gate's own message.
//
// # Credentials
//
// The client fetches and sends as few values as possible. It first asks byok-gate which names matter for the model (none, if
// the platform owns it), caches that, learns changes from each decision, and calls [Lookup] for those names. A lookup that
// fails is reported as unreadable, never as "no credential". A [Secret] cannot be printed, logged or marshalled.
//
// # Time
//
// Every call has a deadline: the context's, and [DefaultTimeout] at the latest. While byok-gate is down, or if an overloaded
// one says when to retry, the call is retried for a part of that time, so that a restart of byok-gate goes unnoticed; nothing
// else is retried.
//
// # Fleets
//
// [Client.BatchDecide] decides for a fleet, [Client.Sweep] checks a running one periodically. A sweep that learns nothing
// reports it: alert on an error of its loop that is an [*Undecided].
//
// # Faults in the caller's code
//
// A lookup, a hook or a log handler that panics or ends its goroutine, a file that hangs, a nil client: none ends the process,
// blocks a caller, or counts as an answer.
//
// # Rollout
//
// [Client.ReportOnly] returns a [Reporter], which calls, logs and counts but cannot return an [Allowed]: the platform's own
// checks go on deciding.
package byokgate
