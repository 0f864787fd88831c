"""Every arm of a comparison, and the methods of PEFT: it trains, is saved, loads into a fresh model, and merges."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as t

from mm_moslora import adapters
from mm_moslora.adapters.peft_methods import method_names
from mm_moslora.compare.arms import KNOWN, Arm, parse_arms, size_lines
from mm_moslora.config import AdapterConfig, ModelConfig, Recipe
from mm_moslora.models.assembly import Parts
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.utils.errors import AdapterError, MoSLoRAError
from mm_moslora.utils.text_format import split_commas

SMALL = {
    "C3A": "@block_size=16", "FOURIERFT": "@n_frequency=64", "ROAD": "@group_size=16", "VBLORA": "@vector_length=16",
    "WAVEFT": "@n_frequency=64", "OFT": "@oft_block_size=16", "FROD": "@progressbar=false",
}  # fmt: skip
"""Options for methods whose defaults suppose wide layers."""
LORA = (
    "init_lora_weights=pissa", "init_lora_weights=olora@use_rslora=true", "use_dora=true",
)  # fmt: skip
NOT_MERGED = {"peft:BEFT", "peft:LILY"}
IDS = torch.arange(12)[None]


def recipe(**adapter: Any) -> Recipe:
    settings: dict[str, Any] = {"rank": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]} | adapter
    return Recipe(model=ModelConfig(language="tiny"), adapter=AdapterConfig(**settings))


def arm(name: str) -> Arm:
    return parse_arms(["full", name], recipe())[1]


def names() -> list[str]:
    own = [name for name in KNOWN if name != "full"]
    methods = [f"peft:{name}{SMALL.get(name, '')}" for name in method_names() if name != "TRAINABLE_TOKENS"]
    return [*own, *methods, *(f"peft:LORA@{options}" for options in LORA)]


@pytest.fixture(scope="module")
def base() -> t.LlamaForCausalLM:
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return t.LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", names())
def test_an_arm_trains_is_saved_loaded_and_merged(base: t.LlamaForCausalLM, tmp_path: Any, name: str) -> None:
    given, parts = arm(name).apply(recipe()), Parts(model=copy.deepcopy(base))
    wrapped = attach_adapters(parts, given.model, given.adapter)
    assert wrapped is not None
    trained = {key: parameter for key, parameter in parts.model.named_parameters() if parameter.requires_grad}
    assert all(map(adapters.is_adapter_parameter, trained))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = parts.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] != losses[1]
    parts.model.eval()
    state, folder = {key: parameter.detach() for key, parameter in trained.items()}, tmp_path / "adapter"
    by_peft = bool(given.adapter.peft)
    if by_peft:
        adapters.method_snapshot(wrapped, state=state).write(folder)
    else:
        adapters.save_adapter(wrapped, folder, state=state)
    with torch.no_grad():
        expected = parts.model(IDS).logits
        loaded = (adapters.load_method if by_peft else adapters.load_adapter)(copy.deepcopy(base), folder)
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=1e-5)
        if by_peft:
            assert (adapters.why_not_merged(loaded) is not None) == (name in NOT_MERGED)
        if name not in NOT_MERGED:
            merged = adapters.merge(loaded)
            torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("peft:HIRRA", r"no method 'HIRRA'. Did you mean 'HIRA'"),
        ("pefft:HIRA", r"'pefft:HIRA' is not known. Did you mean 'peft:HIRA'"),
        ("peft:HIRA@hira_dropot=0.1", r"no key 'hira_dropot'. Did you mean 'hira_dropout'"),
        ("peft:HIRA@r=many", r"adapter.peft.r is 'many' \(str\), expected a whole number"),
        ("peft:HIRA@init_weights=gausian", r"init_weights is 'gausian'.*"),
        ("peft:HIRA@mixer_init=kaiming", r"adapter.mixer_init would have no effect on PEFT's HIRA"),
        ("peft:PREFIX_TUNING", r"it learns what stands before the input"),
        ("peft:ADALORA", r"PEFT's own forward pass around the model"),
        ("peft:EVA", r"EVA is a start of PEFT's LORA: write peft:LORA@init_lora_weights=eva"),
        ("peft:PiSSA", r"write peft:LORA@init_lora_weights=pissa"),
        ("peft:LORA@kasa_config={}", r"adds to the loss"),
        ("peft:VBLORA@vector_length=16@save_only_topk_weights=true", r"training cannot go on"),
        ("peft:LORA@bias=all", r"would train biases outside the adapted layers"),
        ("peft:LORA@init_lora_weights=pisa", r"sets init_lora_weights to 'pisa'"),
        ("peft:LORA@init_lora_weights=eva", r"init_lora_weights is eva, a start that reads samples"),
        ("peft:LORA@init_lora_weights=pissa_niter_4", r"pissa_niter_4, a start that is drawn"),
    ],
)
def test_a_wrong_arm_is_one_error(name: str, said: str) -> None:
    with pytest.raises(MoSLoRAError, match=said):
        arm(name)


def test_a_method_is_one_arm_however_it_is_spelt() -> None:
    assert arm("peft:hira").name == "peft:HIRA"
    with pytest.raises(MoSLoRAError, match="'peft:HIRA' is given twice"):
        parse_arms(["peft:hira", "peft:HIRA"], recipe())
    assert split_commas("a@b=[[0, 2], [1, 3]], c") == ["a@b=[[0, 2], [1, 3]]", "c"]


def test_layers_that_peft_refuses_are_one_error(base: t.LlamaForCausalLM) -> None:
    for name, said in (
        ("peft:C3A", "PEFT's C3A does not fit this model: .*block size"),
        ("peft:TRAINABLE_TOKENS", "TRAINABLE_TOKENS does not fit"),
        ("peft:LORA@alora_invocation_tokens=[5]", "has no gradient"),
    ):
        given = arm(name).apply(recipe())
        with pytest.raises(MoSLoRAError, match=said):
            attach_adapters(Parts(model=copy.deepcopy(base)), given.model, given.adapter)


@pytest.mark.parametrize("name", ["peft:LORA", "peft:HIRA", "lora"])
def test_a_tied_head_is_merged_alone(base: t.LlamaForCausalLM, name: str) -> None:
    torch.manual_seed(0)
    tied = t.LlamaForCausalLM(t.LlamaConfig(**{**base.config.to_dict(), "tie_word_embeddings": True})).eval()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    given = arm(name).apply(recipe(targets=["lm_head"]))
    wrapped = attach_adapters(Parts(model=tied), given.model, given.adapter)
    assert wrapped is not None
    with torch.no_grad():
        before = tied(IDS).logits
        for parameter in tied.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        expected = tied(IDS).logits
        assert (expected - before).abs().max() > 1e-3
        torch.testing.assert_close(adapters.merge(wrapped)(IDS).logits, expected, rtol=0, atol=1e-5)


def test_the_plan_says_what_trains_in_each_arm(base: t.LlamaForCausalLM, tmp_path: Any) -> None:
    base.config.save_pretrained(tmp_path)
    shared = replace(recipe(), model=ModelConfig(language=str(tmp_path)))
    arms = parse_arms("lora,peft:LORA@r=8,peft:LILY,peft:BEFT,peft:WAVEFT@n_frequency=64,full,peft:VBLORA", shared)
    lines = size_lines(arms, shared, "lora")
    assert "lora: plain LoRA: the mixer is the frozen identity; 1,280 trainable parameters" in lines[0]
    assert "2,560 trainable parameters, 2 times those of lora" in lines[1]
    assert "rank as r, alpha as lora_alpha, dropout as lora_dropout, targets" in lines[1]
    assert "has no rank, alpha, dropout" in lines[3]
    assert "trainable parameters" in lines[4]
    assert f"{sum(p.numel() for p in base.model.parameters()) + base.lm_head.weight.numel():,} trainable" in lines[5]
    assert "not counted (PEFT's VBLORA does not fit this model: `in_features` 32 must be divisible" in lines[6]


def test_an_arm_that_the_model_does_not_take_is_refused_before_the_first_run(
    base: t.LlamaForCausalLM, tmp_path: Any
) -> None:
    base.config.save_pretrained(tmp_path)
    shared = replace(recipe(), model=ModelConfig(language=str(tmp_path)))
    with pytest.raises(AdapterError, match=r"Arm 'lora@targets=\[nope\]': .*Target 'nope' matches no module"):
        size_lines(parse_arms("lora,lora@targets=[nope]", shared), shared, "lora")
