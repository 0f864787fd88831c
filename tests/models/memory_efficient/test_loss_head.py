"""What a class does around its head is part of the loss: scales, caps, rows that are no words."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as t

from mm_moslora.models.language_model import refuse_head_extras
from mm_moslora.models.memory_efficient import loss_head
from mm_moslora.models.memory_efficient.kernel_selection import use_loss_head
from mm_moslora.models.memory_efficient.loss_head import PLAIN, LossHead, head_form, head_loss_sum
from mm_moslora.utils.errors import ModelError

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Padded(t.LlamaForCausalLM):
    """The last rows of its head are no words."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :90]
        return output


class Masked(t.LlamaForCausalLM):
    """It never says one token."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., 3] = -1e9
        return output


class Projected(t.LlamaForCausalLM):
    """It multiplies the hidden states by a matrix before its head."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = self.lm_head(output.last_hidden_state @ torch.eye(32).roll(1, 0))
        return output


class Strange(t.LlamaForCausalLM):
    """Its forward pass asks its decoder for something else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs).surprise[0]


def models() -> dict[str, t.PreTrainedModel]:
    torch.manual_seed(0)
    llama = t.LlamaConfig(**SIZES)
    return {
        "cap": t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, final_logit_softcapping=0.4)),
        "scale": t.CohereForCausalLM(t.CohereConfig(**SIZES, logit_scale=0.25, tie_word_embeddings=False)),
        "words": Padded(llama),
        "plain": t.LlamaForCausalLM(llama),
        "masked": Masked(llama),
        "strange": Strange(llama),
    }


@pytest.mark.parametrize("kind", ["cap", "scale", "words", "plain"])
@pytest.mark.parametrize("kernel", ["chunks", "a block", "an adapted head"])
def test_loss_and_gradients_are_those_of_the_logits_of_the_class(kind: str, kernel: str, monkeypatch) -> None:
    if kernel == "chunks":
        monkeypatch.setattr(loss_head, "CHUNK_BYTES", {"cpu": 0, "cuda": 0})
        monkeypatch.setattr(loss_head, "SMALLEST_CHUNK", 5)
        monkeypatch.setattr(loss_head, "CACHED_BYTES", 2 * 4 * 97)
    model = models()[kind]
    ids, targets, weights = torch.randint(3, 90, (1, 17)), torch.randint(3, 90, (17,)), torch.rand(17)
    head = model.get_output_embeddings()
    if kernel == "an adapted head":  # is no plain linear layer
        head.bias = torch.nn.Parameter(torch.zeros(97))
    with torch.no_grad():
        head.weight.mul_(20)  # so that a cap bites

    logits = model(ids).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = torch.autograd.grad((losses * weights).sum(), [head.weight, model.model.norm.weight])
    assert use_loss_head(model) is (kernel != "an adapted head")
    assert head.form == head_form(model)
    right = torch.zeros((), dtype=torch.long)
    hidden = model.model(ids).last_hidden_state[0]
    loss = head_loss_sum(model, hidden, targets, right, weights)
    assert loss.item() == pytest.approx((losses * weights).sum().item(), rel=1e-6)
    assert right == (logits.argmax(-1) == targets).sum()
    for found, gradient in zip(
        torch.autograd.grad(loss, [head.weight, model.model.norm.weight]), expected, strict=True
    ):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


def test_a_batch_without_answers_and_autocast_are_taken_too() -> None:
    model = models()["plain"]
    hidden, targets = torch.randn(17, 32, requires_grad=True), torch.randint(0, 97, (17,))
    expected = head_loss_sum(model, hidden, targets)
    assert use_loss_head(model)
    empty = head_loss_sum(model, hidden[:0], targets[:0])
    assert empty.item() == 0
    assert torch.autograd.grad(empty, hidden)[0].abs().sum() == 0
    with torch.no_grad():
        torch.testing.assert_close(head_loss_sum(model, hidden, targets), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head_loss_sum(model, hidden, targets), expected, rtol=0.02, atol=0)


def test_a_form_that_training_lacks_is_refused_and_a_class_that_cannot_be_asked_is_named(caplog) -> None:
    known = models()
    known["projected"] = Projected(known["plain"].config)
    for kind in ("masked", "projected"):
        with pytest.raises(ModelError, match=rf"{kind.title()}\.forward changes logits behind its head in another way"):
            use_loss_head(known[kind])
    with caplog.at_level(logging.WARNING):
        assert head_form(known["strange"]) == PLAIN
    assert "Strange: what it does behind its head could not be asked" in caplog.text
    for kind in ("cap", "scale", "words"):
        with pytest.raises(ModelError, match=r"which the LLaVA composition lacks"):
            refuse_head_extras(known[kind], "some/model")
    refuse_head_extras(known["plain"], "some/model")
    assert "forward" not in known["plain"].model.__dict__
    assert isinstance(LossHead(2, 3).form, type(PLAIN))
