"""`--shards N` of `mm-moslora eval run`: the same verb as N jobs, here, on Ray or in a SLURM array."""

from __future__ import annotations

import itertools
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mm_moslora.launch.imported_code import import_words
from mm_moslora.launch.shard import Shard, refuse_other_divisions
from mm_moslora.utils.errors import ConfigError, ExitStatus

if TYPE_CHECKING:
    from mm_moslora.launch.jobs import Job

logger = logging.getLogger(__name__)

ARRAY = "shards.sbatch"


@Parameter(name="*", group="Cluster")
@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Where jobs run."""

    parallel: int | None = None
    """Jobs at the same time on this machine; default: one per accelerator, one on a CPU."""
    ray: str = ""
    """Run the jobs on a Ray cluster: HOST:PORT of its head, or auto. Its nodes share the file system of the files."""
    slurm: Annotated[bool, Parameter(negative="")] = False
    """Write a SLURM array of the jobs that can start, and exit with code 75; afterwards the same command goes on."""

    def refuse_two_engines(self) -> None:
        """Refuse a batch script together with jobs that run now."""
        if self.slurm and (self.ray or self.parallel is not None):
            raise ConfigError("--slurm writes a batch script, and --ray and --parallel run the jobs: give one of them.")


@Parameter(name="*", group="Cluster")
@dataclass(frozen=True, kw_only=True)
class ShardJobs(ClusterOptions):
    """Where the shards of an evaluation run."""

    shard: str | None = None
    """I/N: answer only this share of every task, into OUTPUT/shards/I-of-N; N such commands can run anywhere, at once.
    """
    merge: Annotated[bool, Parameter(negative="")] = False
    """Score what all shards in OUTPUT have answered: the same command with --merge in place of --shard. The model is
    not loaded."""
    shards: int | None = None
    """Number of jobs that share the work, each this command with --shard; their results are merged at the end."""

    def check(self, *, dry_run: bool) -> bool:
        """Whether the work is to be divided into jobs.

        Raises:
            ConfigError: the options contradict each other.
        """
        if self.shards is None:
            if self.parallel is not None or self.ray or self.slurm:
                raise ConfigError("--parallel, --ray and --slurm are about the jobs of --shards N: add it.")
            if self.merge and self.shard and not dry_run:
                raise ConfigError("--shard answers a share, and --merge scores all shards: give one of them.")
            return False
        if self.shards < 1:
            raise ConfigError(f"--shards is {self.shards}, expected 1 or more.")
        others = {"shard": self.shard, "merge": self.merge, "dry_run": dry_run}
        if excluded := [f"--{name}" for name, value in others.items() if value]:
            raise ConfigError(f"{' and '.join(excluded)} is for one command by hand, not for jobs: leave it out.")
        self.refuse_two_engines()
        return True

    def run(
        self, commands: Mapping[Path, list[str]], done: str, *, script: Path, on_cards: bool
    ) -> tuple[list[Path], int]:
        """Run the shards of commands as jobs.

        Args:
            commands: the words of a verb by the folder of its shards, which gets their logs.
            done: what follows a shard's name in the path that shows that it is done.
            on_cards: whether a job takes an accelerator, where there are any.

        Returns:
            The folders whose shards are all done, and the exit code for the others: 0 where there are none.
        """
        from mm_moslora.launch.jobs import Job, cards_per_job, run_jobs, write_array
        from mm_moslora.launch.ray_engine import open_engine
        from mm_moslora.training.supervision.stop_signals import StopRequest

        of = self.shards or 0
        for folder in commands:
            refuse_other_divisions(folder, done, of=of)
        engine = None if self.slurm else open_engine(self.ray, parallel=self.parallel)
        cards = cards_per_job(None, engine, option="--shards") if engine is not None and on_cards else 0
        jobs = [
            Job(
                name=str(folder / shard.name), cards=cards,
                command=("mm_moslora", *import_words(), *words, "--shard", str(shard)),
                log=folder / f"{shard.name}.log", output=folder / f"{shard.name}{done}",
            )
            for folder, words in commands.items()
            for shard in (Shard.parse(f"{number}/{of}") for number in range(1, of + 1))
        ]  # fmt: skip
        stop = StopRequest()
        if engine is None:
            missing = [job.name for job in jobs if job.output is None or not job.output.exists()]
            if missing:
                script.parent.mkdir(parents=True, exist_ok=True)
                write_array(script, [job for job in jobs if job.name in missing])
                print(f"Next: sbatch {shlex.quote(str(script))}\nAfter its end, this command again merges the shards.")
        else:
            ended = itertools.count(1)

            def over(job: Job, problem: str) -> None:
                level, count = logging.ERROR if problem else logging.INFO, next(ended)
                logger.log(level, "[%d/%d] %s: %s", count, len(jobs), job.name, problem or "done")

            with stop:
                missing = [*run_jobs(lambda: jobs, engine, over=over, stop=lambda: bool(stop.received))]
        if stop.received:
            logger.info("Stopped by signal %d. The same command continues.", stop.received)
            return [], ExitStatus.STOPPED
        ready = [folder for folder in commands if all(Path(name).parent != folder for name in missing)]
        return ready, 0 if not missing else ExitStatus.STOPPED if engine is None else 1


def words_of(options: Any) -> list[str]:
    """The words of a command line that give a group of options again."""
    words: list[str] = []
    for part in fields(options):
        value = getattr(options, part.name)
        option = part.name.replace("_", "-")
        if is_dataclass(value):
            words += words_of(value)
        elif value == part.default:
            continue
        elif isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{option}")
        else:
            words += [f"--{option}={item}" for item in (value if isinstance(value, tuple) else (value,))]
    return words
