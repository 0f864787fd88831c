"""`--shards N` of `mm-moslora eval run`: the same verb as N jobs, here, on Ray or in a SLURM array."""

from __future__ import annotations

import inspect
import itertools
import logging
import shlex
from collections.abc import Callable, Mapping
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


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ShardJobs:
    """Where the shards of an evaluation run."""

    shards: int | None = None
    """Number of jobs that share the work, each this command with --shard; their results are merged at the end."""
    parallel: int | None = None
    """Jobs at the same time on this machine; default: one per accelerator, one on a CPU."""
    ray: str = ""
    """Run the jobs on a Ray cluster: HOST:PORT of its head, or auto. Its nodes share the file system of the files."""
    slurm: Annotated[bool, Parameter(negative="")] = False
    """Write a SLURM array of the jobs that are not done, and exit with code 75; afterwards the same command merges."""

    def check(self, **others: object) -> bool:
        """Whether the work is to be divided; `others` are options that exclude it.

        Raises:
            ConfigError: the options contradict each other.
        """
        if self.shards is None:
            if self.parallel is not None or self.ray or self.slurm:
                raise ConfigError("--parallel, --ray and --slurm are about the jobs of --shards N: add it.")
            return False
        if self.shards < 1:
            raise ConfigError(f"--shards is {self.shards}, expected 1 or more.")
        if excluded := [f"--{name}" for name, value in others.items() if value]:
            raise ConfigError(f"{' and '.join(excluded)} is for one command by hand, not for jobs: leave it out.")
        refuse_two_engines(slurm=self.slurm, ray=self.ray, parallel=self.parallel)
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


HERE = ShardJobs()


def refuse_two_engines(*, slurm: bool, ray: str, parallel: int | None) -> None:
    """Refuse a batch script together with jobs that run now."""
    if slurm and (ray or parallel is not None):
        raise ConfigError("--slurm writes a batch script, and --ray and --parallel run the jobs: give one of them.")


def words_of(verb: Callable[..., Any], arguments: Mapping[str, Any], **changed: Any) -> list[str]:
    """The words of a command line with which a verb gets its arguments again."""
    words: list[str] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        value = changed.get(name, arguments[name])
        if parameter.kind is not parameter.KEYWORD_ONLY:
            words += map(str, value if parameter.kind is parameter.VAR_POSITIONAL else [value])
        elif is_dataclass(value) and not isinstance(value, type):  # a group of options
            for part in fields(value):
                words += _option(part.name, getattr(value, part.name), default=getattr(parameter.default, part.name))
        else:
            words += _option(name, value, default=parameter.default)
    return words


def _option(name: str, value: Any, *, default: Any) -> list[str]:
    """An option with its value; none where it is the default."""
    if value == default:
        return []
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{option}"]
    return [f"--{option}={item}" for item in (value if isinstance(value, tuple) else (value,))]
