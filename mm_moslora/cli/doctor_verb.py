"""The verb `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mm_moslora.cli.launch_verbs import refuse_early
from mm_moslora.cli.shared_options import Overrides, quiet_libraries
from mm_moslora.config import load_recipe, override_items
from mm_moslora.utils.errors import ConfigError, MoSLoRAError
from mm_moslora.utils.run_paths import require_model

if TYPE_CHECKING:
    from mm_moslora.config import Recipe
    from mm_moslora.planning.doctor import Diagnosis


def doctor(
    recipe: str | None = None, *overrides: Overrides, model: str | None = None, revision: str | None = None
) -> int:
    """Check versions, accelerator, threads and stale locks, or a model; exit code 1 when a finding is bad.

    Parameters
    ----------
    recipe
        The recipe to be trained: YAML file, or the name of a shipped recipe. Its settings are checked, and its packages
        count as needed. Without one, only the required packages do.
    model
        Folder or hub id of a model: what would train and how, its labels, its logits, and whether conversations of one
        row see each other, by probes of the model itself.
    revision
        With --model: on the hub.
    """
    if model and recipe is not None:
        raise ConfigError("--model and a recipe ask for different checks. Give one of them.")
    if revision and not model:
        raise ConfigError("--revision is of the model of --model, which is missing.")
    if model:
        require_model("--model", model)  # before slow imports
        quiet_libraries()
        from mm_moslora.planning.model_probes import diagnose_model

        return _report(diagnose_model(model, revision=revision))
    from mm_moslora.planning.doctor import diagnose

    if recipe is None:
        return _report(diagnose())
    resolved = load_recipe(recipe, override_items(overrides))
    refused = _refused(resolved)
    said = {item.detail for item in refused}
    others = diagnose(Path(resolved.train.output), resolved)
    return _report([*refused, *(item for item in others if item.detail not in said)])


def _refused(recipe: Recipe) -> list[Diagnosis]:
    """What `train` refuses in a recipe on this machine, every fault of it at once."""
    from mm_moslora_eval.protocol.task_groups import tasks_of

    from mm_moslora.planning.doctor import Diagnosis, check_parts
    from mm_moslora.training.preflight import checks_here

    checks = {
        "recipe": lambda: refuse_early(recipe), **checks_here(recipe),
        "tasks": lambda: tasks_of(recipe.validate.tasks), "base": lambda: check_parts(recipe.model),
    }  # fmt: skip
    found: dict[str, Diagnosis] = {}
    for name, check in checks.items():
        if name == "base" and found:  # it needs the packages and files that are missing
            continue
        try:
            check()
        except (MoSLoRAError, OSError) as error:
            found[str(error)] = Diagnosis(name=name, status="bad", detail=str(error))
    sound = Diagnosis(name="recipe", detail="its keys, names, files, base and projector are known and fit")
    return list(found.values()) or [sound]


def _report(findings: list[Diagnosis]) -> int:
    """Print the findings; returns the exit code."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "check", "found", *["remedy"] * any(item.remedy for item in findings), box=None)
    signs = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "bad": "[red]bad[/]"}
    for item in findings:
        table.add_row(signs[item.status], *map(escape, (item.name, item.detail, item.remedy)[: len(table.columns) - 1]))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # logs have no width of their own
    console.print(table)
    return 1 if any(item.status == "bad" for item in findings) else 0
