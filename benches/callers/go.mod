module github.com/byok-gate/byok-gate/benches/callers

go 1.25.0

require (
	github.com/byok-gate/byok-gate/clients/go v0.0.0
	github.com/byok-gate/byok-gate/clients/go/affinity v0.0.0
	golang.org/x/net v0.49.0
)

require (
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	golang.org/x/sync v0.19.0 // indirect
	golang.org/x/sys v0.40.0 // indirect
	golang.org/x/text v0.33.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260120221211-b8f7ae30c516 // indirect
	google.golang.org/grpc v1.80.0 // indirect
	google.golang.org/protobuf v1.36.11 // indirect
)

replace github.com/byok-gate/byok-gate/clients/go => ../../clients/go

replace github.com/byok-gate/byok-gate/clients/go/affinity => ../../clients/go/affinity
