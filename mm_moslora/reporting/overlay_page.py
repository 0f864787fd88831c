"""Several runs on one page: overlaid curves, scores side by side, and differences of their recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from mm_moslora.reporting import summary_text
from mm_moslora.reporting.inline_images import thumbnail
from mm_moslora.reporting.lens_maps import MEASURES as MEASURES_OF_MODULES
from mm_moslora.reporting.run_data import RunData, Stage
from mm_moslora.reporting.run_rows import EvaluationRow, MixerRecord, SampleRow
from mm_moslora.reporting.svg_charts import Series, line_chart, smooth
from mm_moslora.reporting.verdicts import best_of, judge_tuning
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.text_format import visible
from mm_moslora.utils.untrusted_data import LARGEST, parse_yaml_value

MOST_SAMPLES = 12
MOST_RUNS = 6
"""Maximum number of runs, each with its own colour."""
MEASURES = (
    ("loss", "Training loss per supervised token, smoothed", False),
    ("validation_loss", "Validation loss", False),
    ("token_accuracy", "Token accuracy, smoothed", False),
    ("grad_norm", "Gradient norm, smoothed", False),
    ("tokens_per_second", "Throughput, tokens per second, smoothed", True),
)
"""Metric, title, and whether its axis starts at zero."""
_RAW = frozenset({"validation_loss"})


def names_of(runs: Sequence[RunData]) -> list[str]:
    """A short unique name per run: its folder's, with parent folders where needed."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, 12):
        names = [visible("/".join(path.parts[-depth:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [visible(str(path)) for path in paths]


def overlay(runs: Sequence[RunData], refused: Sequence[str] = ()) -> dict[str, Any]:
    """The content of the page, of 2 to `MOST_RUNS` runs, and why others are not on it."""
    names = names_of(runs)
    return {
        "names": names,
        "runs": [
            {
                "name": name, "title": run.summary.get("title") or run.summary.get("name") or name,
                "tiles": summary_text.tiles(run), "standing": summary_text.standing(run),
            }
            for name, run in zip(names, runs, strict=True)
        ],
        "tasks": _tasks(names, runs),
        "charts": _charts(names, runs),
        "differences": _table([_recipe_facts(run) for run in runs], only_different=True),
        "environment": _table([_facts(run.summary.get("environment")) for run in runs]),
        "data": _table([_facts(run.summary.get("data")) for run in runs]),
        "measures": MEASURES_OF_MODULES,
        "mixers": [
            {"name": name, **_mixer_means(run.mixers)} for name, run in zip(names, runs, strict=True) if run.mixers
        ],
        "samples": _samples(names, runs),
        "notes": [*refused, *(f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes)],
    }  # fmt: skip


def _charts(names: Sequence[str], runs: Sequence[RunData]) -> list[dict[str, Any]]:
    stages = list(dict.fromkeys(stage.name for run in runs for stage in run.stages))
    sections = []
    for stage_name in stages:
        charts = []
        for key, title, zero in MEASURES:
            series = []
            for number, (name, run) in enumerate(zip(names, runs, strict=True)):
                stage = next((stage for stage in run.stages if stage.name == stage_name), None)
                points = [] if stage is None else curve(stage, key)
                shown = points if key in _RAW else smooth(points)
                series.append(Series(name=name, points=shown, colour=number))
            if any(item.points for item in series):
                charts.append(line_chart(series, title=title, zero=zero))
        if charts:
            sections.append({"name": stage_name, "charts": charts})
    return sections


def curve(stage: Stage, key: str) -> list[tuple[float, float]]:
    """The points of one metric of a stage."""
    return [
        (float(record["step"]), float(record[key]))
        for record in stage.metrics
        if is_number(record.get("step")) and is_number(record.get(key))
    ]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a chart can show a value of a log; others are not drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _tasks(names: Sequence[str], runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Scores by what they were measured on; runs with other questions have another heading."""
    groups: dict[tuple[Any, ...], list[tuple[str, EvaluationRow]]] = {}
    for name, run in zip(names, runs, strict=True):
        for row in run.evaluation:
            groups.setdefault(row.measured_on, []).append((name, row))
    headings = summary_text.headings([rows[0][1] for rows in groups.values()])
    tables = []
    for key, rows in groups.items():
        # The tuned systems first, since the runs differ in them.
        ordered = sorted(rows, key=lambda item: item[1].name != "tuned")
        elsewhere = [name for other, its in groups.items() if other != key and other[0] == key[0] for name, _ in its]
        absent = sorted(set(elsewhere) - {name for name, _ in rows})
        verdict = _verdict(rows)
        if absent:
            unlike = f"Not compared with {', '.join(absent)}: measured on other questions, or by other rules."
            verdict = f"{verdict} {unlike}" if verdict else unlike
        systems = [row for _, row in ordered]
        tables.append({"name": headings[key], "rows": ordered, "systems": systems, "verdict": verdict,
                      "top": summary_text.top_of(systems)})  # fmt: skip
    return tables


def _verdict(groups: Sequence[tuple[str, EvaluationRow]]) -> str | None:
    """Conclusions from the intervals of the tuned systems."""
    tuned = [(name, row) for name, row in groups if row.name == "tuned"]
    if len(tuned) < 2:
        return None
    ranked = sorted(tuned, key=lambda item: -item[1].score.mean)
    best = ranked[0][1].score
    level = [name for name, row in ranked if row.score.high >= best.low]
    rows = {name: [row for other, row in groups if other == name] for name, row in ranked if row.pictures}
    idle = [name for name, its in rows.items() if not judge_tuning(summary_text.differences(its)).uses_pictures]
    return " ".join(
        [best_of(level, idle=idle), *(f"{name}: {remark}" for name, row in ranked for remark in row.remarks)]
    )


def _samples(names: Sequence[str], runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Questions that at least two runs answered."""
    by_question: dict[tuple[str, str], list[tuple[int, SampleRow]]] = {}
    for number, run in enumerate(runs):
        for sample in run.samples:
            by_question.setdefault((sample.question, sample.image or ""), []).append((number, sample))
    shared = [answers for answers in by_question.values() if len({number for number, _ in answers}) > 1]
    # Questions with different answers come first.
    shared.sort(key=lambda answers: len({sample.after_correct for _, sample in answers}) < 2)
    return [
        {
            "question": answers[0][1].question,
            "options": answers[0][1].options,
            "answer": answers[0][1].answer,
            "picture": next(
                (shown for number, it in answers if it.image and (shown := thumbnail(runs[number].folder, it.image))),
                None,
            ),
            "tries": [
                {"label": names[number], "text": sample.after, "correct": sample.after_correct}
                for number, sample in answers
                if sample.after is not None
            ],
        }
        for answers in shared[:MOST_SAMPLES]
    ]


def _mixer_means(mixers: Sequence[MixerRecord]) -> dict[str, Any]:
    means = {
        key: sum(values) / len(values)
        for key in MEASURES_OF_MODULES
        if (values := [mixer.figures[key] for mixer in mixers if key in mixer.figures])
    }
    return {"count": len(mixers), "figures": means}


def _recipe_facts(run: RunData) -> dict[str, str]:
    texts = [(stage.name, stage.config) for stage in run.stages if stage.config]
    facts: dict[str, str] = {}
    for stage, text in texts:
        prefix = "" if len(texts) == 1 else f"{stage}: "
        facts |= {f"{prefix}{key}": value for key, value in flat_recipe(text).items()}
    return facts


def flat_recipe(text: str) -> dict[str, str]:
    """A recipe's YAML as dotted keys; empty where it cannot be read."""
    try:
        return _facts(parse_yaml_value(text), ".")
    except ConfigError:
        return {}


def flatten(value: Any, separator: str = ", ", prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with the keys of each level joined; empty for anything else."""
    flat: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        name = f"{prefix}{key}"
        flat |= flatten(item, separator, f"{name}{separator}") if isinstance(item, dict) else {name: item}
    return flat


def _facts(value: Any, separator: str = ", ") -> dict[str, str]:
    return {name: str(item) for name, item in flatten(value, separator).items()}


def _table(columns: Sequence[dict[str, str]], *, only_different: bool = False) -> list[tuple[str, list[str | None]]]:
    """Rows of a table with one column per run; None where a run lacks the value."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [(key, [column.get(key) for column in columns]) for key in keys]
    return [row for row in rows if len(set(row[1])) > 1] if only_different else rows
