package byokgate

import (
	"context"
	"fmt"
	"runtime"
)

// What is not ours (lookups, hooks, log handlers, dialers) may panic or end its goroutine. Neither may end the platform's process, leave a
// caller waiting for ever, or be taken for an answer.

// apart runs foreign code in a goroutine of its own and delivers what came of it, exactly once.
func apart[T any](what string, run func() (T, error), deliver func(T, error)) {
	go func() {
		var result T
		// What stands if run neither returns nor panics.
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

// within is apart for a caller that waits, until the context ends at the latest.
func within[T any](ctx context.Context, what string, run func() (T, error)) (T, error) {
	type answer struct {
		result T
		err    error
	}
	// Buffered: what outlives its time is not waited for, and must be able to end.
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

// panicked does not repeat what was thrown, which may hold anything; but for the runtime's own words, which hold no value.
func panicked(what string, thrown any) error {
	if fault, is := thrown.(runtime.Error); is {
		return fmt.Errorf("%s panicked: %s", what, fault.Error())
	}
	return fmt.Errorf("%s panicked with a %T", what, thrown)
}

// hook runs foreign code on the caller's own goroutine, and outlives its panics.
func hook(run func(), failed func(thrown any)) {
	defer func() {
		if thrown := recover(); thrown != nil && failed != nil {
			failed(thrown)
		}
	}()
	run()
}
