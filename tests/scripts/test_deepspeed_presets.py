"""The shipped DeepSpeed files: DeepSpeed itself accepts them, and every key is explained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mm_moslora.config import TrainConfig
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.hardware import extensions_folder

FOLDER = Path(__file__).parents[2] / "deepspeed_configs"
STAGES = {
    "zero0": 0, "zero1": 1, "zero2": 2, "zero2_full": 2, "zero2_offload": 2, "zero2_cpuadam": 2, "zero3": 3,
    "zero3_full": 3, "zero3_hpz": 3, "zeropp": 3, "zero3_offload": 3, "zero3_nvme": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_MOSLORA_NVME", str(tmp_path))


def _load(name: str) -> dict[str, Any]:
    config = json.loads((FOLDER / f"{name}.json").read_text())
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("name", STAGES)
def test_deepspeed_accepts_a_filled_preset(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    from mm_moslora.training.engine.deepspeed_settings import check_settings, deepspeed_config

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = deepspeed_config(TrainConfig(zero=name, global_batch=8, micro_batch=2), "bf16", 1.0)
    check_settings(config, name)  # no key that it does not know
    parsed = DeepSpeedConfig(config)
    zero = parsed.zero_config
    assert parsed.zero_optimization_stage == STAGES[name]
    assert parsed.zero_allow_untested_optimizer
    assert parsed.zero_force_ds_cpu_optimizer is (name == "zero2_cpuadam")
    offloads = {"zero2_offload": "cpu", "zero2_cpuadam": "cpu", "zero3_offload": "cpu", "zero3_nvme": "cpu"}
    assert getattr(zero.offload_optimizer, "device", None) == offloads.get(name)
    assert getattr(zero.offload_param, "device", None) == {"zero3_offload": "cpu", "zero3_nvme": "nvme"}.get(name)
    assert zero.zero_hpz_partition_size == (8 if name in ("zero3_hpz", "zeropp") else 1)
    assert zero.zero_quantized_nontrainable_weights is (name == "zeropp")
    if STAGES[name] == 3:
        assert zero.param_persistence_threshold == 1_000_000
    if name == "zero3_nvme":
        assert zero.offload_param.nvme_path == tmp_path


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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_recipe_fills_a_preset_and_writes_what_releases_differ_in(precision: str) -> None:
    from mm_moslora.training.engine.deepspeed_settings import deepspeed_config

    for name in STAGES:
        config = deepspeed_config(TrainConfig(zero=name, global_batch=8, micro_batch=2), precision, 0.5)
        assert config["gradient_clipping"] == 0.5
        assert config["gradient_accumulation_steps"] == 4
        assert config["bf16"] == {"enabled": precision == "bf16", "check_grad_overflow": True}
        assert config["fp16"]["enabled"] is (precision == "fp16")
        assert "auto" not in json.dumps(config)


def test_the_defaults_with_which_memory_is_counted_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from mm_moslora.training.deepspeed_presets import DEFAULTS

    fields = DeepSpeedZeroConfig.model_fields
    known = {field.alias or name: field.default for name, field in fields.items()}
    assert {key: known[key] for key in DEFAULTS} == DEFAULTS
    assert fields["contiguous_gradients"].default is True


def test_adapters_of_any_rank_stay_whole_under_zero3_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    from mm_moslora.training.engine.deepspeed_settings import deepspeed_config

    def threshold(zero: str, largest: int) -> int:
        config = deepspeed_config(TrainConfig(zero=zero), "bf16", 1.0, largest_adapter=largest)
        return config["zero_optimization"]["stage3_param_persistence_threshold"]

    for name in ("zero3", "zero3_offload"):
        assert threshold(name, 16 * 4096) == 1_000_000
        assert threshold(name, 512 * 14_336) == 512 * 14_336
    own = tmp_path / "own.json"
    for given, expected in ((200_000, 200_000), (0, 0), (None, 128 * 11_008)):
        settings = {"stage": 3} | ({} if given is None else {"stage3_param_persistence_threshold": given})
        own.write_text(json.dumps({"zero_optimization": settings}))
        assert threshold(str(own), 128 * 11_008) == expected


def test_a_file_that_contradicts_the_recipe_and_a_preset_that_is_not_there_are_refused(tmp_path: Path) -> None:
    from mm_moslora.training.engine.deepspeed_settings import deepspeed_config

    own = tmp_path / "own.json"
    own.write_text(json.dumps(_load("zero2") | {"bf16": {"enabled": True}}))
    assert deepspeed_config(TrainConfig(zero=str(own)), "bf16", 1.0)["bf16"]["enabled"]
    with pytest.raises(ConfigError, match=r"bf16\.enabled is True, but train\.precision is fp32"):
        deepspeed_config(TrainConfig(zero=str(own)), "fp32", 1.0)
    with pytest.raises(ConfigError, match="which does not exist"):
        deepspeed_config(TrainConfig(zero=str(tmp_path / "no.json")), "fp32", 1.0)
    with pytest.raises(ConfigError, match="Did you mean 'zero2_offload'"):
        deepspeed_config(TrainConfig(zero="zero2_ofload"), "fp32", 1.0)


def test_a_lock_of_a_killed_build_is_named_before_anybody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mm_moslora.training.engine.deepspeed_settings import warn_of_stale_locks

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    warn_of_stale_locks()
    assert "lock" not in caplog.text  # importing DeepSpeed may warn of other things
    lock = tmp_path / "py311" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    warn_of_stale_locks()
    assert f"rm {lock}" in caplog.text


def test_a_run_keeps_what_it_compiles_to_itself_under_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from mm_moslora.training.engine.deepspeed_settings import prepare_deepspeed

    monkeypatch.setattr("deepspeed.comm.init_distributed", lambda **_: None)
    for name, value in (("DS_ACCELERATOR", "cpu"), ("DS_SKIP_CUDA_CHECK", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for given in (None, "/elsewhere"):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "taken back after the test")
        if given is None:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        else:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", given)
        prepare_deepspeed("zero2")
        assert os.environ["TORCH_EXTENSIONS_DIR"] == (given or str(extensions_folder({})))


def test_every_key_is_explained() -> None:
    text = (FOLDER / "README.md").read_text()
    for name in STAGES:
        config = _load(name)
        assert f"`{name}`" in text
        for key in {*config, *config["zero_optimization"]} - {"zero_optimization", "bf16", "fp16", "stage"}:
            assert f"`{key}`" in text, f"{key} of {name}.json is not in the README"
