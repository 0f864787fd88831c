"""Adapter dropout by Triton against a masked reference, in Triton's interpreter; `test_triton_dropout.py` runs this."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_interpreter import complete_interpreter

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, use_kernel
from mm_moslora.kernels.lora import triton_dropout
from mm_moslora.kernels.lora.lora_linear import LinearOperands, fused_linears
from mm_moslora.kernels.lora.seeded_dropout import (
    Mask,
    draw_seed,
    kernel_masks,
    seeded_dropout,
    set_dropout_kernels,
    triton_kernels,
)

complete_interpreter()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def kept(shape: tuple[int, int], *masks: tuple[int, int]) -> list[Tensor]:
    return triton_dropout.kept_copies(torch.ones(shape), masks)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 8), (3, 5), (70, 77), (9, 1030), (0, 16)])
def test_copies_hold_the_entries_that_stay_and_zeros(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(shape).to(dtype)
    rows = torch.cat([rows, rows], 1)[:, : shape[1]]  # rows are not next to each other
    masks = [(2**61 + 3, 1638), (11, 16384), (0, 0), (12, 2**15 - 1), (13, 8192)]
    for copy, ones, (_, dropped) in zip(
        triton_dropout.kept_copies(rows, masks), kept(shape, *masks), masks, strict=True
    ):
        assert torch.equal(copy, torch.where(ones == 0, 0, rows))
        assert dropped or torch.equal(copy, rows)


def test_masks_have_their_rates_and_differ_between_seeds_rows_and_columns() -> None:
    shape, rate = (301, 333), 1638 / 2**15
    masks = kept(shape, (5, 1638), (6, 1638), (5 + 2**40, 1638))
    for mask in masks:
        assert abs(1 - float(mask.mean()) - rate) < 5 * (rate * (1 - rate) / mask.numel()) ** 0.5
        for dim in (0, 1):
            assert (mask.mean(dim) - (1 - rate)).abs().max() < 6 * (rate * (1 - rate) / shape[dim]) ** 0.5
    for one, other in ((0, 1), (0, 2), (1, 2)):
        both = float(((masks[one] == 0) & (masks[other] == 0)).double().mean())
        assert both == pytest.approx(rate**2, rel=0.25)
    (half,) = kept((256, 256), (9, 16384))
    centred = half - half.mean()
    for shift in (1, 2, 4, 8, 64):
        for dim in (0, 1):
            assert float((centred * centred.roll(shift, dim)).mean()) == pytest.approx(0, abs=5 * 0.25 / 256)


def test_a_mask_does_not_depend_on_the_masks_beside_it_or_on_the_rows_below() -> None:
    (alone,) = kept((70, 80), (7, 8192))
    beside = kept((130, 80), (8, 100), (7, 8192))[1]
    assert torch.equal(alone, beside[:70])


@DTYPES
@pytest.mark.parametrize("ranks", [(4,), (8, 40), (64, 128, 3), (5, 5, 5, 5)])
def test_products_of_what_stays_are_added_and_rounded_once(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = (66, 70)
    masks = [(100 + place, 4096 * place) for place in range(len(ranks))]
    total, us, As = torch.randn(shape).to(dtype), [], []
    exact = total.double()
    for rank, mask in zip(ranks, kept(shape, *masks), strict=True):
        us.append(torch.randn(shape[0], rank).to(dtype))
        As.append(torch.randn(rank, shape[1]).to(dtype))
        exact += mask.double() * (us[-1].double() @ As[-1].double())
    triton_dropout.add_kept_products(total, us, As, masks)
    eps = torch.finfo(dtype).eps
    again = len(ranks) > triton_dropout.MASKS_PER_KERNEL  # a second kernel rounds again
    torch.testing.assert_close(total, exact.to(dtype), rtol=2 * eps, atol=1e-4 + 16 * eps * again)


@pytest.mark.parametrize("rates", [(0.25,), (0.25, 0.0, 0.5)])
def test_forward_and_backward_pass_draw_the_same_masks(rates: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    count = len(rates)
    x = torch.randn(2, 35, 80, requires_grad=True)
    weights = [torch.randn(24, 80) for _ in rates]
    As = [torch.randn(4 + place, 80, requires_grad=True) for place in range(count)]
    Cs = [torch.randn(24, 4 + place, requires_grad=True) for place in range(count)]
    torch.manual_seed(3)
    layers = [
        LinearOperands(weight=W, bias=None, A=A, C=C, dropout=rate)
        for W, A, C, rate in zip(weights, As, Cs, rates, strict=True)
    ]
    found = fused_linears(x, layers)
    torch.manual_seed(3)
    masks = dict(enumerate(Mask(rate=rate, seed=draw_seed()) if rate else None for rate in rates))
    ones = kept((70, 80), *kernel_masks(masks))
    wanted = [x @ W.T + ((x * one.view_as(x)) @ A.T) @ C.T for W, A, C, one in zip(weights, As, Cs, ones, strict=True)]
    pulls = [torch.randn_like(y) for y in found]
    torch.testing.assert_close(list(found), wanted)
    inputs = [x, *As, *Cs]
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, pulls), torch.autograd.grad(wanted, inputs, pulls), rtol=1e-4, atol=1e-4
    )


def test_the_reference_path_drops_the_same_entries_and_computing_again_does_too() -> None:
    layer = add_moslora(
        torch.nn.Sequential(torch.nn.Linear(80, 8)), MoSLoRAConfig(r=4, lora_dropout=0.3, target_modules=["0"])
    ).train()
    torch.nn.init.normal_(next(p for name, p in layer.named_parameters() if "lora_B" in name))
    x = torch.randn(9, 80)
    results = []
    for kernel in ("fused", "fused", "reference"):
        torch.manual_seed(5)
        with use_kernel(layer, kernel):
            results.append(layer(x))
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2], results[0])


def test_torch_can_be_chosen_and_fp64_and_the_meta_device_have_no_kernels() -> None:
    rows = torch.randn(40, 80)
    assert triton_kernels(rows) is triton_dropout
    assert triton_kernels(rows.double()) is None
    assert triton_kernels(rows.to("meta")) is None
    torch.manual_seed(1)
    by_triton = seeded_dropout(rows, 0.5)
    set_dropout_kernels("torch")
    try:
        assert triton_kernels(rows) is None
        torch.manual_seed(1)
        assert not torch.equal(seeded_dropout(rows, 0.5), by_triton)
    finally:
        set_dropout_kernels("auto")
