package byokgate

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// Secret is a credential's value, or the fact that it could not be read. It prints, logs and marshals as a placeholder, and
// cannot be compared.
//
// The zero Secret is unreadable, so that a forgotten assignment never counts as "no credential".
type Secret struct {
	// A function, since fmt and other printers read the unexported fields of a struct that holds a Secret without calling its
	// methods; nothing can read a function's value.
	reveal func() string
}

const redacted = "[redacted]"

// NewSecret holds a value. A blank one counts as absent, and in the workspace's scope it hides the organization's value of the
// same name. byok-gate decides that, so a blank value is sent too.
func NewSecret(value string) Secret { return Secret{reveal: func() string { return value }} }

// Unreadable is a secret that exists but could not be read or decrypted. It is the zero Secret.
func Unreadable() Secret { return Secret{} }

// Readable says whether there is a value.
func (s Secret) Readable() bool { return s.reveal != nil }

// Reveal returns the value: for storing or encrypting it, never for a log line. Empty if it is unreadable.
func (s Secret) Reveal() string {
	if s.reveal == nil {
		return ""
	}
	return s.reveal()
}

// String never shows the value.
func (Secret) String() string { return redacted }

// GoString never shows the value.
func (Secret) GoString() string { return redacted }

// Format never shows the value, with any verb.
func (Secret) Format(state fmt.State, _ rune) { _, _ = io.WriteString(state, redacted) }

// LogValue never shows the value.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON never shows the value.
func (Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// MarshalText never shows the value.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// UnmarshalJSON reads a value from a payload. The error does not quote it.
func (s *Secret) UnmarshalJSON(text []byte) error {
	if s == nil {
		return errors.New("byokgate: no secret to read into")
	}
	var value *string
	if json.Unmarshal(text, &value) != nil || value == nil {
		return fmt.Errorf("byokgate: a secret must be a JSON string")
	}
	*s = NewSecret(*value)
	return nil
}

// wire is the value as a proto string. Bytes that are not UTF-8 become U+FFFD, which no key contains: byok-gate refuses both in
// the same way, before it sends anything.
func (s Secret) wire() string { return strings.ToValidUTF8(s.Reveal(), "\uFFFD") }
