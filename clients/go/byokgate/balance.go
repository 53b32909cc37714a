package byokgate

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/metadata"
)

// AffinityHeader marks a call with the lane of its organization, for a balancer to hash on: three lower-case hex digits, the first 12 bits
// of HMAC-SHA256 of the organization's id under the key of [ByOrganization]. A caller in another language that sends the same header to a
// balancer that hashes on it reaches the same replica.
const AffinityHeader = "byok-gate-affinity"

// Balancing says which of several replicas gets a call. Its zero value is the default of [WithBalancing].
type Balancing struct {
	kind balancingKind
	key  Secret
}

type balancingKind int

const (
	balanceByDefault balancingKind = iota
	balanceByOrganization
	balanceRoundRobin
	balanceOneConnection
)

// ByOrganization sends all calls of an organization to one replica, which probes its credentials, caches the results, and limits it. gRPC's
// ring_hash does it, by [AffinityHeader]; adding or removing a replica moves only that replica's share of the organizations. Callers with
// the same key choose the same replica; the key hides the organization from anyone who reads the header.
//
// It needs a gRPC that hashes on a header: link package affinity. Without it [New] returns an error.
func ByOrganization(key Secret) Balancing { return Balancing{balanceByOrganization, key} }

// RoundRobin sends calls to each replica in turn: an even load, but each replica calls the vendor itself.
func RoundRobin() Balancing { return Balancing{kind: balanceRoundRobin} }

// OneConnection sends all calls over one connection, to the first replica that answers.
func OneConnection() Balancing { return Balancing{kind: balanceOneConnection} }

// balanced is a checked Balancing.
type balanced struct {
	serviceConfig string
	lanes         lanes
}

const ringHash = "ring_hash_experimental"

var (
	ringHashConfig = []byte(`{"requestHashHeader":"` + AffinityHeader + `"}`)

	errNoRingHash = errors.New("ByOrganization needs a gRPC that hashes on a header, and this one (" + grpc.Version + ") does not; import " +
		"github.com/byok-gate/byok-gate/clients/go/affinity, and leave GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY alone")
)

// hashesOnHeader says whether this gRPC's ring_hash is linked in and uses the header: an older one silently ignores the setting, and all
// calls would go to one replica.
func hashesOnHeader() bool {
	builder := balancer.Get(ringHash)
	parser, is := builder.(balancer.ConfigParser)
	if !is {
		return false
	}
	parsed, err := parser.ParseConfig(ringHashConfig)
	if err != nil {
		return false
	}
	shown, err := json.Marshal(parsed)
	return err == nil && bytes.Contains(shown, []byte(AffinityHeader))
}

func serviceConfig(policy string, config []byte) string {
	return fmt.Sprintf(`{"loadBalancingConfig":[{%q:%s}]}`, policy, config)
}

// orDefault chooses by the target if nothing was chosen: many connections only if there may be many addresses.
func (b Balancing) orDefault(to target) (balanced, error) {
	kind := b.kind
	if kind == balanceByDefault {
		switch {
		case !to.several:
			kind = balanceOneConnection
		case hashesOnHeader():
			kind = balanceByOrganization
			// A key that all callers of one target know. Somebody who reads the header can guess names; WithBalancing takes a secret key.
			b.key = NewSecret("byok-gate affinity " + to.dial)
		default:
			kind = balanceRoundRobin
		}
	}
	switch kind {
	case balanceByOrganization:
		if !hashesOnHeader() {
			return balanced{}, errNoRingHash
		}
		if b.key.Reveal() == "" {
			return balanced{}, errors.New("ByOrganization: the key is empty")
		}
		return balanced{serviceConfig(ringHash, ringHashConfig), lanes{key: []byte(b.key.Reveal())}}, nil
	case balanceRoundRobin:
		return balanced{serviceConfig: serviceConfig("round_robin", []byte("{}"))}, nil
	default:
		return balanced{serviceConfig: serviceConfig("pick_first", []byte("{}"))}, nil
	}
}

// lanes divide the organizations. Without a key there is one lane, which is not marked.
//
// Few enough that a batch of a large fleet does not need a call per organization, and enough that replicas get even shares.
type lanes struct{ key []byte }

func (l lanes) of(spec *Spec) string {
	if l.key == nil {
		return ""
	}
	hash := hmac.New(sha256.New, l.key)
	hash.Write([]byte(spec.OrganizationID))
	return hex.EncodeToString(hash.Sum(nil)[:2])[:3]
}

func (l lanes) marked(ctx context.Context, spec *Spec) context.Context {
	if l.key == nil {
		return ctx
	}
	return inLane(ctx, l.of(spec))
}

func inLane(ctx context.Context, lane string) context.Context {
	if lane == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, AffinityHeader, lane)
}
