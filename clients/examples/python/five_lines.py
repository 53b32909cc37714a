"""The minimum for a caller of the generated code. docs/other-languages.md shows it."""

from __future__ import annotations

import grpc

from byokgate.v1 import policy_decision_pb2 as pb
from byokgate.v1.policy_decision_pb2_grpc import PolicyDecisionServiceStub

# On the page from here.
KNOWN = (pb.BILLING_MODE_PLATFORM_MANAGED, pb.BILLING_MODE_BYOK, pb.BILLING_MODE_NONE)


def billing_mode(stub: PolicyDecisionServiceStub, request: pb.DecideRequest) -> pb.BillingMode | None:
    """Who pays, or None: nothing starts."""
    try:
        r = stub.Decide(request, timeout=4)
    except grpc.RpcError:
        return None  # no decision
    return r.allow.billing_mode if r.allow.billing_mode in KNOWN else None  # None: a denial, or an unknown mode
