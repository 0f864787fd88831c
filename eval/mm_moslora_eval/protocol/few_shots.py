"""Solved questions before the question that is asked (few-shot), with their pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.untrusted_data import build_strictly
from mm_moslora_eval import sources
from mm_moslora_eval.protocol.model_interface import Message
from mm_moslora_eval.protocol.task_prompt import TaskPrompt
from mm_moslora_eval.sources.document import DataSet, Document, digest
from mm_moslora_eval.sources.source import Source


def with_pool(data: DataSet, prompt: TaskPrompt, source: Source, *, beside: Path | None) -> DataSet:
    """A task's data with those from which its shots are taken, if it has any.

    Args:
        data: of `source`.
        prompt: says how many shots, and from which data.
        source: of the task.
        beside: the folder of its file.

    Raises:
        EvalError: `prompt.shots_from` names data that cannot be read, or there are too few questions.
        ConfigError: a key of it is unknown.
    """
    if not prompt.shots:
        return data
    pool = data
    if changes := prompt.shots_from:
        whole = asdict(source) | ({"md5": None} if "path" in changes else {}) | changes
        pool = sources.load(build_strictly(Source, whole, source="prompt.shots_from"), beside=beside)
    shots_for(prompt, data.documents[0], pool.documents)  # too few are an error before a model is loaded
    return replace(data, shots=pool.documents, shots_from=pool.to_dict())


def shots_for(prompt: TaskPrompt, document: Document, pool: Sequence[Document]) -> tuple[Document, ...]:
    """The solved questions for a document, which is never among them.

    Args:
        prompt: says how many, and how they are chosen.
        document: to be asked.
        pool: questions with answers; those that cannot be asked are passed over.

    Raises:
        EvalError: the pool has too few.
    """
    if not prompt.shots:
        return ()
    order: Sequence[int] = range(len(pool))
    if prompt.shot_order == "seeded":
        chance = random.Random(digest([prompt.shot_seed, document.id]))
        order = chance.sample(order, len(pool))
    chosen: list[Document] = []
    for other in (pool[index] for index in order):
        if other.answers and other.problem is None and not _same(other, document, own_data=not prompt.shots_from):
            chosen.append(other)
            if len(chosen) == prompt.shots:
                return tuple(chosen)
    raise EvalError(
        f"prompt.shots is {prompt.shots}, but there are only {len(chosen)} other questions with an answer for "
        f"{document.id!r}. Ask for fewer, or name more data with prompt.shots_from."
    )


def _same(other: Document, document: Document, *, own_data: bool) -> bool:
    """Whether a question is that which is asked, as with its options in another order (MMBench's rotations)."""
    if own_data and other.id == document.id:
        return True
    if " ".join(other.question.split()) != " ".join(document.question.split()):
        return False
    if other.images == document.images != ():
        return True
    offered = sorted(other.options.values()) == sorted(document.options.values())
    return offered and _answered(other) == _answered(document)


def _answered(document: Document) -> set[str]:
    """What the references say, not the letters that stand for it."""
    return {document.options.get(answer, answer) for answer in document.answers}


def conversation(
    prompt: TaskPrompt, document: Document, shots: Sequence[Document], *, reference: str
) -> tuple[Message, ...]:
    """The messages that ask a document, after those of its shots.

    Args:
        prompt: of the task.
        document: to be asked.
        shots: solved questions.
        reference: their answers, with `{answer}` in the place of the reference.

    Raises:
        EvalError: see `TaskPrompt.messages`.
    """
    *before, question = prompt.messages(document)
    for shot in shots:
        answer = Message(role="assistant", content=(reference.replace("{answer}", shot.reference),))
        before += [prompt.messages(shot)[-1], answer]
    return (*before, question)
