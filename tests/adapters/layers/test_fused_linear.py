"""Dropout in the fused kernel, autocast, and the sub-forms of the three factors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mm_moslora.adapters import (
    MoSLoRAConfig,
    MoSLoRALinear,
    add_moslora,
    fused_linear,
    keep_orthonormal,
    load_adapter,
    merge,
    reference_linear,
    save_adapter,
    use_kernel,
)
from mm_moslora.adapters.orthonormal_factors import OrthonormalFactor, orthonormal_factors
from mm_moslora.kernels.lora.lora_linear import TENSORS, _FusedLinears
from mm_moslora.kernels.lora.seeded_dropout import KeptBits, kept_bits
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import IDS, llama, logits, train_a_bit


def _model(**changes):
    model = add_moslora(llama(), MoSLoRAConfig(**({"r": 4, "lora_alpha": 8} | changes))).train()
    train_a_bit(model)
    return model


def _losses(model, optimizer, *, steps: int) -> list[float]:
    """The loss before each of some optimiser steps."""
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def _gradients(model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def test_the_fused_kernel_has_no_second_derivative() -> None:
    with pytest.raises(AdapterError, match="no second derivative"):
        _model()(IDS, labels=IDS).loss.backward(create_graph=True)


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


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_no_rows_have_no_mask(kernel: str) -> None:
    layer = add_moslora(
        nn.Sequential(nn.Linear(6, 8)), MoSLoRAConfig(r=4, lora_dropout=0.3, target_modules=["0"])
    ).train()
    x = torch.randn(0, 6, requires_grad=True)
    with use_kernel(layer, kernel):
        layer(x).sum().backward()
    assert x.grad.shape == (0, 6)
    assert all(not p.grad.any() for p in layer.parameters() if p.requires_grad)


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


# Sub-forms.


def test_diagonal_mixer_trains_saves_merges_and_starts_as_lora(tmp_path: Path) -> None:
    fresh = add_moslora(llama(), MoSLoRAConfig(r=4, mixer_form="diagonal"))
    assert torch.equal(logits(fresh), logits(llama()))
    model = _model(mixer_form="diagonal")
    layer = next(module for module in model.modules() if isinstance(module, MoSLoRALinear))
    assert layer.lora_mixer["default"].weight.shape == (4,)
    model(IDS, labels=IDS).loss.backward()
    assert layer.lora_mixer["default"].weight.grad.abs().min() > 0
    fused = _gradients(model)
    model.zero_grad()
    with use_kernel(model, "reference"):
        model(IDS, labels=IDS).loss.backward()
    for name, gradient in fused.items():
        torch.testing.assert_close(_gradients(model)[name], gradient, atol=1e-6, rtol=1e-4)
    model.eval()
    save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "a")), logits(model))
    live = logits(model)
    torch.testing.assert_close(logits(merge(model)), live, atol=1e-5, rtol=0)


def test_svd_core_trains_the_mixer_alone_in_the_weights_leading_subspaces(tmp_path: Path) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=4, factor_form="svd")).train()
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_mixer"}
    torch.testing.assert_close(logits(model), logits(llama()), atol=1e-3, rtol=0)
    layer = next(module for module in model.modules() if isinstance(module, MoSLoRALinear))
    factors = layer.factors("default")
    # The authors decompose the transposed weight and keep its singular values with what the input meets first.
    left, values, right = torch.linalg.svd(layer.get_base_layer().weight.T)
    encoder, decoder = left[:, :4] @ torch.diag(values[:4]), right[:4]
    torch.testing.assert_close(factors.A.T @ factors.B.T, encoder @ decoder, atol=1e-5, rtol=0)
    torch.testing.assert_close(factors.A @ factors.A.T, encoder.T @ encoder, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(4), atol=1e-5, rtol=0)
    model.set_adapter("default")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = _losses(model, optimizer, steps=4)
    assert losses[-1] < losses[0]
    assert torch.equal(layer.factors("default").A, factors.A)
    model.eval()
    save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "a")), logits(model))


@pytest.mark.parametrize("wrapped", [False, True], ids=["torch", "accelerate"])
def test_orthonormal_factors_stay_orthonormal_and_the_loss_falls(wrapped: bool) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8, factor_form="orthonormal")).train()
    torch.testing.assert_close(logits(model), logits(llama()), atol=1e-6, rtol=0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    if wrapped:
        optimizer = Accelerator(cpu=True).prepare_optimizer(optimizer)
    keep_orthonormal(model, optimizer)
    layer = next(module for module in model.modules() if isinstance(module, MoSLoRALinear))
    start = layer.factors("default").A.detach().clone()
    losses = _losses(model, optimizer, steps=6)
    assert losses[-1] < losses[0]
    factors = layer.factors("default")
    torch.testing.assert_close(factors.A @ factors.A.T, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(4), atol=1e-5, rtol=0)
    assert (factors.A - start).abs().max() > 1e-3


def test_orthonormal_hook_refuses_free_factors() -> None:
    model = _model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(AdapterError, match="not orthonormal"):
        keep_orthonormal(model, optimizer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixer_form": "diagnal"}, "Did you mean 'diagonal'"),
        ({"factor_form": "svg"}, "Did you mean 'svd'"),
        ({"factor_form": "svd", "mixer_trainable": False}, "needs a mixer that trains"),
        ({"factor_form": "svd", "mixer_init": "kaiming"}, "own start of the mixer"),
        ({"factor_form": "svd", "mixer_form": "diagonal"}, "dense mixer"),
        ({"use_dora": True}, "use_dora is set together with a mixer"),
    ],
)
def test_forms_that_contradict_each_other_are_errors(options: dict, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        MoSLoRAConfig(r=4, **options)


def test_forms_need_linear_layers_and_a_rank_that_fits() -> None:
    with pytest.raises(AdapterError, match="unquantised linear layers"):
        add_moslora(llama(), MoSLoRAConfig(r=4, factor_form="svd"), targets=["embed_tokens"])
    with pytest.raises(AdapterError, match="above its smaller width"):
        add_moslora(llama(), MoSLoRAConfig(r=40, factor_form="orthonormal"), targets=["q_proj"])


def test_orthonormal_hooks_refuse_an_optimiser_that_holds_copies() -> None:
    """DeepSpeed's puts flat masters where the parameters were: before the hooks are set, or after."""
    model = add_moslora(llama(), MoSLoRAConfig(r=4, factor_form="orthonormal")).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = [p.detach().clone().requires_grad_() for p in trained]
    with pytest.raises(AdapterError, match=r"28 of 28 factors .*not in the optimiser.*adapter.factor_form"):
        keep_orthonormal(model, torch.optim.SGD(copies, lr=0.1))
    optimizer = torch.optim.SGD(trained, lr=0.1)
    keep_orthonormal(model, optimizer)
    optimizer.param_groups[0]["params"] = copies
    with pytest.raises(AdapterError, match="not in the optimiser"):
        optimizer.step()


def test_projected_gradients_lie_along_the_manifold() -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8, factor_form="orthonormal")).train()
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, MoSLoRALinear)):
            layer.factors("default").M.normal_()
    factors = orthonormal_factors(model)
    assert len(factors) == 28

    def across(factor: OrthonormalFactor) -> float:
        inside = factor.weight @ factor.weight.grad.T if factor.rows else factor.weight.T @ factor.weight.grad
        return float((inside + inside.T).abs().max() / factor.weight.grad.abs().max())

    model(IDS, labels=IDS).loss.backward()
    assert all(across(factor) > 1e-3 for factor in factors)
    for factor in factors:
        factor.weight.grad.copy_(factor.gradient(factor.weight.detach(), factor.weight.grad))
    assert all(across(factor) < 1e-5 for factor in factors)


@pytest.mark.parametrize("kernel", ["reference", "fused"])
def test_a_backward_pass_in_another_thread_recomputes_with_the_same_kernel(kernel) -> None:
    """As on a GPU, where autograd's own threads recompute checkpointed layers."""
    model = _model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with use_kernel(model, kernel), ThreadPoolExecutor(1) as another:
        another.submit(model(IDS, labels=IDS).loss.backward).result()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert {module.kernel for module in model.modules() if isinstance(module, MoSLoRALinear)} == {"auto"}
