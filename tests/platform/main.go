// Command platform serves the calling platform's API, for the tests and for trying byok-gate out by hand.
package main

import (
	"context"
	"flag"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/byok-gate/byok-gate/tests/platform/internal/platform"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:8080", "where to serve HTTP")
	gate := flag.String("byok-gate", "", "where byok-gate listens: host:port, or unix:///path (required)")
	timeout := flag.Duration("timeout", platform.DefaultTimeout, "how long one decision may take")
	flag.Parse()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if *gate == "" || *timeout <= 0 || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := serve(*listen, *gate, *timeout, log); err != nil {
		log.Error("stopped", "reason", err.Error())
		os.Exit(1)
	}
}

func serve(listen, address string, timeout time.Duration, log *slog.Logger) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	gate, err := platform.NewGate(address, timeout, log)
	if err != nil {
		return err
	}
	defer gate.Close()
	server := &http.Server{
		Addr:              listen,
		Handler:           platform.Handler(gate, platform.NewStore()),
		ReadHeaderTimeout: 5 * time.Second,
	}
	failed := make(chan error, 1)
	go func() { failed <- server.ListenAndServe() }()
	log.Info("serving", "listen", listen, "byok_gate", address)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	// As long as one decision may take: requests under way finish.
	ctx, cancel := context.WithTimeout(context.Background(), timeout+time.Second)
	defer cancel()
	return server.Shutdown(ctx)
}
