"""Makes one call, and prints what a platform would log and answer.

    python example.py TARGET RUNTIME MODEL [NAME ...]

Each NAME is a credential's, and its value is read from the environment. Exits 0 if the workspace may start.
"""

import json
import os
import sys

from byokgate.v1 import policy_decision_pb2 as pb
from gate import Allowed, Credential, Gate, Secret, Spec


def main() -> int:
    target, runtime, model, *names = sys.argv[1:]
    held = [Credential(name, pb.SCOPE_WORKSPACE, Secret(os.environ[name])) for name in names if name in os.environ]
    with Gate(target) as gate:
        answer = gate.decide(Spec(runtime, model, credentials=held), pb.CHECKPOINT_CREATE)
    print(json.dumps(answer.log_fields()))
    if isinstance(answer, Allowed):
        return 0  # only here a platform writes the workspace's row, with answer.billing_mode
    print(f"HTTP {answer.http_status} {json.dumps(answer.http_headers)}\n{answer.message}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
