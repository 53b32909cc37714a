package byokgate

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// maxRetryTime is how long a call is retried while byok-gate is down: longer than a restart takes, short enough that a
	// platform does not pile up requests. Never more than half of the remaining time.
	maxRetryTime = 2 * time.Second
	// The pauses double from the first to the last. Each is shortened by up to a half at random, so that callers interrupted by
	// one restart do not come back at once.
	firstPause = 50 * time.Millisecond
	lastPause  = 500 * time.Millisecond
)

// retry repeats a call while byok-gate is down, or if it said when to retry, as long as that leaves time for the answer. Other
// errors are returned at once: a deadline, a fault, a bad request. It also returns the number of retries.
func retry[T any](ctx context.Context, c *core, call func() (T, error)) (T, int, error) {
	window := retryWindow(ctx)
	began := time.Now()
	for attempt := 0; ; attempt++ {
		generation := c.token.generation()
		reply, err := call()
		if err == nil {
			c.link.answered()
			return reply, attempt, nil
		}
		pause, again := c.retryPause(err, attempt)
		if status.Code(err) == codes.Unauthenticated && attempt == 0 {
			// The token may have been rotated since its file was read.
			pause, again = 0, c.token.renewed(ctx, generation)
		}
		left := window - time.Since(began)
		if status.Code(err) == codes.Unavailable && left > 0 {
			// The last try is at the end of the window: byok-gate may be up by then.
			pause = min(pause, left)
		}
		if !again || pause > left || !sleep(ctx, pause) {
			return reply, attempt, err
		}
	}
}

func retryWindow(ctx context.Context) time.Duration {
	deadline, limited := ctx.Deadline()
	if !limited {
		return maxRetryTime
	}
	return min(maxRetryTime, time.Until(deadline)/2)
}

// retryPause says how long to wait before retrying the call that failed with err, if it may be retried.
func (c *core) retryPause(err error, attempt int) (time.Duration, bool) {
	said := status.Convert(err)
	switch said.Code() {
	case codes.Unavailable:
		if fault := c.link.fault(); fault != nil && fault.reason.miswired() && detailsOf(said).reason == "" {
			if _, answered := plainHTTP(said); !answered {
				return 0, false
			}
		}
		// There was no reply: the connection failed, or byok-gate is starting or stopping. All calls are read-only, so a repeated one
		// does no harm.
		pause := lastPause
		if attempt < 8 {
			pause = min(lastPause, firstPause<<attempt)
		}
		return pause - rand.N(pause/2), true
	case codes.ResourceExhausted:
		// Only if byok-gate names the time: retries must not add to an overload.
		pause := retryInfo(said)
		if pause <= 0 {
			return 0, false
		}
		// Never sooner, and not all callers at once.
		return pause + rand.N(pause/4+1), true
	default:
		return 0, false
	}
}

// sleep says whether the time passed before the context ended.
func sleep(ctx context.Context, pause time.Duration) bool {
	if pause <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
