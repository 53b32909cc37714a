package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

const vectorsFolder = "../../clients/go/vectors/"

// rawCodec sends raw bytes, encoded by a client of another version of the proto.
type rawCodec struct{}

func (rawCodec) Name() string                        { return "proto" }
func (rawCodec) Marshal(message any) ([]byte, error) { return *message.(*[]byte), nil }
func (rawCodec) Unmarshal(text []byte, into any) error {
	*into.(*[]byte) = append([]byte(nil), text...)
	return nil
}

// firstMessages are the messages as the first version of the contract described them.
func firstMessages(t *testing.T) protoreflect.MessageDescriptors {
	t.Helper()
	image, err := os.ReadFile(vectorsFolder + "first.binpb")
	if err != nil {
		t.Fatal(err)
	}
	var files descriptorpb.FileDescriptorSet
	if err := proto.Unmarshal(image, &files); err != nil {
		t.Fatal(err)
	}
	known, err := protodesc.NewFiles(&files)
	if err != nil {
		t.Fatal(err)
	}
	file, err := known.FindFileByPath("byokgate/v1/policy_decision.proto")
	if err != nil {
		t.Fatal(err)
	}
	return file.Messages()
}

// Requests of the first client, and of future ones, to the current byok-gate; its replies as the first client reads them.
func TestOldAndNewerClients(t *testing.T) {
	text, err := os.ReadFile(vectorsFolder + "vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct{ Name, Message, Hex, Means string }
	if err := json.Unmarshal(text, &vectors); err != nil {
		t.Fatal(err)
	}
	vendor := startVendor(t, liveKey)
	gate := startGate(t, freeAddress(t), vendor.url)
	conn, err := grpc.NewClient(gate.address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	reply := firstMessages(t).ByName("DecideResponse")
	asked := 0
	for _, vector := range vectors {
		if vector.Message != "DecideRequest" {
			continue
		}
		asked++
		t.Run(vector.Name, func(t *testing.T) {
			request, err := hex.DecodeString(vector.Hex)
			if err != nil {
				t.Fatal(err)
			}
			var answered []byte
			err = conn.Invoke(context.Background(), byokgatev1.PolicyDecisionService_Decide_FullMethodName, &request, &answered,
				grpc.ForceCodec(rawCodec{}))
			if got := asFirstReads(t, reply, answered, err); got != vector.Means {
				t.Errorf("got %q, expected %q", got, vector.Means)
			}
		})
	}
	if asked == 0 {
		t.Error("no request among the vectors")
	}
}

// asFirstReads reads a reply by the first version's description of it.
func asFirstReads(t *testing.T, reply protoreflect.MessageDescriptor, answered []byte, fault error) string {
	t.Helper()
	if fault != nil {
		return status.Code(fault).String()
	}
	message := dynamicpb.NewMessage(reply)
	if err := proto.Unmarshal(answered, message); err != nil {
		t.Fatal(err)
	}
	word := func(of protoreflect.Message, field, prefix string) string {
		described := of.Descriptor().Fields().ByName(protoreflect.Name(field))
		value := described.Enum().Values().ByNumber(of.Get(described).Enum())
		if value == nil {
			return "of no known word"
		}
		return string(value.Name())[len(prefix):]
	}
	inner := func(field string) protoreflect.Message {
		return message.Get(reply.Fields().ByName(protoreflect.Name(field))).Message()
	}
	switch set := message.WhichOneof(reply.Oneofs().ByName("decision")); {
	case set == nil:
		return "undecided"
	case set.Name() == "allow":
		return fmt.Sprint("allow ", word(inner("resolution"), "billing_mode", "BILLING_MODE_"))
	default:
		return fmt.Sprint("deny ", word(inner("deny"), "code", "DENY_CODE_"))
	}
}
