"""Decoders in which the conversations of one row would see each other are found by a probe, and refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import transformers

from mm_moslora.batch import Batch, Example
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.models.batching import row_probe
from mm_moslora.models.batching.row_probe import rows_of
from mm_moslora.models.vlm import supervised_hidden
from mm_moslora.training.engine.model_execution import refuse_row_shares
from mm_moslora.training.preflight import check_model
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ConfigError

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 16}


HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2}
KINDS = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=2),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, **HEADS, num_local_experts=2, num_experts_per_tok=1),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, **HEADS),
    "llama": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=32),
    "falcon": lambda: transformers.FalconConfig(**SIZES),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=32),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**SIZES, **HEADS, **HYBRID, num_experts=4),
    "lfm2": lambda: transformers.Lfm2Config(**SIZES, num_key_value_heads=1, layer_types=["conv", "full_attention"]),
    "mamba": lambda: transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2),
    "jamba": transformers.JambaConfig,
    "minimax_m2": transformers.MiniMaxM2Config,
    "olmo_hybrid": transformers.OlmoHybridConfig,
    "mpt": transformers.MptConfig,
    "recurrent_gemma": transformers.RecurrentGemmaConfig,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "phi3": transformers.Phi3Config,
}
"""Some of each kind: small configurations, and default ones, which are those of large models; the probe makes them
small."""
APART = {"gemma2", "llama", "falcon", "opt", "qwen3", "mistral", "phi3", "minimax_m2"}


def made(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(KINDS[kind](), trust_remote_code=False).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_decoders_that_mix_the_conversations_of_a_row_are_found(kind: str) -> None:
    with torch.device("meta"):
        model = made(kind)
    before = torch.random.get_rng_state()
    assert rows_of(model, "auto").apart == (kind in APART)
    assert torch.equal(torch.random.get_rng_state(), before)  # a run's seed decides its numbers


@pytest.mark.parametrize("kind", ["bloom", "gpt_oss", "gemma2", "llama", "falcon", "opt", "lfm2"])
def test_the_small_model_shows_what_the_model_itself_does(kind: str) -> None:
    """Another first conversation moves the second one in the model itself where the probe says so."""
    model = made(kind)
    set_attention(model, choose_attention(model).name)
    first, second = (torch.randint(2, 97, (length,)) for length in (21, 17))

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        examples = [
            Example(id=str(i), input_ids=row, supervised=torch.ones(len(row)).bool())
            for i, row in enumerate((ids, second))
        ]
        with torch.no_grad():
            return supervised_hidden(model, Batch.from_examples(examples))[len(first) - 1 :]

    moved = float((hidden(first) - hidden(first.flip(0))).abs().max())
    assert (moved == 0) == rows_of(model, "auto").apart


@pytest.mark.skipif(find_spec("fla") is not None, reason="flash-linear-attention keeps the conversations apart")
def test_the_first_fault_is_the_reason() -> None:
    """Later attempts have larger widths, and fail for being large."""
    with torch.device("meta"):
        model = made("olmo_hybrid")
    assert "keep packed sequences apart" in rows_of(model, "auto").fault


def test_a_decoder_that_cannot_be_probed_is_refused_with_the_reason(recipe, monkeypatch) -> None:
    monkeypatch.setattr(row_probe, "_FINDINGS", {})
    monkeypatch.setattr(row_probe, "_moved", lambda _: 1 / 0)
    model = made("llama")
    with pytest.raises(
        ConfigError, match=r"may see each other; a probe failed \(ZeroDivisionError: .*micro_batch to 1"
    ):
        check_model(recipe, model, layers=2)
    check_model(replace(recipe, train=replace(recipe.train, micro_batch=1)), model, layers=2)


def test_such_a_decoder_is_refused_unless_a_row_holds_one_conversation(recipe, tmp_path) -> None:
    folder = tmp_path / "gpt_oss"
    shutil.copytree(recipe.model.language, folder)
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    sizes = SIZES | HEADS | {"vocab_size": vocabulary, "num_local_experts": 2, "num_experts_per_tok": 1}
    transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).save_pretrained(folder)
    recipe = replace(
        recipe, model=replace(recipe.model, language=str(folder)),
        adapter=replace(recipe.adapter, targets=["q_proj", "v_proj"]),
        train=replace(recipe.train, steps=1, rehearsal=False),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"In a gpt_oss model .* Set train.micro_batch to 1"):
        train(recipe)
    train(replace(recipe, train=replace(recipe.train, micro_batch=1, output=str(tmp_path / "alone"))))


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("falcon", "sdpa"), ("gemma2", "eager")])
def test_rows_are_not_shared_by_an_attention_that_sees_its_own_tokens_only(kind: str, attention: str) -> None:
    model = made(kind)
    with pytest.raises(ConfigError, match=rf"train.sequence_parallel is 2, but .* '{attention}'"):
        refuse_row_shares(model, 2, attention=attention)


def test_a_class_whose_own_widths_are_too_large_to_build_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-VL 72B: its rotary sections belong to heads of 128, and one of its layers has 0.9 G parameters."""
    monkeypatch.setattr(row_probe, "_FINDINGS", {})
    config = transformers.Qwen2_5_VLTextConfig(
        hidden_size=8192, intermediate_size=29568, num_hidden_layers=1, num_attention_heads=64, num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLTextModel(config)
    assert rows_of(model, "auto").apart
