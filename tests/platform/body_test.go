package main

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
	"github.com/byok-gate/byok-gate/clients/go/gatehttp"
)

// fakeGate sends what the real byok-gate cannot be made to send.
type fakeGate struct {
	byokgatev1.UnimplementedPolicyDecisionServiceServer
	response *byokgatev1.DecideResponse
	fault    error
}

func (f *fakeGate) ResolveProvider(
	context.Context, *byokgatev1.ResolveProviderRequest,
) (*byokgatev1.ResolveProviderResponse, error) {
	return &byokgatev1.ResolveProviderResponse{
		Result:           &byokgatev1.ResolveProviderResponse_Resolution{Resolution: &byokgatev1.Resolution{}},
		RegistryRevision: "r1",
	}, nil
}

func (f *fakeGate) Decide(context.Context, *byokgatev1.DecideRequest) (*byokgatev1.DecideResponse, error) {
	return f.response, f.fault
}

// The schema describes every body of the client.
func TestEveryBodyIsWhatTheSchemaSays(t *testing.T) {
	schema, err := jsonschema.NewCompiler().Compile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fake, server := &fakeGate{}, grpc.NewServer()
	byokgatev1.RegisterPolicyDecisionServiceServer(server, fake)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	client, err := byokgate.New(listener.Addr().String(),
		byokgate.WithTimeout(impatient), byokgate.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })

	asked := byokgate.Request{Checkpoint: byokgate.Create, Spec: byokgate.Spec{
		Runtime: "agent", Model: "acme-large", Lookup: byokgate.Static(nil, nil),
	}}
	checked := 0
	check := func(what string, request byokgate.Request, response *byokgatev1.DecideResponse, fault error) {
		t.Helper()
		fake.response, fake.fault = response, fault
		recorder := httptest.NewRecorder()
		if _, passed := gatehttp.Decide(recorder, httptest.NewRequest(http.MethodPost, "/", nil), client, request); passed {
			t.Fatalf("%s passes", what)
		}
		instance, err := jsonschema.UnmarshalJSON(bytes.NewReader(recorder.Body.Bytes()))
		if err == nil {
			err = schema.Validate(instance)
		}
		if err != nil {
			t.Errorf("%s: %v\n%s", what, err, recorder.Body)
		}
		checked++
	}
	for _, retryable := range []bool{false, true} {
		for number, name := range byokgatev1.DenyCode_name {
			for mode := range byokgatev1.BillingMode_name {
				response := &byokgatev1.DecideResponse{
					DecisionId: "d-1", RegistryRevision: "r1", Resolution: &byokgatev1.Resolution{BillingMode: byokgatev1.BillingMode(mode)},
					Decision: &byokgatev1.DecideResponse_Deny{Deny: &byokgatev1.Deny{
						Code: byokgatev1.DenyCode(number), Retryable: retryable, MissingEnv: []string{"", "ACME_API_KEY"},
						AlternativeModels: []string{"", "platform-small"}, RetryAfter: durationpb.New(0),
					}},
				}
				for code := range byokgatev1.WarningCode_name {
					response.Warnings = append(response.Warnings, &byokgatev1.Warning{Code: byokgatev1.WarningCode(code), EnvNames: []string{""}})
				}
				response.Warnings = append(response.Warnings, &byokgatev1.Warning{Code: 999})
				check(name, asked, response, nil)
			}
		}
	}
	for _, code := range []byokgatev1.DenyCode{24, 999, -1} {
		check("a code of tomorrow's", asked, &byokgatev1.DecideResponse{
			DecisionId: "d-1", Decision: &byokgatev1.DecideResponse_Deny{Deny: &byokgatev1.Deny{Code: code}},
		}, nil)
	}
	check("everything", asked, &byokgatev1.DecideResponse{
		DecisionId: "d-1", Resolution: &byokgatev1.Resolution{CredentialEnv: "ACME_API_KEY"},
		Liveness: &byokgatev1.Liveness{UpstreamStatus: 401, EndpointHost: "api.acme.example"},
		Decision: &byokgatev1.DecideResponse_Deny{Deny: &byokgatev1.Deny{Code: byokgatev1.DenyCode_DENY_CODE_INVALID_BYOK_CREDENTIAL}},
	}, nil)
	check("an empty reply", asked, &byokgatev1.DecideResponse{RegistryRevision: "r1"}, nil)
	for code := codes.Canceled; code <= codes.Unauthenticated+1; code++ {
		check(code.String(), asked, nil, status.Error(code, "-"))
	}
	busy, err := status.New(codes.ResourceExhausted, "-").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(-1)})
	if err != nil {
		t.Fatal(err)
	}
	check("busy", asked, nil, busy.Err())
	noLookup := asked
	noLookup.Spec.Lookup = nil
	check("no lookup", noLookup, nil, nil)
	badModel := asked
	badModel.Spec.Model = "\xff"
	check("a model that is no text", badModel, nil, nil)
	for _, zero := range []byokgate.Refusal{&byokgate.Denied{}, &byokgate.Undecided{}} {
		instance, err := jsonschema.UnmarshalJSON(bytes.NewReader(zero.JSON()))
		if err == nil {
			err = schema.Validate(instance)
		}
		if err != nil {
			t.Errorf("%T: %v", zero, err)
		}
	}
	t.Logf("%d bodies", checked)
}

// Requests that end before a call to byok-gate are not denials, and have no denial's body.
func TestRequestsThatAreNoQuestion(t *testing.T) {
	server := startPlatform(t, freeAddress(t), impatient)
	for what, test := range map[string]struct {
		got  answer
		want int
	}{
		"create, no object":          {server.call(t, http.MethodPost, "/workspaces", "text"), http.StatusBadRequest},
		"create, secret not a text":  {server.call(t, http.MethodPost, "/workspaces", map[string]any{"secrets": map[string]any{"A": 1}}), http.StatusBadRequest},
		"import, no list":            {server.call(t, http.MethodPost, "/import", "text"), http.StatusBadRequest},
		"provision, no such row":     {server.provision(t, "none"), http.StatusNotFound},
		"pause, no such row":         {server.call(t, http.MethodPost, "/workspaces/none/pause", nil), http.StatusNotFound},
		"get, no such row":           {server.call(t, http.MethodGet, "/workspaces/none", nil), http.StatusNotFound},
		"secret, no such row":        {server.setSecret(t, "workspaces/none", "A", "b"), http.StatusNotFound},
		"organization secret, no {}": {server.call(t, http.MethodPut, "/organizations/o/secrets/A", 1), http.StatusBadRequest},
		"organization secret, empty": {server.call(t, http.MethodPut, "/organizations/o/secrets/A", struct{}{}), http.StatusBadRequest},
	} {
		if test.got.status != test.want || strings.HasPrefix(test.got.header.Get("Content-Type"), "application/json") {
			t.Errorf("%s: status %d, expected %d: %s", what, test.got.status, test.want, test.got.body)
		}
	}
	server.wantNoRow(t)
}

// The schema is written by hand; its lists must be the proto's.
func TestSchemaListsWhatTheProtoLists(t *testing.T) {
	written, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	type enum struct {
		Enum  []string `json:"enum"`
		AnyOf []struct {
			Enum []string `json:"enum"`
		} `json:"anyOf"`
	}
	var schema struct {
		Properties struct {
			Code        enum `json:"code"`
			BillingMode enum `json:"billing_mode"`
		} `json:"properties"`
		Defs struct {
			Warning struct {
				Properties struct {
					Code enum `json:"code"`
				} `json:"properties"`
			} `json:"warning"`
		} `json:"$defs"`
	}
	if err := json.Unmarshal(written, &schema); err != nil {
		t.Fatal(err)
	}
	names := func(known map[int32]string, prefix string, more ...string) []string {
		for _, name := range known {
			more = append(more, strings.TrimPrefix(name, prefix))
		}
		slices.Sort(more)
		return more
	}
	codes := names(byokgatev1.DenyCode_name, "DENY_CODE_", string(byokgate.DecisionUnavailable))
	// Never in a body: if it is sent anyway, it reads DENY_CODE_0.
	codes = slices.DeleteFunc(codes, func(name string) bool { return name == "UNSPECIFIED" })
	for what, lists := range map[string][2][]string{
		"code":          {schema.Properties.Code.AnyOf[0].Enum, codes},
		"billing_mode":  {schema.Properties.BillingMode.Enum, names(byokgatev1.BillingMode_name, "BILLING_MODE_")},
		"warnings.code": {append(schema.Defs.Warning.Properties.Code.AnyOf[0].Enum, "UNSPECIFIED"), names(byokgatev1.WarningCode_name, "WARNING_CODE_")},
	} {
		slices.Sort(lists[0])
		if !reflect.DeepEqual(lists[0], lists[1]) {
			t.Errorf("%s: the schema has %v, the proto %v", what, lists[0], lists[1])
		}
	}
}
