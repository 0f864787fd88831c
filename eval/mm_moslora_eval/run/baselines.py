"""Baselines: answers without a model, scored like a model's."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mm_moslora.utils.errors import DataError
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.request_preparation import Preparation
from mm_moslora_eval.run.result_file import summarise
from mm_moslora_eval.run.scored_subsets import selection_of
from mm_moslora_eval.scoring.answer_scoring import score_answer
from mm_moslora_eval.scoring.score_differences import difference_of_scores
from mm_moslora_eval.scoring.scored_sample import Scored, with_scores
from mm_moslora_eval.scoring.task_result import TaskResult
from mm_moslora_eval.sources.document import DataSet, Document
from mm_moslora_eval.sources.source_images import Hasher

if TYPE_CHECKING:
    from mm_moslora.config import SourceConfig
    from mm_moslora.data.images.record_picture import Picture

logger = logging.getLogger(__name__)

BASELINES = ("majority", "question_majority")


@dataclass(frozen=True)
class TrainingAnswer:
    """A question of the training data with its answer."""

    question: str
    answer: str
    picture: Picture | None = None
    """The one picture of its record."""


def read_training_answers(path: Path, *, image_folder: Path | None = None) -> list[TrainingAnswer]:
    """Questions and answers of a training file in any form that `data.train` of a recipe takes."""
    from mm_moslora.config import SourceConfig

    folder = str(image_folder) if image_folder else None
    source = SourceConfig(path=str(path), image_folder=folder, follow_links=True)  # no picture is opened
    if not (answers := answers_of_source(source)):
        raise DataError(f"{path} holds no question with an answer that can be read. Give the training file.")
    return answers


def answers_of_source(config: SourceConfig, *, most: int | None = None) -> list[TrainingAnswer]:
    """Questions and answers of a source of training; at most of so many records, drawn at random."""
    from mm_moslora.data.record_faults import RecordError
    from mm_moslora.data.sources.open_sources import open_source

    source = open_source(config)
    answers: list[TrainingAnswer] = []
    rows: Sequence[int] = range(len(source))
    if most is not None and most < len(rows):
        rows = random.Random(0).sample(rows, most)
    unusable = 0
    for row in rows:
        try:
            record = source[row]
        except RecordError:
            unusable += 1
            continue
        picture = record.images[0] if len(record.images) == 1 else None
        pairs = itertools.pairwise(record.turns)
        answers += [
            TrainingAnswer(asked.text, said.text, picture)
            for asked, said in pairs
            if asked.role == "user" and said.text
        ]
    if unusable:
        logger.warning(
            "%s: %d of %d records cannot be used; baselines learn from the rest.", config.path, unusable, len(rows)
        )
    return answers


def baseline(
    name: str, task: Task, documents: Sequence[Document], *, data: DataSet, training: Sequence[TrainingAnswer] = (),
    own: Sequence[Scored] = (), stratify: str | None = None, answers: Sequence[str] = (), remark: str = "",
) -> TaskResult:  # fmt: skip
    """Score a baseline, whose `answers` to the documents may be given.

    In the result, `about["learned_from"]` is the source of the answers, and `about["own_less_this"]` is the model's
    score minus the baseline's.
    """
    work = Preparation(task, documents, mode="own", seed=0, fingerprint=name, hasher=Hasher())
    items = [first for first, *_ in work.documents]
    clusters = [item.cluster for item in items]
    if answers:
        scored = scored_as(task, documents, answers, clusters=clusters)
    else:
        scored = answer_without_model(name, task, documents, clusters=clusters, training=training)
    about = {
        "learned_from": learned_from(training),
        "majority_answer": _most_frequent([item.answer for item in training or _answers_of(documents)]),
        "data": data.to_dict(),
        "selection": asdict(selection_of(items, data, stratify=stratify, aggregation=task.aggregation)),
    }
    if own and with_scores(scored):
        about["own_less_this"] = difference_of_scores(task.aggregation, [own], [scored]).as_difference.to_dict()
    result = summarise(task, scored, mode=name, about=about)
    return replace(result, remarks=(*result.remarks, remark)) if remark else result


def learned_from(training: Sequence[TrainingAnswer]) -> str:
    """Description of the source of the baselines' answers."""
    return "training answers" if training else "the evaluated set"


def answer_without_model(
    name: str, task: Task, documents: Sequence[Document], *, clusters: Sequence[Hashable],
    training: Sequence[TrainingAnswer] = (),
) -> list[Scored]:  # fmt: skip
    """The samples of a baseline.

    `majority` always gives the most frequent answer. `question_majority` gives the most frequent answer to the
    question's text, which is the best possible without the picture. Both count the answers of `training` if it is
    given, else those of the evaluated set itself; there, a text that occurs once gets the majority answer.
    """
    assert name in BASELINES, name
    source = training or _answers_of(documents)
    overall = _most_frequent([item.answer for item in source])
    by_question: dict[str, list[str]] = defaultdict(list)
    for example in source:
        by_question[question_key(example.question)].append(example.answer)
    needed = 1 if training else 2
    answers = []
    for document in documents:
        same = by_question.get(question_key(document.question), [])
        answers.append(_most_frequent(same) if name == "question_majority" and len(same) >= needed else overall)
    return scored_as(task, documents, answers, clusters=clusters)


def scored_as(
    task: Task, documents: Sequence[Document], answers: Sequence[str], *, clusters: Sequence[Hashable]
) -> list[Scored]:
    """The samples of given answers."""
    return [
        score_answer(document, answer, extraction=task.extraction, metric=task.metric, cluster=cluster)
        for document, answer, cluster in zip(documents, answers, clusters, strict=True)
    ]


def _answers_of(documents: Sequence[Document]) -> list[TrainingAnswer]:
    return [TrainingAnswer(document.question, document.reference) for document in documents if document.answers]


def _most_frequent(answers: Sequence[str]) -> str:
    # Ties go to the alphabetically first answer, so that the order of rows does not matter.
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else ""


def question_key(question: str) -> str:
    """A question's text without marks of images, case and spaces."""
    return " ".join(question.replace("<image>", " ").lower().split())
