// Package affinity links gRPC's ring_hash in, by which [byokgate.ByOrganization] sends an organization's questions to one replica. Import it
// for that:
//
//	import _ "github.com/byok-gate/byok-gate/clients/go/affinity"
//
// A client of a dns:/// target then balances so unless it is told otherwise. It is a module of its own because it needs gRPC 1.80, the first
// whose ring_hash heeds a header without a switch in the environment, and package byokgate needs far less.
package affinity

import (
	_ "google.golang.org/grpc/balancer/ringhash" // registers itself
)
