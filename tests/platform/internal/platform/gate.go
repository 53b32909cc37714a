// Package platform stands for the platform that calls byok-gate: an HTTP service that creates and provisions workspaces,
// small enough to copy from. What a caller owes is in three files:
//
//   - gate.go asks: over one connection, always with a deadline, with no secret that byok-gate has no use for.
//   - refusal.go reads the answer: whatever is not plainly an allow is a refusal.
//   - server.go acts on it: before a row is written, and before a workspace is started.
package platform

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// DefaultTimeout is how long one decision may take. byok-gate gives a provider three seconds to answer; a caller that waits
// a little longer reads byok-gate's own verdict on a slow provider instead of a bare DEADLINE_EXCEEDED.
const DefaultTimeout = 4 * time.Second

// Gate asks byok-gate whether a workspace may start. Safe for concurrent use; a process needs one.
type Gate struct {
	conn    *grpc.ClientConn
	service byokgatev1.PolicyDecisionServiceClient
	timeout time.Duration
	log     *slog.Logger
	// known is nil until byok-gate has said which names it knows.
	known atomic.Pointer[knownNames]
}

// knownNames are the only names worth sending, as of one revision of byok-gate's registry.
type knownNames struct {
	revision string
	names    map[string]bool
}

// Question is one workspace as it would start, at one moment.
type Question struct {
	Checkpoint  byokgatev1.Checkpoint
	WorkspaceID string
	Runtime     string
	Model       string
	Secrets     Secrets
	// Fresh asks for a new observation of the credential instead of a remembered one.
	Fresh bool
}

// NewGate makes ready to ask the byok-gate at address (host:port, or unix:///path). It does not connect yet: a platform
// starts without byok-gate, and refuses workspaces until it is there.
func NewGate(address string, timeout time.Duration, log *slog.Logger) (*Gate, error) {
	conn, err := grpc.NewClient(address,
		// byok-gate is a sidecar, on loopback or a unix socket. With a network in between this must be TLS: the requests
		// hold credentials.
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// gRPC honours HTTPS_PROXY, and a sidecar's traffic must not leave through it.
		grpc.WithNoProxy(),
		grpc.WithConnectParams(grpc.ConnectParams{
			// gRPC's own MaxDelay is two minutes: that long a restarted byok-gate would go unnoticed.
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 2 * time.Second,
		}),
		// Finds out about a peer that vanished without closing the connection before a request does.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 30 * time.Second, Timeout: 3 * time.Second, PermitWithoutStream: true,
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("byok-gate at %q: %w", address, err)
	}
	return &Gate{
		conn:    conn,
		service: byokgatev1.NewPolicyDecisionServiceClient(conn),
		timeout: timeout,
		log:     log,
	}, nil
}

// Close ends the connection.
func (g *Gate) Close() error { return g.conn.Close() }

// Decide asks. Exactly one of the two answers is set; a caller goes on only if it holds an Allowed.
func (g *Gate) Decide(ctx context.Context, question Question) (*Allowed, *Refusal) {
	ctx, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	began := time.Now()
	log := g.log.With(
		"checkpoint", shortName(question.Checkpoint, checkpointPrefix),
		"workspace_id", question.WorkspaceID, "runtime", question.Runtime, "model", question.Model)

	response, err := g.ask(ctx, question)
	took := slog.Duration("took", time.Since(began))
	if err != nil {
		refusal := noDecision(question, err)
		log.Error("no decision", "grpc_code", status.Code(err).String(), "reason", err.Error(), "http_status", refusal.Status, took)
		return nil, refusal
	}
	allowed, refusal := read(question, response)
	log = log.With("decision_id", response.GetDecisionId())
	for _, warning := range response.GetWarnings() {
		log.Warn("decision's warning", "code", shortName(warning.GetCode(), warningPrefix), "message", warning.GetMessage())
	}
	if allowed == nil {
		log.Warn("refused", "code", refusal.Body.Code, "provider", refusal.Body.Provider, "http_status", refusal.Status, took)
		return nil, refusal
	}
	log.Info("allowed", "billing_mode", allowed.BillingMode, took)
	return allowed, nil
}

// ask gets an answer that was made with every credential that byok-gate knows how to use.
func (g *Gate) ask(ctx context.Context, question Question) (*byokgatev1.DecideResponse, error) {
	for again := false; ; again = true {
		known, err := g.knownNames(ctx)
		if err != nil {
			return nil, err
		}
		response, err := g.service.Decide(ctx, question.request(known.names))
		if err != nil {
			return nil, err
		}
		if again || response.GetRegistryRevision() == known.revision {
			return response, nil
		}
		// byok-gate has loaded another registry since it named its names. A name that is new to it was not sent, so that
		// "missing" might be our own doing: ask once more with its present names. Never twice, however often it changes.
		g.known.CompareAndSwap(known, nil)
	}
}

// knownNames are asked for once, and again for as long as there was no answer.
func (g *Gate) knownNames(ctx context.Context) (*knownNames, error) {
	if known := g.known.Load(); known != nil {
		return known, nil
	}
	response, err := g.service.GetRegistryStatus(ctx, &byokgatev1.GetRegistryStatusRequest{})
	if err != nil {
		return nil, err
	}
	if len(response.GetCredentialNames()) == 0 {
		// Every registry has some. To go on would turn this fault into "you have no credential".
		return nil, errors.New("byok-gate names no credential names")
	}
	known := &knownNames{revision: response.GetRegistry().GetRevision(), names: map[string]bool{}}
	for _, name := range response.GetCredentialNames() {
		known.names[name] = true
	}
	g.known.Store(known)
	return known, nil
}

// request leaves platform_proxy unset: byok-gate's own configuration says whether the proxy is wired.
func (q Question) request(known map[string]bool) *byokgatev1.DecideRequest {
	request := &byokgatev1.DecideRequest{
		Checkpoint: q.Checkpoint,
		WorkspaceSpec: &byokgatev1.WorkspaceSpec{
			WorkspaceId: q.WorkspaceID,
			Runtime:     q.Runtime,
			Model:       q.Model,
			Credentials: slices.Concat(
				credentials(q.Secrets.Workspace, byokgatev1.Scope_SCOPE_WORKSPACE, known),
				credentials(q.Secrets.Organization, byokgatev1.Scope_SCOPE_ORGANIZATION, known)),
		},
	}
	if q.Fresh {
		request.MaxLivenessAge = durationpb.New(0)
	}
	return request
}

// credentials are the secrets whose names byok-gate knows. The others are none of its business and stay here. Blank values
// are sent too: a blank row of the workspace hides the organization's, which only byok-gate should have to know.
func credentials(secrets map[string]Secret, scope byokgatev1.Scope, known map[string]bool) []*byokgatev1.Credential {
	var list []*byokgatev1.Credential
	for _, name := range slices.Sorted(maps.Keys(secrets)) {
		if known[name] {
			list = append(list, &byokgatev1.Credential{EnvName: name, Scope: scope, Value: string(secrets[name])})
		}
	}
	return list
}
