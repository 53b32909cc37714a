package com.byokgate.example;

import com.byokgate.v1.OperatorOverride;
import com.byokgate.v1.PlatformProxy;
import com.byokgate.v1.Scope;
import java.util.List;

/**
 * The workspace as it would start: the effective runtime and model, and the credentials that matter to them.
 *
 * @param unreadableScopes scopes that could not be listed at all
 */
public record Spec(
        String runtime,
        String model,
        String workspaceId,
        String organizationId,
        List<Credential> credentials,
        List<Scope> unreadableScopes,
        OperatorOverride operatorOverride,
        PlatformProxy platformProxy,
        List<String> tenantBaseUrlEnv) {
    public static Spec of(String runtime, String model, List<Credential> credentials) {
        return new Spec(
                runtime,
                model,
                "",
                "",
                credentials,
                List.of(),
                OperatorOverride.OPERATOR_OVERRIDE_UNSPECIFIED,
                PlatformProxy.PLATFORM_PROXY_UNSPECIFIED,
                List.of());
    }
}
