package byokgate

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// However a value is printed, logged or marshalled, alone or deep inside something else, it does not show.
func TestASecretDoesNotShow(t *testing.T) {
	const value = keyMark + "secret"
	secret := NewSecret(value)
	request := acme()
	request.Spec.Lookup = Static(Found{"ACME_API_KEY": secret}, nil)
	var shown bytes.Buffer
	for _, holder := range []any{
		secret, &secret, Found{"ACME_API_KEY": secret}, []Secret{secret}, map[string]any{"deep": []any{&secret}},
		struct{ Secret Secret }{secret}, struct{ hidden Secret }{secret},
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%T", "%08.3f", "%c", "%U"} {
			fmt.Fprintf(&shown, verb+"\n", holder)
		}
		text, err := json.Marshal(holder)
		fmt.Fprintln(&shown, string(text), err)
		for _, handler := range []slog.Handler{slog.NewJSONHandler(&shown, nil), slog.NewTextHandler(&shown, nil)} {
			slog.New(handler).Info("-", "holder", holder, slog.Group("group", "holder", holder))
		}
	}
	fmt.Fprintf(&shown, "%v %+v %#v", request, request, request)
	if text, err := xml.Marshal(secret); err == nil {
		shown.Write(text)
	}
	_ = gob.NewEncoder(&shown).Encode(struct{ Secret Secret }{secret})
	fmt.Fprintln(&shown, secret.String(), secret.GoString(), fmt.Errorf("%w %v", fmt.Errorf("%v", secret), secret))
	for _, form := range []string{value, fmt.Sprintf("%x", value), fmt.Sprintf("%X", value), strings.TrimPrefix(fmt.Sprintf("%v", []byte(value)), "[")} {
		if strings.Contains(shown.String(), form) {
			t.Errorf("shown as %q in:\n%s", form, shown.String())
		}
	}
	if !strings.Contains(shown.String(), redacted) {
		t.Error("nothing was shown at all")
	}
	if secret.Reveal() != value || !secret.Readable() {
		t.Error("the value is lost")
	}
}

func TestTheZeroSecretIsUnreadable(t *testing.T) {
	if (Secret{}).Readable() || Unreadable().Readable() || (Secret{}).Reveal() != "" || !NewSecret("").Readable() {
		t.Error("a forgotten secret is not unreadable")
	}
}

func TestSecretsAreReadFromJSON(t *testing.T) {
	var payload struct{ Secrets map[string]Secret }
	if err := json.Unmarshal([]byte(`{"secrets":{"A":"`+keyMark+`\n","B":""}}`), &payload); err != nil {
		t.Fatal(err)
	}
	if payload.Secrets["A"].Reveal() != keyMark+"\n" || !payload.Secrets["B"].Readable() {
		t.Error("read wrongly")
	}
	for _, text := range []string{`{"secrets":{"A":12345678}}`, `{"secrets":{"A":null}}`, `{"secrets":{"A":["` + keyMark + `"]}}`} {
		if err := json.Unmarshal([]byte(text), &payload); err == nil || strings.Contains(err.Error(), keyMark) || strings.Contains(err.Error(), "1234") {
			t.Errorf("%v", err)
		}
	}
}
