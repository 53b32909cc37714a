package byokgate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

const (
	// DefaultLookupTime is how long one lookup may take, independent of the call's own deadline.
	DefaultLookupTime = 2 * time.Second
	// DefaultLookups is how many lookups may run at a time, including those that timed out and never returned.
	DefaultLookups = 1024
)

// lookups limits running lookups. One that ignores its context keeps its slot until it returns: a secret store that hangs costs a limited
// number of goroutines, and then counts as unreadable at once.
type lookups struct {
	perCall time.Duration
	most    int64
	running atomic.Int64
}

var (
	errLookupLate  = errors.New("the lookup did not answer in time")
	errLookupEnded = errors.New("the lookup ended its goroutine")
	errLookupMany  = errors.New("too many lookups are under way: those before it have not come back")
)

// wallet holds the credentials fetched for one request. It lives as long as the call.
type wallet struct {
	// asked are the names that were looked up in both scopes. There are few.
	asked []string
	// found are credentials in the order of scopes and, in each, of names.
	found []*byokgatev1.Credential
	// failed are the scopes that could not be read, in the order of scopes.
	failed [len(scopes)]error
}

// lacks are the names that were not looked up.
func (w *wallet) lacks(names ...[]string) []string {
	var lacking []string
	for _, list := range names {
		for _, name := range list {
			if name != "" && !slices.Contains(w.asked, name) && !slices.Contains(lacking, name) {
				lacking = append(lacking, name)
			}
		}
	}
	return lacking
}

// answer is the result of one lookup.
type answer struct {
	found Found
	err   error
}

// search looks through both scopes at a time. It outlives its caller if a lookup does.
type search struct {
	lookups *lookups
	ctx     context.Context
	lookup  Lookup
	names   [len(scopes)][]string
	// taken are the scopes that have their goroutine, or get none.
	taken   [len(scopes)]atomic.Bool
	answers [len(scopes)]answer
	// ended has room for all: a late lookup has no reader, and must be able to end.
	ended chan int
	// few has room for the names of most requests.
	few [8]string
}

// start starts looking up these names in both scopes.
func (l *lookups) start(ctx context.Context, lookup Lookup, names []string) *search {
	s := &search{lookups: l, ctx: ctx, lookup: lookup, ended: make(chan int, len(scopes))}
	// Each lookup gets its own copy of the names, which it may change.
	copies := s.few[:0]
	running := 0
	for index := range scopes {
		begin := len(copies)
		copies = append(copies, names...)
		s.names[index] = copies[begin:len(copies):len(copies)]
		if l.running.Add(1) <= l.most {
			running++
			continue
		}
		l.running.Add(-1)
		s.taken[index].Store(true)
		s.answers[index].err = errLookupMany
		s.ended <- index
	}
	run := s.run
	for range running {
		go run()
	}
	return s
}

// run runs a scope's lookup in its goroutine; see guard.go.
func (s *search) run() {
	index := 0
	for !s.taken[index].CompareAndSwap(false, true) {
		index++
	}
	// The result if it neither returns nor panics.
	got := answer{err: errLookupEnded}
	defer func() {
		if thrown := recover(); thrown != nil {
			got.err = panicked("the lookup", thrown)
		}
		s.lookups.running.Add(-1)
		s.answers[index] = got
		s.ended <- index
	}()
	got.found, got.err = s.lookup(s.ctx, scopes[index], s.names[index])
}

// fetch looks up names in both scopes, in half of the remaining time: the other half is for byok-gate, since a decision with unreadable
// credentials says more than no decision.
func (l *lookups) fetch(ctx context.Context, deadline time.Time, held *wallet, lookup Lookup, names []string) {
	if len(names) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, min(l.perCall, time.Until(deadline)/2))
	defer cancel()
	got := unanswered()
	l.start(ctx, lookup, names).collect(ctx, &got, len(scopes))
	held.keep(names, got)
}

// unanswered is the result for both scopes until an answer comes.
func unanswered() (got [len(scopes)]answer) {
	for index := range got {
		got[index].err = errLookupLate
	}
	return got
}

// collect waits for this many answers, at most until the context ends, and says how many are missing.
func (s *search) collect(ctx context.Context, into *[len(scopes)]answer, missing int) int {
	for missing > 0 {
		select {
		case index := <-s.ended:
			into[index] = s.answers[index]
			missing--
			continue
		default:
		}
		select {
		case index := <-s.ended:
			into[index] = s.answers[index]
			missing--
		case <-ctx.Done():
			return missing
		}
	}
	return 0
}

// keep stores the requested names, and nothing else that a lookup returned.
func (w *wallet) keep(names []string, got [len(scopes)]answer) {
	if w.asked == nil {
		// Clipped, so that other holders' names do not change.
		w.asked = slices.Clip(names)
	} else {
		w.asked = append(w.asked, names...)
	}
	for index, scope := range scopes {
		if got[index].err != nil {
			w.failed[index] = got[index].err
			continue
		}
		for _, name := range names {
			if secret, exists := got[index].found[name]; exists {
				w.found = append(w.found, &byokgatev1.Credential{
					EnvName: name, Scope: byokgatev1.Scope(scope), Value: secret.wire(), Unreadable: !secret.Readable(),
				})
			}
		}
	}
}

// credentials are what was found, in a fixed order.
func (w *wallet) credentials() []*byokgatev1.Credential {
	slices.SortFunc(w.found, func(a, b *byokgatev1.Credential) int {
		if a.Scope != b.Scope {
			return int(a.Scope - b.Scope)
		}
		return strings.Compare(a.EnvName, b.EnvName)
	})
	return w.found
}

func (w *wallet) unreadableScopes() []byokgatev1.Scope {
	var list []byokgatev1.Scope
	for index, scope := range scopes {
		if w.failed[index] != nil {
			list = append(list, byokgatev1.Scope(scope))
		}
	}
	return list
}

// failure is what the log says of a scope that could not be read.
func (w *wallet) failure() error {
	var faults []error
	for index, scope := range scopes {
		if err := w.failed[index]; err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", scope, err))
		}
	}
	return errors.Join(faults...)
}
