"""The verb `launch`: training on several processes or hosts, without a word about torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help="Dotted recipe keys, and options of `train`")]


def register(app: App) -> None:
    """Add the verb to the command line."""
    app.command(launch)


def launch(
    recipe: str,
    *overrides: Overrides,
    nproc: int | None = None,
    nnodes: int = 1,
    rdzv: str | None = None,
    hostfile: Path | None = None,
    max_restarts: int = 0,
    dry_run: bool = False,
) -> int:
    """Train a recipe on all accelerators of this machine, or of several; the same command again continues it.

    One process runs as it is, several under torchrun, the hosts of a host file under deepspeed, and a SLURM job of
    several nodes under srun.

    Parameters
    ----------
    recipe
        YAML file, or the name of a shipped preset.
    nproc
        Processes on each host; default: one per accelerator.
    nnodes
        Hosts; run the same command on each, with --rdzv.
    rdzv
        HOST:PORT where the hosts meet; one of them must own it.
    hostfile
        Lines such as `worker-1 slots=8`, reached through ssh.
    max_restarts
        Start again from the newest checkpoint when a rank dies or hangs, so many times.
    dry_run
        Print the resolved recipe and the command, and start nothing.
    """
    from mm_moslora.config import load_recipe, override_items
    from mm_moslora.launch import EXIT_REQUEUE, Places
    from mm_moslora.launch import launch as start
    from mm_moslora.training.signals import Stopped, StopRequest

    try:
        with StopRequest().at_once():
            places = Places(nproc=nproc, nnodes=nnodes, rdzv=rdzv, hostfile=hostfile, max_restarts=max_restarts)
            resolved = load_recipe(recipe, override_items(_of_the_recipe(overrides)))
            print(resolved.to_yaml(), end="")
            arguments = [recipe, *overrides]
            return start(places, arguments, run_folder=Path(resolved.train.output), dry_run=dry_run)
    except Stopped:
        print("Stopped by a signal before anything was started.", file=sys.stderr)
        return EXIT_REQUEUE


def _of_the_recipe(words: tuple[str, ...]) -> tuple[str, ...]:
    """Without the options of `train` itself."""
    kept, skip = [], False
    for word in words:
        option = word.partition("=")[0] in ("--resume", "--stop-at")
        if not (skip or option):
            kept.append(word)
        skip = option and "=" not in word
    return tuple(kept)
