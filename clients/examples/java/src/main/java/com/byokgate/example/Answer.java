package com.byokgate.example;

import java.util.List;
import java.util.Map;

/**
 * The answer. Only {@code answer instanceof Allowed allowed} may start anything.
 *
 * <p>Its parts are safe to log: names, ids and sentences, and no credential.
 */
public sealed interface Answer {
    /** Who pays. A mode of a later byok-gate is unknown until it is added here. */
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

    /** The reason not to start, with the HTTP answer. */
    sealed interface Refusal extends Answer {
        int httpStatus();

        /** For the tenant. */
        String message();

        /** In whole seconds. 0 unless the status is 503. */
        long retryAfter();

        default Map<String, String> httpHeaders() {
            // A decision must not be cached.
            return httpStatus() == 503
                    ? Map.of("Cache-Control", "no-store", "Retry-After", Long.toString(retryAfter()))
                    : Map.of("Cache-Control", "no-store");
        }
    }

    /**
     * The workspace must not start. Message and remedy are for the tenant.
     *
     * @param code such as MISSING_BYOK_CREDENTIAL, or DENY_CODE_999 for an unknown code, which is still a denial
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
     * @param httpStatus 400: the request is invalid. 500: the platform is misconfigured, which no tenant can fix. 503: try again
     * @param grpcCode gRPC's code, such as UNAVAILABLE. OK if the reply could not be understood
     * @param reason byok-gate's ErrorReason, such as DRAINING. Empty if byok-gate did not say
     * @param fields the invalid fields of the request
     */
    record Undecided(int httpStatus, String message, String grpcCode, String reason, List<String> fields, long retryAfter)
            implements Refusal {}
}
