"""On CUDA all segments of a row go through PyTorch's variable-length kernel in one call, with the right arguments.

Without a GPU: the kernel's meaning is written out after its documentation, and its calls are made on meta tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from mm_moslora.kernels.attention import segment_attention as attention
from mm_moslora.kernels.attention.segment_attention import segment_arguments, segment_attention

LENGTHS = (5, 1, 12)
HEADS, WIDTH, SCALE = 4, 16, 0.3


def documented(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn` on ``[T, H, E]``, as its documentation has it."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert max_q == max_k == max(LENGTHS)
    outputs = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        places = torch.arange(end - start)
        ahead = places[None, :] - places[:, None]
        left, right = (end if side < 0 else side for side in window_size)
        mask = (ahead <= right) & (ahead >= -left)
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa))
    return torch.cat(outputs, 1).transpose(0, 1)


def documented_by_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """The same as torch 2.11 documents it: all three have the same number of heads."""
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("kernel", [documented, documented_by_2_11])
def test_the_kernel_is_told_what_the_loop_over_segments_computes(
    kernel: Callable[..., Tensor], window: int | None, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), WIDTH) for heads in (HEADS, key_heads, key_heads)]
    rows = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    pull = torch.randn(1, sum(LENGTHS), HEADS, WIDTH, dtype=torch.float64)

    def result() -> list[Tensor]:
        leaves = [row.clone().requires_grad_() for row in rows]
        given = segment_arguments(LENGTHS, torch.device("cpu")) | {"sliding_window": window, "scaling": SCALE}
        output, _ = segment_attention(torch.nn.Module(), *leaves, None, **given)
        output.backward(pull)
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    expected, asked = result(), []
    monkeypatch.setattr(attention, "variable_length_kernel", lambda query: asked.append(query) or kernel)
    for mine, exact in zip(result(), expected, strict=True):
        torch.testing.assert_close(mine, exact)
    assert len(asked) == 1


def test_pytorchs_kernel_takes_a_row_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "variable_length_kernel", lambda _: varlen_attn)
    rows = [
        torch.empty(1, sum(LENGTHS), heads, WIDTH, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for heads in (HEADS, 2, 2)
    ]
    leaves = [row.requires_grad_() for row in rows]
    output, _ = segment_attention(torch.nn.Module(), *leaves, None, **segment_arguments(LENGTHS, rows[0].device))
    assert output.shape == (1, sum(LENGTHS), HEADS, WIDTH)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


def test_the_kernel_is_not_asked_where_attention_has_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "variable_length_kernel", lambda _: pytest.fail("it knows no dropout"))
    rows = [torch.randn(1, HEADS, sum(LENGTHS), WIDTH) for _ in range(3)]
    given = segment_arguments(LENGTHS, torch.device("cpu"))
    segment_attention(torch.nn.Module(), *rows, None, dropout=0.1, **given)


def test_the_kernel_is_for_half_precision_on_devices_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    capability, devices = {"now": (8, 0)}, itertools.count(100)  # what a device can is asked once
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability["now"])

    def found(dtype: torch.dtype = torch.bfloat16, width: int = WIDTH, kind: str = "cuda") -> bool:
        device = torch.device(kind, next(devices))
        query = SimpleNamespace(dtype=dtype, shape=(1, HEADS, 8, width), device=device)
        return attention.variable_length_kernel(query) is not None

    assert found()
    assert found(torch.float16, width=256)
    assert not found(torch.float32)
    assert not found(width=12)
    assert not found(width=264)
    assert not found(kind="cpu")
    capability["now"] = (7, 5)
    assert not found()
