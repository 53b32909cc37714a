/** The servers for the tests: the real ones that with-servers started, and one that sends given bytes. */
import { readFileSync } from "node:fs";

import * as grpc from "@grpc/grpc-js";

import { Checkpoint, OperatorOverride, PlatformProxy, Scope, Secret, UNREADABLE, type Spec } from "./gate.js";

interface SpecText {
  runtime: string;
  model: string;
  organization_id?: string;
  credentials?: { env_name: string; scope: "WORKSPACE" | "ORGANIZATION"; value?: string; unreadable?: boolean }[];
  unreadable_scopes?: ("WORKSPACE" | "ORGANIZATION")[];
  operator_override?: "BYOK" | "DISABLED";
  platform_proxy?: "ABSENT";
}

export interface Expected {
  allowed?: string;
  warnings?: string[];
  undecided?: true;
  refused?: string;
  retryable?: boolean;
  retry_after_seconds?: number;
  message?: string;
  remedy?: string;
  missing_env?: string[];
  alternative_models?: string[];
}

interface Case {
  name: string;
  server: string;
  checkpoint: "CREATE" | "PROVISION";
  before?: SpecText;
  spec: SpecText;
  expect: Expected;
}

interface Reply {
  name: string;
  hex: string;
  column?: string;
  expect: Expected;
}

function json<T>(path: string | undefined): T {
  if (path === undefined) {
    throw new Error("BYOK_GATE_SERVERS is not set: run the tests by with-servers");
  }
  return JSON.parse(readFileSync(path, "utf8")) as T;
}

const started = json<{ servers: Record<string, string>; files: Record<string, string> }>(process.env["BYOK_GATE_SERVERS"]);
export const cases = json<{ cases: Case[] }>(file("cases")).cases;
export const replies = json<{ replies: Reply[] }>(file("replies")).replies;

export function server(name: string): string {
  return started.servers[name] ?? fail(name);
}

export function file(name: string): string {
  return started.files[name] ?? fail(name);
}

function fail(name: string): never {
  throw new Error(`with-servers started no ${name}`);
}

export function checkpointOf({ checkpoint }: Case): Checkpoint {
  return Checkpoint[`CHECKPOINT_${checkpoint}`];
}

/** A spec from cases.json. */
export function specOf(text: SpecText): Spec {
  return {
    runtime: text.runtime,
    model: text.model,
    organizationId: text.organization_id ?? "",
    credentials: (text.credentials ?? []).map((held) => ({
      envName: held.env_name,
      scope: Scope[`SCOPE_${held.scope}`],
      value: held.unreadable ? UNREADABLE : new Secret(held.value ?? ""),
    })),
    unreadableScopes: (text.unreadable_scopes ?? []).map((scope) => Scope[`SCOPE_${scope}`]),
    operatorOverride: OperatorOverride[`OPERATOR_OVERRIDE_${text.operator_override ?? "UNSPECIFIED"}`],
    platformProxy: PlatformProxy[`PLATFORM_PROXY_${text.platform_proxy ?? "UNSPECIFIED"}`],
  };
}

export type Answering = (call: grpc.ServerUnaryCall<Buffer, Buffer>, answer: grpc.sendUnaryData<Buffer>) => void;

/** A server whose Decide answers with bytes. Ends with the test. */
export async function fakeServer(answering: Answering, use: (address: string) => Promise<void>): Promise<void> {
  const same = (bytes: Buffer): Buffer => bytes;
  const fake = new grpc.Server();
  fake.addService(
    {
      decide: {
        path: "/byokgate.v1.PolicyDecisionService/Decide",
        requestStream: false,
        responseStream: false,
        requestSerialize: same,
        requestDeserialize: same,
        responseSerialize: same,
        responseDeserialize: same,
      },
    },
    { decide: answering },
  );
  const port = await new Promise<number>((resolve, reject) => {
    fake.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, bound) => (error ? reject(error) : resolve(bound)));
  });
  try {
    await use(`127.0.0.1:${port}`);
  } finally {
    fake.forceShutdown();
  }
}
