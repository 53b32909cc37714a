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
// it does not compare.
//
// The zero Secret is unreadable, so that a forgotten assignment is never taken for "there is none".
type Secret struct {
	// A function, since fmt and other printers look into the unexported fields of a struct that holds a Secret without
	// asking its methods; nothing looks into a function.
	reveal func() string
}

const redacted = "[redacted]"

// NewSecret holds a value. A blank one counts as absent, and hides the organization's value of the same name where it stands
// in the workspace's scope; that is byok-gate's to judge, so it is sent as well.
func NewSecret(value string) Secret { return Secret{reveal: func() string { return value }} }

// Unreadable is a secret that exists but could not be read or decrypted. It is the zero Secret.
func Unreadable() Secret { return Secret{} }

// Readable says whether there is a value.
func (s Secret) Readable() bool { return s.reveal != nil }

// Reveal gives the value away: for storing or encrypting it, never for a log line. Empty if it is unreadable.
func (s Secret) Reveal() string {
	if s.reveal == nil {
		return ""
	}
	return s.reveal()
}

// String never tells the value.
func (Secret) String() string { return redacted }

// GoString never tells the value.
func (Secret) GoString() string { return redacted }

// Format never tells the value, whatever the verb.
func (Secret) Format(state fmt.State, _ rune) { _, _ = io.WriteString(state, redacted) }

// LogValue never tells the value.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON never tells the value.
func (Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// MarshalText never tells the value.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// UnmarshalJSON reads a value from a payload. The fault does not quote it.
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

// wire is the value as a proto string can hold it. Bytes that are not UTF-8 become U+FFFD, which is no key's character
// either: byok-gate refuses both in the same way, before it would send anything.
func (s Secret) wire() string { return strings.ToValidUTF8(s.Reveal(), "\uFFFD") }
