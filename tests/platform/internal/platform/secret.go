package platform

// Secret is a credential's value. It prints as a placeholder, so that a careless log line or body cannot give it away; only
// string(secret) gives the value, and only gate.go says that.
//
// The generated messages have no such guard: the `debug_redact` option of Credential.value is not honoured by Go's
// String(). Never log a DecideRequest.
type Secret string

const redacted = "[redacted]"

// String is what fmt prints for %v and %s.
func (Secret) String() string { return redacted }

// GoString is what fmt prints for %#v.
func (Secret) GoString() string { return redacted }

// MarshalText is what encoding/json and slog's JSON handler write.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Secrets are the values at hand, by name, in the two scopes in which a platform stores them.
type Secrets struct {
	Workspace    map[string]Secret
	Organization map[string]Secret
}
