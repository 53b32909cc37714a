package byokgate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
)

// A sweep reports only changes, so a sweep that learns nothing would look like a healthy fleet: its own state is reported separately.

// SweepCounts are the counts of all sweeps of a client, since it was made.
type SweepCounts struct {
	// Rounds whose workspaces were all listed and looked up.
	Rounds uint64
	// Workspaces is how often one was listed. Skipped of these had no id, or another one's.
	Workspaces, Skipped uint64
	// Unreadable is how often a workspace's credentials could not be read, so that no call was made.
	Unreadable uint64
	// Questions is how often byok-gate was called for a workspace, or for several that share their credentials.
	Questions uint64
	// Seen are the decisions, by health. Unknown: inconclusive, such as a provider's 429.
	Seen map[Health]uint64
	// Undecided is how often there was no decision, or no names to look up, by reason.
	Undecided map[Reason]uint64
	// Changes that were reported.
	Changes uint64
	// Faults are errors of listing, loading and saving, and of single workspaces.
	Faults uint64
}

// sweepCounts are shared by all sweeps of a client.
type sweepCounts struct {
	mu   sync.Mutex
	seen SweepCounts
}

func (c *sweepCounts) add(count func(*SweepCounts)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	count(&c.seen)
}

// SweepCounts returns the counts so far, of all sweeps of the client.
func (c *Client) SweepCounts() SweepCounts {
	if c == nil || c.core == nil {
		return SweepCounts{}
	}
	c.sweeps.mu.Lock()
	defer c.sweeps.mu.Unlock()
	seen := c.sweeps.seen
	seen.Seen, seen.Undecided = maps.Clone(seen.Seen), maps.Clone(seen.Undecided)
	return seen
}

// sight says whether a sweep learns anything.
type sight struct {
	// told is why not, as last reported. Empty: it does.
	told Reason
	// failing is since when all calls failed with errors that may pass.
	failing time.Time
	// miswired is when each of the other errors came last.
	miswired map[Reason]time.Time
}

// miswiredWithin says whether one of these, or of all, came within that time.
func (s *sight) miswiredWithin(period time.Duration, reasons ...Reason) bool {
	for reason, last := range s.miswired {
		if time.Since(last) < period && (len(reasons) == 0 || slices.Contains(reasons, reason)) {
			return true
		}
	}
	return false
}

// aboutTheRequest says that one workspace is at fault, not the connection to byok-gate.
func (r Reason) aboutTheRequest() bool {
	return r == ReasonBadRequest || r == ReasonLookupMissing || r == ReasonInvalidOption
}

// stopsARound says that every further call of the round would fail in the same way.
func (r Reason) stopsARound() bool {
	switch r {
	case ReasonUnreachable, ReasonTimedOut, ReasonDraining, ReasonOverloaded, ReasonClosed:
		return true
	}
	return r.miswired() && !r.aboutTheRequest()
}

// failed acts on a failed call for a workspace, and says whether others would fail, too.
func (s *sweep) failed(ctx context.Context, spec Spec, refusal *Undecided) bool {
	reason := refusal.Reason()
	if ctx.Err() != nil || reason == ReasonCanceled {
		return true
	}
	if !reason.aboutTheRequest() {
		s.blind(ctx, refusal)
		return reason.stopsARound()
	}
	s.count(reason)
	if s.faulted[spec.WorkspaceID] != reason {
		s.faulted[spec.WorkspaceID] = reason
		// Only its text: an Undecided would mean that the sweep learns nothing.
		s.complain(fmt.Sprintf("workspace %q cannot be checked", spec.WorkspaceID), errors.New(refusal.Error()))
	}
	return false
}

func (s *sweep) count(reason Reason) {
	s.counts.add(func(seen *SweepCounts) {
		if seen.Undecided == nil {
			seen.Undecided = map[Reason]uint64{}
		}
		seen.Undecided[reason]++
	})
}

func (s *sweep) patience() time.Duration { return min(s.options.Period, sweepPatience) }

// blind is for errors that keep a sweep from learning anything. They are reported once; those that may pass, only if they last.
func (s *sweep) blind(ctx context.Context, refusal *Undecided) {
	reason, now := refusal.Reason(), time.Now()
	s.count(reason)
	switch {
	case reason == ReasonClosed:
		s.say(refusal)
		s.left = true
		return
	case reason.miswired():
		recently := s.sight.miswiredWithin(s.options.Period, reason)
		if s.sight.miswired == nil {
			s.sight.miswired = map[Reason]time.Time{}
		}
		s.sight.failing, s.sight.miswired[reason] = time.Time{}, now
		// Each of several replicas may be misconfigured in its own way.
		if s.sight.told == reason || (recently && s.sight.told.miswired()) {
			return
		}
	default:
		if s.sight.failing.IsZero() {
			s.sight.failing = now
		}
		// One outage may have several reasons in turn.
		if now.Sub(s.sight.failing) < s.patience() || (s.sight.told != "" && !s.sight.told.miswired()) {
			return
		}
	}
	s.sight.told = reason
	err := fmt.Errorf("byokgate: Sweep learns nothing, and reports no change until it does: %w", refusal)
	s.tell(ctx, SweepState{Reason: reason, Err: err, Since: now}, slog.LevelError, "byok-gate: the sweep learns nothing",
		slog.String("why", string(reason)), slog.String("operator_hint", refusal.OperatorHint()), slog.String("error", refusal.Error()))
	s.say(err)
}

// sees is called for a decision.
func (s *sweep) sees(ctx context.Context) {
	now := time.Now()
	s.sight.failing = time.Time{}
	if s.sight.told == "" || (s.sight.told.miswired() && s.sight.miswiredWithin(s.options.Period)) {
		// Some of several replicas may be misconfigured: that is reported once, not alternating with its end. Over a period, most have their
		// turn.
		return
	}
	s.sight.told, s.sight.miswired = "", nil
	s.tell(ctx, SweepState{Since: now}, slog.LevelInfo, "byok-gate: the sweep learns again")
}

func (s *sweep) tell(ctx context.Context, state SweepState, level slog.Level, message string, attributes ...slog.Attr) {
	if s.log != nil {
		s.log(ctx, level, message, attributes...)
	}
	if s.options.OnState == nil {
		return
	}
	hook(func() { s.options.OnState(state) }, func(thrown any) {
		if s.log != nil {
			s.log(ctx, slog.LevelError, "byok-gate: a hook failed", slog.String("error", panicked("SweepOptions.OnState", thrown).Error()))
		}
	})
}
