"""Compares two systems on the samples of the same documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora.reporting.verdicts import unread_text
from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.run.scored_subsets import (
    DOCUMENTS,
    SAMPLES,
    TASK,
    documents_of,
    find_view,
    folder_of,
    read_samples,
    read_view,
    scored_row,
)
from mm_moslora_eval.scoring.estimates import sample_stddev
from mm_moslora_eval.scoring.measured_scores import nats_of, units_of
from mm_moslora_eval.scoring.score_aggregation import facts_of
from mm_moslora_eval.scoring.score_differences import (
    LikelihoodDifference,
    ScoreDifference,
    difference_of_scores,
    likelihood_difference,
)
from mm_moslora_eval.scoring.scored_sample import Scored, with_scores
from mm_moslora_eval.scoring.task_result import RULES
from mm_moslora_eval.sources.document import Document


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Two systems on the same samples, A - B; each may have run with several seeds."""

    task: str
    aggregation: str
    """The task's aggregation, whose score is compared."""
    score: ScoreDifference
    nats: LikelihoodDifference | None
    """The difference in the log-likelihood of the references; None where a run has none."""
    samples: tuple[tuple[dict[str, Any], dict[str, Any]], ...]
    """The rows of A and B (of their first seeds) with different scores."""
    remarks: tuple[str, ...] = ()
    """What keeps a score of A or B from being one of its model."""

    @property
    def seed_spread(self) -> float:
        """Standard deviation between seeds, pooled over both systems; nan with one seed each."""
        several = [scores for scores in (self.score.seeds_a, self.score.seeds_b) if len(scores) > 1]
        squares = [sample_stddev(scores) ** 2 * (len(scores) - 1) for scores in several]
        degrees = sum(len(scores) - 1 for scores in several)
        return math.sqrt(sum(squares) / degrees) if degrees else math.nan

    @property
    def caution(self) -> str:
        """A note for tasks with another score than the mean of samples or questions; empty for these."""
        if not self.score.unit or facts_of(self.aggregation).captions:
            return ""
        return (
            f"Wins, losses and the sign test are about single questions; {self.score.unit} adds them up differently "
            f"({self.aggregation})."
        )


def paired_folders(runs_a: Sequence[Path], runs_b: Sequence[Path]) -> list[tuple[list[Path], list[Path]]]:
    """The views that all runs have (same task, protocol, image mode and documents), or the given folders themselves."""
    everything = [*runs_a, *runs_b]
    missing = [str(run) for run in everything if not run.exists()]
    if missing:
        raise EvalError(f"There is no {missing[0]!r}. Give two run folders, or two folders TASK@PROTOCOL/MODE.")
    if all(run.is_file() or any([*run.glob(SAMPLES), *run.glob(f"*/{SAMPLES}")]) for run in everything):
        return [_alike(runs_a, runs_b)]
    views_of_runs = [
        {folder_of(path.parent): path.parent for path in run.glob(f"*/*/*/{SAMPLES}")} for run in everything
    ]
    shared = sorted(set.intersection(*(set(views) for views in views_of_runs)))
    if not shared:
        named = ", ".join(str(run) for run in everything)
        tasks = [{name.rpartition("/")[0] for name in views} for views in views_of_runs]
        same = sorted(set.intersection(*tasks))
        if same:
            raise EvalError(
                f"{named} all have {same[0]}, but on different documents. Evaluate them on the same data and limit."
            )
        raise EvalError(
            f"{named} have no scored task in common. Give two run folders, or two folders TASK@PROTOCOL/MODE."
        )
    sides = [[views[name] for views in views_of_runs] for name in shared]
    return [(side[: len(runs_a)], side[len(runs_a) :]) for side in sides]


def _alike(a: Sequence[Path], b: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The views of the same documents in all folders; if there are none, the default view of each folder."""
    folders = [*a, *b]
    below = [{path.parent.name for path in folder.glob(f"*/{SAMPLES}")} for folder in folders]
    shared = set.intersection(*below) if below else set()
    if shared:
        largest = find_view(folders[0]).name
        name = largest if largest in shared else sorted(shared)[0]
        return [folder / name for folder in a], [folder / name for folder in b]
    views = [find_view(folder) if folder.is_dir() else folder for folder in folders]
    return views[: len(a)], views[len(a) :]


def compare(runs_a: Path | Sequence[Path], runs_b: Path | Sequence[Path]) -> PairedComparison:
    """Compare the samples of task folders (of two systems, or of two image modes of one run).

    Several folders of one system are its seeds: every sample counts with its mean over them.
    """
    systems = [[runs] if isinstance(runs, Path) else list(runs) for runs in (runs_a, runs_b)]
    views_a, views_b = _alike(*systems)
    views = [*views_a, *views_b]
    a, b = ([_by_id(view) for view in side] for side in (views_a, views_b))
    first = a[0]
    for view, rows in zip(views, [*a, *b], strict=True):
        _check_same(views[0], first, view, rows)
        _check_rules(views[0], view)
        if _judged(rows) != _judged(first):
            raise EvalError(
                f"Only one of {views[0]} and {view} was graded by a judge, so they are not comparable. Score both with "
                "--judge, or both without."
            )
    aggregation = _described(views[0]).get("task", {}).get("aggregation", "mean")
    grids = [[[nats_of(rows[name]) for name in first] for rows in side] for side in (a, b)]
    documents = _documents(views[0], first)
    sides = [[[scored_row(rows[name], documents[name]) for name in documents] for rows in side] for side in (a, b)]
    score = difference_of_scores(aggregation, *sides)
    units = dict(zip(documents, units_of(aggregation, sides[0][0]), strict=True))
    shown = [_worst(side[0], units) for side in (a, b)]
    return PairedComparison(
        task=_named(views[0]),
        aggregation=aggregation,
        score=score,
        nats=likelihood_difference(grids[0], grids[1], [row["cluster"] for row in first.values()]),
        samples=tuple((shown[0][name], shown[1][name]) for name in score.changed),
        remarks=tuple(text for name, side in zip("AB", sides, strict=True) if (text := _unread(name, side))),
    )


def _unread(name: str, seeds: Sequence[Sequence[Scored]]) -> str:
    given = [sample for samples in seeds for sample in with_scores(samples) if not sample.failed]
    text = unread_text(sum(not sample.parsed.strip() for sample in given), len(given))
    return f"{name}: {text}." if text else ""


def _judged(rows: dict[str, dict[str, Any]]) -> bool:
    return any(row.get("judged") for row in rows.values())


def _documents(source: Path, rows: dict[str, dict[str, Any]]) -> dict[str, Document]:
    """The documents of a view; of a file of samples without its view, what the samples hold of them."""
    view = source if source.is_dir() else source.parent
    if (view / DOCUMENTS).is_file():
        return {row["id"]: Document.from_dict(row) for row in documents_of(view) if row["id"] in rows}
    parts = ("id", "question", "options", "category")
    return {
        name: Document(**{part: row[part] for part in parts}, answers=tuple(row["answers"]))
        for name, row in rows.items()
    }


def _worst(rows: dict[str, dict[str, Any]], units: dict[str, str]) -> dict[str, dict[str, Any]]:
    """A row for each question (see `units_of`), one with the lowest score."""
    questions: dict[str, dict[str, Any]] = {}
    for name in units:
        row, unit = rows[name], units[name]
        if unit not in questions or (row["score"] or 0.0) < (questions[unit]["score"] or 0.0):
            questions[unit] = row
    return questions


def _described(source: Path) -> dict[str, Any]:
    view = source if source.is_dir() else source.parent
    return read_view(view) if (view / TASK).is_file() else {}


def _named(source: Path) -> str:
    """NAME@PROTOCOL, with the selection if it is not the whole data set."""
    described = _described(source)
    if not described:
        return source.parent.name
    selection = described.get("selection", {})
    part = f", {selection['name']} of {selection['of']}" if selection.get("name", "all") != "all" else ""
    return f"{described['task']['name']}@{described['task']['protocol']}{part}"


def _by_id(source: Path) -> dict[str, dict[str, Any]]:
    rows = {row["id"]: row for row in read_samples(source)}
    if all(row["score"] is None for row in rows.values()):
        raise EvalError(f"{source} is unscored, so there is nothing to compare; score it with a judge first.")
    return rows


def _check_same(view_a: Path, a: dict[str, dict[str, Any]], view_b: Path, b: dict[str, dict[str, Any]]) -> None:
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise EvalError(
            f"{view_a} and {view_b} hold different documents: {len(odd)} are in one only (first: {odd[0]!r}). "
            "Evaluate both on the same data and limit."
        )
    if any((row["question"], row["answers"]) != (b[name]["question"], b[name]["answers"]) for name, row in a.items()):
        raise EvalError(f"{view_a} and {view_b} use the same ids for different questions; they are not comparable.")


def _check_rules(view_a: Path, view_b: Path) -> None:
    a, b = (_described(view).get("task") for view in (view_a, view_b))
    if not a or not b:
        return
    rules = ("version", *RULES, "grading")
    odd = [f"{rule} {a.get(rule)!r} and {b.get(rule)!r}" for rule in rules if a.get(rule) != b.get(rule)]
    if odd:
        raise EvalError(
            f"{view_a} and {view_b} were scored by different rules: {', '.join(odd)}. Score both by one protocol, "
            "with mm-moslora eval score."
        )
