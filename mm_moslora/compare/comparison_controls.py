"""The answers of an arm's runs, and tests against controls that need no picture or no model.

Shapes: scores are ``K x N``, seeds by documents. A run is compared with its own controls of the same seed: a control's
share is subtracted answer by answer before means are taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora_eval.scoring.measured_scores import nats_of, reason_without

from mm_moslora.compare.comparison_plan import ALL, Cell, ComparisonSettings, Outcome, reported_cells
from mm_moslora.compare.seed_statistics import ArmEstimate, TaskScores, arm_mean, holm
from mm_moslora.reporting.verdicts import PICTURE_CONTROLS, SIGNIFICANT, Difference
from mm_moslora.utils.errors import DataError, MoSLoRAError

if TYPE_CHECKING:
    from mm_moslora_eval.protocol.task import Task
    from mm_moslora_eval.run.baselines import TrainingAnswer
    from mm_moslora_eval.scoring.scored_sample import Scored

OWN = "own"
"""Key of log-likelihoods with the real pictures."""
_MODES = {"wrong": "wrong_image", "blind": "blind"}
_BASELINES = {"majority": "majority", "question_majority": "best_answer"}


@dataclass(frozen=True, kw_only=True)
class TaskAnswers:
    """Scores of an arm's runs on one task."""

    own: TaskScores
    """Scores with the real pictures."""
    less: Mapping[str, TaskScores]
    """These scores minus each control's, by its name in `mm_moslora.reporting.verdicts`; ``K x N``."""
    pictures: bool
    """Whether the questions show pictures."""
    score: str = ""
    """Name of the score; empty for a share of right answers."""
    nats: Mapping[str, TaskScores] = field(default_factory=dict)
    """Log-likelihood of the reference answer by `OWN` or the control, ``K x N``; left out where a run has none."""
    no_nats: str = ""
    """The reason for none."""
    remarks: tuple[str, ...]
    """Remarks on the scores, such as that all answers are equal."""


def with_readable(
    cells: Sequence[Cell], outcomes: Mapping[str, Outcome], folder: Path, tasks: Sequence[str]
) -> dict[str, Outcome]:
    """The outcomes, in which runs with samples that cannot be read have failed, as the reason says."""
    checked = dict(outcomes)
    for cell in cells:
        if (outcome := outcomes.get(cell.name)) is None or outcome.status != "ok":
            continue
        for task in tasks:
            try:
                _check(folder, outcome.places.get(task, {}), task)
            except MoSLoRAError as error:
                checked[cell.name] = Outcome(status="failed", reason=str(error), total_seconds=outcome.total_seconds)
    return checked


def _check(folder: Path, views: Mapping[str, str], task: str) -> None:
    from mm_moslora_eval.run.scored_subsets import SAMPLES, read_samples, task_of, view_below

    if OWN not in views:
        raise DataError(f"The outcome names no samples of {task}. Delete the run's outcome.json to measure it again.")
    sizes = set()
    for view in (view_below(folder, name) for name in views.values()):
        sizes.add(len(read_samples(view / SAMPLES)))
        if task_of(view) is not None:
            _scores(view)
    if len(sizes) > 1 or 0 in sizes:
        raise DataError(f"The samples of {task} are of {sorted(sizes)} documents by image mode, expected one number.")


class Answers:
    """Reads the samples of reported runs; `chosen`: rates as `choose_rates` gives them, `names`: shown for tasks."""

    def __init__(
        self, settings: ComparisonSettings, outcomes: Mapping[str, Outcome], folder: Path, chosen: Mapping[str, float],
        names: Mapping[str, str],
    ) -> None:  # fmt: skip
        from mm_moslora_eval.eval_commands import training_answers
        from mm_moslora_eval.run.baselines import learned_from

        self._settings, self._outcomes, self._folder, self._names = settings, outcomes, folder, names
        self._cells = reported_cells(settings, chosen)
        self._training: Sequence[TrainingAnswer] = training_answers(settings.train_answers)
        self.learned_from = learned_from(self._training)
        """The source of answers without a model."""
        self.floors: dict[str, dict[str, float]] = {}
        """Scores of answers without a model, by task; equal for every run."""
        self._floor_scores: dict[str, dict[str, list[float]]] = {}

    def of(self, arm: str) -> dict[str, TaskAnswers]:
        """Scores by task; empty where no seed was measured."""
        good = [
            (cell.seed, outcome)
            for cell in self._cells
            if cell.arm.group == arm and (outcome := self._outcomes.get(cell.name)) and outcome.status == "ok"
        ]
        return {self._names[task]: self._task(task, good) for task in self._settings.tasks} if good else {}

    def _task(self, task: str, good: Sequence[tuple[int, Outcome]]) -> TaskAnswers:
        from mm_moslora_eval.run.scored_subsets import SAMPLES, read_samples, task_of, view_below

        views = [{mode: view_below(self._folder, path) for mode, path in o.places[task].items()} for _, o in good]
        rows = [read_samples(of_seed["own"] / SAMPLES) for of_seed in views]
        rules = task_of(views[0]["own"])
        ids = [row["id"] for row in rows[0]]
        for of_seed, other in zip(views, rows, strict=True):
            if [row["id"] for row in other] != ids:
                raise DataError(
                    f"{of_seed['own']} and {views[0]['own']} hold different documents, so their runs cannot be "
                    "compared. Delete the folders of the runs to measure them again, or choose another --output."
                )
        # Pictures have the same name in every task, documents without one a name of their task alone.
        clusters = [row["cluster"] if row.get("images") else (task, row["cluster"]) for row in rows[0]]
        seeds = [seed for seed, _ in good]
        own = [_scores(of_seed["own"]) for of_seed in views]
        nats = {}
        for mode, name in {"own": OWN, **_MODES}.items():
            grid = _nats([of_seed[mode] for of_seed in views]) if all(mode in of_seed for of_seed in views) else []
            if grid:
                nats[name] = TaskScores(scores=grid, clusters=clusters, seeds=seeds)
        less = {}
        for mode, name in _MODES.items():
            if all(mode in of_seed for of_seed in views):
                controls = [_scores(of_seed[mode]) for of_seed in views]
                less[name] = _less(own, controls, clusters)
        for name, floor in self._floors(task, views[0]["own"]).items():
            # A baseline that knows the test answers per question is no control.
            if name == "majority" or self._training:
                less[name] = _less(own, [floor] * len(own), clusters)
        return TaskAnswers(
            own=TaskScores(scores=own, clusters=clusters, seeds=seeds), less=less,
            pictures=any(row.get("images") for row in rows[0]), remarks=_remarks(good, views),
            score=_score_name(rules.aggregation) if rules else "",
            nats=nats, no_nats="" if OWN in nats else _why_no_nats(rules, rows, views[0]["own"]),
        )  # fmt: skip

    def _floors(self, task: str, view: Path) -> Mapping[str, list[float]]:
        """Scores of answers without a model, by name; empty where the samples are not answers to questions."""
        if task not in self._floor_scores:
            self._floor_scores[task] = _without_model(view, self._training)
            means = {name: math.fsum(scores) / len(scores) for name, scores in self._floor_scores[task].items()}
            self.floors[self._names[task]] = means
        return self._floor_scores[task]


def _score_name(aggregation: str) -> str:
    """A score that is a sum is compared as a share of its full marks."""
    from mm_moslora_eval.scoring.score_aggregation import facts_of

    facts = facts_of(aggregation)
    return facts.score + (f" as a share of its {facts.full_marks:,.0f} points" if facts.is_sum else "")


def _scores(view: Path) -> list[float]:
    """The contribution of every answer to the task's score; without a task, the samples' own scores."""
    from mm_moslora_eval.run.scored_subsets import SAMPLES, read_samples, read_scored, task_of

    rules = task_of(view)
    if rules is None:
        return [float(row["score"] or 0.0) for row in read_samples(view / SAMPLES)]
    scored = read_scored(view)
    return _brought(rules.aggregation, [replace(one, score=0.0) if math.isnan(one.score) else one for one in scored])


def _nats(views: Sequence[Path]) -> list[list[float]]:
    """Log-likelihoods by seed and document, NaN where one is missing; empty where a seed has none."""
    from mm_moslora_eval.run.scored_subsets import SAMPLES, read_samples

    grid = [[nats_of(row) for row in read_samples(view / SAMPLES)] for view in views]
    return grid if all(any(math.isfinite(value) for value in one) for one in grid) else []


def _why_no_nats(rules: Task | None, rows: Sequence[Sequence[Mapping[str, Any]]], view: Path) -> str:
    from mm_moslora_eval.run.scored_subsets import read_view
    from mm_moslora_eval.scoring.answer_scoring import JUDGED

    silent = min(rows, key=lambda one: sum(math.isfinite(nats_of(row)) for row in one))
    referenced = any(row.get("answers") for row in silent)
    if rules is None:
        return reason_without(referenced=referenced, judged=False, thinks=False)
    thinks = bool(read_view(view).get("asked_to_think"))
    return reason_without(referenced=referenced, judged=rules.metric in JUDGED, thinks=thinks)


def _brought(aggregation: str, samples: Sequence[Scored]) -> list[float]:
    from mm_moslora_eval.scoring.measured_scores import score_by_sample
    from mm_moslora_eval.scoring.score_aggregation import facts_of

    return [value / facts_of(aggregation).full_marks for value in score_by_sample(aggregation, samples)]


def _less(own: Sequence[Sequence[float]], control: Sequence[Sequence[float]], clusters: Sequence[Any]) -> TaskScores:
    differences = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(own, control, strict=True)]
    return TaskScores(scores=differences, clusters=clusters)


def _without_model(view: Path, training: Sequence[TrainingAnswer]) -> dict[str, list[float]]:
    from mm_moslora_eval.run.baselines import answer_without_model
    from mm_moslora_eval.run.scored_subsets import read_scored, task_of
    from mm_moslora_eval.scoring.answer_scoring import JUDGED

    task = task_of(view)
    if task is None or task.metric in JUDGED:
        return {}
    samples = read_scored(view)
    documents, clusters = [sample.document for sample in samples], [sample.cluster for sample in samples]
    if not any(document.answers for document in documents):
        return {}
    return {
        name: _brought(
            task.aggregation, answer_without_model(baseline, task, documents, clusters=clusters, training=training)
        )
        for baseline, name in _BASELINES.items()
    }


def _remarks(good: Sequence[tuple[int, Outcome]], views: Sequence[Mapping[str, Path]]) -> tuple[str, ...]:
    """Remarks on the answers, each once with the seeds that it holds for."""
    from mm_moslora_eval.run.scored_subsets import read_scored, task_of
    from mm_moslora_eval.scoring.score_remarks import answers_alike, wordy

    seeds: dict[str, list[int]] = {}
    for (seed, _), of_seed in zip(good, views, strict=True):
        if task_of(of_seed["own"]) is not None:
            answered = [sample for sample in read_scored(of_seed["own"]) if not sample.failed]
            for text in (*answers_alike(answered), *wordy(answered)):
                seeds.setdefault(text, []).append(seed)
    return tuple(f"seed{'s' * (len(s) > 1)} {', '.join(map(str, s))}: {text}" for text, s in seeds.items())


def columns_of(scores: Mapping[str, Any]) -> dict[str, list[str]]:
    """Columns of the tables: each task, and all of them together where there are several."""
    return {name: [name] for name in scores} | ({ALL: list(scores)} if len(scores) > 1 else {})


def as_difference(estimate: ArmEstimate, tasks: Sequence[TaskScores]) -> Difference:
    """An estimate in the form that verdicts take; graded scores need no least number of questions."""
    scores = [score for task in tasks for row in task.scores for score in row]
    most = 1.0 if all(abs(score) <= 1 for score in scores) else math.inf
    groups = None if any(score not in (-1.0, 0.0, 1.0) for score in scores) else estimate.fewest
    low, high = max(estimate.low, -most), min(estimate.high, most)
    return Difference(value=estimate.value, low=low, high=high, groups=groups)


def add_controls(arms: Sequence[dict[str, Any]], scores: Mapping[str, Mapping[str, TaskAnswers]]) -> None:
    """Add to each arm, by column, its differences from the controls."""
    # An arm is above its controls where it is above each of them: the p-value is the largest one (an intersection-union
    # test), corrected over the arms by Holm's procedure, since a comparison needs only one such arm.
    for arm in arms:
        arm["controls"] = {
            column: differences
            for column, tasks in columns_of(scores[arm["name"]]).items()
            if (differences := above_controls([scores[arm["name"]][task] for task in tasks], tasks))
        }
    for column in {column for arm in arms for column in arm["controls"]}:
        of_column = [arm["controls"][column] for arm in arms if column in arm["controls"]]
        for item, p in zip(of_column, holm([item["p"] for item in of_column]), strict=True):
            item["p_corrected"] = p
            item["above"] = item["above"] and p < SIGNIFICANT


def above_controls(answers: Sequence[TaskAnswers], tasks: Sequence[str]) -> dict[str, Any] | None:
    """An arm's differences from the controls that all tasks have, or None; picture controls need pictures."""
    rows, p_values, above = [], [], True
    for name in dict.fromkeys(name for one in answers for name in one.less):
        among = {t: a for t, a in zip(tasks, answers, strict=True) if a.pictures or name not in PICTURE_CONTROLS}
        if not among or not all(name in one.less for one in among.values()):
            continue
        estimate = arm_mean({task: one.less[name] for task, one in among.items()})
        difference = as_difference(estimate, [one.less[name] for one in among.values()])
        rows.append({"name": name, **difference.to_dict(), "p": estimate.p_value})
        p_values.append(estimate.p_value if estimate.value > 0 else 1.0)
        above = above and difference.shown == "more"
    if not rows:
        return None
    pictures = any(one.pictures for one in answers)
    complete = pictures_controlled(answers)
    return {"rows": rows, "p": max(p_values), "above": above, "pictures": pictures, "complete": complete}


def pictures_controlled(answers: Sequence[TaskAnswers]) -> bool:
    """Whether every task with pictures was also measured with blind and wrong pictures."""
    return all(name in one.less for one in answers if one.pictures for name in PICTURE_CONTROLS)
