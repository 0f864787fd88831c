"""Scores answers with named extractors and metrics. Needs no model and no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.metrics import box_iou, document_vqa, exact_match, multiple_choice, vqa_accuracy
from mm_moslora_eval.scoring.named_parts import Extractor, Metric, NamedParts
from mm_moslora_eval.scoring.parts import parts_named
from mm_moslora_eval.scoring.rule_forms import all_of, best_of, documented, of_options, of_text
from mm_moslora_eval.scoring.scored_sample import THINK, Markers, Scored, without_thinking
from mm_moslora_eval.sources.document import Document

BOXES = "boxes"
PLACES = frozenset({BOXES, "points"})
"""Extractions of a place in the picture; the backend reads it, since its form and pixels depend on the model."""
_EXTRACTORS: dict[str, Extractor] = {
    BOXES: documented(
        of_text(box_iou.first_box), "The first box of the answer in the model's form, in pixels of the image's file."
    ),
    "text": documented(of_text(str.strip), "The answer without space around it."),
    "first_line": documented(
        of_text(lambda text: text.strip().split("\n")[0].strip()), "The first line of the answer."
    ),
    "letter": of_options(multiple_choice.extract_letter),
    "letter_or_text": documented(
        lambda text, document: (
            multiple_choice.extract_letter(text, document.options) if document.options else text.strip()
        ),
        "`letter` where a question has options, else `text`.",
    ),
    "letter_vlmevalkit": of_options(multiple_choice.vlmevalkit),
    "letter_vlmevalkit_2024_06": of_options(multiple_choice.vlmevalkit_2024_06),
    "letter_lmms_eval": of_options(multiple_choice.lmms_eval),
    "first_letter_lmms_eval": of_text(multiple_choice.first_letter_lmms_eval),
    "letter_first_character": of_text(multiple_choice.first_character),
    "yes_no": of_text(exact_match.extract_yes_no),
    "yes_no_vlmevalkit": of_text(exact_match.extract_yes_no),
}
EXTRACTORS: NamedParts[Extractor] = NamedParts(
    "extraction", _EXTRACTORS | parts_named("EXTRACTORS"), table="EXTRACTORS"
)
"""Name -> function that extracts the answer; an empty string means that nothing can be inferred."""


def _equal(parsed: str, document: Document) -> float:
    """Equal to a reference, such as a letter."""
    return float(parsed in document.answers)


def _letter_or(name: str, metric: Metric) -> Metric:
    return documented(
        lambda parsed, document: (_equal if document.options else metric)(parsed, document),
        f"`equal` where a question has options, else `{name}`.",
    )


BOX_METRICS = ("iou", "iou_50")
_METRICS: dict[str, Metric] = {
    "iou": best_of(box_iou.iou),
    "iou_50": best_of(box_iou.iou_50),
    "exact": best_of(exact_match.exact_match),
    "equal": _equal,
    "equal_ignore_case": documented(
        best_of(lambda parsed, answer: float(parsed.lower() == answer.strip().lower().rstrip("."))),
        "Equal to a reference without case and a period at its end.",
    ),
    "vqa": documented(
        all_of(vqa_accuracy.soft_accuracy),
        "VQA accuracy over ten people, with this project's normalisation of both sides.",
    ),
    "letter_or_vqa": _letter_or("vqa", all_of(vqa_accuracy.soft_accuracy)),
    "letter_or_exact": _letter_or("exact", best_of(exact_match.exact_match)),
    "vqa_textvqa": documented(
        all_of(vqa_accuracy.textvqa), "LLaVA and lmms-eval for TextVQA: EvalAI's normalisation of both sides."
    ),
    "vqa_vlmevalkit": documented(all_of(vqa_accuracy.vlmevalkit), "VLMEvalKit's VQA score."),
    "anls": all_of(document_vqa.anls),
    "anls_stvqa_llava": all_of(document_vqa.anls_stvqa_llava),
    "relaxed": best_of(document_vqa.relaxed_accuracy),
    "relaxed_lmms_eval": best_of(document_vqa.relaxed_lmms_eval),
}
METRICS: NamedParts[Metric] = NamedParts("metric", _METRICS | parts_named("METRICS"), table="METRICS")
"""Name -> function that scores a parsed answer, 0 to 1."""


def without_judge(*_: Any) -> NoReturn:
    """The grade that a judge gives by the prompt of the task file (`grading`), whose replies alone count."""
    raise EvalError("Only a judge can grade these answers.")


JUDGED: NamedParts[Callable[..., Any]] = NamedParts("grader", {"judge": without_judge}, table="GRADERS")
"""Metrics that need a judge: name -> function with which it grades one answer; without a judge a task is unscored."""


def is_judged(metric: str) -> bool:
    """Whether a metric needs a judge."""
    return metric not in METRICS and metric in JUDGED


def score_answer(
    document: Document, text: str | None, *, extraction: str, metric: str, cluster: Hashable = None,
    markers: Sequence[Markers] = (THINK,),
) -> Scored:  # fmt: skip
    """Extract and score one answer."""
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
