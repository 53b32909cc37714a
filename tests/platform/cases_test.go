package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// Behaviour as data: the cases of tests/cases, by the real binary and the Go client. Their format is in tests/cases/README.md.

const casesFolder = "../cases"

// === The format ===

type caseFile struct {
	About  string      `yaml:"about"`
	Vendor []vendorRow `yaml:"vendor"`
	Cases  []caseData  `yaml:"cases"`
}

type caseData struct {
	Name           string       `yaml:"name"`
	Config         yaml.Node    `yaml:"config"`
	Vendor         []vendorRow  `yaml:"vendor"`
	Spec           *caseSpec    `yaml:"spec"`
	MaxLivenessAge *float64     `yaml:"max_liveness_age"`
	Calibrates     bool         `yaml:"calibrates"`
	Expect         []caseExpect `yaml:"expect"`
}

type caseSpec struct {
	Runtime          *string            `yaml:"runtime"`
	Model            string             `yaml:"model"`
	WorkspaceID      string             `yaml:"workspace_id"`
	OrganizationID   string             `yaml:"organization_id"`
	Workspace        map[string]*string `yaml:"workspace"`
	Organization     map[string]*string `yaml:"organization"`
	Credentials      []caseCredential   `yaml:"credentials"`
	UnreadableScopes []any              `yaml:"unreadable_scopes"`
	OperatorOverride any                `yaml:"operator_override"`
	PlatformProxy    any                `yaml:"platform_proxy"`
	TenantBaseURLEnv []string           `yaml:"tenant_base_url_env"`
}

type caseCredential struct {
	EnvName    string `yaml:"env_name"`
	Scope      any    `yaml:"scope"`
	Value      string `yaml:"value"`
	Unreadable bool   `yaml:"unreadable"`
}

type caseExpect struct {
	At      []any      `yaml:"at"`
	Asked   *int       `yaml:"asked"`
	Says    []string   `yaml:"says"`
	Invalid []string   `yaml:"invalid"`
	Record  caseRecord `yaml:",inline"`
}

// caseRecord is a decision in the form of the cases. Absent is empty.
type caseRecord struct {
	Decision            string   `yaml:"decision"`
	Code                string   `yaml:"code"`
	Provider            string   `yaml:"provider"`
	BillingMode         string   `yaml:"billing_mode"`
	Source              string   `yaml:"source"`
	MatchedBy           string   `yaml:"matched_by"`
	CredentialEnv       string   `yaml:"credential_env"`
	CredentialScope     string   `yaml:"credential_scope"`
	ShadowsOrganization bool     `yaml:"shadows_organization"`
	Verdict             string   `yaml:"verdict"`
	UpstreamStatus      uint32   `yaml:"upstream_status"`
	Probe               string   `yaml:"probe"`
	ServedFrom          string   `yaml:"served_from"`
	Warnings            []string `yaml:"warnings"`
	WarnedEnv           []string `yaml:"warned_env"`
	MissingEnv          []string `yaml:"missing_env"`
	AlternativeModels   []string `yaml:"alternative_models"`
	Retryable           bool     `yaml:"retryable"`
}

type vendorRow struct {
	Method  string            `yaml:"method"`
	Path    string            `yaml:"path"`
	Key     string            `yaml:"key"`
	Header  string            `yaml:"header"`
	Status  int               `yaml:"status"`
	Headers map[string]string `yaml:"headers"`
	Body    string            `yaml:"body"`
	Behave  string            `yaml:"behave"`
}

// number is an enum's, from its number or its wire name without the prefix.
func number(t *testing.T, word any, of map[string]int32, prefix string) int32 {
	t.Helper()
	switch word := word.(type) {
	case nil:
		return 0
	case int:
		return int32(word)
	case string:
		if value, found := of[prefix+word]; found {
			return value
		}
	}
	t.Fatalf("%v is no wire name of %s", word, prefix)
	return 0
}

// === The vendor of a case ===

// caseVendor is a real HTTP server whose answers are data.
type caseVendor struct {
	rows []vendorRow
	mu   sync.Mutex
	keys [][]string // of each request
}

func (v *caseVendor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	var keys []string
	for _, name := range []string{"Authorization", "x-api-key", "x-goog-api-key", "api-key"} {
		if value := r.Header.Get(name); value != "" {
			keys = append(keys, strings.TrimPrefix(value, "Bearer "))
		}
	}
	v.mu.Lock()
	v.keys = append(v.keys, keys)
	v.mu.Unlock()
	row := vendorRow{Status: http.StatusNotFound, Body: `{"error": {"code": "not_found", "message": "no such path"}}`}
	for _, candidate := range v.rows {
		if (candidate.Method == "" || candidate.Method == r.Method) && (candidate.Path == "" || candidate.Path == r.URL.Path) &&
			(candidate.Key == "" || slices.Contains(keys, candidate.Key)) &&
			(candidate.Header == "" || r.Header.Get(candidate.Header) != "") {
			row = candidate
			break
		}
	}
	switch row.Behave {
	case "silent":
		<-r.Context().Done()
		return
	case "reset":
		panic(http.ErrAbortHandler)
	}
	w.Header()["Content-Type"] = nil // only what the row says
	for name, value := range row.Headers {
		w.Header().Set(name, value)
	}
	if row.Status == 0 {
		row.Status = http.StatusOK
	}
	w.WriteHeader(row.Status)
	_, _ = io.WriteString(w, row.Body)
}

// askedWith counts the requests that carried one of the values.
func (v *caseVendor) askedWith(values []string) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	count := 0
	for _, keys := range v.keys {
		for _, value := range values {
			if slices.Contains(keys, value) {
				count++
			}
		}
	}
	return count
}

// === The runner ===

func TestCases(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join(casesFolder, "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	ran := map[string]int{}
	var mu sync.Mutex
	t.Cleanup(func() { t.Logf("ran: %v", ran) })
	total := 0
	for _, path := range paths {
		name := strings.TrimSuffix(filepath.Base(path), ".yaml")
		if name == "registry" || name == "catalogue" {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var file caseFile
		decoder := yaml.NewDecoder(bytes.NewReader(text))
		decoder.KnownFields(true)
		if err := decoder.Decode(&file); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		for _, data := range file.Cases {
			data.Vendor = append(slices.Clone(data.Vendor), file.Vendor...)
			for _, expect := range data.Expect {
				for _, at := range expect.At {
					total++
					t.Run(fmt.Sprintf("%s: %s, at %v", name, data.Name, at), func(t *testing.T) {
						t.Parallel()
						by := data.run(t, expect, at)
						mu.Lock()
						ran[by]++
						mu.Unlock()
					})
				}
			}
		}
	}
	if total < 100 {
		t.Errorf("only %d cases were found", total)
	}
}

// run returns what ran the case: the client, or the generated code if the client cannot send such a request.
func (c caseData) run(t *testing.T, expect caseExpect, at any) (by string) {
	vendor := &caseVendor{rows: c.Vendor}
	server := httptest.NewServer(vendor)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	port := server.URL[strings.LastIndex(server.URL, ":")+1:]
	dir := t.TempDir()
	arguments := []string{"serve"}
	write := func(flag, name string, text []byte) {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		arguments = append(arguments, flag, path)
	}
	for flag, name := range map[string]string{"--registry": "registry.yaml", "--probe-catalog": "catalogue.yaml"} {
		text, err := os.ReadFile(filepath.Join(casesFolder, name))
		if err != nil {
			t.Fatal(err)
		}
		write(flag, name, bytes.ReplaceAll(text, []byte("__PORT__"), []byte(port)))
	}
	if !c.Config.IsZero() {
		text, err := yaml.Marshal(&c.Config)
		if err != nil {
			t.Fatal(err)
		}
		write("--config", "config.yaml", text)
	}
	address := freeAddress(t)
	startGateWith(t, address, append(arguments, "--listen", address, "--allow-loopback-http", "--platform-proxy", "available")...)

	checkpoint := number(t, at, byokgatev1.Checkpoint_value, "CHECKPOINT_")
	var response *byokgatev1.DecideResponse
	var fault error
	want := expect.Record
	if c.needsGeneratedCode() {
		by = "generated code"
		response, fault = c.askGenerated(t, address, checkpoint)
	} else {
		by = "client"
		var relevant []string
		response, relevant, fault = c.askClient(t, address, checkpoint)
		want = want.asSeenBy(relevant)
	}
	if len(expect.Invalid) > 0 {
		if got := violations(fault); !slices.Equal(got, expect.Invalid) {
			t.Errorf("invalid: %q, expected %q (%v)", got, expect.Invalid, fault)
		}
	} else if fault != nil {
		t.Fatal(fault)
	} else {
		if want.Source == "" {
			want.Source = "DERIVED"
		}
		if got := recordOf(response); !reflect.DeepEqual(got, want) {
			t.Errorf("answered\n  %+v\nexpected\n  %+v", got, want)
		}
		said := response.GetDeny().GetMessage() + "\n" + response.GetDeny().GetRemedy()
		for _, says := range expect.Says {
			if !strings.Contains(said, says) {
				t.Errorf("%q does not say %q", said, says)
			}
		}
	}
	if asked := vendor.askedWith(c.values()); expect.Asked != nil && asked != *expect.Asked {
		t.Errorf("%d requests carried the tenant's credential, expected %d", asked, *expect.Asked)
	}
	return by
}

// needsGeneratedCode: the client always sends a workspace, and each credential once, with a known scope.
func (c caseData) needsGeneratedCode() bool {
	if c.Spec == nil || len(c.Spec.Credentials) > 0 {
		return true
	}
	return slices.ContainsFunc(c.Spec.UnreadableScopes, func(scope any) bool { _, named := scope.(string); return !named })
}

func (c caseData) askClient(
	t *testing.T, address string, checkpoint int32,
) (response *byokgatev1.DecideResponse, relevant []string, fault error) {
	client, err := byokgate.New(address, byokgate.WithTimeout(10*time.Second), byokgate.WithLogger(discard))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	spec := c.Spec
	request := byokgate.Request{
		Checkpoint: byokgate.Checkpoint(checkpoint),
		Spec: byokgate.Spec{
			WorkspaceID: spec.WorkspaceID, OrganizationID: spec.OrganizationID, Runtime: spec.runtime(), Model: spec.Model,
			OperatorOverride: byokgate.OperatorOverride(number(t, spec.OperatorOverride, byokgatev1.OperatorOverride_value, "OPERATOR_OVERRIDE_")),
			PlatformProxy:    byokgate.PlatformProxy(number(t, spec.PlatformProxy, byokgatev1.PlatformProxy_value, "PLATFORM_PROXY_")),
			TenantBaseURLEnv: spec.TenantBaseURLEnv,
			Lookup: func(_ context.Context, scope byokgate.Scope, names []string) (byokgate.Found, error) {
				relevant = names
				if slices.Contains(spec.UnreadableScopes, any(scope.String())) {
					return nil, errors.New("unreadable, as the case has it")
				}
				found := byokgate.Found{}
				for name, value := range map[byokgate.Scope]map[string]*string{
					byokgate.Workspace: spec.Workspace, byokgate.Organization: spec.Organization,
				}[scope] {
					found[name] = byokgate.Unreadable()
					if value != nil {
						found[name] = byokgate.NewSecret(*value)
					}
				}
				return found, nil
			},
		},
	}
	// Two scopes are looked up at a time.
	var mu sync.Mutex
	lookup := request.Spec.Lookup
	request.Spec.Lookup = func(ctx context.Context, scope byokgate.Scope, names []string) (byokgate.Found, error) {
		mu.Lock()
		defer mu.Unlock()
		return lookup(ctx, scope, names)
	}
	if c.MaxLivenessAge != nil {
		age := time.Duration(*c.MaxLivenessAge * float64(time.Second))
		request.MaxLivenessAge = &age
	}
	allowed, err := client.Decide(t.Context(), request)
	var denied *byokgate.Denied
	switch {
	case err == nil:
		return whole(t, allowed.Reply()), relevant, nil
	case errors.As(err, &denied):
		return whole(t, denied.Reply()), relevant, nil
	default:
		return nil, relevant, err
	}
}

func whole(t *testing.T, reply []byte) *byokgatev1.DecideResponse {
	t.Helper()
	var response byokgatev1.DecideResponse
	if err := protojson.Unmarshal(reply, &response); err != nil {
		t.Fatal(err)
	}
	return &response
}

func (c caseData) askGenerated(t *testing.T, address string, checkpoint int32) (*byokgatev1.DecideResponse, error) {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	request := &byokgatev1.DecideRequest{Checkpoint: byokgatev1.Checkpoint(checkpoint)}
	if c.MaxLivenessAge != nil {
		request.MaxLivenessAge = durationpb.New(time.Duration(*c.MaxLivenessAge * float64(time.Second)))
	}
	if spec := c.Spec; spec != nil {
		scope := func(word any) byokgatev1.Scope {
			return byokgatev1.Scope(number(t, word, byokgatev1.Scope_value, "SCOPE_"))
		}
		request.WorkspaceSpec = &byokgatev1.WorkspaceSpec{
			WorkspaceId: spec.WorkspaceID, OrganizationId: spec.OrganizationID, Runtime: spec.runtime(), Model: spec.Model,
			OperatorOverride: byokgatev1.OperatorOverride(number(t, spec.OperatorOverride, byokgatev1.OperatorOverride_value, "OPERATOR_OVERRIDE_")),
			PlatformProxy:    byokgatev1.PlatformProxy(number(t, spec.PlatformProxy, byokgatev1.PlatformProxy_value, "PLATFORM_PROXY_")),
			TenantBaseUrlEnv: spec.TenantBaseURLEnv,
		}
		for _, word := range spec.UnreadableScopes {
			request.WorkspaceSpec.UnreadableScopes = append(request.WorkspaceSpec.UnreadableScopes, scope(word))
		}
		for _, rows := range []struct {
			scope byokgatev1.Scope
			held  map[string]*string
		}{{1, spec.Workspace}, {2, spec.Organization}} {
			for name, value := range rows.held {
				credential := &byokgatev1.Credential{EnvName: name, Scope: rows.scope, Unreadable: value == nil}
				if value != nil {
					credential.Value = *value
				}
				request.WorkspaceSpec.Credentials = append(request.WorkspaceSpec.Credentials, credential)
			}
		}
		for _, raw := range spec.Credentials {
			request.WorkspaceSpec.Credentials = append(request.WorkspaceSpec.Credentials, &byokgatev1.Credential{
				EnvName: raw.EnvName, Scope: scope(raw.Scope), Value: raw.Value, Unreadable: raw.Unreadable,
			})
		}
	}
	return byokgatev1.NewPolicyDecisionServiceClient(conn).Decide(t.Context(), request)
}

func (s *caseSpec) runtime() string {
	if s.Runtime == nil {
		return "agent"
	}
	return *s.Runtime
}

// values are all that the case holds, each once.
func (c caseData) values() []string {
	var values []string
	if c.Spec == nil {
		return nil
	}
	for _, rows := range []map[string]*string{c.Spec.Workspace, c.Spec.Organization} {
		for _, value := range rows {
			if value != nil && *value != "" {
				values = append(values, *value)
			}
		}
	}
	for _, raw := range c.Spec.Credentials {
		if raw.Value != "" {
			values = append(values, raw.Value)
		}
	}
	slices.Sort(values)
	return slices.Compact(values)
}

// asSeenBy is the expectation if only these names are sent. byok-gate cannot warn about a credential that it did not get: an unknown name,
// or one that does not matter to this model. Nothing else may differ.
func (r caseRecord) asSeenBy(relevant []string) caseRecord {
	var warned []string
	// Base-URL variables are always sent by name.
	isBaseURL := slices.Contains(r.Warnings, "UNKNOWN_BASE_URL_NAME")
	for _, name := range r.WarnedEnv {
		if isBaseURL || slices.Contains(relevant, name) {
			warned = append(warned, name)
		}
	}
	if len(warned) == 0 && len(r.WarnedEnv) > 0 {
		r.Warnings = slices.DeleteFunc(slices.Clone(r.Warnings), func(code string) bool {
			return code == "CONFLICTING_CREDENTIAL" || code == "UNKNOWN_CREDENTIAL_NAME"
		})
	}
	r.WarnedEnv = warned
	if len(r.Warnings) == 0 {
		r.Warnings = nil
	}
	return r
}

func recordOf(response *byokgatev1.DecideResponse) caseRecord {
	word := func(value protoreflect.Enum, prefix string) string {
		name := string(value.Descriptor().Values().ByNumber(value.Number()).Name())
		return strings.ReplaceAll(strings.TrimPrefix(name, prefix), "UNSPECIFIED", "")
	}
	resolution, liveness, deny := response.GetResolution(), response.GetLiveness(), response.GetDeny()
	record := caseRecord{
		Decision:            "ALLOW",
		Code:                word(deny.GetCode(), "DENY_CODE_"),
		Provider:            resolution.GetProvider(),
		BillingMode:         word(resolution.GetBillingMode(), "BILLING_MODE_"),
		Source:              word(resolution.GetSource(), "RESOLUTION_SOURCE_"),
		MatchedBy:           word(resolution.GetMatchedBy(), "MATCHED_BY_"),
		CredentialEnv:       resolution.GetCredentialEnv(),
		CredentialScope:     word(resolution.GetCredentialScope(), "SCOPE_"),
		ShadowsOrganization: resolution.GetShadowsOrganization(),
		Verdict:             word(liveness.GetVerdict(), "VERDICT_"),
		UpstreamStatus:      liveness.GetUpstreamStatus(),
		Probe:               liveness.GetProbe(),
		ServedFrom:          word(liveness.GetServedFrom(), "SERVED_FROM_"),
		MissingEnv:          deny.GetMissingEnv(),
		AlternativeModels:   deny.GetAlternativeModels(),
		Retryable:           deny.GetRetryable(),
	}
	if deny != nil {
		record.Decision = "DENY"
	}
	for _, warning := range response.GetWarnings() {
		record.Warnings = append(record.Warnings, word(warning.GetCode(), "WARNING_CODE_"))
		record.WarnedEnv = append(record.WarnedEnv, warning.GetEnvNames()...)
	}
	return record
}

// violations are the fields that INVALID_ARGUMENT names.
func violations(fault error) []string {
	var undecided *byokgate.Undecided
	if errors.As(fault, &undecided) {
		fault = undecided.Unwrap()
	}
	var fields []string
	for _, detail := range status.Convert(fault).Details() {
		if request, is := detail.(*errdetails.BadRequest); is {
			for _, violation := range request.GetFieldViolations() {
				fields = append(fields, violation.GetField())
			}
		}
	}
	return fields
}
