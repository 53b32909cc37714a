/**
 * Asks byok-gate whether a workspace may start, and fails closed: only an answer whose `outcome` is "allowed" may start anything.
 *
 *     const gate = new Gate("unix:/run/byok-gate/gate.sock");
 *     const credentials = [{ envName: "ANTHROPIC_API_KEY", scope: Scope.SCOPE_WORKSPACE, value: new Secret(key) }];
 *     const answer = await gate.decide({ runtime: "claude-code", model: "claude-opus-4-8", credentials }, Checkpoint.CHECKPOINT_CREATE);
 *     if (answer.outcome !== "allowed") {
 *       return response.writeHead(answer.httpStatus, answer.httpHeaders).end(answer.message);
 *     }
 *     await insertWorkspace(answer.billingMode);
 *
 * `decide` never rejects because of byok-gate or the network: a denial is "refused", and everything without a decision is
 * "undecided".
 */
import { readFile } from "node:fs/promises";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { inspect } from "node:util";

import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";

import { Checkpoint } from "./generated/byokgate/v1/Checkpoint.js";
import { OperatorOverride } from "./generated/byokgate/v1/OperatorOverride.js";
import { PlatformProxy } from "./generated/byokgate/v1/PlatformProxy.js";
import { Scope } from "./generated/byokgate/v1/Scope.js";
import type { DecideRequest } from "./generated/byokgate/v1/DecideRequest.js";
import type { DecideResponse__Output as DecideResponse } from "./generated/byokgate/v1/DecideResponse.js";
import type { Duration__Output as Duration } from "./generated/google/protobuf/Duration.js";
import type { ProtoGrpcType as ErrorDetails } from "./generated/error_details.js";
import type { ProtoGrpcType as PolicyDecision } from "./generated/policy_decision.js";

export { Checkpoint, OperatorOverride, PlatformProxy, Scope };

/** byok-gate gives a provider three seconds to answer; a caller that waits a little longer gets the result. */
const DEFAULT_TIMEOUT_MS = 4000;

/** All calls are read-only, so repeating one does no harm. The call's deadline limits all attempts together. */
const SERVICE_CONFIG = JSON.stringify({
  methodConfig: [
    {
      name: [{ service: "byokgate.v1.PolicyDecisionService" }],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: "0.05s",
        maxBackoff: "0.5s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
});

// `enums: String` gives a known value its name and leaves an unknown one a number; `oneofs` says which member is set; without
// `defaults` what is zero would be undefined.
const packages = grpc.loadPackageDefinition(
  protoLoader.loadSync(["byokgate/v1/policy_decision.proto", "google/rpc/error_details.proto"], {
    includeDirs: [fileURLToPath(new URL("../proto", import.meta.url))],
    longs: Number,
    enums: String,
    defaults: true,
    oneofs: true,
  }),
) as unknown as PolicyDecision & ErrorDetails;

// === The request ===

/** A credential's value, which nothing prints, logs or serializes by accident. `reveal` returns it. */
export class Secret {
  // Private by the language, so that inspect, JSON and structuredClone do not see it.
  readonly #value: string;

  constructor(value: string) {
    if (typeof value !== "string") {
      throw new TypeError("a secret is a string"); // which does not repeat the value
    }
    this.#value = text(value);
  }

  reveal(): string {
    return this.#value;
  }

  toString(): string {
    return "[redacted]";
  }

  toJSON(): string {
    return "[redacted]";
  }

  [inspect.custom](): string {
    return "[redacted]";
  }
}

/** The value of a row that exists but could not be read or decrypted. Never leave such a row out: that would mean that there is none. */
export const UNREADABLE = new Secret("");

/** One row of the secret store. */
export interface Credential {
  readonly envName: string;
  readonly scope: Scope;
  readonly value: Secret;
}

/** The workspace as it would start: the effective runtime and model, and the credentials that matter to them. */
export interface Spec {
  readonly runtime: string;
  readonly model: string;
  readonly workspaceId?: string;
  readonly organizationId?: string;
  readonly credentials?: readonly Credential[];
  /** Scopes that could not be listed at all. */
  readonly unreadableScopes?: readonly Scope[];
  readonly operatorOverride?: OperatorOverride;
  readonly platformProxy?: PlatformProxy;
  readonly tenantBaseUrlEnv?: readonly string[];
}

// === The answer ===

/** Who pays. A mode of a later byok-gate is unknown until it is added here. */
export type BillingMode = "PLATFORM_MANAGED" | "BYOK" | "NONE";

const BILLING_MODES: ReadonlyMap<unknown, BillingMode> = new Map([
  ["BILLING_MODE_PLATFORM_MANAGED", "PLATFORM_MANAGED"],
  ["BILLING_MODE_BYOK", "BYOK"],
  ["BILLING_MODE_NONE", "NONE"],
]);

/** The workspace may start. */
export interface Allowed {
  readonly outcome: "allowed";
  readonly billingMode: BillingMode;
  readonly decisionId: string;
  readonly provider: string;
  /** What a person should know, by name. CREDENTIAL_UNVERIFIED: the key could not be verified, and policy allows that. */
  readonly warnings: readonly string[];
}

/** The workspace must not start. `message` and `remedy` are for the tenant. */
export interface Refused {
  readonly outcome: "refused";
  readonly httpStatus: 422 | 503;
  readonly httpHeaders: Readonly<Record<string, string>>;
  /** Such as MISSING_BYOK_CREDENTIAL, or DENY_CODE_999 for an unknown code, which is still a denial. */
  readonly code: string;
  readonly message: string;
  readonly remedy: string;
  readonly missingEnv: readonly string[];
  readonly alternativeModels: readonly string[];
  readonly retryable: boolean;
  readonly decisionId: string;
  readonly provider: string;
}

/** There is no decision, so nothing may start. `message` is for the tenant. */
export interface Undecided {
  readonly outcome: "undecided";
  /** 400: the request is invalid. 500: the platform is misconfigured, which no tenant can fix. 503: try again. */
  readonly httpStatus: 400 | 500 | 503;
  readonly httpHeaders: Readonly<Record<string, string>>;
  readonly message: string;
  /** gRPC's code, such as UNAVAILABLE. OK if the reply could not be understood. */
  readonly grpcCode: string;
  /** byok-gate's ErrorReason, such as DRAINING. Empty if byok-gate did not say. */
  readonly reason: string;
  /** The invalid fields of the request. */
  readonly fields: readonly string[];
}

/**
 * Check its `outcome`. An answer is an object and so always true: `if (await gate.decide(...))` would treat every refusal as an allow,
 * and the types do not catch that. They do catch a read of `billingMode` without that check.
 */
export type Answer = Allowed | Refused | Undecided;

/** What is safe to log: names and ids. */
export function logFields(answer: Answer): Record<string, unknown> {
  switch (answer.outcome) {
    case "allowed": {
      const { outcome, billingMode, decisionId, provider, warnings } = answer;
      return { outcome, billingMode, decisionId, provider, warnings };
    }
    case "refused": {
      const { outcome, code, retryable, decisionId, provider } = answer;
      return { outcome, code, retryable, decisionId, provider };
    }
    case "undecided": {
      const { outcome, grpcCode, reason, fields } = answer;
      return { outcome, grpcCode, reason, fields };
    }
  }
}

// === The client ===

/** Files in PEM. Without `ca` the system's authorities are trusted. `cert` and `key` are the client's own (mTLS). */
export interface Tls {
  readonly ca?: string;
  readonly cert?: string;
  readonly key?: string;
}

export interface GateOptions {
  readonly timeoutMs?: number;
  readonly tls?: Tls;
  /** A file with the bearer token. Read for each call, so that the token can be rotated. */
  readonly tokenFile?: string;
}

/** A connection to byok-gate. */
export class Gate {
  readonly #client: InstanceType<PolicyDecision["byokgate"]["v1"]["PolicyDecisionService"]>;
  readonly #timeoutMs: number;
  readonly #tokenFile: string | undefined;

  /** `target` is HOST:PORT or unix:PATH. */
  constructor(target: string, options: GateOptions = {}) {
    this.#timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
    this.#tokenFile = options.tokenFile;
    if (!(this.#timeoutMs > 0 && this.#timeoutMs <= 60_000)) {
      throw new RangeError("timeoutMs: must be above 0 and at most 60000; there is no call without a deadline");
    }
    if (options.tls === undefined && !/^(unix:.*|(localhost|127\.0\.0\.1|\[::1\]):\d+)$/.test(target)) {
      throw new RangeError("tls: is needed beyond this host; whoever reads that network would read every credential");
    }
    this.#client = new packages.byokgate.v1.PolicyDecisionService(target, credentials(options.tls), {
      "grpc.service_config": SERVICE_CONFIG,
      // An environment variable must not send credentials through a proxy.
      "grpc.enable_http_proxy": 0,
    });
  }

  /** Calls byok-gate. Anything but a clear allow is a refusal. */
  async decide(spec: Spec, checkpoint: Checkpoint): Promise<Answer> {
    const metadata = new grpc.Metadata();
    if (this.#tokenFile !== undefined) {
      const token = await readFile(this.#tokenFile, "latin1").then((file) => file.trim(), () => "");
      // grpc-js's own error would quote the header.
      if (!/^[!-~]+$/.test(token)) {
        return undecided(500, "the platform is not wired to byok-gate (its token cannot be read)", "UNAUTHENTICATED");
      }
      metadata.set("authorization", `Bearer ${token}`);
    }
    return new Promise((resolve) => {
      const deadline = Date.now() + this.#timeoutMs;
      this.#client.decide(request(spec, checkpoint), metadata, { deadline }, (error, reply) => {
        resolve(error ? failed(error) : read(reply));
      });
    });
  }

  close(): void {
    this.#client.close();
  }
}

function credentials(tls: Tls | undefined): grpc.ChannelCredentials {
  if (tls === undefined) {
    return grpc.credentials.createInsecure();
  }
  const [ca, key, cert] = [tls.ca, tls.key, tls.cert].map((file) => (file === undefined ? null : readFileSync(file)));
  return grpc.credentials.createSsl(ca, key, cert);
}

/** What a proto string can hold. Half a surrogate pair becomes U+FFFD, which byok-gate refuses in keys and names. */
function text(value: string): string {
  return value.toWellFormed();
}

/** The message that holds the credentials' values. grpc-js and proto-loader do not print it; do not print it either. */
export function request(spec: Spec, checkpoint: Checkpoint): DecideRequest {
  return {
    checkpoint,
    workspaceSpec: {
      workspaceId: text(spec.workspaceId ?? ""),
      organizationId: text(spec.organizationId ?? ""),
      runtime: text(spec.runtime),
      model: text(spec.model),
      credentials: (spec.credentials ?? []).map(({ envName, scope, value }) =>
        value === UNREADABLE
          ? { envName: text(envName), scope, unreadable: true }
          : { envName: text(envName), scope, value: value.reveal() },
      ),
      unreadableScopes: [...(spec.unreadableScopes ?? [])],
      operatorOverride: spec.operatorOverride ?? OperatorOverride.OPERATOR_OVERRIDE_UNSPECIFIED,
      platformProxy: spec.platformProxy ?? PlatformProxy.PLATFORM_PROXY_UNSPECIFIED,
      tenantBaseUrlEnv: (spec.tenantBaseUrlEnv ?? []).map(text),
    },
  };
}

function read(reply: DecideResponse | undefined): Answer {
  // Unspecified on everything but an allow, and a number for an unknown mode; neither is in the map. protobufjs keeps an
  // allow that a denial follows on the wire, so the set member is checked as well.
  const billingMode = BILLING_MODES.get(reply?.allow?.billingMode);
  if (reply?.decision === "allow" && billingMode !== undefined) {
    return {
      outcome: "allowed",
      billingMode,
      decisionId: reply.decisionId,
      provider: reply.resolution?.provider ?? "",
      warnings: reply.warnings.map((warning) => shortName("WARNING_CODE_", warning.code)),
    };
  }
  if (reply?.decision === "deny" && reply.deny) {
    const { code, message, remedy, missingEnv, alternativeModels, retryable, retryAfter } = reply.deny;
    return {
      outcome: "refused",
      httpStatus: retryable ? 503 : 422,
      httpHeaders: headers(retryable ? seconds(retryAfter) : undefined),
      code: shortName("DENY_CODE_", code),
      message,
      remedy,
      missingEnv,
      alternativeModels,
      retryable,
      decisionId: reply.decisionId,
      provider: reply.resolution?.provider ?? "",
    };
  }
  return undecided(503, "byok-gate's reply is of another version, and is taken for a no", "OK");
}

function failed(error: grpc.ServiceError): Undecided {
  const { reason, fields, retryAfter } = details(error);
  const code = grpc.status[error.code] ?? "UNKNOWN";
  switch (error.code) {
    case grpc.status.INVALID_ARGUMENT:
      // Names the invalid field. byok-gate never repeats a credential's value.
      return undecided(400, `the workspace cannot be judged: ${error.details}`, code, { reason, fields });
    case grpc.status.UNAUTHENTICATED:
    case grpc.status.PERMISSION_DENIED:
    case grpc.status.UNIMPLEMENTED:
      return undecided(500, `the platform is not wired to byok-gate (${code})`, code, { reason });
    default:
      return undecided(503, `byok-gate made no decision (${code})`, code, { reason, retryAfter });
  }
}

function undecided(
  httpStatus: 400 | 500 | 503,
  message: string,
  grpcCode: string,
  { reason = "", fields = [], retryAfter = 1 }: { reason?: string; fields?: string[]; retryAfter?: number } = {},
): Undecided {
  const httpHeaders = headers(httpStatus === 503 ? retryAfter : undefined);
  return { outcome: "undecided", httpStatus, httpHeaders, message, grpcCode, reason, fields };
}

/** The details that this program knows. None if they were garbled on the way. */
function details(error: grpc.ServiceError): { reason: string; fields: string[]; retryAfter: number } {
  const found = { reason: "", fields: [] as string[], retryAfter: 1 };
  const { Status, ErrorInfo, BadRequest, RetryInfo } = packages.google.rpc;
  try {
    for (const packed of error.metadata.get("grpc-status-details-bin")) {
      for (const { type_url, value } of Status.deserialize(Buffer.from(packed)).details) {
        if (type_url.endsWith("/google.rpc.ErrorInfo")) {
          const info = ErrorInfo.deserialize(value);
          found.reason = info.domain === "byok-gate" ? info.reason : "";
        } else if (type_url.endsWith("/google.rpc.BadRequest")) {
          found.fields = BadRequest.deserialize(value).fieldViolations.map((violation) => violation.field);
        } else if (type_url.endsWith("/google.rpc.RetryInfo")) {
          found.retryAfter = seconds(RetryInfo.deserialize(value).retryDelay);
        }
      }
    }
  } catch {
    return { reason: "", fields: [], retryAfter: 1 };
  }
  return found;
}

function headers(retryAfter: number | undefined): Record<string, string> {
  // A decision must not be cached.
  const always = { "Cache-Control": "no-store" };
  return retryAfter === undefined ? always : { ...always, "Retry-After": String(retryAfter) };
}

/** A value's name, without its enum's prefix if the value is known. */
function shortName(prefix: string, value: string | number): string {
  if (typeof value === "number") {
    return `${prefix}${value}`;
  }
  return value === `${prefix}UNSPECIFIED` ? value : value.slice(prefix.length);
}

/** Whole seconds, as Retry-After requires; rounded up and never 0, which would cause a busy loop. */
function seconds(time: Duration | null): number {
  return time === null ? 1 : Math.max(1, Math.ceil(time.seconds + time.nanos / 1e9));
}
