package byokgate

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Every Go example in the README is a program that compiles.
func TestTheREADMEsExamplesCompile(t *testing.T) {
	examples := 0
	for _, readme := range []string{"../README.md"} {
		text, err := os.ReadFile(readme)
		if err != nil {
			t.Fatal(err)
		}
		for _, rest := range strings.Split(string(text), "```go\n")[1:] {
			example, _, closed := strings.Cut(rest, "\n```")
			if !closed {
				t.Fatalf("%s: an example without an end", readme)
			}
			examples++
			source := filepath.Join(t.TempDir(), "main.go")
			if err := os.WriteFile(source, []byte(example+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			build := exec.Command("go", "vet", source)
			build.Dir = ".."
			if output, err := build.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", readme, err, output)
			}
		}
	}
	if examples == 0 {
		t.Error("there is no example")
	}
}
