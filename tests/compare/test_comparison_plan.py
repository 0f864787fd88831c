"""Arms, learning rates and grids, and what may not change between two calls."""

from __future__ import annotations

import pytest

from mm_moslora.compare.arms import parse_arms
from mm_moslora.compare.comparison_plan import (
    Outcome,
    choose_rates,
    run_count,
    tuning_cells,
)
from mm_moslora.config import Recipe
from mm_moslora.models.trainable_parts import moslora_config
from mm_moslora.utils.errors import MoSLoRAError
from tests.compare.comparisons import RECIPE, settings


def test_a_rate_is_chosen_by_the_runs_that_did_not_diverge():
    asked = settings()
    losses = {1e-4: 2.0, 2e-4: 1.5, 4e-4: 1.0}
    outcomes = {cell.name: Outcome(status="ok", validation={"loss": losses[cell.rate]}) for cell in tuning_cells(asked)}
    assert set(choose_rates(asked, outcomes).values()) == {4e-4}
    bad = next(cell.name for cell in tuning_cells(asked) if cell.arm.name == "lora" and cell.rate == 4e-4)
    outcomes[bad] = Outcome(status="diverged", reason="the loss is not finite")
    assert choose_rates(asked, outcomes) == {"lora": 2e-4, "moslora:kaiming": 4e-4}
    by_task = settings(validation=["v"])
    scored = {cell.name: Outcome(status="ok", validation={"v": losses[cell.rate]}) for cell in tuning_cells(by_task)}
    assert set(choose_rates(by_task, scored).values()) == {1e-4}, "a score is the better the higher it is"
    assert run_count(asked, outcomes) == 6 + 4
    lost = {n: Outcome(status="failed") for n in outcomes if n.startswith("lora_")}
    assert run_count(asked, outcomes | lost) == 6 + 2, "an arm of which no rate works has no reported runs"
    del outcomes[bad]
    assert "lora" not in choose_rates(asked, outcomes), "its runs are not over"


REFUSED = {
    "lora,lora@optim.lr=5e-2": "optim.lr is set by the comparison for every run",
    "lora,moslora@train.seed=1": "train.seed is set by the comparison",
    "moslora@optim.mixer_factor=1,moslora@optim.mixer_factor=1.0": "once as 'moslora:orthogonal@optim.mixer_factor=1'",
    "lora,moslora@optim.mixer_factor=1@optim.mixer_factor=2": "optim.mixer_factor is given twice",
    "lora,moslora@optim.mixer_factor=-1": "mixer_factor is -1",
    "lora,moslora@optim.mixer_factor=1,6": "Arm '6' is not known",
    "lora,dora@optim.mixer_factor=6": "Arm 'dora@optim.mixer_factor=6': .* none trains",
    "lora,peft:HIRA@optim.mixer_factor=6": "none trains",
    "lora,full@mixer_trainable=false": "full trains every weight and has no adapter. Leave adapter.mixer_trainable out",
}


@pytest.mark.parametrize("arms", REFUSED)
def test_what_an_arm_cannot_change_is_refused_before_any_run(arms: str) -> None:
    with pytest.raises(MoSLoRAError, match=REFUSED[arms]):
        parse_arms(arms, RECIPE)


def test_arms_differ_only_in_the_keys_of_their_names():
    names = "lora,tsm,moslora:kaiming,moslora-init,dora,rslora,lora+,full,moslora:orthogonal@rank=16@alpha=32"
    adapter = {"use_rslora": True, "dropout": 0.1, "mixer_init": "kaiming", "factor_form": "mixed"}
    shared = Recipe.from_dict({"model": {"language": "x"}, "adapter": adapter})
    made = {arm.name: arm.apply(shared) for arm in parse_arms(names, shared)}
    assert not made["lora"].adapter.mixer_trainable
    assert made["lora"].adapter.mixer_init == "identity"
    assert (made["tsm"].adapter.mixer_init, made["tsm"].adapter.mixer_trainable) == ("butterfly", False)
    assert made["moslora:kaiming"].adapter.mixer_trainable
    assert [name for name, one in made.items() if one.adapter.use_rslora] == ["rslora"]
    assert [name for name, one in made.items() if one.adapter.use_dora] == ["dora"]
    assert made["lora+"].optim.lora_plus_ratio == 16
    forms = {name: one.adapter.factor_form for name, one in made.items() if one.adapter.factor_form != "free"}
    assert forms == {"moslora-init": "mixed"}
    for one in made.values():
        moslora_config(one.adapter)  # a combination that exists
    assert made["full"].model.language_mode == "full"
    last = made["moslora:orthogonal@rank=16@alpha=32"].adapter
    assert (last.rank, last.alpha, last.dropout) == (16, 32.0, 0.1)
