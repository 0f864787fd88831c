"""Attention on a CPU, as matrix products and by PyTorch's kernel: the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moslora.kernels.attention import cpu_attention
from mm_moslora.kernels.attention.cpu_attention import BLOCK, attend, attend_backward
from mm_moslora.kernels.attention.segment_attention import picture_attention, segment_arguments, segment_attention

SCALE = 0.3


WAYS = pytest.mark.parametrize("way", ["products", "pytorch"])


def tensors(heads: int, key_heads: int, tokens: int, dtype: torch.dtype, width: int = 16) -> list[Tensor]:
    """q, k, v and the output's gradient, in the values that the dtype can hold."""
    torch.manual_seed(tokens)
    shapes = [(1, heads, tokens, width), *[(1, key_heads, tokens, width)] * 2, (1, tokens, heads, width)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


LAYER = torch.nn.Module()
"""The attention layer that the functions are told."""


def segments(*lengths: int) -> dict[str, Any]:
    """What a row of these lengths tells its attention."""
    return segment_arguments(lengths, torch.device("cpu"))


@pytest.fixture
def attending(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Choose how attention is computed."""

    def choose(way: str) -> None:
        monkeypatch.setattr(cpu_attention, "products_are_faster", lambda _: way == "products")

    return choose


@pytest.fixture
def made_by_amd(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Choose the maker of processors that this one is taken for."""
    return lambda amd: monkeypatch.setattr(cpu_attention, "made_by_amd", lambda: amd)


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
@pytest.mark.parametrize("lengths", [(1,), (BLOCK,), (3, 200, 1, 2 * BLOCK, 65), (9, 30, 10, 36, 9, 34)], ids=str)
@pytest.mark.parametrize("key_heads", [6, 2])
@WAYS
def test_segments_have_the_output_and_gradients_of_pytorch(
    dtype: torch.dtype, limit: float, lengths: tuple[int, ...], key_heads: int, way: str, attending
) -> None:
    q, k, v, grad = tensors(6, key_heads, sum(lengths), dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    attending(way)
    output, _ = segment_attention(LAYER, *leaves, None, scaling=SCALE, **segments(*lengths))
    output.backward(grad)
    for mine, exact in zip([output, *(leaf.grad for leaf in leaves)], reference(q, k, v, grad, lengths), strict=True):
        size = torch.maximum(exact.norm(), grad.double().norm() / 5)  # a lone token's query has no gradient
        assert (mine.double() - exact).norm() <= limit * size


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 5e-3), (torch.float16, 7e-4), (torch.float32, 1e-6)])
@pytest.mark.parametrize("patches", [40, 150])
@WAYS
def test_pictures_have_the_output_and_gradients_of_pytorch(
    dtype: torch.dtype, limit: float, patches: int, way: str, attending
) -> None:
    torch.manual_seed(0)
    attending(way)
    tower = torch.nn.Module()
    tower.is_causal = False
    q, k, v = (torch.randn(3, 4, patches, 16).to(dtype) for _ in range(3))
    grad = torch.randn(3, patches, 4, 16).to(dtype)
    found = []
    for wide in (False, True):
        leaves = [(tensor.double() if wide else tensor.clone()).requires_grad_() for tensor in (q, k, v)]
        if wide:
            output = F.scaled_dot_product_attention(*leaves, scale=SCALE).transpose(1, 2)
        else:
            output, _ = picture_attention(tower, *leaves, None, scaling=SCALE)
        output.backward(grad.double() if wide else grad)
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for mine, exact in zip(*found, strict=True):
        assert (mine.double() - exact).norm() <= limit * exact.norm()


def test_heads_taken_a_few_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = tensors(6, 3, 150, torch.float32)

    def found() -> list[Tensor]:
        output, *gradients = (torch.empty_like(tensor[0]) for tensor in (q, q, k, v))
        attend(q[0], k[0], v[0], SCALE, out=output)
        attend_backward(grad[0].transpose(0, 1), q[0], k[0], v[0], SCALE, out=tuple(gradients))
        return [output, *gradients]

    whole = found()
    monkeypatch.setattr(cpu_attention, "SCORES", 1)
    for mine, exact in zip(found(), whole, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-6, rtol=1e-6)


@WAYS
def test_autocast_does_not_round_the_scores(way: str, attending) -> None:
    attending(way)
    options = {"scaling": SCALE, **segments(60, 40)}
    q, k, v, grad = tensors(4, 2, 100, torch.bfloat16)
    found = []
    for autocasting in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasting):
            output, _ = segment_attention(LAYER, *leaves, None, **options)
            output.backward(grad)
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for plain, autocast in zip(*found, strict=True):
        assert torch.equal(plain, autocast)
