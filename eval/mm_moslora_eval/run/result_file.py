"""Scores a run folder: answers to `samples.jsonl` and `results.json`. Needs no model, no data set, no torch."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from mm_moslora.utils.errors import ConfigError, EvalError, MissingRequirementError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import make_subfolder, replace_text
from mm_moslora.utils.untrusted_data import build_known, build_strictly
from mm_moslora.utils.untrusted_files import read_text
from mm_moslora_eval.backends.endpoints.parallel_calls import Prices
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.answer_log import read_folder
from mm_moslora_eval.run.judging.judged_scores import GRADED, graded_text, judgement
from mm_moslora_eval.run.request_preparation import FORMAT
from mm_moslora_eval.run.run_records import environment
from mm_moslora_eval.run.scored_subsets import (
    DOCUMENTS,
    RESCORED,
    TASK,
    documents_of,
    find_view,
    folder_of,
    has_scores,
    last_line,
    read_json,
    read_view,
    write_samples,
)
from mm_moslora_eval.run.stored_types import MAY_BE_NULL, check_result
from mm_moslora_eval.scoring.answer_scoring import PLACES, is_judged, score_answer
from mm_moslora_eval.scoring.measured_scores import (
    aggregate,
    by_category,
    mean_likelihood,
    reason_without,
    whole_questions,
)
from mm_moslora_eval.scoring.score_aggregation import AggregationError, NoScoreError, check_ids, combined, facts_of
from mm_moslora_eval.scoring.score_remarks import (
    answers_alike,
    disagreement,
    failures,
    parted,
    thinking,
    ungraded,
    wordy,
)
from mm_moslora_eval.scoring.scored_sample import Markers, Scored, with_scores
from mm_moslora_eval.scoring.task_result import Counts, TaskResult, strict_json, variant_of
from mm_moslora_eval.sources.document import Document

if TYPE_CHECKING:
    from mm_moslora_eval.run.judging.llm_judge import Judge

logger = logging.getLogger(__name__)


def result_from_dict(data: dict[str, Any]) -> TaskResult:
    """The inverse of `TaskResult.to_dict`."""
    check_result(data, get_type_hints(TaskResult) | {"counts": Any})
    counts = build_known(Counts, data["counts"], source="its counts")
    numbers = {name: float("nan" if data[name] is None else data[name]) for name in ("score", "stderr", "low", "high")}
    about = {key: item for key, item in data.get("about", {}).items() if item is not None or key in MAY_BE_NULL}
    remarks = tuple(data.get("remarks", ()))
    return TaskResult(**{**data, **numbers, "counts": counts, "about": about, "remarks": remarks})


def score_folder(
    folder: Path, *, rules: Task | None = None, judge: Judge | None = None, partial: bool = False
) -> TaskResult:
    """Score the answers of one view and write its `samples.jsonl`.

    A task that needs a judge stays unscored without one or if the judge fails. Then its score is nan,
    `about["unscored"]` is the reason, and a submission file is written to the samples' folder.
    """
    view = find_view(folder)
    described, task = _asked_task(view)
    rows = documents_of(view)
    given = _given(view, rows, partial=partial)
    if rules is not None:
        view, task = _with_rules(view, described, task, rules)
    in_order = [next((one for one in several if one["error"]), several[0]) for several in given]
    about = {key: described[key] for key in ABOUT if key in described}
    about |= _spent(list(itertools.chain(*given)), described.get("prices"))
    times = (str(answer["time"]) for several in given for answer in several if answer.get("time"))
    about["date"] = max(times, default=None)
    documents = [Document.from_dict(row) for row in rows]
    check_ids(task.aggregation, documents)
    asked = [
        _Asked(document, _boxes(answer, task) if task.extraction in PLACES else answer["text"], row["cluster"])
        for document, row, several in zip(documents, rows, given, strict=True)
        for answer in several
    ]
    markers = task.thinking.all_markers(described.get("thinking_markers", ()))
    each, reason = _scored(task, asked, judge, markers=markers, view=view, about=about)
    ends = list(itertools.accumulate(map(len, given), initial=0))
    repeated = [each[start:end] for start, end in itertools.pairwise(ends)]
    scored = [combined(several, over_samples=task.over_samples) for several in repeated]
    settled: dict[str, Any] = {
        "mode": described["mode"], "folder": folder_of(view),
        "truncated": sum(any(answer["finish_reason"] == "length" for answer in several) for several in given),
        "errors": [last_line(answer["error"]) for answer in in_order],
        "likelihood": _likelihood(task, rows, in_order, thinks=bool(described.get("asked_to_think"))),
    }  # fmt: skip
    if reason is None or not has_scores(view):  # without new scores, those of an earlier judge are kept
        write_samples(view, rows, in_order, scored, repeated=repeated)
    if reason is None:
        return summarise(task, scored, about=about, each=each, **settled)
    from mm_moslora_eval.run.submissions import keep_submission

    about["unscored"] = f"{reason.text} {keep_submission(view, task.name)}"
    about |= {"judge_failed": True} if reason.failed else {}
    return unscored(task, scored, about=about, each=each, **settled)


def _asked_task(view: Path) -> tuple[dict[str, Any], Task]:
    """The description of a view and the task in it."""
    stored_format = read_json(view / TASK).get("format")
    if stored_format != FORMAT:
        raise EvalError(
            f"{view} has format {stored_format!r}, this version reads {FORMAT}; score it with the version that wrote "
            "it."
        )
    described = read_view(view)
    return described, build_strictly(Task, described["task"], source=str(view / TASK))


def _given(view: Path, rows: Sequence[dict[str, Any]], *, partial: bool) -> list[list[dict[str, Any]]]:
    """The stored answers to each document; with `partial` some may be missing."""
    answers = read_folder(view.parent)
    keys = [(row["key"], *row.get("more_keys", ())) for row in rows]
    missing = [row["id"] for row, own in zip(rows, keys, strict=True) if any(key not in answers for key in own)]
    if missing and not (partial and len(missing) < len(rows)):
        raise EvalError(
            f"{view}: {len(missing)} of {len(rows)} documents have no answer yet (first: {missing[0]!r}); "
            "run the same evaluation again to continue, or score what is there: mm-moslora eval score RUN --partial."
        )
    return [[answers.get(key, _UNASKED) for key in own] for own in keys]


_UNASKED = dict.fromkeys(("text", "finish_reason", "options", "seconds")) | {"tokens": 0, "error": "not asked yet"}


def _spent(answers: Sequence[dict[str, Any]], prices: Mapping[str, Any] | None) -> dict[str, Any]:
    """The tokens of answers of a service that counts them, and their cost at the prices of the run."""
    counted = [answer for answer in answers if answer.get("prompt_tokens") is not None]
    if not counted:
        return {}
    tokens: dict[str, Any] = {
        "prompt": sum(answer["prompt_tokens"] for answer in counted),
        "completion": sum(answer["tokens"] or 0 for answer in counted),
    }
    if prices is not None:
        known = build_known(Prices, prices, source="prices")
        tokens |= {"cost": known.cost(prompt=tokens["prompt"], completion=tokens["completion"])}
        tokens |= {"prices": known.to_dict()}
    return {"tokens": tokens}


def _likelihood(
    task: Task, rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], *, thinks: bool
) -> dict[str, Any]:
    if likelihood := mean_likelihood(answers, [row["cluster"] for row in rows]):
        return likelihood
    referenced = any(row["answers"] for row in rows)
    return {"none": reason_without(referenced=referenced, judged=is_judged(task.metric), thinks=thinks)}


ABOUT = (
    "model", "seed", "data", "selection", "first_prompt", "computed_by", "asked_as", "asked_to_think",
    "thinking_markers", "video", "video_frames",
)  # fmt: skip


def _with_rules(view: Path, described: dict[str, Any], task: Task, rules: Task) -> tuple[Path, Task]:
    """A view of the same answers under another protocol's rules; prompt and decoding stay the original ones."""
    rescored = replace(
        task, protocol=rules.protocol, version=rules.version, extraction=rules.extraction, metric=rules.metric,
        grading=rules.grading, aggregation=rules.aggregation, over_samples=rules.over_samples,
        thinking=rules.thinking, published=rules.published, notes=rules.notes, differences=rules.differences,
    )  # fmt: skip
    described |= {"task": rescored.to_dict()}
    source, name = view, view.name.removesuffix(variant_of(task.to_dict()))
    if rules.protocol != task.protocol:
        described |= {"asked_as": described.get("asked_as", task.protocol)}
        name = f"{name.partition(RESCORED)[0]}{RESCORED}{rules.protocol}"
    view = view.with_name(f"{name}{variant_of(rescored.to_dict())}")
    if view != source:
        make_subfolder(view)
        replace_text(view / DOCUMENTS, read_text(source / DOCUMENTS))
    if rules.grading is not None and (graded := graded_text(rules)):
        replace_text(view / GRADED, graded)
    replace_text(view / TASK, json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    return view, rescored


def _boxes(answer: dict[str, Any], task: Task) -> str | None:
    """The boxes of an answer as text, in pixels of the file; None for a missing answer."""
    if answer["text"] is not None and answer.get("boxes") is None:
        raise EvalError(
            f"{task.id} scores boxes, and its answers were stored without: their backend reads none, or another "
            "extraction was asked for. Evaluate a run, an export or hf:ID into a new folder."
        )
    return None if answer["text"] is None else json.dumps(answer["boxes"])


@dataclass(frozen=True)
class _Unscored:
    """The reason for a missing score."""

    text: str
    failed: bool = False
    """The judge failed."""


@dataclass(frozen=True)
class _Asked:
    """An answer to a document; None where it is missing."""

    document: Document
    text: str | None
    cluster: str


def _scored(
    task: Task, answers: Sequence[_Asked], judge: Judge | None, *, markers: tuple[Markers, ...], view: Path,
    about: dict[str, Any],
) -> tuple[list[Scored], _Unscored | None]:  # fmt: skip
    """Answers with their scores, or the reason for missing scores; `about` gets what is known of the judge."""
    plain = [
        Scored(
            document=one.document, text=one.text or "", parsed=one.text or "", score=math.nan, failed=one.text is None,
            cluster=one.cluster, markers=markers,
        )
        for one in answers
    ]  # fmt: skip
    if all(not one.document.answers for one in answers) and not is_judged(task.metric):
        return plain, _Unscored("The data holds no reference answers.")
    if judge is not None or is_judged(task.metric):
        outcome = judgement(judge, task, plain, view=view)
        about |= outcome.about
        if outcome.samples is not None:
            return outcome.samples, None
        if outcome.problem:  # other tasks are still asked and scored
            return plain, _Unscored(outcome.problem, failed=outcome.failed)
    rules = {"extraction": task.extraction, "metric": task.metric}
    return [
        score_answer(one.document, one.text, cluster=one.cluster, markers=markers, **rules) for one in answers
    ], None


_PROTOCOL = (
    "title", "prompt", "decoding", "extraction", "metric", "grading", "aggregation", "expected_count", "licence",
    "unverified", "published", "notes", "differences",
)  # fmt: skip
"""Parts of a task that a result repeats."""
_SOMETIMES = ("over_samples", "thinking", "changed")
"""Those that few tasks have."""


def unscored(
    task: Task, samples: Sequence[Scored], *, mode: str, about: dict[str, Any], truncated: int = 0, folder: str = "",
    errors: Sequence[str | None] = (), likelihood: dict[str, Any] | None = None,
    each: Sequence[Scored] | None = None,
) -> TaskResult:  # fmt: skip
    """The result of a task that has answers but no score. See `summarise`."""
    failed = sum(sample.failed for sample in samples)
    nan, parts = math.nan, strict_json(task.to_dict())
    described = (
        {name: parts[name] for name in (*_PROTOCOL, *_SOMETIMES) if name in parts}
        | ({"code": task.code} if task.code else {})
        | ({"unit": name} if (name := facts_of(task.aggregation).score) else {})
        | about
    )
    return TaskResult(
        task=task.name, protocol=task.protocol, version=task.version, mode=mode, n=len(samples), score=nan, stderr=nan,
        low=nan, high=nan, stderr_kind="none",
        counts=Counts(
            total=len(samples), scored=0, failed=failed, not_inferable=0, truncated=truncated,
            dropped=about.get("data", {}).get("dropped", 0), **_thinking(each or samples),
        ),
        completed={"n": len(samples) - failed}, about=described, folder=folder, likelihood=likelihood or {},
        remarks=(*_asked(task, about), *failures(errors), *thinking(each or samples)),
    )  # fmt: skip


def _thinking(samples: Sequence[Scored]) -> dict[str, int]:
    """The documents of which an answer thinks, and of which one does not end."""
    answers = [(sample.document.id, sample.visible) for sample in samples]
    return {
        "thinking": len({name for name, answer in answers if answer.thought}),
        "unclosed_thinking": len({name for name, answer in answers if answer.unclosed}),
    }


def summarise(
    task: Task, scored: Sequence[Scored], *, mode: str, about: dict[str, Any], truncated: int = 0, folder: str = "",
    errors: Sequence[str | None] = (), likelihood: dict[str, Any] | None = None,
    each: Sequence[Scored] | None = None,
) -> TaskResult:  # fmt: skip
    """Aggregate scored samples; fails unless every document of the data is scored exactly once."""
    assert len({sample.document.id for sample in scored}) == len(scored), "every document is scored exactly once"
    result = unscored(
        task, scored, mode=mode, about=about, truncated=truncated, folder=folder, errors=errors, likelihood=likelihood,
        each=each,
    )  # fmt: skip
    graded = with_scores(scored)
    done = [sample for sample in graded if not sample.failed]
    given = done if each is None else [one for one in with_scores(each) if not one.failed]
    counts = replace(
        result.counts, scored=len(done), not_inferable=sum(not sample.parsed.strip() for sample in done),
        ungraded=len(scored) - len(graded), faults=sum(bool(sample.fault) for sample in scored), **_thinking(given),
    )  # fmt: skip
    remarks = (*_asked(task, about), *failures(errors), *thinking(given), *disagreement(about.get("judge", {})))
    result = replace(result, counts=counts, remarks=remarks)
    missing = [sample.fault for sample in scored if sample.fault.startswith(MissingRequirementError.__name__)]
    if missing:  # a score over the other answers would pass for that of the benchmark
        needed = missing[0].partition(": ")[2]
        result = _with_remarks(result, ungraded(scored))
        return _without_score(result, f"{len(missing)} answers need what is not here. {needed}", rules_failed=True)
    if not graded:
        result = _with_remarks(result, ungraded(scored))
        return _without_score(result, f"The rules of {task.id} failed on every answer; mend them and score again.")
    try:
        whole = whole_questions(task.aggregation, scored)
        counts = replace(counts, left_out=len(graded) - len(whole))
        result = _with_remarks(replace(result, counts=counts), ungraded(scored, left_out=counts.left_out))
        result = _with_remarks(result, parted(task.aggregation, whole, about.get("selection", {})))
        if not whole:
            reason = "No question has a score of each of its answers; score again when they have one."
            return _without_score(result, reason)
        result = _with_score(result, task.aggregation, whole, scored)
    except AggregationError as error:
        return _without_score(result, str(error), rules_failed=True)
    if folder:
        alike = (*answers_alike(given), *(wordy(given) if not is_judged(task.metric) else ()))
        result = _with_remarks(result, alike)
    return result


def _with_remarks(result: TaskResult, remarks: Iterable[str]) -> TaskResult:
    return replace(result, remarks=(*result.remarks, *remarks))


def _without_score(result: TaskResult, reason: str, *, rules_failed: bool = False) -> TaskResult:
    about = result.about | {"unscored": reason} | ({"rules_failed": True} if rules_failed else {})
    return replace(result, about=about)


def _with_score(result: TaskResult, aggregation: str, whole: Sequence[Scored], scored: Sequence[Scored]) -> TaskResult:
    """A result with the score over whole questions, over those that were answered, and by category."""
    headline = aggregate(aggregation, whole)
    answered = whole_questions(aggregation, [replace(one, score=math.nan) if one.failed else one for one in scored])
    completed: dict[str, float] = {"n": len(answered)}
    if answered:
        with suppress(NoScoreError):  # only questions that failed have a part of the score
            found = headline if len(answered) == len(whole) else aggregate(aggregation, answered)
            completed |= {"score": found.value, "stderr": found.stderr}
    try:
        categories = by_category(aggregation, whole)
    except AggregationError as error:
        categories = {}
        result = _with_remarks(result, [f"No score of a category: {error}"])
    return replace(
        result, score=headline.value, stderr=headline.stderr, low=headline.low, high=headline.high,
        stderr_kind=headline.stderr_kind, clusters=headline.clusters, groups=headline.groups,
        completed=completed, metrics=dict(headline.metrics),
        categories={
            name: {"n": part.n, "score": part.value, "stderr": part.stderr, "low": part.low, "high": part.high}
            for name, part in categories.items()
        },
    )  # fmt: skip


def _asked(task: Task, about: dict[str, Any]) -> Iterator[str]:
    if task.source.kind != "hf" and about.get("data", {}).get("pictures") == 0:
        yield "No question has a picture: check the names of the columns if the data have some"
    if about.get("asked_to_think"):
        yield (
            f"The model is asked to think before it answers, in at most {task.decoding.max_new_tokens} new tokens "
            "(--max-new-tokens). Nats are those of the reference behind the thinking that the model wrote"
        )


def read_results(folder: Path) -> list[TaskResult]:
    """The results of a run so far; an empty list if there are none.

    A damaged entry is left out with a warning, since the others, or answers that took hours, must not wait for it.
    """
    path = folder / "results.json"
    if not path.is_file():
        return []
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise EvalError(
            f"{path} has format {data.get('format')!r}, this version reads {FORMAT}; choose another folder."
        )
    results = []
    entries = data.get("results")
    for number, item in enumerate(entries if isinstance(entries, list) else [entries]):
        try:
            results.append(result_from_dict(item))
        except (ConfigError, KeyError, TypeError) as error:
            logger.warning("%s: entry %d is damaged (%s); score its task again.", path, number, error)
    return results


def _alone(folder: Path) -> AbstractContextManager[object]:
    """Hold the run's results, which another process may score, too; nothing is held where locks cannot be had."""
    try:
        return lock_file(folder / ".results.lock", wait=True)
    except (OSError, ConfigError):
        return nullcontext()


def write_results(folder: Path, results: Sequence[TaskResult]) -> list[TaskResult]:
    """Merge results into the run's `results.json` (atomically).

    A result replaces an older one with the same key (task, protocol, image mode, documents, number of answers and what
    sums them up), unless the older one is more complete: it has a score and the new one has none, or fewer of its
    samples failed.
    """
    if not results:
        return []
    with _alone(folder):
        merged = {result.key: result for result in read_results(folder)}
        behind = [
            result
            for result in results
            if (older := merged.get(result.key)) is not None
            and ((older.scored and not result.scored) or result.counts.incomplete > older.counts.incomplete)
        ]
        merged |= {result.key: result for result in results if result not in behind}
        data = {
            "format": FORMAT,
            "scored": {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "environment": environment()},
            "results": [result.to_dict() for result in merged.values()],
        }
        replace_text(folder / "results.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    return behind
