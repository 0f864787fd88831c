"""The fused forward and backward against the written-out chain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, fused_linear, reference_linear, use_kernel
from tests.adapters.adapter_models import IDS, llama, train_a_bit


def _inputs(dtype: torch.dtype, *, bias: bool, mixer: bool, factors: torch.dtype | None = None) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    wide = factors or dtype
    x = draw(2, 5, 6).to(dtype).requires_grad_()
    weight = draw(8, 6).to(dtype)
    offset = draw(8).to(dtype).requires_grad_() if bias else None
    A, B = draw(4, 6).to(wide).requires_grad_(), draw(8, 4).to(wide).requires_grad_()
    M = draw(4, 4).to(wide).requires_grad_() if mixer else None
    return [x, weight, offset, A, M, B]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mixer", [True, False])
@pytest.mark.parametrize("base_trains", [True, False])
def test_gradients_are_right_in_float64(bias: bool, mixer: bool, base_trains: bool) -> None:
    inputs = _inputs(torch.float64, bias=bias, mixer=mixer)
    inputs[1].requires_grad_(base_trains)
    assert torch.autograd.gradcheck(lambda *given: fused_linear(*given, 1.7), inputs)


@pytest.mark.parametrize("mixer", [True, False])
def test_output_and_all_gradients_equal_the_reference_in_float64(mixer: bool) -> None:
    inputs = _inputs(torch.float64, bias=True, mixer=mixer)
    trained = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    results = [function(*inputs, 1.7) for function in (fused_linear, reference_linear)]
    torch.testing.assert_close(results[0], results[1], atol=1e-13, rtol=0)
    pull = torch.randn_like(results[0])
    for fused, reference in zip(*(torch.autograd.grad(result, trained, pull) for result in results), strict=True):
        torch.testing.assert_close(fused, reference, atol=1e-13, rtol=0)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
def test_bfloat16_base_is_as_exact_as_the_reference(factors: torch.dtype) -> None:
    exact = _inputs(torch.float64, bias=True, mixer=True)
    half = _inputs(torch.bfloat16, bias=True, mixer=True, factors=factors)
    pull = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(function, inputs):
        trained = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        result = function(*inputs, 1.7)
        return [result, *torch.autograd.grad(result, trained, pull.to(result.dtype))]

    same = _inputs(torch.bfloat16, bias=True, mixer=True)

    def errors(results):
        return [float((one.double() - right).norm() / right.norm()) for one, right in zip(results, wanted, strict=True)]

    wanted = run(reference_linear, exact)
    got = run(fused_linear, half)
    assert got[0].dtype == torch.bfloat16
    for own, reference in zip(errors(got), errors(run(reference_linear, same)), strict=True):
        assert own <= 1.1 * reference + 1e-6


def test_nothing_of_the_size_of_a_batch_is_kept_but_x_and_z() -> None:
    x, weight, bias, A, M, B = _inputs(torch.float32, bias=True, mixer=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_linear(x, weight, bias, A, M, B, 1.0)
    known = {tensor.data_ptr() for tensor in (x, weight, bias, A, M, B)}
    new = [tensor for tensor in kept if tensor.data_ptr() not in known]
    z, C = (tuple(tensor.shape) for tensor in new)
    assert (z, C) == ((10, 4), (8, 4))


def _gradients(model, **options) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _distance(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Relative distance of all gradients taken together."""
    assert found.keys() == right.keys()
    difference = torch.cat([(found[name] - right[name]).flatten() for name in right])
    return float(difference.norm() / torch.cat([tensor.flatten() for tensor in right.values()]).norm())


def test_model_gradients_are_the_same_with_either_kernel() -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8)).train()
    train_a_bit(model)
    fused = _gradients(model)
    with use_kernel(model, "reference"):
        reference = _gradients(model)
    assert any(not torch.equal(gradient, reference[name]) for name, gradient in fused.items())  # of another kernel
    assert fused.keys() == reference.keys()
    assert len(fused) == 14 * 3
    for name, gradient in fused.items():
        torch.testing.assert_close(gradient, reference[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8)).train()
    train_a_bit(model)
    plain = _gradients(model)
    base = model.get_base_model()
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = _gradients(model)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name])


def test_autocast_computes_in_half_precision_and_stays_close() -> None:
    base = llama()
    torch.manual_seed(1)  # one draw of A in ten has gradients so small that rounding reaches 0.1 of them
    model = add_moslora(base, MoSLoRAConfig(r=4, lora_alpha=8)).train()
    train_a_bit(model)
    exact = _gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IDS).logits.dtype == torch.bfloat16
        half = _gradients(model)
    assert {gradient.dtype for gradient in half.values()} == {torch.float32}
    assert _distance(half, exact) < 0.05


def test_hooks_on_the_base_layer_still_run() -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4), targets=["q_proj"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    seen: list[tuple[int, ...]] = []
    layer.get_base_layer().register_forward_hook(lambda module, given, result: seen.append(tuple(result.shape)))
    model(IDS)
    assert seen == [(2, 7, 32)]


def test_bfloat16_base_with_float32_factors_trains() -> None:
    model = add_moslora(llama(torch.bfloat16), MoSLoRAConfig(r=4, lora_alpha=8)).train()
    train_a_bit(model)
    fused = _gradients(model)
    with use_kernel(model, "reference"):
        reference = _gradients(model)
    assert {gradient.dtype for gradient in fused.values()} == {torch.float32}
    assert _distance(fused, reference) < 0.1
