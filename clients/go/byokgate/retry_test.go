//go:build go1.25

package byokgate

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A byok-gate that is back before a call's part for repeating is over is found by that call: the last try is at the end of that part, and not
// one pause before it.
func TestTheLastTryIsAtTheEndOfTheTimeForRepeating(t *testing.T) {
	for _, timeout := range []time.Duration{100 * time.Millisecond, time.Second, DefaultTimeout} {
		for range 20 {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), timeout)
				defer cancel()
				began, last, calls := time.Now(), time.Duration(0), 0
				_, repeated, err := retry(ctx, &core{}, func() (struct{}, error) {
					last = time.Since(began)
					calls++
					return struct{}{}, status.Error(codes.Unavailable, "away")
				})
				if status.Code(err) != codes.Unavailable || repeated != calls-1 {
					t.Errorf("%v: %v after %d calls, %d of them repetitions", timeout, err, calls, repeated)
				}
				if window := timeout / 2; last != window || calls > 12 {
					t.Errorf("%v: the last of %d tries was after %v of %v", timeout, calls, last, window)
				}
			})
		}
	}
}

// What names a time is not asked sooner: it is left where that is beyond the part for repeating.
func TestATimeThatWasNamedIsNotShortened(t *testing.T) {
	busy, err := status.New(codes.ResourceExhausted, "busy").WithDetails(retryIn(3 * time.Second))
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), DefaultTimeout)
		defer cancel()
		_, repeated, _ := retry(ctx, &core{}, func() (struct{}, error) { return struct{}{}, busy.Err() })
		if repeated != 0 {
			t.Errorf("asked again %d times, sooner than was said", repeated)
		}
	})
}

// Between two tries to connect there is less than the time for which the shortest usual call goes on trying.
func TestACallOutlastsThePauseBetweenTwoConnections(t *testing.T) {
	if longest := maxReconnectDelay * 12 / 10; 3*longest > time.Second {
		t.Errorf("connections are tried every %v, and a call with a timeout of 2 s goes on for one", longest)
	}
}
