"""Results for others: one table for several models on the same documents, and the model-index of a model card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mm_moslora.reporting.verdicts import score_text, unread_text
from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.files import replace_text
from mm_moslora.utils.folder_marks import output_file
from mm_moslora.utils.redaction import redact_text
from mm_moslora.utils.text_format import aligned
from mm_moslora_eval.report.evaluation_page import names_of
from mm_moslora_eval.run.result_file import read_results
from mm_moslora_eval.run.run_records import RUN
from mm_moslora_eval.run.scored_subsets import read_json
from mm_moslora_eval.scoring.score_aggregation import facts_of
from mm_moslora_eval.scoring.task_result import RULES, TaskResult, strict_json

_TASK_TYPE = "image-text-to-text"
_DECIDES = (
    "prompt", "decoding", *RULES, "grading", "changed", "code", "selection", "asked_as", "asked_to_think", "seed",
    "video", "video_frames",
)  # fmt: skip
"""What `TaskResult.about` knows of how answers were asked for and scored; the card repeats it whole."""


def write_model_index(run: Path, out: Path) -> int:
    """Write the results of a run with its own pictures; gives how many have no score and are left out."""
    results = [result for result in read_results(run) if result.mode == "own"]
    scored = [result for result in results if result.scored]
    if not scored:
        raise EvalError(f"{run} holds no scored results of own pictures; expected a run folder with a results.json.")
    model = redact_text(model_of(run), keep_hashes=True)
    output_file(out).parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, _model_index(model, scored))
    return len(results) - len(scored)


def model_of(run: Path) -> str:
    """The name of a run's model; the folder's name where its record is missing or damaged."""
    try:
        return str(read_json(run / RUN)["model"]["name"])
    except (EvalError, KeyError, TypeError):
        return run.name


def _model_index(model: str, results: Sequence[TaskResult]) -> str:
    """The front matter of a model card; several protocols of one set stand under it as metrics."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    rows = []
    for name, result in zip(names_of(results), results, strict=True):
        about, counts = result.about, result.counts
        data, selection = about.get("data", {}), about.get("selection", {})
        path = str(data.get("path", ""))
        hub_id = path if path.count("/") == 1 and not Path(path).suffix else result.task
        details = {
            "protocol": result.protocol, "version": result.version, "stderr": result.stderr, "low": result.low,
            "high": result.high, "documents": result.n, "failed": counts.failed,
            "not_inferable": counts.not_inferable, "ungraded": counts.ungraded, "judge": _judge(about),
            **{name: about[name] for name in _DECIDES if name in about},
        }  # fmt: skip
        part = selection.get("name", "all")
        rows.append(
            EvalResult(
                task_type=_TASK_TYPE, task_name=name, dataset_type=hub_id,
                dataset_name=about.get("title") or result.task,
                dataset_config=None if part == "all" else f"{part} of {selection.get('of')}",
                dataset_revision=data.get("revision"), metric_type=str(about.get("metric", "score")),
                metric_name=_measure(result),
                metric_value=result.score, metric_args=strict_json({k: v for k, v in details.items() if v is not None}),
            )
        )  # fmt: skip
    index = eval_results_to_model_index(Path(model).name or model, rows)
    return yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)


def _measure(result: TaskResult) -> str:
    """The name of a score, with what makes it another one than the protocol's greedy answers give."""
    about = result.about
    temperature, samples = (about.get("decoding", {}).get(*usual) for usual in (("temperature", 0), ("samples", 1)))
    parts = [
        result.protocol, temperature and f"temperature {temperature}",
        samples > 1 and f"{about.get('over_samples', 'mean')} over {samples} samples",
        about.get("changed") and f"changed: {'; '.join(about['changed'])}",
    ]  # fmt: skip
    name = f"{about.get('aggregation', 'mean')} of {about.get('metric', 'score')}"
    return f"{name} ({', '.join(str(part) for part in parts if part)})"


def _judge(about: Mapping[str, Any]) -> str | None:
    judge = about.get("judge")
    return (
        None if judge is None or "wording" not in judge else f"{judge['model']}, prompt {judge['prompt_sha256'][:12]}"
    )


@dataclass(frozen=True, kw_only=True)
class ModelsTable:
    """Scores of models; a row is about the same documents and rules for all of them."""

    models: tuple[str, ...]
    rows: tuple[tuple[str, tuple[TaskResult | None, ...]], ...]
    """Name of the task, and a result of each model, None where it has none."""

    @property
    def head(self) -> tuple[str, ...]:
        """The titles of the columns."""
        return ("task", "n", *self.models)

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The texts of the rows."""
        return [
            (name, str(next(result.n for result in results if result is not None)), *map(_cell, results))
            for name, results in self.rows
        ]

    @property
    def notes(self) -> list[str]:
        """What is missing behind a score, and why there is none."""
        notes = []
        for name, results in self.rows:
            for model, result in zip(self.models, results, strict=True):
                if result is not None and (text := _missing(result)):
                    notes.append(f"{name}, {model}: {text}")
        return notes


def models_table(runs: Sequence[Path], *, mode: str = "own") -> ModelsTable:
    """The table of several runs."""
    found = []
    for run in runs:
        results = [result for result in read_results(run) if result.mode == mode]
        if not results:
            raise EvalError(f"{run} holds no results with {mode} pictures; expected a run folder with a results.json.")
        found.append(results)
    names = [model_of(run) for run in runs]
    repeated = Counter(names)
    models = [f"{name} ({run})" if repeated[name] > 1 else name for name, run in zip(names, runs, strict=True)]
    everything = [result for results in found for result in results]
    shown = dict(zip((result.subject for result in everything), names_of(everything), strict=True))
    rows = [
        (name, tuple(next((r for r in results if r.subject == subject), None) for results in found))
        for subject, name in shown.items()
    ]
    return ModelsTable(models=tuple(models), rows=tuple(rows))


def _cell(result: TaskResult | None) -> str:
    if result is None:
        return "-"
    if not result.scored:
        return "unscored"
    unit = facts_of(str(result.about.get("aggregation", "mean"))).score
    score, low, high = (score_text(value, unit, named=False) for value in (result.score, result.low, result.high))
    return f"{score}{'*' if _missing(result) else ''} ({low.removesuffix(' %')} to {high})"


def _missing(result: TaskResult) -> str:
    if not result.scored:
        return str(result.about.get("unscored", "no score"))
    counts = result.counts
    parts = {
        "failed and count as wrong": counts.failed,
        "have no grade and are left out": counts.ungraded,
        "are left out with them": counts.left_out,
    }
    texts = [f"{count} of {counts.total} answers {text}" for text, count in parts.items() if count]
    return "; ".join(filter(None, (*texts, unread_text(counts.not_inferable, counts.total - counts.failed))))


def as_text(table: ModelsTable) -> str:
    """The table for a terminal."""
    return "\n".join([*aligned(table.head, table.cells), *_starred(table)])


def as_markdown(table: ModelsTable) -> str:
    """The table for a page."""
    rows = [table.head, ["---"] * len(table.head), *table.cells]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, *(["", *_starred(table)] if table.notes else [])])


def _starred(table: ModelsTable) -> list[str]:
    return [f"* {note}" for note in table.notes]
