"""The verbs `launch`, training on several processes or hosts without a word about torchrun, and `files`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.run_paths import SHIPPED, shipped_folder

if TYPE_CHECKING:
    from mm_moslora.config import Recipe

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help="Dotted recipe keys, and options of `train`")]


def register(app: App) -> None:
    """Add the verbs to the command line."""
    app.command(launch)
    app.command(files)


def files(name: str | None = None) -> int:
    """Print where launch scripts, DeepSpeed presets and recipes lie: `bash "$(mm-moslora files scripts)"/train.sh`.

    Parameters
    ----------
    name
        scripts, deepspeed_configs or recipes; without one, all of them.
    """
    if name is not None:
        print(shipped_folder(name))
        return 0
    for word in SHIPPED:
        print(f"{word:<18} {shipped_folder(word)}")
    return 0


def launch(
    recipe: str,
    *overrides: Overrides,
    nproc: int | None = None,
    nnodes: int = 1,
    rdzv: str | None = None,
    hostfile: Path | None = None,
    max_restarts: int = 0,
    requeue: bool = False,
    dry_run: bool = False,
) -> int:
    """Train a recipe on all accelerators of this machine, or of several; the same command again continues it.

    One process runs as it is, several under torchrun, the hosts of a host file under deepspeed, and a SLURM job of
    several nodes, or one with --requeue, under srun.

    Parameters
    ----------
    recipe
        YAML file, or the name of a shipped preset.
    nproc
        Processes on each host; default: $NPROC, else one per accelerator.
    nnodes
        Hosts; run the same command on each, with --rdzv.
    rdzv
        HOST:PORT where the hosts meet; one of them must own it.
    hostfile
        Lines such as `worker-1 slots=8`, reached through ssh.
    max_restarts
        Start again from the newest checkpoint when a rank dies or hangs, so many times.
    requeue
        In a SLURM job: put it back into the queue when SIGUSR1 announces its time limit (--signal=B:USR1@SECONDS),
        unless it was started again and saved no new checkpoint.
    dry_run
        Print the resolved recipe and the command, and start nothing.
    """
    from mm_moslora.config import load_recipe, override_items
    from mm_moslora.launch.launcher import EXIT_REQUEUE, Topology
    from mm_moslora.launch.launcher import launch as start
    from mm_moslora.launch.slurm_job import WARNING, Job, Requeue
    from mm_moslora.training.supervision.stop_signals import Stopped, StopRequest

    job = Job.current(os.environ)
    again = Requeue(job) if requeue else None
    stop = StopRequest()
    try:
        with stop.at_once():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {WARNING})  # the batch script blocks it until it is heard here
            spread = job is not None and (requeue or job.nodes > 1) and nnodes == 1 and hostfile is None
            places = Topology(
                nproc=_processes(nproc), nnodes=nnodes, rdzv=rdzv, hostfile=hostfile, max_restarts=max_restarts,
                job=job if spread else None,
            )  # fmt: skip
            options, keys = _sorted(overrides)
            resolved = load_recipe(recipe, override_items(keys))
            print(resolved.to_yaml(), end="", flush=True)
            if not dry_run and hostfile is None:  # other hosts may see other files
                refuse_early(resolved, options.get("resume", "auto"))
            arguments = [recipe, *overrides]
            folder = Path(resolved.train.output)
            return start(places, arguments, run_folder=folder, dry_run=dry_run, requeue=again)
    except Stopped:
        print("Stopped by a signal before anything was started.", file=sys.stderr)
        return again.stopped({stop.received}, EXIT_REQUEUE) if again else EXIT_REQUEUE


def refuse_early(recipe: Recipe, resume: str) -> None:
    """Refuse before seconds of imports, and before ranks start, what the recipe, files and packages already tell.

    Args:
        recipe: resolved.
        resume: as for `train`.

    Raises:
        MoSLoRAError: see `mm_moslora.training.preflight.check_recipe`; or there is no such task.
    """
    from mm_moslora_eval.protocol.task_registry import tasks_of

    from mm_moslora.training.preflight import check_recipe

    tasks = tasks_of(recipe.validate.tasks)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # ranks refuse together, once they have met
        check_recipe(recipe, resume=resume, tasks=[task.name for task in tasks])


def _processes(nproc: int | None) -> int | None:
    """The option, else $NPROC."""
    text = os.environ.get("NPROC", "")
    if nproc is not None or not text:
        return nproc
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"NPROC is {text!r}, expected a number from 1 on.")
    return int(text)


def _sorted(words: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The options of `train` itself, and the rest, which are keys of the recipe."""
    options: dict[str, str] = {}
    keys: list[str] = []
    waiting = None
    for word in words:
        name, separator, value = word.partition("=")
        if waiting is not None:
            options[waiting], waiting = word, None
        elif name not in ("--resume", "--stop-at"):
            keys.append(word)
        elif separator:
            options[name[2:]] = value
        else:
            waiting = name[2:]
    return options, tuple(keys)
