package byokgate

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
)

// target is where byok-gate listens.
type target struct {
	// dial is what gRPC is given.
	dial string
	// unix is a socket file: no network in between.
	unix bool
	// host is empty for a socket.
	host string
}

// parseTarget takes host:port, dns:///host:port, unix:PATH and unix:///PATH.
func parseTarget(text string) (target, error) {
	switch {
	case text == "":
		return target{}, errors.New("is empty; give host:port or unix:///path")
	case strings.HasPrefix(text, "unix:"):
		path := strings.TrimPrefix(strings.TrimPrefix(text, "unix:"), "//")
		if path == "" {
			return target{}, errors.New("names no socket; give unix:///path")
		}
		if strings.HasPrefix(text, "unix://") && !strings.HasPrefix(path, "/") {
			return target{}, errors.New("unix:// takes an absolute path; give unix:///path or unix:path")
		}
		return target{dial: "unix:" + path, unix: true}, nil
	}
	address := strings.TrimPrefix(text, "dns:///")
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || port == "" || strings.ContainsAny(address, "/ ") {
		return target{}, errors.New("is neither host:port nor unix:///path")
	}
	return target{dial: "dns:///" + address, host: host}, nil
}

// private says that nothing between the two ends can read along.
func (t target) private() bool {
	if t.unix || t.host == "localhost" {
		return true
	}
	address, err := netip.ParseAddr(t.host)
	return err == nil && address.Unmap().IsLoopback()
}

// checkTLS refuses a configuration that encrypts but believes everyone.
func checkTLS(config *tls.Config) error {
	if config == nil {
		return errors.New("no TLS configuration")
	}
	if config.InsecureSkipVerify && config.VerifyConnection == nil && config.VerifyPeerCertificate == nil {
		return errors.New("InsecureSkipVerify accepts any server, which could then read every credential; " +
			"set RootCAs, or verify in VerifyConnection")
	}
	return nil
}

// tlsFromFiles trusts the authorities in ca (the system's, if it is empty) and shows the certificate in cert and key (none, if
// both are empty). The certificate is read again for each connection, so that a renewed one is used without a restart.
func tlsFromFiles(ca, cert, key string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		text, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("certificate authorities: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("certificate authorities: %s holds no certificate in PEM", ca)
		}
	}
	switch {
	case cert == "" && key == "":
	case cert == "" || key == "":
		return nil, errors.New("a client certificate needs both its file and its key's")
	default:
		if _, err := tls.LoadX509KeyPair(cert, key); err != nil {
			return nil, fmt.Errorf("client certificate: %w", err)
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(cert, key)
			return &pair, err
		}
	}
	return config, nil
}
