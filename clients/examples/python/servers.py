"""The servers for the tests: the real ones that with-servers started, and one that sends given bytes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator

import grpc

from byokgate.v1 import policy_decision_pb2 as pb
from gate import UNREADABLE, Credential, Secret, Spec

STARTED = json.loads(pathlib.Path(os.environ["BYOK_GATE_SERVERS"]).read_text())
SERVERS: dict[str, str] = STARTED["servers"]
FILES: dict[str, str] = STARTED["files"]
CASES = json.loads(pathlib.Path(FILES["cases"]).read_text())["cases"]
REPLIES = json.loads(pathlib.Path(FILES["replies"]).read_text())["replies"]


def name_of(case: dict) -> str:
    return case["name"]


def spec_of(text: dict) -> Spec:
    """A spec from cases.json."""
    return Spec(
        runtime=text["runtime"],
        model=text["model"],
        organization_id=text.get("organization_id", ""),
        credentials=[
            Credential(
                held["env_name"],
                pb.Scope.Value("SCOPE_" + held["scope"]),
                UNREADABLE if held.get("unreadable") else Secret(held["value"]),
            )
            for held in text.get("credentials", [])
        ],
        unreadable_scopes=[pb.Scope.Value("SCOPE_" + scope) for scope in text.get("unreadable_scopes", [])],
        operator_override=pb.OperatorOverride.Value("OPERATOR_OVERRIDE_" + text.get("operator_override", "UNSPECIFIED")),
        platform_proxy=pb.PlatformProxy.Value("PLATFORM_PROXY_" + text.get("platform_proxy", "UNSPECIFIED")),
    )


@contextlib.contextmanager
def fake_server(answer: Callable[[bytes, grpc.ServicerContext], bytes]) -> Iterator[str]:
    """A server whose Decide answers with bytes, and its address."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            if details.method == "/byokgate.v1.PolicyDecisionService/Decide":
                return grpc.unary_unary_rpc_method_handler(answer)
            return None

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)
