"""Adapters on tied weights: what is merged, and loaded again, computes what the live adapter computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, load_adapter, merge, save_adapter
from tests.adapters.adapter_models import IDS, llama, logits, train_a_bit

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")


def _bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=64, **sizes)).eval()


def _t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)).eval()


def _output(model: nn.Module) -> Tensor:
    given = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **given).logits


MODELS = {"llama": lambda: llama(tie_word_embeddings=True), "bert": _bert, "t5": _t5}
TARGETS = [
    ("llama", ["lm_head"]),
    ("llama", ["embed_tokens"]),
    ("llama", ["lm_head", "embed_tokens", "q_proj"]),
    ("bert", ["word_embeddings"]),
    ("bert", ["decoder"]),
    ("t5", ["embed_tokens"]),
    ("t5", ["lm_head"]),
]


@pytest.mark.parametrize("way", ["ours", "peft", "peft without unloading"])
@pytest.mark.parametrize(("kind", "targets"), TARGETS)
def test_a_merged_tied_weight_computes_what_the_adapter_did_and_comes_back(
    kind: str, targets: list[str], way: str, tmp_path: Path
) -> None:
    model = add_moslora(MODELS[kind](), MoSLoRAConfig(r=4), targets=targets)
    train_a_bit(model)
    live = _output(model.eval())
    save_adapter(model, tmp_path / "adapter")
    if way == "peft without unloading":
        model.merge_adapter()
        torch.testing.assert_close(_output(model), live, atol=2e-4, rtol=0)
        return
    merged = merge(model) if way == "ours" else model.merge_and_unload()
    torch.testing.assert_close(_output(merged), live, atol=2e-4, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(_output(type(merged).from_pretrained(tmp_path / "merged")), live, atol=2e-4, rtol=0)
    # The fingerprint is of modules, and does not mind.
    torch.testing.assert_close(_output(load_adapter(MODELS[kind](), tmp_path / "adapter")), live, atol=1e-5, rtol=0)


def test_weights_stay_tied_where_no_adapter_needs_them_apart() -> None:
    model = add_moslora(llama(tie_word_embeddings=True), MoSLoRAConfig(r=4), targets=["q_proj"])
    train_a_bit(model)
    live = logits(model.eval())
    merged = merge(model)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), live, atol=1e-5, rtol=0)
