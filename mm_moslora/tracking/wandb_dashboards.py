"""A wandb workspace and a wandb report as code, for runs that this package tracked.

    python -m mm_moslora.tracking.wandb_dashboards ENTITY PROJECT

Needs the extra `dashboards` and a login; these APIs of wandb are a public preview.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from mm_moslora.reporting.lens_maps import TITLES
from mm_moslora.tracking.wandb_tracker import refuse_workspace_settings

SECTIONS: dict[str, tuple[str, ...]] = {
    "Loss": (
        "train/loss",
        "validation/loss",
        "train/token_accuracy",
        "validation/token_accuracy",
        "train/grad_norm",
        "train/lr/adapter",
        "train/lr/mixer",
    ),
    "Components": tuple(
        f"train/{kind}_norm/{part}" for kind in ("momentum", "weight") for part in ("adapter", "mixer", "projector")
    ),
    "Adapter": (*(f"adapter/mixer/{name}" for name in TITLES), "adapter/mixers"),
    "Evaluation": ("eval/scores", "eval/validation"),
    "Speed and memory": (
        "train/tokens_per_second",
        "train/samples_per_second",
        "train/tokens_seen",
        "train/eta_seconds",
        "train/wall_seconds",
        "train/mfu",
        "train/step_seconds",
        "train/data_seconds",
        "system/memory_gib",
    ),
}
"""Sections and the metrics in them."""
_TABLES = ("eval/scores", "eval/validation", "adapter/mixers")


def workspace(*, entity: str, project: str) -> Any:
    """A workspace with one section per topic; `.save()` publishes it."""
    wr, ws = _module("reports.v2"), _module("workspaces")
    sections = [ws.Section(name=name, panels=_panels(wr, metrics), is_open=True) for name, metrics in SECTIONS.items()]
    return ws.Workspace(entity=entity, project=project, name="mm_moslora", sections=sections)


def report(*, entity: str, project: str, title: str) -> Any:
    """A report over all runs of a project; `.save()` publishes it."""
    wr = _module("reports.v2")
    blocks: list[Any] = [wr.P("Intervals, controls and seeds are in the run folders: `mm-moslora report RUN`.")]
    for name, metrics in SECTIONS.items():
        runs = wr.Runset(entity=entity, project=project)
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=_panels(wr, metrics))]
    return wr.Report(entity=entity, project=project, title=title, blocks=blocks)


def _module(name: str) -> Any:
    refuse_workspace_settings()
    return import_module(f"wandb_workspaces.{name}")


def _panels(wr: Any, metrics: tuple[str, ...]) -> list[Any]:
    return [
        wr.WeavePanelSummaryTable(table_name=name) if name in _TABLES else wr.LinePlot(x="train/step", y=[name])
        for name in metrics
    ]


def main(arguments: list[str]) -> int:
    """Publish both; prints their URLs."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m mm_moslora.tracking.wandb_dashboards ENTITY PROJECT\n")
        return 2
    entity, project = arguments
    for made in (workspace(entity=entity, project=project), report(entity=entity, project=project, title=project)):
        made.save()
        sys.stdout.write(f"{made.url}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
