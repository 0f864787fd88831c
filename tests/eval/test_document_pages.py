"""OmniDocBench: pages of Markdown, from the files to the scores; hostile answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mm_moslora_eval.metrics.documents import markdown_blocks
from mm_moslora_eval.metrics.documents.omnidocbench import page_numbers
from mm_moslora_eval.protocol.miniature_benchmarks import make_miniature
from mm_moslora_eval.protocol.task_registry import get_task, load_file
from mm_moslora_eval.run.result_file import read_results, summarise
from mm_moslora_eval.scoring.score_aggregation import summed
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources import Source, load
from mm_moslora_eval.sources.document import Document

from mm_moslora import cli
from mm_moslora.utils.errors import EvalError
from tests.eval.protocol_runs import Runs


def page(*items: dict[str, Any], name: str = "p.png", **attributes: str) -> dict[str, Any]:
    numbered = [{"anno_id": number, "order": number, **item} for number, item in enumerate(items, start=1)]
    return {"layout_dets": numbered, "page_info": {"image_path": name, "page_attribute": attributes}}


def text(words: str, kind: str = "text_block") -> dict[str, Any]:
    return {"category_type": kind, "text": words}


TABLE = "<table><tr><td>a</td><td>b</td></tr></table>"
FULL = page(
    text("# A title", "title"), text("One two three four five six."), text("Seven eight nine ten eleven."),
    {"category_type": "table", "html": TABLE, "latex": "a & b"},
    {"category_type": "equation_isolated", "latex": "\\[x=1\\]"},
    language="english", data_source="book", layout="single_column",
)  # fmt: skip
RIGHT = f"# A title\n\nOne two three four five six.\n\nSeven eight nine ten eleven.\n\n{TABLE}\n\n$$x=1$$"


def shares(annotation: dict[str, Any], answer: str, *, old: bool = False, match: str = "quick") -> dict[str, float]:
    numbers = page_numbers(annotation, answer, old=old, match=match)
    edits = {name: numbers[name][0] / numbers[name][1] for name in ("text", "formula", "table", "order")}
    return edits | {"teds": numbers["teds"][0]}


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, set()),
        ({"five six.\n\nSeven": "five six.\nSeven"}, set()),  # two paragraphs in one
        ({"three four": "three\n\nfour"}, set()),  # one paragraph in two
        ({TABLE: "| a | b |\n|---|---|"}, {"table", "teds"}),  # the source gives each of its cells both spans
        ({TABLE: ""}, {"table", "teds"}),
        ({TABLE: "\\begin{tabular}{ll} a & b \\end{tabular}"}, {"table", "teds"}),
        ({"$$x=1$$": "\\[ x = 1 \\tag{2} \\]"}, set()),
        ({"$$x=1$$": "$$x=2$$"}, {"formula"}),
        ({"# A title": "![x](y.png)\n\n# A title"}, set()),
    ],
)
def test_what_is_compared(changes: dict[str, str], wrong: set[str], *, old: bool) -> None:
    answer = RIGHT
    for before, after in changes.items():
        answer = answer.replace(before, after)
    found = shares(FULL, answer, old=old)
    assert {name for name, share in found.items() if share != (name == "teds")} <= wrong
    if "teds" in wrong and "|" not in answer:
        assert found["teds"] == 0
        assert found["table"] == 1


def test_texts_in_another_order() -> None:
    parts = RIGHT.split("\n\n")
    found = shares(FULL, "\n\n".join([parts[2], parts[0], parts[1], *parts[3:]]))
    assert found["text"] == 0 < found["order"]


def test_the_ways_of_version_1() -> None:
    joined = RIGHT.replace("five six.\n\nSeven", "five six.\nSeven")
    assert shares(FULL, RIGHT, old=True, match="simple")["text"] == 0
    assert shares(FULL, joined, old=True, match="simple")["text"] > 0
    numbers = page_numbers(FULL, joined, old=True, match="no_split")
    assert numbers["text"][0] == len("\n\n")
    assert numbers["order"] == [0, 0]


@pytest.mark.parametrize(
    "piece",
    ["a\n\n", "<table>", "<table><tr><td>", "<td>", "\\[ ", "\\( ", "$$", "| a |\n", "![", "![](", "\\text{",
     "\\begin{tabular}", "\\begin{table}", "```", "<!--", "&amp;", "lorem ipsum dolor ", "\n", "|", "{", "\\title{\n"],
)  # fmt: skip
@pytest.mark.parametrize("old", [True, False])
def test_endless_answers_take_bounded_time(piece: str, monkeypatch: pytest.MonkeyPatch, *, old: bool) -> None:
    """A million characters of it; what is read of them is smaller here, so that the test is cheap."""
    monkeypatch.setattr("mm_moslora_eval.metrics.documents.omnidocbench.MOST_CHARACTERS", 6_000)
    monkeypatch.setattr(markdown_blocks, "is_installed", lambda name: True)
    monkeypatch.setattr(markdown_blocks, "_reader", lambda: SimpleNamespace(latex_to_text=str))
    found = page_numbers(FULL, piece * (1_000_000 // len(piece)), old=old)
    assert found["text"][0] > 0
    assert found["teds"][0] < 0.01


def test_scores_of_a_set(tmp_path: Path) -> None:
    """Pages weigh alike; a page without an answer counts as empty; the parts are given by language and kind."""
    chinese = page(text("Nur ein Text."), name="q.png", language="simplified_chinese", data_source="note")
    documents = [
        Document(id=name, question="", answers=(json.dumps(one),)) for name, one in (("p", FULL), ("q", chinese))
    ]
    runs = Runs(tmp_path)
    new = runs("omnidocbench_v15@official", documents, [RIGHT, "Nur ein Bild."]).result
    edit = 3 / 10  # "NureinText", "NureinBild" differ in four letters of ten, one of them alike
    assert new.metrics["text_edit_simplified_chinese"] == new.metrics["text_edit_note"] > edit
    assert new.metrics["text_edit"] == pytest.approx(new.metrics["text_edit_note"] / 2)
    assert new.metrics["teds"] == new.metrics["teds_english"] == 1
    assert "teds_simplified_chinese" not in new.metrics
    assert new.score == pytest.approx((1 - new.metrics["text_edit"] + 1) / 2)
    assert new.score == pytest.approx(new.metrics["overall_without_formulas"])
    old = runs("omnidocbench_v10@official", documents, [RIGHT, "Nur ein Bild."]).result
    assert old.metrics["overall_edit_en"] == 0
    assert old.score == pytest.approx(1 - old.metrics["overall_edit_zh"] / 2)
    unread = Scored(document=documents[0], text="<think>", parsed="", score=0.0)
    assert summed('omnidocbench {"version": "1.5"}', [unread]).metrics["text_edit"] == 1.0


def test_pages_of_other_languages_alone_have_no_score(tmp_path: Path) -> None:
    """Version 1.0 sums up English and Chinese pages; right answers to others are not wrong ones."""
    mixed = page(text("Nur ein Text."), name="q.png", language="en_ch_mixed")
    documents = [
        Document(id=name, question="", answers=(json.dumps(one),), category=name)
        for name, one in (("mixed", mixed), ("english", FULL))
    ]
    runs = Runs(tmp_path)
    alone = runs("omnidocbench_v10@official", documents[:1], ["Nur ein Text."]).result
    assert math.isnan(alone.score)
    assert "has no part in any of 1 samples" in alone.about["unscored"]
    both = runs("omnidocbench_v10@official", documents, ["Nur ein Text.", RIGHT]).result
    assert both.score == 1
    assert set(both.categories) == {"english"}
    read = Scored(
        document=documents[0], text="", parsed=json.dumps(page_numbers(mixed, "Nur ein Text.", old=True)), score=1.0
    )
    gone = Scored(document=documents[1], text="", parsed="", score=0.0, failed=True)
    part = summarise(get_task("omnidocbench_v10"), [read, gone], mode="own", about={})
    assert part.score == 0
    assert part.completed == {"n": 1}


@pytest.mark.parametrize("fault", [{"order": "one"}, {"text": None}, {"anno_id": []}])
@pytest.mark.parametrize("name", ["omnidocbench_v10@official", "omnidocbench_v15@official"])
def test_a_faulty_reference_is_a_counted_failure(fault: dict[str, Any], name: str, tmp_path: Path) -> None:
    faulty = page(text("One."), text("Two."), name="q.png", language="english")
    faulty["layout_dets"][0] |= fault
    documents = [
        Document(id=name, question="", answers=(json.dumps(one),)) for name, one in (("p", FULL), ("faulty", faulty))
    ]
    result = Runs(tmp_path)(name, documents, [RIGHT, "One."]).result
    assert result.score == 1
    assert (result.counts.faults, result.counts.ungraded) == (1, 1)


def test_miniature_pages_and_their_right_answers(tmp_path: Path) -> None:
    make_miniature(tmp_path / "mini")
    for name in ("omnidocbench_v10", "omnidocbench_v15"):
        for task in load_file(tmp_path / "mini" / f"{name}.yaml"):
            said = {}
            for document in task.load().documents:
                items = json.loads(document.answers[0])["layout_dets"]
                said[document.id] = "\n\n".join(item.get("text") or item.get("html") or item["latex"] for item in items)
                assert document.images
                assert document.category in ("english", "simplified_chinese", None)
            (stored := tmp_path / f"{task.id}.json").write_text(json.dumps(said))
            words = ["eval", "run", f"{tmp_path}/mini/{name}.yaml@{task.protocol}", "--model", f"replay:{stored}"]
            assert cli.run([*words, "--output", str(tmp_path / task.id), "--no-report"]) == 0
            (result,) = read_results(tmp_path / task.id)
            assert result.score == 1.0


def test_annotations_name_their_pictures(tmp_path: Path) -> None:
    (tmp_path / "pages.json").write_text(json.dumps([FULL | {"poly": [1]}, {"page_info": {}}]))
    columns = {"image": "page_info.image_path"}
    source = Source(kind="annotations", path=str(tmp_path / "pages.json"), columns=columns, without=("poly", "text"))
    with pytest.raises(EvalError, match=r"record 2 has no name at 'page_info.image_path'"):
        load(source)
    (tmp_path / "pages.json").write_text(json.dumps([FULL | {"poly": [1]}]))
    (document,) = load(source).documents
    assert document.id == "p.png"
    assert document.images == (tmp_path / "p.png",)
    assert "poly" not in document.answers[0]
    assert "One two" not in document.answers[0]


def test_a_page_that_needs_pylatexenc_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown_blocks, "is_installed", lambda name: False)
    markdown_blocks._unicode_formula.cache_clear()
    with pytest.raises(EvalError, match="pylatexenc"):
        page_numbers(page(text("so $x^2$")), "so $x^2$", old=False)
    assert page_numbers(page(text("so $x$")), "so $x$", old=False)["text"] == [0, 3]


def test_both_versions_are_tasks() -> None:
    assert get_task("omnidocbench_v10").expected_count == 981
    assert get_task("omnidocbench_v15").expected_count == 1355
