"""Answers that are made to hold up a run: every registered rule reads them in bounded time."""

from __future__ import annotations

import inspect
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, METRICS, score_answer
from mm_moslora_eval.scoring.named_parts import NamedParts
from mm_moslora_eval.scoring.repeated_answers import OVER_SAMPLES
from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document

from mm_moslora.utils.package_requirements import is_installed
from tests.eval.scoring.test_measured_scores import PARTS, fitting, samples

MOST = 400_000
"""Characters. Quadratic time would be hours, and in linear time a million takes two and a half times as long."""
DEEP = 10**5
SECONDS = 0.8
"""CPU time for one answer; the slowest rule takes less than a half of it."""
HOSTILE = {
    "letters": "a" * MOST,
    "the same words": "the answer is " * (MOST // 14),
    "open brackets": "[({" * (MOST // 3),
    "open tags": "<table>" + "<td>" * (MOST // 4),
    "open answers and comments": "<answer>" * (MOST // 16) + "<!--" * (MOST // 8),
    "half of an address": "a+" * (MOST // 2),
    "digits": "7" * MOST,
    "numbers": "1,000.5-" * (MOST // 8),
    "backslashes": "\\" * MOST,
    "open fractions": r"\boxed{\frac" * (MOST // 12),
    "lines": "x" + "\n" * MOST + "x",
    "NUL and half characters": "\x00\ud800" * (MOST // 2),
    "nested JSON": "[" * DEEP + "]" * DEEP + '{"a":' * DEEP + "}" * DEEP,
    "nested HTML": "<table><tr><td>" + "<div>" * DEEP + "</div>" * DEEP,
    "right to left, with marks": "\u202e\u05d0\u0301" * (MOST // 3),
    "empty": "",
}  # fmt: skip
CHOICE = Document(
    id="1", question="?", options={"A": "red", "B": "blue"}, answers=("A",), category="x",
    extra={"question_type": "multi_choice"},
)  # fmt: skip
REFERENCES = (
    "the red cat", "12.5", "[1, 2, 30, 40]", "<table><tr><td>1</td></tr></table>", '{"a": "b"}',
)  # fmt: skip
"""References, of which every metric reads one."""


class TooLongError(BaseException):  # an Exception would be counted as the fault of a rule
    """The time for an answer has passed."""


@contextmanager
def bounded() -> Iterator[None]:
    """End what takes more CPU time than an answer may."""

    def end(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def rules(parts: NamedParts[Any]) -> list[str]:
    """All of a table; those in a process of their own with little time."""
    found = []
    for name in parts:
        known = inspect.signature(parts.find(name)).parameters
        options = {"seconds": 1, "version": "1.5"}
        given = json.dumps({key: value for key, value in options.items() if key in known})
        found.append(name if given == "{}" else f"{name} {given}")
    return found


def open_question(metric: str) -> Document:
    """A question with a reference that the metric reads."""
    for reference in REFERENCES:
        document = Document(id="1", question="?", answers=(reference,) * 3, category="x")
        if not score_answer(document, "no answer", extraction="text", metric=metric).fault:
            return document
    raise AssertionError(f"{metric} reads none of the references: add one")


def too_slow(name: str, read: Callable[[str], Scored]) -> list[str]:
    """The answers that a rule does not read in time, or without a fault."""
    found = []
    for kind, answer in HOSTILE.items():
        try:
            with bounded():
                fault = read(answer).fault
        except TooLongError:
            fault = f"more than {SECONDS} seconds"
        # What takes too long in a process of its own is counted, and that is the rule's documented way.
        if fault and "seconds" not in name:
            found.append(f"{name}, {kind}: {fault}")
    return found


def test_every_extraction_reads_hostile_answers_in_time() -> None:
    found = []
    for name in rules(EXTRACTORS):
        found += too_slow(name, partial(score_answer, CHOICE, extraction=name, metric="equal"))
    assert not found


def test_every_metric_reads_hostile_answers_in_time() -> None:
    found = []
    for name in rules(METRICS):
        if name.startswith("mathematics") and not is_installed("math_verify"):
            continue
        if name.startswith(("ocrbench_v2", "ccocr_document")):  # by kinds: they have own tests
            continue
        found += too_slow(name, partial(score_answer, open_question(name), extraction="text", metric=name))
    assert not found


@pytest.mark.parametrize("name", PARTS)
def test_every_aggregation_sums_up_hostile_answers_in_time(name: str) -> None:
    plain = fitting(name, samples([1.0, 0.0] * 8, pictures=8))
    for kind, text in HOSTILE.items():
        part = text[: MOST // 10]  # captions are cut into tokens, of which one may be one character
        try:
            with bounded():
                found = AGGREGATIONS[name]([replace(plain[0], text=part, parsed=part), *plain[1:]])
        except TooLongError:
            pytest.fail(f"{kind}: more than {SECONDS} seconds")
        assert found.ratios


@pytest.mark.parametrize("name", [{"pass_at": 'pass_at {"k": 2}'}.get(name, name) for name in OVER_SAMPLES])
def test_several_hostile_answers_come_to_one(name: str) -> None:
    plain = samples([1.0, 0.0] * 8, pictures=8)
    with bounded():
        one = OVER_SAMPLES[name](
            [replace(one, parsed=text) for one, text in zip(plain, HOSTILE.values(), strict=False)]
        )
    assert 0 <= one.score <= 1
