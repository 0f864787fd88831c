"""The ranks that have started and the step that each has reached, in a store of keys at rank 0's address.

A thread of every rank reports that it lives, watches for the failure of another and for the time limit. When one fails
or the time is up, rank 0 prints one message that names the ranks, and all end.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from mm_moslora.planning.ranks.rank_facts import RankFacts, named, network_faults
from mm_moslora.training.supervision.rank_agreement import spans
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import DistributedError
from mm_moslora.utils.untrusted_data import parse_json

_TICK = 0.5
"""Seconds between two looks at the store."""
_SILENT = 4
"""Ticks without a sign of life after which a rank counts as silent."""


class RollCall:
    """This rank's view of all ranks.

    Args:
        limit: seconds for everything.

    Raises:
        DistributedError: rank 0 cannot be reached.
    """

    def __init__(self, *, limit: float) -> None:
        self.limit, self.deadline = limit, time.monotonic() + limit
        self._late = f"Not finished after {limit:.0f} s:"
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        owned = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        distributed.check_launcher()
        self._store = self._connect(owned)
        self._observer = self._connect(False)  # a store that waits for a key answers no other thread
        self._ended = threading.Event()

    def _connect(self, owned: bool) -> Any:
        try:
            return cast(Any, dist).TCPStore(
                os.environ["MASTER_ADDR"], distributed.master_port(), is_master=owned, wait_for_workers=False,
                timeout=timedelta(seconds=self.limit), multi_tenant=True,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise DistributedError(
                f"Rank {self.rank} on {socket.gethostname()} cannot reach rank 0 at {self.address} within "
                f"{self.limit:.0f} s ({(str(error).splitlines() or [''])[0]}). Check that rank 0 was started, that the "
                "address is one of its host on a network that both share, and that no firewall closes the port."
            ) from error

    def meet(self, facts: RankFacts) -> list[RankFacts]:
        """The reports of all ranks, once all are there.

        Args:
            facts: this rank's.
        """
        self._store.set(f"facts/{self.rank}", json.dumps(asdict(facts)))
        keys = [f"facts/{rank}" for rank in range(self.world)]
        while not self._store.check(keys):
            time.sleep(0.1)  # the watching thread ends the process at the limit
        return self._known()

    def enter(self, phase: str) -> None:
        """Report what this rank does next."""
        self._store.set(f"phase/{self.rank}", phase)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A block that ends on all ranks with one message when it fails on any, or takes too long."""
        thread = threading.Thread(target=self._watch, name="roll call", daemon=True)
        thread.start()
        try:
            yield
        except Exception as error:
            self._store.set("failure", f"Rank {self.rank} ({socket.gethostname()}): {error}{self._network()}")
            thread.join(timeout=6 * _TICK)  # it ends the process
            raise
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        beats = 0
        while not self._ended.wait(_TICK):
            try:
                beats += 1
                self._observer.set(f"beat/{self.rank}", str(beats))
                if self._observer.check(["failure"]):
                    self._leave(self._observer.get("failure").decode())
                # Rank 0 speaks for all; the others wait a little longer for it.
                if time.monotonic() > self.deadline + (0 if self.rank == 0 else 10 * _TICK):
                    if self.rank:
                        self._leave(f"{self._late} rank 0 at {self.address} does not answer.", speak=True)
                    text = self._overdue()
                    self._observer.set("failure", text)
                    self._leave(text)
            except RuntimeError:
                if not self._ended.wait(4 * _TICK):
                    text = f"The connection to rank 0 at {self.address} is lost: it ended, or its host."
                    self._leave(text, speak=True)

    def _leave(self, text: str, *, speak: bool = False) -> None:
        """End this process; rank 0 prints the message, any other only where rank 0 cannot."""
        if self.rank == 0 or speak:
            sys.stderr.write(f"error: {text}\n")
            sys.stderr.flush()
        if self.rank == 0:
            time.sleep(4 * _TICK)  # the others read the store, which ends with this process
        os._exit(1)

    def _overdue(self) -> str:
        """The ranks that have not reported, or do not go on."""
        facts = self._known()
        missing = set(range(self.world)) - {item.rank for item in facts}
        if missing:
            plural = "s" if len(missing) > 1 else ""
            present = named([item.rank for item in facts], facts)
            return (
                f"{self._late} rank{plural} {spans(missing)} of {self.world} did not report to {self.address}; "
                f"{present} did. Check that every host was started, with the same address of rank 0, and can reach it."
            )
        before = self._read("beat")
        time.sleep(_SILENT * _TICK)
        now = self._read("beat")
        silent = [rank for rank in range(1, self.world) if now.get(rank) == before.get(rank)]
        if silent:
            return (
                f"{self._late} {named(silent, facts)} does not respond. Its process or host hangs; look there for "
                "memory, GPU errors (dmesg, nvidia-smi) and file systems that hang."
            )
        phases = self._read("phase")
        latest = max(phases.values(), key=list(phases.values()).count, default="start")
        behind = [rank for rank in range(self.world) if phases.get(rank) != latest]
        waiting = f"; {named(behind, facts)} is at another step" if behind else ""
        return (
            f"{self._late} the ranks are at '{latest}'{waiting}. They reach rank 0's store, but not each other: set "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to a network that joins the hosts, open all ports between them, "
            f"and try NCCL_IB_DISABLE=1; NCCL_DEBUG=INFO shows what NCCL tries.{self._network()}"
        )

    def _network(self) -> str:
        """Faults in the interfaces that the ranks report."""
        return "".join(f" {item.name}: {item.detail}. {item.remedy}" for item in network_faults(self._known()))

    def _known(self) -> list[RankFacts]:
        return [RankFacts(**parse_json(text, constants=True)) for _, text in sorted(self._read("facts").items())]

    def _read(self, kind: str) -> dict[int, str]:
        keys = {rank: f"{kind}/{rank}" for rank in range(self.world)}
        present = {rank: key for rank, key in keys.items() if self._observer.check([key])}
        return {rank: self._observer.get(key).decode() for rank, key in present.items()}
