"""What a score is worth: answers that need no model, scored like a model's."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .documents import DataSet, Document
from .images import Hasher
from .requests import Preparation
from .results import TaskResult, summarise
from .scoring import score_answer
from .task import Task
from .views import selection_of

BASELINES = ("majority", "question_majority")


@dataclass(frozen=True)
class TrainingAnswer:
    """A question of the training data with its answer."""

    question: str
    answer: str


def baseline(
    name: str, task: Task, documents: Sequence[Document], *, data: DataSet, training: Sequence[TrainingAnswer] = ()
) -> TaskResult:
    """Score a baseline.

    `majority` always gives the most frequent answer, `question_majority` the most frequent one for the question's text
    (the best that can be done without looking at the picture). Both learn from `training` if it is given, else from the
    evaluated set itself, where a text that occurs once falls back on the majority; `about["learned_from"]` says which.

    Args:
        name: one of `BASELINES`.
        task: scores the answers.
        documents: the evaluated ones.
        data: where they come from.
        training: questions and answers of the training set.
    """
    assert name in BASELINES, name
    source = training or [
        TrainingAnswer(document.question, Counter(document.answers).most_common(1)[0][0])
        for document in documents
        if document.answers
    ]
    overall = _most_frequent([item.answer for item in source])
    by_question: dict[str, list[str]] = defaultdict(list)
    for known_answer in source:
        by_question[_key(known_answer.question)].append(known_answer.answer)
    needed = 1 if training else 2
    items = Preparation(task, documents, mode="own", seed=0, fingerprint=name, hasher=Hasher()).items
    scored = []
    for item in items:
        known = by_question.get(_key(item.document.question), [])
        answer = _most_frequent(known) if name == "question_majority" and len(known) >= needed else overall
        scored.append(
            score_answer(item.document, answer, extraction=task.extraction, metric=task.metric, cluster=item.cluster)
        )
    about = {
        "learned_from": "training answers" if training else "the evaluated set",
        "majority_answer": overall,
        "data": data.to_dict(),
        "selection": selection_of(items, data).to_dict(),
    }
    return summarise(task, scored, mode=name, about=about)


def _most_frequent(answers: Sequence[str]) -> str:
    # Ties go to the alphabetically first, so that the order of rows does not matter.
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else ""


def _key(question: str) -> str:
    return " ".join(question.replace("<image>", " ").lower().split())
