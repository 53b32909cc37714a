/** The minimum for a caller of the generated code. docs/other-languages.md shows it. */
import type { PolicyDecisionServiceClient } from "./generated/byokgate/v1/PolicyDecisionService.js";
import type { DecideRequest } from "./generated/byokgate/v1/DecideRequest.js";
import type { BillingMode__Output as BillingMode } from "./generated/byokgate/v1/BillingMode.js";

// On the page from here.
const KNOWN = ["BILLING_MODE_PLATFORM_MANAGED", "BILLING_MODE_BYOK", "BILLING_MODE_NONE"];

/** Who pays, or undefined: nothing starts. */
export function billingMode(client: PolicyDecisionServiceClient, request: DecideRequest): Promise<BillingMode | undefined> {
  return new Promise((resolve) =>
    client.decide(request, { deadline: Date.now() + 4000 }, (error, r) => {
      if (error || r?.decision !== "allow") return resolve(undefined); // no decision, a denial, or an unknown member
      const mode = r.allow?.billingMode; // a number if the mode is unknown
      resolve(KNOWN.includes(String(mode)) ? mode : undefined);
    }),
  );
}
