package byokgate

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// maxTokenBytes is far above any bearer token, and keeps a wrong file out of a header.
const maxTokenBytes = 8 * 1024

// tokenAge is how long a token from a file is used without reading the file again.
const tokenAge = time.Second

// token is the client's bearer token. A file is read in the background, so that a file that hangs or is being written blocks no call;
// meanwhile the last token is sent.
type token struct {
	// path is empty for a token without a file.
	path string

	mu    sync.Mutex
	value string
	// changes counts the values.
	changes int
	looked  time.Time
	// reading is closed when the current read ends. Nil if there is none.
	reading chan struct{}
	fault   error
}

// bearer sends a token with every call. New checks whether the connection may carry one.
type bearer struct{ token *token }

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + b.token.show()}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (bearer) RequireTransportSecurity() bool { return false }

func (t *token) show() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.path != "" && time.Since(t.looked) > tokenAge {
		t.readAgain()
	}
	return t.value
}

// readAgain starts a read, unless one is running. Locked.
func (t *token) readAgain() chan struct{} {
	if t.reading == nil {
		done := make(chan struct{})
		t.reading = done
		go func() {
			value, err := readToken(t.path)
			t.mu.Lock()
			defer t.mu.Unlock()
			t.reading, t.looked, t.fault = nil, time.Now(), err
			if err == nil && value != t.value {
				t.value, t.changes = value, t.changes+1
			}
			close(done)
		}()
	}
	return t.reading
}

// generation is how often the token has changed.
func (t *token) generation() int {
	if t == nil {
		return 0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.changes
}

// renewed reads the file now, since byok-gate did not know the token, and says whether the token differs from that generation's.
func (t *token) renewed(ctx context.Context, generation int) bool {
	if t == nil || t.path == "" {
		return false
	}
	t.mu.Lock()
	done := t.readAgain()
	t.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
	}
	return t.generation() != generation
}

// unreadable says that the current token is an old one, since its file cannot be read.
func (t *token) unreadable() bool {
	if t == nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.fault != nil
}

// checkToken does not quote the token.
func checkToken(token string) (string, error) {
	switch {
	case token == "":
		return "", errors.New("is empty")
	case len(token) > maxTokenBytes:
		return "", fmt.Errorf("is longer than %d bytes", maxTokenBytes)
	case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return "", errors.New("holds white space, control characters or non-ASCII")
	}
	return token, nil
}

func readToken(path string) (string, error) {
	text, err := readFile(path)
	if err != nil {
		return "", err
	}
	token, err := checkToken(strings.TrimRight(string(text), "\r\n"))
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return token, nil
}
