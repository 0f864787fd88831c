"""Scores of read text (OCRBench v2, CC-OCR), and every rule on hostile answers and without what it needs."""

from __future__ import annotations

import inspect
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.metrics.general import lexicons
from mm_moslora_eval.metrics.general.python_literals import mapping_in
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, METRICS, score_answer
from mm_moslora_eval.scoring.named_parts import NamedParts
from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS, OVER_SAMPLES
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.task_files.ocrbench_v2 import rules as ocrbench_v2
from mm_moslora_eval.task_files.ocrbench_v2.text_overlap import meteor

from mm_moslora.utils.errors import MissingRequirementError
from mm_moslora.utils.package_requirements import is_installed
from tests.eval.protocol_runs import Runs
from tests.eval.scored_samples import PARTS, fitting, samples

LONG = 1_000_000
TABLE = "<table><tr><td>a</td></tr></table>"


def asked(kind: str, reference: object, number: int = 0, question: str = "As HTML", **extra: str) -> Document:
    return Document(id=str(number), question=question, answers=(repr(reference),), category=kind, extra=extra)


def rated(answer: str, document: Document, metric: str = "ocrbench_v2") -> Scored:
    return score_answer(document, answer, extraction="unchanged", metric=f'{metric} {{"seconds": 30}}')


@pytest.mark.parametrize(
    ("answer", "kind", "reference", "extra"),
    [
        ("a" * LONG, "VQA with position en", ["a b c d e f"], {"bbox": "[0, 0, 9, 9]"}),
        ("[" + " " * LONG, "text spotting en", ["x"], {"bbox": "[[0, 0, 9, 9]]", "content": "['x']"}),
        ("(1,2,30,40,x)" * (LONG // 13), "text spotting en", ["x"], {"bbox": "[[0, 0, 9, 9]]", "content": "['x']"}),
        ("```\nx" * (LONG // 5), "key information extraction en", ['{"a": ["b"]}'], {}),
        ("{" * LONG, "chart parsing en", [{"a": "1"}], {}),
        ("-" * LONG + "1", "chart parsing en", [{"a": "1"}], {}),
        ("7" * LONG, "text counting en", ["5"], {"eval": "regression"}),
        ("# a\n" * (LONG // 4), "document parsing en", ["# a\nb"], {}),
        ("<body " * (LONG // 6), "table parsing cn", [TABLE], {}),
    ],
)
def test_a_reading_of_a_million_characters_is_scored_in_time(
    answer: str, kind: str, reference: object, extra: dict[str, str]
) -> None:
    scored = rated(answer, asked(kind, reference, **extra))
    assert scored.fault == ""
    assert scored.score < 0.1


@pytest.mark.parametrize(
    ("answer", "metric", "kind", "reference"),
    [
        ('{"a": "' + " " * LONG + '"}', "ccocr_fields_tree", "kie", '{"b": "c"}'),
        ("\\usepackage[" * (LONG // 12), "ccocr_document", "doc", "text"),
        ("<table>" + "<td>" * (LONG // 4), "ccocr_document", "table", TABLE),
    ],
)
def test_a_transcript_of_a_million_characters_is_scored_in_time(
    answer: str, metric: str, kind: str, reference: str
) -> None:
    document = Document(id="1", question="?", answers=(reference,), extra={"l2-category": kind, "split": "s"})
    assert rated(answer, document, metric).score < 0.1


def test_a_missing_lexicon_leaves_the_task_unscored_and_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean over the other capabilities would pass for the published number."""

    class Without:
        def value(self, compare: Any, *, seconds: float, answer: str, **question: Any) -> float:
            if question["kind"].startswith("full-page"):
                raise MissingRequirementError("METEOR needs nltk")
            return float(compare(answer=answer, **question))

    monkeypatch.setattr(ocrbench_v2, "PROCESS", Without())
    documents = [asked("math QA en", ["4"], 0), asked("full-page OCR en", ["a text"], 1)]
    runs = Runs(tmp_path)
    result = runs("ocrbench_v2_en@official", documents, ["4", "a text"]).result
    assert "METEOR needs nltk" in result.about["unscored"]
    assert math.isnan(result.score)
    assert not result.metrics
    assert (result.counts.scored, result.counts.faults) == (1, 1)
    assert runs("ocrbench_v2_en@official", documents[:1], ["4"]).result.score == 1.0


def test_installed_stems_synonyms_and_words() -> None:
    try:
        words = lexicons.lexicon()
    except MissingRequirementError as error:
        pytest.skip(str(error))
    assert meteor(["doctors"], ["physician"], stem=words.stem, synonyms=words.synonyms) == pytest.approx(0.5)
    assert list(words.words("今天天气很好")[0]) == ["今天天气", "很", "好"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('{"a": 1, "a": [2, "x"]}', {"a": "[2, 'x']"}),
        ("Sure:\n```json\n{'a': 'b'}\n```\nDone", {"a": "b"}),
        ("name: Ann, \"total\" = '3.50'\nempty:\n\n", {"name": "Ann", "total": "3.50"}),
        ("[1, 2]", {}), ("{1: 2}", {}), ("plain words", {}), ("(" * 500, {}), ("__import__('os')", {}),
    ],
)  # fmt: skip
def test_keys_and_values_of_an_answer(answer: str, found: dict[str, str]) -> None:
    assert mapping_in(answer) == found


def test_what_cannot_be_scored_is_counted() -> None:
    for document in (
        asked("new type en", ["x"]),
        asked("table parsing en", ["| a |"], question="As a picture"),
        asked("document parsing en", ["a", "b"]),
        asked("chart parsing en", ["no chart"]),
        Document(id="1", question="?", answers=("['a",), category="math QA en"),
    ):
        scored = rated(TABLE + "{'a': 1}", document)
        assert math.isnan(scored.score), document
        assert scored.fault


def test_documents_that_the_source_ignores_do_not_count(tmp_path: Path) -> None:
    documents = [asked("reasoning VQA cn", ["a"], 0), asked("text translation cn", [""], 1)]
    sum_up = ocrbench_v2.ocrbench_v2_capabilities
    samples = [
        Scored(document=document, text="", parsed="", score=1.0 - number) for number, document in enumerate(documents)
    ]
    assert sum_up(samples).metrics == {"knowledge_reasoning": 1.0, "reasoning VQA cn": 1.0}


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
