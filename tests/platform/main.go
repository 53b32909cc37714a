// Command platform serves the calling platform's API, to try byok-gate by hand.
package main

import (
	"context"
	"encoding/hex"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
	"github.com/byok-gate/byok-gate/tests/platform/internal/platform"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:8080", "where to serve HTTP")
	gate := flag.String("byok-gate", "", "where byok-gate listens: host:port, or unix:///path (required)")
	database := flag.String("database", "", "PostgreSQL, as a URL (required)")
	keyFile := flag.String("key-file", "", "holds the key that encrypts secrets, as 64 hex digits (required)")
	schema := flag.Bool("schema", false, "make the tables first")
	flag.Parse()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if *gate == "" || *database == "" || *keyFile == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := serve(*listen, *gate, *database, *keyFile, *schema, log); err != nil {
		log.Error("stopped", "reason", err.Error())
		os.Exit(1)
	}
}

func serve(listen, address, database, keyFile string, schema bool, log *slog.Logger) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	text, err := os.ReadFile(keyFile)
	if err != nil {
		return err
	}
	key, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		// The decoder's error quotes the file.
		return fmt.Errorf("%s: is not hexadecimal", keyFile)
	}
	vault, err := platform.NewVault(key)
	if err != nil {
		return err
	}
	pool, err := pgxpool.New(ctx, database)
	if err != nil {
		return err
	}
	defer pool.Close()
	if schema {
		if _, err := pool.Exec(ctx, platform.Schema); err != nil {
			return err
		}
	}
	gate, err := byokgate.New(address, byokgate.WithLogger(log))
	if err != nil {
		return err
	}
	defer gate.Close()
	handler := platform.NewServer(gate, platform.NewStore(pool, vault, log), log)
	defer handler.Close()
	server := &http.Server{Addr: listen, Handler: handler, ReadHeaderTimeout: 5 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- server.ListenAndServe() }()
	log.Info("serving", "listen", listen, "byok_gate", address)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	// As long as one batch may take: requests in flight finish.
	ctx, cancel := context.WithTimeout(context.Background(), byokgate.DefaultBatchTimeout+time.Second)
	defer cancel()
	return server.Shutdown(ctx)
}
