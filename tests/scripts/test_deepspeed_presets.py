"""The shipped DeepSpeed files: DeepSpeed itself accepts them, and every key is explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "deepspeed_configs"
STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}


def _load(name: str) -> dict[str, Any]:
    config = json.loads((FOLDER / f"{name}.json").read_text())
    assert isinstance(config, dict)
    return config


def test_the_presets_are_these() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_deepspeed_accepts_a_filled_preset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = _load(name)
    config |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    config |= {"gradient_clipping": 1.0, "bf16": {"enabled": True, "check_grad_overflow": True}}
    config["fp16"] |= {"enabled": False}
    assert "auto" not in json.dumps(config)
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_optimization_stage == STAGES[name]
    assert parsed.zero_allow_untested_optimizer
    assert parsed.zero_force_ds_cpu_optimizer is False
    assert (parsed.zero_config.offload_optimizer is not None) == name.endswith("_offload")
    if STAGES[name] == 3:
        assert parsed.zero_config.param_persistence_threshold == 1_000_000


@pytest.mark.parametrize("name", STAGES)
def test_what_the_recipe_decides_is_left_to_it(name: str) -> None:
    config = _load(name)
    for key in (
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    ):  # fmt: skip
        assert config[key] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    assert "optimizer" not in config
    assert "scheduler" not in config


def test_every_key_is_explained() -> None:
    text = (FOLDER / "README.md").read_text()
    for name in STAGES:
        config = _load(name)
        assert f"`{name}`" in text
        for key in {*config, *config["zero_optimization"]} - {"zero_optimization", "bf16", "fp16", "stage"}:
            assert f"`{key}`" in text, f"{key} of {name}.json is not in the README"
