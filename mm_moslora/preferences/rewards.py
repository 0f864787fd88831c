"""Rewards of generated answers: the harness's extractions and metrics by name, and functions of your own.

A function of your own takes the whole answer, with its thinking, and a `Document` (question, references, options, and
the record's other texts and numbers as `extra`), and gives a number. A file that `--import` names adds it to `REWARDS`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mm_moslora_eval.metrics.box_iou import fault_of_reference
from mm_moslora_eval.metrics.exact_match import holds_answer
from mm_moslora_eval.scoring.answer_scoring import BOX_METRICS, BOXES, score_answer
from mm_moslora_eval.scoring.scored_sample import without_thinking
from mm_moslora_eval.sources.document import Document

from mm_moslora.batch import ImageProcessing
from mm_moslora.config import GrpoConfig
from mm_moslora.data.boxes.box_forms import read_boxes
from mm_moslora.data.preference_set import Question
from mm_moslora.launch.imported_code import foreign_code
from mm_moslora.utils.errors import ConfigError, TrainingError, suggestion

logger = logging.getLogger(__name__)

_LARGEST = 1e9
"""Of a reward: sums of squares of larger ones overflow in single precision."""
Reward = Callable[[str, Document], float]


def _scored(extraction: str, metric: str) -> Reward:
    return lambda text, document: score_answer(document, text, extraction=extraction, metric=metric).score


@dataclass(frozen=True)
class BoxReward:
    """A metric of boxes; it takes the boxes of an answer as text, see `box_reader`."""

    metric: str

    def __call__(self, text: str, document: Document) -> float:
        """See `Reward`."""
        return score_answer(document, text, extraction=BOXES, metric=self.metric).score


def _contains(text: str, document: Document) -> float:
    visible = without_thinking(text)
    return 0.0 if visible.unclosed else holds_answer(visible.text, document.answers, document.options)


REWARDS: dict[str, Reward] = {
    "exact": _scored("text", "exact"),
    "relaxed": _scored("text", "relaxed"),
    "letter": _scored("letter", "equal"),
    "yes_no": _scored("yes_no", "equal_ignore_case"),
    "contains": _contains,
    "vqa": _scored("text", "vqa"),
    "anls": _scored("text", "anls"),
    "mmmu": _scored("mmmu_official", "mmmu"),
    "mathvista": _scored("mathvista", "mathvista"),
    **{metric: BoxReward(metric) for metric in BOX_METRICS},
}
"""Name -> reward, 0 to 1. Thinking does not count, and an answer that breaks off within it is wrong."""


def find_rewards(config: GrpoConfig) -> dict[str, Reward]:
    """The rewards of a recipe by name; ConfigError where nothing has a name."""
    if odd := [name for name in config.rewards if name not in REWARDS]:
        raise ConfigError(
            f"grpo.rewards holds {odd[0]!r}, expected any of {', '.join(REWARDS)}.{suggestion(odd[0], REWARDS)} "
            "A file of your own that adds it is named on the command line: --import FILE.py."
        )
    return {name: REWARDS[name] for name in config.rewards}


def document_of(question: Question) -> Document:
    """A question in the form that rewards take."""
    asked = question.asked
    return Document(
        id=asked.record.id, question=question.text, answers=asked.references, options=asked.options, extra=asked.extra
    )


def box_reader(question: Question, processing: ImageProcessing | None) -> Callable[[str], str]:
    """Gives the boxes of an answer in pixels of the picture's file; ValueError where references cannot be compared."""

    def read(text: str) -> str:
        if question.size is None:
            raise ValueError("the question has no picture, in which a box could lie")
        for reference in question.asked.references:
            if fault := fault_of_reference(reference, *question.size):
                raise ValueError(fault)
        return json.dumps([box.numbers for box in read_boxes(without_thinking(text).text, processing, question.size)])

    return read


def fault_of_boxes(
    rewards: Mapping[str, Reward], processing: ImageProcessing | None
) -> Callable[[str, int, int], str | None] | None:
    """What finds references that no reward of boxes can compare; None without such a reward."""
    reading = any(isinstance(reward, BoxReward) for reward in rewards.values())
    return fault_of_reference if reading and processing is not None and processing.boxes is not None else None


def check_box_rewards(rewards: Mapping[str, Reward], with_boxes: int, processing: ImageProcessing | None) -> None:
    """Refuse rewards of boxes for a model of unknown form, and references that are boxes without such rewards."""
    reading = [name for name, reward in rewards.items() if isinstance(reward, BoxReward)]
    if reading and (processing is None or processing.boxes is None):
        raise ConfigError(
            f"grpo.rewards holds {reading[0]}, and neither family nor vocabulary of this model says in which form it "
            "writes boxes. Set model.boxes."
        )
    if with_boxes and not reading:
        raise ConfigError(
            f"{with_boxes} references are boxes in pixels of the picture's file, and none of grpo.rewards "
            f"({', '.join(rewards)}) reads those of an answer. Add one of {', '.join(BOX_METRICS)}."
        )


class Scorer:
    """A reward over the answers of a batch; an answer whose reward fails has none, and is counted."""

    def __init__(self, name: str, reward: Reward) -> None:
        self.name, self.reward, self.failed = name, reward, 0

    def scores(
        self, texts: Sequence[str], documents: Sequence[Document], boxes: Sequence[Callable[[str], str]] = ()
    ) -> list[float]:
        """One number per answer, NaN where the reward failed; TrainingError where it failed for every answer."""
        scores, failed, first = [], 0, ""
        for number, (text, document) in enumerate(zip(texts, documents, strict=True)):
            try:
                shown = boxes[number](text) if isinstance(self.reward, BoxReward) else text
                with foreign_code():
                    value = float(self.reward(shown, document))
                if not abs(value) <= _LARGEST:
                    raise ValueError(f"it gave {value}, expected a finite number of at most {_LARGEST:g}")
            except Exception as error:  # whatever a function of a user's own raises
                first = first or f"question {document.id}, answer {text[:80]!r}: {type(error).__name__}: {error}"
                value, failed = math.nan, failed + 1
            scores.append(value)
        if failed == len(scores):
            raise TrainingError(
                f"The reward {self.name!r} failed for all {failed} answers of a step, so that nothing can be learned. "
                f"The first one: {first}. Correct it, and start again: the run goes on from its last checkpoint."
            )
        if failed and not self.failed:
            logger.warning("The reward %r failed, and its answer does not count: %s", self.name, first)
        self.failed += failed
        return scores


def scores_together(
    scorers: Sequence[Scorer],
    texts: Sequence[str],
    documents: Sequence[Document],
    boxes: Sequence[Callable[[str], str]] = (),
) -> list[list[float]]:
    """The scores of each reward; NaN in all for an answer for which one fails, else the rest would judge it."""
    columns = [scorer.scores(texts, documents, boxes) for scorer in scorers]
    failed = [any(map(math.isnan, row)) for row in zip(*columns, strict=True)]
    if all(failed):
        names = ", ".join(repr(scorer.name) for scorer in scorers if scorer.failed)
        raise TrainingError(
            f"The rewards {names} failed so often that no answer of a step has a score. Correct them, and start "
            "again: the run goes on from its last checkpoint."
        )
    return [[math.nan if bad else value for value, bad in zip(column, failed, strict=True)] for column in columns]
