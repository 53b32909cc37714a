// Package gatehttp answers HTTP requests with byok-gate's decision: pass, or a finished 400, 422, 500 or 503.
//
// It works with any [http.ResponseWriter] and [http.Request]. With gin these are c.Writer and c.Request:
//
//	allowed, passed := gatehttp.Decide(c.Writer, c.Request, gate, request)
//	if !passed {
//		c.Abort()
//		return
//	}
//
// For routers with middleware (chi, [http.ServeMux]) use [Middleware]; for frameworks with their own writer (echo, fiber) use [AnswerFor],
// which returns the answer as a value.
package gatehttp

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// Decide calls byok-gate, and answers unless the workspace may start. If it returns false, the response is finished: write nothing more to
// it, and start nothing.
func Decide(
	w http.ResponseWriter, r *http.Request, gate byokgate.Decider, request byokgate.Request,
) (allowed byokgate.Allowed, passed bool) {
	if gate == nil {
		// Like a closed client.
		gate = (*byokgate.Client)(nil)
	}
	allowed, err := gate.Decide(contextOf(r), request)
	if err != nil {
		Refuse(w, err)
		return byokgate.Allowed{}, false
	}
	return allowed, true
}

// Report calls without obeying: nothing is written, and the handler goes on. It takes as long as [Decide] would; Reporter.Go does not wait.
func Report(r *http.Request, reporter *byokgate.Reporter, request byokgate.Request) byokgate.Report {
	return reporter.Report(contextOf(r), request)
}

// contextOf is the request's context. A nil request has none.
func contextOf(r *http.Request) context.Context {
	if r == nil {
		return context.Background()
	}
	return r.Context()
}

// Refuse writes the answer for an error of [byokgate.Client]. Any other error becomes a 503 without its text, which may hold what no tenant
// should read.
func Refuse(w http.ResponseWriter, err error) {
	if w == nil {
		return
	}
	answer := AnswerFor(err)
	header := w.Header()
	for name, values := range answer.Header {
		header[name] = values
	}
	w.WriteHeader(answer.Status)
	// The status is sent: now only a caller that hung up can go wrong.
	_, _ = w.Write(answer.Body)
}

// Answer is an HTTP response.
type Answer struct {
	Status int
	Header http.Header
	// Body is JSON, as docs/denial-body.schema.json describes it.
	Body []byte
}

// AnswerFor is the answer for an error of [byokgate.Client], as [Refuse] would write it. With echo:
//
//	answer := gatehttp.AnswerFor(err)
//	maps.Copy(c.Response().Header(), answer.Header)
//	return c.Blob(answer.Status, answer.Header.Get("Content-Type"), answer.Body)
func AnswerFor(err error) Answer {
	refusal := byokgate.RefusalOf(err)
	answer := Answer{Status: refusal.HTTPStatus(), Body: append(refusal.JSON(), '\n'), Header: http.Header{
		"Content-Type": {"application/json"},
		// A decision must not be cached.
		"Cache-Control": {"no-store"},
	}}
	if refusal.Retryable() {
		answer.Header.Set("Retry-After", retryAfter(refusal.RetryAfter()))
	}
	return answer
}

// === Middleware ===

type allowedKey struct{}

// Middleware passes a request to the handler if its workspace may start, and answers it otherwise. The handler gets the allow with
// [AllowedFor]. The function makes the byok-gate request; its error is answered as [Refuse] does. A function that reads the body must
// replace it.
func Middleware(
	gate byokgate.Decider, ask func(*http.Request) (byokgate.Request, error),
) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		if ask == nil || next == nil {
			return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { Refuse(w, errNothingToAsk) })
		}
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			request, err := ask(r)
			if err != nil {
				Refuse(w, err)
				return
			}
			if allowed, passed := Decide(w, r, gate, request); passed {
				next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), allowedKey{}, allowed)))
			}
		})
	}
}

var errNothingToAsk = errors.New("gatehttp: Middleware has no function that says what is asked, or no handler")

// AllowedFor is the allow with which [Middleware] passed the request. False: it passed no [Middleware], and nothing may start.
func AllowedFor(r *http.Request) (byokgate.Allowed, bool) {
	allowed, passed := contextOf(r).Value(allowedKey{}).(byokgate.Allowed)
	return allowed, passed
}

// === Trace context ===

// TrustTrace is the request with its W3C trace context in its context, so that byok-gate's spans are children of the caller's. Use it only
// if the caller is trusted to choose a trace id, such as behind an ingress that sets the header: otherwise a tenant could join another's
// trace, or have all of their calls sampled.
func TrustTrace(r *http.Request) *http.Request {
	if r == nil {
		return nil
	}
	return r.WithContext(byokgate.ContextWithTrace(r.Context(), r.Header.Get("traceparent"), r.Header.Get("tracestate")))
}

// retryAfter is in whole seconds, as the header requires; rounded up and never 0, which would cause a busy loop.
func retryAfter(pause time.Duration) string {
	return strconv.FormatInt(int64(max(1, (pause+time.Second-1)/time.Second)), 10)
}
