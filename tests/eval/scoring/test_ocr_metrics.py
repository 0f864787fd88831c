"""Scores of read text (OCRBench v2, CC-OCR), on hostile answers and without what they need."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.metrics.general.python_literals import mapping_in
from mm_moslora_eval.scoring.answer_scoring import score_answer
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.task_files.ocrbench_v2 import lexicons
from mm_moslora_eval.task_files.ocrbench_v2 import rules as ocrbench_v2
from mm_moslora_eval.task_files.ocrbench_v2.text_overlap import meteor

from mm_moslora.utils.errors import MissingRequirementError
from tests.eval.protocol_runs import Runs

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
