"""From answers to scores: named extractors, metrics and aggregations. Needs no model and no torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mm_moslora.errors import EvalError, suggestion

from . import statistics
from .documents import Document
from .metrics import commonsense, documents, exact, mathvista, mcq, mmmu, vqa, yesno

if TYPE_CHECKING:
    from .task import Task

Extractor = Callable[[str, Document], str]
Metric = Callable[[str, Document], float]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One document with its answer read and scored."""

    document: Document
    text: str
    parsed: str
    """What the extraction read; empty: not inferable."""
    score: float
    failed: bool = False
    """No answer: the sample could not be asked or the model failed on it. It scores 0."""
    cluster: Hashable = None
    """What samples that go together share: their image."""
    numbers: tuple[float, ...] = ()
    """Further numbers of a judge, for the aggregation."""


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """The numbers of a set of scored samples."""

    score: float
    stderr: float
    low: float
    high: float
    """95 % interval."""
    stderr_kind: str
    """analytic, clustered or bootstrap."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further numbers, by name."""


def _letter(extract: Callable[[str, mcq.Options], str]) -> Extractor:
    return lambda text, document: extract(text, document.options)


def _mmmu_mixed(extract: Callable[[str, mcq.Options], str]) -> Extractor:
    return lambda text, document: extract(text, document.options) if document.options else text


def _mathvista_question(document: Document) -> mathvista.Question:
    extra = document.extra
    precision = extra.get("precision")
    return mathvista.Question(
        question_type=extra.get("question_type", "multi_choice" if document.options else "free_form"),
        answer_type=extra.get("answer_type", "text"),
        choices=tuple(document.options.values()),
        precision=float(precision) if precision else None,
    )


def _mathvista(text: str, document: Document) -> str:
    question = _mathvista_question(document)
    return mathvista.normalize(mathvista.extract_without_judge(text, question), question) or ""


def _commonsense(dataset: str) -> Extractor:
    return lambda text, _: commonsense.extract_answer(text, dataset)


EXTRACTORS: dict[str, Extractor] = {
    "text": lambda text, _: text.strip(),
    "first_line": lambda text, _: text.strip().split("\n")[0].strip(),
    "letter": _letter(mcq.extract_letter),
    "letter_or_text": lambda text, document: (
        mcq.extract_letter(text, document.options) if document.options else text.strip()
    ),
    "letter_vlmevalkit": _letter(mcq.vlmevalkit),
    "letter_vlmevalkit_2024_06": _letter(mcq.vlmevalkit_2024_06),
    "letter_lmms_eval": _letter(mcq.lmms_eval),
    "letter_lmms_eval_mmbench": _letter(mcq.lmms_eval_mmbench),
    "letter_scienceqa_llava": _letter(mcq.scienceqa_llava),
    "letter_ai2d_lmms_eval": lambda text, _: mcq.ai2d_filter(text.strip()),
    "letter_first_character": lambda text, _: mcq.seedbench_lmms_eval(text),
    "mmmu_official": _mmmu_mixed(mcq.mmmu_official),
    "mmmu_lmms_eval": _mmmu_mixed(mcq.mmmu_lmms_eval),
    "mathvista": _mathvista,
    "yes_no": lambda text, _: yesno.extract_yes_no(text),
    "yes_no_vlmevalkit": lambda text, _: yesno.vlmevalkit(text),
    "yes_no_mme_lmms_eval": lambda text, _: yesno.mme_lmms_eval(text),
    "yes_no_pope_llava": lambda text, _: yesno.pope_llava(text),
    "yes_no_pope_lmms_eval": lambda text, _: yesno.pope_lmms_eval(text),
    **{f"commonsense_{name.lower().replace('-', '_')}": _commonsense(name) for name in commonsense.DATASETS},
}
"""Name -> what is read from an answer; an empty string means that nothing can be inferred."""


def _best(metric: Callable[[str, str], float]) -> Metric:
    return lambda parsed, document: exact.best(metric, parsed, document.answers)


def _all(metric: Callable[[str, Sequence[str]], float]) -> Metric:
    return lambda parsed, document: metric(parsed, document.answers)


def _mmmu_score(parsed: str, document: Document) -> float:
    if document.options:
        return float(parsed in document.answers)
    return float(mmmu.open_correct(mmmu.parse_open(parsed), document.answers))


def _mathvista_score(parsed: str, document: Document) -> float:
    # References of multiple-choice questions are letters; MathVista compares the choices' texts.
    gold = [document.options.get(answer, answer) for answer in document.answers]
    return float(any(mathvista.equal(parsed, answer) for answer in gold))


METRICS: dict[str, Metric] = {
    "exact": _best(exact.exact_match),
    "equal": lambda parsed, document: float(parsed in document.answers),
    "equal_ignore_case": _best(lambda parsed, answer: float(parsed.lower() == answer.strip().lower().rstrip("."))),
    "gqa_llava": _best(exact.gqa_llava),
    "gqa_lmms_eval": _best(exact.gqa_lmms_eval),
    "gqa_vlmevalkit": _best(exact.gqa_vlmevalkit),
    "realworldqa_lmms_eval": _best(exact.realworldqa_lmms_eval),
    "scienceqa_lmms_eval": _best(mcq.scienceqa_lmms_eval),
    "ai2d_lmms_eval": _best(mcq.ai2d_lmms_eval),
    "vqa": _all(vqa.soft_accuracy),
    "letter_or_vqa": lambda parsed, document: (
        float(parsed in document.answers) if document.options else vqa.soft_accuracy(parsed, document.answers)
    ),
    "letter_or_exact": lambda parsed, document: (
        float(parsed in document.answers)
        if document.options
        else exact.best(exact.exact_match, parsed, document.answers)
    ),
    "vqa_textvqa": _all(vqa.textvqa),
    "vqa_vlmevalkit": _all(vqa.vlmevalkit),
    "vqa_vqav2_official": _all(vqa.vqav2_official),
    "vqa_vqav2_lmms_eval": _all(vqa.vqav2_lmms_eval),
    "vqa_vizwiz_official": _all(vqa.vizwiz_official),
    "anls": _all(documents.anls),
    "relaxed": _best(documents.relaxed_accuracy),
    "relaxed_lmms_eval": _best(documents.relaxed_lmms_eval),
    "relaxed_vlmevalkit_2024_06": _best(documents.relaxed_vlmevalkit_2024_06),
    "ocrbench": lambda parsed, document: float(documents.ocrbench(parsed, document.answers, document.category or "")),
    "mmmu": _mmmu_score,
    "mathvista": _mathvista_score,
}
"""Name -> score of a parsed answer, 0 to 1."""


JUDGED = ("judge_mmvet", "judge_llavabench")
"""Metrics that only a judge can compute; without one a task is unscored."""


def check_names(task: Task) -> None:
    """Refuse a task that names an extractor, metric or aggregation that does not exist."""
    from .aggregation import AGGREGATIONS

    tables: tuple[tuple[str, str, dict], ...] = (
        ("extraction", task.extraction, EXTRACTORS),
        ("metric", task.metric, {**METRICS, **dict.fromkeys(JUDGED)}),
        ("aggregation", task.aggregation, AGGREGATIONS),
    )
    for kind, name, table in tables:
        if name not in table:
            raise EvalError(
                f"Task {task.name!r}: {kind} {name!r} is not known.{suggestion(name, table)} Known: {', '.join(table)}."
            )


def score_answer(task: Task, document: Document, text: str | None, *, cluster: Hashable) -> Scored:
    """Read and score one answer; None is an answer that never came.

    Raises:
        EvalError: the document has no reference.
    """
    if not document.answers and document.problem is None:
        raise EvalError(f"Document {document.id!r} of {task.id} has no reference answer and cannot be scored.")
    if text is None:
        return Scored(document=document, text="", parsed="", score=0.0, failed=True, cluster=cluster)
    parsed = EXTRACTORS[task.extraction](text, document)
    # An answer that cannot be read is wrong, whatever a metric makes of an empty string.
    score = METRICS[task.metric](parsed, document) if parsed.strip() else 0.0
    assert 0.0 <= score <= 1.0, (task.id, document.id, score)
    return Scored(document=document, text=text, parsed=parsed, score=score, cluster=cluster)


def mean_with_error(samples: Sequence[Scored]) -> Aggregate:
    """Mean score; the error is clustered by image where several samples share one.

    Right/wrong scores without clusters get Wilson's interval, which behaves near 0 and 1.
    """
    scores = [sample.score for sample in samples]
    centre = statistics.mean(scores)
    clusters = [sample.cluster for sample in samples]
    if len(set(clusters)) < len(clusters):
        stderr, kind = statistics.clustered_stderr(scores, clusters), "clustered"
    else:
        stderr, kind = statistics.mean_stderr(scores), "analytic"
    if kind == "analytic" and set(scores) <= {0.0, 1.0}:
        low, high = statistics.wilson_interval(sum(scores), len(scores))
    else:
        low, high = statistics.normal_interval(centre, stderr)
    return Aggregate(score=centre, stderr=stderr, low=max(0.0, low), high=min(1.0, high), stderr_kind=kind)
