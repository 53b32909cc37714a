package com.byokgate.example;

import com.byokgate.v1.BillingMode;
import com.byokgate.v1.DecideRequest;
import com.byokgate.v1.DecideResponse;
import com.byokgate.v1.PolicyDecisionServiceGrpc.PolicyDecisionServiceBlockingStub;
import io.grpc.StatusRuntimeException;
import java.util.Optional;
import java.util.Set;
import java.util.concurrent.TimeUnit;

/** The minimum for a caller of the generated code. docs/other-languages.md shows it. */
final class FiveLines {
    // On the page from here.
    static final Set<BillingMode> KNOWN =
            Set.of(BillingMode.BILLING_MODE_PLATFORM_MANAGED, BillingMode.BILLING_MODE_BYOK, BillingMode.BILLING_MODE_NONE);

    /** Who pays, or empty: nothing starts. */
    static Optional<BillingMode> billingMode(PolicyDecisionServiceBlockingStub stub, DecideRequest request) {
        try {
            DecideResponse r = stub.withDeadlineAfter(4, TimeUnit.SECONDS).decide(request);
            return Optional.of(r.getAllow().getBillingMode()).filter(KNOWN::contains); // a denial is UNSPECIFIED
        } catch (StatusRuntimeException noDecision) {
            return Optional.empty();
        }
    }
    // To here.

    private FiveLines() {}
}
