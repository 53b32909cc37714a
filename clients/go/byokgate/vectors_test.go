package byokgate

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"reflect"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// vector is a message as it was encoded when the contract was first kept, or as a newer version might encode it. They are
// only ever added to.
type vector struct {
	Name    string          `json:"name"`
	Message string          `json:"message"`
	Hex     string          `json:"hex"`
	Means   string          `json:"means"`
	JSON    json.RawMessage `json:"json"`
}

// Bytes of the first byok-gate, and of ones to come: every field is still found where it was, nothing that is not known is
// lost, and the client reads the same from it.
func TestVectors(t *testing.T) {
	text, err := os.ReadFile("../vectors/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(text, &vectors); err != nil {
		t.Fatal(err)
	}
	read := 0
	for _, vector := range vectors {
		t.Run(vector.Name, func(t *testing.T) {
			encoded, err := hex.DecodeString(vector.Hex)
			if err != nil {
				t.Fatal(err)
			}
			kind, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName("byokgate.v1." + vector.Message))
			if err != nil {
				t.Fatal(err)
			}
			message := kind.New().Interface()
			if err := proto.Unmarshal(encoded, message); err != nil {
				t.Fatal(err)
			}
			shown, err := protojson.Marshal(message)
			if err != nil {
				t.Fatal(err)
			}
			var got, want any
			if err := json.Unmarshal(shown, &got); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(vector.JSON, &want); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("reads as\n%s, expected\n%s", shown, vector.JSON)
			}
			again, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
			if err != nil || len(again) != len(encoded) {
				t.Errorf("%d of %d bytes are left, %v", len(again), len(encoded), err)
			}
			if response, is := message.(*byokgatev1.DecideResponse); is {
				if means := meaning(response); means != vector.Means {
					t.Errorf("means %q, expected %q", means, vector.Means)
				}
				read++
			}
		})
	}
	if read == 0 {
		t.Error("no reply among the vectors")
	}
}

func meaning(response *byokgatev1.DecideResponse) string {
	allowed, refusal := read(nil, response)
	switch refusal := refusal.(type) {
	case nil:
		return "allow " + string(allowed.BillingMode())
	case *Denied:
		if refusal.Retryable() {
			return "deny " + string(refusal.Code()) + ", again after " + refusal.RetryAfter().String()
		}
		return "deny " + string(refusal.Code())
	default:
		return "undecided"
	}
}
