package byokgate

import "syscall"

// tcpUserTimeout is TCP_USER_TIMEOUT, which package syscall has no name for.
const tcpUserTimeout = 0x12

// limitUnsentTime ends a connection whose peer does not acknowledge for as long as a keepalive may take: gRPC does so for connections that
// it knows to be TCP, and those of this package are wrapped.
func limitUnsentTime(network, _ string, raw syscall.RawConn) error {
	if network == "unix" {
		return nil
	}
	// Without it a dead connection is only detected later.
	_ = raw.Control(func(descriptor uintptr) {
		_ = syscall.SetsockoptInt(int(descriptor), syscall.IPPROTO_TCP, tcpUserTimeout, int(keepaliveTimeout.Milliseconds()))
	})
	return nil
}
