package com.byokgate.example;

import com.byokgate.v1.Allow;
import com.byokgate.v1.Checkpoint;
import com.byokgate.v1.DecideRequest;
import com.byokgate.v1.DecideResponse;
import com.byokgate.v1.Deny;
import com.byokgate.v1.PolicyDecisionServiceGrpc;
import com.byokgate.v1.WorkspaceSpec;
import com.google.protobuf.Any;
import com.google.protobuf.Duration;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.ChannelCredentials;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.netty.shaded.io.netty.channel.EventLoopGroup;
import io.grpc.netty.shaded.io.netty.channel.epoll.EpollDomainSocketChannel;
import io.grpc.netty.shaded.io.netty.channel.epoll.EpollEventLoopGroup;
import io.grpc.netty.shaded.io.netty.channel.unix.DomainSocketAddress;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.io.File;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.concurrent.TimeUnit;

/**
 * Asks byok-gate whether a workspace may start, and fails closed: only an {@link Answer.Allowed} may start anything.
 *
 * <pre>{@code
 * try (Gate gate = new Gate("unix:/run/byok-gate/gate.sock", Gate.Options.DEFAULT)) {
 *     Spec spec = Spec.of("claude-code", "claude-opus-4-8", List.of(new Credential("ANTHROPIC_API_KEY", SCOPE_WORKSPACE, new Secret(key))));
 *     Answer answer = gate.decide(spec, Checkpoint.CHECKPOINT_CREATE);
 *     if (answer instanceof Answer.Allowed allowed) {
 *         insertWorkspace(allowed.billingMode());
 *     } else if (answer instanceof Answer.Refusal refusal) {
 *         respond(refusal.httpStatus(), refusal.httpHeaders(), refusal.message());
 *     }
 * }
 * }</pre>
 *
 * <p>One serves all threads of a process.
 */
public final class Gate implements AutoCloseable {
    private static final Metadata.Key<String> AUTHORIZATION = Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

    /** All calls are read-only, so repeating one does no harm. The call's deadline limits all attempts together. */
    private static final Map<String, ?> SERVICE_CONFIG = Map.of(
            "methodConfig",
            List.of(Map.of(
                    "name", List.of(Map.of("service", PolicyDecisionServiceGrpc.SERVICE_NAME)),
                    "retryPolicy",
                            Map.of(
                                    "maxAttempts", 4.0,
                                    "initialBackoff", "0.05s",
                                    "maxBackoff", "0.5s",
                                    "backoffMultiplier", 2.0,
                                    "retryableStatusCodes", List.of("UNAVAILABLE")))));

    /** Files in PEM. Without ca the system's authorities are trusted. Certificate and key are the client's own (mTLS). */
    public record Tls(Optional<File> ca, Optional<File> certificate, Optional<File> key) {}

    /**
     * How to call.
     *
     * @param tokenFile a file with the bearer token. Read for each call, so that the token can be rotated
     */
    public record Options(java.time.Duration timeout, Optional<Tls> tls, Optional<Path> tokenFile) {
        /** byok-gate gives a provider three seconds to answer; a caller that waits a little longer gets the result. */
        public static final Options DEFAULT = new Options(java.time.Duration.ofSeconds(4), Optional.empty(), Optional.empty());
    }

    private final Options options;
    private final ManagedChannel channel;
    private final Optional<EventLoopGroup> ownThreads;

    /** The target is HOST:PORT or unix:PATH. */
    public Gate(String target, Options options) throws IOException {
        if (options.timeout().compareTo(java.time.Duration.ofMillis(1)) < 0 || options.timeout().toSeconds() > 60) {
            throw new IllegalArgumentException("timeout: must be above 0 and at most 60 s; there is no call without a deadline");
        }
        if (options.tls().isEmpty() && !target.matches("unix:.*|(localhost|127\\.0\\.0\\.1|\\[::1]):\\d+")) {
            throw new IllegalArgumentException("tls: is needed beyond this host; whoever reads that network would read every credential");
        }
        this.options = options;
        ChannelCredentials credentials = options.tls().isPresent() ? credentials(options.tls().get()) : InsecureChannelCredentials.create();
        NettyChannelBuilder builder;
        if (target.startsWith("unix:")) {
            // By epoll, so on Linux only.
            ownThreads = Optional.of(new EpollEventLoopGroup(1));
            builder = NettyChannelBuilder.forAddress(new DomainSocketAddress(target.substring("unix:".length())), credentials)
                    .eventLoopGroup(ownThreads.get())
                    .channelType(EpollDomainSocketChannel.class)
                    .overrideAuthority("localhost");
        } else {
            ownThreads = Optional.empty();
            builder = NettyChannelBuilder.forTarget(target, credentials);
        }
        channel = builder.defaultServiceConfig(SERVICE_CONFIG)
                .enableRetry()
                // A setting of the machine must not send credentials through a proxy.
                .proxyDetector(address -> null)
                .build();
    }

    /** Calls byok-gate. Anything but a clear allow is a refusal. */
    public Answer decide(Spec spec, Checkpoint checkpoint) {
        Metadata metadata = new Metadata();
        if (options.tokenFile().isPresent()) {
            String token = token(options.tokenFile().get());
            if (token.isEmpty()) {
                return new Answer.Undecided(
                        500, "the platform is not wired to byok-gate (its token cannot be read)", "UNAUTHENTICATED", "", List.of(), 0);
            }
            metadata.put(AUTHORIZATION, "Bearer " + token);
        }
        try {
            return read(PolicyDecisionServiceGrpc.newBlockingStub(channel)
                    .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(metadata))
                    .withDeadlineAfter(options.timeout().toMillis(), TimeUnit.MILLISECONDS)
                    .decide(request(spec, checkpoint)));
        } catch (StatusRuntimeException error) {
            return undecided(error);
        }
    }

    @Override
    public void close() {
        channel.shutdownNow();
        ownThreads.ifPresent(threads -> threads.shutdownGracefully(0, 1, TimeUnit.SECONDS));
    }

    private static ChannelCredentials credentials(Tls tls) throws IOException {
        TlsChannelCredentials.Builder builder = TlsChannelCredentials.newBuilder();
        if (tls.ca().isPresent()) {
            builder.trustManager(tls.ca().get());
        }
        if (tls.certificate().isPresent() && tls.key().isPresent()) {
            builder.keyManager(tls.certificate().get(), tls.key().get());
        }
        return builder.build();
    }

    /** Empty where there is none, or what no header can hold. */
    private static String token(Path file) {
        try {
            String token = Files.readString(file, StandardCharsets.ISO_8859_1).strip();
            return token.matches("[!-~]+") ? token : "";
        } catch (IOException unreadable) {
            return "";
        }
    }

    /** The message that holds the credentials' values. Its toString prints them; DebugFormat does not. */
    static DecideRequest request(Spec spec, Checkpoint checkpoint) {
        WorkspaceSpec.Builder workspace = WorkspaceSpec.newBuilder()
                .setWorkspaceId(Secret.text(spec.workspaceId()))
                .setOrganizationId(Secret.text(spec.organizationId()))
                .setRuntime(Secret.text(spec.runtime()))
                .setModel(Secret.text(spec.model()))
                .addAllUnreadableScopes(spec.unreadableScopes())
                .setOperatorOverride(spec.operatorOverride())
                .setPlatformProxy(spec.platformProxy())
                .addAllTenantBaseUrlEnv(spec.tenantBaseUrlEnv().stream().map(Secret::text).toList());
        for (Credential held : spec.credentials()) {
            com.byokgate.v1.Credential.Builder credential = workspace.addCredentialsBuilder()
                    .setEnvName(Secret.text(held.envName()))
                    .setScope(held.scope());
            if (held.value() == Secret.UNREADABLE) {
                credential.setUnreadable(true);
            } else {
                credential.setValue(held.value().reveal());
            }
        }
        return DecideRequest.newBuilder().setCheckpoint(checkpoint).setWorkspaceSpec(workspace).build();
    }

    private static Answer read(DecideResponse reply) {
        // Unspecified on everything but an allow, and unrecognized for an unknown mode.
        Optional<Answer.BillingMode> billingMode = billingMode(reply.getAllow());
        if (billingMode.isPresent()) {
            return new Answer.Allowed(
                    billingMode.get(),
                    reply.getDecisionId(),
                    reply.getResolution().getProvider(),
                    reply.getWarningsList().stream()
                            .map(warning -> shortName("WARNING_CODE_", warning.getCode().name(), warning.getCodeValue()))
                            .toList());
        }
        if (reply.hasDeny()) {
            Deny deny = reply.getDeny();
            return new Answer.Refused(
                    // getCode().getNumber() throws for an unknown code; getCodeValue() does not.
                    shortName("DENY_CODE_", deny.getCode().name(), deny.getCodeValue()),
                    deny.getMessage(),
                    deny.getRemedy(),
                    deny.getMissingEnvList(),
                    deny.getAlternativeModelsList(),
                    deny.getRetryable(),
                    deny.getRetryable() ? seconds(deny.getRetryAfter()) : 0,
                    reply.getDecisionId(),
                    reply.getResolution().getProvider());
        }
        return new Answer.Undecided(503, "byok-gate's reply is of another version, and is taken for a no", "OK", "", List.of(), 1);
    }

    private static Optional<Answer.BillingMode> billingMode(Allow allow) {
        return switch (allow.getBillingMode()) {
            case BILLING_MODE_PLATFORM_MANAGED -> Optional.of(Answer.BillingMode.PLATFORM_MANAGED);
            case BILLING_MODE_BYOK -> Optional.of(Answer.BillingMode.BYOK);
            case BILLING_MODE_NONE -> Optional.of(Answer.BillingMode.NONE);
            case BILLING_MODE_UNSPECIFIED, UNRECOGNIZED -> Optional.empty();
        };
    }

    private static Answer.Undecided undecided(StatusRuntimeException error) {
        Status status = error.getStatus();
        String code = status.getCode().name();
        String reason = "";
        List<String> fields = new ArrayList<>();
        long retryAfter = 1;
        for (Any packed : details(error)) {
            try {
                if (packed.is(ErrorInfo.class)) {
                    ErrorInfo info = packed.unpack(ErrorInfo.class);
                    reason = info.getDomain().equals("byok-gate") ? info.getReason() : "";
                } else if (packed.is(BadRequest.class)) {
                    packed.unpack(BadRequest.class).getFieldViolationsList().forEach(violation -> fields.add(violation.getField()));
                } else if (packed.is(RetryInfo.class)) {
                    retryAfter = seconds(packed.unpack(RetryInfo.class).getRetryDelay());
                }
            } catch (InvalidProtocolBufferException garbled) {
                // The details are optional: the error counts without them.
            }
        }
        return switch (status.getCode()) {
            case INVALID_ARGUMENT ->
            // Names the invalid field. byok-gate never repeats a credential's value.
            new Answer.Undecided(
                    400, "the workspace cannot be judged: " + status.getDescription(), code, reason, List.copyOf(fields), 0);
            case UNAUTHENTICATED, PERMISSION_DENIED, UNIMPLEMENTED -> new Answer.Undecided(
                    500, "the platform is not wired to byok-gate (" + code + ")", code, reason, List.of(), 0);
            default -> new Answer.Undecided(503, "byok-gate made no decision (" + code + ")", code, reason, List.of(), retryAfter);
        };
    }

    /** None if they were garbled on the way. */
    private static List<Any> details(StatusRuntimeException error) {
        try {
            com.google.rpc.Status status = StatusProto.fromThrowable(error);
            return status == null ? List.of() : status.getDetailsList();
        } catch (IllegalArgumentException garbled) {
            return List.of();
        }
    }

    /** A value's name, without its enum's prefix if the value is known. */
    private static String shortName(String prefix, String name, int number) {
        if (name.equals("UNRECOGNIZED")) {
            return prefix + number;
        }
        return number == 0 ? name : name.substring(prefix.length());
    }

    /** Whole seconds, as Retry-After requires; rounded up and never 0, which would cause a busy loop. */
    private static long seconds(Duration time) {
        return Math.max(1, time.getSeconds() + (time.getNanos() > 0 ? 1 : 0));
    }
}
