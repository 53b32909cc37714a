"""The natural ways to read a reply and to print a request, with the result of each: the tables of docs/other-languages.md.

What is seen is written to $BYOK_GATE_SEEN, by which ../check-tables compares the page.
"""

from __future__ import annotations

import json
import os
import pathlib

import grpc
import pytest
from google.protobuf import json_format, text_format
from google.protobuf.json_format import MessageToDict

from byokgate.v1 import policy_decision_pb2 as pb
from byokgate.v1 import policy_decision_pb2_grpc
from five_lines import KNOWN, billing_mode
from gate import _request
from servers import CASES, REPLIES, SERVERS, fake_server, spec_of

#: The expression to use.
NAMED = "r.allow.billing_mode in KNOWN"

# Each is evaluated as written here and on the page.
READINGS = [
    NAMED,
    'r.WhichOneof("decision") == "allow"',
    'r.HasField("allow")',
    'MessageToDict(r).get("allow")',
    "r.allow.billing_mode",
    "r.allow",
    "r.allow is not None",
    "not r.deny.code",
    'not r.HasField("deny")',
    "r.resolution.billing_mode == pb.BILLING_MODE_BYOK",
    "r.allow.billing_mode != pb.BILLING_MODE_BYOK",
]

KEY = "made-up-live"
PRINTERS = [
    "str(request)",
    "repr(request)",
    "text_format.MessageToString(request)",
    "json_format.MessageToJson(request)",
    "repr(MessageToDict(request))",
    "request.SerializeToString()",
    "repr(spec)",
    "[held.env_name for held in request.workspace_spec.credentials]",
]


@pytest.fixture(scope="module")
def replies() -> list[tuple[str, bool, pb.DecideResponse]]:
    """The column of the table, whether it is an allow, and the reply: the real server's, and those that no server sends."""
    found = []
    for case in CASES:
        with grpc.insecure_channel(SERVERS[case["server"]]) as channel:
            decide = policy_decision_pb2_grpc.PolicyDecisionServiceStub(channel).Decide
            checkpoint = pb.Checkpoint.Value("CHECKPOINT_" + case["checkpoint"])
            if "before" in case:
                decide(_request(spec_of(case["before"]), checkpoint), timeout=10)
            reply = decide(_request(spec_of(case["spec"]), checkpoint), timeout=10)
        allowed = "allowed" in case["expect"]
        assert reply.HasField("allow" if allowed else "deny")
        found.append(("an allow" if allowed else "a denial", allowed, reply))
    for row in REPLIES:
        if "column" in row:
            found.append((row["column"], "allowed" in row["expect"], pb.DecideResponse.FromString(bytes.fromhex(row["hex"]))))
    return found


def taken_for_an_allow(reading: str, reply: pb.DecideResponse) -> bool:
    return bool(eval(reading, {"r": reply, "pb": pb, "KNOWN": KNOWN, "MessageToDict": MessageToDict}))


def test_the_reading_that_the_page_names_takes_every_allow_and_nothing_else(replies: list) -> None:
    for column, allowed, reply in replies:
        assert taken_for_an_allow(NAMED, reply) is allowed, (column, reply)


def test_what_each_reading_makes_of_each_reply(replies: list) -> None:
    seen: dict[str, dict[str, list[int]]] = {reading: {} for reading in READINGS}
    for reading, columns in seen.items():
        for column, _, reply in replies:
            counts = columns.setdefault(column, [0, 0])
            counts[0] += taken_for_an_allow(reading, reply)
            counts[1] += 1
    report("readings", [{"reading": reading, "seen": columns} for reading, columns in seen.items()])


def test_the_five_lines_of_the_page_take_every_allow_and_nothing_else(replies: list) -> None:
    sent = iter([reply.SerializeToString() for _, _, reply in replies] + [b"\x12\x02\x08"])  # and torn bytes
    with fake_server(lambda request, context: next(sent)) as address, grpc.insecure_channel(address) as channel:
        stub = policy_decision_pb2_grpc.PolicyDecisionServiceStub(channel)
        for column, allowed, _ in replies:
            assert (billing_mode(stub, pb.DecideRequest()) is not None) is allowed, column
        assert billing_mode(stub, pb.DecideRequest()) is None
    with grpc.insecure_channel(SERVERS["nobody"]) as channel:
        assert billing_mode(policy_decision_pb2_grpc.PolicyDecisionServiceStub(channel), pb.DecideRequest()) is None


def test_what_prints_a_key() -> None:
    spec = spec_of(CASES[0]["spec"])
    request = _request(spec, pb.CHECKPOINT_CREATE)
    names = {"request": request, "spec": spec, "text_format": text_format, "json_format": json_format, "MessageToDict": MessageToDict}
    report("printers", [{"printer": printer, "prints": KEY in str(eval(printer, names))} for printer in PRINTERS])


def report(part: str, rows: list[dict]) -> None:
    if folder := os.environ.get("BYOK_GATE_SEEN"):
        pathlib.Path(folder, f"python.{part}.json").write_text(json.dumps({"named": NAMED, "rows": rows}))
