package byokgate

import (
	"context"
	"fmt"
	"runtime"
)

// Foreign code (lookups, hooks, log handlers, dialers) may panic or end its goroutine. Neither may end the platform's process, block a
// caller forever, or count as an answer.

// apart runs foreign code in its own goroutine and delivers its result, exactly once.
func apart[T any](what string, run func() (T, error), deliver func(T, error)) {
	go func() {
		var result T
		// The result if run neither returns nor panics.
		err := fmt.Errorf("%s ended its goroutine", what)
		defer func() {
			if thrown := recover(); thrown != nil {
				var none T
				result, err = none, panicked(what, thrown)
			}
			deliver(result, err)
		}()
		result, err = run()
	}()
}

// within is apart for a caller that waits, at most until the context ends.
func within[T any](ctx context.Context, what string, run func() (T, error)) (T, error) {
	type answer struct {
		result T
		err    error
	}
	// Buffered: a late result has no reader, and its sender must be able to end.
	ended := make(chan answer, 1)
	apart(what, run, func(result T, err error) { ended <- answer{result, err} })
	select {
	case got := <-ended:
		return got.result, got.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// panicked does not repeat the panic's value, which may hold anything, except for runtime errors, which hold no secret.
func panicked(what string, thrown any) error {
	if fault, is := thrown.(runtime.Error); is {
		return fmt.Errorf("%s panicked: %s", what, fault.Error())
	}
	return fmt.Errorf("%s panicked with a %T", what, thrown)
}

// hook runs foreign code on the caller's own goroutine, and recovers from its panics.
func hook(run func(), failed func(thrown any)) {
	defer func() {
		if thrown := recover(); thrown != nil && failed != nil {
			failed(thrown)
		}
	}()
	run()
}
