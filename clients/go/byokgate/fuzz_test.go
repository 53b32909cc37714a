package byokgate

import (
	"encoding/json"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// For any bytes of a reply: it is an allow only if an independent parser of the wire format says so, and every refusal has an HTTP
// answer.
func FuzzReply(f *testing.F) {
	for _, seed := range []*byokgatev1.DecideResponse{
		{}, allow(1), allow(2), allow(3), allow(99), missingKey("ACME_API_KEY"), deny(&byokgatev1.Deny{Code: 999, Retryable: true}),
	} {
		text, err := proto.Marshal(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
		// Two replies one after the other are one message, in which the last word counts.
		f.Add(append(text, text...))
	}
	f.Add([]byte{0x82, 0x7d, 0x00})
	f.Fuzz(func(t *testing.T, text []byte) {
		var response byokgatev1.DecideResponse
		if proto.Unmarshal(text, &response) != nil {
			return
		}
		allowed, refusal := read(&Spec{Runtime: "agent", Model: "acme-large"}, &response)
		if (refusal == nil) != saysAllow(text) {
			t.Fatalf("read %v, %v from %x", allowed, refusal, text)
		}
		if refusal == nil {
			if mode := allowed.BillingMode(); mode != BYOK && mode != PlatformManaged && mode != NoBilling {
				t.Fatalf("billing mode %q", mode)
			}
			_, _, _ = allowed.DecisionID(), allowed.Provider(), allowed.Warnings()
			return
		}
		if allowed != (Allowed{}) {
			t.Fatal("an Allowed beside a refusal")
		}
		switch refusal.HTTPStatus() {
		case 422, 503:
		default:
			t.Fatalf("status %d", refusal.HTTPStatus())
		}
		if !json.Valid(refusal.JSON()) || refusal.Code() == "" || refusal.Error() == "" {
			t.Fatalf("%s", refusal.JSON())
		}
	})
}

// Any target is refused, or dialled as intended; and a private one does not leave the machine.
func FuzzTarget(f *testing.F) {
	for _, seed := range []string{
		"localhost:1", "unix:///run/a?b#c%20", "dns:///gate.example:443", "[::1]:1", "unix:@x", "unix-abstract:x", "127.0.0.1:1", "LOCALHOST.:1",
		"[fe80::1%25eth0]:1", "xds:///a:1", "a:b@c:1", "unix://", "passthrough:///x:1",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		to, err := parseTarget(text)
		if err != nil {
			return
		}
		if to.unix && (to.fixed == "" || len(to.fixed) > maxSocketPath || to.fixed[0] == '@' || strings.ContainsRune(to.fixed, 0)) {
			t.Fatalf("%q is dialled as %q", text, to.fixed)
		}
		if !to.unix && to.private() {
			host, _, err := net.SplitHostPort(strings.TrimPrefix(text, "dns:///"))
			if ip := net.ParseIP(host); err != nil || (!strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") && (ip == nil || !ip.IsLoopback())) {
				t.Fatalf("%q is called private", text)
			}
		}
		conn, err := grpc.NewClient(to.dial, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatalf("gRPC refuses %q for %q: %v", to.dial, text, err)
		}
		conn.Close()
	})
}

// saysAllow walks over the fields: the last decision is an allow, there is an id, and who pays is 1, 2 or 3 in the allow and the same in the
// resolution.
func saysAllow(text []byte) bool {
	var allowed, identified bool
	var mode, resolved int32
	varint := func(message []byte, field protowire.Number, into *int32) {
		for len(message) > 0 {
			number, kind, size := protowire.ConsumeTag(message)
			message = message[size:]
			if number == field && kind == protowire.VarintType {
				found, _ := protowire.ConsumeVarint(message)
				*into = int32(found)
			}
			message = message[protowire.ConsumeFieldValue(number, kind, message):]
		}
	}
	for len(text) > 0 {
		number, kind, size := protowire.ConsumeTag(text)
		text = text[size:]
		if kind != protowire.BytesType {
			text = text[protowire.ConsumeFieldValue(number, kind, text):]
			continue
		}
		value, size := protowire.ConsumeBytes(text)
		text = text[size:]
		switch number {
		case 1:
			identified = len(value) > 0
		case 2:
			if !allowed {
				// Another member of the oneof before it is gone; a second allow is merged into the first.
				mode = 0
			}
			allowed = true
			varint(value, 1, &mode)
		case 3:
			allowed = false
		case 4:
			varint(value, 2, &resolved)
		}
	}
	return allowed && identified && mode >= 1 && mode <= 3 && mode == resolved
}
