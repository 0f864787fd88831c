"""What the patches of transformers and torch stand on; a test here fails when an installed release changes it."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers as t
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mm_moslora.models.families import LEAN_LAYERS
from mm_moslora.models.memory_efficient.decoder_layers import LeanLayer
from mm_moslora.models.transformers_patches import attention_within, mix_in, wrap_checkpointing

PARAMETERS = {
    "self", "hidden_states", "attention_mask", "position_ids", "cache", "use_cache", "position_embeddings", "kwargs",
}  # fmt: skip
"""Of the forward pass of a decoder layer."""
SOURCES = {
    name: f"transformers.models.{family}.modeling_{family}"
    for name, family in {
        "LlamaDecoderLayer": "llama", "MistralDecoderLayer": "mistral", "Qwen2DecoderLayer": "qwen2",
        "Qwen3DecoderLayer": "qwen3", "Qwen2VLDecoderLayer": "qwen2_vl", "Qwen2_5_VLDecoderLayer": "qwen2_5_vl",
        "Qwen3VLTextDecoderLayer": "qwen3_vl",
    }.items()
}  # fmt: skip


def tiny(layers: int = 2) -> t.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_hidden_layers=layers, num_key_value_heads=2)).train()


@pytest.mark.parametrize("name", sorted(LEAN_LAYERS))
def test_the_layers_that_lean_layers_stand_for_are_the_known_ones(name: str) -> None:
    module = __import__(SOURCES[name], fromlist=[name])
    layer = getattr(module, name)
    assert layer.__module__ == SOURCES[name]
    assert issubclass(layer, GradientCheckpointingLayer)
    assert set(inspect.signature(layer.forward).parameters) == PARAMETERS


def test_the_checkpointing_of_transformers_is_put_around_the_forward_of_every_subclass() -> None:
    assert GradientCheckpointingLayer.__module__ == "transformers.modeling_layers"
    assert "__init_subclass__" in vars(GradientCheckpointingLayer)
    model, checkpointed = tiny(), []
    for layer in model.model.layers:
        mix_in(layer, LeanLayer)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrap_checkpointing(
        model, lambda layer, checkpoint: lambda *given: checkpointed.append(type(layer).__name__) or checkpoint(*given)
    )
    model(torch.arange(4)[None]).logits.sum().backward()
    assert checkpointed == ["LeanLlamaDecoderLayer"] * 2  # once a layer


def test_attention_is_looked_up_in_the_configuration_at_every_pass() -> None:
    assert set(inspect.signature(ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters) >= {
        "module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs",
    }  # fmt: skip
    model, ids = tiny().eval(), torch.arange(4)[None]
    before = model.config._attn_implementation
    with attention_within(model, "eager"):
        assert model(ids, output_attentions=True).attentions[0] is not None
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == before != "eager"


def test_what_is_read_of_models_is_there() -> None:
    assert t.LlamaModel._supports_attention_backend is True
    assert t.LlamaModel._supports_flash_attn is True
    assert callable(t.Qwen2VLProcessor._get_num_multimodal_tokens)
    assert hasattr(t.PreTrainedModel, "_keep_in_fp32_modules_strict")
