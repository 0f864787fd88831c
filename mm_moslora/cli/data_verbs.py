"""The verbs of `mm-moslora data`. Parsing and printing only; heavy imports happen inside the verbs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from mm_moslora.cli.shared_options import LIST, Overrides, quiet_libraries
from mm_moslora.config import load_recipe, override_items

if TYPE_CHECKING:
    from mm_moslora.config import Recipe

data_app = App(name="data", help="Look at training data before the run.")

Records = Annotated[int, Parameter(help="Of a stream without an end, look at its first records, so many.")]


@data_app.command(name="check")
def data_check(
    recipe: str,
    *overrides: Overrides,
    against: Annotated[tuple[Path, ...], LIST] = (),
    processes: Annotated[
        int | None, Parameter(help="Processes that share the work; default: one per processor.")
    ] = None,
    records: Records = 1000,
    everything: Annotated[bool, Parameter(name="--all", negative="")] = False,
    stats: Annotated[bool, Parameter(negative="")] = False,
    caches: Annotated[bool, Parameter(negative="")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="One JSON object on stdout.")] = False,
) -> int:
    """Read every record and picture of a recipe's data and report all faults; exit code 1 when a run would stop.

    Parameters
    ----------
    recipe
        YAML file, preset, or the folder of a run.
    against
        Folders of evaluation pictures; training pictures that look like one of them are listed.
    everything
        Show every fault instead of the first 20; --json always contains all.
    stats
        Print statistics instead: tokens, turns, answers, image sizes, fill rate of packed rows.
    caches
        Fill the recipe's caches instead: tokens (data.cache), features of a frozen vision encoder
        (model.vision.feature_cache). Training fills what is missing by itself.
    """
    resolved = _recipe(recipe, overrides)
    from mm_moslora.planning.recipe_data import check_recipe, statistics_of

    if caches:
        return _fill(resolved)
    if stats:
        checked = statistics_of(resolved, processes=processes, records=records)
    else:
        checked = check_recipe(resolved, against=against, processes=processes, everything=everything, records=records)
    if as_json:
        print(json.dumps(checked.plain))
    else:
        _print_all(checked.shown)
    return checked.code


def _fill(recipe: Recipe) -> int:
    from mm_moslora.planning.fill_caches import fill_caches

    filled = fill_caches(recipe)
    print(
        f"Caches: tokens of {filled.records} records; features of "
        f"{filled.pictures} pictures, {filled.encoded} of them new, {filled.unreadable} pictures cannot be read."
    )
    return 0


@data_app.command(name="view")
def data_view(
    recipe: str, *overrides: Overrides, count: int = 3, start: int = 0, html: Path | None = None,
    records: Records = 1000,
) -> int:  # fmt: skip
    """Show records as they are trained on, with supervised tokens coloured.

    Parameters
    ----------
    recipe
        YAML file, preset, or the folder of a run.
    count
        Records to show.
    start
        Number of the first record over all sources, from 0.
    html
        Write one self-contained page with pictures instead, and print its path.
    """
    resolved = _recipe(recipe, overrides)
    from mm_moslora.planning.recipe_data import view_page, view_recipe

    if html is not None:
        print(view_page(resolved, html, start=start, count=count, records=records))
        return 0
    _print_all(view_recipe(resolved, start=start, count=count, records=records))
    return 0


def _recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """A recipe whose data files exist, before slow imports."""
    resolved = load_recipe(name, override_items(overrides))
    from mm_moslora.training.preflight import check_data

    check_data(resolved.data)
    quiet_libraries()
    return resolved


def _print_all(renderables: Sequence[Any]) -> None:
    from rich.console import Console

    console = Console()
    for item in renderables:
        console.print(item)
