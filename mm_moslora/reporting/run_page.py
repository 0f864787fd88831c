"""One self-contained HTML file of a run folder: `build_report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeGuard

from markupsafe import Markup

from mm_moslora.reporting import summary_text
from mm_moslora.reporting.inline_images import data_url, heat_map, thumbnail
from mm_moslora.reporting.lens_maps import MEASURES, TITLES, heat_maps
from mm_moslora.reporting.page_templates import render_page, write_page
from mm_moslora.reporting.run_data import EvaluationRow, MixerRecord, RunData, load_run
from mm_moslora.reporting.svg_charts import Series, format_number, heat_chart, line_chart, smooth
from mm_moslora.reporting.verdicts import OF_ONE_SCORE, forgetting_sentence, score_text
from mm_moslora.utils.text_format import format_seconds
from mm_moslora.utils.untrusted_data import LARGEST

MOST_SAMPLES = 24
"""Maximum number of samples, so that a report stays small enough for e-mail."""
MOST_MIXERS = 12
LONGEST_ANSWER = 280
"""Maximum characters of an answer; samples.json holds the whole answer."""
_TIMES = (
    ("all in all", "wall_seconds"), ("in the step", "step_seconds"), ("waiting for data", "data_seconds"),
    ("slowest rank's work", "work_seconds"), ("fastest rank's work", "work_seconds_min"),
)  # fmt: skip
Metrics = Sequence[Mapping[str, Any]]
"""Records of a log."""
_COMPONENTS = {
    "vision": "Vision encoder", "projector": "Projector", "language": "Language model",
    "adapter": "Adapter factors A, B", "mixer": "Mixers M",
}  # fmt: skip


def build_report(run_folder: Path, out: Path) -> Path:
    """Write the report of a run; returns `out`."""
    data = load_run(run_folder)
    return write_page(out, lambda: render(data))


def render(data: RunData) -> str:
    """The page of one run as text."""
    filters = {
        "score": score_text, "scale_of": summary_text.scale_of, "top_of": summary_text.top_of,
        "count": summary_text.format_count, "seconds": format_seconds, "number": format_number,
        "explained": summary_text.explained,
    }  # fmt: skip
    return render_page("report.html.j2", _context(data), filters=filters)


def _context(data: RunData) -> dict[str, Any]:
    summary = data.summary
    tasks = summary_text.tasks(data)
    maps = heat_maps([(mixer.path, mixer.figures) for mixer in data.mixers])
    return {
        "title": summary.get("title") or summary.get("name") or data.folder.name,
        "description": summary.get("description"),
        "facts": _facts(data),
        "standing": summary_text.standing(data),
        "alerts": data.alerts,
        "verdicts": [v for task, rows in tasks if (v := summary_text.verdict(task, rows))],
        "forgetting": [(row, forgetting_sentence(row.what, row.difference)) for row in data.forgetting],
        "tiles": summary_text.tiles(data),
        "assembly": _assembly(summary),
        "tasks": [_task(task, rows) for task, rows in tasks],
        "draws": data.summary.get("kind") == "diffusion",
        "of_one_score": OF_ONE_SCORE,
        "samples": _samples(data),
        "samples_left": max(0, len(data.samples) - MOST_SAMPLES),
        "has_metrics": data.metrics is not None,
        "charts": _charts(data.metrics or []),
        "mixers": [_mixer(mixer) for mixer in data.mixers if mixer.after][:MOST_MIXERS],
        "mixer_rows": data.mixers,
        "measures": [(key, name) for key, name in MEASURES.items() if any(key in item.figures for item in data.mixers)],
        "lens_maps": [heat_chart(item) for item in maps],
        "lens_curves": _lens_curves(data.metrics or []),
        "data_facts": _flat(summary.get("data")),
        "quarantine": data.quarantine,
        "environment": _flat(summary.get("environment")),
        "licences": _flat(summary.get("licences")),
        "commands": _commands(data),
        "recipe": data.config,
        "notes": data.notes,
    }


def _facts(data: RunData) -> list[str]:
    """The line of facts under the title."""
    summary = data.summary
    facts = [str(summary[key]) for key in ("date", "hardware", "precision") if summary.get(key)]
    if summary.get("zero"):
        facts.append("plain torch" if summary["zero"] == "none" else f"DeepSpeed {summary['zero']}")
    if summary.get("world_size"):
        world = int(summary["world_size"])
        facts.append(f"{world} process{'es' if world > 1 else ''}")
    step, total = summary_text.progress(data)
    if step:
        facts.append(f"step {step} of {total}" if total else f"{step} steps")
    return facts


def _assembly(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Boxes of the forward pass, each with its description and its trained parameters."""
    parts, base = summary.get("parts") or {}, summary.get("base") or {}
    boxes = []
    components = {str(c.get("name")): c for c in summary.get("components") or [] if isinstance(c, dict)}
    order = [*(name for name in _COMPONENTS if name in components), *(n for n in components if n not in _COMPONENTS)]
    for name in order:
        component = components[name]
        what = parts.get(name) or base.get(name)
        boxes.append(
            {
                "name": name,
                "label": _COMPONENTS.get(name, name),
                "what": PurePath(str(what)).name if what else None,
                "total": int(component.get("total", 0)),
                "trainable": int(component.get("trainable", 0)),
            }
        )
        if name == "projector" and summary.get("tokens_per_image"):
            boxes[-1]["after"] = f"{summary['tokens_per_image']} visual tokens per picture"
    return boxes


def _task(task: str, rows: list[EvaluationRow]) -> dict[str, Any]:
    categories = list(dict.fromkeys(name for row in rows for name in row.categories))
    columns = [
        ("All", _common({row.score.n for row in rows})),
        *((name, _common({r.categories[name].n for r in rows if name in r.categories})) for name in categories),
    ]
    return {"name": task, "rows": rows, "categories": categories, "columns": columns}


def _common(counts: set[int]) -> int | None:
    """The number of questions of a column where all rows share it; else each cell shows its own."""
    return next(iter(counts)) if len(counts) == 1 else None


def _samples(data: RunData) -> list[dict[str, Any]]:
    return [
        {
            "question": _shorten(sample.question),
            "options": {letter: _shorten(text) for letter, text in sample.options.items()},
            "answer": _shorten(sample.answer),
            "tries": [
                {"label": label, "text": _shorten(text), "correct": correct}
                for label, text, correct in (
                    ("Before", sample.before, sample.before_correct),
                    ("After", sample.after, sample.after_correct),
                )
                if text is not None
            ],
            "has_picture": sample.image is not None,
            "kind": summary_text.sample_kind(sample),
            "asked_before": sample.before is not None,
            "picture": thumbnail(data.folder, sample.image) if sample.image else None,
        }
        for sample in sorted(data.samples, key=lambda sample: sample.before is None)[:MOST_SAMPLES]
    ]


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_ANSWER else text[: LONGEST_ANSWER - 1].rstrip() + "…"


def _charts(metrics: Metrics) -> list[Markup]:
    loss, validation = _curve(metrics, "loss"), _curve(metrics, "validation_loss")
    rates = sorted({key for record in metrics for key in record if key.startswith("lr/")})
    charts = [
        (
            "Loss per supervised token" if any("supervised_tokens" in row for row in metrics) else "Loss",
            [
                Series(name="every step", points=loss, faint=True),
                Series(name="training, smoothed", points=smooth(loss)),
                Series(name="validation", points=validation),
            ],
            False,
        ),
        (
            "Token accuracy",
            [
                *_smoothed("training, smoothed", _curve(metrics, "token_accuracy")),
                Series(name="validation", points=_curve(metrics, "validation_token_accuracy")),
            ],
            False,
        ),
        ("Learning rate", [Series(name=key[3:], points=_curve(metrics, key)) for key in rates], True),
        ("Pictures per second", _smoothed("pictures per second", _curve(metrics, "pictures_per_second")), True),
        ("Throughput, tokens per second", _smoothed("tokens per second", _curve(metrics, "tokens_per_second")), True),
        ("Gradient norm", _smoothed("gradient norm", _curve(metrics, "grad_norm")), False),
        (
            "Seconds per optimiser step",
            [Series(name=name, points=smooth(_curve(metrics, key))) for name, key in _TIMES],
            True,
        ),
    ]
    return [
        line_chart(series, title=title, zero=zero)
        for title, series, zero in charts
        if any(item.points for item in series)
    ]


def _curve(metrics: Metrics, key: str) -> list[tuple[float, float]]:
    """The points of one metric."""
    return [
        (float(record["step"]), float(record[key]))
        for record in metrics
        if _is_number(record.get("step")) and _is_number(record.get(key))
    ]


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a chart can show a value of a log; others are not drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _lens_curves(metrics: Metrics) -> list[Markup]:
    """Means over the adapted modules, where they were logged more than once."""
    return [
        line_chart([Series(name=MEASURES[key], points=points)], title=title, zero=True)
        for key, title in TITLES.items()
        if len(points := _curve(metrics, f"mixer/{key}")) > 1
    ]


def _smoothed(name: str, points: list[tuple[float, float]]) -> list[Series]:
    return [Series(name=name, points=points, faint=True), Series(name=name, points=smooth(points))]


def _mixer(mixer: MixerRecord) -> dict[str, Any]:
    """Before and after on one colour scale, the change and the energies by pairs on scales of their own."""
    assert mixer.after is not None
    scale = max(abs(value) for matrix in (mixer.before or [], mixer.after) for row in matrix for value in row)
    pictures = [_drawn("after", mixer.after, scale)]
    before = mixer.before
    if before and len(before) == len(mixer.after) and len(before[0]) == len(mixer.after[0]):
        change = [[b - a for a, b in zip(old, new, strict=True)] for old, new in zip(before, mixer.after, strict=True)]
        largest = max(abs(value) for row in change for value in row)
        pictures = [_drawn("before", before, scale), *pictures, _drawn("change", change, largest)]
    if mixer.pairs:
        pictures.append(_drawn("pairs", mixer.pairs, max(map(max, mixer.pairs))))
    return {"mixer": mixer, "pictures": pictures}


def _drawn(label: str, matrix: list[list[float]], scale: float) -> dict[str, Any]:
    return {"label": label, "url": data_url(heat_map(matrix, scale)), "scale": scale}


def _flat(value: Any) -> list[tuple[str, str]]:
    """Nested facts as pairs of name and text, in order."""
    return [(name.replace("_", " "), _fact(item)) for name, item in _flatten(value).items()]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with the keys of all levels joined; empty for anything else."""
    flat: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        name = f"{prefix}{key}"
        flat |= _flatten(item, f"{name}, ") if isinstance(item, dict) else {name: item}
    return flat


def _fact(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _commands(data: RunData) -> list[dict[str, str]]:
    commands = data.summary.get("commands")
    if isinstance(commands, list):
        return [
            {"what": str(item.get("what", "")), "command": str(item["command"])}
            for item in commands
            if isinstance(item, dict) and "command" in item
        ]
    if data.config is None:
        return []
    verb = f"mm-moslora {'diffusion ' if data.summary.get('kind') == 'diffusion' else ''}train"
    return [{"what": "Train again", "command": f"{verb} config.yaml --train.output runs/again"}]
