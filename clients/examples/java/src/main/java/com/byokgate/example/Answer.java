package com.byokgate.example;

import java.util.List;
import java.util.Map;

/**
 * What came of asking. Only {@code answer instanceof Allowed allowed} may start anything.
 *
 * <p>Its parts are safe to log: names, ids and sentences, and no credential.
 */
public sealed interface Answer {
    /** Who pays. A mode that a later byok-gate knows is unknown here until it is added here. */
    enum BillingMode {
        PLATFORM_MANAGED,
        BYOK,
        NONE
    }

    /**
     * The workspace may start.
     *
     * @param warnings what a person should know, by name. CREDENTIAL_UNVERIFIED: the key could not be verified, and policy allows that
     */
    record Allowed(BillingMode billingMode, String decisionId, String provider, List<String> warnings) implements Answer {}

    /** The reason not to start, ready to be answered with. */
    sealed interface Refusal extends Answer {
        int httpStatus();

        /** For the tenant. */
        String message();

        /** In whole seconds. 0 unless the status is 503. */
        long retryAfter();

        default Map<String, String> httpHeaders() {
            // A decision is for this moment alone.
            return httpStatus() == 503
                    ? Map.of("Cache-Control", "no-store", "Retry-After", Long.toString(retryAfter()))
                    : Map.of("Cache-Control", "no-store");
        }
    }

    /**
     * The workspace must not start. Message and remedy are for the tenant.
     *
     * @param code such as MISSING_BYOK_CREDENTIAL, or DENY_CODE_999 where this program does not know the code. It is a denial all the same
     */
    record Refused(
            String code,
            String message,
            String remedy,
            List<String> missingEnv,
            List<String> alternativeModels,
            boolean retryable,
            long retryAfter,
            String decisionId,
            String provider)
            implements Refusal {
        @Override
        public int httpStatus() {
            return retryable ? 503 : 422;
        }
    }

    /**
     * There is no decision, so nothing may start.
     *
     * @param httpStatus 400: the request is at fault. 500: the platform is not wired to byok-gate, which no tenant can help. 503: try again
     * @param grpcCode gRPC's code, such as UNAVAILABLE. OK where the reply could not be understood
     * @param reason byok-gate's ErrorReason, such as DRAINING. Empty if byok-gate did not say
     * @param fields the fields of the request that are at fault
     */
    record Undecided(int httpStatus, String message, String grpcCode, String reason, List<String> fields, long retryAfter)
            implements Refusal {}
}
