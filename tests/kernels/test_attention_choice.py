"""The attention of a device is chosen before the model is on it."""

from __future__ import annotations

import pytest
import torch
import transformers

from mm_moslora.kernels.attention import attention_choice, gpu_attention
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.precision import run_arithmetic
from mm_moslora.utils.errors import ConfigError


@pytest.fixture
def language():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def choose(language, monkeypatch, installed, faults=None, requested="auto"):
    """The choice for a GPU while the model is on the CPU, with flash-attention packages and kernels that fail."""
    monkeypatch.setattr(attention_choice, "is_installed", lambda name: name in installed)
    monkeypatch.setattr(attention_choice, "flash_fault", lambda name, _: (faults or {}).get(name))
    found = gpu_attention.KernelTrial(kernel=None, words="PyTorch's")
    monkeypatch.setattr(attention_choice, "pytorch_kernel", lambda _: found)
    return attention_choice.choose_attention(language, requested, device=torch.device("cuda", 0))


def test_attention_is_chosen_for_the_device_to_come(language, monkeypatch):
    two, three, four = (f"flash_attention_{number}" for number in (2, 3, 4))
    assert choose(language, monkeypatch, {two}).name == two
    assert choose(language, monkeypatch, {two, three, four}).name == four
    assert choose(language, monkeypatch, {two}, requested=SEGMENTS).name == SEGMENTS
    own = choose(language, monkeypatch, {})
    assert (own.name, own.words) == (SEGMENTS, "PyTorch's")
    with run_arithmetic(deterministic=True):
        assert choose(language, monkeypatch, {two}).name == SEGMENTS, "its order of sums is not PyTorch's to choose"
    assert choose(language.float(), monkeypatch, {two, three}).name == SEGMENTS


def test_attention_that_does_not_load_is_named_and_the_next_one_taken(language, monkeypatch):
    two, three = "flash_attention_2", "flash_attention_3"
    broken = {three: "ImportError: undefined symbol"}
    found = choose(language, monkeypatch, {two, three}, broken)
    assert (found.name, found.words) == (two, two)
    assert found.faults == ("flash_attention_3 does not run here: ImportError: undefined symbol",)
    with pytest.raises(ConfigError, match="undefined symbol"):
        choose(language, monkeypatch, {two, three}, broken, requested=three)
    monkeypatch.setattr(attention_choice, "is_installed", lambda _: False)
    with pytest.raises(ConfigError, match="flash-attn-3"):
        attention_choice.require_attention("flash_attention_3")
