package byokgate

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// Code is the machine's reason for a denial, such as MISSING_BYOK_CREDENTIAL. A byok-gate that is newer than this package may send one
// that it does not know: that is a denial all the same, and reads DENY_CODE_ and its number.
//
// A Code is an error, so that errors.Is(err, byokgate.MissingBYOKCredential) tells whether that is the reason.
type Code string

// DecisionUnavailable is the code where byok-gate made no decision, or none that this package can read.
const DecisionUnavailable Code = "DECISION_UNAVAILABLE"

// Error is the code itself.
func (c Code) Error() string { return string(c) }

// WarningCode is the machine's name for a warning, such as CREDENTIAL_UNVERIFIED. One that this package does not know reads WARNING_CODE_
// and its number.
type WarningCode string

// Verdict is what is known of a credential. Empty where none had to be judged; one that this package does not know reads VERDICT_ and its
// number.
type Verdict string

// What an error of this package is, for [errors.Is].
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

// shortName is an enum value's name without the prefix that its enum gives it. A number that this package does not know keeps the prefix,
// so that it is no word that anybody acts on, and can be looked up.
func shortName(value protoreflect.Enum, prefix string) string {
	known := value.Descriptor().Values().ByNumber(value.Number())
	if known == nil {
		return fmt.Sprint(prefix, value.Number())
	}
	return strings.TrimPrefix(string(known.Name()), prefix)
}
