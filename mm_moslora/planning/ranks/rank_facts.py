"""Reports of the ranks on host, software, device and network, and the differences between them."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mm_moslora.planning.doctor import Diagnosis, mixed_cards
from mm_moslora.training.supervision import rank_agreement
from mm_moslora.training.supervision.rank_agreement import grouped, spans
from mm_moslora.utils import distributed

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_LOOPBACK = ("127.", "::1")
_MOST_CLOCK_OFFSET = 2.0
"""Seconds; heartbeats and logs of several hosts are compared by their times."""


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """One rank's report."""

    rank: int
    host: str
    software: dict[str, str]
    """Versions, and a hash over this package's files."""
    card: str
    """Name of the accelerator; CPU without one."""
    memory_gib: float = 0.0
    """Memory of the accelerator."""
    address: str = ""
    """The address that the host's own name resolves to."""
    interfaces: dict[str, list[str]] = field(default_factory=dict)
    """Addresses of each network interface that is up."""
    chosen: dict[str, str] = field(default_factory=dict)
    """The variables that choose interfaces."""
    clock: float = 0.0
    """Seconds since the epoch, read by all ranks at once."""


def facts_of_this_rank() -> RankFacts:
    """Read the facts of this rank."""
    import torch

    software, card, memory = rank_agreement.software(), "CPU", 0.0
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(distributed.device())
        card, memory = properties.name, properties.total_memory / 2**30
        software |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return RankFacts(
        rank=distributed.rank(), host=socket.gethostname(), software=software, card=card, memory_gib=memory,
        address=_own_address(), interfaces=_interfaces(),
        chosen={name: os.environ[name] for name in INTERFACE_VARIABLES if os.environ.get(name)},
    )  # fmt: skip


def _own_address() -> str:
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except OSError:
        return ""


def _interfaces() -> dict[str, list[str]]:
    import psutil

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [item.address for item in items if item.family in families]
        for name, items in psutil.net_if_addrs().items()
        if name in up
    }


def differences(facts: Sequence[RankFacts]) -> Iterator[Diagnosis]:
    """Compare the reports of all ranks.

    Args:
        facts: in order of rank.
    """
    hosts = defaultdict(list)
    for item in facts:
        hosts[item.host].append(item.rank)
    text = ", ".join(f"{spans(ranks)} on {host}" for host, ranks in hosts.items())
    yield Diagnosis(name="ranks", detail=f"{len(facts)}: {text}")
    yield from _software(facts)
    cards = {item.card: item.memory_gib for item in facts}
    detail = grouped({item.rank: item.card for item in facts}, _hosts(facts)) if len(cards) > 1 else next(iter(cards))
    yield mixed_cards(list(cards), detail)
    if faults := list(network_faults(facts)):
        yield from faults
    else:
        used = sorted({f"{name}={value}" for item in facts for name, value in item.chosen.items()})
        yield Diagnosis(name="network", detail=", ".join(used) or "interfaces are chosen by host names")
    offsets = {item.host: item.clock - facts[0].clock for item in facts}
    host, offset = max(offsets.items(), key=lambda pair: abs(pair[1]))
    if abs(offset) <= _MOST_CLOCK_OFFSET:
        yield Diagnosis(name="clocks", detail=f"within {abs(offset):.1f} s")
    else:
        yield Diagnosis(
            name="clocks", status="warn", detail=f"that of {host} is {offset:+.1f} s from that of {facts[0].host}",
            remedy="Synchronise the clocks (chronyc, timedatectl): heartbeats are compared by their times.",
        )  # fmt: skip


def _software(facts: Sequence[RankFacts]) -> Iterator[Diagnosis]:
    names = {name: None for item in facts for name in item.software}
    wrong = [name for name in names if len({item.software.get(name) for item in facts}) > 1]
    for name in wrong:
        versions = {item.rank: item.software.get(name, "none") for item in facts}
        yield Diagnosis(
            name=f"{name} of the ranks", status="bad", detail=grouped(versions, _hosts(facts)),
            remedy="Give all hosts the same environment: on a shared file system, or by one container image.",
        )  # fmt: skip
    if not wrong:
        yield Diagnosis(name="software", detail=f"the same on all ranks: {', '.join(names)}")


def network_faults(facts: Sequence[RankFacts]) -> Iterator[Diagnosis]:
    """Variables that name no interface, and host names that lead other hosts nowhere.

    Args:
        facts: of the ranks that are there.
    """
    hosts = {item.host: item for item in facts}
    for item in facts:
        for variable, value in item.chosen.items():
            interfaces = _chosen(variable, value, item.interfaces)
            loopback = all(address.startswith(_LOOPBACK) for name in interfaces for address in item.interfaces[name])
            if not interfaces or (loopback and len(hosts) > 1):
                problem = "which reaches no other host" if interfaces else f"which {item.host} lacks"
                yield Diagnosis(
                    name=f"network of rank {item.rank}", status="bad",
                    detail=f"{variable} is {value}, {problem}; {item.host} has {_listed(item.interfaces)}",
                    remedy=f"Set {variable} to an interface that reaches the other hosts.",
                )  # fmt: skip
    for item in hosts.values() if len(hosts) > 1 else ():
        if item.address.startswith(_LOOPBACK) and "GLOO_SOCKET_IFNAME" not in item.chosen:
            yield Diagnosis(
                name=f"name of {item.host}", status="bad",
                detail=f"{item.host} resolves to {item.address} there, which other hosts cannot reach",
                remedy=f"Set GLOO_SOCKET_IFNAME (of {_listed(item.interfaces)}), or mend /etc/hosts.",
            )  # fmt: skip


def _chosen(variable: str, value: str, interfaces: Iterable[str]) -> list[str]:
    """The interfaces that a variable names. NCCL takes beginnings of names, `=` exact ones, and `^` excludes."""
    gloo = variable.startswith("GLOO")
    exact, excluded = value.startswith("=") or gloo, value.startswith("^") and not gloo
    wanted = tuple(word for word in value.lstrip("=^").split(",") if word)
    return [name for name in interfaces if (name in wanted if exact else name.startswith(wanted)) != excluded]


def _listed(interfaces: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(name for name, addresses in interfaces.items() if addresses and name != "lo") or "none but lo"


def named(ranks: Iterable[int], facts: Sequence[RankFacts]) -> str:
    """`rank 4 (host-b)`, `ranks 0-3 (host-a, host-b)`."""
    return rank_agreement.named(ranks, _hosts(facts))


def _hosts(facts: Sequence[RankFacts]) -> dict[int, str]:
    return {item.rank: item.host for item in facts}
