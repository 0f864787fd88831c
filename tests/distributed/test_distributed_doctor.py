"""Two real ranks that are examined before a run: what differs and how fast they are, one that is missing, one that
hangs, one with a wrong interface.
"""

from __future__ import annotations

import json
import os
import signal

import pytest
from waiting import wait_until

from mm_moslora.planning.ranks.distributed_doctor import diagnose_ranks
from mm_moslora.training.supervision import rank_agreement
from mm_moslora.utils import distributed


def examine(kind: str) -> int:
    """What each rank does."""
    second, limit = os.environ["RANK"] == "1", 60.0
    if kind == "differ" and second:
        real = rank_agreement.installed_version
        rank_agreement.installed_version = lambda name: "5.0.0" if name == "transformers" else real(name)
        os.environ["NCCL_SOCKET_IFNAME"] = "nothing"  # which gloo does not read
    if kind == "missing":
        limit = 1.0
        if second:
            return 0
    if kind == "hangs":
        limit = 5.0
        if second:
            distributed.join = lambda **_: os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "interface" and second:
        os.environ["GLOO_SOCKET_IFNAME"] = "ib7"
    findings = diagnose_ranks(None, limit=limit)
    if not second:
        print(json.dumps([[item.name, item.status, item.detail] for item in findings]))
    return 0


def test_ranks_report_what_differs_and_how_fast_their_links_are(ranks):
    group = ranks.run(["test_distributed_doctor:examine", "differ"])
    findings = {name: (status, detail) for name, status, detail in json.loads(group.output(0).splitlines()[-1])}
    host = os.uname().nodename
    status, detail = findings["transformers of the ranks"]
    assert status == "bad"
    assert detail.endswith(f"; 5.0.0 on rank 1 ({host})")
    assert findings["network of rank 1"][0] == "bad"
    assert "NCCL_SOCKET_IFNAME is nothing" in findings["network of rank 1"][1]
    assert findings["ranks"] == ("ok", f"2: 0-1 on {host}")
    assert findings["clocks"][0] == "ok"
    assert "GB/s per rank" in findings["all-reduce"][1]
    assert findings["links within hosts"][1].endswith("GB/s each way")
    assert "computing" in findings


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "error: Not finished after 1 s: rank 1 of 2 did not report to 127.0.0.1:"),
        ("hangs", ") does not respond. Its process or host hangs"),
        ("interface", "network of rank 1: GLOO_SOCKET_IFNAME is ib7, which "),
    ],
)
def test_one_message_names_the_rank(kind, said, ranks):
    group = ranks.start(["test_distributed_doctor:examine", kind])
    wait_until(lambda: "error: " in group.output(0), lambda: group.outputs)
    if kind == "hangs":
        os.kill(group.pids[1], signal.SIGKILL)
    ranks.finish(group)
    assert group.codes == [1, {"missing": 0, "hangs": -signal.SIGKILL, "interface": 1}[kind]]
    errors = [line for line in group.output(0).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, group.outputs
    assert said in errors[0]
    assert "error: " not in group.output(1)
