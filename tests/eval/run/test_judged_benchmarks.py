"""Judged protocols of shipped benchmarks: who is asked what, and which replies count."""

from __future__ import annotations

from pathlib import Path

import pytest
from mm_moslora_eval.sources.document import Document

from tests.eval.protocol_runs import Run, Runs

SHAPES = {"A": "circle", "B": "square", "C": "triangle"}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def mathvision(runs: Runs, *, judged: bool) -> tuple[Run, list[str]]:
    """A run on answers of which the judge must see those without a letter or the whole reference; the seen ones."""
    rows = [  # answer, reference, options, what the judge copies out
        ("The answer is (B).", "B", SHAPES, ""),
        ("It is the one with four sides", "B", SHAPES, "B"),
        ("That shape is round", "C", SHAPES, "A"),
        ("0.5", r"\frac{1}{2}", {}, ""),
        ("So half of it remains", r"\frac{1}{2}", {}, "1/2"),
        ("There are three of them", "4", {}, "3"),
        ("nothing", "4", {}, "none"),
        ("a", "5", {}, "a"),  # VLMEvalKit executes it, and finds the reference
    ]
    made = [
        Document(id=str(n), question=f"q{n}#", options=options, answers=(right,))
        for n, (_, right, options, _) in enumerate(rows)
    ]
    seen: list[str] = []

    def judge(prompt: str, _: float) -> str:
        number = next(n for n in range(len(rows)) if f"q{n}#" in prompt)
        seen.append(rows[number][0])
        return rows[number][3]

    run = runs("mathvision_test@vlmevalkit", made, [said for said, *_ in rows], judge=judge if judged else None)
    return run, seen


def test_a_judge_copies_out_what_vlmevalkits_rule_cannot_read_and_the_rule_decides(runs: Runs) -> None:
    run, seen = mathvision(runs, judged=True)
    assert sorted(seen) == sorted(
        ["It is the one with four sides", "That shape is round", "So half of it remains", "There are three of them",
         "nothing", "a"]
    )  # fmt: skip
    assert run.scores == [1, 1, 0, 1, 1, 0, 0, 0]
    assert run.result.about["by_rules"]["score"] == 2 / 8
    alone, unseen = mathvision(runs, judged=False)
    assert (alone.scores, unseen) == ([1, 0, 0, 1, 0, 0, 0, 0], [])
    assert alone.result.score == 2 / 8  # the task's own rule, and nothing beside it


@pytest.mark.parametrize("choices", ["['circle', 'square']", "[]"])
def test_choices_of_mathvision_may_stand_in_one_cell(choices: str, runs: Runs) -> None:
    document = Document(id="0", question="q", answers=("B",), extra={"choices": choices})
    run = runs("mathvision_test@vlmevalkit", [document], ["I would say (B)."])
    assert run.parsed == ["B" if "circle" in choices else "I would say (B)."]


def test_verdicts_give_the_numbers_of_simplevqa_and_none_without_a_judge(runs: Runs) -> None:
    made = [Document(id=str(n), question=f"q{n}#", answers=("Paris",)) for n in range(4)]
    said = ["Paris", "in paris, I think", "Rome", "no idea"]
    verdicts = ["Correct.", "correct", "incorrect", "not attempted"]

    def judge(prompt: str, _: float) -> str:
        return verdicts[next(n for n in range(4) if f"q{n}#" in prompt)]

    result = runs("simplevqa@vlmevalkit", made, said, judge=judge).result
    assert result.score == 0.5
    assert result.metrics == {
        "not_attempted": 0.25, "correct_given_attempted": pytest.approx(2 / 3), "f1": pytest.approx(4 / 7)
    }  # fmt: skip
    assert result.about["by_rules"]["score"] == 0.25
    alone = runs("simplevqa@vlmevalkit", made, said).result
    assert alone.about["unscored"]
    assert alone.about["by_rules"]["score"] == 0.25
