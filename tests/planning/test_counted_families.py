"""Memory of families whose layers differ, whose experts are stacked, or whose towers read numbers off their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planning_configs import memory_of
from small_families import default_config, stand_in_processor
from tiny import make_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText

from mm_moslora.config import AdapterConfig, ModelConfig, Recipe
from mm_moslora.planning.run_plan import DataSize, plan
from mm_moslora.training.metrics import model_cost
from mm_moslora.training.metrics.gpu_specs import parse_gpus
from mm_moslora.utils.errors import ModelError

SIZE = DataSize(samples=1000, tokens=600)
ATTENTION = AdapterConfig(targets=["o_proj"])
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def saved(folder: Path, kind: str, **changes: Any) -> ModelConfig:
    config = default_config(kind)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    processor = stand_in_processor(config)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return ModelConfig(vlm=str(folder))


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("qwen3_5", AdapterConfig()),  # recurrences and attention by turns
        ("gemma4", AdapterConfig()),  # heads of two widths
        ("lfm2_vl", AdapterConfig()),
        ("kimi_k25", ATTENTION),  # its first layer has none
        ("qwen3_vl_moe", ATTENTION),
    ],
)
def test_parameters_are_those_of_the_whole_model(kind: str, adapter: AdapterConfig, tmp_path: Path) -> None:
    few = {"num_hidden_layers": 6} if kind == "kimi_k25" else {}
    recipe = Recipe(model=saved(tmp_path, kind, **few), adapter=adapter)
    planned = plan(recipe, parse_gpus("8xH100"), SIZE)
    size = planned.cost
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    own = sum(parameter.numel() for parameter in whole.parameters())
    assert sum(size.parts.get(part, (0, 0))[0] for part in ("language", "vision", "projector")) == own
    assert size.layers == whole.config.get_text_config().num_hidden_layers
    assert size.kept_per_layer > 0
    assert size.unseen == ""
    assert planned.flops.total > 0


SMALL = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "num_hidden_layers": 6,
}  # fmt: skip


def small_language(folder: Path, kind: str, **fields: Any) -> ModelConfig:
    make_tokenizer().save_pretrained(folder)
    AutoConfig.for_model(kind, **fields).save_pretrained(folder)
    return ModelConfig(language=str(folder))


def test_whatever_a_class_raises_while_it_is_built_is_one_error(tmp_path: Path) -> None:
    model = small_language(tmp_path, "qwen4_exp")  # its default configuration is not whole
    with pytest.raises(ModelError, match=rf"{tmp_path} cannot be built without weights \(TypeError: .*, so nothing of"):
        plan(Recipe(model=model), parse_gpus("8xH100"), SIZE)


def test_a_tower_without_patches_is_planned_by_its_processor(tmp_path: Path) -> None:
    size = memory_of(Recipe(model=saved(tmp_path, "gemma3n")))
    assert size.tokens_per_image > 200


def test_memory_that_cannot_be_counted_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise NotImplementedError("no kernel for it")

    monkeypatch.setattr(model_cost, "kept_bytes", fails)
    with pytest.raises(ModelError, match=r"cannot be counted: Lfm2.* \(NotImplementedError: no kernel for it\)"):
        plan(Recipe(model=saved(tmp_path, "lfm2_vl")), parse_gpus("8xH100"), SIZE)
