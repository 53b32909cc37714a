package byokgate

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// byok-gate says which names matter to a model, in ResolveProvider and in each decision, so that the client learns of a change from the
// decisions themselves. The names count, never the registry's revision: if two replicas behind one balancer have two registries, both are
// cached here, and the names of both are fetched.

const (
	// maxRemembered limits the cached models that no registry lists: their ids come from tenants.
	maxRemembered = 4096
	// maxSubjectBytes is more than byok-gate accepts as a runtime and a model.
	maxSubjectBytes = 128 + 512
	// generationAge is how long a registry that no reply names any more counts beside the current one.
	generationAge = time.Minute
)

// subject is what the names depend on, apart from the registry.
type subject struct{ runtime, model string }

func (s *Spec) subject() subject { return subject{s.Runtime, s.Model} }

// kept is a copy that outlives its request. Servers such as fasthttp reuse a request's memory for the next one.
func (s subject) kept() subject { return subject{strings.Clone(s.runtime), strings.Clone(s.model)} }

func (s subject) key() string { return s.runtime + "\x00" + s.model }

// generation holds the names of one registry.
type generation struct {
	revision string
	heard    time.Time
	// listed are models that the registry names, matched those that fit a pattern: a tenant can make up any number of these.
	listed, matched map[subject][]string
	menus           map[menuKey]menu
}

// memory holds the names of the last two registries, the latest first.
type memory struct {
	mu          sync.Mutex
	generations []*generation
}

func (g *generation) recall(about subject) ([]string, bool) {
	if names, found := g.listed[about]; found {
		return names, true
	}
	names, found := g.matched[about]
	return names, found
}

// recall returns all names that could matter in the current registries. The caller must not change the slice.
func (m *memory) recall(about subject) (names []string, found bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for place, generation := range m.generations {
		if place > 0 && m.generations[0].heard.Sub(generation.heard) > generationAge {
			continue
		}
		more, known := generation.recall(about)
		if !known {
			continue
		}
		if !found {
			names, found = more, true
			continue
		}
		for _, name := range more {
			if !slices.Contains(names, name) {
				// Clipped, so that the cache does not change.
				names = append(slices.Clip(names), name)
			}
		}
	}
	return names, found
}

// keep stores a registry's names, and says whether they are new.
func (m *memory) keep(about subject, revision string, names []string, matchedBy byokgatev1.MatchedBy) {
	if revision == "" || len(about.runtime)+len(about.model) > maxSubjectBytes {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	heard := m.hear(revision)
	if known, found := heard.recall(about); found && slices.Equal(known, names) {
		return
	}
	names, about = slices.Clone(names), about.kept()
	switch matchedBy {
	case byokgatev1.MatchedBy_MATCHED_BY_EXACT_MODEL, byokgatev1.MatchedBy_MATCHED_BY_EXACT_MODEL_AND_CREDENTIAL,
		byokgatev1.MatchedBy_MATCHED_BY_FIRST_DECLARED:
		bounded(heard.listed, about)
		heard.listed[about] = names
	case byokgatev1.MatchedBy_MATCHED_BY_PREFIX, byokgatev1.MatchedBy_MATCHED_BY_PREFIX_AND_CREDENTIAL:
		bounded(heard.matched, about)
		heard.matched[about] = names
	}
	// Anything else has no owner, and ids that tenants make up are not cached.
}

// bounded makes room for one more by dropping any other.
func bounded(in map[subject][]string, about subject) {
	if _, there := in[about]; there || len(in) < maxRemembered {
		return
	}
	for any := range in {
		delete(in, any)
		return
	}
}

// hear moves the generation of that revision to the front. Locked.
func (m *memory) hear(revision string) *generation {
	place := slices.IndexFunc(m.generations, func(known *generation) bool { return known.revision == revision })
	switch {
	case place == 0:
	case place > 0:
		m.generations[0], m.generations[place] = m.generations[place], m.generations[0]
	default:
		fresh := &generation{
			revision: revision, listed: map[subject][]string{}, matched: map[subject][]string{}, menus: map[menuKey]menu{},
		}
		m.generations = append([]*generation{fresh}, m.generations[:min(1, len(m.generations))]...)
	}
	m.generations[0].heard = time.Now()
	return m.generations[0]
}

func (m *memory) recallMenu(about menuKey) (Menu, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.generations) == 0 {
		return Menu{}, false
	}
	kept, found := m.generations[0].menus[about]
	if !found || time.Since(kept.at) > menuAge {
		return Menu{}, false
	}
	return kept.clone(), true
}

func (m *memory) keepMenu(about menuKey, revision string, made Menu) {
	m.mu.Lock()
	defer m.mu.Unlock()
	menus := m.hear(revision).menus
	if len(menus) >= maxMenus {
		clear(menus)
	}
	about.runtime = strings.Clone(about.runtime)
	menus[about] = menu{Menu: made.clone(), at: time.Now()}
}

// names returns the names that matter, from the cache or from byok-gate. Concurrent callers share one call.
func (c *Client) names(ctx context.Context, spec *Spec) ([]string, error) {
	about := spec.subject()
	if names, found := c.memory.recall(about); found {
		return names, nil
	}
	return c.learnNames(ctx, about)
}

func (c *Client) learnNames(ctx context.Context, about subject) ([]string, error) {
	// The call is shared, so it may outlive this caller.
	about = about.kept()
	flight := c.flights.DoChan(about.key(), func() (any, error) {
		if names, found := c.memory.recall(about); found {
			// Learnt between this caller's lookup and its turn.
			return names, nil
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.timeout)
		defer cancel()
		response, err := c.resolve(ctx, about.runtime, about.model)
		if err != nil {
			return nil, err
		}
		// byok-gate's configuration exempts a runtime, and no registry revision shows that.
		if resolution := response.GetResolution(); resolution.GetSource() == byokgatev1.ResolutionSource_RESOLUTION_SOURCE_DERIVED {
			c.memory.keep(about, response.GetRegistryRevision(), response.GetRelevantEnv(), resolution.GetMatchedBy())
		}
		return response.GetRelevantEnv(), nil
	})
	select {
	case came := <-flight:
		names, _ := came.Val.([]string)
		return names, came.Err
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// learn takes the names from a decision, and returns those that mattered to it and were not looked up.
func (c *Client) learn(spec *Spec, held *wallet, response *byokgatev1.DecideResponse) []string {
	if resolution := response.GetResolution(); resolution.GetSource() == byokgatev1.ResolutionSource_RESOLUTION_SOURCE_DERIVED {
		c.memory.keep(spec.subject(), response.GetRegistryRevision(), response.GetRelevantEnv(), resolution.GetMatchedBy())
	}
	return held.lacks(response.GetRelevantEnv(), response.GetDeny().GetMissingEnv())
}

// resolve asks who owns a model. An empty answer is an error.
func (c *Client) resolve(
	ctx context.Context, runtime, model string, atHand ...string,
) (*byokgatev1.ResolveProviderResponse, error) {
	response, _, err := retry(ctx, c.core, func() (*byokgatev1.ResolveProviderResponse, error) {
		return c.service.ResolveProvider(ctx, &byokgatev1.ResolveProviderRequest{
			Runtime: runtime, Model: model, CredentialNames: atHand,
		})
	})
	if err != nil {
		return nil, err
	}
	if response.GetRegistryRevision() == "" || response.GetResult() == nil {
		return nil, status.Error(codes.DataLoss, "an answer about the model's owner that says nothing")
	}
	return response, nil
}
