"""Edge cases of the metrics in which reference implementations differ from expectation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mm_moslora_eval.metrics import exact_match, multiple_choice
from mm_moslora_eval.task_files.lvbench import rules as lvbench
from mm_moslora_eval.task_files.mlvu import rules as mlvu
from mm_moslora_eval.task_files.mmvet import rules as mmvet
from mm_moslora_eval.task_files.mvbench import rules as mvbench


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
