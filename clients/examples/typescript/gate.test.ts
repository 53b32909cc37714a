/** `decide` against real servers, and against one that sends what no current server would. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { format, inspect } from "node:util";
import { serialize } from "node:v8";

import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";

import { Checkpoint, Gate, Scope, Secret, logFields, type Answer, type GateOptions, type Spec } from "./gate.js";
import { cases, checkpointOf, fakeServer, file, replies, server, specOf, type Answering, type Expected } from "./servers.js";
import type { ProtoGrpcType as ErrorDetails } from "./generated/error_details.js";

const KEY = "made-up-live";
const LIVE: Spec = {
  runtime: "agent",
  model: "acme-large",
  credentials: [{ envName: "ACME_API_KEY", scope: Scope.SCOPE_WORKSPACE, value: new Secret(KEY) }],
};

async function ask(target: string, spec = LIVE, checkpoint: Checkpoint = Checkpoint.CHECKPOINT_CREATE, options: GateOptions = {}): Promise<Answer> {
  const gate = new Gate(target, options);
  try {
    return await gate.decide(spec, checkpoint);
  } finally {
    gate.close();
  }
}

/** Checks that an answer is what cases.json or replies.json says. */
function expect(answer: Answer, expected: Expected): void {
  if (expected.allowed !== undefined) {
    assert.ok(answer.outcome === "allowed", inspect(answer));
    assert.equal(answer.billingMode, expected.allowed);
    assert.deepEqual(answer.warnings, expected.warnings);
    assert.ok(answer.decisionId);
    return;
  }
  if (expected.undecided) {
    assert.ok(answer.outcome === "undecided", inspect(answer));
    assert.equal(answer.httpStatus, 503);
    assert.equal(answer.httpHeaders["Retry-After"], "1");
    return;
  }
  assert.ok(answer.outcome === "refused", inspect(answer));
  assert.equal(answer.code, expected.refused);
  assert.equal(answer.retryable, expected.retryable);
  assert.equal(answer.message, expected.message ?? answer.message);
  assert.equal(answer.remedy, expected.remedy ?? answer.remedy);
  assert.deepEqual(answer.missingEnv, expected.missing_env ?? answer.missingEnv);
  assert.deepEqual(answer.alternativeModels, expected.alternative_models ?? answer.alternativeModels);
  assert.equal(answer.httpHeaders["Cache-Control"], "no-store");
  if (expected.retryable) {
    assert.equal(answer.httpStatus, 503);
    assert.match(answer.httpHeaders["Retry-After"] ?? "", /^[1-9][0-9]*$/);
    if (expected.retry_after_seconds !== undefined) {
      assert.equal(answer.httpHeaders["Retry-After"], String(expected.retry_after_seconds));
    }
  } else {
    assert.equal(answer.httpStatus, 422);
    assert.equal(answer.httpHeaders["Retry-After"], undefined);
  }
}

// === Decisions of the real server ===

for (const asked of cases) {
  test(`a decision of the real server: ${asked.name}`, async () => {
    const checkpoint = checkpointOf(asked);
    if (asked.before) {
      await ask(server(asked.server), specOf(asked.before), checkpoint);
    }
    const answer = await ask(server(asked.server), specOf(asked.spec), checkpoint);
    expect(answer, asked.expect);
    if (answer.outcome === "refused") {
      assert.ok(answer.message && answer.remedy, "a denial of the real server says why, and what to do");
    }
  });
}

test("over a Unix socket", async () => {
  assert.equal((await ask(server("unix"))).outcome, "allowed");
});

test("TLS with a client certificate", async () => {
  const tls = { ca: file("ca"), cert: file("client_cert"), key: file("client_key") };
  assert.equal((await ask(server("mtls"), LIVE, Checkpoint.CHECKPOINT_CREATE, { tls })).outcome, "allowed");
});

for (const tls of [{ ca: file("ca") }, { ca: file("other_ca"), cert: file("client_cert"), key: file("client_key") }]) {
  test(`invalid TLS: ${Object.keys(tls)}`, async () => {
    const answer = await ask(server("mtls"), LIVE, Checkpoint.CHECKPOINT_CREATE, { tls });
    assert.ok(answer.outcome === "undecided" && answer.httpStatus === 503, inspect(answer));
  });
}

test("no plain text beyond this host", () => {
  for (const target of ["gate.example:50051", "dns:///localhost.example:50051", "10.0.0.1:50051", "127.0.0.1.example:50051"]) {
    assert.throws(() => new Gate(target), /tls/);
  }
});

test("no call without a deadline", () => {
  for (const timeoutMs of [0, -1, Infinity, NaN]) {
    assert.throws(() => new Gate(server("plain"), { timeoutMs }), /deadline/);
  }
});

// === Errors of the real server ===

const withToken = (tokenFile?: string): GateOptions => ({ tls: { ca: file("ca") }, ...(tokenFile === undefined ? {} : { tokenFile }) });

test("a token", async () => {
  const answer = await ask(server("token"), LIVE, Checkpoint.CHECKPOINT_CREATE, withToken(file("token_platform")));
  assert.equal(answer.outcome, "allowed");
});

for (const [token, grpcCode, reason] of [
  [undefined, "UNAUTHENTICATED", "TOKEN_MISSING"],
  [file("token_unknown"), "UNAUTHENTICATED", "TOKEN_UNKNOWN"],
  [file("token_operator"), "PERMISSION_DENIED", "METHOD_NOT_ALLOWED"],
  [file("token_workspace"), "PERMISSION_DENIED", "REQUEST_NOT_ALLOWED"],
] as const) {
  test(`a caller that may not ask: ${reason}`, async () => {
    const answer = await ask(server("token"), LIVE, Checkpoint.CHECKPOINT_CREATE, withToken(token));
    assert.ok(answer.outcome === "undecided", inspect(answer));
    assert.deepEqual([answer.httpStatus, answer.grpcCode, answer.reason], [500, grpcCode, reason]);
    assert.equal(answer.httpHeaders["Retry-After"], undefined);
  });
}

test("a limit that is reached", async () => {
  // One call a minute.
  let answer: Answer | undefined;
  for (let call = 0; call < 2; call++) {
    answer = await ask(server("token"), { ...LIVE, workspaceId: "ws-2" }, Checkpoint.CHECKPOINT_PROVISION, withToken(file("token_limited")));
  }
  assert.ok(answer?.outcome === "undecided", inspect(answer));
  assert.deepEqual([answer.httpStatus, answer.grpcCode, answer.reason], [503, "RESOURCE_EXHAUSTED", "LIMIT_REACHED"]);
  assert.match(answer.httpHeaders["Retry-After"] ?? "", /^[1-9][0-9]*$/);
});

const many = Array.from({ length: 5 }, (_, number) => ({
  envName: `MADE_UP_${number}`,
  scope: Scope.SCOPE_WORKSPACE,
  value: new Secret("k".repeat(60000)),
}));
for (const [name, spec, checkpoint, reason, field] of [
  ["a field that is too long", { ...LIVE, model: "m".repeat(513) }, Checkpoint.CHECKPOINT_CREATE, "BAD_REQUEST", "workspace_spec.model"],
  ["no checkpoint", LIVE, Checkpoint.CHECKPOINT_UNSPECIFIED, "BAD_REQUEST", "checkpoint"],
  ["an unknown checkpoint", LIVE, 99 as unknown as Checkpoint, "BAD_REQUEST", "checkpoint"],
  ["a request that is too large", { ...LIVE, credentials: many }, Checkpoint.CHECKPOINT_CREATE, "REQUEST_TOO_LARGE", undefined],
] as const) {
  test(`a request that cannot be judged: ${name}`, async () => {
    const answer = await ask(server("plain"), spec, checkpoint);
    assert.ok(answer.outcome === "undecided", inspect(answer));
    assert.deepEqual([answer.httpStatus, answer.grpcCode, answer.reason], [400, "INVALID_ARGUMENT", reason]);
    if (field !== undefined) {
      assert.deepEqual(answer.fields, [field]);
      assert.ok(answer.message.includes(field));
    }
  });
}

for (const name of ["nobody", "not_grpc"]) {
  test(`nobody who speaks gRPC is there: ${name}`, async () => {
    const answer = await ask(server(name));
    assert.ok(answer.outcome === "undecided", inspect(answer));
    assert.deepEqual([answer.httpStatus, answer.reason], [503, ""]);
  });
}

// === Replies that no current server sends ===

for (const reply of replies) {
  test(`a reply as bytes: ${reply.name}`, async () => {
    await fakeServer(
      (_, answer) => answer(null, Buffer.from(reply.hex, "hex")),
      async (address) => expect(await ask(address), reply.expect),
    );
  });
}

const rpc = (
  grpc.loadPackageDefinition(
    protoLoader.loadSync("google/rpc/error_details.proto", { includeDirs: [fileURLToPath(new URL("../proto", import.meta.url))] }),
  ) as unknown as ErrorDetails
).google.rpc;
const packed = (type: string, value: Buffer): { type_url: string; value: Buffer } => ({ type_url: `type.googleapis.com/google.rpc.${type}`, value });
const info = (reason: string, domain = "byok-gate") => packed("ErrorInfo", rpc.ErrorInfo.serialize({ reason, domain }));
const retry = (seconds: number, nanos: number) => packed("RetryInfo", rpc.RetryInfo.serialize({ retryDelay: { seconds, nanos } }));
const TORN = Buffer.from([0x1a, 0x7f]);

/** A Decide that fails this many times, and then allows. */
function failing(code: grpc.status, details: ReturnType<typeof packed>[] | Buffer, times = Infinity): Answering & { calls: number } {
  const answering = Object.assign(
    ((_, answer) => {
      answering.calls++;
      if (answering.calls > times) {
        answer(null, Buffer.from("0a016912020802", "hex")); // an allow, BYOK
        return;
      }
      const metadata = new grpc.Metadata();
      const status = Buffer.isBuffer(details) ? details : rpc.Status.serialize({ code, message: "made up", details });
      if (details.length > 0) {
        metadata.set("grpc-status-details-bin", status);
      }
      answer({ code, details: "made up", metadata });
    }) satisfies Answering,
    { calls: 0 },
  );
  return answering;
}

for (const [answering, httpStatus, reason, retryAfter] of [
  [failing(grpc.status.UNAVAILABLE, [info("DRAINING"), retry(0, 1)]), 503, "DRAINING", "1"],
  [failing(grpc.status.RESOURCE_EXHAUSTED, [retry(9, 1)]), 503, "", "10"],
  [failing(grpc.status.DEADLINE_EXCEEDED, [info("DEADLINE")]), 503, "DEADLINE", "1"],
  [failing(grpc.status.INTERNAL, [info("INTERNAL")]), 503, "INTERNAL", "1"],
  [failing(grpc.status.INTERNAL, [info("A_REASON_OF_TOMORROW")]), 503, "A_REASON_OF_TOMORROW", "1"],
  [failing(grpc.status.UNKNOWN, [info("DRAINING", "somebody-else")]), 503, "", "1"],
  [failing(grpc.status.INVALID_ARGUMENT, []), 400, "", undefined],
  [failing(grpc.status.UNIMPLEMENTED, []), 500, "", undefined],
  [failing(grpc.status.INVALID_ARGUMENT, TORN), 400, "", undefined],
  [failing(grpc.status.DATA_LOSS, TORN), 503, "", "1"],
] as const) {
  test(`an error: ${httpStatus}, ${reason || "no reason"}, ${retryAfter}`, async () => {
    await fakeServer(answering, async (address) => {
      const answer = await ask(address);
      assert.ok(answer.outcome === "undecided", inspect(answer));
      assert.deepEqual([answer.httpStatus, answer.reason, answer.httpHeaders["Retry-After"]], [httpStatus, reason, retryAfter]);
    });
  });
}

test("a server that is stopping is asked again", async () => {
  const answering = failing(grpc.status.UNAVAILABLE, [info("DRAINING")], 2);
  await fakeServer(answering, async (address) => assert.equal((await ask(address)).outcome, "allowed"));
  assert.equal(answering.calls, 3);
});

test("what is not away is asked once", async () => {
  const answering = failing(grpc.status.INTERNAL, [], 2);
  await fakeServer(answering, async (address) => assert.equal((await ask(address)).outcome, "undecided"));
  assert.equal(answering.calls, 1);
});

test("a server that never answers", async () => {
  const told: number[] = [];
  const began = Date.now();
  await fakeServer(
    (call) => void told.push(new Date(call.getDeadline()).getTime()),
    async (address) => {
      const answer = await ask(address, LIVE, Checkpoint.CHECKPOINT_CREATE, { timeoutMs: 300 });
      assert.ok(answer.outcome === "undecided", inspect(answer));
      assert.deepEqual([answer.httpStatus, answer.grpcCode], [503, "DEADLINE_EXCEEDED"]);
    },
  );
  const [deadline] = told;
  assert.ok(deadline !== undefined && deadline > began && deadline < began + 10_000, "the server is told, so that it can answer before");
});

// === Nothing prints a key ===

for (const [name, value] of Object.entries({ secret: new Secret(KEY), credential: LIVE.credentials?.[0], spec: LIVE })) {
  test(`nothing prints a key: a ${name}`, () => {
    const held = value as unknown;
    const shown = [
      String(held), `${held}`, format("%s %o %O %j", held, held, held, held), JSON.stringify(held), JSON.stringify({ ...(held as object) }),
      inspect(held, { depth: null, showHidden: true, getters: true, customInspect: false }), inspect(structuredClone(held)),
      serialize(held).toString("latin1"),
    ];
    for (const text of shown) {
      assert.ok(!text.includes(KEY), text);
    }
    assert.ok(inspect(held, { depth: null }).includes("[redacted]"));
  });
}

test("a fault does not print a key nor a token", async () => {
  assert.throws(
    () => new Secret([KEY] as unknown as string),
    (error) => !inspect(error).includes(KEY),
  );
  const folder = mkdtempSync(join(tmpdir(), "byok-gate-token-"));
  try {
    const tokenFile = join(folder, "token");
    for (const content of ["made-up-token\nmade-up-token-2", "made-up-token\0", "made-up-tok\u00e9n", ""]) {
      writeFileSync(tokenFile, content);
      const answer = await ask(server("plain"), LIVE, Checkpoint.CHECKPOINT_CREATE, { tokenFile });
      assert.ok(answer.outcome === "undecided" && answer.httpStatus === 500, inspect(answer));
      assert.ok(!(inspect(answer) + inspect(logFields(answer))).includes("made-up-tok"));
    }
    const answer = await ask(server("plain"), LIVE, Checkpoint.CHECKPOINT_CREATE, { tokenFile: join(folder, "none") });
    assert.equal(answer.outcome, "undecided");
  } finally {
    rmSync(folder, { recursive: true });
  }
});

// === The program ===

const proxy = `http://${server("nobody")}`;
for (const [model, status, said] of [["acme-large", 0, '"outcome":"allowed"'], ["no-such-model", 1, "HTTP 422"], ["m".repeat(600), 1, "HTTP 400"]] as const) {
  test(`the program: ${said}`, () => {
    const program = fileURLToPath(new URL("example.js", import.meta.url));
    const done = spawnSync(process.execPath, [program, server("plain"), "agent", model, "ACME_API_KEY"], {
      // The environment's proxy is not used.
      env: { ACME_API_KEY: KEY, grpc_proxy: proxy, https_proxy: proxy, http_proxy: proxy },
      encoding: "utf8",
      timeout: 60000,
    });
    assert.equal(done.status, status, done.stdout + done.stderr);
    assert.ok(done.stdout.includes(said), done.stdout);
    assert.ok(!(done.stdout + done.stderr).includes(KEY));
  });
}
