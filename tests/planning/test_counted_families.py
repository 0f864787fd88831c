"""Memory of families whose layers differ, whose experts are stacked, or whose towers read numbers off their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planning_configs import memory_of
from transformers import AutoConfig, AutoModelForImageTextToText

from mm_moslora.config import AdapterConfig, ModelConfig, Recipe
from mm_moslora.models.assembly import pretrained_parts
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.planning.run_plan import DataSize, plan
from mm_moslora.planning.small_families import default_config, small_family_model, stand_in_processor
from mm_moslora.training.metrics import activation_memory
from mm_moslora.training.metrics.gpu_specs import parse_gpus
from mm_moslora.training.metrics.meta_execution import kept_bytes
from mm_moslora.utils.errors import ModelError

SIZE = DataSize(samples=1000, tokens=600)
EXPERTS = AdapterConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])


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
        ("minicpmv4_6", AdapterConfig()),  # recurrences and attention by turns
        ("molmo2", AdapterConfig()),
        ("gemma4", AdapterConfig()),  # heads of two widths
        ("lfm2_vl", AdapterConfig()),
        ("kimi_k25", EXPERTS),  # its first layer has none
        ("qwen3_vl_moe", EXPERTS),
    ],
)
def test_parameters_are_those_of_the_whole_model(kind: str, adapter: AdapterConfig, tmp_path: Path) -> None:
    few = {"num_hidden_layers": 6} if kind == "kimi_k25" else {}
    recipe = Recipe(model=saved(tmp_path, kind, **few), adapter=adapter)
    planned = plan(recipe, parse_gpus("8xH100"), SIZE)
    size = planned.activation_memory
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    own = sum(parameter.numel() for parameter in whole.parameters())
    assert sum(size.parts.get(part, (0, 0))[0] for part in ("language", "vision", "projector")) == own
    assert size.layers == whole.config.get_text_config().num_hidden_layers
    assert size.kept_per_layer > 0
    assert size.unseen == ""
    assert planned.flops.total > 0


def test_what_layers_with_adapted_experts_keep_is_counted(tmp_path: Path) -> None:
    config = default_config("qwen3_vl_moe")
    processor = stand_in_processor(config)
    model = small_family_model(config, words=len(processor.tokenizer), accept=lambda made: None)
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    recipe = Recipe(model=ModelConfig(vlm=str(tmp_path)), adapter=EXPERTS)
    size = memory_of(recipe, dtype=torch.float32)
    parts = pretrained_parts(processor, model=model, base={"vlm": str(tmp_path), "vlm_revision": None})
    attach_adapters(parts, recipe.model, recipe.adapter)
    decoder: Any = model.train().get_decoder()
    for tokens in (100, 900):
        hidden = torch.randn(1, tokens, size.width, requires_grad=True)
        found = kept_bytes(lambda row=hidden: decoder(inputs_embeds=row, use_cache=False), decoder)
        layers = tokens * size.kept_per_layer + size.stacks
        assert size.layers * layers + size.products + tokens * size.kept_elsewhere == pytest.approx(found, rel=0.1)
    assert size.made_dense == size.stacks > 0


def test_memory_that_cannot_be_counted_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise NotImplementedError("no kernel for it")

    monkeypatch.setattr(activation_memory, "kept_bytes", fails)
    with pytest.raises(ModelError, match=r"cannot be counted: Molmo2.* \(NotImplementedError: no kernel for it\)"):
        plan(Recipe(model=saved(tmp_path, "molmo2")), parse_gpus("8xH100"), SIZE)
