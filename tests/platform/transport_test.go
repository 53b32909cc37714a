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
	"strings"
	"testing"
	"time"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// The client and the real byok-gate over every common transport.

// certify writes NAME.pem and NAME.key, signed by an authority, or by itself if that is nil.
func certify(t *testing.T, dir, name string, by *authority) *authority {
	t.Helper()
	return certifyAs(t, dir, name, by, func(*x509.Certificate) {})
}

// certifyAs is certify of a certificate that was edited.
func certifyAs(t *testing.T, dir, name string, by *authority, edit func(*x509.Certificate)) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	made := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true,
		DNSNames: []string{name + ".example"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), // longer than a storm
	}
	if by == nil {
		made.IsCA, made.KeyUsage, made.DNSNames, made.IPAddresses, made.ExtKeyUsage = true, x509.KeyUsageCertSign, nil, nil, nil
		by = &authority{made, key}
	}
	edit(made)
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
	for name, text := range map[string]string{"roles": token + " operator\n", "tokens": token + "\n", "token": token + "\n", "wrong": keyMark + "another-token-altogether"} {
		if err := os.WriteFile(file(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	socket := file("gate.sock")
	tls := []string{"--tls-cert", file("server.pem"), "--tls-key", file("server.key")}
	trusting := byokgate.WithTLSFiles(file("ca.pem"), "", "")

	certifyAs(t, dir, "expired", ours, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	certifyAs(t, dir, "elsewhere", ours, func(c *x509.Certificate) { c.IPAddresses = nil })
	serving := func(name string) []string {
		return []string{"--tls-cert", file(name + ".pem"), "--tls-key", file(name + ".key"), "--allow-anonymous"}
	}

	const allowed = byokgate.Reason("")
	for name, test := range map[string]struct {
		listen string
		serve  []string
		dial   []byokgate.Option
		want   byokgate.Reason
	}{
		"a socket":         {"unix:" + socket, nil, nil, allowed},
		"TLS for everyone": {"", append(tls, "--allow-anonymous"), []byokgate.Option{trusting}, allowed},
		"TLS, another authority": {
			"", append(tls, "--allow-anonymous"), []byokgate.Option{byokgate.WithTLSFiles(file("other-ca.pem"), "", "")}, byokgate.ReasonTLSUntrusted,
		},
		"TLS, a client without": {"", append(tls, "--allow-anonymous"), nil, byokgate.ReasonTLSMismatch},
		"TLS, a server without": {"", nil, []byokgate.Option{trusting}, byokgate.ReasonTLSMismatch},
		"TLS, another name":     {"", serving("elsewhere"), []byokgate.Option{trusting}, byokgate.ReasonTLSUntrusted},
		"TLS and a token": {
			"", append(tls, "--token-file", file("tokens")), []byokgate.Option{trusting, byokgate.WithTokenFile(file("token"))}, allowed,
		},
		"TLS, no token": {"", append(tls, "--token-file", file("tokens")), []byokgate.Option{trusting}, byokgate.ReasonUnauthenticated},
		"TLS, a wrong token": {
			"", append(tls, "--token-file", file("tokens")), []byokgate.Option{trusting, byokgate.WithTokenFile(file("wrong"))},
			byokgate.ReasonUnauthenticated,
		},
		"a token that may not": {
			"", []string{"--token-file", file("roles")}, []byokgate.Option{byokgate.WithTokenFile(file("token"))}, byokgate.ReasonPermissionDenied,
		},
		"a token on loopback": {"", []string{"--token-file", file("tokens")}, []byokgate.Option{byokgate.WithTokenFile(file("token"))}, allowed},
		"mTLS": {
			"", append(tls, "--tls-client-ca", file("ca.pem")),
			[]byokgate.Option{byokgate.WithTLSFiles(file("ca.pem"), file("client.pem"), file("client.key"))}, allowed,
		},
		"mTLS, no certificate": {
			"", append(tls, "--tls-client-ca", file("ca.pem")), []byokgate.Option{trusting}, byokgate.ReasonClientCertificate,
		},
		"mTLS, expired": {
			"", append(tls, "--tls-client-ca", file("ca.pem")),
			[]byokgate.Option{byokgate.WithTLSFiles(file("ca.pem"), file("expired.pem"), file("expired.key"))}, byokgate.ReasonClientCertificate,
		},
		"mTLS, a stranger's": {
			"", append(tls, "--tls-client-ca", file("ca.pem")),
			[]byokgate.Option{byokgate.WithTLSFiles(file("ca.pem"), file("stranger.pem"), file("stranger.key"))}, byokgate.ReasonClientCertificate,
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
			var undecided *byokgate.Undecided
			switch {
			case errors.As(err, &undecided):
				if undecided.Reason() != test.want || undecided.HTTPStatus() != http.StatusInternalServerError || undecided.OperatorHint() == "" {
					t.Errorf("%s, %v, %v, expected %q\n%s", undecided.Reason(), undecided, errors.Unwrap(err), test.want, output)
				}
				t.Log(undecided.OperatorHint())
			case err != nil || test.want != allowed || answer.BillingMode() != byokgate.BYOK:
				t.Errorf("%v, %v, expected %q", answer, err, test.want)
			}
		})
	}
}

// The two ports of one byok-gate mixed up: its numbers' port is no gate, and that is found out.
func TestTheAdminPortIsNoGate(t *testing.T) {
	vendor := startVendor(t, liveKey)
	listen, admin := freeAddress(t), freeAddress(t)
	startGateWith(t, listen, append(serveArguments(t, listen, vendor.url), "--admin-listen", admin)...)
	for name, options := range map[string][]byokgate.Option{
		"plain": {byokgate.WithLogger(discard)},
		"TLS":   {byokgate.WithLogger(discard), byokgate.WithTLSFiles("", "", "")},
	} {
		client, err := byokgate.New(admin, options...)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		_, err = client.Decide(t.Context(), byokgate.Request{Checkpoint: byokgate.Create, Spec: byokgate.Spec{
			Runtime: "agent", Model: "acme-large", Lookup: byokgate.Static(nil, nil),
		}})
		want, says := byokgate.ReasonNotAGate, "--admin-listen"
		if name == "TLS" {
			want, says = byokgate.ReasonTLSMismatch, "WithTLS"
		}
		var undecided *byokgate.Undecided
		if !errors.As(err, &undecided) || undecided.Reason() != want || undecided.HTTPStatus() != http.StatusInternalServerError ||
			!strings.Contains(undecided.OperatorHint(), says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A token file is deleted, and byok-gate then does not know the last token any more.
func TestATokenFileThatGoesAway(t *testing.T) {
	vendor := startVendor(t, liveKey)
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(file(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("tokens", keyMark+"the-first-token-of-all\n")
	write("token", keyMark+"the-first-token-of-all\n")
	listen := freeAddress(t)
	gate := runGate(t, listen, &syncBuffer{}, append(serveArguments(t, listen, vendor.url), "--token-file", file("tokens"))...)
	t.Cleanup(func() { gate.stop(t) })
	client, err := byokgate.New(listen, byokgate.WithLogger(discard), byokgate.WithTokenFile(file("token")))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	decide := func() error {
		_, err := client.Decide(t.Context(), byokgate.Request{Checkpoint: byokgate.Create, Spec: byokgate.Spec{
			Runtime: "agent", Model: "acme-large",
			Lookup: byokgate.Static(byokgate.Found{"ACME_API_KEY": byokgate.NewSecret(liveKey)}, nil),
		}})
		return err
	}
	eventually(t, "the first token is taken", func() bool { return decide() == nil })
	if err := os.Remove(file("token")); err != nil {
		t.Fatal(err)
	}
	write("tokens", keyMark+"the-second-token-of-all\n")
	var undecided *byokgate.Undecided
	eventually(t, "the lost file is said", func() bool {
		return errors.As(decide(), &undecided) && undecided.Reason() == byokgate.ReasonTokenUnreadable
	})
	if undecided.HTTPStatus() != http.StatusInternalServerError || !strings.Contains(undecided.OperatorHint(), "WithTokenFile") {
		t.Errorf("%v", undecided)
	}
	write("token", keyMark+"the-second-token-of-all\n")
	eventually(t, "the new token is taken", func() bool { return decide() == nil })
}
