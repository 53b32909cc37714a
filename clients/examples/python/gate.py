"""Asks byok-gate whether a workspace may start, and fails closed: only an `Allowed` may start anything.

    gate = Gate("unix:/run/byok-gate/gate.sock")
    spec = Spec("claude-code", "claude-opus-4-8", credentials=[Credential("ANTHROPIC_API_KEY", pb.SCOPE_WORKSPACE, Secret(key))])
    match gate.decide(spec, pb.CHECKPOINT_CREATE):
        case Allowed(billing_mode=mode):
            insert_workspace(mode)
        case refusal:
            return respond(refusal.http_status, refusal.http_headers, refusal.message)

`decide` raises nothing that a caller could overlook: a denial is a `Refused`, and everything that is no decision is an `Undecided`.
"""

from __future__ import annotations

import enum
import json
import math
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from byokgate.v1 import policy_decision_pb2 as pb
from byokgate.v1 import policy_decision_pb2_grpc

__all__ = ["Allowed", "Answer", "BillingMode", "Credential", "Gate", "Refused", "Secret", "Spec", "Tls", "UNREADABLE", "Undecided"]

# byok-gate gives a provider three seconds to answer; a caller that waits a little longer gets the result.
DEFAULT_TIMEOUT = 4.0

# All calls are read-only, so repeating one does no harm. The call's deadline limits all attempts together.
SERVICE_CONFIG = json.dumps({
    "methodConfig": [{
        "name": [{"service": "byokgate.v1.PolicyDecisionService"}],
        "retryPolicy": {
            "maxAttempts": 4,
            "initialBackoff": "0.05s",
            "maxBackoff": "0.5s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        },
    }]
})


# === The request ===


def _text(text: str) -> str:
    """What a proto string can hold. Half a surrogate pair becomes U+FFFD, which byok-gate refuses in keys and names."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


class Secret:
    """A credential's value, which nothing prints, logs, pickles or compares by accident. `reveal` returns it."""

    __slots__ = ("_reveal",)

    def __init__(self, value: str) -> None:
        if not isinstance(value, str):
            raise TypeError("a secret is a str")  # which does not repeat the value
        value = _text(value)
        # A function, since tools that show the attributes of an object show a function by its name.
        self._reveal = lambda: value

    def reveal(self) -> str:
        return self._reveal()

    def __repr__(self) -> str:
        return "[redacted]"

    def __deepcopy__(self, _: object) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not for storing")


#: The value of a row that exists but could not be read or decrypted. Never leave such a row out: that would mean that there is none.
UNREADABLE = Secret("")


@dataclass(frozen=True)
class Credential:
    """One row of the secret store."""

    env_name: str
    scope: pb.Scope
    value: Secret


@dataclass(frozen=True)
class Spec:
    """The workspace as it would start: the effective runtime and model, and the credentials that matter to them."""

    runtime: str
    model: str
    workspace_id: str = ""
    organization_id: str = ""
    credentials: Sequence[Credential] = ()
    #: Scopes that could not be listed at all.
    unreadable_scopes: Sequence[pb.Scope] = ()
    operator_override: pb.OperatorOverride = pb.OPERATOR_OVERRIDE_UNSPECIFIED
    platform_proxy: pb.PlatformProxy = pb.PLATFORM_PROXY_UNSPECIFIED
    tenant_base_url_env: Sequence[str] = ()


# === The answer ===


class BillingMode(enum.Enum):
    """Who pays. A mode of a later byok-gate is unknown until it is added here."""

    PLATFORM_MANAGED = pb.BILLING_MODE_PLATFORM_MANAGED
    BYOK = pb.BILLING_MODE_BYOK
    NONE = pb.BILLING_MODE_NONE


_BILLING_MODES = {mode.value: mode for mode in BillingMode}


class _Answer:
    def __bool__(self) -> NoReturn:
        # `if gate.decide(...)` would treat every refusal as an allow.
        raise TypeError("an answer has no truth value; ask isinstance(answer, Allowed)")


@dataclass(frozen=True)
class Allowed(_Answer):
    """The workspace may start."""

    billing_mode: BillingMode
    decision_id: str
    provider: str
    #: What a person should know, by name. CREDENTIAL_UNVERIFIED: the key could not be verified, and policy allows that.
    warnings: tuple[str, ...] = ()

    def log_fields(self) -> dict[str, object]:
        """What is safe to log: names and ids."""
        return {
            "outcome": "allowed",
            "billing_mode": self.billing_mode.name,
            "decision_id": self.decision_id,
            "provider": self.provider,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Refused(_Answer):
    """The workspace must not start. `message` and `remedy` are for the tenant."""

    #: Such as MISSING_BYOK_CREDENTIAL, or DENY_CODE_999 for an unknown code, which is still a denial.
    code: str
    message: str
    remedy: str
    missing_env: tuple[str, ...]
    alternative_models: tuple[str, ...]
    retryable: bool
    #: In whole seconds. 0 unless the denial is retryable.
    retry_after: int
    decision_id: str
    provider: str

    @property
    def http_status(self) -> int:
        return 503 if self.retryable else 422

    @property
    def http_headers(self) -> dict[str, str]:
        return _http_headers(self.http_status, self.retry_after)

    def log_fields(self) -> dict[str, object]:
        """What is safe to log: names and ids."""
        return {
            "outcome": "refused",
            "code": self.code,
            "retryable": self.retryable,
            "decision_id": self.decision_id,
            "provider": self.provider,
        }


@dataclass(frozen=True)
class Undecided(_Answer):
    """There is no decision, so nothing may start. `message` is for the tenant."""

    #: 400: the request is invalid. 500: the platform is misconfigured, which no tenant can fix. 503: try again.
    http_status: int
    message: str
    #: gRPC's code, such as UNAVAILABLE. OK if the reply could not be understood.
    grpc_code: str
    #: byok-gate's ErrorReason, such as DRAINING. Empty if byok-gate did not say.
    reason: str = ""
    #: The invalid fields of the request.
    fields: tuple[str, ...] = ()
    #: In whole seconds. 0 unless http_status is 503.
    retry_after: int = 0

    @property
    def http_headers(self) -> dict[str, str]:
        return _http_headers(self.http_status, self.retry_after)

    def log_fields(self) -> dict[str, object]:
        """What is safe to log: names and ids."""
        return {"outcome": "undecided", "grpc_code": self.grpc_code, "reason": self.reason, "fields": list(self.fields)}


Answer = Allowed | Refused | Undecided


def _http_headers(status: int, retry_after: int) -> dict[str, str]:
    # A decision must not be cached.
    headers = {"Cache-Control": "no-store"}
    if status == 503:
        headers["Retry-After"] = str(retry_after)
    return headers


# === The client ===


@dataclass(frozen=True)
class Tls:
    """Files in PEM. Without `ca` the system's authorities are trusted. `cert` and `key` are the client's own (mTLS)."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


class Gate:
    """A connection to byok-gate. One serves all threads of a process; make it after a fork, not before."""

    def __init__(
        self, target: str, *, timeout: float = DEFAULT_TIMEOUT, tls: Tls | None = None, token_file: str | None = None
    ) -> None:
        """`target` is HOST:PORT or unix:PATH. The token file is read for each call, so that the token can be rotated."""
        if not 0 < timeout <= 60:
            raise ValueError("timeout: must be above 0 and at most 60 s; there is no call without a deadline")
        options: list[tuple[str, str | int]] = [
            ("grpc.service_config", SERVICE_CONFIG),
            # An environment variable must not send credentials through a proxy.
            ("grpc.enable_http_proxy", 0),
        ]
        if target.startswith("unix:"):
            # The C core makes an :authority of the path, percent-encoded, which HTTP/2 servers refuse.
            options.append(("grpc.default_authority", "localhost"))
        if tls is not None:
            self._channel = grpc.secure_channel(target, _credentials(tls), options)
        elif re.match(r"unix:|localhost:\d+$|127\.0\.0\.1:\d+$|\[::1\]:\d+$", target):
            self._channel = grpc.insecure_channel(target, options)
        else:
            raise ValueError("tls: is needed beyond this host; whoever reads that network would read every credential")
        self._timeout = timeout
        self._token_file = token_file
        self._decide = policy_decision_pb2_grpc.PolicyDecisionServiceStub(self._channel).Decide

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def decide(self, spec: Spec, checkpoint: pb.Checkpoint) -> Answer:
        """Calls byok-gate. Anything but a clear allow is a refusal."""
        try:
            metadata = _metadata(self._token_file)
        except (OSError, ValueError):
            # The error is not repeated: that of text that does not decode holds the text.
            return Undecided(500, "the platform is not wired to byok-gate (its token cannot be read)", "UNAUTHENTICATED")
        try:
            # The message is in no variable: tools that show local variables would show every credential.
            reply = self._decide(_request(spec, checkpoint), timeout=self._timeout, metadata=metadata)
        except grpc.RpcError as error:
            return _undecided(error)
        return _read(reply)


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    ca, cert, key = (pathlib.Path(file).read_bytes() if file else None for file in (tls.ca, tls.cert, tls.key))
    return grpc.ssl_channel_credentials(ca, key, cert)


def _metadata(token_file: str | None) -> list[tuple[str, str]]:
    if token_file is None:
        return []
    token = pathlib.Path(token_file).read_text(encoding="ascii").strip()
    if not re.fullmatch("[!-~]+", token):
        # grpcio would report INTERNAL, as if byok-gate had failed.
        raise ValueError("not one token of visible ASCII")
    return [("authorization", f"Bearer {token}")]


def _request(spec: Spec, checkpoint: pb.Checkpoint) -> pb.DecideRequest:
    return pb.DecideRequest(
        checkpoint=checkpoint,
        workspace_spec=pb.WorkspaceSpec(
            workspace_id=_text(spec.workspace_id),
            organization_id=_text(spec.organization_id),
            runtime=_text(spec.runtime),
            model=_text(spec.model),
            credentials=[
                pb.Credential(env_name=_text(held.env_name), scope=held.scope, unreadable=True)
                if held.value is UNREADABLE
                else pb.Credential(env_name=_text(held.env_name), scope=held.scope, value=held.value.reveal())
                for held in spec.credentials
            ],
            unreadable_scopes=spec.unreadable_scopes,
            operator_override=spec.operator_override,
            platform_proxy=spec.platform_proxy,
            tenant_base_url_env=[_text(name) for name in spec.tenant_base_url_env],
        ),
    )


def _read(reply: pb.DecideResponse) -> Answer:
    # Zero on everything but an allow. A number that is not in the map is not an allow either.
    mode = _BILLING_MODES.get(reply.allow.billing_mode)
    if mode is not None:
        return Allowed(
            billing_mode=mode,
            decision_id=reply.decision_id,
            provider=reply.resolution.provider,
            warnings=tuple(_name(pb.WarningCode, "WARNING_CODE_", warning.code) for warning in reply.warnings),
        )
    if reply.HasField("deny"):
        return Refused(
            code=_name(pb.DenyCode, "DENY_CODE_", reply.deny.code),
            message=reply.deny.message,
            remedy=reply.deny.remedy,
            missing_env=tuple(reply.deny.missing_env),
            alternative_models=tuple(reply.deny.alternative_models),
            retryable=reply.deny.retryable,
            retry_after=_seconds(reply.deny.retry_after) if reply.deny.retryable else 0,
            decision_id=reply.decision_id,
            provider=reply.resolution.provider,
        )
    return Undecided(503, "byok-gate's reply is of another version, and is taken for a no", "OK", retry_after=1)


def _undecided(error: grpc.RpcError) -> Undecided:
    code = error.code()
    details = _details(error)
    reason = ""
    fields: tuple[str, ...] = ()
    retry_after = 1
    for detail in details:
        match detail:
            case error_details_pb2.ErrorInfo(domain="byok-gate"):
                reason = detail.reason
            case error_details_pb2.BadRequest():
                fields = tuple(violation.field for violation in detail.field_violations)
            case error_details_pb2.RetryInfo():
                retry_after = _seconds(detail.retry_delay)
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            # Names the invalid field. byok-gate never repeats a credential's value.
            return Undecided(400, f"the workspace cannot be judged: {error.details()}", code.name, reason, fields)
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED | grpc.StatusCode.UNIMPLEMENTED:
            return Undecided(500, f"the platform is not wired to byok-gate ({code.name})", code.name, reason)
        case _:
            return Undecided(503, f"byok-gate made no decision ({code.name})", code.name, reason, retry_after=retry_after)


def _details(error: grpc.RpcError) -> list[object]:
    """The details that this program knows. None if they were garbled on the way."""
    known = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found: list[object] = []
    try:
        status = rpc_status.from_call(error)
        for packed in status.details if status else ():
            for kind in known:
                detail = kind()
                if packed.Unpack(detail):
                    found.append(detail)
    except Exception:
        return []
    return found


def _name(kind: EnumTypeWrapper, prefix: str, number: int) -> str:
    """A value's name, without its enum's prefix if the value is known."""
    if number not in kind.values():
        return f"{prefix}{number}"
    name = kind.Name(number)
    return name.removeprefix(prefix) if number else name


def _seconds(time: Duration) -> int:
    """Whole seconds, as Retry-After requires; rounded up and never 0, which would cause a busy loop."""
    return max(1, math.ceil(time.seconds + time.nanos / 1e9))
