"""General metrics, on hostile answers too, and the edges in which reference implementations differ from expectation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product

import pytest
from mm_moslora_eval.metrics import exact_match, multiple_choice
from mm_moslora_eval.metrics.general.table_similarity import teds
from mm_moslora_eval.metrics.general.timed_calls import PROCESS
from mm_moslora_eval.metrics.metric_text import levenshtein
from mm_moslora_eval.scoring.answer_scoring import score_answer
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.task_files.lvbench import rules as lvbench
from mm_moslora_eval.task_files.mlvu import rules as mlvu
from mm_moslora_eval.task_files.mmvet import rules as mmvet
from mm_moslora_eval.task_files.mvbench import rules as mvbench

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


@pytest.mark.parametrize(
    ("reply", "strict", "vlmevalkit", "lmms_eval"),
    [
        ("0.5", 0.5, 0.5, 0.5),
        (" 0.5\n", 0.5, 0.5, 0.5),
        ("0_1", None, 1.0, 1.0),
        ("nan", None, None, None),
        ("inf", None, None, None),
        ("-0.1", None, None, None),
        ("0.7 because", None, None, 0.7),
        ("Score: 0.7", None, None, None),
        ("", None, None, None),
    ],
)
def test_mmvet_grades(reply: str, strict: float | None, vlmevalkit: float | None, lmms_eval: float | None) -> None:
    readers = (mmvet.mmvet_grade, mmvet.mmvet_grade_vlmevalkit, mmvet.mmvet_grade_lmms_eval)
    assert [read(reply) for read in readers] == [strict, vlmevalkit, lmms_eval]


OPTIONS = {"A": "cat", "B": "dog", "C": "bird"}


@pytest.mark.parametrize(
    ("text", "now", "then"),
    [
        ("", "", ""),
        ("\u200b", "", ""),
        ("B\x00", "", ""),
        ("Ｂ", "", ""),
        ("（B）", "", ""),
        ("b", "", ""),
        ("B B B", "B", "B"),
        ("A and B", "", ""),
        ("B. The animal is a dog, which is clear", "", "B"),
        ("**B**", "B", "B"),
        ("The correct answer is **C** because of its two long legs", "C", "C"),
        ("a DOG", "B", "B"),
        ("hotdog", "B", "B"),
        ("Z", "Z", "Z"),
    ],
)
def test_input_03_letters_as_vlmevalkit_reads_them(text: str, now: str, then: str) -> None:
    assert multiple_choice.vlmevalkit(text, OPTIONS) == now
    assert multiple_choice.vlmevalkit_2024_06(text, OPTIONS) == then


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A dog.", "B"),
        ("A big dog", "B"),
        ("A small dog is running", ""),  # long answers are not searched for texts
        ("A horse.", ""),
        ("A dog. The answer is A", "A"),
        ("It runs. A bird", "C"),
        ("A", "A"),
        ("A.", "A"),
        ("A. cat", "A"),
        ("A because it meows", "A"),
        ("Answer: A", "A"),
        ("A Cat", "A"),
    ],
)
def test_an_article_is_no_letter_by_default(text: str, letter: str) -> None:
    assert multiple_choice.extract_letter(text, OPTIONS) == letter
    if text == "A dog.":
        assert multiple_choice.vlmevalkit(text, OPTIONS) == "A"  # as its source reads it


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B. 1\n\nThere is one toilet in the image.", "B"),
        ("(B) 1. There is one toilet, seen from the left side of the room.", "B"),
        ("Answer: B because it has four legs and a long tail that it wags", "B"),
        ("The correct option is B, since it has four legs and a long tail", "B"),
        ("My answer is (B) since it has four legs and a long tail that it wags", "B"),
        ("**B**: it has four legs and a long tail that it wags all of the time", "B"),
        ("The answer is option C. It has two long legs, feathers and a beak, as seen", "C"),
        ("Looking at the picture I see four legs (B) and a long tail that it wags", "B"),
        ("A: it has whiskers, four paws, and it sits upon the mat of the house", "A"),
        # Two letters in one place, a letter of no option, articles and negations state nothing.
        ("Answer: B or answer: C, since both have legs, as can be seen from here", ""),
        ("The answer is F, since it has four legs and a long tail that it wags", ""),
        ("The answer is not B, because it has no long tail that it could wag", ""),
        ("The answer is a thing with four legs and a long tail that it can wag", ""),
        ("A thing with four legs and with a long tail that it wags all the time", ""),
        ("I think that it has four legs and with a long tail that it wags a lot", ""),
        ("Between (A) and (B) there is hardly a difference that anyone could see", ""),
        ("Both B and C have legs, so nothing more can be said about the picture", ""),
    ],
)
def test_the_default_reads_the_letter_that_a_sentence_states(text: str, letter: str) -> None:
    assert multiple_choice.extract_letter(text, OPTIONS) == letter


def test_options_that_are_empty_or_equal_are_never_guessed() -> None:
    assert (
        multiple_choice.vlmevalkit_2024_06("nothing here", {"A": "", "B": "dog"}) == "A"
    )  # an empty text lies within any
    assert multiple_choice.extract_letter("nothing here", {"A": "", "B": "dog"}) == ""
    assert multiple_choice.extract_letter("same", {"A": "same", "B": "same"}) == ""


@pytest.mark.parametrize(
    ("text", "references", "options", "right"),
    [
        ("The shape in the picture is a Circle.", ["circle"], {}, True),
        ("circles are round", ["circle"], {}, False),
        ("I see two dogs", ["2"], {}, True),
        ("It is an ice-cream.", ["the ice cream"], {}, True),
        ("Yes, it is red.", ["yes"], {}, True),
        ("No, the answer is not yes", ["yes"], {}, False),
        ("Is it yes or no?", ["no"], {}, False),
        ("nothing", ["no"], {}, False),
        ("It shows a cat on a mat", ["B"], {"A": "dog", "B": "cat"}, True),
        ("A dog and a cat", ["B"], {"A": "dog", "B": "cat"}, False),
        ("The answer is B.", ["B"], {"A": "dog", "B": "cat"}, True),
        ("", ["x"], {}, False),
        ("anything", [""], {}, False),
        ("这是一只猫。", ["猫"], {}, True),
        ("这是一只狗。", ["猫"], {}, False),
        ("これは赤いリンゴです。", ["リンゴ"], {}, True),
        ("นี่คือแมวสีดำ", ["แมว"], {}, True),
        ("นี่คือหมาสีดำ", ["มา"], {}, True),  # in a longer word, as the docstring says
        ("นี่คือสีดำ", ["สีด้า"], {}, False),  # other vowel signs
        ("Le cafe\u0301 est noir.", ["caf\u00e9"], {}, True),
        ("这是熊猫", ["B"], {"A": "猫", "B": "熊猫"}, True),
        ("a black cat", ["B"], {"A": "cat", "B": "black cat"}, True),
    ],
)
def test_an_answer_in_a_sentence_holds_the_right_word(text, references, options, right) -> None:
    assert exact_match.holds_answer(text, references, options) == right


SHAPES = {"A": "a red circle.", "B": "a square", "C": "3"}


@pytest.mark.parametrize(
    ("read", "answer", "letters"),
    [
        (mvbench.mvbench_official, "A) a red circle.", ["A"]),
        (mvbench.mvbench_official, "(b) a square\nbecause (C)", ["B"]),
        (mvbench.mvbench_official, "(A)(B)", ["A", "B"]),
        (mvbench.mvbench_official, "", []),  # its script finds nothing in every option
        (mvbench.mvbench_official, "( A", []),  # and a bracket, too
        (mvbench.mvbench_official, ")", []),
        (mvbench.mvbench_vlmevalkit, "a square, so (C)", ["A", "C"]),
        (mvbench.mvbench_vlmevalkit, "...", []),
        (mlvu.mlvu_vlmevalkit, "(no) I take B", ["B"]),
        (mlvu.mlvu_vlmevalkit, "B) or C)", ["B"]),
        (mlvu.mlvu_vlmevalkit, ")", []),
    ],
)
def test_letters_of_videos_that_count(read: Callable[..., list[str]], answer: str, letters: list[str]) -> None:
    assert read(answer, SHAPES) == letters


def test_long_answers_about_videos_are_read_at_once() -> None:
    for answer in ("(" * 1_000_000, "a " * 500_000, "." * 1_000_000, ") (" * 300_000):
        for read in (mvbench.mvbench_official, mlvu.mlvu_vlmevalkit, mvbench.mvbench_vlmevalkit):
            read(answer, SHAPES)
        mvbench.mvbench_lmms_eval(answer)
        lvbench.lvbench_official(answer)
