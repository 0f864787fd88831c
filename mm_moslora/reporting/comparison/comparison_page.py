"""One self-contained HTML page of a comparison, from its `results.json` alone: `write_page`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError
from markupsafe import Markup, escape

from mm_moslora.reporting import page_templates, summary_text
from mm_moslora.reporting.comparison.comparison_charts import columns, draw_png, forest, means_of, score_rows
from mm_moslora.reporting.comparison.comparison_curves import RateChart, cost_charts, rate_charts
from mm_moslora.reporting.page_templates import printable, render_page
from mm_moslora.reporting.svg_charts import format_number
from mm_moslora.reporting.verdicts import AGAINST, difference_of
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.redaction import redact
from mm_moslora.utils.text_format import format_seconds
from mm_moslora.utils.untrusted_data import without_constants

FORMAT = 2


def write_page(results: Path, out: Path) -> Path:
    """Write the page of a comparison's `results.json`, atomically."""
    data = read_results(results)

    def page() -> str:
        try:
            return render(data)
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, UndefinedError) as error:
            raise ConfigError(
                f"{results} is damaged ({error}). `mm-moslora compare ... --only-report` writes it again."
            ) from error

    return page_templates.write_page(out, page)


def read_results(results: Path) -> dict[str, Any]:
    """The content of a comparison's `results.json`."""
    try:
        data: dict[str, Any] = read_json(results)
    except FileNotFoundError as error:
        raise ConfigError(f"{results} does not exist; `mm-moslora compare` writes it.") from error
    except ValueError as error:
        raise ConfigError(f"{error}.") from error
    if data.get("format") != FORMAT:
        raise ConfigError(f"{results} has format {data.get('format')!r}, this version reads {FORMAT}.")
    return data


def render(data: Mapping[str, Any]) -> str:
    """The page of the content of `results.json` as text."""
    filters = {
        "count": summary_text.format_count, "seconds": format_seconds, "number": format_number, "breakable": _breakable,
    }  # fmt: skip
    styles = ("report.css", "comparison.css")
    return render_page("comparison.html.j2", _context(data), filters=filters, styles=styles)


def draw(parts: Sequence[tuple[str, Mapping[str, Any]]], path: Path) -> None:
    """Write the forest plot of one or several comparisons as a PNG file; nothing where no arm was compared."""
    chart = forest([(heading, _readable(data)) for heading, data in parts], title="")
    if chart:
        draw_png(chart, path)


def _breakable(name: str) -> Markup:
    """An arm's name that wraps before its options."""
    return escape(printable(name)).replace("@", Markup("<wbr>@")).replace(":", Markup(":<wbr>"))


def _readable(results: Mapping[str, Any]) -> Any:
    """Results without secrets, and with None for numbers that are not finite."""
    return without_constants(redact(results, keep_hashes=True))


def _context(results: Mapping[str, Any]) -> dict[str, Any]:
    data = _readable(results)
    tasks = columns(data)
    settings = data["settings"]
    less = f"Difference to {settings['reference']}"
    loss = settings["validation"] == ["loss"]
    rates = rate_charts(data["arms"], loss=loss)
    planned, over = data["runs"]["planned"], data["runs"]["over"]
    return {
        "title": data["name"],
        "data": data,
        "facts": [
            data["date"],
            data["hardware"],
            f"{len(data['arms'])} arm{'s' * (len(data['arms']) != 1)}",
            f"{over} of {planned} runs",
        ],
        "unfinished": planned - over,
        "verdicts": data["verdicts"],
        "remarks": data["remarks"],
        "tasks": tasks,
        "rows": [_row(arm, tasks, data) for arm in data["arms"]],
        "controls": [row for arm in data["arms"] for row in _controls(arm)],
        "floors": [(label, name) for name, label in _FLOORS.items() if data["floors"]],
        "forests": [chart for task in tasks if (chart := forest([("", data)], task, title=f"{less}: {task}"))],
        "scores": [chart for task in tasks if (chart := score_rows(data, task, title=task))],
        "rates": rates,
        "rate_table": _rate_rows(rates),
        "rate_measure": "held-out loss, the lower the better" if loss else "score in percent, the higher the better",
        "costs": cost_charts(data["arms"], tasks[0]) if tasks else [],
        "command": data["command"],
        "recipe": data["recipe"],
    }  # fmt: skip


_FLOORS = {"majority": "Most frequent answer", "best_answer": "Best answer per question text"}


def _controls(arm: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of controls: the differences of an arm from each."""
    return [
        {
            "arm": arm["name"], "task": column if len(arm["controls"]) > 1 else "", "against": AGAINST[row["name"]],
            "points": difference.points, "shown": difference.shown,
        }
        for column, item in arm["controls"].items()
        for row in item["rows"]
        if (difference := difference_of(row))
    ]  # fmt: skip


def _rate_rows(charts: Sequence[RateChart]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The table of the learning rates: the rates, and a row of validation values per arm."""
    rates = sorted({rate for chart in charts for rate in (*chart.means, *chart.failed)})
    rows = [
        (
            chart.name,
            ["failed" if rate in chart.failed else f"{chart.means[rate]:.4g}" if rate in chart.means else "–"
             for rate in rates],
        )
        for chart in charts
    ]  # fmt: skip
    return [f"{rate:g}" for rate in rates], rows


def _row(arm: Mapping[str, Any], tasks: Sequence[str], data: Mapping[str, Any]) -> dict[str, Any]:
    good = [seed for seed in arm["seeds"] if seed["status"] == "ok"]
    return {
        "name": arm["name"],
        "about": arm["about"],
        "rate": None if arm["rate"] is None else f"{arm['rate']:g}",
        "seeds": f"{len(good)} of {data['settings']['seeds']}",
        "reference": arm["name"] == data["settings"]["reference"],
        "scores": [means_of(arm, task)[0] for task in tasks],
        "cost": arm["cost"],
    }
