package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// sharedStore is a Redis or Valkey that the replicas of a storm share, with faults.
type sharedStore struct {
	server, folder, address, password string

	mu      sync.Mutex
	command *exec.Cmd
	// most is the size of the largest image of what it held.
	most int
}

// storeFaults are faults that the store's owner causes with a command, and the command that ends each.
var storeFaults = map[string][2][]string{
	"emptied":       {{"FLUSHALL"}, nil},
	"garbage":       {{"EVAL", "for _, key in ipairs(redis.call('KEYS', '*')) do redis.call('SET', key, 'garbage') end return 1", "0"}, nil},
	"out of memory": {{"CONFIG", "SET", "maxmemory", "1"}, {"CONFIG", "SET", "maxmemory", "0"}},
	"read-only":     {{"CONFIG", "SET", "min-replicas-to-write", "1"}, {"CONFIG", "SET", "min-replicas-to-write", "0"}},
	"busy":          {{"CLIENT", "PAUSE", "2000", "ALL"}, nil},
}

// startStore starts the server that this binary is.
func startStore(t *testing.T, server string) *sharedStore {
	t.Helper()
	s := &sharedStore{server: server, folder: t.TempDir(), address: freeAddress(t), password: keyMark + "store"}
	s.start(t)
	t.Cleanup(func() {
		s.signal(syscall.SIGCONT)
		s.kill()
	})
	eventually(t, "the store answers", func() bool { return s.does("PING") == nil })
	for name, content := range map[string]string{"password": s.password, "key": "made-up-key-of-the-tier-of-a-storm-0123456789"} {
		if err := os.WriteFile(filepath.Join(s.folder, name), []byte(content+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// settings are a replica's settings for it.
func (s *sharedStore) settings() string {
	return fmt.Sprintf("tier: {address: 'redis://%s', password_file: '%s', key_file: '%s'}\n",
		s.address, filepath.Join(s.folder, "password"), filepath.Join(s.folder, "key"))
}

func (s *sharedStore) start(t *testing.T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, port, err := net.SplitHostPort(s.address)
	if err != nil {
		t.Error(err)
		return
	}
	// An image of its data is written only when it is looked at, and then without compression, so that a credential in it would be seen.
	s.command = exec.Command(s.server, "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
		"--rdbcompression", "no", "--requirepass", s.password, "--dir", s.folder)
	if err := s.command.Start(); err != nil {
		t.Error(err)
	}
}

func (s *sharedStore) signal(signal os.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.command.Process.Signal(signal)
}

func (s *sharedStore) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.command.Process.Kill()
	_ = s.command.Wait()
}

// does sends a command as the store's owner.
func (s *sharedStore) does(words ...string) error {
	// A server that was just started may not listen yet.
	conn, err := net.DialTimeout("tcp", s.address, time.Second)
	for tries := 0; err != nil && tries < 100; tries++ {
		time.Sleep(50 * time.Millisecond)
		conn, err = net.DialTimeout("tcp", s.address, time.Second)
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
	for _, command := range [][]string{{"AUTH", s.password}, words} {
		fmt.Fprintf(conn, "*%d\r\n", len(command))
		for _, word := range command {
			fmt.Fprintf(conn, "$%d\r\n%s\r\n", len(word), word)
		}
		answer := make([]byte, 512)
		length, err := conn.Read(answer)
		if err != nil {
			return err
		}
		if answer[0] == '-' {
			return fmt.Errorf("%s: %s", command[0], bytes.TrimSpace(answer[1:length]))
		}
	}
	return nil
}

// wantNoSecrets expects no credential in what the store holds now.
func (s *sharedStore) wantNoSecrets(t *testing.T) error {
	t.Helper()
	if err := s.does("SAVE"); err != nil {
		return err
	}
	file, err := os.Open(filepath.Join(s.folder, "dump.rdb"))
	if err != nil {
		return err
	}
	defer file.Close()
	image, err := io.ReadAll(io.LimitReader(file, 1<<28))
	if err != nil {
		return err
	}
	if bytes.Contains(image, []byte(keyMark)) {
		t.Error("the store's image holds a credential")
	}
	s.most = max(s.most, len(image))
	return nil
}

// wantShared expects that the replicas ever shared something. At the end it may have been emptied a moment ago.
func (s *sharedStore) wantShared(t *testing.T) {
	t.Helper()
	if err := s.wantNoSecrets(t); err != nil {
		t.Errorf("the store's image: %v", err)
	}
	t.Logf("the store's largest image: %d bytes", s.most)
	if s.most < 1000 {
		t.Error("the replicas shared nothing")
	}
}
