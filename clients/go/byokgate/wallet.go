package byokgate

import (
	"context"
	"errors"
	"slices"
	"time"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// wallet holds what was fetched for one request. It lives as long as the call.
type wallet struct {
	// asked are the names for which both scopes were looked through.
	asked map[string]bool
	found map[Scope]Found
	// failed are the scopes that could not be read.
	failed map[Scope]error
}

func newWallet() *wallet {
	return &wallet{asked: map[string]bool{}, found: map[Scope]Found{}, failed: map[Scope]error{}}
}

// has says whether all of these names were looked for.
func (w *wallet) has(names []string) bool {
	return !slices.ContainsFunc(names, func(name string) bool { return !w.asked[name] })
}

// fetch looks for those of the names that were not looked for yet, in both scopes at a time.
func (w *wallet) fetch(ctx context.Context, lookup Lookup, names []string) {
	var wanted []string
	for _, name := range names {
		if !w.asked[name] {
			w.asked[name] = true
			wanted = append(wanted, name)
		}
	}
	if len(wanted) == 0 {
		return
	}
	// The other half is for byok-gate: a decision on unreadable credentials says more than none in time.
	if deadline, limited := ctx.Deadline(); limited {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/2)
		defer cancel()
	}
	type answer struct {
		found Found
		err   error
	}
	answers := map[Scope]chan answer{}
	for _, scope := range scopes {
		// Buffered: a lookup that outlives its time is not waited for, and must be able to end.
		ended := make(chan answer, 1)
		answers[scope] = ended
		go func() {
			found, err := lookup(ctx, scope, slices.Clone(wanted))
			ended <- answer{found, err}
		}()
	}
	for _, scope := range scopes {
		got := answer{err: errors.New("no answer in time")}
		select {
		case got = <-answers[scope]:
		case <-ctx.Done():
			// One that came while another scope was waited for is in time.
			select {
			case got = <-answers[scope]:
			default:
			}
		}
		w.keep(scope, wanted, got.found, got.err)
	}
}

// keep takes what was asked for, and nothing else that a lookup may have come with.
func (w *wallet) keep(scope Scope, wanted []string, found Found, err error) {
	if err != nil {
		w.failed[scope] = err
		return
	}
	if w.found[scope] == nil {
		w.found[scope] = Found{}
	}
	for _, name := range wanted {
		if secret, exists := found[name]; exists {
			w.found[scope][name] = secret
		}
	}
}

// credentials are what was found, in a settled order.
func (w *wallet) credentials() []*byokgatev1.Credential {
	var list []*byokgatev1.Credential
	for _, scope := range scopes {
		found := w.found[scope]
		for _, name := range sortedKeys(found) {
			secret := found[name]
			list = append(list, &byokgatev1.Credential{
				EnvName: name, Scope: byokgatev1.Scope(scope), Value: secret.wire(), Unreadable: !secret.Readable(),
			})
		}
	}
	return list
}

func (w *wallet) unreadableScopes() []byokgatev1.Scope {
	var list []byokgatev1.Scope
	for _, scope := range scopes {
		if w.failed[scope] != nil {
			list = append(list, byokgatev1.Scope(scope))
		}
	}
	return list
}
