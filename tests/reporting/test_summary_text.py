"""Verdicts follow from the intervals, and charts place numbers correctly."""

from __future__ import annotations

from typing import Any

import pytest

from mm_moslora.reporting.run_data import EvaluationRow, SampleRow, Score
from mm_moslora.reporting.summary_text import explained, sample_kind, verdict
from mm_moslora.reporting.verdicts import Difference


def _row(name: str, low: float, high: float, **more: Any) -> EvaluationRow:
    score = Score(n=100, mean=(low + high) / 2, low=low, high=high)
    return EvaluationRow(name=name, label=name, task="t", score=score, categories={}, **more)


CONTROLS = {"blind": (0.2, 0.3), "wrong_image": (0.3, 0.4)}


@pytest.mark.parametrize(
    ("rows", "mood", "claim"),
    [
        ({"untuned": (0.1, 0.2), **CONTROLS}, "good", "Tuning helped, and the model looks at the picture."),
        ({"untuned": (0.1, 0.2), "untuned_lenient": (0.6, 0.7), **CONTROLS}, "mixed", "not shown to do better than"),
        ({"untuned": (0.1, 0.2), "untuned_lenient": (0.6, 0.7), **CONTROLS}, "mixed", "or 65.0 % if every answer"),
        ({"untuned": (0.1, 0.2), "blind": (0.2, 0.3)}, "mixed", "not measured with a wrong picture"),
        ({"untuned": (0.85, 0.9), **CONTROLS}, "bad", "Tuning made the model worse."),
        ({"untuned": (0.1, 0.2), **CONTROLS, "best_answer": (0.65, 0.75)}, "mixed", "answers that need no model"),
        ({"blind": (0.2, 0.3), "wrong_image": (0.72, 0.74)}, "mixed", "It is not shown that the model looks"),
    ],
)  # fmt: skip
def test_claims_follow_from_the_intervals(rows: dict[str, tuple[float, float]], mood: str, claim: str) -> None:
    found = verdict("t", [_row("tuned", 0.7, 0.8), *(_row(name, *interval) for name, interval in rows.items())])
    assert found is not None
    assert found.mood == mood
    assert claim in " ".join(found.sentences)


def test_paired_differences_show_more_than_overlapping_intervals() -> None:
    less = Difference(value=0.1, low=0.05, high=0.15, groups=100)
    for paired, claim in ((None, "not shown that the model looks"), (less, "The model looks at the picture")):
        rows = [_row("tuned", 0.5, 0.7), *(_row(name, 0.4, 0.6, less=paired) for name in CONTROLS)]
        assert claim in verdict("t", rows).sentences[0]


def test_remarks_stand_with_the_verdict_and_baselines_name_their_training_data() -> None:
    """A baseline from the evaluated set is not described as one from training data."""
    tuned = _row("tuned", 0.5, 0.7, remarks=("All 40 answers are 'no'.",), pictures=False)
    assert "All 40 answers are 'no'." in verdict("t", [tuned]).sentences
    floor = _row("majority", 0.5, 0.7, learned_from="the evaluated set")
    assert explained(floor) == "no model: always the most frequent answer, learned from the evaluated set itself"
    assert "training" not in explained(_row("majority", 0.5, 0.7))


@pytest.mark.parametrize(("learned_from", "counts"), [("the evaluated set", False), ("training answers", True)])
def test_best_answers_learned_from_the_test_set_are_no_control(learned_from: str, counts: bool) -> None:
    best = _row("best_answer", 0.65, 0.75, learned_from=learned_from)
    rows = [_row("tuned", 0.7, 0.8), *(_row(name, *interval) for name, interval in CONTROLS.items()), best]
    assert ("answers that need no model" in verdict("t", rows).sentences[0]) == counts


def test_without_a_tuned_row_there_is_no_verdict() -> None:
    assert verdict("t", [_row("untuned", 0.1, 0.2)]) is None


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [(False, True, "fixed"), (True, False, "broken"), (True, True, "right"), (False, False, "wrong"),
     (None, True, "correct"), (None, False, "incorrect"), (None, None, "open")],
)  # fmt: skip
def test_samples_are_sorted_by_what_happened_to_them(before: bool | None, after: bool | None, kind: str) -> None:
    row = SampleRow(
        image=None, question="q", answer="a", before="b", after="c", before_correct=before, after_correct=after
    )
    assert sample_kind(row) == kind
