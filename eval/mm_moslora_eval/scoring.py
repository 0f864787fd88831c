"""From answers to scores: named extractors and metrics. Needs no model and no torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from mm_moslora.errors import EvalError

from .documents import Document
from .metrics import commonsense, documents, exact, mathvista, mcq, mmmu, vqa, yesno
from .scored import Scored

Extractor = Callable[[str, Document], str]
Metric = Callable[[str, Document], float]


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


def score_answer(
    document: Document, text: str | None, *, extraction: str, metric: str, cluster: Hashable = None
) -> Scored:
    """Read and score one answer; None is an answer that never came.

    Args:
        document: the question.
        text: the answer.
        extraction: a name in `EXTRACTORS`.
        metric: a name in `METRICS`.
        cluster: what samples that go together share.

    Raises:
        EvalError: the document has no reference.
    """
    if not document.answers and document.problem is None:
        raise EvalError(f"Document {document.id!r} has no reference answer and cannot be scored.")
    if text is None:
        return Scored(document=document, text="", parsed="", score=0.0, failed=True, cluster=cluster)
    parsed = EXTRACTORS[extraction](text, document)
    # An answer that cannot be read is wrong, whatever a metric makes of an empty string.
    score = METRICS[metric](parsed, document) if parsed.strip() else 0.0
    assert 0.0 <= score <= 1.0, (metric, document.id, score)
    return Scored(document=document, text=text, parsed=parsed, score=score, cluster=cluster)
