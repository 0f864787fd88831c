"""A linear probe: how often a linear classifier of the frozen encoder's features is right, before any training.

Every question text is a classification of its own, whose classes are its answers in the training records. The features
are the mean over a picture's patches, standardised. The probe knows which question is asked, but not what its words
mean: a text that the training records lack gets the most frequent answer.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_moslora.reporting.verdicts import FEWEST, score_text
from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.run_paths import MANIFEST, find_checkpoint
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.protocol.task_registry import get_task, with_changes
from mm_moslora_eval.run.baselines import answers_of_source, question_key, scored_as
from mm_moslora_eval.run.probing.frozen_features import Features, FrozenEncoder, NoProbeError, Opened
from mm_moslora_eval.run.request_preparation import Preparation
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.answer_scoring import is_judged
from mm_moslora_eval.scoring.measured_scores import aggregate_runs
from mm_moslora_eval.scoring.score_aggregation import facts_of
from mm_moslora_eval.scoring.score_differences import difference_of_scores
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.source_images import Hasher, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

    from mm_moslora.config import ModelConfig, SourceConfig

PARTS, SUBSETS = (8, 4, 2), 5
"""Parts of the training pictures in the learning curve, as 1/8, and random subsets of each."""
MOST_RECORDS, MOST_PICTURES = 20_000, 4_000
"""Records of a source, and training pictures, from which the probe learns; of more, so many drawn at random."""
LEAST_ASKED, LEAST_PER_ANSWER = 0.5, 3.0
"""Share of the held-out questions that the training records must ask, and mean number of training pictures with the
same answer to a question. With fewer, answers are no classes."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """The probe of a task."""

    text: str
    """Its score and learning curve in sentences, or why there is none."""
    answers: tuple[str, ...] = ()
    """One for each document; none without a probe."""


@dataclass(frozen=True, kw_only=True)
class _Learned:
    """A question about a training picture, and how often the records have it with this answer."""

    picture: str
    question: str
    answer: str
    times: float


def probe_tasks(
    tasks: Sequence[str], model: str, *, settings: EvaluationSettings | None = None, changes: Sequence[str] = (),
    seconds: float = math.inf,
) -> list[Probed]:  # fmt: skip
    """Probe the frozen encoder of a recipe, a run or a checkpoint on tasks, by the recipe's own training records.

    Args:
        seconds: a probe whose pictures would take longer to encode is left out.
    """
    sources, config = _recipe(model)
    chosen = settings or EvaluationSettings()
    opened = [with_changes(get_task(name), changes) for name in tasks]
    asked = [chosen.select(task.load(), aggregation=task.aggregation) for task in opened]
    wanted = {question_key(document.question) for documents in asked for document in documents}
    pictures: dict[str, Callable[[], Image]] = {}
    learned = _learned(sources, wanted, pictures)
    encoder = FrozenEncoder(config, seconds)
    probed = []
    for task, documents in zip(opened, asked, strict=True):
        try:
            probed.append(_probe(task, documents, learned, pictures, encoder))
        except NoProbeError as reason:
            probed.append(Probed(text=f"no linear probe: {reason}."))
    return probed


def _recipe(name: str) -> tuple[Sequence[SourceConfig], ModelConfig]:
    from mm_moslora.config import load_recipe

    path = Path(name)
    if path.is_dir() and ((folder := find_checkpoint(path)) / MANIFEST).is_file():
        from mm_moslora.models.load_model import model_of, recipe_of

        return recipe_of(folder).data.train, model_of(folder)
    if not path.is_file():
        raise EvalError(
            f"--probe reads the encoder and the training records of a recipe, and --model is {name!r}. Give a run, a "
            "checkpoint or the YAML file of a recipe."
        )
    recipe = load_recipe(path)
    return recipe.data.train, recipe.model


def _learned(
    sources: Sequence[SourceConfig], wanted: Collection[str], pictures: dict[str, Callable[[], Image]]
) -> list[_Learned]:
    """The training questions that the tasks ask, too; `pictures` gets their pictures."""
    times: dict[tuple[str, str, str], float] = defaultdict(float)
    for source in sources:
        for item in answers_of_source(source, most=MOST_RECORDS):
            if item.picture is not None and (question := question_key(item.question)) in wanted:
                pictures[item.picture.name] = item.picture.rgb
                times[item.picture.name, question, item.answer.strip()] += source.weight
    names = sorted(pictures)
    kept = set(names if len(names) <= MOST_PICTURES else random.Random(0).sample(names, MOST_PICTURES))
    return [
        _Learned(picture=picture, question=question, answer=answer, times=count)
        for (picture, question, answer), count in times.items()
        if picture in kept
    ]


def _probe(
    task: Task, documents: Sequence[Document], learned: Sequence[_Learned], pictures: Opened, encoder: FrozenEncoder
) -> Probed:
    if is_judged(task.metric) or not all(document.answers for document in documents):
        raise NoProbeError("the answers are not compared with references")
    asked = [(question_key(document.question), _name(document)) for document in documents]
    items = [item for item in learned if item.question in {question for question, _ in asked}]
    known = {item.question for item in items}
    unknown = sum(question not in known or name is None for question, name in asked)
    if unknown > (1 - LEAST_ASKED) * len(asked):
        raise NoProbeError(
            f"of {len(asked)} questions the training records ask {len(asked) - unknown}, each about one picture"
        )
    held_out = {name: partial(open_image, document.images[0]) for document, (_, name) in
                zip(documents, asked, strict=True) if name is not None}  # fmt: skip
    _refuse_no_classes(items)
    features = encoder({name: pictures[name] for name in sorted({item.picture for item in items})} | held_out)
    items = [item for item in items if item.picture in features]
    _refuse_no_classes(items)
    work = Preparation(task, documents, mode="own", seed=0, fingerprint="probe", hasher=Hasher())
    clusters = [first.cluster for first, *_ in work.documents]

    def run(part: Collection[str]) -> tuple[tuple[str, ...], list[Scored]]:
        answers = _answers([item for item in items if item.picture in part], asked, features)
        return answers, scored_as(task, documents, answers, clusters=clusters)

    names, rng = sorted({item.picture for item in items}), random.Random(0)
    answers, whole = run(set(names))
    orders = [rng.sample(names, len(names)) for _ in range(SUBSETS)]
    sentences = [f"{_said(task, [whole])} from {len(names)} training pictures"]
    more = ""
    for part in PARTS:
        if (count := len(names) // part) >= FEWEST:
            runs = [run(set(order[:count]))[1] for order in orders]
            sentences.append(f"{_said(task, runs)} from 1/{part}")
            gain = difference_of_scores(task.aggregation, [whole], runs).as_difference
            would = {"more": "more pictures would probably help", "less": "more pictures made it worse"}
            verdict = would.get(gain.shown, "it is not shown that more pictures would help")
            more = f" All against 1/{part} of them: {gain.points}: {verdict}."
    more += f" {unknown} questions that training lacks got the most frequent answer." if unknown else ""
    curve = f" (means of {SUBSETS} random subsets)" if len(sentences) > 1 else ""
    return Probed(text=f"linear probe of the frozen encoder: {'; '.join(sentences)}{curve}.{more}", answers=answers)


def _name(document: Document) -> str | None:
    """The name of a document's one picture."""
    if len(document.images) != 1 or document.problem is not None:
        return None
    return str(document.images[0]) if isinstance(document.images[0], Path) else f"document {document.id}"


def _refuse_no_classes(items: Sequence[_Learned]) -> None:
    answers: dict[str, set[str]] = defaultdict(set)
    for item in items:
        answers[item.question].add(item.answer)
    pictures = len({item.picture for item in items})
    if pictures < FEWEST:
        raise NoProbeError(f"there are {pictures} training pictures, and it needs at least {FEWEST}")
    if all(len(of_question) < 2 for of_question in answers.values()):
        raise NoProbeError("every question has one answer in training, so there is nothing to tell apart")
    if (mean := len(items) / sum(map(len, answers.values()))) < LEAST_PER_ANSWER:
        raise NoProbeError(
            f"answers to a question are no classes: {mean:.1f} training pictures share one on average, and it needs "
            f"{LEAST_PER_ANSWER:g}"
        )


def _said(task: Task, runs: Sequence[Sequence[Scored]]) -> str:
    score, unit = aggregate_runs(task.aggregation, runs), facts_of(task.aggregation).score
    low, high = (score_text(value, unit, named=False) for value in (score.low, score.high))
    return f"{score_text(score.value, unit)} (95 % {low} to {high})"


def _answers(items: Sequence[_Learned], asked: Sequence[tuple[str, str | None]], features: Features) -> tuple[str, ...]:
    """The answers of classifiers that learn from the items, to questions about pictures."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    by_question: dict[str, list[_Learned]] = defaultdict(list)
    for item in items:
        by_question[item.question].append(item)
    scaler = StandardScaler().fit(np.stack([features[name] for name in sorted({item.picture for item in items})]))
    readers: dict[str, Any] = {}
    for question, members in by_question.items():
        answers, times = [item.answer for item in members], np.array([item.times for item in members])
        if len(set(answers)) > 1:
            seen = scaler.transform(np.stack([features[item.picture] for item in members]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                reader = LogisticRegression(max_iter=1000).fit(seen, answers, sample_weight=times / times.mean())
            readers[question] = reader
    given = []
    for question, name in asked:
        if question in readers and name is not None and name in features:
            given.append(str(readers[question].predict(scaler.transform(features[name][None]))[0]))
        else:
            given.append(_most_frequent(by_question.get(question, items)))
    return tuple(given)


def _most_frequent(items: Sequence[_Learned]) -> str:
    counts: Counter[str] = Counter()
    for item in items:
        counts[item.answer] += item.times  # type: ignore[assignment]
    return min(counts, key=lambda answer: (-counts[answer], answer))
