package com.byokgate.example;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.byokgate.v1.Allow;
import com.byokgate.v1.BillingMode;
import com.byokgate.v1.Checkpoint;
import com.byokgate.v1.DecideResponse;
import com.byokgate.v1.Scope;
import com.google.gson.GsonBuilder;
import com.google.protobuf.Any;
import com.google.protobuf.Duration;
import com.google.protobuf.Message;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Context;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.ServerCalls;
import io.grpc.stub.StreamObserver;
import java.io.File;
import java.io.IOException;
import java.io.PrintWriter;
import java.io.StringWriter;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicReference;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.FieldSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/** {@code decide} against real servers, and against one that sends what no current server would. */
class GateTest {
    private static final String KEY = "made-up-live";
    private static final Spec LIVE = live("acme-large", "");

    static final List<Servers.Case> CASES = Servers.CASES;
    static final List<Servers.Reply> REPLIES = Servers.REPLIES;

    private static Spec live(String model, String workspace) {
        Spec spec = Spec.of("agent", model, List.of(new Credential("ACME_API_KEY", Scope.SCOPE_WORKSPACE, new Secret(KEY))));
        return new Spec(
                spec.runtime(),
                spec.model(),
                workspace,
                spec.organizationId(),
                spec.credentials(),
                spec.unreadableScopes(),
                spec.operatorOverride(),
                spec.platformProxy(),
                spec.tenantBaseUrlEnv());
    }

    private static Answer ask(String target, Spec spec, Checkpoint checkpoint, Gate.Options options) throws IOException {
        try (Gate gate = new Gate(target, options)) {
            return gate.decide(spec, checkpoint);
        }
    }

    private static Answer ask(String target) throws IOException {
        return ask(target, LIVE, Checkpoint.CHECKPOINT_CREATE, Gate.Options.DEFAULT);
    }

    private static Answer.Undecided undecided(int httpStatus, String grpcCode, String reason, Answer answer) {
        Answer.Undecided undecided = assertInstanceOf(Answer.Undecided.class, answer);
        assertEquals(
                List.of(httpStatus, grpcCode, reason), List.of(undecided.httpStatus(), undecided.grpcCode(), undecided.reason()));
        String retryAfter = undecided.httpHeaders().get("Retry-After");
        if (httpStatus == 503) {
            assertTrue(retryAfter.matches("[1-9][0-9]*"), retryAfter);
        } else {
            assertNull(retryAfter);
        }
        return undecided;
    }

    /** Checks that an answer is what cases.json or replies.json says. */
    private static void expect(Answer answer, Servers.Expected expected) {
        if (expected.allowed() != null) {
            Answer.Allowed allowed = assertInstanceOf(Answer.Allowed.class, answer);
            assertEquals(Answer.BillingMode.valueOf(expected.allowed()), allowed.billingMode());
            assertEquals(expected.warnings(), allowed.warnings());
            assertFalse(allowed.decisionId().isEmpty());
            return;
        }
        if (expected.undecided()) {
            Answer.Undecided undecided = assertInstanceOf(Answer.Undecided.class, answer);
            assertEquals(503, undecided.httpStatus());
            assertEquals("1", undecided.httpHeaders().get("Retry-After"));
            return;
        }
        Answer.Refused refused = assertInstanceOf(Answer.Refused.class, answer);
        assertEquals(expected.refused(), refused.code());
        assertEquals(expected.retryable(), refused.retryable());
        assertEquals(Objects.requireNonNullElse(expected.message(), refused.message()), refused.message());
        assertEquals(Objects.requireNonNullElse(expected.remedy(), refused.remedy()), refused.remedy());
        assertEquals(Objects.requireNonNullElse(expected.missing_env(), refused.missingEnv()), refused.missingEnv());
        assertEquals(
                Objects.requireNonNullElse(expected.alternative_models(), refused.alternativeModels()), refused.alternativeModels());
        assertEquals("no-store", refused.httpHeaders().get("Cache-Control"));
        if (expected.retryable()) {
            assertEquals(503, refused.httpStatus());
            assertTrue(refused.retryAfter() >= 1);
            assertEquals(Objects.requireNonNullElse(expected.retry_after_seconds(), refused.retryAfter()), refused.retryAfter());
            assertEquals(Long.toString(refused.retryAfter()), refused.httpHeaders().get("Retry-After"));
        } else {
            assertEquals(422, refused.httpStatus());
            assertNull(refused.httpHeaders().get("Retry-After"));
        }
    }

    // === Decisions of the real server ===

    @ParameterizedTest
    @FieldSource("CASES")
    void aDecisionOfTheRealServer(Servers.Case asked) throws IOException {
        Answer answer;
        try (Gate gate = new Gate(Servers.server(asked.server()), Gate.Options.DEFAULT)) {
            if (asked.before() != null) {
                gate.decide(asked.before().spec(), asked.at());
            }
            answer = gate.decide(asked.spec().spec(), asked.at());
        }
        expect(answer, asked.expect());
        if (answer instanceof Answer.Refused refused) {
            assertFalse(refused.message().isEmpty() || refused.remedy().isEmpty(), "a denial of the real server says why, and what to do");
        }
    }

    @Test
    void overAUnixSocket() throws IOException {
        assertInstanceOf(Answer.Allowed.class, ask(Servers.server("unix")));
    }

    private static Optional<File> pem(String name) {
        return Optional.of(new File(Servers.file(name)));
    }

    private static Gate.Options tls(Gate.Tls tls) {
        return new Gate.Options(Gate.Options.DEFAULT.timeout(), Optional.of(tls), Optional.empty());
    }

    @Test
    void tlsWithAClientCertificate() throws IOException {
        Gate.Options options = tls(new Gate.Tls(pem("ca"), pem("client_cert"), pem("client_key")));
        assertInstanceOf(
                Answer.Allowed.class, ask(Servers.server("mtls"), LIVE, Checkpoint.CHECKPOINT_CREATE, options));
    }

    static List<Gate.Tls> tlsThatDoesNotStand() {
        return List.of(
                new Gate.Tls(pem("ca"), Optional.empty(), Optional.empty()),
                new Gate.Tls(pem("other_ca"), pem("client_cert"), pem("client_key")));
    }

    @ParameterizedTest
    @MethodSource
    void tlsThatDoesNotStand(Gate.Tls tls) throws IOException {
        undecided(503, "UNAVAILABLE", "", ask(Servers.server("mtls"), LIVE, Checkpoint.CHECKPOINT_CREATE, tls(tls)));
    }

    @ParameterizedTest
    @ValueSource(strings = {"gate.example:50051", "dns:///localhost.example:50051", "10.0.0.1:50051", "127.0.0.1.example:50051"})
    void noPlainTextBeyondThisHost(String target) {
        Exception fault = assertThrows(IllegalArgumentException.class, () -> new Gate(target, Gate.Options.DEFAULT));
        assertTrue(fault.getMessage().startsWith("tls"));
    }

    @ParameterizedTest
    @ValueSource(longs = {0, -1, 61_000})
    void noCallWithoutADeadline(long milliseconds) {
        Gate.Options options = new Gate.Options(java.time.Duration.ofMillis(milliseconds), Optional.empty(), Optional.empty());
        Exception fault = assertThrows(IllegalArgumentException.class, () -> new Gate(Servers.server("plain"), options));
        assertTrue(fault.getMessage().contains("deadline"));
    }

    // === Errors of the real server ===

    private static Answer askWithToken(Optional<String> token, Spec spec, Checkpoint checkpoint) throws IOException {
        Gate.Options options = new Gate.Options(
                Gate.Options.DEFAULT.timeout(),
                Optional.of(new Gate.Tls(pem("ca"), Optional.empty(), Optional.empty())),
                token.map(name -> Path.of(Servers.file(name))));
        return ask(Servers.server("token"), spec, checkpoint, options);
    }

    @Test
    void aToken() throws IOException {
        assertInstanceOf(Answer.Allowed.class, askWithToken(Optional.of("token_platform"), LIVE, Checkpoint.CHECKPOINT_CREATE));
    }

    static List<Arguments> aCallerThatMayNotAsk() {
        return List.of(
                Arguments.of(Optional.empty(), "UNAUTHENTICATED", "TOKEN_MISSING"),
                Arguments.of(Optional.of("token_unknown"), "UNAUTHENTICATED", "TOKEN_UNKNOWN"),
                Arguments.of(Optional.of("token_operator"), "PERMISSION_DENIED", "METHOD_NOT_ALLOWED"),
                Arguments.of(Optional.of("token_workspace"), "PERMISSION_DENIED", "REQUEST_NOT_ALLOWED"));
    }

    @ParameterizedTest
    @MethodSource
    void aCallerThatMayNotAsk(Optional<String> token, String grpcCode, String reason) throws IOException {
        undecided(500, grpcCode, reason, askWithToken(token, LIVE, Checkpoint.CHECKPOINT_CREATE));
    }

    @Test
    void aLimitThatIsReached() throws IOException {
        // One call a minute.
        Answer answer = null;
        for (int call = 0; call < 2; call++) {
            answer = askWithToken(Optional.of("token_limited"), live("acme-large", "ws-2"), Checkpoint.CHECKPOINT_PROVISION);
        }
        undecided(503, "RESOURCE_EXHAUSTED", "LIMIT_REACHED", answer);
    }

    static List<Arguments> aRequestThatCannotBeJudged() {
        List<Credential> many = Stream.iterate(0, number -> number + 1)
                .limit(5)
                .map(number -> new Credential("MADE_UP_" + number, Scope.SCOPE_WORKSPACE, new Secret("k".repeat(60000))))
                .toList();
        return List.of(
                Arguments.of(live("m".repeat(513), ""), Checkpoint.CHECKPOINT_CREATE, "BAD_REQUEST", "workspace_spec.model"),
                Arguments.of(LIVE, Checkpoint.CHECKPOINT_UNSPECIFIED, "BAD_REQUEST", "checkpoint"),
                Arguments.of(Spec.of("agent", "acme-large", many), Checkpoint.CHECKPOINT_CREATE, "REQUEST_TOO_LARGE", null));
    }

    @ParameterizedTest
    @MethodSource
    void aRequestThatCannotBeJudged(Spec spec, Checkpoint checkpoint, String reason, String field) throws IOException {
        Answer.Undecided answer = undecided(
                400, "INVALID_ARGUMENT", reason, ask(Servers.server("plain"), spec, checkpoint, Gate.Options.DEFAULT));
        if (field != null) {
            assertEquals(List.of(field), answer.fields());
            assertTrue(answer.message().contains(field));
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"nobody", "not_grpc"})
    void nobodyWhoSpeaksGrpcIsThere(String server) throws IOException {
        Answer.Undecided answer = assertInstanceOf(Answer.Undecided.class, ask(Servers.server(server)));
        assertEquals(503, answer.httpStatus());
        assertEquals("", answer.reason());
    }

    // === Replies that no current server sends ===

    @ParameterizedTest
    @FieldSource("REPLIES")
    void aReplyAsBytes(Servers.Reply reply) throws IOException {
        try (Servers.Fake fake = Servers.Fake.sending(reply.bytes())) {
            expect(ask(fake.address()), reply.expect());
        }
    }

    /** A Decide that fails this many times, and then allows. */
    private record Failing(Status.Code code, List<Message> details, byte[] trailer, int times, AtomicInteger calls)
            implements ServerCalls.UnaryMethod<byte[], byte[]> {
        static final Metadata.Key<byte[]> DETAILS = Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

        static Failing with(Status.Code code, Message... details) {
            return new Failing(code, List.of(details), new byte[0], Integer.MAX_VALUE, new AtomicInteger());
        }

        static Failing torn(Status.Code code) {
            return new Failing(code, List.of(), new byte[] {0x1a, 0x7f}, Integer.MAX_VALUE, new AtomicInteger());
        }

        Failing only(int times) {
            return new Failing(code, details, trailer, times, calls);
        }

        @Override
        public void invoke(byte[] request, StreamObserver<byte[]> observer) {
            if (calls.incrementAndGet() > times) {
                observer.onNext(DecideResponse.newBuilder()
                        .setDecisionId("made-up")
                        .setAllow(Allow.newBuilder().setBillingMode(BillingMode.BILLING_MODE_BYOK))
                        .build()
                        .toByteArray());
                observer.onCompleted();
                return;
            }
            if (details.isEmpty()) {
                Metadata trailers = new Metadata();
                if (trailer.length > 0) {
                    trailers.put(DETAILS, trailer);
                }
                observer.onError(code.toStatus().withDescription("made up").asRuntimeException(trailers));
                return;
            }
            observer.onError(StatusProto.toStatusRuntimeException(com.google.rpc.Status.newBuilder()
                    .setCode(code.value())
                    .setMessage("made up")
                    .addAllDetails(details.stream().map(Any::pack).toList())
                    .build()));
        }
    }

    private static ErrorInfo info(String reason, String domain) {
        return ErrorInfo.newBuilder().setReason(reason).setDomain(domain).build();
    }

    private static ErrorInfo info(String reason) {
        return info(reason, "byok-gate");
    }

    private static RetryInfo retry(long seconds, int nanos) {
        return RetryInfo.newBuilder()
                .setRetryDelay(Duration.newBuilder().setSeconds(seconds).setNanos(nanos))
                .build();
    }

    static List<Arguments> anError() {
        return List.of(
                Arguments.of(Failing.with(Status.Code.UNAVAILABLE, info("DRAINING"), retry(0, 1)), 503, "DRAINING", "1"),
                Arguments.of(Failing.with(Status.Code.RESOURCE_EXHAUSTED, retry(9, 1)), 503, "", "10"),
                Arguments.of(Failing.with(Status.Code.DEADLINE_EXCEEDED, info("DEADLINE")), 503, "DEADLINE", "1"),
                Arguments.of(Failing.with(Status.Code.INTERNAL, info("INTERNAL")), 503, "INTERNAL", "1"),
                Arguments.of(Failing.with(Status.Code.INTERNAL, info("A_REASON_OF_TOMORROW")), 503, "A_REASON_OF_TOMORROW", "1"),
                Arguments.of(Failing.with(Status.Code.UNKNOWN, info("DRAINING", "somebody-else")), 503, "", "1"),
                Arguments.of(Failing.with(Status.Code.INVALID_ARGUMENT), 400, "", null),
                Arguments.of(Failing.with(Status.Code.UNIMPLEMENTED), 500, "", null),
                Arguments.of(Failing.torn(Status.Code.INVALID_ARGUMENT), 400, "", null),
                Arguments.of(Failing.torn(Status.Code.DATA_LOSS), 503, "", "1"));
    }

    @ParameterizedTest
    @MethodSource
    void anError(Failing failing, int httpStatus, String reason, String retryAfter) throws IOException {
        try (Servers.Fake fake = new Servers.Fake(failing)) {
            Answer.Undecided answer = undecided(httpStatus, failing.code().name(), reason, ask(fake.address()));
            assertEquals(retryAfter, answer.httpHeaders().get("Retry-After"));
        }
    }

    @Test
    void aServerThatIsStoppingIsAskedAgain() throws IOException {
        Failing failing = Failing.with(Status.Code.UNAVAILABLE, info("DRAINING")).only(2);
        try (Servers.Fake fake = new Servers.Fake(failing)) {
            assertInstanceOf(Answer.Allowed.class, ask(fake.address()));
        }
        assertEquals(3, failing.calls().get());
    }

    @Test
    void whatIsNotAwayIsAskedOnce() throws IOException {
        Failing failing = Failing.with(Status.Code.INTERNAL).only(2);
        try (Servers.Fake fake = new Servers.Fake(failing)) {
            assertInstanceOf(Answer.Undecided.class, ask(fake.address()));
        }
        assertEquals(1, failing.calls().get());
    }

    @Test
    void aServerThatNeverAnswers() throws IOException {
        AtomicReference<Long> told = new AtomicReference<>();
        try (Servers.Fake fake = new Servers.Fake(
                (request, observer) -> told.set(Context.current().getDeadline().timeRemaining(TimeUnit.SECONDS)))) {
            Gate.Options options = new Gate.Options(java.time.Duration.ofMillis(300), Optional.empty(), Optional.empty());
            undecided(503, "DEADLINE_EXCEEDED", "", ask(fake.address(), LIVE, Checkpoint.CHECKPOINT_CREATE, options));
        }
        assertTrue(told.get() < 10, "the server is told the deadline, so that it can answer before");
    }

    // === Nothing prints a key ===

    static List<Object> nothingPrintsAKey() {
        return List.of(new Secret(KEY), LIVE.credentials().get(0), LIVE);
    }

    @ParameterizedTest
    @MethodSource
    void nothingPrintsAKey(Object value) {
        assertTrue(value.toString().contains("[redacted]"));
        for (String text : List.of(
                value.toString(),
                String.format("%s %10s", value, value),
                List.of(value).toString(),
                Map.of("value", value).toString(),
                new GsonBuilder().serializeNulls().create().toJson(value))) {
            assertFalse(text.contains(KEY), text);
        }
    }

    @Test
    void aFaultDoesNotPrintAKeyNorAToken(@TempDir Path folder) throws IOException {
        Path token = folder.resolve("token");
        Gate.Options options = new Gate.Options(Gate.Options.DEFAULT.timeout(), Optional.empty(), Optional.of(token));
        assertInstanceOf(
                Answer.Undecided.class, ask(Servers.server("plain"), LIVE, Checkpoint.CHECKPOINT_CREATE, options), "no file");
        for (String content : List.of("made-up-token\nmade-up-token-2", "made-up-token\0", "made-up-tok\u00e9n", "")) {
            Files.write(token, content.getBytes(StandardCharsets.UTF_8));
            Answer answer = ask(Servers.server("plain"), LIVE, Checkpoint.CHECKPOINT_CREATE, options);
            undecided(500, "UNAUTHENTICATED", "", answer);
            assertFalse(answer.toString().contains("made-up-tok"));
        }
        StringWriter trace = new StringWriter();
        assertThrows(NullPointerException.class, () -> new Secret(null)).printStackTrace(new PrintWriter(trace));
        assertTrue(trace.toString().contains("UNREADABLE"));
    }

    // === The program ===

    static List<Arguments> theProgram() {
        return List.of(
                Arguments.of("acme-large", 0, "Allowed[billingMode=BYOK"),
                Arguments.of("no-such-model", 1, "HTTP 422"),
                Arguments.of("m".repeat(600), 1, "HTTP 400"));
    }

    @ParameterizedTest
    @MethodSource
    void theProgram(String model, int status, String said) throws Exception {
        ProcessBuilder builder = new ProcessBuilder(
                Path.of(System.getProperty("java.home"), "bin", "java").toString(),
                // The machine's proxy is not used.
                "-Dhttps.proxyHost=127.0.0.1",
                "-Dhttps.proxyPort=" + Servers.server("nobody").split(":")[1],
                "-Dhttp.nonProxyHosts=",
                "-cp",
                System.getProperty("surefire.test.class.path", System.getProperty("java.class.path")),
                Example.class.getName(),
                Servers.server("plain"),
                "agent",
                model,
                "ACME_API_KEY");
        builder.environment().keySet().retainAll(Collections.emptySet());
        builder.environment().put("ACME_API_KEY", KEY);
        Process process = builder.redirectErrorStream(true).start();
        String printed = new String(process.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
        assertEquals(status, process.waitFor(), printed);
        assertTrue(printed.contains(said), printed);
        assertFalse(printed.contains(KEY));
    }
}
