package com.byokgate.example;

import com.byokgate.v1.Checkpoint;
import com.byokgate.v1.OperatorOverride;
import com.byokgate.v1.PlatformProxy;
import com.byokgate.v1.Scope;
import com.google.gson.Gson;
import io.grpc.MethodDescriptor;
import io.grpc.Server;
import io.grpc.ServerServiceDefinition;
import io.grpc.ServiceDescriptor;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import io.grpc.stub.ServerCalls;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Objects;

/** The servers for the tests: the real ones that with-servers started, and one that sends given bytes. */
final class Servers {
    record Started(Map<String, String> servers, Map<String, String> files) {}

    record CredentialText(String env_name, String scope, String value, boolean unreadable) {}

    record SpecText(
            String runtime,
            String model,
            String organization_id,
            List<CredentialText> credentials,
            List<String> unreadable_scopes,
            String operator_override,
            String platform_proxy) {
        /** A spec from cases.json. */
        Spec spec() {
            return new Spec(
                    runtime,
                    model,
                    "",
                    Objects.requireNonNullElse(organization_id, ""),
                    Objects.requireNonNullElse(credentials, List.<CredentialText>of()).stream()
                            .map(held -> new Credential(
                                    held.env_name,
                                    Scope.valueOf("SCOPE_" + held.scope),
                                    held.unreadable ? Secret.UNREADABLE : new Secret(held.value)))
                            .toList(),
                    Objects.requireNonNullElse(unreadable_scopes, List.<String>of()).stream()
                            .map(scope -> Scope.valueOf("SCOPE_" + scope))
                            .toList(),
                    OperatorOverride.valueOf("OPERATOR_OVERRIDE_" + Objects.requireNonNullElse(operator_override, "UNSPECIFIED")),
                    PlatformProxy.valueOf("PLATFORM_PROXY_" + Objects.requireNonNullElse(platform_proxy, "UNSPECIFIED")),
                    List.of());
        }
    }

    record Expected(
            String allowed,
            List<String> warnings,
            boolean undecided,
            String refused,
            boolean retryable,
            Long retry_after_seconds,
            String message,
            String remedy,
            List<String> missing_env,
            List<String> alternative_models) {}

    record Case(String name, String server, String checkpoint, SpecText before, SpecText spec, Expected expect) {
        Checkpoint at() {
            return Checkpoint.valueOf("CHECKPOINT_" + checkpoint);
        }

        @Override
        public String toString() {
            return name;
        }
    }

    record Cases(List<Case> cases) {}

    record Reply(String name, String hex, String column, Expected expect) {
        byte[] bytes() {
            return HexFormat.of().parseHex(hex);
        }

        @Override
        public String toString() {
            return name;
        }
    }

    record Replies(List<Reply> replies) {}

    private static final Started STARTED = json(
            Objects.requireNonNull(System.getenv("BYOK_GATE_SERVERS"), "BYOK_GATE_SERVERS is not set: run the tests by with-servers"),
            Started.class);
    static final List<Case> CASES = json(file("cases"), Cases.class).cases();
    static final List<Reply> REPLIES = json(file("replies"), Replies.class).replies();

    static String server(String name) {
        return Objects.requireNonNull(STARTED.servers().get(name), name);
    }

    static String file(String name) {
        return Objects.requireNonNull(STARTED.files().get(name), name);
    }

    private static <T> T json(String path, Class<T> type) {
        try {
            return new Gson().fromJson(Files.readString(Path.of(path)), type);
        } catch (IOException fault) {
            throw new UncheckedIOException(fault);
        }
    }

    /** Bytes as they are. */
    static final MethodDescriptor.Marshaller<byte[]> BYTES = new MethodDescriptor.Marshaller<>() {
        @Override
        public InputStream stream(byte[] value) {
            return new ByteArrayInputStream(value);
        }

        @Override
        public byte[] parse(InputStream stream) {
            try {
                return stream.readAllBytes();
            } catch (IOException fault) {
                throw new UncheckedIOException(fault);
            }
        }
    };

    static final MethodDescriptor<byte[], byte[]> DECIDE = MethodDescriptor.newBuilder(BYTES, BYTES)
            .setType(MethodDescriptor.MethodType.UNARY)
            .setFullMethodName("byokgate.v1.PolicyDecisionService/Decide")
            .build();

    /** A server whose Decide answers with bytes. */
    static final class Fake implements AutoCloseable {
        private final Server server;

        Fake(ServerCalls.UnaryMethod<byte[], byte[]> answering) throws IOException {
            ServiceDescriptor service = ServiceDescriptor.newBuilder("byokgate.v1.PolicyDecisionService")
                    .addMethod(DECIDE)
                    .build();
            server = NettyServerBuilder.forAddress(new InetSocketAddress(InetAddress.getLoopbackAddress(), 0))
                    .addService(ServerServiceDefinition.builder(service)
                            .addMethod(DECIDE, ServerCalls.asyncUnaryCall(answering))
                            .build())
                    .build()
                    .start();
        }

        static Fake sending(byte[] reply) throws IOException {
            return new Fake((request, observer) -> {
                observer.onNext(reply);
                observer.onCompleted();
            });
        }

        String address() {
            return "127.0.0.1:" + server.getPort();
        }

        @Override
        public void close() {
            server.shutdownNow();
        }
    }

    private Servers() {}
}
