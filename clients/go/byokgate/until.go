package byokgate

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"
)

// RetryPolicy is how [Client.DecideUntil] goes on. Its zero value tries ten times, with pauses of a minute at most. A number below zero is
// refused ([ReasonInvalidOption]).
type RetryPolicy struct {
	// MaxAttempts is the maximum number of calls. Zero: 10.
	MaxAttempts int
	// MaxPause is the longest pause; a longer one ends the attempts. Zero: a minute.
	MaxPause time.Duration
	// OnRefusal gets each refusal that is retried, before the pause.
	OnRefusal func(attempt int, refusal Refusal, pause time.Duration)
}

const (
	defaultAttempts = 10
	defaultMaxPause = time.Minute
	maxSpread       = time.Second
	// patientAttempts is how often byok-gate's own retry pause is used unchanged. After that it doubles.
	patientAttempts = 3
)

// Pause is how long to wait after a refusal, with the attempt counted from 1. It is at least [Refusal.RetryAfter], plus up to a half at
// random but at most a second, so that callers that were refused together do not come back together and none misses its turn. It doubles
// from the fourth attempt on. Zero: do not retry, since the answer would be the same.
func Pause(refusal Refusal, attempt int) time.Duration {
	if refusal == nil || refusal.RetryAfter() <= 0 {
		return 0
	}
	pause := refusal.RetryAfter()
	for doublings := min(max(attempt, 0), 16) - patientAttempts; doublings > 0 && pause < defaultMaxPause; doublings-- {
		pause *= 2
	}
	return pause + rand.N(min(pause/2, maxSpread)+1)
}

// DecideUntil retries until the workspace may start, a retry would change nothing, the attempts are used up, or the context ends. It obeys
// byok-gate's RetryAfter. The error is the last refusal, joined with the context's error if that ended it.
func (c *Client) DecideUntil(ctx context.Context, request Request, policy RetryPolicy) (Allowed, error) {
	ctx = orBackground(ctx)
	attempts, longest := policy.MaxAttempts, policy.MaxPause
	switch {
	case c.unusable():
	case attempts < 0:
		return Allowed{}, c.refuse(ctx, &request, misused(&request.Spec, "RetryPolicy.MaxAttempts", notNegative(attempts)))
	case longest < 0:
		return Allowed{}, c.refuse(ctx, &request, misused(&request.Spec, "RetryPolicy.MaxPause", notNegative(longest)))
	}
	if attempts == 0 {
		attempts = defaultAttempts
	}
	if longest == 0 {
		longest = defaultMaxPause
	}
	for attempt := 1; ; attempt++ {
		allowed, refusal := c.decide(ctx, &request)
		if refusal == nil {
			return allowed, nil
		}
		pause := Pause(refusal, attempt)
		if attempt >= attempts || pause <= 0 || pause > longest || c.unusable() {
			return Allowed{}, refusal
		}
		if deadline, limited := ctx.Deadline(); limited && time.Until(deadline) < pause {
			return Allowed{}, errors.Join(refusal, context.DeadlineExceeded)
		}
		if policy.OnRefusal != nil {
			hook(func() { policy.OnRefusal(attempt, refusal, pause) },
				func(thrown any) { c.fault(ctx, panicked("RetryPolicy.OnRefusal", thrown)) })
		}
		if !sleep(ctx, pause) {
			return Allowed{}, errors.Join(refusal, ctx.Err())
		}
	}
}
