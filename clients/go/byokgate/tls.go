package byokgate

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// maxFileBytes is far above any file of certificates, and keeps a wrong one out of memory.
const maxFileBytes = 4 << 20

// fileTimeout is how long a file may take to read: a network file that hangs must not block a connection forever.
const fileTimeout = 2 * time.Second

// reads joins concurrent reads of a file, so that a file that hangs blocks only one goroutine.
var reads singleflight.Group

// readFile reads a regular file. A pipe or a device would block, or return its content only once.
func readFile(path string) ([]byte, error) {
	late := time.NewTimer(fileTimeout)
	defer late.Stop()
	select {
	case read := <-reads.DoChan(path, func() (any, error) { return readRegular(path) }):
		text, _ := read.Val.([]byte)
		return text, read.Err
	case <-late.C:
		return nil, fmt.Errorf("%s: no content within %v", path, fileTimeout)
	}
}

func readRegular(path string) ([]byte, error) {
	about, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, err
	case !about.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", path)
	case about.Size() > maxFileBytes:
		return nil, fmt.Errorf("%s has %d bytes, and may have %d", path, about.Size(), maxFileBytes)
	}
	return os.ReadFile(path)
}

// checkTLS refuses a configuration that does not verify the server, or that others can decrypt.
func checkTLS(config *tls.Config) error {
	if config == nil {
		return errors.New("no TLS configuration")
	}
	var faults []error
	if config.InsecureSkipVerify && config.VerifyConnection == nil && config.VerifyPeerCertificate == nil {
		faults = append(faults, errors.New("InsecureSkipVerify accepts any server, which could then read every credential; "+
			"set RootCAs, or verify in VerifyConnection"))
	}
	for _, bound := range []struct {
		name    string
		version uint16
	}{{"MinVersion", config.MinVersion}, {"MaxVersion", config.MaxVersion}} {
		if bound.version != 0 && bound.version < tls.VersionTLS12 {
			faults = append(faults, fmt.Errorf("%s is %s, which is insecure and which byok-gate does not speak; leave it out, or give 1.2 or 1.3",
				bound.name, tls.VersionName(bound.version)))
		}
	}
	if config.MaxVersion != 0 && config.MinVersion > config.MaxVersion {
		faults = append(faults, fmt.Errorf("MinVersion is %s, above MaxVersion, %s", tls.VersionName(config.MinVersion), tls.VersionName(config.MaxVersion)))
	}
	for _, suite := range config.CipherSuites {
		if !soundSuite(suite) {
			faults = append(faults, fmt.Errorf("CipherSuites has %s, which is weak, unknown or forbidden for HTTP/2; leave the list out",
				tls.CipherSuiteName(suite)))
		}
	}
	if config.KeyLogWriter != nil {
		faults = append(faults, errors.New("KeyLogWriter lets its readers decrypt every credential; leave it out"))
	}
	return errors.Join(faults...)
}

// soundSuite: forward secrecy and an AEAD, as RFC 9113 (9.2.2) requires for HTTP/2.
func soundSuite(id uint16) bool {
	return slices.ContainsFunc(tls.CipherSuites(), func(suite *tls.CipherSuite) bool {
		if suite.ID != id {
			return false
		}
		if slices.Contains(suite.SupportedVersions, tls.VersionTLS13) {
			return true
		}
		return strings.Contains(suite.Name, "_ECDHE_") && (strings.Contains(suite.Name, "_GCM_") || strings.Contains(suite.Name, "_CHACHA20_"))
	})
}

// shieldedTLS is a copy whose callbacks may panic: gRPC calls them in goroutines of its own.
func shieldedTLS(config *tls.Config) *tls.Config {
	config = config.Clone()
	// Unset values must not depend on the defaults of another Go version.
	config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
	if len(config.CipherSuites) == 0 {
		config.CipherSuites = nil
	}
	fault := func(into *error) func(any) {
		return func(thrown any) { *into = panicked("a callback of the TLS configuration", thrown) }
	}
	if verify := config.VerifyConnection; verify != nil {
		config.VerifyConnection = func(state tls.ConnectionState) (err error) {
			hook(func() { err = verify(state) }, fault(&err))
			return err
		}
	}
	if verify := config.VerifyPeerCertificate; verify != nil {
		config.VerifyPeerCertificate = func(raw [][]byte, chains [][]*x509.Certificate) (err error) {
			hook(func() { err = verify(raw, chains) }, fault(&err))
			return err
		}
	}
	if show := config.GetClientCertificate; show != nil {
		config.GetClientCertificate = func(request *tls.CertificateRequestInfo) (shown *tls.Certificate, err error) {
			hook(func() { shown, err = show(request) }, fault(&err))
			if err == nil && shown == nil {
				err = errors.New("GetClientCertificate gave neither a certificate nor an error")
			}
			return shown, err
		}
	}
	return config
}

// errClientPair says that this side's certificate is invalid.
var errClientPair = errors.New("the client's certificate")

// tlsFiles are certificates that are renewed while the platform runs: reloaded for each connection. If that fails, the last ones stay.
type tlsFiles struct {
	ca, cert, key string

	mu   sync.Mutex
	last *tls.Config
	// read are the contents that the last configuration was made from.
	read [3][]byte
}

// config trusts the authorities in ca (the system's, if it is empty) and shows the certificate in cert and key (none, if both are empty).
func (f *tlsFiles) config() (*tls.Config, error) {
	var read [3][]byte
	var fault error
	for index, path := range []string{f.ca, f.cert, f.key} {
		if path != "" && fault == nil {
			read[index], fault = readFile(path)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if fault == nil {
		if f.last != nil && bytes.Equal(read[0], f.read[0]) && bytes.Equal(read[1], f.read[1]) && bytes.Equal(read[2], f.read[2]) {
			return f.last, nil
		}
		var made *tls.Config
		if made, fault = f.parse(read); fault == nil {
			f.last, f.read = made, read
			return made, nil
		}
	}
	if f.last != nil {
		// Most likely in the middle of a renewal.
		return f.last, nil
	}
	return nil, fault
}

func (f *tlsFiles) parse(read [3][]byte) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.ca != "" {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(read[0]) {
			return nil, fmt.Errorf("certificate authorities: %s holds no certificate in PEM", f.ca)
		}
	}
	switch {
	case f.cert == "" && f.key == "":
	case f.cert == "" || f.key == "":
		return nil, errors.New("a client certificate needs both its file and its key's")
	default:
		pair, err := tls.X509KeyPair(read[1], read[2])
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errClientPair, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}
