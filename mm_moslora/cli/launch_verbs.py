"""The verbs `launch`, which trains on several processes or hosts, and `files`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.run_paths import SHIPPED, shipped_folder
from mm_moslora.utils.text_format import whole_number

if TYPE_CHECKING:
    from mm_moslora.config import Recipe
    from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help="Dotted recipe keys, and options of `train`")]


def register(app: App) -> None:
    """Add the verbs to the command line."""
    app.command(launch)
    app.command(files)


def files(name: str | None = None) -> int:
    """Print a shipped folder, such as that of the launch scripts: `bash "$(mm-moslora files scripts)"/train.sh`.

    Parameters
    ----------
    name
        scripts, deepspeed_configs, recipes or tutorials; without one, all of them.
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
    diffusion: bool = False,
    nproc: int | None = None,
    nnodes: int = 1,
    rdzv: str | None = None,
    rdzv_id: str | None = None,
    local_addr: str | None = None,
    deepspeed: bool = False,
    hostfile: Path | None = None,
    max_restarts: int = 0,
    through: str = "",
    python: str | None = None,
    srun: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
    log_dir: Path | None = None,
    requeue: bool = False,
    doctor: bool = False,
    dry_run: bool = False,
) -> int:
    """Train a recipe on all accelerators of one or several machines; the same command again continues it.

    One process needs no launcher, several use torchrun, the hosts of a host file use deepspeed. A SLURM job with
    several nodes, with --requeue or with --srun uses srun and one torchrun per node. Exit codes: 0 finished, 75 stopped
    on request (the same command continues the run), anything else failed.

    Parameters
    ----------
    recipe
        YAML file, or the name of a shipped preset.
    diffusion
        The recipe is one of `diffusion train`.
    nproc
        Processes on each host; default: $NPROC, else one per accelerator of that host.
    nnodes
        Hosts; run the same command on each, with --rdzv.
    rdzv
        HOST:PORT of the rendezvous; it must belong to one of the hosts.
    rdzv_id
        Distinguishes runs with the same rendezvous; default: mm-moslora.
    local_addr
        This host's address, where its name resolves to another one.
    deepspeed
        Start the processes of this machine by DeepSpeed's launcher instead of torchrun, which stops more gracefully.
    hostfile
        File with lines such as `worker-1 slots=8`; the hosts are reached through ssh by DeepSpeed's launcher.
    max_restarts
        Number of restarts from the newest checkpoint when a rank dies or hangs.
    through
        Words before the command on every host, split as a shell does: a container ("apptainer exec --nv IMAGE"), or a
        script that loads modules and ends with `exec "$@"`.
    python
        Python of the ranks, where --through or --srun leads into a container; default: this one.
    srun
        Further options of srun in a SLURM job, split as a shell does: "--container-image=IMAGE".
    log_dir
        Also write the output of every rank to rank-00000.log and so on in this folder.
    requeue
        In a SLURM job: requeue the job when SIGUSR1 announces its time limit (--signal=B:USR1@SECONDS). A requeued job
        that saved no new checkpoint is not requeued again.
    doctor
        Run `doctor --distributed` with the recipe on these ranks instead of training.
    dry_run
        Check the recipe, and print it and the command, without starting anything. Its files need not be here.
    """
    from mm_moslora.config import Recipe, override_items
    from mm_moslora.launch.launcher import EXIT_REQUEUE
    from mm_moslora.launch.launcher import launch as start
    from mm_moslora.launch.slurm_job import WARNING, Requeue, SlurmJob
    from mm_moslora.launch.topology import Topology
    from mm_moslora.training.supervision.stop_signals import Stopped, StopRequest

    job = SlurmJob.current(os.environ)
    again = Requeue(job) if requeue else None
    stop = StopRequest()
    try:
        with stop.at_once():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {WARNING})  # the batch script blocks the signal until now
            spread = job is not None and (requeue or srun or job.nodes > 1) and nnodes == 1 and hostfile is None
            places = Topology(
                nproc=_processes(nproc), nnodes=nnodes, rdzv=rdzv, rdzv_id=rdzv_id, local_addr=local_addr,
                deepspeed=deepspeed, hostfile=hostfile, max_restarts=max_restarts, through=_words("through", through),
                python=python or sys.executable, srun=_words("srun", srun), job=job if spread else None,
            )  # fmt: skip
            options, keys = _sorted(overrides)
            resolved = _resolved(recipe, override_items(keys), diffusion=diffusion)
            if doctor and not isinstance(resolved, Recipe):
                raise ConfigError("--doctor checks recipes of `train`, not of `diffusion train`. Leave it out.")
            print(resolved.to_yaml(), end="", flush=True)
            if not doctor:  # which lists what it finds
                others = dry_run or hostfile is not None  # other hosts may see other files
                refuse_early(resolved, None if others else options.get("resume", "auto"))
            train = ["diffusion", "train"] if diffusion else ["train"]
            verb = ["doctor", "--distributed", recipe, *keys] if doctor else [*train, recipe, *overrides]
            run_folder = None if doctor else Path(resolved.train.output)
            code = start(places, verb, run_folder=run_folder, log_folder=log_dir, dry_run=dry_run, requeue=again)
            if doctor and code:
                print("Above: rank 0's findings or error, then the launcher's report of exit code 1.", file=sys.stderr)
            return code
    except Stopped:
        print("Stopped by a signal before anything was started.", file=sys.stderr)
        return again.stopped({stop.received}, EXIT_REQUEUE) if again else EXIT_REQUEUE


def _resolved(recipe: str, overrides: list[str], *, diffusion: bool) -> Recipe | DiffusionRecipe:
    """The recipe of the verb that the ranks run."""
    from mm_moslora.config import load_recipe, recipe_names
    from mm_moslora.diffusion.diffusion_recipe import DIFFUSION_RECIPES, load_diffusion_recipe

    if not diffusion and recipe in recipe_names(DIFFUSION_RECIPES):
        raise ConfigError(f"{recipe} is a diffusion recipe: `mm-moslora launch --diffusion {recipe}`.")
    return load_diffusion_recipe(recipe, overrides) if diffusion else load_recipe(recipe, overrides)


def refuse_early(recipe: Recipe | DiffusionRecipe, resume: str | None = None) -> None:
    """Check a recipe before slow imports, and before anything is queued or started.

    Args:
        recipe: resolved.
        resume: as for `train`. None: without the recipe's files and packages, which may be on another machine.

    Raises:
        MoSLoRAError: see `check_settings` and `check_recipe` of `mm_moslora.training.preflight`; or a task does not
            exist.
    """
    from mm_moslora_eval.protocol.task_registry import is_task_file, tasks_of

    from mm_moslora.config import Recipe
    from mm_moslora.training.preflight import check_adapter_names, check_recipe, check_settings

    if not isinstance(recipe, Recipe):
        check_adapter_names(recipe.adapter)
        return
    every = recipe.validate.tasks
    known = [name for name in every if resume is not None or not is_task_file(name)]
    tasks = [task.name for task in tasks_of(known)]
    if resume is None:
        check_settings(recipe, tasks=tasks if known == every else None)
    elif whole_number(os.environ, "WORLD_SIZE", 1, least=1) == 1:  # several ranks check together after the rendezvous
        check_recipe(recipe, resume=resume, tasks=tasks)


def _processes(nproc: int | None) -> int | None:
    """The option, else $NPROC."""
    return nproc if nproc is not None else whole_number(os.environ, "NPROC", 0, least=1) or None


def _words(option: str, text: str) -> tuple[str, ...]:
    """The words of an option, split as a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--{option} is {text!r}, which has an open quote ({error}).") from error


def _sorted(words: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Split the options of `train` from the keys of the recipe."""
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
