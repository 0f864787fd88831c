"""Arms, learning rates and grids, and what may not change between two calls."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from mm_moslora.compare.arms import parse_arms
from mm_moslora.compare.comparison_cell import write_outcome
from mm_moslora.compare.comparison_plan import (
    Outcome,
    choose_rates,
    grid_of,
    hopeless_arms,
    recipe_hash,
    reported_cells,
    run_count,
    tuning_cells,
)
from mm_moslora.compare.comparison_run import ArmComparison
from mm_moslora.config import Recipe
from mm_moslora.models.trainable_parts import moslora_config
from mm_moslora.utils.errors import ConfigError, MoSLoRAError
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
    del outcomes[bad]
    assert "lora" not in choose_rates(asked, outcomes), "its runs are not over"


def test_a_value_of_an_arm_is_chosen_as_its_rate_is() -> None:
    several = "moslora:orthogonal@optim.mixer_factor=1,6,24"
    arms = parse_arms(f"lora,{several},rslora", RECIPE)
    assert [arm.name for arm in arms] == ["lora", several, "rslora"]
    assert [way.apply(RECIPE).optim.mixer_factor for way in arms[1].ways] == [1, 6, 24]
    asked = settings(arms=arms, rates=[1e-4, 2e-4], seeds=2)
    cells = tuning_cells(asked)
    assert len(cells) == len({cell.name for cell in cells}) == 2 * (1 + 3 + 1)
    losses = {cell.name: 2.0 + cell.rate for cell in cells}
    best = f"{arms[1].ways[1].name.replace(':', '-').replace('@', '-')}_lr0.0002_tune0"
    losses[best] = 1.0
    outcomes = {name: Outcome(status="ok", validation={"loss": loss}) for name, loss in losses.items()}
    assert choose_rates(asked, outcomes) == {"lora": 1e-4, arms[1].ways[1].name: 2e-4, "rslora": 1e-4}
    reported = [cell for cell in reported_cells(asked, choose_rates(asked, outcomes)) if cell.arm.group == several]
    assert [(cell.arm.apply(RECIPE).optim.mixer_factor, cell.rate, cell.seed) for cell in reported] == [
        (6, 2e-4, 0), (6, 2e-4, 1),
    ]  # fmt: skip
    chosen, told = ({cell.recipe(RECIPE, Path()).train.seed for cell in some} for some in (cells, reported))
    assert (len(told), chosen & told) == (2, set()), "no run that chose a rate is reported with it"
    assert run_count(asked, outcomes) == 10 + 6
    del outcomes[next(cell.name for cell in cells if cell.arm.name.endswith("=24"))]
    assert several not in {way.group for way in arms[1].ways if way.name in choose_rates(asked, outcomes)}
    assert hopeless_arms(asked, outcomes) == []
    one_rate = dataclasses.replace(asked, rates=[1e-4])
    assert {cell.arm.group for cell in tuning_cells(one_rate)} == {several}, "the others have nothing to choose"


def test_values_combine_and_none_is_run_twice() -> None:
    (arm, _) = parse_arms("moslora@rank=4,8@optim.mixer_factor=1,6,lora", RECIPE)
    assert {(way.apply(RECIPE).adapter.rank, way.apply(RECIPE).optim.mixer_factor) for way in arm.ways} == {
        (4, 1), (4, 6), (8, 1), (8, 6),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="given twice"):
        parse_arms("moslora:orthogonal@rank=4,8,moslora:orthogonal@rank=8,lora", RECIPE)
    with pytest.raises(ConfigError, match=r"mixer_factor is -1"):
        parse_arms("lora,moslora@optim.mixer_factor=1,-1", RECIPE)


REFUSED = {
    "lora,lora@optim.lr=5e-2": "optim.lr is set by the comparison for every run",
    "lora,moslora@train.seed=1,2": "train.seed is set by the comparison",
    "lora,moslora@optim.mixer_factor=1,1.0": "is given twice, once as 'moslora:orthogonal@optim.mixer_factor=1'",
    "lora,moslora@optim.mixer_factor=1,6@optim.mixer_factor=2": "optim.mixer_factor is given twice",
    "lora,dora@optim.mixer_factor=6,24": "Arm 'dora@optim.mixer_factor=6': .* none trains",
    "lora,peft:HIRA@optim.mixer_factor=6": "none trains",
    "lora,full@mixer_trainable=false": "full trains every weight and has no adapter. Leave adapter.mixer_trainable out",
}


@pytest.mark.parametrize("arms", REFUSED)
def test_what_an_arm_cannot_change_is_refused_before_any_run(arms: str) -> None:
    with pytest.raises(MoSLoRAError, match=REFUSED[arms]):
        parse_arms(arms, RECIPE)


def test_arms_that_start_from_one_adapter_differ_in_other_keys():
    recipe = dataclasses.replace(RECIPE, adapter=dataclasses.replace(RECIPE.adapter, weights="runs/first"))
    with pytest.raises(ConfigError, match=r"'lora' and 'moslora:orthogonal' would be the same"):
        parse_arms("lora,moslora", recipe)
    assert len(parse_arms("moslora,moslora@optim.mixer_factor=6", recipe)) == 2


def test_a_grid_grows_until_its_best_rate_is_inside(tmp_path: Path):
    """The best rate of LoRA lies two steps above the grid; the other arm diverges just above it."""
    asked = settings(rates=[1e-4, 2e-4, 4e-4], grow=3)
    outcomes: dict[str, Outcome] = {}

    def run(rates: set[float]) -> None:
        waiting = [cell for cell in tuning_cells(asked, outcomes) if cell.name not in outcomes]
        assert {cell.rate for cell in waiting} == rates
        for cell in waiting:
            loss = abs(math.log2(cell.rate / 16e-4))
            outcomes[cell.name] = Outcome(status="ok", validation={"loss": loss})
            if cell.arm.name != "lora" and cell.rate > 4e-4:
                outcomes[cell.name] = Outcome(status="diverged")

    run({1e-4, 2e-4, 4e-4})
    assert choose_rates(asked, outcomes) == {}, "neither is inside its grid"
    run({8e-4})
    assert choose_rates(asked, outcomes) == {"moslora:kaiming": 4e-4}
    run({16e-4})
    run({32e-4})
    run(set())
    assert choose_rates(asked, outcomes) == {"lora": 16e-4, "moslora:kaiming": 4e-4}
    assert run_count(asked, outcomes) == len(outcomes) + 2 * asked.seeds == 10 + 4
    assert run_count(dataclasses.replace(asked, grow=0), outcomes) == 6 + 4
    assert len(grid_of(dataclasses.replace(asked, grow=1), asked.arms[0], outcomes)) == 4, "at most so many"
    comparison = ArmComparison(RECIPE, dataclasses.replace(asked, validation=["v"]), tmp_path, hold_out=0.1)
    for cell in tuning_cells(asked, outcomes):
        recipe = cell.recipe(RECIPE, tmp_path)
        score = {"v": -outcomes[cell.name].validation.get("loss", math.nan)}
        found = dataclasses.replace(outcomes[cell.name], validation=score, recipe=recipe_hash(recipe))
        write_outcome(Path(recipe.train.output), found)
    comparison._read_outcomes()
    assert comparison.outcomes.keys() == outcomes.keys(), "a grown grid is read"
    flat = {cell.name: Outcome(status="ok", validation={"loss": 1.0}) for cell in tuning_cells(asked)}
    assert grid_of(asked, asked.arms[0], flat) == [1e-4, 2e-4, 4e-4], "an edge no better than its neighbour"
    assert len(tuning_cells(settings(rates=[1e-4, 2e-4], grow=3), outcomes)) == 4, "two rates have no inside"
    with pytest.raises(ConfigError, match="--grow is -1, expected 0 or more"):
        settings(grow=-1)


def test_arms_differ_only_in_the_keys_of_their_names():
    names = "lora,tsm,moslora:kaiming,moslora-init,dora,rslora,lora+,full,moslora:orthogonal@rank=16@alpha=32"
    adapter = {"use_rslora": True, "dropout": 0.1, "mixer_init": "kaiming", "factor_form": "mixed"}
    shared = Recipe.from_dict({"model": {"language": "x"}, "adapter": adapter, "optim": {"lora_plus_ratio": 4.0}})
    made = {arm.name: arm.apply(shared) for arm in parse_arms(names, shared)}
    assert not made["lora"].adapter.mixer_trainable
    assert made["lora"].adapter.mixer_init == "identity"
    assert (made["tsm"].adapter.mixer_init, made["tsm"].adapter.mixer_trainable) == ("butterfly", False)
    assert made["moslora:kaiming"].adapter.mixer_trainable
    assert [name for name, one in made.items() if one.adapter.use_rslora] == ["rslora"]
    assert [name for name, one in made.items() if one.adapter.use_dora] == ["dora"]
    assert {name: one.optim.lora_plus_ratio for name, one in made.items() if one.optim.lora_plus_ratio != 1} == {
        "lora+": 16
    }
    forms = {name: one.adapter.factor_form for name, one in made.items() if one.adapter.factor_form != "free"}
    assert forms == {"moslora-init": "mixed"}
    for one in made.values():
        moslora_config(one.adapter)  # a combination that exists
    assert made["full"].model.language_mode == "full"
    last = made["moslora:orthogonal@rank=16@alpha=32"].adapter
    assert (last.rank, last.alpha, last.dropout) == (16, 32.0, 0.1)
