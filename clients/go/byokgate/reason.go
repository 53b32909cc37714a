package byokgate

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Reason is why there was no decision. The cause may be byok-gate, the network, or a misconfigured platform, which no tenant can fix:
// [Undecided.OperatorHint] then says what to check.
type Reason string

// The reasons.
const (
	// ReasonUnreachable: nothing answers at the target.
	ReasonUnreachable Reason = "UNREACHABLE"
	// ReasonTimedOut: no decision within the call's time.
	ReasonTimedOut Reason = "TIMED_OUT"
	// ReasonCanceled: the caller gave up, as when a tenant hangs up.
	ReasonCanceled Reason = "CANCELED"
	// ReasonOverloaded: one of byok-gate's limits is reached.
	ReasonOverloaded Reason = "OVERLOADED"
	// ReasonDraining: byok-gate is stopping.
	ReasonDraining Reason = "DRAINING"
	// ReasonBadRequest: a field of the request is invalid; see [Undecided.Violations].
	ReasonBadRequest Reason = "BAD_REQUEST"
	// ReasonTLSUntrusted: byok-gate's certificate is from an untrusted authority, for another name, or not valid now. Misconfigured.
	ReasonTLSUntrusted Reason = "TLS_UNTRUSTED"
	// ReasonTLSMismatch: one side speaks TLS, the other does not. Misconfigured.
	ReasonTLSMismatch Reason = "TLS_MISMATCH"
	// ReasonClientCertificate: byok-gate refuses the client's certificate, or there is none. Misconfigured.
	ReasonClientCertificate Reason = "CLIENT_CERTIFICATE"
	// ReasonUnauthenticated: byok-gate does not know the token, or there is none. Misconfigured.
	ReasonUnauthenticated Reason = "UNAUTHENTICATED"
	// ReasonPermissionDenied: byok-gate knows the caller, and does not allow it this call. Misconfigured.
	ReasonPermissionDenied Reason = "PERMISSION_DENIED"
	// ReasonNotAGate: another service answers at the target, or a byok-gate that is too old for the call. Misconfigured.
	ReasonNotAGate Reason = "NOT_A_GATE"
	// ReasonTokenUnreadable: the token's file has become unreadable, and byok-gate refuses the last token that was read. Misconfigured.
	ReasonTokenUnreadable Reason = "TOKEN_UNREADABLE"
	// ReasonUnreadableReply: this package cannot read the reply.
	ReasonUnreadableReply Reason = "UNREADABLE_REPLY"
	// ReasonRegistryMoving: the registry changed during every call.
	ReasonRegistryMoving Reason = "REGISTRY_MOVING"
	// ReasonLookupMissing: the request has no Lookup. Misconfigured.
	ReasonLookupMissing Reason = "LOOKUP_MISSING"
	// ReasonLookupFailed: no credentials can be read. Only in a sweep's state: a decision is then a denial.
	ReasonLookupFailed Reason = "LOOKUP_FAILED"
	// ReasonInvalidOption: the platform passed an invalid argument, such as a negative time. Misconfigured.
	ReasonInvalidOption Reason = "INVALID_OPTION"
	// ReasonClosed: the client is closed, nil or zero.
	ReasonClosed Reason = "CLOSED"
	// ReasonInternal: byok-gate failed.
	ReasonInternal Reason = "INTERNAL"
)

// statusClientClosed is what nginx and others log for a client that hung up. Nobody reads it.
const statusClientClosed = 499

// told are the messages of a reason.
type told struct {
	httpStatus int
	// sentence is for a person; empty if it is composed elsewhere.
	sentence string
	// hint is for the platform's operator.
	hint string
}

var reasons = map[Reason]told{
	ReasonUnreachable: {503, "byok-gate cannot be reached, so nothing was started",
		"check that byok-gate runs, that the target names it, and that this process may reach it"},
	ReasonTimedOut:   {503, "byok-gate made no decision in time, so nothing was started", ""},
	ReasonCanceled:   {statusClientClosed, "the caller gave up before there was a decision, so nothing was started", ""},
	ReasonOverloaded: {503, "byok-gate is overloaded, so nothing was started", ""},
	ReasonDraining:   {503, "byok-gate is restarting, so nothing was started", ""},
	ReasonBadRequest: {400, "", ""},
	ReasonTLSUntrusted: {500, "", "check the authority that the client trusts (WithTLSFiles), the name in the target, and the dates of " +
		"byok-gate's certificate"},
	ReasonTLSMismatch: {500, "", "one side speaks TLS and the other does not: give the client WithTLS or WithTLSFiles if byok-gate's " +
		"listener has a certificate, and neither if it has none"},
	ReasonClientCertificate: {500, "", "byok-gate asks for a client certificate that it trusts: check the pair given to WithTLSFiles, its " +
		"dates, and the authority in byok-gate's configuration"},
	ReasonUnauthenticated: {500, "", "byok-gate does not know this token: check WithToken or WithTokenFile against the callers in " +
		"byok-gate's configuration"},
	ReasonPermissionDenied: {500, "", "byok-gate does not allow this caller to make this call: check the caller's role in byok-gate's " +
		"configuration"},
	ReasonNotAGate: {500, "", "what answers at the target is not byok-gate, or is older than this client: check the target"},
	ReasonTokenUnreadable: {500, "", "the token's file cannot be read any more, and byok-gate refuses the last token that was read: " +
		"check the file given to WithTokenFile"},
	ReasonUnreadableReply: {503, "", "use versions of the platform and byok-gate that fit together"},
	ReasonRegistryMoving: {503, "byok-gate's registry changed during the call, so nothing was started",
		"give all replicas of byok-gate the same registry"},
	ReasonLookupMissing: {500, "", "the request has no Lookup: set Spec.Lookup"},
	ReasonLookupFailed:  {503, "the credentials cannot be read", "check the secret store and the error of Spec.Lookup"},
	ReasonInvalidOption: {500, "", "correct the arguments of the call in the platform's code"},
	ReasonClosed:        {503, "the platform is stopping, so nothing was started", "the byokgate.Client is closed, nil or zero"},
	ReasonInternal:      {503, "byok-gate failed, so nothing was started", "byok-gate's log says why"},
}

// miswired says that the platform is misconfigured: a retry changes nothing, and no tenant can help.
func (r Reason) miswired() bool { return reasons[r].httpStatus == http.StatusInternalServerError }

// Violation is what is wrong with one field of a request.
type Violation struct {
	// Field is the field's path, for instance workspace_spec.model.
	Field string
	// Description is what is wrong with it. No credential's value.
	Description string
}

// errorDomain is what byok-gate signs its errors with.
const errorDomain = "byok-gate"

// details are what an error carries in addition to its code.
type details struct {
	// reason is byok-gate's own. Empty if the error is not byok-gate's.
	reason     string
	violations []Violation
}

func detailsOf(said *status.Status) details {
	var found details
	for _, detail := range said.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.GetDomain() == errorDomain {
				found.reason = detail.GetReason()
			}
		case *errdetails.BadRequest:
			for _, violation := range detail.GetFieldViolations() {
				found.violations = append(found.violations, Violation{violation.GetField(), violation.GetDescription()})
			}
		}
	}
	return found
}

// reasonFor says why a call failed. The fault is the connection's last, or nil.
func reasonFor(ctx context.Context, said *status.Status, found details, fault *connectionFault) Reason {
	if httpStatus, is := plainHTTP(said); is && found.reason == "" {
		if passing(httpStatus) {
			return ReasonUnreachable
		}
		return ReasonNotAGate
	}
	switch code := said.Code(); code {
	case codes.Canceled:
		if ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return ReasonCanceled
		}
		return ReasonUnreachable
	case codes.DeadlineExceeded:
		if found.reason == "" && fault != nil && fault.reason.miswired() {
			// While it was connecting: no answer has come since.
			return fault.reason
		}
		return ReasonTimedOut
	case codes.InvalidArgument:
		return ReasonBadRequest
	case codes.NotFound:
		if found.reason == "UNKNOWN_RUNTIME" {
			return ReasonBadRequest
		}
		return ReasonUnreadableReply
	case codes.ResourceExhausted:
		if found.reason == "" && strings.HasPrefix(said.Message(), "grpc: received message") {
			// From this side: the reply is longer than any of byok-gate's.
			return ReasonUnreadableReply
		}
		return ReasonOverloaded
	case codes.Unauthenticated:
		return ReasonUnauthenticated
	case codes.PermissionDenied:
		return ReasonPermissionDenied
	case codes.Unimplemented:
		return ReasonNotAGate
	case codes.Unavailable:
		switch {
		case found.reason == "DRAINING":
			return ReasonDraining
		case found.reason == "" && fault != nil:
			return fault.reason
		}
		return ReasonUnreachable
	default:
		if found.reason == "" {
			// gRPC's message for a reply that is truncated or not gRPC at all.
			return ReasonUnreadableReply
		}
		return ReasonInternal
	}
}

// begins is the hint of a peer that speaks another protocol.
func begins(with string) string {
	return fmt.Sprintf("what answers at the target is not byok-gate: it begins with %q; check the host and the port", with)
}

func throughProxy(httpStatus int) string {
	return fmt.Sprintf("a proxy in front of byok-gate answers HTTP %d in its place: check that the proxy reaches byok-gate, and by HTTP/2", httpStatus)
}

// hintFor is what to check, if the reason's own sentence would mislead. Empty otherwise.
func hintFor(reason Reason, said *status.Status, found details) string {
	if found.reason != "" {
		return ""
	}
	if httpStatus, is := plainHTTP(said); is {
		if passing(httpStatus) {
			return throughProxy(httpStatus)
		}
		return fmt.Sprintf("what answers at the target is not byok-gate: it answers HTTP %d and no gRPC, as a web server does, an ingress without "+
			"a route to byok-gate, or a proxy that wants a login; check the target and the route", httpStatus)
	}
	switch reason {
	case ReasonUnauthenticated, ReasonPermissionDenied:
		return "what refuses this caller does not sign its refusals as byok-gate does: a proxy in front of it, or another service; check the " +
			"target and what stands before it, then WithToken or WithTokenFile"
	}
	return ""
}

// === Faults of the connection ===

// connectionFault is why a connection could not be made or broke. gRPC gives callers only text.
type connectionFault struct {
	reason Reason
	// hint is for the operator. Empty: the reason's.
	hint string
	err  error
}

// faultOf classifies a connection's fault.
func faultOf(err error) *connectionFault {
	fault := &connectionFault{reason: ReasonUnreachable, err: err}
	var (
		authority x509.UnknownAuthorityError
		name      x509.HostnameError
		invalid   x509.CertificateInvalidError
		verifying *tls.CertificateVerificationError
		record    tls.RecordHeaderError
		operation *net.OpError
		other     *notHTTP2
		proxy     *awayProxy
	)
	switch {
	case errors.As(err, &authority):
		fault.reason = ReasonTLSUntrusted
		fault.hint = "byok-gate's certificate comes from an authority that this client does not trust: check the first file given to WithTLSFiles"
	case errors.As(err, &name):
		fault.reason = ReasonTLSUntrusted
		fault.hint = "byok-gate's certificate is for another name than the target's: check the target, or the certificate's names"
	case errors.As(err, &invalid):
		fault.reason = ReasonTLSUntrusted
		fault.hint = "byok-gate's certificate is not valid"
		if invalid.Reason == x509.Expired {
			fault.hint = "byok-gate's certificate has expired or is not valid yet: renew it, or check this machine's clock"
		}
	case errors.As(err, &verifying):
		fault.reason = ReasonTLSUntrusted
	case errors.As(err, &record):
		fault.reason = ReasonTLSMismatch
		if what, _ := recognized(record.RecordHeader[:]); errors.As(what, &other) && !strings.HasPrefix(other.says, "HTTP/") {
			fault.reason = ReasonNotAGate
			fault.hint = begins(other.says)
		}
	case errors.Is(err, errSpeaksTLS), errors.Is(err, errNoTLS):
		fault.reason = ReasonTLSMismatch
	case errors.Is(err, errNoHTTP2):
		fault.reason = ReasonNotAGate
		fault.hint = "what answers at the target speaks TLS without HTTP/2 (ALPN h2): a web server, or a TLS proxy without it; " +
			"check the target and the proxy"
	case errors.As(err, &operation) && operation.Op == "remote error":
		// A TLS alert, which the standard library gives only as text.
		switch alert := operation.Err.Error(); {
		case strings.Contains(alert, "certificate"), strings.Contains(alert, "access denied"):
			fault.reason = ReasonClientCertificate
			fault.hint = "byok-gate refused the client's certificate (" + alert + "): check the pair given to WithTLSFiles, its dates, " +
				"and the authority in byok-gate's configuration"
		case strings.Contains(alert, "application protocol"):
			return faultOf(errNoHTTP2)
		case strings.Contains(alert, "internal error"):
			// A proxy whose backend or certificate is not ready yet.
			fault.hint = "the other side ended the TLS handshake (" + alert + "): its log says why"
		default:
			fault.reason = ReasonTLSMismatch
			fault.hint = "byok-gate ended the TLS handshake (" + alert + "): check the name in the target, and that both sides have a " +
				"version of TLS and a cipher suite in common"
		}
	case errors.Is(err, errClientPair):
		fault.reason = ReasonClientCertificate
		fault.hint = "the client's certificate or key cannot be read: check the pair given to WithTLSFiles"
	case errors.Is(err, errSilent):
		fault.hint = "what listens there closed the connection at once: check whether it wants TLS (WithTLSFiles)"
	case errors.As(err, &other) && other.once:
		fault.hint = begins(other.says)
	case errors.As(err, &other):
		fault.reason = ReasonNotAGate
		fault.hint = begins(other.says)
		if strings.HasPrefix(other.says, "HTTP/") {
			fault.hint = "what answers at the target speaks HTTP/1.1 and no gRPC: check the port; byok-gate's own metrics and status " +
				"(--admin-listen) are on another one than its service (--listen)"
		}
	case errors.As(err, &proxy):
		fault.hint = throughProxy(proxy.httpStatus)
	case errors.Is(err, syscall.EACCES), errors.Is(err, fs.ErrPermission):
		fault.hint = "this process may not open byok-gate's socket: check its owner, its group and its mode"
	case errors.Is(err, fs.ErrNotExist):
		fault.hint = "there is no socket at that path: check that byok-gate runs and the path in the target"
	}
	return fault
}
