"""Settings that learning from preferences cannot follow are refused before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pairs import make_recipe

from mm_moslora.config import Recipe, usual_names
from mm_moslora.config.preference_config import LOSS_TYPES, GrpoConfig, KtoConfig, PreferenceConfig
from mm_moslora.training.preflight import check_settings
from mm_moslora.utils.errors import ConfigError

MODEL = {"vlm": "org/model"}
ASSEMBLED = {"language": "org/model", "vision": {"name": "org/tower"}}


def read(model: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    parts = model if model and "language" in model else {**MODEL, **(model or {})}
    return make_recipe(Path("run"), Path("pairs.jsonl"), parts, **sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": "grop"}, "objective"),
        ({"objective": "grpo", "kto": {"beta": 0.2}}, "kto is set, which only objective: kto reads"),
        ({"objective": "kto", "kto": {"beta": 0}}, "kto.beta is 0"),
        ({"objective": "kto", "kto": {"desirable_weight": 0}}, "kto.desirable_weight is 0"),
        ({"objective": "kto", "train": {"micro_batch": 1}}, "train.micro_batch is 1: the divergence is estimated"),
        ({"objective": "grpo", "grpo": {"rewards": []}}, "grpo.rewards is empty"),
        ({"objective": "grpo", "grpo": {"rewards": ["exact", "exact"]}}, "a name stands twice"),
        ({"objective": "grpo", "grpo": {"reward_weights": [1.0, 2.0]}}, "2 numbers and grpo.rewards 1 names"),
        ({"objective": "grpo", "grpo": {"generations": 1}}, "grpo.generations is 1"),
        ({"objective": "grpo", "grpo": {"generations": 3}}, "global_batch is 4, which counts answers: .* multiple of"),
        ({"objective": "grpo", "data": {"pack_tokens": 512}}, "which objective: grpo does not follow .TRL's GRPOTr"),
        ({"objective": "sft", "preference": {"beta": 0.2}}, "preference is set, which only objective: dpo reads"),
        ({"preference": {"beta": 0}}, "preference.beta is 0"),
        ({"preference": {"bta": 1}}, "bta"),
        ({"preference": {"loss_type": []}}, "preference.loss_type is empty"),
        ({"preference": {"loss_type": ["sigmiod"]}}, "Did you mean .*sigmoid"),
        ({"preference": {"loss_weights": [1.0, 2.0]}}, "2 numbers and preference.loss_type 1 losses"),
        ({"preference": {"loss_weights": [-1.0]}}, "expected 0 or more"),
        ({"preference": {"loss_weights": [0.0]}}, "one above 0"),
        ({"preference": {"loss_type": ["exo_pair"]}}, "exo_pair needs more than 0"),
        ({"preference": {"label_smoothing": 0.5}}, "expected 0 to below 0.5"),
        ({"preference": {"label_smoothing": 0.3, "loss_type": ["sigmoid", "ipo"]}}, "sigmoid, ipo does not read"),
        ({"objective": "grpo", "grpo": {"reward_weights": [0.0]}}, "one other than 0"),
        ({"model": {"language_mode": "full"}}, "model.language_mode is full: the reference"),
        ({"model": {"projector": {"mode": "full"}}}, "the projector trains.*model.projector.mode"),
        ({"model": {"vision": {"mode": "full"}}}, "model.vision.mode is full"),
        ({"train": {"rehearsal": False}}, "train.rehearsal is set, which objective: dpo does not follow"),
        ({"track": {"mixers_every": 2}}, "track.mixers_every is set, which objective: dpo does not follow"),
        ({"model": {"kernels": "triton"}}, "model.kernels is set, which objective: dpo does not follow"),
        ({"adapter": {"dropout": 0.1}}, "adapter.dropout is set"),
        ({"adapter": {"rank": 4, "peft": {"type": "LORA"}}}, "adapter.peft is set"),
        ({"objective": "kto", "data": {"pack_tokens": 512}}, "data.pack_tokens is set"),
        ({"data": {"max_length": 256, "pack_tokens": 511}}, "a row holds both answers.* Set it to 512 or more"),
        ({"data": {"too_long": "truncate"}}, "data.too_long is truncate"),
        ({"data": {"order": "sequential"}}, "records are always drawn at random"),
        ({"data": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 2}]}}, "data.train.1.weight is set"),
        ({"train": {"precision": "fp16"}}, "Choose bf16 or fp32"),
        ({"train": {"gradient_checkpointing": 3}}, "train.gradient_checkpointing is 3"),
        ({"train": {"compile": "inductor", "micro_tokens": 512}}, "train.micro_tokens, train.compile are set"),
        ({"validate": {"best": "validation_loss", "patience": 2}}, "validate.best, validate.patience are set"),
    ],
)
def test_what_the_objective_cannot_follow_is_named(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**sections)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ("zero0", "train.zero zero0 is a ZeRO-0, which divides nothing"),
        ("zero2_offload", "zero2_offload sets offload_optimizer, with which TRL's trainers are not tried"),
        ("zero3_offload", "zero3_offload sets offload_optimizer, offload_param"),
        ("zeropp", "zeropp sets zero_quantized"),
        ("zero4", "train.zero is 'zero4'"),
    ],
)
def test_a_way_to_divide_that_trainers_of_trl_do_not_take_is_named(zero: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(read(train={"zero": zero}, adapter={"rank": 4}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_from_python_too(value: float) -> None:
    for section, key in [
        (PreferenceConfig, "beta"), (KtoConfig, "beta"), (KtoConfig, "desirable_weight"),
        (KtoConfig, "undesirable_weight"), (GrpoConfig, "beta"), (GrpoConfig, "temperature"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=key):
            section(**{key: value})
    with pytest.raises(ConfigError, match=r"loss_weights is .* finite"):
        PreferenceConfig(loss_type=["sigmoid", "sft"], loss_weights=[1.0, value])
    with pytest.raises(ConfigError, match=r"reward_weights is .* finite"):
        GrpoConfig(rewards=["exact", "letter"], reward_weights=[1.0, value])


def test_the_projector_of_an_assembled_model_is_frozen_by_hand() -> None:
    with pytest.raises(ConfigError, match=r"the projector trains"):
        read(ASSEMBLED)
    frozen = {**ASSEMBLED, "projector": {"mode": "frozen", "weights": "runs/align"}}
    assert read(frozen).model.projector.mode == "frozen"


def test_a_recipe_survives_a_round_trip() -> None:
    mixture = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    recipe = read(preference=mixture, train={"gradient_checkpointing": True})
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_the_losses_are_those_of_trl() -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    from trl import DPOConfig

    text = str(DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    assert tuple(re.findall(r"`'(\w+)'`", text)) == LOSS_TYPES


def test_one_answer_to_a_micro_batch_is_enough_where_nothing_is_estimated() -> None:
    recipe = read(objective="kto", kto={"loss_type": "apo_zero_unpaired"}, train={"micro_batch": 1})
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", usual_names.REWARDS)
def test_a_misspelt_reward_is_refused_with_its_name(name: str) -> None:
    grpo = {"rewards": [f"{name}{name[-1]}"], "generations": 4}
    with pytest.raises(ConfigError, match=rf"grpo.rewards holds .*Did you mean .*{name}"):
        check_settings(read(objective="grpo", grpo=grpo))
    check_settings(read(objective="grpo", grpo={"rewards": [name], "generations": 4}))
