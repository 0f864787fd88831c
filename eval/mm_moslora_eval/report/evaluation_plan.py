"""What an evaluation will take: documents, tokens, hours and cost. No model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from mm_moslora.utils.errors import EvalError, MoSLoRAError
from mm_moslora.utils.text_format import aligned
from mm_moslora_eval.protocol.few_shots import conversation, shots_for
from mm_moslora_eval.protocol.task import THINKING_TOKENS, Task
from mm_moslora_eval.run.answer_log import read_folder
from mm_moslora_eval.run.answer_views import answers_folder, views_below
from mm_moslora_eval.run.task_runner import EvaluationSettings, select

CHARACTERS_PER_TOKEN = 4
PICTURE_TOKENS = 576
"""Of LLaVA-1.5."""


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """What one task takes in one image mode."""

    name: str
    documents: int
    answers: int
    pictures: int
    prompt_tokens: int
    """Of the texts of all answers, about."""
    most_new_tokens: int
    """Of all answers, if each takes its whole budget; 0 where options are scored."""
    fault: str = ""
    """Why its data cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an earlier run took."""

    seconds: float
    """For an answer."""
    tokens: float
    """New ones of an answer."""
    answers: int


def plan_task(task: Task, settings: EvaluationSettings) -> TaskPlan:
    """The plan of a task whose data are at hand, since nothing is fetched; else its documents as the task file has
    them, and the fault."""
    decoding = task.within(settings.max_new_tokens).decoding
    try:
        data = task.load_cached()
        documents = select(data, settings, aggregation=task.aggregation)
    except MoSLoRAError as error:
        count = min(task.expected_count or 0, settings.limit or math.inf)
        return TaskPlan(
            name=task.id, documents=int(count), answers=int(count) * decoding.samples, pictures=0, prompt_tokens=0,
            most_new_tokens=0, fault=str(error),
        )  # fmt: skip
    characters = pictures = 0
    for document in documents:
        if document.problem is not None:
            continue
        try:
            shots = shots_for(task.prompt, document, data.shots)
            messages = conversation(task.prompt, document, shots, reference=task.reference)
        except EvalError:  # a counted failure of the run
            continue
        characters += sum(len(message.text) for message in messages)
        pictures += sum(len(shown.images) for shown in (*shots, document))
    answers, generates = len(documents) * decoding.samples, decoding.kind == "generate"
    return TaskPlan(
        name=task.id, documents=len(documents), answers=answers, pictures=pictures * decoding.samples,
        prompt_tokens=characters * decoding.samples // CHARACTERS_PER_TOKEN,
        most_new_tokens=answers * decoding.max_new_tokens if generates else 0,
    )  # fmt: skip


def measured(run: Path) -> Measured:
    """Seconds and tokens of an answer in a run folder.

    Raises:
        EvalError: it holds no answers with a time.
    """
    folders = dict.fromkeys(answers_folder(view) for view in views_below(run))
    rows = [row for folder in folders for row in read_folder(folder).values()]
    timed = [row for row in rows if isinstance(row.get("seconds"), int | float) and row.get("error") is None]
    if not timed:
        raise EvalError(f"{run} holds no answers with their time; give the folder of an evaluation with this model.")
    return Measured(
        seconds=fmean(row["seconds"] for row in timed), tokens=fmean(row["tokens"] or 0 for row in timed),
        answers=len(timed),
    )  # fmt: skip


def plan_text(
    plans: Sequence[TaskPlan], *, before: Measured | None, price: tuple[float, float] | None, picture_tokens: int,
    modes: int = 1,
) -> str:  # fmt: skip
    """The plan as a table, with what it rests on.

    Args:
        plans: of the tasks.
        before: an earlier run of this model; None: hours are unknown.
        price: of a million prompt tokens and of a million new tokens; None: no cost.
        picture_tokens: of one picture.
        modes: image modes, each of which asks everything.
    """
    rows = []
    for plan in plans:
        numbers = (plan.documents, plan.answers, plan.pictures, plan.prompt_tokens, plan.most_new_tokens)
        rows.append((plan.name, *(f"{number * (modes if index else 1):,}" for index, number in enumerate(numbers))))
    answers = modes * sum(plan.answers for plan in plans)
    pictures = modes * sum(plan.pictures for plan in plans)
    text = modes * sum(plan.prompt_tokens for plan in plans)
    new = modes * sum(plan.most_new_tokens for plan in plans)
    lines = aligned(("task", "documents", "answers", "pictures", "text tokens", "new tokens at most"), rows)
    lines += ["", f"Prompts: about {text + pictures * picture_tokens:,} tokens, with {picture_tokens} for each of "]
    lines[-1] += f"{pictures:,} pictures (--picture-tokens) and {CHARACTERS_PER_TOKEN} characters of text for one."
    lines.append(_hours(answers, before))
    if price is not None:
        cost = (price[0] * (text + pictures * picture_tokens) + price[1] * new) / 1e6
        likely = (
            "" if before is None else f", {_likely(price, text + pictures * picture_tokens, answers, before):,.2f} "
        )
        likely += "with answers as long as in that run" if likely else ""
        lines.append(f"Cost: at most {cost:,.2f}{likely}, at {price[0]:g} and {price[1]:g} for a million tokens.")
    lines += [f"{plan.name}: not counted but for its documents: {plan.fault}" for plan in plans if plan.fault]
    if new:
        lines.append(f"A model that is asked to think gets at least {THINKING_TOKENS} new tokens for an answer.")
    return "\n".join(lines)


def _likely(price: tuple[float, float], prompt: int, answers: int, before: Measured) -> float:
    return (price[0] * prompt + price[1] * answers * before.tokens) / 1e6


def _hours(answers: int, before: Measured | None) -> str:
    if before is None:
        return "Hours: unknown. Give --measured RUN, an evaluation of some documents with this model."
    hours = answers * before.seconds / 3600
    return (
        f"Hours: {hours:.2f}, if every answer takes the {before.seconds:.3g} seconds of the {before.answers:,} answers "
        f"of that run, which had {before.tokens:.0f} new tokens each."
    )
