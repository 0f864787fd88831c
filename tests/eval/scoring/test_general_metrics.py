"""Metrics of no benchmark in particular, on hostile answers too."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
from mm_moslora_eval.metrics.general.table_similarity import teds
from mm_moslora_eval.metrics.general.timed_calls import PROCESS
from mm_moslora_eval.metrics.metric_text import levenshtein
from mm_moslora_eval.scoring.answer_scoring import score_answer
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document

LONG = 1_000_000


def rated(answer: str, *references: str, metric: str, extraction: str = "text") -> Scored:
    document = Document(id="1", question="?", answers=references)
    return score_answer(document, answer, extraction=extraction, metric=metric)


def test_the_edit_distance_is_that_of_its_definition() -> None:
    def plain(a: str, b: str) -> int:
        row = [*range(len(b) + 1)]
        for i, left in enumerate(a, start=1):
            above, row = row, [i]
            for j, right in enumerate(b, start=1):
                row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
        return row[-1]

    words = ["".join(letters) for size in range(5) for letters in product("ab", repeat=size)]
    assert all(levenshtein(a, b) == plain(a, b) for a, b in product(words, repeat=2))
    long = "kitten sits on the mat, é \N{GRINNING FACE} " * 4
    assert levenshtein(long, long[3:70] + "xyz") == plain(long, long[3:70] + "xyz")
    assert levenshtein(["<b>", "a"], ["a", "</b>"]) == 2


def test_edits_are_a_share_of_the_longer_text_and_long_answers_end() -> None:
    assert rated("kitten", "sitting", metric="edit_similarity").score == pytest.approx(1 - 3 / 7)
    assert rated("A  b\n", "a b", metric='edit_similarity {"ignore_case": true, "ignore_space": true}').score == 1.0
    assert rated("ab" * (LONG // 2), "some reference", metric="edit_similarity").score < 0.001


CELLS = "<table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>"


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        (CELLS, CELLS, 1.0),
        (f"Here it is:\n<html><body>{CELLS}</body></html> Done.", CELLS, 1.0),
        (CELLS.replace(">d<", ">x<"), CELLS, 1 - 1 / 6),
        (CELLS.replace("<td>a</td><td>b</td>", '<td colspan="2">ab</td>'), CELLS, 1 - 2 / 6),
        ("<table><tr><td>a<td>b<tr><td>c<td>d</table>", CELLS, 1.0),  # omitted end tags
        ("<table><tr><td>abcd</td></tr></table>", "<table><tr><td>abxd</td></tr></table>", 1 - 0.25 / 2),
        ("no table", CELLS, 0.0),
        ("<table></table>", CELLS, 0.0),
        ("<table>" + "<tr><td>x</td></tr>" * 100_000, CELLS, 0.0),
        ("<table><tr><td>" + "x" * LONG, CELLS, 0.0),
        ("<table>" * 5000, CELLS, 0.0),
    ],
)
def test_tables_are_compared_by_the_edits_of_their_trees(answer: str, reference: str, score: float) -> None:
    """The values are those of the code that PubTabNet published, where it reads the table."""
    assert teds(answer, reference) == pytest.approx(score, abs=0.17 if score == 0 else 1e-9)


@pytest.mark.parametrize(
    "answer",
    [
        "<table>" + "<a>" * (LONG // 3), "<table>" + "<!--" * (LONG // 4), "<table>" + "<td a" * (LONG // 5),
        "<table><td>" + "<a>" * (LONG // 8) + "</b>" * (LONG // 8), "<table>" + "<" * LONG, "<table>" + "&" * LONG,
    ],
    ids=["open", "comments", "halves", "unmatched", "less", "marks"],
)  # fmt: skip
def test_a_hostile_table_is_read_in_time(answer: str) -> None:
    # A pair that takes longer has no score.
    assert rated(answer, CELLS, metric='teds {"seconds": 20}').score < 0.2


def test_tables_that_take_too_long_are_counted_and_the_next_answer_is_scored() -> None:
    """A cell of its own for each pair, in the same process as the formulas."""
    row = "".join(f"<td>{number}</td>" for number in range(40))
    large = "<table>" + f"<tr>{row}</tr>" * 50 + "</table>"
    sample = rated(large, large.replace("<td>1", "<td>x"), metric='teds {"seconds": 0.5}')
    assert math.isnan(sample.score)
    assert "took more than 0.5 seconds" in sample.fault
    assert rated(CELLS, CELLS, metric='teds {"seconds": 5}').score == 1.0


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        ("within", "several"), ("teds", "| a |"), ("teds", "<table>" + "<tr><td>x</td></tr>" * 2000),
        ("point_inside", "[200, 200, 50, 50]"), ("point_inside", '{"size": [10, 10], "counts": [0, 1]}'),
        ("point_inside", '{"size": [10, 10], "counts": [-1, 200]}'), ("point_inside", "a box"),
        ("point_inside", '{"size": [10, 10], "counts": [100]}'), ("mathematics", ""), ("mathematics", r"$\text{a}"),
    ],
)  # fmt: skip
def test_a_reference_that_cannot_be_read_is_counted(metric: str, reference: str) -> None:
    """No answer could be right: the fault is not the model's."""
    if metric == "mathematics":
        pytest.importorskip("math_verify", reason="math-verify is not installed (extra math)")
    sample = rated(f"[5, 5] or {CELLS}", reference, metric=metric)
    assert math.isnan(sample.score)
    assert "the reference" in sample.fault


@pytest.mark.parametrize(
    ("answer", "hits"),
    [
        ("[25, 25]", (1, 1, 1)), ("I point at (5.5, 5.5).", (0, 0, 0)), ("[20, 20, 30, 30]", (1, 1, 1)),
        ("[39, 39]", (1, 0, 0)), ("[-1, 25]", (0, 0, 0)), ("nothing", (0, 0, 0)), ("[1e9, 3]", (0, 0, 0)),
    ],
)  # fmt: skip
def test_points_lie_in_boxes_polygons_and_masks(answer: str, hits: tuple[int, int, int]) -> None:
    """A box from 10 to 40, the triangle above its diagonal, and a mask of the columns 20 to 29."""
    mask = {"size": [50, 50], "counts": [20 * 50, 10 * 50, 20 * 50]}
    references = ("[10, 10, 40, 40]", "[[10, 10], [40, 10], [10, 42]]", json.dumps(mask))
    assert tuple(rated(answer, area, metric="point_inside").score for area in references) == hits
    assert "neither a box nor" in rated(answer, "[1, 2]", metric="point_inside").fault
    assert rated(answer, "[10, 10, 40, 40]", metric="point_inside", extraction="points").score == hits[0]


@pytest.fixture(scope="module")
def with_math() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra math)")


@pytest.mark.usefixtures("with_math")
def test_formulas_are_compared_by_their_value() -> None:
    assert rated(r"The answer is $\boxed{\frac{1}{2}}$.", "0.5", metric="mathematics").score == 1.0
    assert rated(r"$x = 2\sqrt{2}$", r"$\sqrt{8}$", metric="mathematics").score == 1.0
    assert rated("3", "0.5", "4", metric="mathematics").score == 0.0
    assert [rated(word, word, metric="mathematics").score for word in ("north", "B", r"\text{a}")] == [1.0] * 3
    assert rated("south", "north", metric="mathematics").score == 0.0
    assert rated("x" * LONG + r" so it is \boxed{7}", "7", metric="mathematics").score == 1.0


@pytest.mark.usefixtures("with_math")
def test_a_formula_that_never_ends_is_counted_and_the_next_answer_is_scored() -> None:
    """After a time-out the next answer has the same time, in a new process."""
    endless = r"$\boxed{9^{9^{9^{9^9}}}}$"
    for _ in range(2):
        sample = rated(endless, "7", metric='mathematics {"seconds": 1}')
        assert math.isnan(sample.score)
        assert "took more than 1 seconds" in sample.fault or "ended" in sample.fault
    assert rated(r"\boxed{7}", "7", metric="mathematics").score == 1.0
    assert rated(endless, "7", metric='mathematics {"seconds": 1, "endless": "wrong"}').score == 0.0
    PROCESS.close()


def test_without_the_package_its_metric_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    PROCESS.close()
    monkeypatch.setattr("mm_moslora_eval.scoring.parts.comparison_parts.is_installed", lambda _: False)
    assert "pip install 'math-verify" in rated("1", "1", metric="mathematics").fault
