// Package affinity links gRPC's ring_hash, with which [byokgate.ByOrganization] sends all calls of an organization to one replica. Import
// it for that:
//
//	import _ "github.com/byok-gate/byok-gate/clients/go/affinity"
//
// A client of a dns:/// target then balances this way by default. It is a separate module because it needs gRPC 1.80, the first whose
// ring_hash uses a header without an environment variable, and package byokgate needs a much older one.
package affinity

import (
	_ "google.golang.org/grpc/balancer/ringhash" // registers itself
)
