package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// The client and the real byok-gate over everything that both can speak.

// certify writes NAME.pem and NAME.key, signed by an authority, or by itself if that is nil.
func certify(t *testing.T, dir, name string, by *authority) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	made := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true,
		DNSNames: []string{name + ".example"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	if by == nil {
		made.IsCA, made.KeyUsage, made.DNSNames, made.IPAddresses, made.ExtKeyUsage = true, x509.KeyUsageCertSign, nil, nil, nil
		by = &authority{made, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, made, by.certificate, &key.PublicKey, by.key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "PRIVATE KEY", Bytes: secret},
	} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return &authority{made, key}
}

type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func TestTheRealTransports(t *testing.T) {
	vendor := startVendor(t, liveKey)
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	ours, others := certify(t, dir, "ca", nil), certify(t, dir, "other-ca", nil)
	certify(t, dir, "server", ours)
	certify(t, dir, "client", ours)
	certify(t, dir, "stranger", others)
	const token = keyMark + "token-of-the-platform"
	for name, text := range map[string]string{"tokens": token + "\n", "token": token + "\n", "wrong": keyMark + "another-token-altogether"} {
		if err := os.WriteFile(file(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	socket := file("gate.sock")
	tls := []string{"--tls-cert", file("server.pem"), "--tls-key", file("server.key")}
	trusting := byokgate.WithTLSFiles(file("ca.pem"), "", "")

	const allowed = 0
	for name, test := range map[string]struct {
		listen string
		serve  []string
		dial   []byokgate.Option
		want   int
	}{
		"a socket":         {"unix:" + socket, nil, nil, allowed},
		"TLS for everyone": {"", append(tls, "--allow-anonymous"), []byokgate.Option{trusting}, allowed},
		"TLS, another authority": {
			"", append(tls, "--allow-anonymous"), []byokgate.Option{byokgate.WithTLSFiles(file("other-ca.pem"), "", "")}, http.StatusServiceUnavailable,
		},
		"TLS, a client without": {"", append(tls, "--allow-anonymous"), nil, http.StatusServiceUnavailable},
		"TLS and a token": {
			"", append(tls, "--token-file", file("tokens")), []byokgate.Option{trusting, byokgate.WithTokenFile(file("token"))}, allowed,
		},
		"TLS, no token": {"", append(tls, "--token-file", file("tokens")), []byokgate.Option{trusting}, http.StatusInternalServerError},
		"TLS, a wrong token": {
			"", append(tls, "--token-file", file("tokens")), []byokgate.Option{trusting, byokgate.WithTokenFile(file("wrong"))},
			http.StatusInternalServerError,
		},
		"a token on loopback": {"", []string{"--token-file", file("tokens")}, []byokgate.Option{byokgate.WithTokenFile(file("token"))}, allowed},
		"mTLS": {
			"", append(tls, "--tls-client-ca", file("ca.pem")),
			[]byokgate.Option{byokgate.WithTLSFiles(file("ca.pem"), file("client.pem"), file("client.key"))}, allowed,
		},
		"mTLS, no certificate": {
			"", append(tls, "--tls-client-ca", file("ca.pem")), []byokgate.Option{trusting}, http.StatusServiceUnavailable,
		},
		"mTLS, a stranger's": {
			"", append(tls, "--tls-client-ca", file("ca.pem")),
			[]byokgate.Option{byokgate.WithTLSFiles(file("ca.pem"), file("stranger.pem"), file("stranger.key"))}, http.StatusServiceUnavailable,
		},
	} {
		t.Run(name, func(t *testing.T) {
			listen := test.listen
			if listen == "" {
				listen = freeAddress(t)
			}
			output := &syncBuffer{}
			gate := runGate(t, listen, output, append(serveArguments(t, listen, vendor.url), test.serve...)...)
			gate.output = output
			t.Cleanup(func() { gate.stop(t) })
			eventually(t, "byok-gate listens", func() bool {
				network, address := "tcp", listen
				if test.listen != "" {
					network, address = "unix", socket
				}
				conn, err := net.Dial(network, address)
				if err == nil {
					conn.Close()
				}
				return err == nil
			})
			client, err := byokgate.New(listen, append(test.dial, byokgate.WithLogger(discard))...)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			request := byokgate.Request{Checkpoint: byokgate.Create, Spec: byokgate.Spec{
				Runtime: "agent", Model: "acme-large",
				Lookup: byokgate.Static(byokgate.Found{"ACME_API_KEY": byokgate.NewSecret(liveKey)}, nil),
			}}
			answer, err := client.Decide(t.Context(), request)
			var refusal byokgate.Refusal
			switch {
			case errors.As(err, &refusal):
				if refusal.HTTPStatus() != test.want {
					t.Errorf("%v, expected status %d\n%s", errors.Unwrap(err), test.want, output)
				}
			case test.want != allowed || answer.BillingMode() != byokgate.BYOK:
				t.Errorf("%v, expected status %d", answer, test.want)
			}
		})
	}
}
