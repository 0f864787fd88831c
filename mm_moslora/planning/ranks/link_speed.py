"""Speed of the links between ranks and of their devices, measured in the run's process group, and the slow ones named.

All ranks call the functions that measure. In one round of pairs every rank exchanges data with at most one other, so
that rounds show single links.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from mm_moslora.planning.doctor import Diagnosis
from mm_moslora.planning.ranks.rank_facts import RankFacts, named
from mm_moslora.utils import distributed

SLOW = 0.5
"""A link or device is slow below this share of the median of its kind."""
_LEAST_BETWEEN_HOSTS = 0.2
"""GB/s; Ethernet of 1 Gbit/s gives 0.1."""
_BYTES = {"cuda": 2**28, "cpu": 2**23}
"""Size of the all-reduce; a pair exchanges a quarter of it."""


def pairs_by_round(hosts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Pairs of ranks: all within each host, and for every two hosts the ranks with the same position on them.

    Args:
        hosts: the host of each rank.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for rank, host in enumerate(hosts):
        members[host].append(rank)
    groups = list(members.values())
    rounds = [
        [(group[a], group[b]) for group in groups for a, b in pairs if max(a, b) < len(group)]
        for pairs in _tournament(max(map(len, groups)))
    ]
    rounds += [
        [pair for a, b in pairs for pair in zip(groups[a], groups[b], strict=False)]
        for pairs in _tournament(len(groups))
    ]
    return [pairs for pairs in rounds if pairs]


def _tournament(count: int) -> Iterator[list[tuple[int, int]]]:
    """Round-robin pairs: each rank meets every other once (the circle method)."""
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        sides = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in sides if a is not None and b is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def _device() -> torch.device:
    """The device whose tensors the process group's fast backend takes."""
    device = distributed.device()
    return device if device.type == "cuda" and "nccl" in dist.get_backend_config() else torch.device("cpu")


def _fastest(act: Callable[[], object], *, calls: int = 3) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    times = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])  # other traffic only adds time


def measure_computing() -> float:
    """Seconds of a fixed matrix product on this rank's device."""
    device = distributed.device()
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (384, torch.float32)
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return _fastest(lambda: matrix @ matrix, calls=20)


def measure_all_reduce() -> tuple[float, float]:
    """GB/s of every rank in a large all-reduce (bytes on the wire), and seconds of a tiny one."""
    device = _device()
    large = torch.ones(_BYTES[device.type], dtype=torch.uint8, device=device)
    tiny = torch.ones(1, device=device)
    world = dist.get_world_size()
    seconds = _fastest(lambda: dist.all_reduce(large))
    return 2 * (world - 1) / world * large.numel() / seconds / 1e9, _fastest(lambda: dist.all_reduce(tiny))


def measure_links(rounds: Sequence[Sequence[tuple[int, int]]]) -> dict[tuple[int, int], float]:
    """GB/s of every pair in each direction, on every rank.

    Args:
        rounds: from `pairs_by_round`.
    """
    device = _device()
    sent = torch.ones(_BYTES[device.type] // 4, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    mine: dict[tuple[int, int], float] = {}
    for pairs in rounds:
        dist.barrier()
        pair = next((pair for pair in pairs if distributed.rank() in pair), None)
        if pair is not None:
            peer = sum(pair) - distributed.rank()
            mine[pair] = sent.numel() / _fastest(lambda to=peer: _exchange(sent, received, to)) / 1e9  # type: ignore[misc]
    slower: dict[tuple[int, int], float] = {}
    for speeds in distributed.gather_objects(mine):
        for pair, speed in speeds.items():
            slower[pair] = min(speed, slower.get(pair, speed))
    return slower


def _exchange(sent: torch.Tensor, received: torch.Tensor, peer: int) -> None:
    both = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def judge_computing(seconds: Sequence[float], facts: Sequence[RankFacts]) -> Diagnosis:
    """Name ranks with slow devices.

    Args:
        seconds: from `measure_computing`, by rank.
        facts: by rank.
    """
    median = statistics.median_low(seconds)
    slow = [rank for rank, taken in enumerate(seconds) if median < SLOW * taken]
    if not slow:
        return Diagnosis(name="computing", detail=f"all ranks within {max(seconds) / min(seconds):.1f} times")
    return Diagnosis(
        name="computing", status="warn",
        detail=f"{named(slow, facts)}: a matrix product takes {max(seconds) / median:.1f} times as long as the median",
        remedy="All ranks wait for it. Look there for other jobs, clocks and heat (nvidia-smi -q -d PERFORMANCE).",
    )  # fmt: skip


def judge_links(speeds: Mapping[tuple[int, int], float], facts: Sequence[RankFacts]) -> Iterator[Diagnosis]:
    """Name slow links, and ranks all of whose links are slow.

    Args:
        speeds: from `measure_links`.
        facts: by rank.
    """
    inside = {pair: facts[pair[0]].host == facts[pair[1]].host for pair in speeds}
    for name, within in (("links within hosts", True), ("links between hosts", False)):
        kind = {pair: speed for pair, speed in speeds.items() if inside[pair] == within}
        if not kind:
            continue
        median = statistics.median_high(kind.values())
        slow = [pair for pair, speed in kind.items() if speed < SLOW * median]
        detail = f"{median:.3g} GB/s each way"
        if slow:
            detail = f"{_slowest(slow, kind, facts)}; the median is {median:.3g} GB/s"
        poor = not within and facts[0].card != "CPU" and median < _LEAST_BETWEEN_HOSTS
        remedy = "Look at cables, ports and GPUs there (nvidia-smi topo -m, ibstat)." if slow else ""
        if poor:
            remedy += (
                " Set NCCL_SOCKET_IFNAME and NCCL_IB_HCA to the fast network; NCCL_DEBUG=INFO shows the one in use."
            )
        yield Diagnosis(name=name, status="warn" if slow or poor else "ok", detail=detail, remedy=remedy.strip())


def _slowest(slow: Sequence[tuple[int, int]], kind: Mapping[tuple[int, int], float], facts: Sequence[RankFacts]) -> str:
    """Ranks with slow links only, then single links, the slowest first."""
    links: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for pair in kind:
        for rank in pair:
            links[rank].append(pair)
    bad = [rank for rank, pairs in links.items() if len(pairs) > 1 and set(pairs) <= set(slow)]
    said = [f"all links of {named(bad, facts)} are slow"] if bad else []
    single = sorted((pair for pair in slow if not set(pair) & set(bad)), key=lambda pair: kind[pair])
    for first, second in single[:4]:
        ends = f"rank {first} ({facts[first].host}) and rank {second} ({facts[second].host})"
        said.append(f"{ends}: {kind[first, second]:.3g} GB/s")
    return "; ".join(said) + (f"; and {len(single) - 4} more" if len(single) > 4 else "")
