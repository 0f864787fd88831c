"""Attention written as matrix products gives the numbers of PyTorch's own, and multiplies no more than it must."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mm_moslora.models import attention_products
from mm_moslora.models.attention import picture_attention, segment_attention
from mm_moslora.models.attention_products import BLOCK, attend, attend_backward

SCALE = 0.3


def tensors(heads: int, key_heads: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient, in the values that the dtype can hold."""
    torch.manual_seed(tokens)
    shapes = [(1, heads, tokens, 16), *[(1, key_heads, tokens, 16)] * 2, (1, tokens, heads, 16)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.fixture
def made_by_amd(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Choose whose processor this is taken for."""
    return lambda amd: monkeypatch.setattr(attention_products, "made_by_amd", lambda: amd)


def reference(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Output and gradients by `scaled_dot_product_attention` in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    wide = [leaves[0], *(leaf.repeat_interleave(groups, 1) for leaf in leaves[1:])]
    parts = zip(*(tensor.split(lengths, 2) for tensor in wide), strict=True)
    output = torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, scale=SCALE) for part in parts], 2)
    output = output.transpose(1, 2)
    output.backward(grad.double())
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 7e-4)],
)
@pytest.mark.parametrize("lengths", [(1,), (BLOCK,), (3, 200, 1, 2 * BLOCK, 65)], ids=str)
@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize("amd", [True, False], ids=["amd", "others"])
def test_segments_have_the_output_and_gradients_of_pytorch(
    dtype: torch.dtype, limit: float, lengths: tuple[int, ...], key_heads: int, amd: bool, made_by_amd
) -> None:
    made_by_amd(amd)
    q, k, v, grad = tensors(6, key_heads, sum(lengths), dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    output, _ = segment_attention(torch.nn.Module(), *leaves, None, scaling=SCALE, segment_lengths=lengths)
    output.backward(grad)
    for mine, exact in zip([output, *(leaf.grad for leaf in leaves)], reference(q, k, v, grad, lengths), strict=True):
        size = torch.maximum(exact.norm(), grad.double().norm() / 5)  # a lone token's query has no gradient
        assert (mine.double() - exact).norm() <= limit * size


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 5e-3), (torch.float16, 7e-4), (torch.float32, 1e-6)])
@pytest.mark.parametrize("amd", [True, False], ids=["amd", "others"])
def test_pictures_have_the_output_and_gradients_of_pytorch(
    dtype: torch.dtype, limit: float, amd: bool, made_by_amd
) -> None:
    made_by_amd(amd)
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.is_causal = False
    q, k, v = (torch.randn(3, 4, 150, 16).to(dtype) for _ in range(3))
    grad = torch.randn(3, 150, 4, 16).to(dtype)
    found = []
    for wide in (False, True):
        leaves = [(tensor.double() if wide else tensor.clone()).requires_grad_() for tensor in (q, k, v)]
        if wide:
            output = F.scaled_dot_product_attention(*leaves, scale=SCALE).transpose(1, 2)
        else:
            output, _ = picture_attention(module, *leaves, None, scaling=SCALE)
        output.backward(grad.double() if wide else grad)
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for mine, exact in zip(*found, strict=True):
        assert (mine.double() - exact).norm() <= limit * exact.norm()


def test_kept_are_small_probabilities_in_half_precision_or_what_the_kernel_needs(made_by_amd) -> None:
    def kept(tokens: int, dtype: torch.dtype) -> int:
        q, k, v, _ = tensors(2, 2, tokens, dtype)
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()), lambda _: None):
            segment_attention(torch.nn.Module(), q.requires_grad_(), k, v, None, segment_lengths=(tokens,))
        return sum(numbers) - 3 * q.numel()

    made_by_amd(True)
    assert kept(128, torch.bfloat16) == 2 * 128 * 128
    assert kept(129, torch.bfloat16) == 0
    assert kept(129, torch.float32) == 0
    by_kernel = kept(128, torch.float32)
    assert by_kernel == 2 * 128 * (16 + 1)  # the output, and a number per query
    made_by_amd(False)
    assert kept(128, torch.bfloat16) == by_kernel


def test_heads_taken_a_few_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = tensors(6, 3, 150, torch.float32)

    def found() -> list[Tensor]:
        output, *gradients = (torch.empty_like(tensor[0]) for tensor in (q, q, k, v))
        attend(q[0], k[0], v[0], SCALE, out=output)
        attend_backward(grad[0].transpose(0, 1), q[0], k[0], v[0], SCALE, out=tuple(gradients))
        return [output, *gradients]

    whole = found()
    monkeypatch.setattr(attention_products, "SCORES", 1)
    for mine, exact in zip(found(), whole, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("amd", [True, False], ids=["amd", "others"])
def test_autocast_does_not_round_the_scores(amd: bool, made_by_amd) -> None:
    made_by_amd(amd)
    q, k, v, grad = tensors(4, 2, 100, torch.bfloat16)
    found = []
    for autocasting in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasting):
            output, _ = segment_attention(torch.nn.Module(), *leaves, None, scaling=SCALE, segment_lengths=(60, 40))
            output.backward(grad)
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for plain, autocast in zip(*found, strict=True):
        assert torch.equal(plain, autocast)


def test_little_above_the_diagonal_is_multiplied() -> None:
    q, k, v, _ = tensors(2, 2, 8 * BLOCK, torch.float32)
    with FlopCounterMode(display=False) as counted:
        attend(q[0], k[0], v[0], SCALE, out=torch.empty_like(q[0]))
    whole = 2 * 2 * 2 * (8 * BLOCK) ** 2 * 16
    assert counted.get_total_flops() == whole * (1 + 1 / 8) / 2
