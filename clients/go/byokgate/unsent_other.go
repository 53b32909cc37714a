//go:build !linux

package byokgate

import "syscall"

// limitUnsentTime is for Linux alone.
func limitUnsentTime(string, string, syscall.RawConn) error { return nil }
