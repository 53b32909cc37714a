package platform

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/byok-gate/byok-gate/clients/go/byokgate"
)

// Vault encrypts secrets at rest with AES-256-GCM.
type Vault struct {
	aead cipher.AEAD
}

// place is where a secret is stored. A ciphertext that is copied elsewhere does not decrypt there.
type place struct {
	scope byokgate.Scope
	owner string
	name  string
}

// NewVault takes a key of 32 bytes.
func NewVault(key []byte) (*Vault, error) {
	if len(key) != 32 {
		return nil, fmt.Errorf("the encryption key has %d bytes, and must have 32", len(key))
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &Vault{aead: aead}, nil
}

func (v *Vault) seal(at place, secret byokgate.Secret) []byte {
	nonce := make([]byte, v.aead.NonceSize())
	_, _ = rand.Read(nonce) // never fails
	return v.aead.Seal(nonce, nonce, []byte(secret.Reveal()), at.bytes())
}

// open returns an unreadable secret if it does not decrypt: never none, and never an empty one.
func (v *Vault) open(at place, sealed []byte) (byokgate.Secret, error) {
	if len(sealed) < v.aead.NonceSize() {
		return byokgate.Unreadable(), errors.New("too short to be a ciphertext")
	}
	nonce, text := sealed[:v.aead.NonceSize()], sealed[v.aead.NonceSize():]
	value, err := v.aead.Open(nil, nonce, text, at.bytes())
	if err != nil {
		return byokgate.Unreadable(), err
	}
	return byokgate.NewSecret(string(value)), nil
}

func (p place) bytes() []byte { return fmt.Appendf(nil, "%v %q %q", p.scope, p.owner, p.name) }
