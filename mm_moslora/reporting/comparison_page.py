"""One self-contained HTML page of a comparison, from its `results.json` alone: `write_page`."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mm_moslora.reporting import summary_text
from mm_moslora.reporting.comparison_charts import differences_chart, means_chart, rates_chart
from mm_moslora.reporting.run_page import asset, printable
from mm_moslora.reporting.svg_charts import format_number
from mm_moslora.reporting.verdicts import AGAINST, difference_of
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import replace_text
from mm_moslora.utils.redaction import redact
from mm_moslora.utils.text_format import format_seconds
from mm_moslora.utils.untrusted_files import read_text

FORMAT = 2
ALL = "all tasks"


def write_page(results: Path, out: Path) -> Path:
    """Write the page of a comparison.

    Args:
        results: a comparison's `results.json`.
        out: the HTML file; replaced atomically.

    Raises:
        ConfigError: the file is missing, or another version wrote it.
    """
    if not results.is_file():
        raise ConfigError(f"{results} does not exist; `mm-moslora compare` writes it.")
    data = json.loads(read_text(results))
    if data.get("format") != FORMAT:
        raise ConfigError(f"{results} has format {data.get('format')!r}, this version reads {FORMAT}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, render(data))
    return out


def render(data: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        data: the content of `results.json`.
    """
    environment = Environment(
        loader=PackageLoader("mm_moslora.reporting"), autoescape=True, undefined=StrictUndefined, finalize=printable,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(count=summary_text.format_count, seconds=format_seconds, number=format_number)
    script = asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("comparison.html.j2").render(
        style=Markup(asset("report.css") + asset("comparison.css")),  # noqa: S704  (shipped with the package)
        script=Markup(script),  # noqa: S704
        script_hash=digest,
        **_context(data),
    )


def _context(results: Mapping[str, Any]) -> dict[str, Any]:
    data = redact(results, keep_hashes=True)
    tasks = list(dict.fromkeys(name for arm in data["arms"] for name in arm["tasks"]))
    order = sorted(tasks, key=lambda name: name != ALL)
    names = [arm["name"] for arm in data["arms"]]
    return {
        "title": data["name"],
        "data": data,
        "facts": [
            data["date"],
            data["hardware"],
            f"{len(names)} arms",
            f"{data['runs']['over']} of {data['runs']['planned']} runs",
        ],
        "verdicts": data["verdicts"],
        "remarks": data["remarks"],
        "tasks": order,
        "rows": [_row(arm, order, data) for arm in data["arms"]],
        "controls": [row for arm in data["arms"] for row in _controls(arm)],
        "floors": [(label, name) for name, label in _FLOORS.items() if data["floors"]],
        "charts": [Markup(chart) for chart in _charts(data, order, names) if chart],  # noqa: S704  (escaped there)
        "rates": Markup(_rates(data)),  # noqa: S704
        "command": data["command"],
        "recipe": data["recipe"],
    }  # fmt: skip


_FLOORS = {"majority": "Most frequent answer", "best_answer": "Best answer per question text"}


def _controls(arm: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of controls: the differences of an arm from each."""
    return [
        {
            "arm": arm["name"], "task": column if len(arm["controls"]) > 1 else "", "against": AGAINST[row["name"]],
            "points": found.points, "shown": found.shown,
        }
        for column, item in arm["controls"].items()
        for row in item["rows"]
        if (found := difference_of(row))
    ]  # fmt: skip


def _charts(data: Mapping[str, Any], tasks: Sequence[str], names: Sequence[str]) -> list[str]:
    charts = []
    for task in tasks:
        floors = data["floors"].get(task, {})
        charts.append(means_chart(data["arms"], task, floors, title=task))
        rows = [row for row in data["comparisons"] if row["task"] == task]
        charts.append(differences_chart(rows, names, title=f"{task}: difference"))
        nats = [found | {"arm": row["arm"], "reference": row["reference"]} for row in rows if (found := _nats(row))]
        known = [row for row in nats if row["low"] is not None]
        charts.append(
            differences_chart(known, names, title=f"{task}: log-likelihood of the reference answer", unit="nats")
        )
    return charts


def _nats(row: Mapping[str, Any] | None, mode: str = "own") -> dict[str, Any] | None:
    """A difference in nats; None where there is none, as in results of earlier versions."""
    return None if row is None else row.get("nats", {}).get(mode)


def _rates(data: Mapping[str, Any]) -> str:
    by_loss = data["settings"]["validation"] == ["loss"]
    measure = "Held-out loss (the lower the better)" if by_loss else "Validation score, percent (the higher the better)"
    return rates_chart(data["arms"], title="Sensitivity to the learning rate", measure=measure, percent=not by_loss)


def _row(arm: Mapping[str, Any], tasks: Sequence[str], data: Mapping[str, Any]) -> dict[str, Any]:
    compared = {row["task"]: row for row in data["comparisons"] if row["arm"] == arm["name"]}
    good = [seed for seed in arm["seeds"] if seed["status"] == "ok"]
    return {
        "name": arm["name"],
        "about": arm["about"],
        "rate": None if arm["rate"] is None else f"{arm['rate']:g}",
        "seeds": f"{len(good)} of {data['settings']['seeds']}",
        "reference": arm["name"] == data["settings"]["reference"],
        "cells": [
            _cell(arm["tasks"].get(task), compared.get(task), arm.get("nats", {}).get(task, {})) for task in tasks
        ],
        "cost": arm["cost"],
    }


def _nats_line(nats: Mapping[str, Any], row: Mapping[str, Any] | None) -> str:
    """Log-likelihood of the reference answer, with the difference to the reference arm."""
    if "own" not in nats:
        return ""
    found = _nats(row)
    less = f", {found['difference']:+.3f}" if found else ""
    if found and found["low"] is not None:
        less += f" [{found['low']:+.3f}, {found['high']:+.3f}], p {found['p_corrected']:.2g}"
    return f"{nats['own']['mean']:.3f} nats{less}"


def _cell(
    measure: Mapping[str, Any] | None, row: Mapping[str, Any] | None, nats: Mapping[str, Any]
) -> dict[str, str] | None:
    if measure is None:
        return None
    cell = {
        "mean": f"{100 * measure['mean']:.1f}",
        "error": f"± {100 * measure['stderr']:.1f}",
        "difference": "",
        "p": "",
        "nats": _nats_line(nats, row),
    }
    if row is not None:
        low, high = 100 * row["low"], 100 * row["high"]
        cell["difference"] = f"{100 * row['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
        unclear = row["verdict"] in ("one seed", "nothing follows")
        cell["p"] = row["verdict"] if unclear else f"p {row['p_corrected']:.2g}"
    return cell
