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
from mm_moslora_eval.backends.endpoints.parallel_calls import Prices
from mm_moslora_eval.protocol.task import THINKING_TOKENS, Task
from mm_moslora_eval.run.answer_log import read_folder
from mm_moslora_eval.run.evaluate_suite import shown_as_trained
from mm_moslora_eval.run.scored_subsets import views_below
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.score_remarks import kind_of
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.source_videos import WholeVideo, with_whole_videos

if TYPE_CHECKING:
    from mm_moslora_eval.report.prompt_tokens import PromptTokens

BYTES_PER_TOKEN = 4
"""Of UTF-8: four Latin letters, one to two Chinese characters."""
PICTURE_TOKENS = 576
"""Of LLaVA-1.5."""


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """What one task takes in one image mode."""

    name: str
    documents: int
    """0: unknown, because the data are not at hand and the task file does not say."""
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
    """Why its data cannot be read; then pictures and prompts are not known."""


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
    them, and the fault."""
    task = task if counter is None else shown_as_trained(task, counter)
    decoding = task.within(settings.max_new_tokens, thinking_tokens=counter.thinking_tokens if counter else 0).decoding
    most = decoding.max_new_tokens * decoding.samples if decoding.kind == "generate" else 0
    try:
        data = task.load_cached()
        documents = settings.select(data, aggregation=task.aggregation)
    except MoSLoRAError as error:
        count = min(task.expected_count or 0, settings.limit or math.inf)
        return TaskPlan(
            name=task.id, documents=int(count), answers=int(count) * decoding.samples, pictures=0, prompt_tokens=0,
            most_new_tokens=int(count) * most, fault=str(error),
        )  # fmt: skip
    tokens, pictures = 0.0, 0
    problems: list[str] = []
    for document in documents:
        try:
            counted, shown = _prompt_of(task, document, counter)
        except MoSLoRAError as error:  # a counted failure of the run
            problems.append(str(error))
            continue
        tokens += counted
        pictures += shown
    return TaskPlan(
        name=task.id, documents=len(documents), answers=len(documents) * decoding.samples,
        pictures=pictures * decoding.samples, prompt_tokens=int(tokens * decoding.samples),
        most_new_tokens=len(documents) * most, unasked=len(problems),
        reason="".join(problems[:1]),
    )  # fmt: skip


def _prompt_of(task: Task, document: Document, counter: PromptTokens | None) -> tuple[float, int]:
    """Tokens and pictures of a prompt."""
    if document.problem is not None:
        raise EvalError(document.problem)
    if counter is not None:
        document = with_whole_videos(document, counter.videos)
        if document.problem is not None:
            raise EvalError(document.problem)
    messages = task.prompt.messages(document)
    images = [document.images[number] for number in task.prompt.image_order(document)]
    frames = sum(image.shape[0] if isinstance(image, WholeVideo) else 1 for image in images)
    if counter is None:
        return sum(len(message.text.encode("utf-8", "replace")) for message in messages) / BYTES_PER_TOKEN, frames
    return counter.of_prompt(messages, images), frames


def measured(run: Path) -> Measured:
    """Seconds and tokens of an answer in a run folder."""
    folders = dict.fromkeys(view.parent for view in views_below(run))
    rows = [row for folder in folders for row in read_folder(folder).values()]
    timed = [row for row in rows if isinstance(row.get("seconds"), int | float) and row.get("error") is None]
    if not timed:
        raise EvalError(f"{run} holds no answers with their time; give the folder of an evaluation with this model.")
    return Measured(
        seconds=fmean(row["seconds"] for row in timed), tokens=fmean(row["tokens"] or 0 for row in timed),
        answers=len(timed),
    )  # fmt: skip


def plan_text(
    plans: Sequence[TaskPlan], *, before: Measured | None, price: Prices | None,
    picture_tokens: int | None, modes: int = 1,
) -> str:  # fmt: skip
    """The plan as a table, with what it rests on."""
    rows = []
    for plan in plans:
        numbers = [plan.documents, *(modes * one for one in (plan.answers, plan.pictures, plan.prompt_tokens))]
        shown = [f"{number:,}" for number in (*numbers, modes * plan.most_new_tokens)]
        if plan.fault:
            shown[2:4] = "??"
        rows.append((plan.name, *(shown if plan.documents else "?????")))
    answers = modes * sum(plan.answers for plan in plans)
    pictures = modes * sum(plan.pictures for plan in plans)
    prompts = modes * sum(plan.prompt_tokens for plan in plans) + pictures * (picture_tokens or 0)
    new = modes * sum(plan.most_new_tokens for plan in plans)
    counted, unknown = picture_tokens is None, sum(bool(plan.fault) for plan in plans)
    head = ("task", "documents", "answers", "pictures", f"{'prompt' if counted else 'text'} tokens")
    lines = [*aligned((*head, "new tokens at most"), rows), ""]
    if unknown == len(plans):
        lines.append("Prompts: unknown.")
    elif counted:
        lines.append(f"Prompts: {prompts:,} tokens, counted by the model's tokenizer and processor, pictures included.")
    else:
        lines.append(
            f"Prompts: about {prompts:,} tokens, with {picture_tokens} for each of {pictures:,} pictures "
            f"(--image-tokens) and {BYTES_PER_TOKEN} bytes of text for one. --model with a folder counts them."
        )
    uncounted = sum(not plan.documents for plan in plans)
    if 0 < unknown < len(plans):
        lines[-1] += f" Those of {unknown} of {len(plans)} tasks are unknown."
    lines.append(_hours(answers, before))
    if price is not None:
        known = price.cost(prompt=prompts, completion=new)
        cost = f"{'at most' if counted else 'about'} {known:,.2f}{'' if counted else ' with the longest answers'}"
        if unknown:
            cost = f"unknown, since prompts are; new tokens alone at most {price.cost(prompt=0, completion=new):,.2f}"
            cost += f" but for {uncounted} tasks of which the number of documents is unknown" if uncounted else ""
        elif before is not None:
            likely = price.cost(prompt=prompts, completion=round(answers * before.tokens))
            cost += f", {likely:,.2f} with answers as long as in that run"
        lines.append(f"Cost: {cost}, at {price.prompt:g}/{price.completion:g} for a million tokens, without a judge's.")
    for faults in _alike([plan for plan in plans if plan.fault]):
        more = f" and of {len(faults) - 1} more" if len(faults) > 1 else ""
        lines.append(f"The prompts of {faults[0].name}{more} are unknown: {faults[0].fault}")
    lines += [
        f"{plan.name}: {plan.unasked:,} documents cannot be asked, and their prompts are not counted (first: "
        f"{plan.reason})." for plan in plans if plan.unasked
    ]  # fmt: skip
    if new and not counted:
        lines.append(f"A model that is asked to think gets at least {THINKING_TOKENS} new tokens for an answer.")
    return "\n".join(lines)


def _alike(plans: Sequence[TaskPlan]) -> list[list[TaskPlan]]:
    """Plans whose faults differ only in names are together."""
    kinds: dict[str, list[TaskPlan]] = {}
    for plan in plans:
        kinds.setdefault(kind_of(plan.fault), []).append(plan)
    return [*kinds.values()]


def _hours(answers: int, before: Measured | None) -> str:
    if before is None:
        return "Hours: unknown. Give --measured RUN, an evaluation of some documents with this model."
    hours = answers * before.seconds / 3600
    return (
        f"Hours: {hours:.2f}, if every answer takes the {before.seconds:.3g} seconds of the {before.answers:,} answers "
        f"of that run, which had {before.tokens:.0f} new tokens each."
    )
