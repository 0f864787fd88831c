"""Lean decoder layers: the same numbers with less kept, and their own forward pass wherever that would not hold."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import transformers as t
from pass_checks import assert_same_gradients, kept, learnt, loss_of, texts

from mm_moslora import adapters
from mm_moslora.batch import Batch, Example
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.kernels.lora.lora_linear import LinearOperands, fused_linears
from mm_moslora.models.memory_efficient.decoder_layers import LeanLayer
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers, use_loss_head
from mm_moslora.models.trainable_parts import checkpoint_layers, offload_inputs
from mm_moslora.utils.errors import ConfigError

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=16)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=16)),
}


def adapted(family: str, **options: object) -> t.PreTrainedModel:
    torch.manual_seed(0)
    model = FAMILIES[family]().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    adapters.add_moslora(model, adapters.MoSLoRAConfig(r=4, lora_alpha=8, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    set_attention(model, choose_attention(model).name)
    return model.train()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lean_layers_give_the_loss_and_gradients_of_stock_layers_and_keep_less(family: str, dropout: float) -> None:
    model, given = adapted(family, lora_dropout=dropout), texts(7, 33, 1, 20)
    torch.manual_seed(3)
    stock_loss, stock = learnt(model, given)
    before = kept(model, given)
    assert use_lean_layers(model) == 3
    use_loss_head(model)
    if dropout:  # behind the last attention it computes fewer rows, and their masks are other ones
        model.model.layers[-1].is_last = False
    torch.manual_seed(3)
    lean_loss, lean = learnt(model, given)
    assert lean_loss == pytest.approx(stock_loss, rel=1e-6)
    assert_same_gradients(lean, stock)
    assert kept(model, given) < 0.75 * before


@pytest.mark.parametrize("case", ["trained norm", "trained biases", "plain linear", "no segments"])
def test_what_lean_layers_cannot_do_runs_as_before(case: str) -> None:
    model, given = (
        adapted("qwen2", bias="lora_only") if case == "trained biases" else adapted("llama"),
        texts(7, 33, 1, 20),
    )
    if case == "trained norm":
        model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    if case == "plain linear":
        model.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.up_proj.base_layer
    if case == "no segments":
        set_attention(model, "sdpa")
        given = Batch.from_examples([Example(id="", input_ids=torch.arange(1, 20), supervised=torch.ones(19) > 0)])
    torch.manual_seed(3)
    stock_loss, stock = learnt(model, given)
    assert any(name.endswith("q_proj.base_layer.bias") for name in stock) == (case == "trained biases")
    use_lean_layers(model)
    torch.manual_seed(3)
    loss, gradients = learnt(model, given)
    assert loss == pytest.approx(stock_loss, rel=1e-6)
    assert_same_gradients(gradients, stock)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", ["all weights", "the last layers", "adapters beside trained weights"])
def test_base_weights_and_norms_train_in_lean_layers(family: str, which: str) -> None:
    torch.manual_seed(0)
    model, given = FAMILIES[family](), texts(7, 33, 1, 20)
    if which == "adapters beside trained weights":
        model = adapted(family)
        model.requires_grad_(True)
    elif which == "the last layers":
        model.requires_grad_(False)
        model.model.layers[-2:].requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    set_attention(model, choose_attention(model).name)
    model.train()
    stock_loss, stock = learnt(model, given)
    before = kept(model, given)
    use_lean_layers(model)
    use_loss_head(model)
    loss, lean = learnt(model, given)
    assert loss == pytest.approx(stock_loss, rel=1e-6)
    assert any("norm" in name for name in lean)
    assert_same_gradients(lean, stock)
    assert kept(model, given) < 0.8 * before


def test_an_output_projection_without_an_adapter_keeps_nothing() -> None:
    model, given = adapted("llama", target_modules=["q_proj", "v_proj"]), texts(7, 33, 1, 20)
    stock_loss, stock = learnt(model, given)
    use_lean_layers(model)
    loss, lean = learnt(model, given)
    assert loss == pytest.approx(stock_loss, rel=1e-6)
    assert_same_gradients(lean, stock)
    x = torch.randn(5, 32, requires_grad=True)
    operands = LinearOperands(weight=model.model.layers[0].self_attn.o_proj.weight, bias=None)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused_linears(x, [operands])
    assert [tensor.data_ptr() for tensor in kept] == [operands.weight.data_ptr()]


def test_generation_saving_and_copies_know_nothing_of_lean_layers(tmp_path) -> None:
    model = adapted("llama").eval()
    set_attention(model, "sdpa")
    ids = torch.arange(1, 9)[None]
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    names = set(model.state_dict())
    use_lean_layers(model)
    use_loss_head(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.base_layer.weight.zero_()
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)
    assert set(model.state_dict()) == names
    assert isinstance(twin.model.layers[0], LeanLayer)


def checkpointed(*, family: str = "llama", first: int | None = None, offload: bool) -> t.PreTrainedModel:
    model = adapted(family, lora_dropout=0.3)
    use_lean_layers(model)
    checkpoint_layers(model.get_decoder(), first)
    if offload:
        offload_inputs(model)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("first", [None, 2])
def test_offloaded_inputs_give_the_same_numbers_in_every_micro_batch(family: str, first: int | None) -> None:
    given, found = texts(7, 33, 1, 20), []
    for offload in (False, True):
        model = checkpointed(family=family, first=first, offload=offload)
        torch.manual_seed(3)
        found.append([learnt(model, given) for _ in range(2)])
    for (loss, gradients), (again, offloaded) in zip(*found, strict=True):
        assert again == loss
        assert offloaded.keys() == gradients.keys()
        assert all(torch.equal(offloaded[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("offload", [False, True])
def test_no_input_of_a_checkpointed_layer_is_kept_where_it_was_computed(offload: bool) -> None:
    model, inputs = checkpointed(offload=offload), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    given = texts(7, 33, 1, 20)
    loss = loss_of(model, given)
    assert [tensor() is not None for tensor in inputs[1:]] == [not offload] * 2  # the first is the embeddings
    loss.backward()
    assert len(inputs) == 3  # hooks run once


def test_so_many_layers_are_checkpointed_and_not_more_than_there_are() -> None:
    one, two, three = (kept(checkpointed(first=first, offload=False), texts(7, 33, 1, 20)) for first in (1, 2, 3))
    assert one > two > three
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing is 4, but LlamaModel has 3 layers"):
        checkpointed(first=4, offload=False)
