"""What an evaluation will take: documents, tokens, hours and cost. No model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from mm_moslora.utils.errors import EvalError, MoSLoRAError
from mm_moslora.utils.text_format import aligned
from mm_moslora_eval.protocol.few_shots import conversation, shots_for
from mm_moslora_eval.protocol.task import THINKING_TOKENS, Task
from mm_moslora_eval.run.answer_log import read_folder
from mm_moslora_eval.run.answer_views import answers_folder, views_below
from mm_moslora_eval.run.task_runner import EvaluationSettings, select
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.source_videos import WholeVideo, with_whole_videos

if TYPE_CHECKING:
    from mm_moslora_eval.report.prompt_tokens import PromptTokens

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
    """Frames of videos included."""
    prompt_tokens: int
    """Of all answers: of the texts alone, about, or counted with pictures by the model's own parts."""
    most_new_tokens: int
    """Of all answers, if each takes its whole budget; 0 where options are scored."""
    unasked: int = 0
    """Documents that cannot be asked; their tokens are not counted."""
    reason: str = ""
    """Of the first of them."""
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


def plan_task(task: Task, settings: EvaluationSettings, *, counter: PromptTokens | None = None) -> TaskPlan:
    """The plan of a task whose data are at hand, since nothing is fetched; else its documents as the task file has
    them, and the fault.

    Args:
        task: the protocol.
        settings: which documents are asked.
        counter: counts the tokens of prompts; None: by the characters of their texts.
    """
    decoding = task.within(settings.max_new_tokens).decoding
    try:
        data = task.load_cached()
        documents = select(data, settings)
    except MoSLoRAError as error:
        count = min(task.expected_count or 0, settings.limit or math.inf)
        return TaskPlan(
            name=task.id, documents=int(count), answers=int(count) * decoding.samples, pictures=0, prompt_tokens=0,
            most_new_tokens=0, fault=str(error),
        )  # fmt: skip
    tokens, pictures = 0.0, 0
    problems: list[str] = []
    for document in documents:
        try:
            shots = shots_for(task.prompt, document, data.shots)
            counted, shown = _prompt_of(task, document, shots, counter)
        except MoSLoRAError as error:  # a counted failure of the run
            problems.append(str(error))
            continue
        tokens += counted
        pictures += shown
    answers, generates = len(documents) * decoding.samples, decoding.kind == "generate"
    return TaskPlan(
        name=task.id, documents=len(documents), answers=answers, pictures=pictures * decoding.samples,
        prompt_tokens=int(tokens * decoding.samples),
        most_new_tokens=answers * decoding.max_new_tokens if generates else 0, unasked=len(problems),
        reason="".join(problems[:1]),
    )  # fmt: skip


def _prompt_of(
    task: Task, document: Document, shots: Sequence[Document], counter: PromptTokens | None
) -> tuple[float, int]:
    """Tokens and pictures of a prompt.

    Raises:
        MoSLoRAError: it cannot be asked.
    """
    if document.problem is not None:
        raise EvalError(document.problem)
    if counter is not None:
        document, *shots = (with_whole_videos(one, counter.videos) for one in (document, *shots))
        if document.problem is not None:
            raise EvalError(document.problem)
    messages = conversation(task.prompt, document, shots, reference=task.reference)
    images = [one.images[number] for one in (*shots, document) for number in task.prompt.image_order(one)]
    frames = sum(image.shape[0] if isinstance(image, WholeVideo) else 1 for image in images)
    if counter is None:
        return sum(len(message.text) for message in messages) / CHARACTERS_PER_TOKEN, frames
    if task.decoding.kind == "continuation":
        return counter.of_text(messages[-1].text), frames
    return counter.of_prompt(messages, images), frames


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
    plans: Sequence[TaskPlan], *, before: Measured | None, price: tuple[float, float] | None,
    picture_tokens: int | None, modes: int = 1,
) -> str:  # fmt: skip
    """The plan as a table, with what it rests on.

    Args:
        plans: of the tasks.
        before: an earlier run of this model; None: hours are unknown.
        price: of a million prompt tokens and of a million new tokens; None: no cost.
        picture_tokens: of one picture; None: the plans count them.
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
    counted = picture_tokens is None
    prompts = text + pictures * (picture_tokens or 0)
    head = ("task", "documents", "answers", "pictures", f"{'prompt' if counted else 'text'} tokens")
    lines = [*aligned((*head, "new tokens at most"), rows), ""]
    if counted:
        lines.append(f"Prompts: {prompts:,} tokens, counted by the model's tokenizer and processor, pictures included.")
    else:
        lines.append(
            f"Prompts: about {prompts:,} tokens, with {picture_tokens} for each of {pictures:,} pictures "
            f"(--picture-tokens) and {CHARACTERS_PER_TOKEN} characters of text for one. --model with a folder counts "
            "them."
        )
    lines.append(_hours(answers, before))
    if price is not None:
        cost = (price[0] * prompts + price[1] * new) / 1e6
        likely = "" if before is None else f", {_likely(price, prompts, answers, before):,.2f} "
        likely += "with answers as long as in that run" if likely else ""
        lines.append(f"Cost: at most {cost:,.2f}{likely}, at {price[0]:g} and {price[1]:g} for a million tokens.")
    lines += [f"{plan.name}: not counted but for its documents: {plan.fault}" for plan in plans if plan.fault]
    lines += [
        f"{plan.name}: {plan.unasked:,} documents cannot be asked, and their prompts are not counted (first: "
        f"{plan.reason})." for plan in plans if plan.unasked
    ]  # fmt: skip
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
