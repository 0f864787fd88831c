"""Runs of shipped tasks on given answers, and the functions that their protocols call."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from mm_moslora_eval.backends.openai_endpoint import Endpoint, Usage
from mm_moslora_eval.protocol.grading import BY_PROMPT
from mm_moslora_eval.protocol.model_interface import Answer, OptionRequest, OptionScore, Request
from mm_moslora_eval.protocol.task import Source, Task
from mm_moslora_eval.protocol.task_prompt import WORDINGS, TaskPrompt
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run import answer_log, run_records, task_runner
from mm_moslora_eval.run.judging.judged_scores import GRADERS, grade_by_prompt, judged_extraction
from mm_moslora_eval.run.judging.llm_judge import Judge
from mm_moslora_eval.run.result_file import TaskResult, score_folder
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, METRICS
from mm_moslora_eval.scoring.rule_forms import JudgeRule
from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS
from mm_moslora_eval.sources.document import DataSet, Document

ONE = task_runner.EvaluationSettings(batch_size=64, rank=0, world_size=1)
COUNT, SAID = 24, "it got the colour"
"""Answers of a judged run, and what each says."""


class GivenAnswers:
    """A model with given answers, or given log-likelihoods of the options."""

    name = "given answers"
    fingerprint = "given"

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers
        self.asked: list[OptionRequest] = []

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        for index, request in enumerate(requests):
            yield index, Answer(text=self._answers[request.id], tokens=1, finish_reason="stop")

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        self.asked += requests
        for index, item in enumerate(requests):
            values = self._answers[item.request.id]
            yield index, tuple(OptionScore(logprob=float(value), tokens=1) for value in values)

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True)
class Run:
    """The files of a run of a shipped protocol."""

    result: TaskResult
    samples: list[dict[str, Any]]
    model: GivenAnswers

    @property
    def scores(self) -> list[Any]:
        return [sample["score"] for sample in self.samples]

    @property
    def parsed(self) -> list[str]:
        return [sample["parsed"] for sample in self.samples]


class Runs:
    """Runs shipped protocols, each in its own folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def folder(self) -> Path:
        """A new empty folder."""
        self._count += 1
        place = self._folder / str(self._count)
        place.mkdir()
        return place

    def __call__(
        self,
        name: str,
        documents: Sequence[Document],
        answers: Sequence[Any],
        *,
        judge: Callable[[str, float], str] | None = None,
    ) -> Run:
        """Run a task of the registry on documents with answers in place of a model, and score it.

        Args:
            name: TASK@PROTOCOL.
            documents: with ids of their own.
            answers: one per document: its text, or the log-likelihoods of its options.
            judge: (prompt, temperature) -> reply.
        """
        folder = self.folder()
        model = GivenAnswers({document.id: answer for document, answer in zip(documents, answers, strict=True)})
        data = DataSet(documents=tuple(documents), path="golden", sha256="0")
        with run_records.open_run(folder, model):
            place = task_runner.run_task(model, get_task(name), folder, settings=ONE, data=data)
        asked = None if judge is None else Judge(scripted(judge), cache=folder / "judge")
        result = score_folder(place, judge=asked)
        rows = (place / "samples.jsonl").read_text(encoding="utf-8").split("\n")
        return Run(result, [json.loads(row) for row in rows if row], model)


def answered(folder: Path, metric: str = "mmvet_judge", *, said: str = SAID, count: int = COUNT) -> Path:
    """A run with answers to a judged task, not scored yet; returns its view."""
    extraction = "mathvista" if metric == "mathvista" else "text"
    task = Task(
        name="judged", source=Source(kind="tsv", path="x.tsv"), metric=metric, extraction=extraction,
        aggregation="llavabench" if "llavabench" in metric else "mmvet" if "mmvet" in metric else "mean",
        prompt=TaskPrompt(template="{question}"),
    )  # fmt: skip
    documents = tuple(
        Document(id=str(n), question=f"Q{n}?", answers=("7",), category="rec", extra={"answer_type": "integer"})
        for n in range(count)
    )
    model = GivenAnswers({document.id: said for document in documents})
    with run_records.open_run(folder, model):
        return task_runner.run_task(
            model, task, folder, settings=ONE, data=DataSet(documents=documents, path="x", sha256="0")
        )


def judge_at(url: str, folder: Path, **options: Any) -> Judge:
    return Judge(Endpoint(url=url, model="j", attempts=2, first_wait=0.001), cache=folder / "judge", **options)


def scripted(reply: Callable[[str, float], str]) -> Endpoint:
    """An endpoint that answers without a network."""

    class Scripted:
        model, url, usage = "scripted", "none", Usage()

        def chat(self, payload: dict[str, Any]) -> dict[str, Any]:
            text = reply(payload["messages"][0]["content"], payload["temperature"])
            return {"choices": [{"message": {"content": text}}], "usage": {}}

    return cast(Endpoint, Scripted())


def functions_of(task: Task) -> dict[str, Callable[..., Any]]:
    """Every function of this package that the parts of a protocol can call, by `module.name`.

    Names in the code of a function are followed to what they stand for in its module; the tables of parts are not,
    since a protocol uses only the parts that it names.
    """
    tables = [id(table) for table in (EXTRACTORS, METRICS, AGGREGATIONS, GRADERS, WORDINGS)]
    waiting: list[Any] = list(_parts(task))
    found: dict[str, Callable[..., Any]] = {}
    seen: set[int] = set(tables)
    while waiting:
        item = waiting.pop()
        item = getattr(item, "__wrapped__", item)  # a function that keeps its results
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, partial):
            waiting += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, dict | JudgeRule):
            waiting += item.values() if isinstance(item, dict) else vars(item).values()
        elif isinstance(item, tuple | list):
            waiting += item
        elif isinstance(item, types.FunctionType) and item.__module__.startswith("mm_moslora_eval."):
            found[f"{item.__module__.rsplit('.', 1)[1]}.{item.__name__}"] = item
            waiting += _used_by(item)
        found |= _named_partials(item)
    return found


def _parts(task: Task) -> Iterator[Any]:
    yield EXTRACTORS[task.extraction]
    if task.metric == BY_PROMPT:
        assert task.grading is not None
        yield from (grade_by_prompt, METRICS[task.grading.rule or "exact"])
    else:
        yield METRICS[task.metric] if task.metric in METRICS else GRADERS[task.metric]
    yield AGGREGATIONS[task.aggregation]
    if found := judged_extraction(task.extraction):
        find, then = found
        yield from (find, EXTRACTORS[then])
    if task.prompt.function is not None:
        yield WORDINGS[task.prompt.function]
    if task.decoding.kind != "generate":
        yield answer_log.answer_row


def _used_by(function: types.FunctionType) -> Iterator[Any]:
    yield from (cell.cell_contents for cell in function.__closure__ or ())
    names = set(_names(function.__code__))
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType) and value.__name__.startswith("mm_moslora_eval."):
            yield from (getattr(value, other) for other in names if hasattr(value, other))
        else:
            yield value


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _named_partials(item: Any) -> dict[str, Callable[..., Any]]:
    """A partial of this package by its name in a module."""
    if not isinstance(item, partial):
        return {}
    modules = [module for name, module in sys.modules.items() if name.startswith("mm_moslora_eval.")]
    names = ((module, name) for module in modules for name, value in vars(module).items() if value is item)
    return {f"{module.__name__.rsplit('.', 1)[1]}.{name}": item for module, name in names}
