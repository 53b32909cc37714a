/**
 * The natural ways to read a reply and to print a request, with the result of each: the tables of docs/other-languages.md.
 *
 * What is seen is written to $BYOK_GATE_SEEN, by which ../check-tables compares the page.
 */
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { inspect } from "node:util";

import { create, fromBinary, isFieldSet, toJsonString } from "@bufbuild/protobuf";
import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";

import { billingMode } from "./five-lines.js";
import { Checkpoint, request } from "./gate.js";
import { cases, checkpointOf, fakeServer, replies, server, specOf } from "./servers.js";
import { BillingMode, DecideRequestSchema, DecideResponseSchema } from "./generated-es/byokgate/v1/policy_decision_pb.js";
import type { ProtoGrpcType } from "./generated/policy_decision.js";

const KEY = "made-up-live";

/** The expression to use, with the code that is generated or loaded by each library. */
const NAMED = {
  "typescript": 'r.decision === "allow" && KNOWN.includes(r.allow.billingMode)',
  "protobuf-es": 'r.decision.case === "allow" && KNOWN.includes(r.decision.value.billingMode)',
};
type Library = keyof typeof NAMED;
const LIBRARIES = ["typescript", "protobuf-es"] as const;

// Each is evaluated as written here and on the page.
const READINGS: Record<Library, string[]> = {
  "typescript": [
    NAMED["typescript"],
    "KNOWN.includes(r.allow?.billingMode)",
    'r.decision === "allow"',
    "r.allow",
    '"allow" in r',
    "r.allow?.billingMode",
    'r.allow?.billingMode !== "BILLING_MODE_UNSPECIFIED"',
    "r.decision",
    "!r.deny",
    'r.resolution?.billingMode === "BILLING_MODE_BYOK"',
    'r.allow?.billingMode !== "BILLING_MODE_BYOK"',
  ],
  "protobuf-es": [
    NAMED["protobuf-es"],
    'r.decision.case === "allow"',
    "isFieldSet(r, DecideResponseSchema.field.allow)",
    "r.decision",
    "r.decision.value",
    'r.decision.case !== "deny"',
    "r.resolution?.billingMode === BillingMode.BYOK",
    'r.decision.case !== "allow" || r.decision.value.billingMode !== BillingMode.BYOK',
  ],
};

/** The billing modes that a caller knows. */
const KNOWN: Record<Library, unknown[]> = {
  "typescript": ["BILLING_MODE_PLATFORM_MANAGED", "BILLING_MODE_BYOK", "BILLING_MODE_NONE"],
  "protobuf-es": [BillingMode.PLATFORM_MANAGED, BillingMode.BYOK, BillingMode.NONE],
};

const PRINTERS: Record<Library, string[]> = {
  "typescript": [
    "JSON.stringify(request)",
    "inspect(request, { depth: null })",
    "`${request}`",
    "inspect(spec, { depth: null })",
    "JSON.stringify(spec)",
  ],
  "protobuf-es": ["toJsonString(DecideRequestSchema, message)", "inspect(message, { depth: null })"],
};

const { PolicyDecisionService } = (
  grpc.loadPackageDefinition(
    protoLoader.loadSync("byokgate/v1/policy_decision.proto", {
      includeDirs: [fileURLToPath(new URL("../proto", import.meta.url))],
      longs: Number,
      enums: String,
      defaults: true,
      oneofs: true,
    }),
  ) as unknown as ProtoGrpcType
).byokgate.v1;
const { path, requestSerialize, responseDeserialize } = PolicyDecisionService.service.Decide;

interface Seen {
  column: string;
  allowed: boolean;
  bytes: Buffer;
}
const seen: Seen[] = [];

// The real server's replies, and those that no server sends.
before(async () => {
  for (const asked of cases) {
    const client = new grpc.Client(server(asked.server), grpc.credentials.createInsecure());
    const ask = (spec: typeof asked.spec): Promise<Buffer> =>
      new Promise((resolve, reject) => {
        client.makeUnaryRequest(
          path, requestSerialize, (bytes) => bytes, request(specOf(spec), checkpointOf(asked)), { deadline: Date.now() + 10_000 },
          (error, reply) => (error || !reply ? reject(error) : resolve(reply)),
        );
      });
    if (asked.before) {
      await ask(asked.before);
    }
    const allowed = asked.expect.allowed !== undefined;
    seen.push({ column: allowed ? "an allow" : "a denial", allowed, bytes: await ask(asked.spec) });
    client.close();
  }
  for (const reply of replies) {
    if (reply.column !== undefined) {
      seen.push({ column: reply.column, allowed: reply.expect.allowed !== undefined, bytes: Buffer.from(reply.hex, "hex") });
    }
  }
});

function takenForAnAllow(library: Library, reading: string, bytes: Buffer): boolean {
  const reply = library === "typescript" ? responseDeserialize(bytes) : fromBinary(DecideResponseSchema, bytes);
  const names = { r: reply, KNOWN: KNOWN[library], isFieldSet, DecideResponseSchema, BillingMode };
  return Boolean(new Function(...Object.keys(names), `return ${reading}`)(...Object.values(names)));
}

for (const library of LIBRARIES) {
  test(`the reading that the page names takes every allow and nothing else: ${library}`, () => {
    assert.ok(seen.length > 40);
    for (const { column, allowed, bytes } of seen) {
      assert.equal(takenForAnAllow(library, NAMED[library], bytes), allowed, column);
    }
  });

  test(`what each reading makes of each reply: ${library}`, () => {
    const rows = READINGS[library].map((reading) => {
      const columns: Record<string, [number, number]> = {};
      for (const { column, bytes } of seen) {
        const counts = (columns[column] ??= [0, 0]);
        counts[0] += Number(takenForAnAllow(library, reading, bytes));
        counts[1] += 1;
      }
      return { reading, seen: columns };
    });
    report(library, "readings", rows);
  });

  test(`what prints a key: ${library}`, () => {
    const [first] = cases;
    assert.ok(first);
    const spec = specOf(first.spec);
    const message = create(DecideRequestSchema, {
      workspaceSpec: { credentials: [{ envName: "ACME_API_KEY", value: KEY }] },
    });
    const names = { spec, request: request(spec, Checkpoint.CHECKPOINT_CREATE), message, inspect, toJsonString, DecideRequestSchema };
    const rows = PRINTERS[library].map((printer) => ({
      printer,
      prints: String(new Function(...Object.keys(names), `return ${printer}`)(...Object.values(names))).includes(KEY),
    }));
    report(library, "printers", rows);
  });
}

function report(library: Library, part: string, rows: unknown): void {
  const folder = process.env["BYOK_GATE_SEEN"];
  if (folder !== undefined) {
    writeFileSync(join(folder, `${library}.${part}.json`), JSON.stringify({ named: NAMED[library], rows }));
  }
}

test("the five lines of the page take every allow and nothing else", async () => {
  let next: Buffer = Buffer.alloc(0);
  await fakeServer(
    (_, answer) => answer(null, next),
    async (address) => {
      const client = new PolicyDecisionService(address, grpc.credentials.createInsecure());
      for (const { column, allowed, bytes } of seen) {
        next = bytes;
        assert.equal((await billingMode(client, {})) !== undefined, allowed, column);
      }
      next = Buffer.from([0x12, 0x02, 0x08]); // torn
      assert.equal(await billingMode(client, {}), undefined);
      client.close();
    },
  );
  const client = new PolicyDecisionService(server("nobody"), grpc.credentials.createInsecure());
  assert.equal(await billingMode(client, {}), undefined);
  client.close();
});
