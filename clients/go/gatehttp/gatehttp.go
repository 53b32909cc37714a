// Package gatehttp answers HTTP requests with what byok-gate decided: pass, or a finished 400, 422, 500 or 503.
//
// It works wherever there is an [http.ResponseWriter] and an [http.Request]. With gin these are c.Writer and c.Request:
//
//	allowed, passed := gatehttp.Decide(c.Writer, c.Request, client, request)
//	if !passed {
//		c.Abort()
//		return
//	}
package gatehttp

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// Decide asks, and answers unless the workspace may start. Where it returns false, the response is finished: write nothing
// more to it, and start nothing.
//
// The request's own trace context goes on to byok-gate, unless the client has another one.
func Decide(
	w http.ResponseWriter, r *http.Request, client *byokgate.Client, request byokgate.Request,
) (allowed byokgate.Allowed, passed bool) {
	allowed, err := client.Decide(Context(r), request)
	if err != nil {
		Refuse(w, err)
		return byokgate.Allowed{}, false
	}
	return allowed, true
}

// Report asks without obeying: nothing is written, whatever came of it, and the handler goes on.
func Report(r *http.Request, reporter *byokgate.Reporter, request byokgate.Request) byokgate.Report {
	return reporter.Report(Context(r), request)
}

// Refuse writes the answer for an error of [byokgate.Client]. Any other error becomes a 503 that does not repeat it: it may
// hold what no tenant should read.
func Refuse(w http.ResponseWriter, err error) {
	var refusal byokgate.Refusal = &byokgate.Undecided{}
	_ = errors.As(err, &refusal)
	header := w.Header()
	header.Set("Content-Type", "application/json")
	// A decision is for this moment alone.
	header.Set("Cache-Control", "no-store")
	if refusal.Retryable() {
		header.Set("Retry-After", retryAfter(refusal.RetryAfter()))
	}
	w.WriteHeader(refusal.HTTPStatus())
	// The status is sent: a caller that hung up is all that can go wrong now.
	_, _ = w.Write(append(refusal.JSON(), '\n'))
}

// Context is the request's, with its W3C trace context.
func Context(r *http.Request) context.Context {
	return byokgate.ContextWithTrace(r.Context(), r.Header.Get("traceparent"), r.Header.Get("tracestate"))
}

// retryAfter is in whole seconds, which is all that the header can say; rounded up and never 0, which would invite a busy
// loop.
func retryAfter(pause time.Duration) string {
	return strconv.FormatInt(int64(max(1, (pause+time.Second-1)/time.Second)), 10)
}
