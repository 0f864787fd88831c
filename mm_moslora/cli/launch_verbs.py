"""The verbs `launch` (several processes or hosts) and `files`, and what both train and config verbs share."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group, Parameter

from mm_moslora.utils.errors import ConfigError, ExitStatus
from mm_moslora.utils.files import discard, replace_text
from mm_moslora.utils.run_paths import SHIPPED, shipped_folder
from mm_moslora.utils.text_format import whole_number

if TYPE_CHECKING:
    from mm_moslora.config import Recipe
    from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe
    from mm_moslora.training.run_driver import TrainResult

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help="Dotted recipe keys, and options of `train`")]


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
        The recipe is one of `diffusion train`, which trains in one process.
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
    dry_run
        Check the recipe, and print it and the command, without starting anything. Its files need not be here.
    """
    from mm_moslora.config import override_items
    from mm_moslora.launch.launcher import launch as start
    from mm_moslora.launch.slurm_job import WARNING, Requeue, SlurmJob
    from mm_moslora.launch.topology import Topology
    from mm_moslora.training.supervision.stop_signals import Stopped, StopRequest

    job = SlurmJob.current(os.environ)
    requeuing = Requeue(job) if requeue else None
    stop = StopRequest()
    try:
        with stop.at_once():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {WARNING})  # the batch script blocks the signal until now
            spread = job is not None and (requeue or srun or job.nodes > 1) and nnodes == 1 and hostfile is None
            if nproc is None:
                nproc = 1 if diffusion else whole_number(os.environ, "NPROC", 0, least=1) or None
            if diffusion and (nproc, nnodes, hostfile) != (1, 1, None):
                raise ConfigError("Diffusion models train in one process. Leave out --nproc, --nnodes and --hostfile.")
            topology = Topology(
                nproc=nproc, nnodes=nnodes, rdzv=rdzv, rdzv_id=rdzv_id, local_addr=local_addr,
                deepspeed=deepspeed, hostfile=hostfile, max_restarts=max_restarts, through=_words("through", through),
                python=python or sys.executable, srun=_words("srun", srun), job=job if spread else None,
            )  # fmt: skip
            options, keys = _split_options(overrides)
            resolved = _resolved(recipe, override_items(keys), diffusion=diffusion)
            if dry_run:
                print(resolved.to_yaml(), end="", flush=True)
            others = dry_run or hostfile is not None  # other hosts may see other files
            refuse_early(resolved, None if others else options.get("resume", "auto"))
            verb = [*(["diffusion"] if diffusion else []), "train", recipe, *overrides]
            folder = Path(resolved.train.output)
            return start(topology, verb, run_folder=folder, log_folder=log_dir, dry_run=dry_run, requeue=requeuing)
    except Stopped:
        print("Stopped by a signal before anything was started.", file=sys.stderr)
        return requeuing.stopped({stop.received}, ExitStatus.STOPPED) if requeuing else ExitStatus.STOPPED


def _resolved(recipe: str, overrides: list[str], *, diffusion: bool) -> Recipe | DiffusionRecipe:
    """The recipe of the verb that the ranks run."""
    from mm_moslora.config import load_recipe, recipe_names
    from mm_moslora.diffusion.diffusion_recipe import DIFFUSION_RECIPES, load_diffusion_recipe

    if not diffusion and recipe in recipe_names(DIFFUSION_RECIPES):
        raise ConfigError(f"{recipe} is a diffusion recipe: `mm-moslora launch --diffusion {recipe}`.")
    return load_diffusion_recipe(recipe, overrides) if diffusion else load_recipe(recipe, overrides)


def refuse_early(recipe: Recipe | DiffusionRecipe, resume: str | None = None) -> bool:
    """Check a recipe before slow imports, and before anything is queued or started; see `training.preflight`. True:
    training has to check nothing again.

    Args:
        resume: as for `train`. None: without the recipe's files and packages, which may be on another machine.
    """
    from mm_moslora_eval.protocol.task_groups import names_own_file, tasks_of

    from mm_moslora.config import Recipe
    from mm_moslora.training.preflight import check_adapter_names, check_recipe, check_settings

    if not isinstance(recipe, Recipe):
        check_adapter_names(recipe.adapter)
        return False
    every = recipe.validate.tasks
    checked = [name for name in every if resume is not None or not names_own_file(name)]
    tasks = [task.name for task in tasks_of(checked)]
    if resume is None:
        check_settings(recipe, tasks=tasks if checked == every else None)
    elif whole_number(os.environ, "WORLD_SIZE", 1, least=1) == 1:  # several ranks check together after the rendezvous
        check_recipe(recipe, resume=resume, tasks=tasks)
        return True
    return False


def show_recipe(
    recipe: str | None, overrides: Sequence[str], *, load: Callable[[str, list[str]], Recipe | DiffusionRecipe],
    presets: Path, kind: type[Recipe | DiffusionRecipe],
) -> int:  # fmt: skip
    """Print a resolved recipe; for a key the keys of its group, without either the names of the presets."""
    from mm_moslora.config import override_items, recipe_names

    if recipe is None:
        print("\n".join(recipe_names(presets)))
        return 0
    if not overrides and not Path(recipe).exists() and (group := _group_of(kind, recipe)) is not None:
        _explain(kind, group)
        return 0
    resolved = load(recipe, override_items(overrides))
    refuse_early(resolved)
    print(resolved.to_yaml(), end="")
    return 0


def _group_of(kind: type, key: str) -> list[str] | None:
    """The path of the innermost group of a recipe's key; None where there is no such key."""
    from mm_moslora.config.recipe_keys import kind_at

    keys = key.split(".")
    if kind_at(kind, keys) is None:
        return None
    while not is_dataclass(kind_at(kind, keys)):
        keys.pop()
    return keys


def _explain(kind: type, group: list[str]) -> None:
    """Print the keys of a group: type, meaning, default."""
    from mm_moslora.config.recipe_keys import kind_at

    each = Parameter(negative=(), name_transform=lambda key: key)

    def keys(*, value: Any) -> None: ...

    keys.__annotations__["value"] = Annotated[
        kind_at(kind, group), Parameter(name=f"--{'.'.join(group)}" if group else "*")
    ]
    shown = App(usage="", help_flags=(), version_flags=(), group_parameters=Group("Keys"), default_parameter=each)
    shown.default(keys)
    shown.help_print([])


def run_training(
    folder: Path, train: Callable[..., TrainResult], *, advice: Callable[[Path], str] | None = None
) -> int:
    """Train in this process, print the checkpoint or what stopped the run, and return the exit code.

    Args:
        folder: the run folder; a stopped run leaves its mark there.
        advice: what to print about the checkpoint of a finished run.
    """
    from mm_moslora.launch.launcher import STOPPED, leave_mark, stopped_text
    from mm_moslora.training.supervision.stop_signals import Stopped, StopRequest

    stop = StopRequest()
    try:
        with stop.at_once():
            result = train(stop=stop)
            from mm_moslora.utils import distributed

            if distributed.is_main():
                print(f"Checkpoint: {result.checkpoint} (step {result.step} of {result.total_steps})")
                if result.stopped_by:
                    replace_text(folder / STOPPED, stopped_text(result.stopped_by))
                    print(stopped_text(result.stopped_by), end="")
                else:
                    discard(folder / STOPPED)
                if advice is not None and result.step >= result.total_steps:
                    print(advice(result.checkpoint))
            if not result.stopped_by:
                return 0
            # torchrun ends all ranks as soon as one leaves with a code, and rank 0 may still be closing a tracker.
            distributed.barrier()
    except Stopped:
        leave_mark(folder, stop.received)
        print(stopped_text(stop.received), end="")
    return ExitStatus.STOPPED


def _words(option: str, text: str) -> tuple[str, ...]:
    """The words of an option, split as a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--{option} is {text!r}, which has an open quote ({error}).") from error


def _split_options(words: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
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
