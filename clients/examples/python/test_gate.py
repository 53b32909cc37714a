"""`decide` against real servers, and against one that sends what no current server would."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pathlib
import pickle
import pprint
import subprocess
import sys
import threading
import traceback

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

import gate as example
from byokgate.v1 import policy_decision_pb2 as pb
from gate import Allowed, BillingMode, Credential, Gate, Refused, Secret, Spec, Tls, Undecided
from servers import CASES, FILES, REPLIES, SERVERS, fake_server, name_of, spec_of

KEY = "made-up-live"
LIVE = Spec("agent", "acme-large", credentials=[Credential("ACME_API_KEY", pb.SCOPE_WORKSPACE, Secret(KEY))])


def expect(answer: example.Answer, expected: dict) -> None:
    """Checks that an answer is what cases.json or replies.json says."""
    if "allowed" in expected:
        assert isinstance(answer, Allowed)
        assert answer.billing_mode is BillingMode[expected["allowed"]]
        assert list(answer.warnings) == expected["warnings"]
        assert answer.decision_id
        return
    if "undecided" in expected:
        assert isinstance(answer, Undecided)
        assert (answer.http_status, answer.http_headers["Retry-After"]) == (503, "1")
        return
    assert isinstance(answer, Refused)
    assert answer.code == expected["refused"]
    assert answer.retryable is expected["retryable"]
    assert answer.message == expected.get("message", answer.message)
    assert answer.remedy == expected.get("remedy", answer.remedy)
    assert list(answer.missing_env) == expected.get("missing_env", list(answer.missing_env))
    assert list(answer.alternative_models) == expected.get("alternative_models", list(answer.alternative_models))
    assert answer.http_headers["Cache-Control"] == "no-store"
    if expected["retryable"]:
        assert answer.http_status == 503
        assert answer.retry_after >= 1
        assert answer.retry_after == expected.get("retry_after_seconds", answer.retry_after)
        assert answer.http_headers["Retry-After"] == str(answer.retry_after)
    else:
        assert answer.http_status == 422
        assert answer.retry_after == 0
        assert "Retry-After" not in answer.http_headers


# === Decisions of the real server ===


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_decision_of_the_real_server(case: dict) -> None:
    checkpoint = pb.Checkpoint.Value("CHECKPOINT_" + case["checkpoint"])
    with Gate(SERVERS[case["server"]]) as gate:
        if "before" in case:
            gate.decide(spec_of(case["before"]), checkpoint)
        answer = gate.decide(spec_of(case["spec"]), checkpoint)
    expect(answer, case["expect"])
    if isinstance(answer, Refused):
        assert answer.message and answer.remedy, "a denial of the real server says why, and what to do"


def test_every_code_that_a_server_can_send_is_among_the_cases() -> None:
    # DERIVED_PROVIDER_NOT_IN_REGISTRY is ruled out by the server's checks at load.
    known = {name.removeprefix("DENY_CODE_") for name in pb.DenyCode.keys()} - {"UNSPECIFIED", "DERIVED_PROVIDER_NOT_IN_REGISTRY"}
    assert {case["expect"]["refused"] for case in CASES if "refused" in case["expect"]} == known


def test_over_a_unix_socket() -> None:
    with Gate(SERVERS["unix"]) as gate:
        assert isinstance(gate.decide(LIVE, pb.CHECKPOINT_CREATE), Allowed)


def test_a_unix_socket_needs_the_default_authority() -> None:
    """Shows that the option is needed; remove it when it is not."""
    with grpc.insecure_channel(SERVERS["unix"]) as channel:
        decide = channel.unary_unary("/byokgate.v1.PolicyDecisionService/Decide")
        with pytest.raises(grpc.RpcError) as raised:
            decide(b"", timeout=10)
    # The real server answers an empty request with INVALID_ARGUMENT; this one does not reach it.
    assert raised.value.code() is not grpc.StatusCode.INVALID_ARGUMENT


def test_tls_with_a_client_certificate() -> None:
    tls = Tls(ca=FILES["ca"], cert=FILES["client_cert"], key=FILES["client_key"])
    with Gate(SERVERS["mtls"], tls=tls) as gate:
        assert isinstance(gate.decide(LIVE, pb.CHECKPOINT_CREATE), Allowed)


@pytest.mark.parametrize("tls", [Tls(ca=FILES["ca"]), Tls(ca=FILES["other_ca"], cert=FILES["client_cert"], key=FILES["client_key"])])
def test_tls_that_does_not_stand(tls: Tls) -> None:
    with Gate(SERVERS["mtls"], tls=tls) as gate:
        answer = gate.decide(LIVE, pb.CHECKPOINT_CREATE)
    assert isinstance(answer, Undecided) and answer.http_status == 503


def test_no_plain_text_beyond_this_host() -> None:
    for target in ("gate.example:50051", "dns:///localhost.example:50051", "10.0.0.1:50051", "127.0.0.1.example:50051"):
        with pytest.raises(ValueError, match="tls"):
            Gate(target)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_no_call_without_a_deadline(timeout: float) -> None:
    with pytest.raises(ValueError, match="deadline"):
        Gate(SERVERS["plain"], timeout=timeout)


# === Errors of the real server ===


def ask(spec: Spec = LIVE, checkpoint: pb.Checkpoint = pb.CHECKPOINT_CREATE, token: str | None = None) -> example.Answer:
    if token is None:
        with Gate(SERVERS["plain"]) as gate:
            return gate.decide(spec, checkpoint)
    with Gate(SERVERS["token"], tls=Tls(ca=FILES["ca"]), token_file=token or None) as gate:
        return gate.decide(spec, checkpoint)


def test_a_token() -> None:
    assert isinstance(ask(token=FILES["token_platform"]), Allowed)


@pytest.mark.parametrize(
    ("token", "grpc_code", "reason"),
    [
        ("", "UNAUTHENTICATED", "TOKEN_MISSING"),
        (FILES["token_unknown"], "UNAUTHENTICATED", "TOKEN_UNKNOWN"),
        (FILES["token_operator"], "PERMISSION_DENIED", "METHOD_NOT_ALLOWED"),
        (FILES["token_workspace"], "PERMISSION_DENIED", "REQUEST_NOT_ALLOWED"),
    ],
)
def test_a_caller_that_may_not_ask(token: str, grpc_code: str, reason: str) -> None:
    answer = ask(token=token)
    assert isinstance(answer, Undecided)
    assert (answer.http_status, answer.grpc_code, answer.reason) == (500, grpc_code, reason)
    assert "Retry-After" not in answer.http_headers


def test_a_limit_that_is_reached() -> None:
    spec = dataclasses.replace(LIVE, workspace_id="ws-2")
    # One call a minute.
    answers = [ask(spec, pb.CHECKPOINT_PROVISION, FILES["token_limited"]) for _ in range(2)]
    limited = answers[-1]
    assert isinstance(limited, Undecided)
    assert (limited.http_status, limited.grpc_code, limited.reason) == (503, "RESOURCE_EXHAUSTED", "LIMIT_REACHED")
    assert limited.http_headers["Retry-After"] == str(limited.retry_after)
    assert limited.retry_after >= 1


@pytest.mark.parametrize(
    ("spec", "checkpoint", "reason", "field"),
    [
        (dataclasses.replace(LIVE, model="m" * 513), pb.CHECKPOINT_CREATE, "BAD_REQUEST", "workspace_spec.model"),
        (LIVE, pb.CHECKPOINT_UNSPECIFIED, "BAD_REQUEST", "checkpoint"),
        (LIVE, 99, "BAD_REQUEST", "checkpoint"),
        (
            Spec("agent", "acme-large", credentials=[
                Credential(f"MADE_UP_{number}", pb.SCOPE_WORKSPACE, Secret("k" * 60000)) for number in range(5)
            ]),
            pb.CHECKPOINT_CREATE,
            "REQUEST_TOO_LARGE",
            None,
        ),
    ],
    ids=["a field that is too long", "no checkpoint", "an unknown checkpoint", "a request that is too large"],
)
def test_a_request_that_cannot_be_judged(spec: Spec, checkpoint: pb.Checkpoint, reason: str, field: str | None) -> None:
    answer = ask(spec, checkpoint)
    assert isinstance(answer, Undecided)
    assert (answer.http_status, answer.grpc_code, answer.reason) == (400, "INVALID_ARGUMENT", reason)
    if field is not None:
        assert answer.fields == (field,)
        assert field in answer.message


@pytest.mark.parametrize("server", ["nobody", "not_grpc"])
def test_nobody_who_speaks_grpc_is_there(server: str) -> None:
    with Gate(SERVERS[server]) as gate:
        answer = gate.decide(LIVE, pb.CHECKPOINT_CREATE)
    assert isinstance(answer, Undecided)
    assert (answer.http_status, answer.grpc_code, answer.reason) == (503, "UNAVAILABLE", "")


# === Replies that no current server sends ===


@pytest.mark.parametrize("row", REPLIES, ids=name_of)
def test_a_reply_as_bytes(row: dict) -> None:
    with fake_server(lambda request, context: bytes.fromhex(row["hex"])) as address, Gate(address) as gate:
        expect(gate.decide(LIVE, pb.CHECKPOINT_CREATE), row["expect"])


def failing(code: grpc.StatusCode, *details: object, times: int = 10**9, trailers: tuple = ()):
    """A Decide that fails this many times, and then allows."""
    calls = []

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        calls.append(request)
        if len(calls) > times:
            return pb.DecideResponse(decision_id="made-up", allow=pb.Allow(billing_mode=pb.BILLING_MODE_BYOK)).SerializeToString()
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        if packed:
            status = status_pb2.Status(code=code.value[0], message="made up", details=packed)
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        else:
            context.set_trailing_metadata(trailers)
        context.abort(code, "made up")
        raise AssertionError("abort raises")

    answer.calls = calls
    return answer


def info(reason: str, domain: str = "byok-gate") -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(domain=domain, reason=reason)


DRAINING = (grpc.StatusCode.UNAVAILABLE, info("DRAINING"), error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=1)))
RETRY_LATER = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=9, nanos=1))
TORN = (("grpc-status-details-bin", b"\x1a\x7f"),)


@pytest.mark.parametrize(
    ("answer", "http_status", "reason", "retry_after"),
    [
        (failing(*DRAINING), 503, "DRAINING", 1),
        (failing(grpc.StatusCode.RESOURCE_EXHAUSTED, RETRY_LATER), 503, "", 10),
        (failing(grpc.StatusCode.DEADLINE_EXCEEDED, info("DEADLINE")), 503, "DEADLINE", 1),
        (failing(grpc.StatusCode.INTERNAL, info("INTERNAL")), 503, "INTERNAL", 1),
        (failing(grpc.StatusCode.INTERNAL, info("A_REASON_OF_TOMORROW")), 503, "A_REASON_OF_TOMORROW", 1),
        (failing(grpc.StatusCode.UNKNOWN, info("DRAINING", domain="somebody-else")), 503, "", 1),
        (failing(grpc.StatusCode.INVALID_ARGUMENT), 400, "", 0),
        (failing(grpc.StatusCode.UNIMPLEMENTED), 500, "", 0),
        (failing(grpc.StatusCode.INVALID_ARGUMENT, trailers=TORN), 400, "", 0),
        (failing(grpc.StatusCode.DATA_LOSS, trailers=TORN), 503, "", 1),
    ],
)
def test_an_error(answer, http_status: int, reason: str, retry_after: int) -> None:
    with fake_server(answer) as address, Gate(address) as gate:
        got = gate.decide(LIVE, pb.CHECKPOINT_CREATE)
    assert isinstance(got, Undecided)
    assert (got.http_status, got.reason, got.retry_after) == (http_status, reason, retry_after)


def test_a_server_that_is_stopping_is_asked_again() -> None:
    answer = failing(*DRAINING, times=2)
    with fake_server(answer) as address, Gate(address) as gate:
        assert isinstance(gate.decide(LIVE, pb.CHECKPOINT_CREATE), Allowed)
    assert len(answer.calls) == 3


def test_what_is_not_away_is_asked_once() -> None:
    answer = failing(grpc.StatusCode.INTERNAL, times=2)
    with fake_server(answer) as address, Gate(address) as gate:
        assert isinstance(gate.decide(LIVE, pb.CHECKPOINT_CREATE), Undecided)
    assert len(answer.calls) == 1


def test_a_server_that_never_answers() -> None:
    ended = threading.Event()
    seen = []

    def silent(request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.append(context.time_remaining())
        ended.wait(60)
        return b""

    with fake_server(silent) as address, Gate(address, timeout=0.3) as gate:
        answer = gate.decide(LIVE, pb.CHECKPOINT_CREATE)
        ended.set()
    assert isinstance(answer, Undecided)
    assert (answer.http_status, answer.grpc_code) == (503, "DEADLINE_EXCEEDED")
    assert seen and seen[0] is not None and seen[0] < 10, "the server is told the deadline, so that it can answer before"


# === Nothing prints a key ===


def shown(value: object) -> list[str]:
    """Every way to see a value, on purpose or by a tool."""
    record = logging.LogRecord("name", logging.INFO, "path", 1, "%s %r", (value, value), None)
    texts = [str(value), repr(value), f"{value}", f"{value!r:>5}", "%s" % (value,), pprint.pformat(value), record.getMessage()]
    texts.append(json.dumps(value, default=str))
    texts.append(json.dumps(value, default=lambda held: getattr(held, "__dict__", str(held))))
    texts.append(repr(copy.deepcopy(value)))
    if dataclasses.is_dataclass(value):
        texts.append(repr(dataclasses.asdict(value)))
    try:
        texts.append(repr(pickle.dumps(value)))
    except TypeError as refused:
        texts.append(str(refused))
    return texts


@pytest.mark.parametrize("value", [Secret(KEY), LIVE.credentials[0], LIVE], ids=["a secret", "a credential", "a spec"])
def test_nothing_prints_a_key(value: object) -> None:
    for text in shown(value):
        assert KEY not in text
    if not isinstance(value, Secret):
        assert "[redacted]" in repr(value)


def test_a_fault_does_not_print_a_key_nor_a_token(tmp_path: pathlib.Path) -> None:
    """Tracebacks with the values of local variables, as some error reporters collect them."""
    with pytest.raises(TypeError) as raised:
        Secret(KEY.encode())  # type: ignore[arg-type]
    assert KEY not in "".join(traceback.format_exception(raised.value))

    token = tmp_path / "token"
    for content in ("made-up-token\nmade-up-token-2", "made-up-token\x00", "made-up-tok\u00e9n", ""):
        token.write_text(content)
        with Gate(SERVERS["plain"], token_file=str(token)) as gate:
            answer = gate.decide(LIVE, pb.CHECKPOINT_CREATE)
        assert isinstance(answer, Undecided) and answer.http_status == 500
        assert "made-up-token" not in repr(answer) + repr(answer.log_fields())
    with Gate(SERVERS["plain"], token_file=str(tmp_path / "none")) as gate:
        assert isinstance(gate.decide(LIVE, pb.CHECKPOINT_CREATE), Undecided)


def test_no_frame_of_the_example_holds_the_message_while_it_asks() -> None:
    frames = []

    def tell(request: bytes, context: grpc.ServicerContext) -> bytes:
        for frame in sys._current_frames().values():
            while frame is not None:
                if frame.f_code.co_filename == example.__file__:
                    frames.append(repr(frame.f_locals))
                frame = frame.f_back
        return b""

    with fake_server(tell) as address, Gate(address) as gate:
        gate.decide(LIVE, pb.CHECKPOINT_CREATE)
    assert frames
    assert not [text for text in frames if KEY in text]


def test_a_copy_of_what_is_unreadable_is_unreadable() -> None:
    held = dataclasses.replace(LIVE, credentials=[Credential("ACME_API_KEY", pb.SCOPE_WORKSPACE, example.UNREADABLE)])
    answer = ask(copy.deepcopy(held))
    assert isinstance(answer, Refused) and answer.code == "CREDENTIAL_SCOPE_UNREADABLE"


def test_answers_have_no_truth_value() -> None:
    for answer in (ask(), ask(dataclasses.replace(LIVE, model="")), ask(LIVE, pb.CHECKPOINT_UNSPECIFIED)):
        with pytest.raises(TypeError, match="isinstance"):
            bool(answer)


# === The program ===


# The environment's proxy is not used.
PROXIES = {name: f"http://{SERVERS['nobody']}" for name in ("grpc_proxy", "https_proxy", "http_proxy")}


@pytest.mark.parametrize(
    ("model", "status", "said"),
    [("acme-large", 0, '"outcome": "allowed"'), ("no-such-model", 1, "HTTP 422"), ("m" * 600, 1, "HTTP 400")],
)
def test_the_program(model: str, status: int, said: str) -> None:
    program = pathlib.Path(example.__file__).with_name("example.py")
    done = subprocess.run(
        [sys.executable, str(program), SERVERS["plain"], "agent", model, "ACME_API_KEY"],
        env={"PYTHONPATH": ":".join(sys.path), "ACME_API_KEY": KEY} | PROXIES,
        capture_output=True, text=True, timeout=60, check=False,
    )
    assert (done.returncode, said in done.stdout) == (status, True), done
    assert KEY not in done.stdout + done.stderr
