"""Memory of families whose layers differ, whose experts are stacked, or whose towers read numbers off their inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from planning_configs import memory_of
from small_families import default_config, stand_in_processor
from tiny import make_tokenizer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

from mm_moslora.config import AdapterConfig, ModelConfig, Recipe
from mm_moslora.models.meta_execution import kept_bytes
from mm_moslora.models.meta_model import build_meta_model
from mm_moslora.planning.run_plan import DataSize, plan
from mm_moslora.training.metrics import activation_memory
from mm_moslora.training.metrics.gpu_memory import StepMemory
from mm_moslora.training.metrics.gpu_specs import parse_gpus
from mm_moslora.training.metrics.step_flops import StepShape
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
    size = planned.activation_memory
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


@pytest.mark.parametrize("loops", [1, 4])
def test_layers_that_a_class_loops_over_cost_what_their_runs_cost(loops: int, tmp_path: Path) -> None:
    parts = {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2, "n_recurrent_loops": loops}
    model = small_language(tmp_path, "dory", **SMALL, **parts, layer_types=["full_attention"] * 6)
    recipe = Recipe(model=model, adapter=AdapterConfig(targets=["q_proj"], rank=4, alpha=8))
    size = memory_of(recipe, dtype=torch.float32)
    assert (size.layers, size.runs) == (6, 4 + 2 * loops)
    whole: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).train().requires_grad_(False)
    row = torch.randn(1, 600, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        kept = kept_bytes(lambda: whole.model(inputs_embeds=row, use_cache=False), whole.model)
    assert size.runs * 600 * size.kept_per_layer + 600 * size.kept_elsewhere == pytest.approx(kept, rel=0.1)
    found = size.counter.count(StepShape.of([600], supervised=0))
    flops = counted.get_flop_counts()["Global"]
    assert found.base == pytest.approx(2 * sum(flops.get(kind, 0) for kind in PRODUCTS), rel=0.02)  # forward, and back
    step = StepMemory(size=size, zero="zero2", world=1, checkpointing=True)
    assert step.of(600, supervised=0, images=0).activations >= size.runs * 600 * 64 * 4


def test_parameters_that_layers_share_are_counted_once(tmp_path: Path) -> None:
    kinds = ["mamba", "hybrid"] * 3
    few = {"mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 32, "num_mem_blocks": 1}
    model = small_language(tmp_path, "zamba2", **SMALL, **few, layers_block_type=kinds, hybrid_layer_ids=[1, 3, 5])
    adapter = AdapterConfig(targets=["in_proj", "gate_up_proj"])
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    bones = build_meta_model(dataclasses.replace(model, quantisation="nf4"), adapter)
    assert bones.parameters()["language"][0] == sum(parameter.numel() for parameter in whole.parameters())
    shared = {id(part): part.weight.numel() for part in whole.model.layers.modules() if isinstance(part, nn.Linear)}
    assert sorted(bones.quantisable()) == sorted(shared.values())


def test_layers_are_found_whatever_their_class_calls_them(tmp_path: Path) -> None:
    model = small_language(tmp_path, "gpt2", n_embd=64, n_layer=3, n_head=2, vocab_size=400)
    planned = plan(Recipe(model=model), parse_gpus("8xH100"), SIZE)
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    weights = sum(part.weight.numel() for part in whole.transformer.h.modules() if isinstance(part, Conv1D))
    assert planned.activation_memory.layers == 3
    assert planned.flops.base == 4 * weights * SIZE.tokens


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

    monkeypatch.setattr(activation_memory, "kept_bytes", fails)
    with pytest.raises(ModelError, match=r"cannot be counted: Lfm2.* \(NotImplementedError: no kernel for it\)"):
        plan(Recipe(model=saved(tmp_path, "lfm2_vl")), parse_gpus("8xH100"), SIZE)
