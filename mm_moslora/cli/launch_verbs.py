"""The verb `launch` (several processes or hosts), and what `train`, `config` and others do with recipes."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
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
    from mm_moslora.launch.slurm_job import SlurmJob
    from mm_moslora.launch.topology import Topology
    from mm_moslora.training.run_driver import TrainResult

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help="Dotted recipe keys, and options of `train`")]


def show_folders(name: str | None) -> int:
    """Print the path of a shipped folder, or of all."""
    if name is not None:
        print(shipped_folder(name))
        return 0
    for word in SHIPPED:
        print(f"{word:<18} {shipped_folder(word)}")
    return 0


@Parameter(name="*", group="Hosts")
@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """Where the ranks run."""

    nproc: int | None = None
    """Processes on each host; default: $NPROC, else one per accelerator of that host."""
    nnodes: int = 1
    """Hosts; run the same command on each, with --rdzv."""
    rdzv: str | None = None
    """HOST:PORT of the rendezvous; it must belong to one of the hosts."""
    rdzv_id: str | None = None
    """Distinguishes runs with the same rendezvous; default: mm-moslora."""
    local_addr: str | None = None
    """This host's address, where its name resolves to another one."""
    deepspeed: bool = False
    """Start the processes of this machine by DeepSpeed's launcher instead of torchrun, which stops more gracefully."""
    hostfile: Path | None = None
    """File with lines such as `worker-1 slots=8`; the hosts are reached through ssh by DeepSpeed's launcher."""
    max_restarts: int = 0
    """Number of restarts from the newest checkpoint when a rank dies or hangs."""
    through: str = ""
    """Command prefix on every host, split as a shell does: a container ("apptainer exec --nv IMAGE"), or a script that
    loads modules and ends with `exec "$@"`."""
    python: str | None = None
    """Python of the ranks, where --through or --srun leads into a container; default: this one."""
    srun: Annotated[str, Parameter(allow_leading_hyphen=True)] = ""
    """Further options of srun in a SLURM job, split as a shell does: "--container-image=IMAGE"."""

    def topology(self, job: SlurmJob | None, *, requeue: bool) -> Topology:
        """The processes and hosts; those of a SLURM job, where srun has to reach them."""
        from mm_moslora.launch.topology import Topology

        spread = job is not None and (requeue or self.srun or job.nodes > 1) and self.nnodes == 1 and not self.hostfile
        nproc = self.nproc if self.nproc is not None else whole_number(os.environ, "NPROC", 0, least=1) or None
        words = {name: _words(name, getattr(self, name)) for name in ("through", "srun")}
        changed = {"nproc": nproc, "python": self.python or sys.executable, "job": job if spread else None, **words}
        return Topology(**(vars(self) | changed))


HERE = HostOptions()


def launch(
    recipe: str,
    *overrides: Overrides,
    hosts: HostOptions = HERE,
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
        YAML file, or the name of a shipped recipe.
    log_dir
        Also write the output of every rank to rank-00000.log and so on in this folder.
    requeue
        In a SLURM job: requeue the job when SIGUSR1 announces its time limit (--signal=B:USR1@SECONDS). A requeued job
        that saved no new checkpoint is not requeued again.
    dry_run
        Check the recipe, and print it and the command, without starting anything. Its files need not be here.
    """
    from mm_moslora.launch.launcher import launch as start
    from mm_moslora.launch.slurm_job import WARNING, Requeue, SlurmJob
    from mm_moslora.training.supervision.stop_signals import Stopped, StopRequest

    job = SlurmJob.current(os.environ)
    requeuing = Requeue(job) if requeue else None
    stop = StopRequest()
    try:
        with stop.at_once():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {WARNING})  # the batch script blocks the signal until now
            options, keys = _split_options(overrides)
            if is_diffusion_recipe(recipe):
                hosts = hosts if hosts.nproc is not None else replace(hosts, nproc=1)
                if (hosts.nproc, hosts.nnodes, hosts.hostfile) != (1, 1, None):
                    raise ConfigError(
                        "Diffusion models train in one process. Leave out --nproc, --nnodes and --hostfile."
                    )
            topology = hosts.topology(job, requeue=requeue)
            resolved = load_any_recipe(recipe, keys)
            if dry_run:
                print(resolved.to_yaml(), end="", flush=True)
            others = dry_run or hosts.hostfile is not None  # other hosts may see other files
            refuse_early(resolved, None if others else options.get("resume", "auto"))
            verb = ["train", recipe, *overrides]
            folder = Path(resolved.train.output)
            return start(topology, verb, run_folder=folder, log_folder=log_dir, dry_run=dry_run, requeue=requeuing)
    except Stopped:
        print("Stopped by a signal before anything was started.", file=sys.stderr)
        return requeuing.stopped({stop.received}, ExitStatus.STOPPED) if requeuing else ExitStatus.STOPPED


def is_diffusion_recipe(recipe: str) -> bool:
    """Whether this is a shipped diffusion recipe, or a file or run whose model has a `base`."""
    from mm_moslora.config import recipe_names
    from mm_moslora.config.recipe_reading import recipe_of_run
    from mm_moslora.diffusion.diffusion_recipe import DIFFUSION_RECIPES
    from mm_moslora.utils.untrusted_data import parse_yaml
    from mm_moslora.utils.untrusted_files import read_text

    path = Path(recipe)
    if path.is_dir():
        path = recipe_of_run(path)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return recipe in recipe_names(DIFFUSION_RECIPES)
    model = parse_yaml(read_text(path), source=str(path)).get("model")
    return isinstance(model, dict) and "base" in model


def load_any_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe | DiffusionRecipe:
    """A recipe of a vision-language model or of a diffusion model."""
    from mm_moslora.config import load_recipe, override_items
    from mm_moslora.diffusion.diffusion_recipe import load_diffusion_recipe

    items = override_items(overrides)
    return load_diffusion_recipe(recipe, items) if is_diffusion_recipe(recipe) else load_recipe(recipe, items)


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


def show_recipe(recipe: str | None, overrides: Sequence[str]) -> int:
    """Print a resolved recipe; for a key the keys of its group, without either the names of the presets."""
    from mm_moslora.config import Recipe, recipe_names
    from mm_moslora.diffusion.diffusion_recipe import DIFFUSION_RECIPES, DiffusionRecipe

    if recipe is None:
        print("\n".join([*recipe_names(), *recipe_names(DIFFUSION_RECIPES)]))
        return 0
    own = recipe.removeprefix("diffusion.")
    kind = Recipe if own == recipe else DiffusionRecipe
    if not overrides and not Path(recipe).exists() and (group := _group_of(kind, own)) is not None:
        _explain(kind, group)
        return 0
    resolved = load_any_recipe(recipe, overrides)
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
