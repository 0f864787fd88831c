"""Scores answers with named extractors and metrics. Needs no model and no torch."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.metrics import (
    box_iou,
    commonsense,
    document_vqa,
    exact_match,
    mathvista,
    mmmu,
    multiple_choice,
    vqa_accuracy,
    yes_no,
)
from mm_moslora_eval.scoring.named_parts import Extractor, Metric, NamedParts
from mm_moslora_eval.scoring.parts import parts_named
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.scoring.visible_text import THINK, Markers, without_thinking
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.vlmevalkit_tsv import parse_list

_CAPITALS = tuple(string.ascii_uppercase)


def _letter(extract: Callable[[str, multiple_choice.Options], str]) -> Extractor:
    return lambda text, document: extract(text, document.options)


def _mmmu_mixed(extract: Callable[[str, multiple_choice.Options], str]) -> Extractor:
    return lambda text, document: extract(text, document.options) if document.options else text


def mathvista_question(document: Document) -> mathvista.MathVistaQuestion:
    """The columns that determine the form of the answer to a MathVista document."""
    extra = document.extra
    precision = extra.get("precision")
    return mathvista.MathVistaQuestion(
        question_type=extra.get("question_type", "multi_choice" if document.options else "free_form"),
        answer_type=extra.get("answer_type", "text"),
        # VLMEvalKit's file has the choices in one cell and no option columns.
        choices=tuple(document.options.values()) or tuple(parse_list(extra.get("choices", ""))),
        precision=float(precision) if precision else None,
    )


def _mathvista_form(text: str, document: Document) -> str:
    """An extracted answer in MathVista's form; an empty answer stays empty, while the source takes the most similar
    choice."""
    return (mathvista.normalize_official(text, mathvista_question(document)) or "") if text.strip() else ""


def _choice_text(document: Document) -> str:
    """The reference; if it is a letter, the text of that choice."""
    answer = "".join(document.answers[:1])
    return document.options.get(answer, answer)


def _mmmu_vlmevalkit(extract: Callable[[str, multiple_choice.Options], str]) -> Extractor:
    return lambda text, document: extract(text, document.options or mmmu.options_vlmevalkit(document.answers))


def _commonsense(dataset: str) -> Extractor:
    return lambda text, _: commonsense.extract_answer(text, dataset)


BOXES = "boxes"
PLACES = frozenset({BOXES, "points"})
"""Extractions of a place in the picture; the backend reads it, since its form and pixels depend on the model."""
_EXTRACTORS: dict[str, Extractor] = {
    BOXES: lambda text, _: box_iou.first_box(text),
    "text": lambda text, _: text.strip(),
    "first_line": lambda text, _: text.strip().split("\n")[0].strip(),
    "letter": _letter(multiple_choice.extract_letter),
    "letter_or_text": lambda text, document: (
        multiple_choice.extract_letter(text, document.options) if document.options else text.strip()
    ),
    "letter_vlmevalkit": _letter(multiple_choice.vlmevalkit),
    "letter_vlmevalkit_2024_06": _letter(multiple_choice.vlmevalkit_2024_06),
    "letter_lmms_eval": _letter(multiple_choice.lmms_eval),
    "letter_lmms_eval_mmbench": _letter(multiple_choice.lmms_eval_mmbench),
    "letter_scienceqa_llava": lambda text, document: multiple_choice.scienceqa_llava(text.strip(), document.options),
    "letter_ai2d_lmms_eval": lambda text, _: multiple_choice.ai2d_filter(text.strip()),
    "letter_first_character": lambda text, _: multiple_choice.seedbench_lmms_eval(text),
    "mmmu_official": _mmmu_mixed(multiple_choice.mmmu_official),
    "mmmu_lmms_eval": _mmmu_mixed(multiple_choice.mmmu_lmms_eval),
    "mmmu_vlmevalkit": _mmmu_vlmevalkit(multiple_choice.vlmevalkit),
    "mmmu_vlmevalkit_2024_06": _mmmu_vlmevalkit(multiple_choice.vlmevalkit_2024_06),
    "mathvista": lambda text, document: _mathvista_form(
        mathvista.extract_without_judge(text, mathvista_question(document)), document
    ),
    "mathvista_extracted": _mathvista_form,
    "mathvista_vlmevalkit": lambda text, document: mathvista.extract_vlmevalkit(
        text, mathvista_question(document), _choice_text(document)
    ),
    "yes_no": lambda text, _: yes_no.extract_yes_no(text),
    "yes_no_vlmevalkit": lambda text, _: yes_no.vlmevalkit(text),
    "yes_no_mme_lmms_eval": lambda text, _: yes_no.mme_lmms_eval(text),
    "yes_no_pope_llava": lambda text, _: yes_no.pope_llava(text),
    "yes_no_pope_lmms_eval": lambda text, _: yes_no.pope_lmms_eval(text),
    "yes_no_hallusionbench_lmms_eval": lambda text, _: yes_no.hallusionbench_lmms_eval(text),
    **{f"commonsense_{name.lower().replace('-', '_')}": _commonsense(name) for name in commonsense.DATASETS},
}
EXTRACTORS: NamedParts[Extractor] = NamedParts("extraction", _EXTRACTORS | parts_named("EXTRACTORS"))
"""Name -> function that extracts the answer; an empty string means that nothing can be inferred."""


def _best(metric: Callable[[str, str], float]) -> Metric:
    return lambda parsed, document: exact_match.best(metric, parsed, document.answers)


def _all(metric: Callable[[str, Sequence[str]], float]) -> Metric:
    return lambda parsed, document: metric(parsed, document.answers)


def _letter_or(metric: Metric) -> Metric:
    return lambda parsed, document: float(parsed in document.answers) if document.options else metric(parsed, document)


def _mmmu_vlmevalkit_score(parsed: str, document: Document) -> float:
    # As in the source, the answer to an open question is option A, unless it is a single capital letter.
    answers = document.answers
    open_question = not document.options and not (len(answers) == 1 and answers[0] in _CAPITALS)
    return float(parsed == "A" if open_question else parsed in answers)


def _mathvista_score(parsed: str, document: Document) -> float:
    # References of multiple-choice questions are letters; MathVista compares the choices' texts.
    gold = [document.options.get(answer, answer) for answer in document.answers]
    return float(any(mathvista.equal(parsed, answer) for answer in gold))


def _ocrbench(metric: Callable[[str, Sequence[str], str], int]) -> Metric:
    return lambda parsed, document: float(metric(parsed, document.answers, document.category or ""))


BOX_METRICS = ("iou", "iou_50")
_METRICS: dict[str, Metric] = {
    "iou": _best(box_iou.iou),
    "iou_50": _best(box_iou.iou_50),
    "exact": _best(exact_match.exact_match),
    "equal": lambda parsed, document: float(parsed in document.answers),
    "equal_ignore_case": _best(lambda parsed, answer: float(parsed.lower() == answer.strip().lower().rstrip("."))),
    "gqa_llava": _best(exact_match.gqa_llava),
    "gqa_lmms_eval": _best(exact_match.gqa_lmms_eval),
    "gqa_vlmevalkit": _best(exact_match.gqa_vlmevalkit),
    "realworldqa_lmms_eval": _best(exact_match.realworldqa_lmms_eval),
    "scienceqa_lmms_eval": _best(multiple_choice.scienceqa_lmms_eval),
    "ai2d_lmms_eval": _best(multiple_choice.ai2d_lmms_eval),
    "vqa": _all(vqa_accuracy.soft_accuracy),
    "letter_or_vqa": _letter_or(_all(vqa_accuracy.soft_accuracy)),
    "letter_or_exact": _letter_or(_best(exact_match.exact_match)),
    "vqa_textvqa": _all(vqa_accuracy.textvqa),
    "vqa_vlmevalkit": _all(vqa_accuracy.vlmevalkit),
    "vqa_vqav2_official": _all(vqa_accuracy.vqav2_official),
    "vqa_vqav2_lmms_eval": _all(vqa_accuracy.vqav2_lmms_eval),
    "vqa_vizwiz_official": _all(vqa_accuracy.vizwiz_official),
    "anls": _all(document_vqa.anls),
    "anls_stvqa_llava": _all(document_vqa.anls_stvqa_llava),
    "relaxed": _best(document_vqa.relaxed_accuracy),
    "relaxed_lmms_eval": _best(document_vqa.relaxed_lmms_eval),
    "relaxed_vlmevalkit_2024_06": _best(document_vqa.relaxed_vlmevalkit_2024_06),
    "ocrbench_vlmevalkit": _ocrbench(document_vqa.ocrbench_vlmevalkit),
    "ocrbench_lmms_eval": _ocrbench(document_vqa.ocrbench_lmms_eval),
    "mmmu": lambda parsed, document: float(
        parsed in document.answers if document.options else mmmu.open_correct(mmmu.parse_open(parsed), document.answers)
    ),
    "mmmu_vlmevalkit": _mmmu_vlmevalkit_score,
    "mathvista": _mathvista_score,
    "mathvista_vlmevalkit": lambda parsed, document: float(
        mathvista.correct_vlmevalkit(parsed, mathvista_question(document), _choice_text(document))
    ),
}
METRICS: NamedParts[Metric] = NamedParts("metric", _METRICS | parts_named("METRICS"))
"""Name -> function that scores a parsed answer, 0 to 1."""


def without_judge(*_: Any) -> NoReturn:
    """No function of this package scores such an answer."""
    raise EvalError("Only a judge can grade these answers.")


JUDGED: NamedParts[Callable[..., Any]] = NamedParts(
    "grader",
    dict.fromkeys(
        ("judge", "judge_mmvet", "judge_mmvet_vlmevalkit", "judge_mmvet_lmms_eval", "judge_llavabench",
         "judge_llavabench_lmms_eval"),
        without_judge,
    ),
)  # fmt: skip
"""Names of metrics that need a judge (`answer_graders.GRADERS`); without one a task is unscored."""


def score_answer(
    document: Document, text: str | None, *, extraction: str, metric: str, cluster: Hashable = None,
    markers: Sequence[Markers] = (THINK,),
) -> Scored:  # fmt: skip
    """Extract and score one answer.

    Args:
        document: with its references.
        text: the answer; None: a missing one.
        extraction: a name in `EXTRACTORS`.
        metric: a name in `METRICS`.
        cluster: of the sample.
        markers: of reasoning, which is removed before.

    Raises:
        EvalError: the document has no reference.
    """
    if not document.answers and document.problem is None:
        raise EvalError(f"Document {document.id!r} has no reference answer and cannot be scored.")
    if text is None:
        return Scored(document=document, text="", parsed="", score=0.0, failed=True, cluster=cluster)
    extract, rate = EXTRACTORS[extraction], METRICS[metric]
    visible, parsed = without_thinking(text, markers), ""
    try:
        parsed = "" if visible.unclosed else _text_of(extract(visible.text, document))
        # An answer that cannot be extracted is wrong, even if the metric accepts an empty string.
        score = _share(rate(parsed, document)) if parsed.strip() else 0.0
    except Exception as error:  # of rules of any package: the other answers are scored all the same
        fault = f"{type(error).__name__}: {error}"
        return Scored(
            document=document,
            text=text,
            parsed=parsed,
            score=math.nan,
            cluster=cluster,
            fault=fault,
            markers=tuple(markers),
        )
    return Scored(document=document, text=text, parsed=parsed, score=score, cluster=cluster, markers=tuple(markers))


def _text_of(parsed: object) -> str:
    if not isinstance(parsed, str):
        raise TypeError(f"the extraction gave {parsed!r}, expected a text")
    return parsed


def _share(score: float) -> float:
    if not 0 <= float(score) <= 1:
        raise ValueError(f"the metric gave {score!r}, expected a number from 0 to 1")
    return float(score)


def score_leniently(samples: Sequence[Scored]) -> list[Scored]:
    """The same answers scored leniently: an answer that contains the right word is right; no score decreases."""
    lenient = []
    for sample in samples:
        visible, document = sample.visible, sample.document
        if not (sample.failed or visible.unclosed or math.isnan(sample.score)):
            right = exact_match.holds_answer(visible.text, document.answers, document.options)
            sample = replace(sample, score=max(sample.score, right))
        lenient.append(sample)
    return lenient
