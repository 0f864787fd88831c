"""`mm-moslora doctor --distributed`: checks all ranks of a run, their hosts and the network between them, before it."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from mm_moslora.config import Recipe
from mm_moslora.planning.doctor import Diagnosis, diagnose
from mm_moslora.planning.ranks.link_speed import (
    judge_computing,
    judge_links,
    measure_all_reduce,
    measure_computing,
    measure_links,
    pairs_by_round,
)
from mm_moslora.planning.ranks.rank_facts import RankFacts, differences, facts_of_this_rank
from mm_moslora.planning.ranks.roll_call import RollCall
from mm_moslora.training.preflight import check_recipe
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, MoSLoRAError
from mm_moslora.utils.files import discard

DEFAULT_LIMIT = 180.0
"""Seconds; NCCL's start on many hosts takes a minute."""


def diagnose_ranks(recipe: Recipe | None = None, *, limit: float = DEFAULT_LIMIT) -> list[Diagnosis]:
    """Check this rank together with all others; each rank calls it.

    Args:
        recipe: the recipe to be trained; its files are then looked for on every host.
        limit: seconds until the processes end with a message.

    Returns:
        The findings, the same on every rank.

    Raises:
        ConfigError: there are no other ranks.
        DistributedError: the ranks cannot reach each other. When a rank is missing, hangs or fails, the processes end
            with exit code 1, and rank 0 prints the message.
    """
    if distributed.world_size() == 1:
        raise ConfigError(
            "--distributed checks several ranks, but this process is the only one. Start it as the run is started: "
            "mm-moslora launch --doctor RECIPE, or torchrun --nproc_per_node N -m mm_moslora doctor --distributed."
        )
    roll = RollCall(limit=limit)
    with roll.watched():
        roll.enter("meeting")
        facts = roll.meet(facts_of_this_rank())
        roll.enter("process group")
        distributed.join(timeout_minutes=limit / 60)
        distributed.barrier()
        clocks = distributed.gather_objects(time.time())
        facts = [replace(item, clock=clock) for item, clock in zip(facts, clocks, strict=True)]
        findings = list(differences(facts))
        roll.enter("all-reduce")
        findings += _speeds(roll, facts)
        roll.enter("checks of every host")
        findings += _hosts(recipe, facts)
        distributed.barrier()
    return findings


def _speeds(roll: RollCall, facts: list[RankFacts]) -> list[Diagnosis]:
    speeds, latencies = zip(*distributed.gather_objects(measure_all_reduce()), strict=True)
    detail = f"{min(speeds):.3g} GB/s per rank, {1e6 * max(latencies):.0f} us for one number"
    reduced = Diagnosis(name="all-reduce", detail=detail)
    roll.enter("links of pairs")
    links = measure_links(pairs_by_round([item.host for item in facts]))
    roll.enter("computing")
    computing = judge_computing(distributed.gather_objects(measure_computing()), facts)
    return [reduced, *judge_links(links, facts), computing]


def _hosts(recipe: Recipe | None, facts: list[RankFacts]) -> list[Diagnosis]:
    """Problems that `doctor` finds on each host, and whether all hosts see the recipe's files and the run folder."""
    first = {item.host: item.rank for item in reversed(facts)}
    mine = first[facts[distributed.rank()].host] == distributed.rank()
    folder = Path(recipe.train.output) if recipe is not None else None
    problems = [item for item in diagnose(folder, recipe) if item.status != "ok"] if mine else []
    if recipe is not None and mine:
        try:
            check_recipe(recipe)
        except MoSLoRAError as error:
            remedy = "Give all hosts the same files."
            problems.append(Diagnosis(name="recipe", status="bad", detail=str(error), remedy=remedy))
    hosts_of = defaultdict(list)
    for item, findings in zip(facts, distributed.gather_objects(problems), strict=True):
        for finding in findings:
            hosts_of[finding].append(item.host)
    shared = _run_folder(folder, facts) if folder is not None and len(first) > 1 else []
    everywhere = len(first)
    return shared + [
        replace(finding, name=f"{finding.name} ({'all hosts' if len(hosts) == everywhere else ', '.join(hosts)})")
        for finding, hosts in hosts_of.items()
    ]


def _run_folder(folder: Path, facts: list[RankFacts]) -> list[Diagnosis]:
    """Whether a file that rank 0 writes beside the run appears on all hosts."""
    parent_folder = next(parent for parent in folder.absolute().parents if parent.is_dir())
    probe = parent_folder / distributed.from_main(f".mm-moslora-doctor-{uuid4().hex}")
    problem = ""
    if distributed.is_main():
        try:
            probe.touch()
        except OSError as error:
            problem = f"rank 0 cannot write there ({error.strerror})"
    distributed.barrier()
    seen = distributed.gather_objects(probe.exists())
    if distributed.is_main():
        discard(probe)
    blind = list(dict.fromkeys(item.host for item, sees in zip(facts, seen, strict=True) if not sees))
    problem = distributed.from_main(problem) or (f"{', '.join(blind)} does not see rank 0's files" if blind else "")
    return [
        Diagnosis(
            name="run folder", status="bad" if problem else "ok",
            detail=f"{parent_folder}: {problem or 'shared by all hosts'}",
            remedy="Set train.output to a folder of a file system that all hosts share." if problem else "",
        )
    ]  # fmt: skip
