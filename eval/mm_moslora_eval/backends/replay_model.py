"""Stored answers behind the runner's `Model` protocol, to score the output of another program."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.identity import sha256_of_bytes
from mm_moslora.utils.untrusted_files import MOST_BYTES, read_bytes
from mm_moslora_eval.backends.stored_answers import ReplayedAnswer, read_answers
from mm_moslora_eval.protocol.model_interface import Answer, OptionRequest, OptionScore, Request

logger = logging.getLogger(__name__)


class ReplayModel:
    """Answers by document id; where several answers share an id, by their prompt."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise EvalError(f"{path} is missing; replay needs a file with stored answers.")
        data = read_bytes(path, most=MOST_BYTES)
        self._path, self.name, self.fingerprint = path, f"replay of {path}", sha256_of_bytes(data)
        self._by_column: dict[str, dict[str, list[ReplayedAnswer]]] = defaultdict(lambda: defaultdict(list))
        self._unlike = ""
        """A question with different answers, of which only a protocol with drawn answers takes several."""
        texts: dict[Any, str | None] = {}
        for answer in read_answers(path, data):
            question = (tuple(answer.names.items()), answer.prompt)
            if texts.setdefault(question, answer.text) != answer.text:
                self._unlike = self._unlike or next(iter(answer.names.values()))
            for column, name in answer.names.items():
                self._by_column[column][name].append(answer)
        self._column: str | None = None
        self._asked: set[str] = set()
        """Ids of the answers that were looked up."""

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """Look the answers up; the first missing answer ends the generator with an error."""
        self._choose_column(requests)
        for index, request in enumerate(requests):
            stored = self._stored(request)
            if stored.text is None:
                fault = stored.fault or f"a failure: {stored.row.get('error')}"
                raise RuntimeError(f"the stored answer to {request.id!r} is {fault}")
            cut = stored.row.get("finish_reason") == "length"
            tokens = stored.row.get("tokens")
            yield (
                index,
                Answer(
                    text=stored.text,
                    tokens=tokens if isinstance(tokens, int) else 0,
                    finish_reason="length" if cut else "stop",
                ),
            )

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """Look the option scores up."""
        self._choose_column([item.request for item in requests])
        for index, item in enumerate(requests):
            row = self._stored(item.request).row
            stored: Any = row.get("options") if isinstance(row.get("options"), dict) else row.get("logprobs")
            logprobs: list[Any] = [stored.get(option) if isinstance(stored, dict) else None for option in item.options]
            if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in logprobs):
                raise RuntimeError(f"no stored log-likelihood for every option of {item.request.id!r}")
            yield index, tuple(OptionScore(logprob=float(value), tokens=0) for value in logprobs)

    def close(self) -> None:
        """Name the answers that nobody asked for; where all were there already, no question was put."""
        stored = set(self._by_column[self._column or "id"])
        left = sorted(stored - self._asked)
        if self._asked and left:
            logger.warning(
                "%s: %d of %d answers belong to no question that was put: %s is %s.",
                self._path, len(left), len(stored), self._column, ", ".join(map(repr, left[:5])),
            )  # fmt: skip

    def _choose_column(self, requests: Sequence[Request]) -> None:
        """Choose the id column once for the whole file: the column that identifies most questions."""
        if self._unlike and any(request.draw is None for request in requests):
            raise EvalError(f"{self._path} holds two different answers to {self._unlike!r}; keep one.")
        if self._column is None and requests:
            self._column = max(
                self._by_column,
                key=lambda column: sum(
                    any(name in self._by_column[column] for name in _names(request)) for request in requests
                ),
                default="id",
            )

    def _stored(self, request: Request) -> ReplayedAnswer:
        rows = self._by_column[self._column or "id"]
        name = next((name for name in _names(request) if name in rows), None)
        answers = [] if name is None else rows[name]
        self._asked.add(name or "")
        if request.draw is not None:
            if request.sample >= len(answers):
                raise RuntimeError(
                    f"{self._path} holds {len(answers)} answers to {request.id!r}, and one more is asked for"
                )
            return answers[request.sample]
        if len({answer.text for answer in answers}) > 1:  # LLaVA's MME: two questions on a picture share its name
            answers = _with_prompt(answers, request)
        if not answers:
            raise RuntimeError(f"{self._path} holds no answer to {request.id!r}")
        if len({answer.text for answer in answers}) > 1:
            raise RuntimeError(f"{self._path} holds {len(answers)} answers to {request.id!r} and its prompt")
        return answers[0]


def _names(request: Request) -> tuple[str, ...]:
    """Ids of a question; programs that keep numbers as floats write `1.0` for `1`."""
    names = (request.id, *request.aliases)
    return (*names, *(f"{name}.0" for name in names if name.isdecimal()))


def _with_prompt(answers: Sequence[ReplayedAnswer], request: Request) -> list[ReplayedAnswer]:
    """The rows with the request's prompt, or else with its question, ignoring the instruction after it."""
    prompt = request.messages[-1].text
    for reading in (_flat, _question):
        same = [answer for answer in answers if answer.prompt is not None and reading(answer.prompt) == reading(prompt)]
        if same:
            return same
    return []


def _flat(text: str) -> str:
    return " ".join(text.replace("<image>", " ").split())


def _question(text: str) -> str:
    """Up to the first question mark, or the first line."""
    text = text.replace("<image>", " ").strip()
    question, mark, _ = text.partition("?")
    return " ".join(question.split()) if mark else _flat(text.split("\n")[0])
