"""Edge cases of the metrics in which reference implementations differ from expectation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mm_moslora_eval.metrics import (
    caption,
    document_vqa,
    exact_match,
    judge_scores,
    mathvista,
    mmmu,
    multiple_choice,
    ptb_tokeniser,
    vqa_accuracy,
    yes_no,
)
from mm_moslora_eval.metrics.benchmarks import video_letters

CAPTIONS = {
    "A cat (black) sits.": "a cat -lrb- black -rrb- sits",
    "[sic] {x}": "-lsb- sic -rsb- -lcb- x -rcb-",
    "It costs $5.00, £3, €4 or 5¢.": "it costs $ 5.00 # 3 $ 4 or 5 cents",
    "a train at 10:30a.m. in the U.S.": "a train at 10:30 a.m. in the u.s.",
    "the '90s, the 1990s and 60's": "the '90s the 1990s and 60 's",
    "5'10\" and .5 miles at 1.5L": "5 10 and .5 miles at 1.5 l",
    "12/25/2020, 9/11, 2 1/2 cups and ½": "12/25/2020 9/11 2\xa01/2 cups and 1/2",
    "plan B. The plan": "plan b the plan",
    "vitamin C.": "vitamin c.",
    "Mr. Smith vs. Dr. Who, etc.": "mr. smith vs. dr. who etc.",
    "no. 5 is no. It": "no. 5 is no it",
    "what?! yes!!! no? ok!": "what ?! yes !!! no ok",
    ":) and :-( and ;P": ":-rrb- and :--lrb- and ;p",
    "<b>bold</b> &amp; AT&T": "<b> bold </b> & at&t",
    "user@mail.com @user #tag #5 http://a.com/b?c=d": "user@mail.com @user #tag # 5 http://a.com/b?c=d",
    "y'all can't, shouldn't've and 'twas": "y' all ca n't should n't 've and 't was",
    "cannot gonna lemme": "can not gon na lem me",
    "O'Hare o'clock ma'am C'mon a'b": "o'hare o'clock ma'am c'mon a b",
    "rock 'n' roll’s “quoted” ‘single’": "rock 'n' roll 's quoted single",
    "t-shirt, U.S.-based, 3-year-old, a -- b – c - d": "t-shirt u.s.-based 3-year-old a b c d",
    "😀 smile ☺ 猫。": "smile ☺ 猫 。",
    "end.Next cat?dog a,1 v1.2": "end.next cat?dog a ,1 v1 .2",
    "C++ and C# and **bold** ###": "c++ and c# and ** bold ** ###",
    "(555) 123-4567 or 555-1234": "-lrb-555-rrb-\xa0123-4567 or 555-1234",
}
"""Caption -> tokens of Stanford CoreNLP 3.4.1 as the COCO evaluation runs it (compared with its jar)."""


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_are_cut_as_by_the_java_tokeniser(text: str) -> None:
    assert ptb_tokeniser.tokenize(text) == CAPTIONS[text]


def test_a_caption_that_is_only_punctuation_has_no_tokens_and_scores_nothing() -> None:
    assert ptb_tokeniser.tokenize("... - \n '") == ""
    report = caption.caption_report(["", "a dog"], [["a cat"], ["a dog"]])
    assert report.cider_per_image[0] == 0.0
    assert report.cider_per_image[1] > 0


def test_mathvista_floats_need_a_precision() -> None:
    unsaid = mathvista.MathVistaQuestion(question_type="free_form", answer_type="float")
    assert mathvista.normalize_official("1.25", unsaid) is None


def test_mathvista_nothing_equals_nothing() -> None:
    assert not mathvista.equal(None, "None")
    assert mathvista.equal(" 14 ", "14")


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
    readers = (judge_scores.mmvet_grade, judge_scores.mmvet_grade_vlmevalkit, judge_scores.mmvet_grade_lmms_eval)
    assert [read(reply) for read in readers] == [strict, vlmevalkit, lmms_eval]


def test_mmvet_table_row_escapes_its_separators() -> None:
    row = judge_scores.mmvet_table_row("x?", "-1<AND>-5<OR>0", "x = 3")
    assert row == "x? | -1 <AND> -5 <OR> 0 | x = 3 | "


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
    ("text", "number"),
    [("1_000", 1000.0), ("１２", 12.0), (" -3.0 ", -3.0), ("1,000.256", 1000.26), ("1e3", 1000.0), (".5", 0.5)],
)
def test_mmmu_numbers_are_what_float_takes(text: str, number: float) -> None:
    assert mmmu.normalize(text) == [number]


def test_chartqa_takes_what_float_takes_and_nothing_else() -> None:
    assert document_vqa.relaxed_accuracy("1,000", "1000") == 0.0
    assert document_vqa.relaxed_accuracy("51%", "0.5") == 1.0
    assert document_vqa.relaxed_accuracy("5", "5%") == 0.0
    assert document_vqa.relaxed_accuracy("0.0", "0") == 0.0
    assert document_vqa.relaxed_lmms_eval(" yes", "yes") == 0.0
    assert document_vqa.relaxed_accuracy(" yes", "yes") == 1.0


def test_gqa_keeps_inner_and_outer_space_where_its_scripts_do() -> None:
    assert exact_match.gqa_llava("Yes.", "yes") == 1.0
    assert exact_match.gqa_llava("yes .", "yes") == 0.0
    assert exact_match.gqa_lmms_eval("yes .", "yes") == 0.0
    assert exact_match.gqa_vlmevalkit(" YES\n", "yes") == 1.0


def test_vqa_normalisers_differ_where_they_are_known_to() -> None:
    assert [
        f("3. a dog's")
        for f in (vqa_accuracy.normalize_evalai, vqa_accuracy.normalize_vlmevalkit, vqa_accuracy.normalize_official)
    ] == [
        "3 dog 's",
        "3. dog's",
        "3 dog's",
    ]
    assert vqa_accuracy.normalize_evalai("1,,2") == "12"
    assert vqa_accuracy.normalize("." * 40) == ""
    assert vqa_accuracy.normalize_evalai("." * 40) == "." * 8


def test_yes_and_no_in_the_reference_implementations() -> None:
    readers = (yes_no.vlmevalkit, yes_no.mme_lmms_eval, yes_no.pope_llava, yes_no.pope_lmms_eval)
    assert [read("Yes, no doubt") for read in readers] == ["", "yes", "no", ""]
    assert [read("") for read in readers] == ["", "", "yes", ""]
    assert [read("NO") for read in readers] == ["no", "no", "yes", "no"]


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
        (video_letters.mvbench_official, "A) a red circle.", ["A"]),
        (video_letters.mvbench_official, "(b) a square\nbecause (C)", ["B"]),
        (video_letters.mvbench_official, "(A)(B)", ["A", "B"]),
        (video_letters.mvbench_official, "", []),  # its script finds nothing in every option
        (video_letters.mvbench_official, "( A", []),  # and a bracket, too
        (video_letters.mvbench_official, ")", []),
        (video_letters.mvbench_vlmevalkit, "a square, so (C)", ["A", "C"]),
        (video_letters.mvbench_vlmevalkit, "...", []),
        (video_letters.mlvu_vlmevalkit, "(no) I take B", ["B"]),
        (video_letters.mlvu_vlmevalkit, "B) or C)", ["B"]),
        (video_letters.mlvu_vlmevalkit, ")", []),
    ],
)
def test_letters_of_videos_that_count(read: Callable[..., list[str]], answer: str, letters: list[str]) -> None:
    assert read(answer, SHAPES) == letters


def test_long_answers_about_videos_are_read_at_once() -> None:
    for answer in ("(" * 1_000_000, "a " * 500_000, "." * 1_000_000, ") (" * 300_000):
        for read in (video_letters.mvbench_official, video_letters.mlvu_vlmevalkit, video_letters.mvbench_vlmevalkit):
            read(answer, SHAPES)
        video_letters.mvbench_lmms_eval(answer)
        video_letters.lvbench_official(answer)
