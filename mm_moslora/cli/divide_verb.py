"""The verb `divide`: a divisible command in shards, as jobs, and their merge."""

from __future__ import annotations

import hashlib
import logging
import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from mm_moslora.launch.shard import Shard
from mm_moslora.utils.errors import ConfigError

logger = logging.getLogger(__name__)

_MERGE = {("eval", "run"): ("--merge",), ("data", "check"): ("--merge",), ("data", "cache"): ()}
"""What the command that puts the shards together has in place of --shard."""


def register(app: App) -> None:
    """Add the verb to the command line."""
    app.command(divide)


def divide(
    shards: int,
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    parallel: int | None = None,
    ray: str = "",
    slurm: bool = False,
    gpus_per_shard: int | None = None,
    cores_per_shard: int = 1,
    logs: Path = Path("runs/divide"),
) -> int:
    """Run `eval run`, `data check` or `data cache` in shards, here or on a cluster, and put them together.

    The result is that of the undivided command. For example: mm-moslora divide 8 --ray auto -- eval run MODEL --tasks
    gqa_testdev --output runs/gqa. The same command again continues. Exit code 75: stopped before the end.

    Parameters
    ----------
    shards
        Number of shards.
    command
        The command after `--`, without mm-moslora; of `data check` with --output.
    parallel
        Shards at the same time; default: one per accelerator (or per --gpus-per-shard of them), one on a CPU.
    ray
        Run on a Ray cluster: HOST:PORT of its head, or auto. All paths are on a file system that its nodes share.
    slurm
        Write a SLURM array of the shards, print what follows, and exit.
    gpus_per_shard
        Accelerators of each shard; default: one, where there are any; none for `data check`.
    cores_per_shard
        CPU cores that Ray or SLURM keep for each shard.
    logs
        Folder for the logs of the shards.
    """
    merge = _MERGE.get(command[:2])
    if merge is None or any(word.partition("=")[0] in ("--shard", "--merge", "--no-merge") for word in command):
        known = ", ".join(" ".join(verbs) for verbs in _MERGE)
        raise ConfigError(
            f"The command is {shlex.join(command)!r}, expected one of {known} without --shard and --merge, after `--`."
        )
    from mm_moslora.launch.child_processes import python_words, run_and_hand_on
    from mm_moslora.launch.jobs import Job, cards_per_job, run_jobs
    from mm_moslora.launch.launcher import EXIT_REQUEUE
    from mm_moslora.launch.ray_engine import open_engine
    from mm_moslora.launch.slurm_array import write_array
    from mm_moslora.training.supervision.stop_signals import StopRequest

    parts = [Shard.parse(f"{number}/{shards}") for number in range(1, max(1, shards) + 1)]
    engine = open_engine("" if slurm else ray, parallel=parallel)
    cards = (gpus_per_shard or 0) if slurm else cards_per_job(gpus_per_shard, engine, option="--gpus-per-shard")
    place = logs.resolve() / hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
    jobs = [
        Job(
            name=part.name, command=("mm_moslora", *command, "--shard", str(part)), log=place / f"{part.name}.txt",
            cards=0 if command[:2] == ("data", "check") else cards, cores=cores_per_shard,
        )
        for part in parts
    ]  # fmt: skip
    if slurm:
        place.mkdir(parents=True, exist_ok=True)
        write_array(place / "array.sbatch", jobs)
        print(f"Next: sbatch {place / 'array.sbatch'}\nThen: {shlex.join(['mm-moslora', *command, *merge])}")
        return 0
    ended: list[str] = []

    def over(job: Job, problem: str) -> None:
        ended.append(job.name)
        logger.info("[%d/%d] shard %s: %s", len(ended), shards, job.name, problem or "done")

    with StopRequest() as stop:
        failed = run_jobs(lambda: jobs, engine, over=over, stop=lambda: bool(stop.received))
    if stop.received:
        logger.info("Stopped by signal %d; saved. The same command continues.", stop.received)
        return EXIT_REQUEUE
    if failed:
        raise ConfigError(
            f"{len(failed)} of {shards} shards failed: {', '.join(failed)}. Their logs are in {place}. Correct what "
            "they say, then repeat the command."
        )
    return run_and_hand_on(python_words("-m", "mm_moslora", *command, *merge)).code
