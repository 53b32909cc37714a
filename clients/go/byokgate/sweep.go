package byokgate

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"time"
)

// Health is what is known of a running workspace's credential.
type Health string

const (
	// Healthy: the workspace would start. Its credential was shown to be alive, or it needs none.
	Healthy Health = "healthy"
	// Dead: its credential was refused, twice, some time apart.
	Dead Health = "dead"
	// Missing: there is no credential that would do, seen twice, some time apart.
	Missing Health = "missing"
	// Unverifiable: there is a credential, and nothing that could be asked about it.
	Unverifiable Health = "unverifiable"
	// Unknown: nothing is known yet. What could not be found out never overwrites what is known.
	Unknown Health = ""
)

// Change says that a running workspace's credential is not what it was. It stops nothing: what is to be done is the platform's to decide.
type Change struct {
	// Spec is the workspace.
	Spec Spec
	// From and To are what was known and what is.
	From, To Health
	// Code is why, of Dead and Missing.
	Code Code
	// Since is when it was seen first.
	Since time.Time
	// DecisionID and Fingerprint are the last decision's. The fingerprint is empty unless byok-gate is configured to give one.
	DecisionID, Fingerprint string
}

// SweepRecord is what a sweep remembers of a workspace. It holds no secret. Store it as it is, for instance as JSON.
type SweepRecord struct {
	// Health is what was reported last.
	Health Health `json:"health"`
	// Suspect is what was seen since, Seen when first, and Code why. Empty if nothing was.
	Suspect Health    `json:"suspect,omitempty"`
	Code    Code      `json:"code,omitempty"`
	Seen    time.Time `json:"seen"`
}

// SweepStore keeps what a sweep remembers, so that a restart loses and repeats nothing that matters. [NewSweepMemory] is one that does not
// outlive its process.
type SweepStore interface {
	// Load gives a workspace's record, or the zero one if there is none.
	Load(ctx context.Context, workspaceID string) (SweepRecord, error)
	Save(ctx context.Context, workspaceID string, record SweepRecord) error
}

// SweepOptions are a sweep's. The zero value looks at each credential every ten minutes.
type SweepOptions struct {
	// Period is how long one round takes. Zero: ten minutes.
	Period time.Duration
	// ConfirmAfter is when a first refusal is looked at again. Zero: 20 seconds, or half of the period if that is less. It should be longer
	// than byok-gate remembers a refusal (10 seconds unless configured otherwise).
	ConfirmAfter time.Duration
	// Lookups is how many workspaces' credentials are looked up a second. Zero: 50.
	Lookups float64
	// Concurrent is how many questions are under way at a time. Zero: 8.
	Concurrent int
	// Store is where records are kept. Nil: in memory.
	Store SweepStore
}

const (
	defaultSweepPeriod   = 10 * time.Minute
	defaultConfirmAfter  = 20 * time.Second
	defaultSweepLookups  = 50
	defaultSweepAtOnce   = 8
	maxSweepWorkspaces   = 1 << 20
	sweepTimePerQuestion = 10 * time.Second
)

// Sweep looks at the running workspaces again and again, since a key that dies after provision would otherwise be found out at the next
// restart. It yields changes and nothing else, until the context ends or the loop is left. One sweep of a fleet at a time is enough; two do no
// harm but twice the work.
//
// Running lists the workspaces that run, anew for each round. Workspaces with the same credentials are asked about once in a round, and those
// that share a credential one right after the other, so that the provider is asked about it once: a round asks about each credential at most
// once, and once more where it was refused. All is spread over the period. Credentials are held while their question is under way, and not
// between.
//
// A change is reported at least once: its record is saved after the loop's body returned. Who is killed in between reports that one change
// again; what was seen once and not confirmed is kept, too. Reported are [Dead] and [Missing] after two looks at least ConfirmAfter apart, the
// second at the workspace itself; a return to [Healthy], and a turn to [Unverifiable], at once. A workspace that is seen for the first time is
// reported if it is not well. Nothing is made of what says nothing: a provider that fails, limits the rate or does not answer, a byok-gate that
// is away, a secret store that cannot be read.
//
// The error beside a zero Change says what could not be done (listing, loading, saving); the sweep goes on.
func (c *Client) Sweep(
	ctx context.Context, running func(context.Context) iter.Seq2[Spec, error], options SweepOptions,
) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		if c.unusable() {
			yield(Change{}, undecided(nil, ReasonClosed, errClosed))
			return
		}
		if running == nil {
			yield(Change{}, errors.New("byokgate: Sweep: nothing lists the running workspaces"))
			return
		}
		quiet := *c
		quiet.quiet = true
		s := &sweep{options: options.orDefaults(), running: running, yield: yield, ask: quiet.look, gather: quiet.gather}
		_, _ = rand.Read(s.key[:]) // never fails
		ctx, cancel := context.WithCancel(orBackground(ctx))
		defer cancel()
		s.run(ctx)
	}
}

func (o SweepOptions) orDefaults() SweepOptions {
	if o.Period <= 0 {
		o.Period = defaultSweepPeriod
	}
	if o.ConfirmAfter <= 0 {
		o.ConfirmAfter = min(defaultConfirmAfter, o.Period/2)
	}
	if o.Lookups <= 0 {
		o.Lookups = defaultSweepLookups
	}
	if o.Concurrent <= 0 {
		o.Concurrent = defaultSweepAtOnce
	}
	if o.Store == nil {
		o.Store = NewSweepMemory()
	}
	return o
}

// sighting is what one look came to.
type sighting struct {
	health      Health
	code        Code
	decisionID  string
	fingerprint string
}

// sweep is one under way. But for questions, all happens on the caller's goroutine.
type sweep struct {
	options SweepOptions
	running func(context.Context) iter.Seq2[Spec, error]
	yield   func(Change, error) bool
	ask     func(context.Context, Spec) sighting
	gather  func(context.Context, *Spec) (*wallet, error)
	// key makes digests worthless outside of this sweep.
	key [32]byte

	due  []task
	came chan outcome
	busy int
	left bool
}

// group are workspaces about which there is one question.
type group struct {
	specs []Spec
	// digest is of the question, values of each credential in it.
	digest [32]byte
	values [][32]byte
}

// task is a question at a time.
type task struct {
	at    time.Time
	specs []Spec
	// confirm: a second look, at this workspace itself.
	confirm bool
}

type outcome struct {
	task
	sighting
}

func (s *sweep) run(ctx context.Context) {
	s.came = make(chan outcome, s.options.Concurrent)
	next := time.Now()
	for !s.left && ctx.Err() == nil {
		if now := time.Now(); !now.Before(next) {
			s.plan(ctx, now)
			// Never before it is over: a round that takes longer than the period is not begun twice.
			next = now.Add(s.options.Period)
			continue
		}
		s.step(ctx, next)
	}
	// What is under way ends with the context, and is not acted on: there is room for all answers.
}

// step waits for whatever comes first: a task's time, an answer, the next round.
func (s *sweep) step(ctx context.Context, next time.Time) {
	until := next
	if len(s.due) > 0 && s.busy < s.options.Concurrent && s.due[0].at.Before(until) {
		until = s.due[0].at
	}
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case came := <-s.came:
		s.busy--
		s.take(ctx, came)
	case <-timer.C:
		if len(s.due) == 0 || s.busy >= s.options.Concurrent || s.due[0].at.After(time.Now()) {
			return
		}
		now := s.due[0]
		s.due = s.due[1:]
		s.busy++
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

func (s *sweep) complain(what string, err error) {
	if !s.left && !s.yield(Change{}, fmt.Errorf("byokgate: Sweep: %s: %w", what, err)) {
		s.left = true
	}
}

// === A round ===

// plan lists the running workspaces, finds out which share a question or a credential, and spreads the questions over what is left of the
// period. While it looks credentials up it goes on with what is due.
func (s *sweep) plan(ctx context.Context, began time.Time) {
	groups := map[[32]byte]*group{}
	pace := time.Duration(float64(time.Second) / s.options.Lookups)
	turn := time.Now()
	count := 0
	for spec, err := range s.running(ctx) {
		if err != nil {
			s.complain("listing the running workspaces", err)
			break
		}
		if count++; count > maxSweepWorkspaces {
			s.complain("listing the running workspaces", fmt.Errorf("there are more than %d", maxSweepWorkspaces))
			break
		}
		for turn = turn.Add(pace); !s.left && ctx.Err() == nil && time.Now().Before(turn); {
			s.step(ctx, turn)
		}
		if s.left || ctx.Err() != nil {
			return
		}
		held, err := s.gather(ctx, &spec)
		if err != nil {
			// Unreadable, or byok-gate is away: there is nothing to be seen in this round.
			continue
		}
		made := s.digest(&spec, held)
		if known := groups[made.digest]; known != nil {
			known.specs = append(known.specs, spec)
			continue
		}
		groups[made.digest] = made
	}
	clusters := clustered(groups)
	if len(clusters) == 0 {
		return
	}
	// The last question has time to be answered within the period.
	gap := max(0, s.options.Period-time.Since(began)) / time.Duration(len(clusters)+1)
	at := time.Now()
	var tasks []task
	for _, cluster := range clusters {
		for _, one := range cluster {
			tasks = append(tasks, task{at: at, specs: one.specs})
		}
		at = at.Add(gap)
	}
	s.later(tasks...)
}

// digest tells questions and credentials apart without keeping them.
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

// clustered brings groups together that share a credential, in an order that stays the same from round to round.
func clustered(groups map[[32]byte]*group) [][]*group {
	// A forest: each value and each group points to what it is one with.
	parent := map[[32]byte][32]byte{}
	root := func(of [32]byte) [32]byte {
		for {
			up, found := parent[of]
			if !found || up == of {
				return of
			}
			if over, found := parent[up]; found {
				// Shorter for the next one who comes this way.
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

// gather looks up what matters to a workspace, without a question.
func (c *Client) gather(ctx context.Context, spec *Spec) (*wallet, error) {
	ctx, cancel := context.WithTimeout(ctx, sweepTimePerQuestion)
	defer cancel()
	held := &wallet{}
	names, _, refusal := c.prepare(c.lanes.marked(ctx, spec), spec)
	if refusal != nil {
		return nil, refusal
	}
	c.lookups.fetch(ctx, held, spec.Lookup, names)
	return held, held.failure()
}

// look asks about one workspace.
func (c *Client) look(ctx context.Context, spec Spec) sighting {
	allowed, refusal := c.decide(ctx, &Request{Checkpoint: Audit, Spec: spec, Timeout: sweepTimePerQuestion})
	switch refusal := refusal.(type) {
	case nil:
		details := allowed.Details()
		seen := sighting{decisionID: allowed.DecisionID(), fingerprint: details.Fingerprint}
		switch details.Verdict {
		case VerdictValid, "":
			// Stale, or on report only: what is known is old, or bad.
			if seen.health = Healthy; allowed.Unverified() {
				seen.health = Unknown
			}
		case VerdictNoServerSurface, VerdictNotCalibrated, VerdictProbeDisabled:
			seen.health = Unverifiable
		}
		return seen
	case *Denied:
		seen := sighting{code: refusal.Code(), decisionID: refusal.DecisionID(), fingerprint: refusal.Details().Fingerprint}
		switch {
		case refusal.Retryable():
		case seen.code == InvalidBYOKCredential, seen.code == MalformedBYOKCredential, seen.code == ShadowedBYOKCredential,
			seen.code == WrongCredentialName:
			seen.health = Dead
		case seen.code == MissingBYOKCredential:
			seen.health = Missing
		}
		return seen
	default:
		return sighting{}
	}
}

// === What is made of it ===

// take acts on what was seen of a group: it is what was seen of each of its workspaces.
func (s *sweep) take(ctx context.Context, came outcome) {
	if came.health == Unknown {
		return
	}
	for _, spec := range came.specs {
		if s.left || ctx.Err() != nil {
			return
		}
		record, err := s.options.Store.Load(ctx, spec.WorkspaceID)
		if err != nil {
			s.complain("loading the record of "+strconv.Quote(spec.WorkspaceID), err)
			continue
		}
		s.note(ctx, spec, record, came)
	}
}

// note compares what was seen of one workspace with what is known of it.
func (s *sweep) note(ctx context.Context, spec Spec, record SweepRecord, came outcome) {
	now := time.Now()
	bad := came.health == Dead || came.health == Missing
	switch {
	case came.health == record.Health:
		// As it was. A doubt in between is gone.
		if record.Suspect != Unknown {
			record.Suspect, record.Seen = Unknown, now
			s.save(ctx, spec, record)
		}
	case !bad:
		first := record.Health == Unknown
		change := Change{From: record.Health, To: came.health, Since: now}
		record = SweepRecord{Health: came.health, Seen: now}
		if !first && !s.report(spec, change, came) {
			return
		}
		s.save(ctx, spec, record)
	case record.Suspect != came.health:
		// For the first time: looked at again before anything is said.
		record.Suspect, record.Code, record.Seen = came.health, came.code, now
		if s.save(ctx, spec, record) {
			s.later(task{at: now.Add(s.options.ConfirmAfter), specs: []Spec{spec}, confirm: true})
		}
	case now.Sub(record.Seen) < s.options.ConfirmAfter:
		// Too soon to be a second look.
		s.later(task{at: record.Seen.Add(s.options.ConfirmAfter), specs: []Spec{spec}, confirm: true})
	case !came.confirm:
		// Suspected before, by a sweep that was ended or could not find out: this workspace itself is looked at now.
		s.later(task{at: now, specs: []Spec{spec}, confirm: true})
	default:
		change := Change{From: record.Health, To: came.health, Code: came.code, Since: record.Seen}
		record = SweepRecord{Health: came.health, Code: came.code, Seen: record.Seen}
		if s.report(spec, change, came) {
			s.save(ctx, spec, record)
		}
	}
}

// report says whether the change was taken: a loop that is left with it has it, and a body that ends the goroutine does not come back.
func (s *sweep) report(spec Spec, change Change, came outcome) bool {
	change.Spec, change.DecisionID, change.Fingerprint = spec, came.decisionID, came.fingerprint
	if !s.yield(change, nil) {
		s.left = true
	}
	return true
}

func (s *sweep) save(ctx context.Context, spec Spec, record SweepRecord) bool {
	if err := s.options.Store.Save(ctx, spec.WorkspaceID, record); err != nil {
		s.complain("saving the record of "+strconv.Quote(spec.WorkspaceID), err)
		return false
	}
	return true
}
