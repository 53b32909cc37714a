package byokgate

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// Code is the reason for a denial, for programs, such as MISSING_BYOK_CREDENTIAL. A byok-gate that is newer than this package may send an
// unknown one: that is still a denial, and reads DENY_CODE_ and its number.
//
// A Code is an error, so that errors.Is(err, byokgate.MissingBYOKCredential) checks for that reason.
type Code string

// DecisionUnavailable is the code if byok-gate made no decision, or none that this package can read.
const DecisionUnavailable Code = "DECISION_UNAVAILABLE"

// Error is the code itself.
func (c Code) Error() string { return string(c) }

// WarningCode identifies a warning, such as CREDENTIAL_UNVERIFIED. An unknown one reads WARNING_CODE_ and its number.
type WarningCode string

// Verdict is what is known of a credential. Empty if none had to be checked; an unknown one reads VERDICT_ and its number.
type Verdict string

// The kinds of errors of this package, for [errors.Is].
var (
	// ErrDenied is every [*Denied].
	ErrDenied = errors.New("byokgate: denied")
	// ErrUndecided is every [*Undecided].
	ErrUndecided = errors.New("byokgate: undecided")
)

const (
	checkpointPrefix = "CHECKPOINT_"
	denyPrefix       = "DENY_CODE_"
	scopePrefix      = "SCOPE_"
	servedPrefix     = "SERVED_FROM_"
	verdictPrefix    = "VERDICT_"
	warningPrefix    = "WARNING_CODE_"
	unspecified      = "UNSPECIFIED"
)

// shortName is an enum value's name without its enum's prefix. An unknown number keeps the prefix, so that nobody acts on it and it can be
// looked up.
func shortName(value protoreflect.Enum, prefix string) string {
	known := value.Descriptor().Values().ByNumber(value.Number())
	if known == nil {
		return fmt.Sprint(prefix, value.Number())
	}
	return strings.TrimPrefix(string(known.Name()), prefix)
}
