"""How a judge grades the answers to a task: the prompt of the task file, and the only forms of a reply that count."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_object
from mm_moslora_eval.metrics.metric_text import plain_number
from mm_moslora_eval.protocol.task_prompt import fill
from mm_moslora_eval.sources.document import Document

BY_PROMPT = "judge"
"""Metric of a task whose judge is asked by the prompt of the task file."""
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.S)


@dataclass(frozen=True, kw_only=True)
class Grading:
    """The judge's prompt of a task with `metric: judge`, and how its replies are read.

    A reply that has another form is no grade; it is asked for again, and then counted.
    """

    prompt: str
    """Names fields in braces: `response`, the answer to grade; `question`, `reference` (the most frequent one),
    `references` (all, joined by `; `), `options`, `category`, `hint`, or a further column of the data."""
    replies: dict[str, float] = field(default_factory=dict)
    """Reply -> grade, 0 to 1; case and a closing period do not matter."""
    scale: tuple[float, ...] = ()
    """Without `replies`: the worst and the best number of a reply that is a number alone."""
    json_key: str = ""
    """The reply is a JSON object, which holds the grade under this key; empty: the reply is the grade."""
    max_tokens: int = 16
    """Longest reply, without the judge's thinking."""
    rule: str = ""
    """A metric that scores the extracted answers without a judge, for a second number; empty: none is meaningful."""
    check: str = ""
    """File of graded answers, beside the task file; see `judged_scores`. Empty: none."""

    def __post_init__(self) -> None:
        if "{response}" not in self.prompt:
            raise EvalError("grading.prompt has no {response}: the judge would not see the answer.")
        if bool(self.replies) == bool(self.scale):
            raise EvalError("grading needs either replies (a word for each grade) or scale (worst and best number).")
        if self.scale and (len(self.scale) != 2 or self.scale[0] == self.scale[1]):
            raise EvalError(f"grading.scale is {[*self.scale]}, expected the worst and best number, such as [0, 10].")
        if wrong := {reply: grade for reply, grade in self.replies.items() if not 0 <= grade <= 1}:
            raise EvalError(f"grading.replies gives {wrong}, expected grades from 0 to 1.")
        if len({_plain(reply) for reply in self.replies}) < len(self.replies):
            raise EvalError(f"grading.replies has words that differ in case alone: {', '.join(self.replies)}.")
        if self.max_tokens < 1:
            raise EvalError(f"grading.max_tokens is {self.max_tokens}, expected 1 or more.")

    def text(self, document: Document, response: str) -> str:
        """The judge's prompt for an answer."""
        fields = {
            **document.extra, "question": document.question, "reference": document.reference,
            "references": "; ".join(document.answers), "category": document.category or "",
            "hint": document.hint or "", "response": response,
            "options": "\n".join(f"{letter}. {text}" for letter, text in document.options.items()),
        }  # fmt: skip
        return fill(self.prompt, fields, missing=f"document {document.id!r}, in grading.prompt")

    def read(self, reply: str) -> float | None:
        """The grade of a reply, 0 to 1; None if it has another form than asked for."""
        if self.json_key:
            fenced = _FENCE.fullmatch(reply.strip())
            try:
                value: Any = parse_object(fenced[1] if fenced else reply.strip()).get(self.json_key)
            except StrictJsonError:
                return None
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                return None
            reply = str(value)
        if self.replies:
            return self._grades.get(_plain(reply))
        number = plain_number(reply)
        worst, best = self.scale
        if number is None or not min(worst, best) <= number <= max(worst, best):
            return None
        return (number - worst) / (best - worst)

    @property
    def _grades(self) -> Mapping[str, float]:
        return {_plain(reply): grade for reply, grade in self.replies.items()}


def _plain(reply: str) -> str:
    return reply.strip().removesuffix(".").casefold()
