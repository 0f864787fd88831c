"""The verb `doctor`."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mm_moslora.cli.launch_verbs import refuse_early
from mm_moslora.cli.library_notices import quiet_libraries
from mm_moslora.config import load_recipe, override_items
from mm_moslora.utils.errors import ConfigError, MoSLoRAError

if TYPE_CHECKING:
    from mm_moslora.config import Recipe
    from mm_moslora.planning.doctor import Diagnosis

_FAMILY_SECONDS = 600.0
Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help="Dotted recipe keys: --optim.lr 1e-4")]


def doctor(
    recipe: str | None = None,
    *overrides: Overrides,
    limit: float | None = None,
    model: str | None = None,
    revision: str | None = None,
    random: bool = False,
    gpus: str = "",
    families: bool = False,
    progress: Path | None = None,
) -> int:
    """Check versions, accelerator, threads and stale locks, or a model; exit code 1 when a finding is bad.

    Parameters
    ----------
    recipe
        The recipe to be trained: YAML file, or the name of a shipped preset. Its settings are checked, and its packages
        count as needed. Without one, only the required packages do. With --families: names of families.
    limit
        Seconds for each of several --families, after which it is not tried (600).
    model
        Folder or hub id of a model: what would train and how, its labels, its logits, and whether conversations of one
        row see each other, by probes of the model itself.
    revision
        With --model: on the hub.
    random
        With --model: build the class small from its configuration, without its weights.
    gpus
        With --model: count memory on these cards, for example 8xA100-80G.
    families
        Print a table of the image-text-to-text families of the installed transformers, or of those that are named
        (`model_type`), probed on small random models. Exit code 1 if one would train wrongly.
    progress
        With --families: a JSON file that keeps rows, so that a command that was cut goes on where it was.
    """
    if model and (recipe is not None or families):
        raise ConfigError("--model, --families and a recipe ask for different checks. Give one of them.")
    if not model and (revision or random or gpus):
        raise ConfigError("--revision, --random and --gpus describe the model of --model, which is missing.")
    if limit is not None and not 0 < limit < math.inf:
        raise ConfigError(f"--limit is {limit:g}, expected seconds: a number above 0.")
    if progress is not None and not families:
        raise ConfigError("--progress keeps the rows of --families, which is missing.")
    if families:
        kinds = [] if recipe is None else [recipe, *overrides]
        return _families(kinds, seconds=_FAMILY_SECONDS if limit is None else limit, progress=progress)
    if model:
        quiet_libraries()
        from mm_moslora.planning.model_doctor import diagnose_model

        return _report(diagnose_model(model, revision=revision, small=random, gpus=gpus))
    from mm_moslora.planning.doctor import diagnose

    resolved = None if recipe is None else load_recipe(recipe, override_items(overrides))
    if resolved is None:
        return _report(diagnose())
    first = _settings(resolved)
    rest = [item for item in diagnose(Path(resolved.train.output), resolved) if item.detail != first.detail]
    return _report([first, *rest])


def _families(kinds: list[str], *, seconds: float, progress: Path | None) -> int:
    """Print the table row by row; how far it is goes to the other stream."""
    quiet_libraries()
    from mm_moslora.planning.family_table import HEAD, family_row, family_rows, known_families

    chosen, begun, wrong = known_families(kinds), time.monotonic(), False
    alone = len(chosen) == 1 and progress is None
    rows = map(family_row, chosen) if alone else family_rows(chosen, seconds=seconds, progress=progress)
    print("\n".join(HEAD), flush=True)
    for number, row in enumerate(rows, 1):
        print(row.text, flush=True)
        wrong |= row.wrong
        left = (time.monotonic() - begun) / number * (len(chosen) - number)
        if not alone:
            print(f"{number} of {len(chosen)} families, about {left / 60:.0f} min left", file=sys.stderr, flush=True)
    return int(wrong)


def _settings(recipe: Recipe) -> Diagnosis:
    """What every verb refuses in a recipe."""
    from mm_moslora.planning.doctor import Diagnosis

    try:
        refuse_early(recipe)
    except MoSLoRAError as error:
        return Diagnosis(name="recipe", status="bad", detail=str(error), remedy="Correct the recipe.")
    return Diagnosis(name="recipe", detail="its keys and names are known")


def _report(findings: list[Diagnosis]) -> int:
    """Print the findings; returns the exit code."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "check", "found", "remedy", box=None)
    signs = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "bad": "[red]bad[/]"}
    for item in findings:
        table.add_row(signs[item.status], *map(escape, (item.name, item.detail, item.remedy)))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # logs have no width of their own
    console.print(table)
    return 1 if any(item.status == "bad" for item in findings) else 0
