"""One table for several models: their scores on the same documents by the same rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_moslora.reporting.verdicts import score_text, unread_text
from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.text_format import aligned
from mm_moslora_eval.report.evaluation_page import names_of
from mm_moslora_eval.report.shared_results import model_of
from mm_moslora_eval.run.result_file import read_results
from mm_moslora_eval.scoring.score_aggregation import facts_of
from mm_moslora_eval.scoring.task_result import TaskResult


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
