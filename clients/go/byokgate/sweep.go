package byokgate

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"strconv"
	"time"
)

// Health is what is known of a running workspace's credential.
type Health string

const (
	// Healthy: the workspace would start. Its credential was shown to be alive, or it needs none.
	Healthy Health = "healthy"
	// Dead: its credential was refused twice, some time apart.
	Dead Health = "dead"
	// Missing: there is no usable credential, seen twice, some time apart.
	Missing Health = "missing"
	// Unverifiable: there is a credential, and no way to check it.
	Unverifiable Health = "unverifiable"
	// Unknown: nothing is known yet. An inconclusive result never overwrites a known one.
	Unknown Health = ""
)

// Change says that the state of a running workspace's credential changed. It stops nothing: the platform decides what to do.
type Change struct {
	// Spec is the workspace.
	Spec Spec
	// From and To are the old and the new state.
	From, To Health
	// Code is why, for Dead and Missing, and for Unverifiable if byok-gate would refuse a start for it.
	Code Code
	// Since is when it was first seen.
	Since time.Time
	// DecisionID and Fingerprint are the last decision's. The fingerprint is empty unless byok-gate is configured to give one.
	DecisionID, Fingerprint string
}

// SweepRecord is a sweep's record of a workspace. It holds no secret. Store it unchanged, for instance as JSON.
type SweepRecord struct {
	// Health is what was reported last.
	Health Health `json:"health"`
	// Suspect is a new state that is not confirmed yet, Seen when it was first seen, and Code why. Empty if there is none.
	Suspect Health    `json:"suspect,omitempty"`
	Code    Code      `json:"code,omitempty"`
	Seen    time.Time `json:"seen"`
}

// SweepStore keeps a sweep's records, so that a restart neither loses nor repeats reports. [NewSweepMemory] is one that does not outlive its process.
type SweepStore interface {
	// Load returns a workspace's record, or the zero one if there is none.
	Load(ctx context.Context, workspaceID string) (SweepRecord, error)
	Save(ctx context.Context, workspaceID string, record SweepRecord) error
}

// SweepOptions are a sweep's. The zero value checks each credential every ten minutes. An invalid number (below zero, not finite, a time below a
// millisecond) ends the sweep before it starts, with an error that names it.
type SweepOptions struct {
	// Period is how long one round takes. Zero: ten minutes. A round that takes longer delays the next: there is never more than one.
	Period time.Duration
	// ConfirmAfter is when a first refusal is checked again. Zero: 20 seconds, or half of the period if that is less. It should be longer than byok-gate
	// caches a refusal (10 seconds unless configured otherwise).
	ConfirmAfter time.Duration
	// Lookups is how many workspaces' credentials are looked up a second, from 0.001 to a million. Zero: 50.
	Lookups float64
	// Concurrent is how many calls are in flight at a time, 1,024 at most. Zero: 8.
	Concurrent int
	// Store is where records are kept. Nil: in memory.
	Store SweepStore
	// OnState is called when the sweep stops learning anything, and when it learns again: once for each change. Nil: the loop's errors and the log
	// report the former, the log reports the latter.
	OnState func(SweepState)
}

// SweepState says whether a sweep learns anything.
type SweepState struct {
	// Reason is why it learns nothing. Empty: it does learn.
	Reason Reason
	// Err is the same as an [*Undecided], whose OperatorHint says what to check. Nil: it does learn.
	Err error
	// Since is when this began.
	Since time.Time
}

const (
	defaultSweepPeriod   = 10 * time.Minute
	defaultConfirmAfter  = 20 * time.Second
	defaultSweepLookups  = 50
	defaultSweepAtOnce   = 8
	maxSweepAtOnce       = 1024
	minSweepLookups      = 0.001
	maxSweepLookups      = 1e6
	maxSweepWorkspaces   = 1 << 20
	sweepTimePerQuestion = 10 * time.Second
	// sweepAwayPause is when a round that found byok-gate down is restarted, or its whole period if that is less.
	sweepAwayPause = 15 * time.Second
	// sweepPatience is how long byok-gate may be down before that is reported, or one period if that is less: a restart is not reported.
	sweepPatience = 30 * time.Second
)

// Sweep checks the running workspaces periodically, since a key that dies after provision would otherwise only be noticed at the next restart. It
// yields changes, and errors for what it could not do, until the context ends or the loop is left. One sweep of a fleet at a time is enough; two are
// harmless but do twice the work.
//
// Running lists the running workspaces, anew for each round. The whole list is read before anything else, so it may hold a cursor open. Each
// workspace needs a unique WorkspaceID, the key of its record: those without one, or with one that was listed before, are skipped, and an error says
// so. Workspaces with the same credentials share one call per round, and those that share a credential follow each other, so that the provider is
// called once: a round checks each credential at most once, and once more if it was refused. All is spread over the period. No round starts before
// the last is over, and except for that second check no credential is checked again before a period has passed. Credentials are held only while their
// call is in flight.
//
// A change is reported at least once: its record is saved after the loop's body returned. A process that is killed in between reports that one change
// again; an unconfirmed state is kept, too. [Dead] and [Missing] are reported after two checks at least ConfirmAfter apart, the second of the
// workspace itself; a return to [Healthy], and a change to [Unverifiable], at once. A workspace that is seen for the first time is reported unless it
// is healthy. Inconclusive results are ignored: a provider that fails, limits the rate or does not answer, a byok-gate that is down, a secret store
// that cannot be read.
//
// A sweep that learns nothing reports that, since no report would look like health: at once if the platform is misconfigured (a wrong token,
// certificate or port), after half a minute (a period, if that is less) if byok-gate is down, and after two rounds in which no credentials could be
// read. The error is an [*Undecided], comes once, and not again until that has changed. OnState and the log also report it, and its end; the end of a
// misconfiguration is reported once a whole period passed without it. [Client.SweepCounts] has the numbers.
//
// Any other error comes with a zero Change, is not an [*Undecided], and says what could not be done (listing, loading, saving, one workspace's own
// fault); the sweep goes on. Closing the client ends it.
func (c *Client) Sweep(
	ctx context.Context, running func(context.Context) iter.Seq2[Spec, error], options SweepOptions,
) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		if yield == nil {
			return
		}
		if c.unusable() {
			yield(Change{}, undecided(nil, ReasonClosed, errClosed))
			return
		}
		if running == nil {
			yield(Change{}, misused(nil, "Sweep", errNoList))
			return
		}
		if err := options.check(); err != nil {
			yield(Change{}, misused(nil, "SweepOptions", err))
			return
		}
		quiet := *c
		quiet.quiet = true
		s := &sweep{
			options: options.orDefaults(), running: running, yield: yield, ask: quiet.look, gather: quiet.gather, counts: &c.sweeps,
			log: c.logSafely,
		}
		_, _ = rand.Read(s.key[:]) // never fails
		ctx, cancel := context.WithCancel(orBackground(ctx))
		defer cancel()
		s.run(ctx)
	}
}

var errNoList = errors.New("nothing lists the running workspaces")

// check reports invalid options.
func (o SweepOptions) check() error {
	var faults []error
	duration := func(name string, given time.Duration) {
		if given < 0 {
			faults = append(faults, fmt.Errorf("%s: %w", name, notNegative(given)))
		} else if given > 0 && given < shortestTimeout {
			faults = append(faults, fmt.Errorf("%s: %w", name, checkTimeout(given)))
		}
	}
	duration("Period", o.Period)
	duration("ConfirmAfter", o.ConfirmAfter)
	// Written so that NaN fails.
	if inRange := o.Lookups >= minSweepLookups && o.Lookups <= maxSweepLookups; !inRange && o.Lookups != 0 {
		faults = append(faults, fmt.Errorf("%s: %v is not from %v to %v a second; leave it out for the default", "Lookups", o.Lookups, minSweepLookups, maxSweepLookups))
	}
	switch {
	case o.Concurrent < 0:
		faults = append(faults, fmt.Errorf("%s: %w", "Concurrent", notNegative(o.Concurrent)))
	case o.Concurrent > maxSweepAtOnce:
		faults = append(faults, fmt.Errorf("%s: %d is above %d", "Concurrent", o.Concurrent, maxSweepAtOnce))
	}
	return errors.Join(faults...)
}

func (o SweepOptions) orDefaults() SweepOptions {
	if o.Period == 0 {
		o.Period = defaultSweepPeriod
	}
	if o.ConfirmAfter == 0 {
		o.ConfirmAfter = min(defaultConfirmAfter, o.Period/2)
	}
	if o.Lookups == 0 {
		o.Lookups = defaultSweepLookups
	}
	if o.Concurrent == 0 {
		o.Concurrent = defaultSweepAtOnce
	}
	return o
}

// sighting is the result of one check.
type sighting struct {
	health      Health
	code        Code
	decisionID  string
	fingerprint string
	// refusal is why there was no decision. Nil if there was one, or if the check was cancelled.
	refusal *Undecided
	decided bool
}

// sweep is a running sweep. Except for calls, everything happens on the caller's goroutine.
type sweep struct {
	options SweepOptions
	running func(context.Context) iter.Seq2[Spec, error]
	yield   func(Change, error) bool
	ask     func(context.Context, Spec) sighting
	gather  func(context.Context, *Spec) (*wallet, error)
	log     func(ctx context.Context, level slog.Level, message string, attributes ...slog.Attr)
	counts  *sweepCounts
	// key makes digests useless outside of this sweep.
	key [32]byte

	due  []task
	came chan outcome
	busy int
	// open are the round's calls without an answer.
	open int
	left bool
	// memory is the store of a sweep without one.
	memory *SweepMemory
	// asked is when a group or a credential was last checked.
	asked map[[32]byte]time.Time
	// confirming are the workspaces for which a second check is due or in flight.
	confirming map[string]bool
	// faulted are the workspaces whose own fault was reported, and the fault.
	faulted map[string]Reason
	sight   sight
}

// group are workspaces that share one call.
type group struct {
	specs []Spec
	// digest is of the call, values of each credential in it.
	digest [32]byte
	values [][32]byte
}

// about identifies the same check: by its credentials, or by itself if it has none.
func (g *group) about() [][32]byte {
	if len(g.values) == 0 {
		return [][32]byte{g.digest}
	}
	return g.values
}

// task is a scheduled call.
type task struct {
	at    time.Time
	specs []Spec
	about [][32]byte
	// confirm: a second check, of this workspace itself.
	confirm bool
}

type outcome struct {
	task
	sighting
}

func (s *sweep) run(ctx context.Context) {
	s.came = make(chan outcome, s.options.Concurrent)
	s.confirming, s.faulted, s.asked = map[string]bool{}, map[string]Reason{}, map[[32]byte]time.Time{}
	if s.options.Store == nil {
		s.memory = NewSweepMemory()
		s.options.Store = s.memory
	}
	if s.counts == nil {
		s.counts = &sweepCounts{}
	}
	next := time.Now()
	for !s.left && ctx.Err() == nil {
		switch now := time.Now(); {
		case s.open > 0:
			// The round takes longer than its period: add nothing to it.
			s.step(ctx, time.Time{})
		case now.Before(next):
			s.step(ctx, next)
		default:
			pause := s.options.Period
			if !s.plan(ctx, now) {
				pause = min(pause, sweepAwayPause)
				now = time.Now()
			}
			next = now.Add(pause)
		}
	}
	// Calls in flight end with the context, and are ignored: there is room for all answers.
}

// step waits for the first of: a task's time, an answer, and that moment unless it is zero.
func (s *sweep) step(ctx context.Context, until time.Time) {
	if len(s.due) > 0 && s.busy < s.options.Concurrent && (until.IsZero() || s.due[0].at.Before(until)) {
		until = s.due[0].at
	}
	var alarm <-chan time.Time
	if !until.IsZero() {
		timer := time.NewTimer(time.Until(until))
		defer timer.Stop()
		alarm = timer.C
	}
	select {
	case <-ctx.Done():
	case came := <-s.came:
		s.busy--
		s.take(ctx, came)
	case <-alarm:
		at := time.Now()
		if len(s.due) == 0 || s.busy >= s.options.Concurrent || s.due[0].at.After(at) {
			return
		}
		now := s.due[0]
		s.due = s.due[1:]
		s.busy++
		for _, one := range now.about {
			s.asked[one] = at
		}
		s.counts.add(func(seen *SweepCounts) { seen.Questions++ })
		go func() {
			looked := outcome{task: now}
			defer func() { s.came <- looked }()
			looked.sighting = s.ask(ctx, now.specs[0])
		}()
	}
}

func (s *sweep) later(tasks ...task) {
	s.due = append(s.due, tasks...)
	slices.SortStableFunc(s.due, func(a, b task) int { return a.at.Compare(b.at) })
}

// confirm checks one workspace itself, once.
func (s *sweep) confirm(spec Spec, at time.Time) {
	if !s.confirming[spec.WorkspaceID] {
		s.confirming[spec.WorkspaceID] = true
		s.later(task{at: at, specs: []Spec{spec}, confirm: true})
	}
}

func (s *sweep) complain(what string, err error) {
	s.counts.add(func(seen *SweepCounts) { seen.Faults++ })
	s.say(fmt.Errorf("byokgate: Sweep: %s: %w", what, err))
}

func (s *sweep) say(err error) {
	if !s.left && !s.yield(Change{}, err) {
		s.left = true
	}
}

// === A round ===

// list returns the running workspaces, each once. Whole: none is missing.
func (s *sweep) list(ctx context.Context) (specs []Spec, whole bool) {
	const what = "listing the running workspaces"
	var fault error
	var unnamed, twice []Spec
	known := map[string]bool{}
	listed := 0
	hook(func() {
		all := s.running(ctx)
		if all == nil {
			fault = errNoList
			return
		}
		for spec, err := range all {
			if err != nil {
				fault = err
				return
			}
			if listed++; listed > maxSweepWorkspaces {
				fault = fmt.Errorf("there are more than %d", maxSweepWorkspaces)
				return
			}
			switch {
			case spec.WorkspaceID == "":
				unnamed = append(unnamed, spec)
			case known[spec.WorkspaceID]:
				twice = append(twice, spec)
			default:
				known[spec.WorkspaceID] = true
				specs = append(specs, spec)
			}
		}
	}, func(thrown any) { fault = panicked("the listing", thrown) })
	s.counts.add(func(seen *SweepCounts) {
		seen.Workspaces += uint64(len(specs))
		seen.Skipped += uint64(len(unnamed) + len(twice))
	})
	if ctx.Err() != nil {
		return nil, false
	}
	if fault != nil {
		s.complain(what, fault)
	}
	if len(unnamed) > 0 {
		first := unnamed[0]
		s.complain(what, fmt.Errorf("%d without a WorkspaceID are skipped, since records are kept by it (the first: runtime %q, model %q, organization %q)",
			len(unnamed), first.Runtime, first.Model, first.OrganizationID))
	}
	if len(twice) > 0 {
		first := twice[0]
		s.complain(what, fmt.Errorf("%d with the WorkspaceID of another are skipped, since records are kept by it (the first: %q, organization %q)",
			len(twice), first.WorkspaceID, first.OrganizationID))
	}
	if fault != nil {
		return specs, false
	}
	for id := range s.faulted {
		if !known[id] {
			delete(s.faulted, id)
		}
	}
	if s.memory != nil {
		s.memory.keep(known)
	}
	return specs, true
}

// plan lists the running workspaces, finds out which share a call or a credential, and spreads the calls over the rest of the period. While it looks
// up credentials it goes on with due tasks. False: byok-gate is down, and there is no round.
func (s *sweep) plan(ctx context.Context, began time.Time) bool {
	specs, _ := s.list(ctx)
	groups := map[[32]byte]*group{}
	pace := time.Duration(float64(time.Second) / s.options.Lookups)
	turn := time.Now()
	gathered := 0
	var unreadable error
	for _, spec := range specs {
		for turn = turn.Add(pace); !s.left && ctx.Err() == nil && time.Now().Before(turn); {
			s.step(ctx, turn)
		}
		if s.left || ctx.Err() != nil {
			return true
		}
		held, err := s.gather(ctx, &spec)
		var refusal *Undecided
		switch {
		case errors.As(err, &refusal):
			if s.failed(ctx, spec, refusal) {
				return false
			}
			continue
		case err != nil:
			s.counts.add(func(seen *SweepCounts) { seen.Unreadable++ })
			unreadable = err
			continue
		}
		gathered++
		made := s.digest(&spec, held)
		if known := groups[made.digest]; known != nil {
			known.specs = append(known.specs, spec)
			continue
		}
		groups[made.digest] = made
	}
	s.counts.add(func(seen *SweepCounts) { seen.Rounds++ })
	if gathered == 0 && unreadable != nil {
		s.blind(ctx, undecided(nil, ReasonLookupFailed, unreadable))
	}
	s.spread(clustered(groups), began)
	return true
}

// spread makes tasks of a round's calls. The last has time to be answered within the period, and none comes sooner than a period after its previous
// check, as could happen after a delayed round.
func (s *sweep) spread(clusters [][]*group, began time.Time) {
	gap := max(0, s.options.Period-time.Since(began)) / time.Duration(len(clusters)+1)
	planned := time.Now()
	asked := map[[32]byte]time.Time{}
	var tasks []task
	for _, cluster := range clusters {
		at := planned
		for _, one := range cluster {
			for _, about := range one.about() {
				if last, known := s.asked[about]; known {
					asked[about] = last
					if soonest := last.Add(s.options.Period); soonest.After(at) {
						at = soonest
					}
				}
			}
		}
		for _, one := range cluster {
			tasks = append(tasks, task{at: at, specs: one.specs, about: one.about()})
		}
		planned = planned.Add(gap)
	}
	// Workspaces that no longer run are dropped.
	s.asked = asked
	s.open += len(tasks)
	s.later(tasks...)
}

// digest identifies calls and credentials without keeping them.
func (s *sweep) digest(spec *Spec, held *wallet) *group {
	question := hmac.New(sha256.New, s.key[:])
	part := func(text string) { fmt.Fprintf(question, "%d:%s", len(text), text) }
	for _, text := range []string{spec.Runtime, spec.Model, strconv.Itoa(int(spec.OperatorOverride)), strconv.Itoa(int(spec.PlatformProxy))} {
		part(text)
	}
	part(strconv.Itoa(len(spec.TenantBaseURLEnv)))
	for _, name := range slices.Sorted(slices.Values(spec.TenantBaseURLEnv)) {
		part(name)
	}
	made := &group{specs: []Spec{*spec}}
	for _, credential := range held.credentials() {
		part(credential.GetEnvName())
		part(credential.GetScope().String())
		part(strconv.FormatBool(credential.GetUnreadable()))
		part(credential.GetValue())
		if credential.GetValue() != "" {
			value := hmac.New(sha256.New, s.key[:])
			value.Write([]byte(credential.GetValue()))
			made.values = append(made.values, [32]byte(value.Sum(nil)))
		}
	}
	made.digest = [32]byte(question.Sum(nil))
	return made
}

// clustered puts groups that share a credential next to each other, in an order that stays the same from round to round.
func clustered(groups map[[32]byte]*group) [][]*group {
	// Union-find: each value and each group points to its parent.
	parent := map[[32]byte][32]byte{}
	root := func(of [32]byte) [32]byte {
		for {
			up, found := parent[of]
			if !found || up == of {
				return of
			}
			if over, found := parent[up]; found {
				// Path compression.
				parent[of] = over
			}
			of = up
		}
	}
	for digest, one := range groups {
		for _, value := range one.values {
			parent[root(value)] = root(digest)
		}
	}
	together := map[[32]byte][]*group{}
	for digest, one := range groups {
		at := root(digest)
		together[at] = append(together[at], one)
	}
	first := func(cluster []*group) [32]byte { return cluster[0].digest }
	clusters := make([][]*group, 0, len(together))
	for _, cluster := range together {
		slices.SortFunc(cluster, func(a, b *group) int { return slices.Compare(a.digest[:], b.digest[:]) })
		clusters = append(clusters, cluster)
	}
	slices.SortFunc(clusters, func(a, b []*group) int {
		one, other := first(a), first(b)
		return slices.Compare(one[:], other[:])
	})
	return clusters
}

// gather looks up what matters to a workspace, without a call.
func (c *Client) gather(ctx context.Context, spec *Spec) (*wallet, error) {
	ctx, cancel := context.WithTimeout(ctx, sweepTimePerQuestion)
	defer cancel()
	held := &wallet{}
	names, _, refusal := c.prepare(c.lanes.marked(ctx, spec), spec)
	if refusal != nil {
		return nil, refusal
	}
	deadline, _ := ctx.Deadline()
	c.lookups.fetch(ctx, deadline, held, spec.Lookup, names)
	return held, held.failure()
}

// look checks one workspace.
func (c *Client) look(ctx context.Context, spec Spec) sighting {
	allowed, refusal := c.decide(ctx, &Request{Checkpoint: Audit, Spec: spec, Timeout: sweepTimePerQuestion})
	switch refusal := refusal.(type) {
	case nil:
		details := allowed.Details()
		seen := sighting{decided: true, decisionID: allowed.DecisionID(), fingerprint: details.Fingerprint}
		switch details.Verdict {
		case VerdictValid, "":
			// Stale, or on report only: the result is old, or bad.
			if seen.health = Healthy; allowed.Unverified() {
				seen.health = Unknown
			}
		case VerdictNoServerSurface, VerdictNotCalibrated, VerdictProbeDisabled:
			seen.health = Unverifiable
		}
		return seen
	case *Denied:
		seen := sighting{decided: true, code: refusal.Code(), decisionID: refusal.DecisionID(), fingerprint: refusal.Details().Fingerprint}
		switch {
		case refusal.Retryable():
		case seen.code == InvalidBYOKCredential, seen.code == MalformedBYOKCredential, seen.code == ShadowedBYOKCredential,
			seen.code == WrongCredentialName:
			seen.health = Dead
		case seen.code == MissingBYOKCredential:
			seen.health = Missing
		case seen.code == BYOKNotVerifiable:
			seen.health = Unverifiable
		}
		return seen
	default:
		undecided, _ := refusal.(*Undecided)
		return sighting{refusal: undecided}
	}
}

// === Results ===

// take acts on a group's result: it applies to each of its workspaces.
func (s *sweep) take(ctx context.Context, came outcome) {
	if came.confirm {
		delete(s.confirming, came.specs[0].WorkspaceID)
	} else {
		s.open--
	}
	if ctx.Err() != nil {
		return
	}
	if came.refusal != nil {
		s.failed(ctx, came.specs[0], came.refusal)
		if others := came.specs[1:]; came.refusal.Reason().aboutTheRequest() && len(others) > 0 {
			// A workspace's own fault says nothing about others with the same credentials.
			s.open++
			s.later(task{at: time.Now(), specs: others, about: came.about})
		}
		return
	}
	if came.decided {
		s.counts.add(func(seen *SweepCounts) {
			if seen.Seen == nil {
				seen.Seen = map[Health]uint64{}
			}
			seen.Seen[came.health]++
		})
		s.sees(ctx)
		delete(s.faulted, came.specs[0].WorkspaceID)
	}
	if came.health == Unknown {
		return
	}
	for _, spec := range came.specs {
		if s.left || ctx.Err() != nil {
			return
		}
		record, err := s.load(ctx, spec)
		if err != nil {
			s.complain("loading the record of "+strconv.Quote(spec.WorkspaceID), err)
			continue
		}
		s.note(ctx, spec, record, came)
	}
}

func (s *sweep) load(ctx context.Context, spec Spec) (record SweepRecord, err error) {
	hook(func() { record, err = s.options.Store.Load(ctx, spec.WorkspaceID) }, func(thrown any) { err = panicked("the store", thrown) })
	return record, err
}

// note compares a workspace's result with its record.
func (s *sweep) note(ctx context.Context, spec Spec, record SweepRecord, came outcome) {
	now := time.Now()
	bad := came.health == Dead || came.health == Missing
	switch {
	case came.health == record.Health:
		// Unchanged. An unconfirmed state is dropped.
		if record.Suspect != Unknown {
			record.Suspect, record.Seen = Unknown, now
			s.save(ctx, spec, record)
		}
	case !bad:
		// A healthy workspace that is seen for the first time is no change.
		first := record.Health == Unknown && came.health == Healthy
		change := Change{From: record.Health, To: came.health, Code: came.code, Since: now}
		record = SweepRecord{Health: came.health, Seen: now}
		if !first && !s.report(spec, change, came) {
			return
		}
		s.save(ctx, spec, record)
	case record.Suspect != came.health:
		// For the first time: checked again before it is reported.
		record.Suspect, record.Code, record.Seen = came.health, came.code, now
		if s.save(ctx, spec, record) {
			s.confirm(spec, now.Add(s.options.ConfirmAfter))
		}
	case now.Sub(record.Seen) < s.options.ConfirmAfter:
		// Too soon for a second check.
		s.confirm(spec, record.Seen.Add(s.options.ConfirmAfter))
	case !came.confirm:
		// Suspected before, by a sweep that ended or learnt nothing: this workspace itself is checked now.
		s.confirm(spec, now)
	default:
		change := Change{From: record.Health, To: came.health, Code: came.code, Since: record.Seen}
		record = SweepRecord{Health: came.health, Code: came.code, Seen: record.Seen}
		if s.report(spec, change, came) {
			s.save(ctx, spec, record)
		}
	}
}

// report says whether the change was delivered: a loop that ends with it has it, and a body that ends the goroutine does not return.
func (s *sweep) report(spec Spec, change Change, came outcome) bool {
	change.Spec, change.DecisionID, change.Fingerprint = spec, came.decisionID, came.fingerprint
	s.counts.add(func(seen *SweepCounts) { seen.Changes++ })
	if !s.yield(change, nil) {
		s.left = true
	}
	return true
}

func (s *sweep) save(ctx context.Context, spec Spec, record SweepRecord) bool {
	var err error
	hook(func() { err = s.options.Store.Save(ctx, spec.WorkspaceID, record) }, func(thrown any) { err = panicked("the store", thrown) })
	if err != nil {
		s.complain("saving the record of "+strconv.Quote(spec.WorkspaceID), err)
		return false
	}
	return true
}
