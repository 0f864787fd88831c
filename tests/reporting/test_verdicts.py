"""Rules for conclusions: every rule by its cases."""

from __future__ import annotations

import math

import pytest

from mm_moslora.reporting.verdicts import (
    FEWEST,
    Difference,
    arms_sentence,
    between,
    difference_of,
    judge_tuning,
    verdict_of_arms,
    verdict_of_nats,
)


def ahead(by: float = 0.3, *, half: float = 0.1, groups: int | None = 100) -> Difference:
    return Difference(value=by, low=by - half, high=by + half, groups=groups)


UNCLEAR = ahead(0.05)
ALL = {"untuned": ahead(), "untuned_lenient": ahead(), "wrong_image": ahead(), "blind": ahead(), "majority": ahead()}


def test_tuning_helped_where_all_conditions_hold():
    found = judge_tuning(ALL)
    assert found.mood == "good"
    assert found.uses_pictures
    assert found.sentences[0] == "Tuning helped, and the model looks at the picture."
    assert len(found.sentences) == 5, "one sentence per control, of the model before tuning the lenient one alone"


@pytest.mark.parametrize("name", ["untuned_lenient", "wrong_image", "blind", "majority", "best_answer"])
@pytest.mark.parametrize("weak", [UNCLEAR, ahead(groups=FEWEST - 1), ahead(0.0)], ids=["overlap", "few", "equal"])
def test_one_condition_that_is_not_shown_prevents_a_conclusion(name: str, weak: Difference):
    found = judge_tuning(ALL | {name: weak})
    assert found.mood == "mixed"
    assert "helped" not in found.sentences[0] or "not known whether tuning helped" in found.sentences[0]
    assert any("not shown to be more" in sentence for sentence in found.sentences[1:])
    assert found.uses_pictures == (name not in ("wrong_image", "blind"))


def test_a_model_that_learned_only_the_form_of_answers_is_not_called_helped():
    """The score rises from 5.8 to 39.6 % with any picture."""
    found = judge_tuning(ALL | {"wrong_image": UNCLEAR, "blind": UNCLEAR})
    assert found.sentences[0] == (
        "It is not shown that the model looks at the picture, so it is not known whether tuning helped. "
        "It may have learned only the form and the frequencies of answers."
    )


def test_the_lenient_score_before_tuning_counts_where_it_was_measured():
    strict_only = {name: item for name, item in ALL.items() if name != "untuned_lenient"}
    assert judge_tuning(strict_only).mood == "good"
    assert judge_tuning(ALL | {"untuned_lenient": UNCLEAR}).mood == "mixed"
    assert judge_tuning(ALL | {"untuned_lenient": ahead(-0.3)}).sentences[0] == "Tuning made the model worse."


def test_the_best_control_is_named_first():
    found = judge_tuning(ALL | {"best_answer": ahead(0.16), "majority": ahead(0.5)})
    assert found.sentences[1].startswith("Against the best control, the most frequent answer to each question: +16.0")
    assert sum("best control" in sentence for sentence in found.sentences) == 1
    assert len(found.sentences) == 6
    alone = judge_tuning({"untuned": ahead(), "majority": ahead()}, pictures=False)
    assert not any("best control" in sentence for sentence in alone.sentences), "one control is no best one"


def test_controls_that_were_not_measured_are_named():
    found = judge_tuning({"untuned": ahead(), "blind": ahead()})
    assert found.mood == "mixed"
    assert "not measured with a wrong picture (" in found.sentences[0]
    assert "--modes blind --modes wrong" in found.sentences[0]


def test_questions_without_pictures_need_no_picture_controls():
    assert judge_tuning({"untuned": ahead(), "majority": ahead()}, pictures=False).sentences[0] == "Tuning helped."
    assert judge_tuning({"untuned": ahead(), "majority": UNCLEAR}, pictures=False).mood == "mixed"


def test_few_questions_show_nothing_and_never_equality():
    few = ahead(0.9, groups=FEWEST - 1)
    assert few.shown == "not shown"
    assert between(few) == f"It is not shown that A and B differ ({FEWEST - 1} independent questions are too few)"
    assert between(ahead()) == "A is better than B"
    assert between(ahead(-0.3)) == "B is better than A"
    assert Difference(value=0.5, low=math.nan, high=math.nan).shown == "not shown"


@pytest.mark.parametrize("data", [None, {}, [], "x", {"value": "high", "low": 0, "high": 1}, {"value": math.nan}])
def test_a_difference_is_read_or_left_out(data: object):
    assert difference_of(ahead().to_dict()) == ahead()
    assert difference_of(data) is None


def test_arms_differ_only_above_their_controls():
    sure = {"runs": True, "stand": True}
    assert verdict_of_arms(ahead(), 0.01, **sure) == "better"
    assert verdict_of_arms(ahead(-0.3), 0.01, **sure) == "worse"
    assert verdict_of_arms(ahead(), 0.06, **sure) == "not shown"
    assert verdict_of_arms(ahead(groups=5), 0.01, **sure) == "not shown"
    assert verdict_of_arms(ahead(), 0.01, **sure | {"runs": False}) == "one seed"
    assert verdict_of_arms(ahead(), 0.01, **sure | {"stand": False}) == "nothing follows"


def test_likelihoods_whose_variance_between_runs_is_unknown_show_nothing():
    """Scores may have several seeds where only one has log-likelihoods."""
    nats = {"difference": 0.5, "low": 0.4, "high": 0.6, "p_corrected": 1e-6, "run_degrees": 8.0}
    row = {"verdict": "not shown", "nats": {"own": nats}}
    assert verdict_of_nats(row) == "more likely"
    assert verdict_of_nats({**row, "nats": {"own": nats | {"run_degrees": 0.0}}}) == "one seed"


def test_an_arm_without_a_shown_difference_is_not_called_equal():
    row = {
        "arm": "a", "reference": "b", "documents": 40, "groups": 40, "seeds": 3, "difference": 0.0, "low": -0.07,
        "high": 0.07, "p_corrected": 1.0, "stderr": 0.0, "detectable": 0.07, "verdict": "not shown",
    }  # fmt: skip
    assert "a true difference of up to 7.0 points would not have been seen" in arms_sentence(row)
    wide = row | {"difference": 0.02, "stderr": 0.03}
    assert (
        "40 documents and 3 seeds would show a true difference of 7.0 points four times out of five"
        in arms_sentence(wide)
    )
    assert "9 independent pictures or questions are too few" in arms_sentence(wide | {"groups": 9})
    nothing = arms_sentence(wide | {"verdict": "nothing follows"})
    assert "no conclusion from +2.0 points" in nothing
    assert "four times out of five" not in nothing, "a resolution that is an artefact of constant answers"
