"""Writes the scores and samples of an evaluation into the evaluated training run and its trackers.

The evaluation folder keeps every answer. The run folder gets `evaluation.json`, and `samples.json` with small copies of
the pictures (see `mm_moslora.reporting.run_data`). Each tracker of its recipe gets the scores under the adapter's
digest.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.reporting.verdicts import Difference, difference_of
from mm_moslora.utils import files
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import make_subfolder, replace_json, replacing, set_aside
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora.utils.untrusted_data import build_known
from mm_moslora_eval.run.result_file import ABOUT, summarise
from mm_moslora_eval.run.sample_thumbnails import MOST_EVIDENCE, spread, stored_thumbnails
from mm_moslora_eval.run.scored_subsets import (
    SAMPLES,
    find_view,
    read_json,
    read_samples,
    read_scored,
    read_view,
    task_of,
)
from mm_moslora_eval.scoring.answer_scoring import JUDGED, score_leniently
from mm_moslora_eval.scoring.measured_scores import whole_questions
from mm_moslora_eval.scoring.score_aggregation import facts_of
from mm_moslora_eval.scoring.score_differences import difference_of_scores
from mm_moslora_eval.scoring.scored_sample import Scored, with_scores
from mm_moslora_eval.scoring.task_result import TaskResult

if TYPE_CHECKING:
    from mm_moslora.tracking.tracker import SampleAnswer

logger = logging.getLogger(__name__)

UNTUNED = "untuned"
"""Folder within an evaluation's folder for the answers of the model before tuning."""
LENIENT = "lenient"
"""Mode of a lenient result, in which an answer counts if it contains the right word."""
_MODES = {
    "own": ("tuned", "Tuned"), "wrong": ("wrong_image", "Tuned, wrong picture"),
    "blind": ("blind", "Tuned, blind (mean colour)"), "question_majority": ("best_answer", "Best answer per question"),
    "majority": ("majority", "Most frequent answer"),
}  # fmt: skip


def keep(model: Path, results: Sequence[TaskResult], output: Path, *, before: Sequence[TaskResult] = ()) -> None:
    """Write scores into the run to which they belong; does nothing for exports and for models of other projects."""
    from mm_moslora.utils.run_paths import MANIFEST, find_checkpoint

    if not model.is_dir() or not (find_checkpoint(model) / MANIFEST).is_file():
        return
    from mm_moslora.models.load_model import recipe_of
    from mm_moslora.tracking.tracker import adapter_digest

    checkpoint = find_checkpoint(model).resolve()
    run = checkpoint.parent
    newest = find_checkpoint(run) == checkpoint
    step = int(read_json(checkpoint / MANIFEST)["step"])
    weights = adapter_digest(checkpoint / "adapter") or f"step {step}"
    rows = [
        _row(named, step=step, model=weights)
        for named in _complete_subjects(list(_named_results(results, before, output)))
    ]
    try:
        with lock_file(run / ".evaluation.lock", wait=True):  # another evaluation of the run may write at the same time
            stored = _stored_rows(run / "evaluation.json")
            rows = _better(rows, stored)
            _name_metrics(rows, stored)
            if newest:  # reports show the last checkpoint
                _merge(run / "evaluation.json", stored, rows)
                subjects = {row["subject"] for row in rows}
                _keep_samples(run, [result for result in results if _subject(result) in subjects], output)
            if rows:
                samples = _sample_tables(run, {row["subject"] for row in rows}) if newest else {}
                _tell_trackers(run, recipe_of(checkpoint), rows, checkpoint / "adapter", step=step, samples=samples)
    except OSError as error:
        logger.warning("%s takes no scores (%s); they are in %s alone.", run, error.strerror, output)


def _subject(result: TaskResult) -> str:
    """An identifier of task, protocol and documents; only rows of the same subject are compared."""
    return sha256_of_values(list(result.subject))[:16]


@dataclass(frozen=True, kw_only=True)
class NamedResult:
    """A result under its name in the run's folder."""

    name: str
    label: str
    result: TaskResult
    less: Difference | None
    """The difference tuned model - this."""
    pictures: bool = True
    """Whether the questions have pictures."""


def _named_results(results: Sequence[TaskResult], before: Sequence[TaskResult], output: Path) -> Iterator[NamedResult]:
    for result in results:
        name, label = _MODES.get(result.mode, (result.mode, result.mode))
        less = difference_of(result.about.get("own_less_this"))
        pictures = True
        if result.folder and result.mode != "own":
            own = _own_samples(result, output)
            less = ahead_by(result, own, read_scored(output / result.folder)) if own and result.scored else None
        elif result.folder:
            pictures = any(row["images"] for row in read_samples(output / result.folder))
        yield NamedResult(name=name, label=label, result=result, less=less, pictures=pictures)
    for result in before:
        own = _own_samples(result, output)
        yield from before_tuning(result, output / UNTUNED / result.folder, own=own)


def before_tuning(
    result: TaskResult, view: Path, *, own: Sequence[Scored], label: str = "Before tuning"
) -> list[NamedResult]:
    """The scores of the model before tuning, strict and lenient."""
    if not result.scored:
        return []
    less = ahead_by(result, own, read_scored(view)) if own else None
    rows = [NamedResult(name="untuned", label=label, result=result, less=less)]
    if (rescored := lenient_result(view)) is not None:
        lenient, samples = rescored
        less = ahead_by(lenient, own, samples) if own else None
        rows.append(
            NamedResult(name="untuned_lenient", label=f"{label}, right word anywhere", result=lenient, less=less)
        )
    return rows


def lenient_result(folder: Path) -> tuple[TaskResult, list[Scored]] | None:
    """The lenient score of a view, in which every answer with the right word counts, and the samples.

    None if a judge reads the answers, or if the score is no sum of right answers, as for captions.
    """
    view = find_view(folder)
    task = task_of(view)
    if task is None or task.metric in JUDGED or facts_of(task.aggregation).reads_answers:
        return None
    described = read_view(view)
    samples = score_leniently(read_scored(view))
    about = {key: described[key] for key in ABOUT if key in described}
    whole = whole_questions(task.aggregation, samples)
    return (summarise(task, whole, mode=LENIENT, about=about), samples) if whole else None


def ahead_by(result: TaskResult, own: Sequence[Scored], other: Sequence[Scored]) -> Difference:
    """The difference tuned model - another system in the score of the result's task."""
    return difference_of_scores(_aggregation(result), [own], [other]).as_difference


def _aggregation(result: TaskResult) -> str:
    return str(result.about.get("aggregation", "mean"))


def _own_samples(result: TaskResult, output: Path) -> list[Scored]:
    """Samples of the tuned model with its own pictures on the documents of another result; empty if it has none."""
    task, _, view = result.folder.partition("/")
    own_view = output / task / "own" / view.partition("/")[2]
    if not (own_view / SAMPLES).is_file():
        return []
    samples = read_scored(own_view)
    return samples if with_scores(samples) else []


def row_of(named: NamedResult) -> dict[str, Any]:
    """A row of `evaluation.json`, without the details of the measurement."""
    result, unit = named.result, facts_of(_aggregation(named.result)).score
    categories = {
        category: {"n": int(part["n"]), "mean": part["score"], "low": part["low"], "high": part["high"]}
        for category, part in result.categories.items()
        if not unit and all(math.isfinite(part[key]) for key in ("score", "low", "high"))  # pages draw these as shares
    }
    return {
        "name": named.name, "label": named.label, "task": result.task, "n": result.n, "mean": result.score,
        "low": result.low, "high": result.high, "categories": categories,
        "not_inferable": result.counts.not_inferable, "failed": result.counts.failed, "remarks": list(result.remarks),
        "learned_from": result.about.get("learned_from", ""), "less": named.less.to_dict() if named.less else None,
        "pictures": named.pictures, "unit": unit,
    }  # fmt: skip


def _complete_subjects(results: Sequence[NamedResult]) -> list[NamedResult]:
    """The rows of subjects with a score in every row; conclusions from only some of the rows could differ."""
    odd: dict[str, TaskResult] = {}
    for item in results:
        numbers = (item.result.score, item.result.low, item.result.high)
        if not item.result.counts.scored or not all(map(math.isfinite, numbers)):
            odd.setdefault(_subject(item.result), item.result)
    for result in odd.values():
        remarks = result.about.get("unscored") or " ".join(result.remarks) or "there is no score"
        logger.warning("The run's folder gets no scores of %s@%s: %s.", result.task, result.protocol,
                       f"{result.mode}: {remarks}".rstrip("."))  # fmt: skip
    return [item for item in results if _subject(item.result) not in odd]


def _row(named: NamedResult, *, step: int, model: str) -> dict[str, Any]:
    """A row of `evaluation.json`."""
    result = named.result
    selection = result.about.get("selection", {})
    of_before = named.name.startswith(UNTUNED)
    return row_of(named) | {
        "step": step, "protocol": result.protocol, "subject": _subject(result),
        "data": result.about.get("data", {}).get("sha256", ""), "selection": selection.get("name", "all"),
        "model": model if result.folder and not of_before else None,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _StoredRow:
    """Types of the keys of a stored row or sample that decide on its place."""

    name: str = ""
    task: str = ""
    subject: str = ""
    model: str = ""
    metric: str = ""
    n: int = 0
    failed: int = 0


def _stored_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of earlier evaluations; a damaged file is renamed, because it may hold scores of other tasks."""
    try:
        rows = files.read_json(path, list)
    except FileNotFoundError:
        return []
    except ValueError as error:
        logger.warning("%s is damaged (%s) and is now %s.", path, error, set_aside(path, "corrupt").name)
        return []
    accepted = []
    for row in rows:
        try:
            build_known(_StoredRow, row, source="a row")
            accepted.append(row)
        except ConfigError as error:
            logger.warning("%s: a damaged row was left out (%s).", path, error)
    return accepted


def _better(rows: Sequence[dict[str, Any]], stored: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without subjects with more failed samples than the stored rows, which then stay unchanged."""
    failed = {(row.get("subject"), row.get("name")): row.get("failed") or 0 for row in stored}
    worse = {
        row["subject"]: row for row in rows if row["failed"] > failed.get((row["subject"], row["name"]), row["failed"])
    }
    for row in worse.values():
        logger.warning(
            "%s@%s: the run keeps its earlier scores, since %d of %d samples failed this time.",
            row["task"], row["protocol"], row["failed"], row["n"],
        )  # fmt: skip
    return [row for row in rows if row["subject"] not in worse]


def _name_metrics(rows: Sequence[dict[str, Any]], stored: Sequence[dict[str, Any]]) -> None:
    """Give every row its name for trackers: that of the task, unless another subject has it."""
    taken = {row["metric"]: row.get("subject") for row in stored if row.get("metric")}
    for row in rows:
        whole = row["selection"] == "all"
        name = row["task"] if whole else f"{row['task']}/{row['selection'].replace(' ', '-')}"
        if taken.get(name, row["subject"]) != row["subject"]:
            name = f"{name}/{row['protocol']}-{row['subject'][:8]}"
        taken[name] = row["subject"]
        row["metric"] = name


def _merge(path: Path, stored: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> None:
    """Replace older rows of the same subject and name by newer ones; tuned rows come first.

    Rows of another model than that of the newer rows lose their subject, so that scores of two steps are not compared.
    """
    models = {row["subject"]: row["model"] for row in rows if row["model"]}
    remaining = [row for row in stored if row.get("model") in (None, models.get(row.get("subject"), row.get("model")))]
    measured = {row.get("subject"): row.get("model") for row in stored if row.get("name") == "tuned"}
    others = {subject for subject, model in models.items() if measured.get(subject, model) != model}
    # Their differences are from a model that is no longer shown.
    remaining = [row | {"less": None} if row.get("subject") in others else row for row in remaining]
    merged = {(row.get("subject"), row.get("task"), row.get("name")): row for row in [*remaining, *rows]}
    modes = [name for name, _ in _MODES.values()]
    names = ["tuned", "untuned", "untuned_lenient", *modes, *(name for _, _, name in merged)]
    subjects = [key[:2] for key in merged]
    order = sorted(merged, key=lambda key: (subjects.index(key[:2]), names.index(key[2])))
    replace_json(path, [merged[key] for key in order])


def _keep_samples(run: Path, results: Sequence[TaskResult], output: Path) -> None:
    """Keep some evenly spread questions of every task, with the answers and copies of the pictures."""
    own = [result for result in results if result.mode == "own"]
    subjects = {_subject(result) for result in own}
    stored = [row for row in _stored_rows(run / "samples.json") if row.get("subject") not in subjects]
    rows: list[dict[str, Any]] = []
    for result in own:
        after = read_samples(output / result.folder)
        before = output / UNTUNED / result.folder
        old = {row["id"]: row for row in (read_samples(before) if (before / SAMPLES).is_file() else [])}
        share = max(1, MOST_EVIDENCE // len(own))
        graded = facts_of(_aggregation(result)).captions
        for row in spread(spread(after, MOST_EVIDENCE), share):
            earlier = old.get(row["id"], {})
            rows.append(
                {
                    "image": _copied(run, output, row, f"{_subject(result)}-{len(rows):02d}"),
                    "question": row["question"], "options": row["options"],
                    "answer": row["answers"][0] if row["answers"] else "", "before": earlier.get("text"),
                    "after": row["text"], "before_correct": _right(earlier.get("score"), graded=graded),
                    "after_correct": _right(row["score"], graded=graded), "task": result.task,
                    "subject": _subject(result), "n": result.n,
                }
            )  # fmt: skip
    if rows:  # the subject with the most documents comes first
        replace_json(run / "samples.json", sorted([*stored, *rows], key=lambda row: -int(row.get("n") or 0)))


def _right(score: float | None, *, graded: bool) -> bool | None:
    """None for a score that is not right or wrong, and for no score."""
    return score >= 0.5 if score is not None and not graded else None


def _copied(run: Path, output: Path, row: dict[str, Any], name: str) -> str | None:
    """A copy of the evaluation's thumbnail of a question's first picture."""
    thumbnails = stored_thumbnails(output, row)
    if not thumbnails:
        return None
    file_name, data = thumbnails[0]
    copy = run / "pictures" / f"{name}{Path(file_name).suffix}"
    make_subfolder(copy.parent)
    with replacing(copy) as part:
        part.write_bytes(data)
    return copy.relative_to(run).as_posix()


def _sample_tables(run: Path, subjects: set[str]) -> dict[str, list[SampleAnswer]]:
    """The kept samples of the subjects by task, as a tracker shows them."""
    from mm_moslora.tracking.tracker import SampleAnswer

    tables: dict[str, list[SampleAnswer]] = defaultdict(list)
    for row in _stored_rows(run / "samples.json"):
        if row.get("subject") in subjects:
            image = run / row["image"] if row.get("image") else None
            tables[row["task"]].append(
                SampleAnswer(
                    question=row["question"], expected=row["answer"], prediction=row["after"] or "",
                    correct=row["after_correct"], image=image,
                )
            )  # fmt: skip
    return tables


def _tell_trackers(
    run: Path, recipe: Any, rows: Sequence[dict[str, Any]], adapter: Path, *, step: int,
    samples: Mapping[str, Sequence[SampleAnswer]],
) -> None:  # fmt: skip
    from mm_moslora.tracking import build_trackers
    from mm_moslora.tracking.tracker import adapter_digest
    from mm_moslora.utils.run_paths import RUN_LOCK

    try:
        lock = lock_file(run / RUN_LOCK, wait=False)
    except BlockingIOError:
        logger.warning("%s still trains; its trackers get no scores until it is evaluated again.", run)
        return
    with lock:
        try:
            trackers = build_trackers(recipe.track)
        except ConfigError as error:  # a tracker that is not installed here
            logger.warning("Scores go to no tracker: %s", error)
            return
        trackers.reopen(recipe.to_dict(), run)
        trackers.log_evaluation(rows, adapter=adapter_digest(adapter), step=step)
        for task, answers in samples.items():
            trackers.log_samples(f"eval/samples/{task}", answers, step)
        trackers.finish()
