package byokgate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// target is where byok-gate listens.
type target struct {
	// dial is the target for gRPC.
	dial string
	// fixed is always dialled, without gRPC's resolver: a socket's path, or an address that needs no name server. gRPC reads targets as URLs,
	// in which "?", "#" and "%" mean something else.
	fixed string
	// authority is the server's name. Empty: gRPC's own choice.
	authority string
	// unix is a socket file: no network in between.
	unix bool
	// host is empty for a socket.
	host string
	// several: one name may have several addresses.
	several bool
}

// maxSocketPath is what fits into an address of a Unix socket (sun_path, with its NUL).
const maxSocketPath = 107

var hostName = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?$`)

// fixedDial is for targets of one address.
const fixedDial = "passthrough:///byok-gate"

// parseTarget takes host:port, dns:///host:port, unix:PATH and unix:///PATH.
func parseTarget(text string) (target, error) {
	switch {
	case text == "":
		return target{}, errors.New("is empty; give host:port or unix:///path")
	case strings.HasPrefix(text, "unix-abstract:"):
		return target{}, errAbstract
	case strings.HasPrefix(text, "unix:"):
		return parseSocket(text)
	}
	address := strings.TrimPrefix(text, "dns:///")
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || port == "" {
		return target{}, errors.New("is neither host:port nor unix:///path")
	}
	if strings.ContainsAny(address, "/ ") {
		return target{}, errors.New("is neither host:port nor unix:///path")
	}
	if number, err := strconv.ParseUint(port, 10, 16); err != nil || number == 0 {
		return target{}, fmt.Errorf("has the port %q, which is not a number from 1 to 65535", port)
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return target{dial: fixedDial, fixed: address, authority: address, host: host}, nil
	}
	if !hostName.MatchString(host) {
		return target{}, fmt.Errorf("has the host %q, which is neither a name nor an address", host)
	}
	return target{dial: "dns:///" + address, host: host, several: true}, nil
}

var errAbstract = errors.New("is an abstract socket, which any process of the machine can take before byok-gate does; " +
	"give a socket in a folder that only byok-gate can write: unix:///path")

func parseSocket(text string) (target, error) {
	path := strings.TrimPrefix(strings.TrimPrefix(text, "unix:"), "//")
	switch {
	case path == "":
		return target{}, errors.New("names no socket; give unix:///path")
	case path[0] == '@' || path[0] == 0:
		return target{}, errAbstract
	case strings.ContainsRune(path, 0):
		return target{}, errors.New("holds a NUL byte, which no path can")
	case strings.HasPrefix(text, "unix://") && !strings.HasPrefix(path, "/"):
		return target{}, errors.New("unix:// takes an absolute path; give unix:///path or unix:path")
	case len(path) > maxSocketPath:
		return target{}, fmt.Errorf("is a socket with a path of %d bytes, and a socket's has %d at most", len(path), maxSocketPath)
	}
	// The socket's path is no authority: servers refuse it.
	return target{dial: fixedDial, fixed: path, authority: "localhost", unix: true}, nil
}

// private says that nobody between the two ends can read the traffic.
func (t target) private() bool {
	if t.unix || strings.EqualFold(strings.TrimSuffix(t.host, "."), "localhost") {
		return true
	}
	address, err := netip.ParseAddr(t.host)
	return err == nil && address.Zone() == "" && address.Unmap().IsLoopback()
}
