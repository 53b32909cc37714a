module github.com/byok-gate/byok-gate/clients/go

// What stands here is the least that works; ./check tests with it, and with the newest.
go 1.23.0

require (
	golang.org/x/sync v0.10.0
	google.golang.org/genproto/googleapis/rpc v0.0.0-20240318140521-94a12d6c2237
	google.golang.org/grpc v1.64.0
	google.golang.org/protobuf v1.36.6
)

require (
	golang.org/x/net v0.23.0 // indirect
	golang.org/x/sys v0.18.0 // indirect
	golang.org/x/text v0.14.0 // indirect
)
