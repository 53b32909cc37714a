package byokgate

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// certificates are an authority's, a server's and a client's, as files.
type certificates struct {
	dir  string
	pool *x509.CertPool
}

func newCertificates(t *testing.T) *certificates {
	t.Helper()
	made := &certificates{dir: t.TempDir(), pool: x509.NewCertPool()}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	key := made.issue(t, "ca", ca, ca, nil)
	made.pool.AddCert(ca)
	leaf := func(serial int64, usage x509.ExtKeyUsage) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial), DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
			ExtKeyUsage: []x509.ExtKeyUsage{usage}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		}
	}
	made.issue(t, "server", leaf(2, x509.ExtKeyUsageServerAuth), ca, key)
	expired := leaf(4, x509.ExtKeyUsageServerAuth)
	expired.NotAfter = time.Now().Add(-time.Minute)
	made.issue(t, "expired", expired, ca, key)
	made.issue(t, "client", leaf(3, x509.ExtKeyUsageClientAuth), ca, key)
	return made
}

func (c *certificates) issue(t *testing.T, name string, made, by *x509.Certificate, signer *ecdsa.PrivateKey) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if signer == nil {
		signer = key
	}
	der, err := x509.CreateCertificate(rand.Reader, made, by, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	made.Raw = der
	if parsed, err := x509.ParseCertificate(der); err == nil {
		*made = *parsed
	}
	for file, block := range map[string]*pem.Block{
		c.file(name + ".pem"): {Type: "CERTIFICATE", Bytes: der},
		c.file(name + ".key"): {Type: "EC PRIVATE KEY", Bytes: secret},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return key
}

func (c *certificates) file(name string) string { return filepath.Join(c.dir, name) }

func (c *certificates) serverOption(mutual bool) grpc.ServerOption {
	return c.optionOf("server", mutual)
}

func (c *certificates) optionOf(name string, mutual bool) grpc.ServerOption {
	pair, err := tls.LoadX509KeyPair(c.file(name+".pem"), c.file(name+".key"))
	if err != nil {
		panic(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{pair}}
	if mutual {
		config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, c.pool
	}
	return grpc.Creds(credentials.NewTLS(config))
}

func TestTLS(t *testing.T) {
	ours, others := newCertificates(t), newCertificates(t)
	for name, test := range map[string]struct {
		mutual bool
		option Option
		reason Reason // empty: it stands
	}{
		"TLS":                               {false, WithTLSFiles(ours.file("ca.pem"), "", ""), ""},
		"TLS, a configuration":              {false, WithTLS(&tls.Config{RootCAs: ours.pool}), ""},
		"TLS, another authority":            {false, WithTLSFiles(others.file("ca.pem"), "", ""), ReasonTLSUntrusted},
		"TLS, the system's authorities":     {false, WithTLSFiles("", "", ""), ReasonTLSUntrusted},
		"mTLS":                              {true, WithTLSFiles(ours.file("ca.pem"), ours.file("client.pem"), ours.file("client.key")), ""},
		"mTLS, no certificate":              {true, WithTLSFiles(ours.file("ca.pem"), "", ""), ReasonClientCertificate},
		"mTLS, another authority's":         {true, WithTLSFiles(ours.file("ca.pem"), others.file("client.pem"), others.file("client.key")), ReasonClientCertificate},
		"mTLS, a server's certificate":      {true, WithTLSFiles(ours.file("ca.pem"), ours.file("server.pem"), ours.file("server.key")), ReasonClientCertificate},
		"TLS server, client without TLS":    {false, WithInsecureNetwork(), ReasonTLSMismatch},
		"TLS, another name on the server's": {false, WithTLS(&tls.Config{RootCAs: ours.pool, ServerName: "elsewhere.example"}), ReasonTLSUntrusted},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address := serveGRPC(t, listenTCP(t), func(server *grpc.Server) {
				byokgatev1.RegisterPolicyDecisionServiceServer(server, newFake())
			}, ours.serverOption(test.mutual))
			client := newClient(t, address, test.option, WithTimeout(2*time.Second))
			allowed, err := client.Decide(background(), acme())
			switch test.reason {
			case "":
				wantAllowed(t, allowed, err, BYOK)
			default:
				undecided := wantUndecided(t, allowed, err, http.StatusInternalServerError)
				wantReason(t, undecided, test.reason)
				if says := map[string]string{
					"TLS, another name on the server's": "for another name", "TLS, another authority": "does not trust", "mTLS, no certificate": "certificate required",
				}[name]; !strings.Contains(undecided.OperatorHint(), says) {
					t.Errorf("%q does not say %q", undecided.OperatorHint(), says)
				}
			}
		})
	}
}

func TestACertificateThatHasExpired(t *testing.T) {
	ours := newCertificates(t)
	address := serveGRPC(t, listenTCP(t), func(server *grpc.Server) {
		byokgatev1.RegisterPolicyDecisionServiceServer(server, newFake())
	}, ours.optionOf("expired", false))
	client := newClient(t, address, WithTLSFiles(ours.file("ca.pem"), "", ""))
	allowed, err := client.Decide(background(), acme())
	undecided := wantUndecided(t, allowed, err, http.StatusInternalServerError)
	if wantReason(t, undecided, ReasonTLSUntrusted); !strings.Contains(undecided.OperatorHint(), "has expired") {
		t.Errorf("%q", undecided.OperatorHint())
	}
}

// A renewed client certificate is shown by the next connection.
func TestAClientCertificateIsReadAgain(t *testing.T) {
	ours, others := newCertificates(t), newCertificates(t)
	address := serveGRPC(t, listenTCP(t), func(server *grpc.Server) {
		byokgatev1.RegisterPolicyDecisionServiceServer(server, newFake())
	}, ours.serverOption(true))
	dir := t.TempDir()
	show := func(from *certificates) {
		for _, name := range []string{"client.pem", "client.key"} {
			text, err := os.ReadFile(from.file(name))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	show(others)
	client := newClient(t, address, WithTimeout(time.Second),
		WithTLSFiles(ours.file("ca.pem"), filepath.Join(dir, "client.pem"), filepath.Join(dir, "client.key")))
	allowed, err := client.Decide(background(), acme())
	wantReason(t, wantUndecided(t, allowed, err, http.StatusInternalServerError), ReasonClientCertificate)
	show(ours)
	for end := time.Now().Add(maxReconnectDelay + grace); ; {
		if allowed, err = client.Decide(background(), acme()); err == nil || time.Now().After(end) {
			break
		}
	}
	wantAllowed(t, allowed, err, BYOK)
}

func TestUnixSocket(t *testing.T) {
	// What gRPC would take for parts of a URL.
	path := filepath.Join(t.TempDir(), "gate?a=1#b%20c d.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	fake := newFake()
	serveGRPC(t, listener, func(server *grpc.Server) { byokgatev1.RegisterPolicyDecisionServiceServer(server, fake) })
	for _, target := range []string{"unix://" + path, "unix:" + path} {
		client := newClient(t, target, WithToken(NewSecret(keyMark+"token")))
		allowed, err := client.Decide(background(), acme())
		wantAllowed(t, allowed, err, BYOK)
		// The path as an authority is refused by servers that take HTTP/2 at its word.
		if got := fake.metadata.Get(":authority"); !slices.Equal(got, []string{"localhost"}) {
			t.Errorf("%s: authority %q", target, got)
		}
	}
}

func TestToken(t *testing.T) {
	fake, address := startFake(t)
	file := filepath.Join(t.TempDir(), "token")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sent := func() []string { return fake.metadata.Get("authorization") }

	client := newClient(t, address, WithToken(NewSecret(keyMark+"token-1")))
	allowed, err := client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
	if !slices.Equal(sent(), []string{"Bearer " + keyMark + "token-1"}) {
		t.Errorf("sent %q", sent())
	}

	write(keyMark + "token-2\n")
	client = newClient(t, address, WithTokenFile(file))
	allowed, err = client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
	// Once byok-gate does not know the old one any more, the new one is used within the same call.
	current := "token-3"
	fake.decide = func(ctx context.Context, _ *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
		if shown, _ := metadata.FromIncomingContext(ctx); !slices.Equal(shown.Get("authorization"), []string{"Bearer " + keyMark + current}) {
			return nil, status.Error(codes.Unauthenticated, "no such token")
		}
		return allow(byokgatev1.BillingMode_BILLING_MODE_BYOK), nil
	}
	write(keyMark + "token-3\n")
	allowed, err = client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
	// A file that is being written, or is no file any more, changes nothing as long as the last token is good.
	write("")
	client.token.renewed(background(), 0)
	allowed, err = client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
	current = "token-4"
	allowed, err = client.Decide(background(), acme())
	wantReason(t, wantUndecided(t, allowed, err, http.StatusInternalServerError), ReasonTokenUnreadable)
	write(keyMark + "token-5\n")
	allowed, err = client.Decide(background(), acme())
	wantReason(t, wantUndecided(t, allowed, err, http.StatusInternalServerError), ReasonUnauthenticated)
	fake.tell(allow(byokgatev1.BillingMode_BILLING_MODE_BYOK), nil)

	client = newClient(t, address)
	allowed, err = client.Decide(background(), acme())
	wantAllowed(t, allowed, err, BYOK)
	if len(sent()) != 0 {
		t.Errorf("sent %q without a token", sent())
	}
}

func TestTraceContext(t *testing.T) {
	const parent, state = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "vendor=1"
	fake, address := startFake(t)
	sent := func(client *Client, ctx context.Context) []string {
		t.Helper()
		allowed, err := client.Decide(ctx, acme())
		wantAllowed(t, allowed, err, BYOK)
		return append(fake.metadata.Get("traceparent"), fake.metadata.Get("tracestate")...)
	}
	client := newClient(t, address)
	for name, test := range map[string]struct {
		parent, state string
		want          []string
	}{
		"both":                  {parent, state, []string{parent, state}},
		"parent":                {parent, "", []string{parent}},
		"state alone":           {"", state, nil},
		"not a parent":          {"00-zz", state, nil},
		"a header of one's own": {parent + "\r\nauthorization: x", state, nil},
		"a state of controls":   {parent, "a=\x00", []string{parent}},
		"a state too long":      {parent, strings.Repeat("a", maxTraceState+1), []string{parent}},
	} {
		if got := sent(client, ContextWithTrace(background(), test.parent, test.state)); !slices.Equal(got, test.want) {
			t.Errorf("%s: sent %q, expected %q", name, got, test.want)
		}
	}
	if got := sent(client, background()); len(got) != 0 {
		t.Errorf("sent %q without a trace", got)
	}
	hooked := newClient(t, address, WithTraceContext(func(context.Context) (string, string) { return parent, state }))
	if got := sent(hooked, background()); !slices.Equal(got, []string{parent, state}) {
		t.Errorf("sent %q by the hook", got)
	}
}

func TestTargetsAndOptionsThatDoNotStand(t *testing.T) {
	certificates := newCertificates(t)
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		target  string
		options []Option
		says    string // empty: it stands
	}{
		"loopback":                 {target: "127.0.0.1:50051"},
		"loopback, IPv6":           {target: "[::1]:50051"},
		"loopback, by name":        {target: "localhost:50051"},
		"loopback, mapped":         {target: "[::ffff:127.0.0.1]:50051"},
		"loopback, dns":            {target: "dns:///localhost:50051"},
		"socket":                   {target: "unix:///run/gate.sock"},
		"socket, relative":         {target: "unix:gate.sock"},
		"beyond loopback, TLS":     {target: "gate.example:443", options: []Option{WithTLS(&tls.Config{})}},
		"beyond loopback, by name": {target: "gate:50051", options: []Option{WithInsecureNetwork(), WithToken(NewSecret("t"))}},
		"beyond loopback":          {target: "gate:50051", says: "beyond loopback"},
		"beyond loopback, address": {target: "10.0.0.1:50051", says: "beyond loopback"},
		"beyond loopback, any":     {target: "0.0.0.0:50051", says: "beyond loopback"},
		"token beyond loopback":    {target: "gate:50051", options: []Option{WithToken(NewSecret("t"))}, says: "tokens would cross"},
		"empty":                    {target: "", says: "is empty"},
		"no port":                  {target: "localhost", says: "neither host:port"},
		"empty port":               {target: "localhost:", says: "neither host:port"},
		"no host":                  {target: ":50051", says: "neither host:port"},
		"URL":                      {target: "http://localhost:50051", says: "neither host:port"},
		"another scheme":           {target: "xds:///gate", says: "neither host:port"},
		"loopback, in capitals":    {target: "LOCALHOST:50051"},
		"loopback, rooted":         {target: "localhost.:50051"},
		"a zone":                   {target: "[fe80::1%eth0]:50051", options: []Option{WithInsecureNetwork()}},
		"a query":                  {target: "localhost:50051?x=1", says: "port"},
		"a fragment":               {target: "localhost:50051#x", says: "port"},
		"a percent sign":           {target: "local%68ost:50051", says: "neither a name nor an address"},
		"a host and a query":       {target: "gate?x:50051", says: "neither a name nor an address"},
		"port 0":                   {target: "localhost:0", says: "from 1 to 65535"},
		"port 65536":               {target: "localhost:65536", says: "from 1 to 65535"},
		"port by name":             {target: "localhost:https", says: "from 1 to 65535"},
		"abstract socket":          {target: "unix:@gate", says: "abstract socket"},
		"abstract socket, gRPC's":  {target: "unix-abstract:gate", says: "abstract socket"},
		"socket, NUL first":        {target: "unix:\x00gate", says: "abstract socket"},
		"socket, NUL":              {target: "unix:///run/ga\x00te", says: "NUL byte"},
		"socket, long":             {target: "unix:///" + strings.Repeat("x", 106)},
		"socket, too long":         {target: "unix:///" + strings.Repeat("x", 107), says: "108 bytes"},
		"nil option":               {target: "localhost:1", options: []Option{nil}, says: "an option is nil"},
		"no dialer":                {target: "localhost:1", options: []Option{WithDialer(nil)}, says: "WithDialer"},
		"no stats handler":         {target: "localhost:1", options: []Option{WithStatsHandler(nil)}, says: "WithStatsHandler"},
		"a user agent of two lines": {
			target: "localhost:1", options: []Option{WithUserAgent("a\nb")}, says: "WithUserAgent",
		},
		"no lookups":               {target: "localhost:1", options: []Option{WithLookupBudget(time.Second, 0)}, says: "WithLookupBudget"},
		"by organization, no ring": {target: "localhost:1", options: []Option{WithBalancing(ByOrganization(NewSecret("k")))}, says: "clients/go/affinity"},
		"socket without a path":    {target: "unix://", says: "names no socket"},
		"socket, relative URL":     {target: "unix://gate.sock", says: "absolute path"},
		"no deadline":              {target: "localhost:1", options: []Option{WithTimeout(0)}, says: "WithTimeout: 0s"},
		"negative deadline":        {target: "localhost:1", options: []Option{WithTimeout(-time.Second)}, says: "WithTimeout: -1s"},
		"no batch deadline":        {target: "localhost:1", options: []Option{WithBatchTimeout(0)}, says: "WithBatchTimeout: 0s"},
		"no logger":                {target: "localhost:1", options: []Option{WithLogger(nil)}, says: "WithLogger"},
		"no TLS configuration":     {target: "localhost:1", options: []Option{WithTLS(nil)}, says: "no TLS configuration"},
		"TLS that believes all": {
			target: "gate:1", options: []Option{WithTLS(&tls.Config{InsecureSkipVerify: true})}, says: "InsecureSkipVerify",
		},
		"TLS 1.0 at most": {
			target: "gate:1", options: []Option{WithTLS(&tls.Config{MaxVersion: tls.VersionTLS10})}, says: "MaxVersion is TLS 1.0",
		},
		"TLS 1.1 at most": {
			target: "gate:1", options: []Option{WithTLS(&tls.Config{MaxVersion: tls.VersionTLS11})}, says: "MaxVersion is TLS 1.1",
		},
		"SSL 3 at least": {
			target: "gate:1", options: []Option{WithTLS(&tls.Config{MinVersion: 0x0300})}, says: "MinVersion is SSLv3",
		},
		"TLS 1.1 at least": {
			target: "gate:1", options: []Option{WithTLS(&tls.Config{MinVersion: tls.VersionTLS11})}, says: "MinVersion is TLS 1.1",
		},
		"TLS 1.2 alone": {target: "gate:1", options: []Option{WithTLS(&tls.Config{MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12})}},
		"TLS 1.3 alone": {target: "gate:1", options: []Option{WithTLS(&tls.Config{MinVersion: tls.VersionTLS13})}},
		"TLS, crossed versions": {target: "gate:1", options: []Option{WithTLS(&tls.Config{
			MinVersion: tls.VersionTLS13, MaxVersion: tls.VersionTLS12,
		})}, says: "above MaxVersion"},
		"TLS, RC4": {
			target: "gate:1", options: []Option{WithTLS(&tls.Config{CipherSuites: []uint16{tls.TLS_ECDHE_RSA_WITH_RC4_128_SHA}})},
			says: "CipherSuites has TLS_ECDHE_RSA_WITH_RC4_128_SHA",
		},
		"TLS, no forward secrecy": {
			target: "gate:1", options: []Option{WithTLS(&tls.Config{CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_GCM_SHA256}})},
			says: "CipherSuites has TLS_RSA_WITH_AES_128_GCM_SHA256",
		},
		"TLS, CBC": {
			target: "gate:1", options: []Option{WithTLS(&tls.Config{CipherSuites: []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA}})},
			says: "CipherSuites has TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
		},
		"TLS, a suite that nobody knows": {
			target: "gate:1", options: []Option{WithTLS(&tls.Config{CipherSuites: []uint16{0xfafa}})}, says: "CipherSuites has 0xFAFA",
		},
		"TLS, sound suites": {target: "gate:1", options: []Option{WithTLS(&tls.Config{CipherSuites: []uint16{
			tls.TLS_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		}})}},
		"TLS that writes its keys down": {
			target: "gate:1", options: []Option{WithTLS(&tls.Config{KeyLogWriter: io.Discard})}, says: "KeyLogWriter",
		},
		"TLS, two faults": {
			target: "gate:1", options: []Option{WithTLS(&tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS10})},
			says: "VerifyConnection\nMaxVersion",
		},
		"a deadline without a unit":        {target: "localhost:1", options: []Option{WithTimeout(4)}, says: "WithTimeout: 4ns is below 1ms"},
		"a batch deadline without a unit":  {target: "localhost:1", options: []Option{WithBatchTimeout(60)}, says: "WithBatchTimeout: 60ns is below 1ms"},
		"a lookup's time without a unit":   {target: "localhost:1", options: []Option{WithLookupBudget(2, 1)}, says: "WithLookupBudget: perCall: 2ns is below 1ms"},
		"a lookup's time that is negative": {target: "localhost:1", options: []Option{WithLookupBudget(-1, 1)}, says: "WithLookupBudget: perCall: -1ns"},
		"less than no lookups":             {target: "localhost:1", options: []Option{WithLookupBudget(time.Second, -1)}, says: "WithLookupBudget: atOnce: -1"},
		"no observer":                      {target: "localhost:1", options: []Option{WithObserver(nil)}, says: "WithObserver: no observer"},
		"no trace hook":                    {target: "localhost:1", options: []Option{WithTraceContext(nil)}, says: "WithTraceContext: no function"},
		"the longest of all": {target: "localhost:1", options: []Option{
			WithTimeout(math.MaxInt64), WithBatchTimeout(math.MaxInt64), WithLookupBudget(math.MaxInt64, math.MaxInt),
		}},
		"TLS that verifies itself": {target: "gate:1", options: []Option{WithTLS(&tls.Config{
			InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error { return nil },
		})}},
		"authorities that are not there": {target: "gate:1", options: []Option{WithTLSFiles("/no/such/file", "", "")}, says: "no such file"},
		"authorities that are empty":     {target: "gate:1", options: []Option{WithTLSFiles(empty, "", "")}, says: "no certificate in PEM"},
		"a certificate without its key":  {target: "gate:1", options: []Option{WithTLSFiles("", empty, "")}, says: "needs both"},
		"a key without its certificate":  {target: "gate:1", options: []Option{WithTLSFiles("", "", empty)}, says: "needs both"},
		"a certificate that is empty": {
			target: "gate:1", options: []Option{WithTLSFiles("", empty, certificates.file("client.key"))}, says: "client's certificate",
		},
		"a token that is empty":       {target: "localhost:1", options: []Option{WithToken(NewSecret(""))}, says: "the token is empty"},
		"a token of two lines":        {target: "localhost:1", options: []Option{WithToken(NewSecret("a\nb"))}, says: "white space"},
		"a token too long":            {target: "localhost:1", options: []Option{WithToken(NewSecret(strings.Repeat("a", 8193)))}, says: "longer than 8192"},
		"a token file not there":      {target: "localhost:1", options: []Option{WithTokenFile("/no/such/file")}, says: "no such file"},
		"a token file that is empty":  {target: "localhost:1", options: []Option{WithTokenFile(empty)}, says: "is empty"},
		"two tokens":                  {target: "localhost:1", options: []Option{WithToken(NewSecret("a")), WithToken(NewSecret("b"))}, says: "a token already"},
		"two faults are said at once": {target: "", options: []Option{WithTimeout(0)}, says: "WithTimeout: 0s is not above zero; there is no call without a deadline\ntarget \"\" is empty"},
	} {
		client, err := New(test.target, test.options...)
		if test.says == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			client.Close()
		} else if err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v, expected it to say %q", name, err, test.says)
		}
	}
}

// What a configuration leaves open is TLS 1.2 at least: a server that speaks less is not spoken to.
func TestTLSHasAFloor(t *testing.T) {
	ours := newCertificates(t)
	pair, err := tls.LoadX509KeyPair(ours.file("server.pem"), ours.file("server.key"))
	if err != nil {
		t.Fatal(err)
	}
	old := credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11})
	address := serveGRPC(t, listenTCP(t), func(*grpc.Server) {}, grpc.Creds(old))
	for name, option := range map[string]Option{
		"a configuration": WithTLS(&tls.Config{RootCAs: ours.pool, CipherSuites: []uint16{}}),
		"files":           WithTLSFiles(ours.file("ca.pem"), "", ""),
	} {
		client := newClient(t, address, option, WithTimeout(2*time.Second))
		allowed, err := client.Decide(background(), acme())
		undecided := wantUndecided(t, allowed, err, http.StatusInternalServerError)
		if wantReason(t, undecided, ReasonTLSMismatch); !strings.Contains(undecided.OperatorHint(), "version") {
			t.Errorf("%s: %q", name, undecided.OperatorHint())
		}
	}
	made := shieldedTLS(&tls.Config{})
	if made.MinVersion != tls.VersionTLS12 {
		t.Errorf("the floor is %s", tls.VersionName(made.MinVersion))
	}
}
