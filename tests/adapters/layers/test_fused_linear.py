"""Dropout in the fused kernel, and autocast."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from mm_moslora.adapters import (
    MoSLoRAConfig,
    MoSLoRALinear,
    add_moslora,
    fused_linear,
    reference_linear,
    use_kernel,
)
from mm_moslora.kernels.lora.lora_linear import TENSORS, _FusedLinears
from mm_moslora.kernels.lora.seeded_dropout import KeptBits, kept_bits
from tests.adapters.adapter_models import IDS, llama, logits, train_a_bit


def _model(**changes):
    model = add_moslora(llama(), MoSLoRAConfig(**({"r": 4, "lora_alpha": 8} | changes))).train()
    train_a_bit(model)
    return model


def _gradients(model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def _tensors(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 7, 6), (8, 6), (8,), (4, 6), (4, 4), (8, 4))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(index != 1) for index, tensor in enumerate(tensors)]


def mask_of(rows: Tensor, rate: float, seed: int) -> Tensor:
    return torch.cat([bits for _, bits in kept_bits(rows, rate, seed)])


def test_dropout_in_the_kernel_equals_a_masked_reference() -> None:
    x, weight, bias, A, M, B = _tensors(torch.float64)
    torch.manual_seed(11)
    result = fused_linear(x, weight, bias, A, M, B, 1.7, dropout=0.25)
    torch.manual_seed(11)
    mask = -mask_of(x.reshape(-1, 6), 0.25, int(torch.randint(2**62, ()))).view_as(x)
    assert 0 < mask.sum() < mask.numel()
    branch = reference_linear(x * mask / 0.75, torch.zeros_like(weight), None, A, M, B, 1.7)
    wanted = torch.nn.functional.linear(x, weight, bias) + branch
    torch.testing.assert_close(result, wanted, atol=1e-12, rtol=0)
    trained = [x, bias, A, M, B]
    pull = torch.randn_like(result)
    for found, right in zip(
        torch.autograd.grad(result, trained, pull), torch.autograd.grad(wanted, trained, pull), strict=True
    ):
        torch.testing.assert_close(found, right, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_the_mask_has_the_right_rate_and_is_repeatable(dtype: torch.dtype, rate: float) -> None:
    rows = torch.randn(301, 333).to(dtype)
    bits = mask_of(rows, rate, 5)
    assert set(bits.unique().tolist()) == {-1, 0}
    assert torch.equal(KeptBits(bits).keep(rows), torch.where(bits == 0, 0, rows))
    kept = -bits.double()
    assert abs(1 - float(kept.mean()) - rate) < 5 * (rate * (1 - rate) / rows.numel()) ** 0.5
    assert torch.equal(bits, mask_of(rows, rate, 5))
    assert not torch.equal(bits, mask_of(rows, rate, 6))
    assert (kept.mean(0) - (1 - rate)).abs().max() < 6 * (rate * (1 - rate) / 301) ** 0.5


def test_checkpointing_repeats_the_mask() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = _model(lora_dropout=0.3)
        if checkpointing:
            model.get_base_model().enable_input_require_grads()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)
        model(IDS, labels=IDS).loss.backward()
        gradients.append(_gradients(model))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    original = _FusedLinears.apply

    def counted(*args):
        made.extend([1] * ((len(args) - 2) // TENSORS))
        return original(*args)

    monkeypatch.setattr(_FusedLinears, "apply", counted)
    return made


def test_dropout_and_autocast_take_the_fused_path(calls: list[int]) -> None:
    model = _model(lora_dropout=0.1)
    model(IDS)
    assert len(calls) == 14
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IDS).logits.dtype == torch.bfloat16
    assert len(calls) == 28


def test_autocast_equals_the_modules_under_autocast() -> None:
    results, gradients = [], []
    for kernel in ("reference", "fused"):
        model = _model()
        with torch.autocast("cpu", torch.bfloat16), use_kernel(model, kernel):
            result = model(IDS, labels=IDS)
        result.loss.backward()
        results.append(result.logits.detach().float())
        gradients.append(torch.cat([value.flatten() for value in _gradients(model).values()]))
    model = _model()
    model(IDS, labels=IDS).loss.backward()
    right = torch.cat([value.flatten() for value in _gradients(model).values()])
    exact = logits(model)
    assert (results[1] - exact).abs().max() <= 1.5 * (results[0] - exact).abs().max()
    assert (gradients[1] - right).norm() <= 1.5 * (gradients[0] - right).norm()


@pytest.mark.parametrize("kernel", ["reference", "fused"])
def test_a_backward_pass_in_another_thread_recomputes_with_the_same_kernel(kernel) -> None:
    """As on a GPU, where autograd's own threads recompute checkpointed layers."""
    model = _model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with use_kernel(model, kernel), ThreadPoolExecutor(1) as another:
        another.submit(model(IDS, labels=IDS).loss.backward).result()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert {module.kernel for module in model.modules() if isinstance(module, MoSLoRALinear)} == {"auto"}
