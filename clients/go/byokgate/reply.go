package byokgate

import (
	byokgatev1 "github.com/byok-gate/byok-gate/clients/go/byokgate/v1"
)

// read turns byok-gate's reply into the caller's answer: the only place where an Allowed is made.
//
// INVARIANT (sealed): an Allowed comes from a reply whose decision is "allow", whose billing mode is known, with a resolution
// of the same mode, and with a decision id. An unknown reply from a newer byok-gate, or an empty one from a broken one, is not
// an allow.
func read(spec *Spec, response *byokgatev1.DecideResponse) (Allowed, Refusal) {
	switch decision := response.GetDecision().(type) {
	case *byokgatev1.DecideResponse_Allow:
		mode := billingMode(decision.Allow.GetBillingMode())
		switch {
		case decision.Allow == nil:
			return Allowed{}, unreadable(spec, response, "an allow without content")
		case mode == UnknownBilling:
			return Allowed{}, unreadable(spec, response, "an allow that does not say who pays")
		case billingMode(response.GetResolution().GetBillingMode()) != mode:
			return Allowed{}, unreadable(spec, response, "an allow whose resolution says otherwise who pays")
		case response.GetDecisionId() == "":
			return Allowed{}, unreadable(spec, response, "an allow without an id")
		}
		return Allowed{response: response, mode: mode}, nil
	case *byokgatev1.DecideResponse_Deny:
		// With any code, and even without content: it is a denial.
		return Allowed{}, denied(spec, response, decision.Deny)
	default:
		return Allowed{}, unreadable(spec, response, "neither an allow nor a denial")
	}
}

// billingMode is exhaustive by hand: a mode that is added to the proto is unknown until it is added here.
func billingMode(mode byokgatev1.BillingMode) BillingMode {
	switch mode {
	case byokgatev1.BillingMode_BILLING_MODE_PLATFORM_MANAGED:
		return PlatformManaged
	case byokgatev1.BillingMode_BILLING_MODE_BYOK:
		return BYOK
	case byokgatev1.BillingMode_BILLING_MODE_NONE:
		return NoBilling
	default:
		return UnknownBilling
	}
}
