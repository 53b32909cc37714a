package com.byokgate.example;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.byokgate.v1.BillingMode;
import com.byokgate.v1.DecideRequest;
import com.byokgate.v1.DecideResponse;
import com.byokgate.v1.DecideResponse.DecisionCase;
import com.byokgate.v1.DenyCode;
import com.byokgate.v1.PolicyDecisionServiceGrpc;
import com.google.gson.Gson;
import com.google.protobuf.DebugFormat;
import com.google.protobuf.TextFormat;
import com.google.protobuf.util.JsonFormat;
import io.grpc.CallOptions;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.stub.ClientCalls;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.Callable;
import java.util.concurrent.TimeUnit;
import java.util.function.Predicate;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;

/**
 * The natural ways to read a reply and to print a request, with the result of each: the tables of docs/other-languages.md.
 *
 * <p>What is seen is written to $BYOK_GATE_SEEN, by which ../check-tables compares the page.
 */
class ReadingsTest {
    private static final Set<BillingMode> KNOWN = FiveLines.KNOWN;
    private static final String KEY = "made-up-live";

    /** A text that stands on the page, and the same as code; a test compares the two in this file. */
    private record Reading(String text, Predicate<DecideResponse> code) {}

    private record Printer(String text, Callable<String> code) {}

    private record Seen(String column, boolean allowed, byte[] bytes) {}

    // The first is the one to use.
    private static final List<Reading> READINGS = List.of(
            new Reading("KNOWN.contains(r.getAllow().getBillingMode())", r -> KNOWN.contains(r.getAllow().getBillingMode())),
            new Reading("r.getDecisionCase() == DecisionCase.ALLOW", r -> r.getDecisionCase() == DecisionCase.ALLOW),
            new Reading("r.hasAllow()", r -> r.hasAllow()),
            new Reading("r.getAllow() != null", r -> r.getAllow() != null),
            new Reading("r.getAllow().isInitialized()", r -> r.getAllow().isInitialized()),
            new Reading("r.getAllow().getBillingModeValue() != 0", r -> r.getAllow().getBillingModeValue() != 0),
            new Reading("r.getDecisionCase() != DecisionCase.DENY", r -> r.getDecisionCase() != DecisionCase.DENY),
            new Reading("!r.hasDeny()", r -> !r.hasDeny()),
            new Reading("r.getDeny().getCode() == DenyCode.DENY_CODE_UNSPECIFIED", r -> r.getDeny().getCode() == DenyCode.DENY_CODE_UNSPECIFIED),
            new Reading("r.getResolution().getBillingMode() == BillingMode.BILLING_MODE_BYOK", r -> r.getResolution().getBillingMode() == BillingMode.BILLING_MODE_BYOK),
            new Reading("r.getAllow().getBillingMode() != BillingMode.BILLING_MODE_BYOK", r -> r.getAllow().getBillingMode() != BillingMode.BILLING_MODE_BYOK));

    private static final Spec spec = Servers.CASES.get(0).spec().spec();
    private static final DecideRequest request = Gate.request(spec, Servers.CASES.get(0).at());

    private static final List<Printer> PRINTERS = List.of(
            new Printer("request.toString()", () -> request.toString()),
            new Printer("TextFormat.printer().printToString(request)", () -> TextFormat.printer().printToString(request)),
            new Printer("JsonFormat.printer().print(request)", () -> JsonFormat.printer().print(request)),
            new Printer("DebugFormat.singleLine().toString(request)", () -> DebugFormat.singleLine().toString(request)),
            new Printer("spec.toString()", () -> spec.toString()),
            new Printer("new Gson().toJson(spec)", () -> new Gson().toJson(spec)));

    private static final List<Seen> SEEN = new ArrayList<>();

    /** The real server's replies, and those that no server sends. */
    @BeforeAll
    static void collect() {
        for (Servers.Case asked : Servers.CASES) {
            ManagedChannel channel = Grpc.newChannelBuilder(Servers.server(asked.server()), InsecureChannelCredentials.create())
                    .proxyDetector(address -> null)
                    .build();
            try {
                if (asked.before() != null) {
                    ask(channel, Gate.request(asked.before().spec(), asked.at()));
                }
                boolean allowed = asked.expect().allowed() != null;
                SEEN.add(new Seen(allowed ? "an allow" : "a denial", allowed, ask(channel, Gate.request(asked.spec().spec(), asked.at()))));
            } finally {
                channel.shutdownNow();
            }
        }
        for (Servers.Reply reply : Servers.REPLIES) {
            if (reply.column() != null) {
                SEEN.add(new Seen(reply.column(), reply.expect().allowed() != null, reply.bytes()));
            }
        }
    }

    private static byte[] ask(ManagedChannel channel, DecideRequest request) {
        CallOptions options = CallOptions.DEFAULT.withDeadlineAfter(10, TimeUnit.SECONDS);
        return ClientCalls.blockingUnaryCall(channel, Servers.DECIDE, options, request.toByteArray());
    }

    @Test
    void theReadingThatThePageNamesTakesEveryAllowAndNothingElse() throws IOException {
        assertTrue(SEEN.size() > 40);
        for (Seen seen : SEEN) {
            assertEquals(seen.allowed(), READINGS.get(0).code().test(DecideResponse.parseFrom(seen.bytes())), seen.column());
        }
    }

    @Test
    void whatEachReadingMakesOfEachReply() throws IOException {
        List<Map<String, Object>> rows = new ArrayList<>();
        for (Reading reading : READINGS) {
            Map<String, int[]> columns = new LinkedHashMap<>();
            for (Seen seen : SEEN) {
                int[] counts = columns.computeIfAbsent(seen.column(), column -> new int[2]);
                counts[0] += reading.code().test(DecideResponse.parseFrom(seen.bytes())) ? 1 : 0;
                counts[1] += 1;
            }
            rows.add(Map.of("reading", reading.text(), "seen", columns));
        }
        report("readings", rows);
    }

    @Test
    void whatPrintsAKey() throws Exception {
        List<Map<String, Object>> rows = new ArrayList<>();
        for (Printer printer : PRINTERS) {
            rows.add(Map.of("printer", printer.text(), "prints", printer.code().call().contains(KEY)));
        }
        report("printers", rows);
    }

    private static void report(String part, List<Map<String, Object>> rows) throws IOException {
        String folder = System.getenv("BYOK_GATE_SEEN");
        if (folder != null) {
            String text = new Gson().toJson(Map.of("named", READINGS.get(0).text(), "rows", rows));
            Files.writeString(Path.of(folder, "java." + part + ".json"), text);
        }
    }

    @Test
    void theTextsOfThePageAreTheCodeThatRuns() throws IOException {
        String source = Files.readString(Path.of("src/test/java/com/byokgate/example/ReadingsTest.java"));
        for (Reading reading : READINGS) {
            assertTrue(source.contains("new Reading(\"" + reading.text() + "\", r -> " + reading.text() + ")"), reading.text());
        }
        for (Printer printer : PRINTERS) {
            assertTrue(source.contains("new Printer(\"" + printer.text() + "\", () -> " + printer.text() + ")"), printer.text());
        }
    }

    @Test
    void theFiveLinesOfThePageTakeEveryAllowAndNothingElse() throws IOException {
        for (Seen seen : SEEN) {
            assertEquals(seen.allowed(), fiveLines(seen.bytes()), seen.column());
        }
        assertEquals(false, fiveLines(new byte[] {0x12, 0x02, 0x08}), "torn bytes");
        assertEquals(false, fiveLines(Servers.server("nobody")), "nobody");
    }

    private static boolean fiveLines(byte[] reply) throws IOException {
        try (Servers.Fake fake = Servers.Fake.sending(reply)) {
            return fiveLines(fake.address());
        }
    }

    private static boolean fiveLines(String address) {
        ManagedChannel channel = Grpc.newChannelBuilder(address, InsecureChannelCredentials.create()).build();
        try {
            return FiveLines.billingMode(PolicyDecisionServiceGrpc.newBlockingStub(channel), DecideRequest.getDefaultInstance())
                    .isPresent();
        } finally {
            channel.shutdownNow();
        }
    }
}
