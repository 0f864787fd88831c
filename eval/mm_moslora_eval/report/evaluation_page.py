"""Self-contained HTML pages of an evaluation run and of a comparison. No torch, no network."""

from __future__ import annotations

import base64
import io
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mm_moslora.reporting.page_templates import render_page, write_page
from mm_moslora.reporting.verdicts import amount_text, between, own_pictures, resting_on, score_text
from mm_moslora.utils.errors import ConfigError, DataError, EvalError, MoSLoRAError
from mm_moslora.utils.redaction import redact_text
from mm_moslora.utils.text_format import visible
from mm_moslora.utils.untrusted_data import build_known
from mm_moslora_eval.protocol.task import shown_name
from mm_moslora_eval.run.paired_comparison import PairedComparison, compare
from mm_moslora_eval.run.result_file import read_results
from mm_moslora_eval.run.run_records import read_calls
from mm_moslora_eval.run.sample_thumbnails import MOST_SAMPLES, shown_samples, spread, stored_thumbnails, verdict
from mm_moslora_eval.run.scored_subsets import SAMPLES, read_json, read_samples, view_below
from mm_moslora_eval.run.stored_types import SHOWN, Scoring
from mm_moslora_eval.scoring.score_aggregation import facts_of
from mm_moslora_eval.scoring.score_remarks import beside
from mm_moslora_eval.scoring.task_result import RULES, TaskResult
from mm_moslora_eval.sources.source_images import open_image

logger = logging.getLogger(__name__)

MOST_CATEGORIES = 40
MOST_INVOCATIONS = 10
_THUMBNAIL = 176
_LONGEST = 1200
"""Shown characters of a prompt or an answer; samples.jsonl contains the whole text."""
_MODES = {
    "own": "own", "blind": "mean colour", "wrong": "another item's", "majority": "none (majority)",
    "question_majority": "none (per question)",
}  # fmt: skip


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run folder with `results.json`, by default as its `report.html`."""
    results = read_results(run)
    if not results:
        raise EvalError(f"{run} holds no results; expected a results.json. Run or score the evaluation first.")
    data = read_json(run / "results.json")
    tasks: dict[str, list[TaskResult]] = {}
    for name, result in zip(names_of(results), results, strict=True):
        tasks.setdefault(name, []).append(result)
    model = next((r.about["model"] for r in results if r.about.get("model")), {"name": run.name, "fingerprint": ""})
    page = _render(
        "report.html.j2",
        title=f"Evaluation of {model['name']}",
        model=model,
        date=max((str(r.about["date"]) for r in results if r.about.get("date")), default=""),
        environments=_environments(results, data),
        invocations=read_calls(run)[-MOST_INVOCATIONS:],
        rows=[_row(result) for result in results],
        tasks=[_task(name, group, run) for name, group in tasks.items()],
    )
    return write_page(out or run / "report.html", lambda: page)


def names_of(results: Sequence[TaskResult]) -> list[str]:
    """The shown name of every result's task, with the selection and, if names collide, the data file, its checksum and
    the rules."""

    def described(result: TaskResult) -> tuple[str, str, str, str]:
        about = result.about
        selection = about.get("selection", {})
        part = f", {selection['name']} of {selection.get('of')}" if selection.get("name", "all") != "all" else ""
        asked_as = about.get("asked_as", result.protocol)
        part += f", asked as {asked_as}" if asked_as != result.protocol else ""
        path = "/".join(Path(str(about.get("data", {}).get("path", ""))).parts[-2:])
        rules = ", ".join(str(result.about[rule]) for rule in RULES if rule in result.about)
        checksum = f" [{str(result.subject[3])[:8]}]"
        return (
            f"{shown_name(result.task, result.protocol)}{part}",
            f" ({path})",
            checksum,
            f" by {rules}, version {result.version}",
        )

    parts = {result.subject: described(result) for result in results}
    shown = {subject: part[0] for subject, part in parts.items()}
    for number in (1, 2, 3):
        taken = Counter(shown.values())
        shown = {subject: name + parts[subject][number] if taken[name] > 1 else name for subject, name in shown.items()}
    return [shown[result.subject] for result in results]


def _environments(results: Sequence[TaskResult], data: dict[str, Any]) -> list[dict[str, Any]]:
    """The environments in which answers were computed, and in which they were scored."""
    computed: list[dict[str, Any]] = []
    for result in results:
        computed += [one for one in result.about.get("computed_by") or () if one not in computed]
    shown = []
    for number, environment in enumerate(computed, start=1):
        code = environment.get("code") or {}
        facts = environment["model"] | environment["environment"] | ({"commit": code["commit"]} if code else {})
        shown.append({"title": f"Answered with{f' ({number})' if len(computed) > 1 else ''}", "facts": facts})
    with suppress(ConfigError):
        scored = build_known(Scoring, data.get("scored") or data, source="results.json")
        shown.append({"title": "Last scored with", "facts": {"date": scored.date, **scored.environment}})
    return shown


def write_comparison(comparisons: Sequence[PairedComparison], out: Path) -> Path:
    """Write comparisons as a page, including the samples that changed."""
    page = _render(
        "comparison.html.j2",
        title="A against B",
        comparisons=[
            {
                "it": item,
                "bar": _difference_bar(item),
                "changed": [
                    {"a": a, "b": b, "gained": a["score"] > b["score"]} for a, b in spread(item.samples, MOST_SAMPLES)
                ],
                "verdict": f"{between(item.score.as_difference)}: {item.score.as_difference.points}.",
                "basis": resting_on(item.score.estimate.n, item.score.estimate.clusters, item.score.estimate.groups),
            }
            for item in comparisons
        ],
    )
    return write_page(out, lambda: page)


def write_models(table: Any, out: Path) -> Path:
    """Write a `ModelsTable` as a page."""
    page = _render("models.html.j2", title="Scores of models", table=table)
    return write_page(out, lambda: page)


def _render(template: str, **context: Any) -> str:
    filters = {
        "score": format_score, "measured": _format_measured, "short": _short, "named": score_text,
        "amount": amount_text,
    }  # fmt: skip
    return render_page(template, context, filters=filters, package="mm_moslora_eval.report", show=_shown)


def _shown(text: str) -> str:
    return redact_text(visible(text), keep_hashes=True)


def _short(text: str | None) -> str:
    text = redact_text(text or "", keep_hashes=True)  # before truncation: half a secret would not be recognised
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text)} characters)"


def format_score(value: float | None, aggregation: str = "mean") -> str:
    """A share (or CIDEr) as percent, as in published tables, a sum (MME) unchanged, nan as a dash."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value if facts_of(aggregation).is_sum else 100 * value:.1f}"


def _format_measured(value: float | None, aggregation: str = "mean") -> str:
    """The same as the sentences say it: CIDEr, F1 and other named scores as they are."""
    facts = facts_of(aggregation)
    if facts.is_sum or not facts.score or value is None or math.isnan(value):
        return format_score(value, aggregation)
    return score_text(value, facts.score, named=False)


def _row(result: TaskResult) -> dict[str, Any]:
    bar = None
    aggregation = str(result.about.get("aggregation", "mean"))
    facts = facts_of(aggregation)
    if not math.isnan(result.low) and not (facts.is_sum or facts.beyond_1):
        bar = {"score": 100 * result.score, "low": 100 * result.low, "high": 100 * result.high}
    return {
        "it": result, "bar": bar, "mode": _MODES.get(result.mode, result.mode),
        "unit": facts.score, "learned_from": result.about.get("learned_from", ""),
        "baseline": result.mode in ("majority", "question_majority"), "unscored": result.about.get("unscored"),
        "basis": f"on {result.clusters} pictures" if result.clusters not in (None, result.n) else "",
    }  # fmt: skip


def _task(name: str, results: Sequence[TaskResult], run: Path) -> dict[str, Any]:
    first = results[0]
    galleries: list[dict[str, Any]] = []
    remarks = [(result.mode, remark) for result in results for remark in result.remarks]
    verdicts: list[str] = []
    try:
        galleries = [_gallery(run, view, result) for result in results if (view := _samples_view(run, result))]
        verdicts = _verdicts(results, run)
    except (MoSLoRAError, OSError, LookupError, AttributeError, TypeError, ValueError) as error:  # of a damaged view
        logger.warning("%s: its samples are left out (%s).", name, error)
        remarks.append(("samples", f"left out, since they are damaged ({type(error).__name__}: {error})"))
    return {
        "name": name,
        "anchor": re.sub(r"[^\w-]", "-", name),
        "about": first.about,
        "beside": [*beside(first.about)],
        "rows": [_row(result) for result in results],
        "verdicts": verdicts,
        "remarks": remarks,
        "published": first.about.get("published", []),
        "modes": [result.mode for result in results if result.metrics],
        "metrics": [
            (key, [result.metrics.get(key) for result in results if result.metrics])
            for key in dict.fromkeys(key for result in results for key in result.metrics)
        ],
        "categories": _categories(first),
        "galleries": galleries,
    }


def _samples_view(run: Path, result: TaskResult) -> Path | None:
    """Folder of the samples of a result; None for a baseline and for missing samples."""
    view = view_below(run, result.folder or f"{result.task}@{result.protocol}/{result.mode}")
    return view if (view / SAMPLES).is_file() else None


def _verdicts(results: Sequence[TaskResult], run: Path) -> list[str]:
    """Whether the model uses the pictures: own pictures against the controls, sample by sample."""
    scored = {result.mode: view for result in results if result.scored and (view := _samples_view(run, result))}
    sentences = []
    for control, words in (("blind", "a plain picture"), ("wrong", "another item's picture")):
        if not {"own", control} <= scored.keys():
            continue
        comparison = compare(scored["own"], scored[control])
        score = comparison.score
        nats = f" A: own, B: {words}. {comparison.nats.text}" if comparison.nats is not None else ""
        sentences.append(
            f"{own_pictures(score.as_difference, control=words)} {score.wins} questions gained, "
            f"{score.losses} lost.{nats}"
        )
    return sentences


def _categories(result: TaskResult) -> list[dict[str, Any]]:
    if len(result.categories) < 2:
        return []
    shown = list(result.categories.items())[:MOST_CATEGORIES]
    bounds = [high for _, numbers in shown if (high := numbers.get("high")) is not None]
    top = max([1.0, *(value for value in bounds if value == value)])  # of a sum or CIDEr, the largest one
    return [
        {key: None if (value := numbers.get(key)) != value else value for key in ("n", "score", "low", "high")}
        | {"name": name, "top": top}
        for name, numbers in shown
    ]


def _gallery(run: Path, view: Path, result: TaskResult) -> dict[str, Any]:
    rows = [row for row in read_samples(view) if row.keys() >= SHOWN and row["answers"] is not None]
    shown = [row | {"verdict": verdict(row), "thumbnails": _thumbnails(run, row)} for row in shown_samples(rows)]
    counts = dict(Counter(verdict(row) for row in rows))
    return {
        "mode": result.mode, "label": _MODES.get(result.mode, result.mode), "samples": shown, "total": len(rows),
        "counts": counts,
    }  # fmt: skip


def _thumbnails(run: Path, row: dict[str, Any]) -> list[Markup]:
    made = []
    for _, data in stored_thumbnails(run, row):
        try:
            picture = open_image(data)
        except DataError:
            continue
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=70)
        made.append(Markup("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()))  # noqa: S704
    return made


def _difference_bar(item: PairedComparison) -> dict[str, float]:
    """Positions in percent on a scale that is symmetric around 0."""
    pair = item.score.estimate
    numbers = [abs(value) for value in (pair.low, pair.high, pair.value) if not math.isnan(value)]
    reach = max([*numbers, 1e-9]) * 1.15
    return {
        name: 50 + 50 * (value if not math.isnan(value) else 0.0) / reach
        for name, value in (("low", pair.low), ("high", pair.high), ("at", pair.value))
    }
