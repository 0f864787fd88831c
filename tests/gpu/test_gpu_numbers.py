"""Losses and gradients against fp64: lean layers, kernels between products, checkpointing, sums over tokens."""

from __future__ import annotations

import copy
from typing import get_args, get_type_hints

import pytest
import torch
import transformers

from mm_moslora import adapters
from mm_moslora.batch import Batch, Example
from mm_moslora.config import ModelConfig
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.kernels.lora.lora_linear import fused_linear
from mm_moslora.models.memory_efficient.kernel_selection import (
    choose_kernels,
    use_kernels,
    use_lean_layers,
    use_loss_head,
)
from mm_moslora.models.memory_efficient.loss_head import head_loss_sum
from mm_moslora.models.precision import run_arithmetic
from mm_moslora.models.vlm import supervised_hidden
from mm_moslora.utils.errors import ConfigError

KERNELS = get_args(get_type_hints(ModelConfig)["kernels"])


def model_and_batch(family: str, dropout: float = 0.0) -> tuple[transformers.PreTrainedModel, Batch]:
    """On the CPU, with weights that bf16 holds."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=997, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).requires_grad_(False)
    options = {"r": 16, "lora_alpha": 32, "lora_dropout": dropout}
    adapters.add_moslora(model, adapters.MoSLoRAConfig(**options), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    examples = [
        Example(id=str(n), input_ids=torch.randint(1, 997, (n,)), supervised=torch.arange(n) >= n // 2)
        for n in (70, 1, 133, 300)
    ]
    return model.to(torch.bfloat16).train(), Batch.from_examples(examples)


def numbers(model: transformers.PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Loss and gradients, fp64 on the CPU."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with run_arithmetic(deterministic=False):
        loss = head_loss_sum(model, supervised_hidden(model, batch), batch.targets)
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().cpu().double() for name, tensor in ({"loss": loss} | grads).items()}


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Relative, the root of the mean square over all tensors."""
    assert found.keys() == exact.keys()
    relative = [((found[name] - right).norm() / right.norm()).square() for name, right in exact.items()]
    return float(torch.stack(relative).mean().sqrt())


def ready(model: transformers.PreTrainedModel, device: torch.device, *, lean: bool, kernels: str = "torch"):
    model = copy.deepcopy(model).to(device)
    set_attention(model, choose_attention(model).name)
    use_loss_head(model)
    if lean:
        use_lean_layers(model)
        use_kernels(model, choose_kernels(kernels, device))
    return model


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_lean_layers_are_as_exact_as_stock_ones(family, kernels, device) -> None:
    try:
        choose_kernels(kernels, device)
    except ConfigError as missing:
        pytest.skip(str(missing))
    model, batch = model_and_batch(family)
    exact = numbers(ready(model.double(), torch.device("cpu"), lean=False), batch)
    model, there = model.to(torch.bfloat16), batch.to(device)
    stock = error(numbers(ready(model, device, lean=False), there), exact)
    lean = error(numbers(ready(model, device, lean=True, kernels=kernels), there), exact)
    print(f"{family} {kernels}: stock {stock:.4f}, lean {lean:.4f}")
    assert lean <= 1.3 * stock
    assert stock < 0.05


@pytest.mark.cuda_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_triton_kernel_gives_the_numbers_of_pytorch(dtype, device) -> None:
    """A run takes PyTorch's operators where one does not, and `model.kernels: triton` would be a skip above."""
    pytest.importorskip("triton", reason="triton is not installed")
    from mm_moslora.kernels.triton_trial import wrong_kernels

    assert wrong_kernels(device, dtype) == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointing_gives_the_same_gradients(dropout, device) -> None:
    model, batch = model_and_batch("Llama", dropout)
    model, batch = ready(model, device, lean=True, kernels="auto"), batch.to(device)
    kept = numbers(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert error(numbers(model, batch), kept) < 1e-3


def test_dropout_drops_its_share_and_repeats_its_mask(device) -> None:
    from mm_moslora.kernels.lora.lora_linear import LinearOperands, LinearRules
    from mm_moslora.kernels.lora.seeded_dropout import exact_rate, kept_rows

    rate = exact_rate(0.25)
    weight = torch.zeros(8, 64, device=device)
    layer = LinearOperands(weight=weight, bias=None, A=weight[:4], C=weight[:, :4], dropout=rate)
    rules = LinearRules.of([layer])
    rows = torch.ones(4096, 64, device=device)
    drawn = [torch.cat([kept for _, _, kept in kept_rows(rows, {0: rules.masks[0]})]) for _ in range(2)]
    assert torch.equal(*drawn)
    assert float((drawn[0] == 0).float().mean()) == pytest.approx(rate, abs=0.01)


def test_adapters_alone_work_on_a_model_that_is_on_the_device(device, tmp_path) -> None:
    from mm_moslora.adapters.adapter_inspection import inspect_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).to(device)
    base, ids = copy.deepcopy(model), torch.arange(8, device=device)[None]
    tuned = adapters.add_moslora(model, adapters.MoSLoRAConfig(r=4, lora_alpha=8))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    logits = tuned.eval()(input_ids=ids).logits
    adapters.save_adapter(tuned, tmp_path / "adapter")
    again = adapters.load_adapter(base, tmp_path / "adapter").eval()
    assert {report.rank for report in inspect_model(again)} == {4}
    torch.testing.assert_close(again(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_siblings_with_dropout_have_the_gradients_of_masked_products(dtype, device) -> None:
    from mm_moslora.kernels.lora.lora_linear import LinearOperands, fused_linears
    from mm_moslora.kernels.lora.seeded_dropout import Mask, draw_seed, exact_rate, kept_rows

    torch.manual_seed(0)
    rates = [exact_rate(rate) for rate in (0.05, 0.25, 0.0)]
    x, A, C = torch.randn(700, 520), torch.randn(3, 24, 520) / 23, torch.randn(3, 96, 24) / 5
    weight = torch.randn(3, 96, 520) / 23
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in (x, A, C)]
    torch.manual_seed(5)
    found = fused_linears(
        leaves[0],
        [
            LinearOperands(weight=weight[i].to(device, dtype), bias=None, A=leaves[1][i], C=leaves[2][i], dropout=rate)
            for i, rate in enumerate(rates)
        ],
    )
    torch.manual_seed(5)
    masks = {i: Mask(rate=rate, seed=draw_seed()) if rate else None for i, rate in enumerate(rates)}
    ones = [torch.zeros(700, 520, device=device) for _ in rates]
    for i, block, kept in kept_rows(torch.ones(700, 520, device=device, dtype=dtype), masks):
        ones[i][block] = kept.float()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = [
        exact[0] @ weight[i].to(device, dtype).double().t() + ((exact[0] * ones[i]) @ exact[1][i].t()) @ exact[2][i].t()
        for i in range(3)
    ]
    pulls = [torch.randn_like(y) for y in found]
    grads = torch.autograd.grad(found, leaves, pulls)
    rights = torch.autograd.grad(wanted, exact, [pull.double() for pull in pulls])
    for one, right in zip((*found, *grads), (*wanted, *rights), strict=True):
        assert float((one.double() - right).norm() / right.norm()) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_sums_over_many_tokens_are_rounded_once(device) -> None:
    """The gradients of A and of ``s B M`` against fp64, beside fp64 that is rounded to the same format."""
    torch.manual_seed(0)
    tokens = 16_384 if device.type == "cuda" else 1024
    sizes = {"x": (tokens, 1024), "weight": (512, 1024), "A": (64, 1024), "M": (64, 64), "B": (512, 64)}
    drawn = {name: torch.randn(size).to(torch.bfloat16) for name, size in sizes.items()}
    pull = torch.randn(tokens, 512).to(torch.bfloat16)

    def gradients(where: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        given = {name: tensor.to(where, dtype) for name, tensor in drawn.items()}
        factors = [given[name].requires_grad_() for name in ("A", "M", "B")]
        output = fused_linear(given["x"], given["weight"], None, *factors, 1 / 64)
        return [grad.cpu().double() for grad in torch.autograd.grad(output, factors, pull.to(where, dtype))]

    exact = gradients(device, torch.float64)
    with run_arithmetic(deterministic=False):
        found = gradients(device, torch.bfloat16)
    for name, mine, right in zip("AMB", found, exact, strict=True):
        apart = float((mine - right).norm() / right.norm())
        print(f"d{name}: {apart:.5f}")
        # u and z are bf16, and so are the results: three roundings of 2^-9 each, uniformly distributed.
        assert apart < 0.006
