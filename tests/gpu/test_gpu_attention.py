"""Attention within segments in half precision against fp64."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moslora.kernels.attention.gpu_attention import FLASH, HeadShape, flash_fault, is_installed, pytorch_kernel
from mm_moslora.kernels.attention.segment_attention import segment_arguments, segment_attention, varlen_kernel

ROWS = {
    "one token": (1,),
    "one segment": (300,),
    "a few": (70, 1, 133, 9),
    "160 segments": tuple(1 + 7 * number % 40 for number in range(160)),
}
ANYWHERE = pytest.mark.anywhere
ERROR = {torch.bfloat16: 0.01, torch.float16: 0.002}
"""Relative; the numbers of a format are 2^-9 and 2^-12 apart at most, and several roundings follow each other."""


@contextmanager
def without_waiting(device: torch.device):
    """The host must not wait for the GPU within the block."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def exact(query: Tensor, key: Tensor, value: Tensor, pull: Tensor, lengths: tuple[int, ...], window: int | None):
    """Output and gradients in fp64, from scores of one segment at a time."""
    leaves = [tensor.cpu().double().requires_grad_() for tensor in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    wide = [leaves[0], *(leaf.repeat_interleave(groups, dim=1) for leaf in leaves[1:])]
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in wide), strict=True):
        places = torch.arange(q.shape[2])
        back = places[:, None] - places[None, :]
        mask = (back >= 0) & (back < (window or q.shape[2]))
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask))
    output = torch.cat(outputs, dim=2).transpose(1, 2)
    return [output.detach(), *torch.autograd.grad(output, leaves, pull.cpu().double())]


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(8, 8, 64), (8, 2, 128), (4, 1, 80)])
@pytest.mark.parametrize("row", ["one token", "one segment", pytest.param("a few", marks=ANYWHERE), "160 segments"])
def test_segments_agree_with_fp64(row, heads, key_heads, width, window, dtype, device) -> None:
    torch.manual_seed(0)
    lengths = ROWS[row]
    tokens = sum(lengths)
    rows = [torch.randn(1, tokens, count, width).to(device, dtype) for count in (heads, key_heads, key_heads)]
    pull = torch.randn(1, tokens, heads, width).to(device, dtype)
    leaves = [tensor.transpose(1, 2).requires_grad_() for tensor in rows]
    varlen_kernel(*leaves[:2])  # tried once, with a wait
    given = segment_arguments(lengths, device) | {"sliding_window": window}
    with without_waiting(device):
        output, _ = segment_attention(torch.nn.Module(), *leaves, None, **given)
        found = [output.detach(), *torch.autograd.grad(output, leaves, pull)]
    for mine, right in zip(found, exact(*leaves, pull, lengths, window), strict=True):
        # One token attends to itself alone: the gradients of q and k are zero.
        assert (mine.cpu().double() - right).norm() <= ERROR[dtype] * right.norm() + 1e-3 * (tokens == 1)


@pytest.mark.cuda_only
@pytest.mark.parametrize("groups", [1, 4, 7])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_the_kernel_of_pytorch_takes_shared_heads(width, groups, device) -> None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("needs compute capability 8.0")
    found = pytorch_kernel(HeadShape(device=device, dtype=torch.bfloat16, width=width, groups=groups))
    assert found.faults == ()
    assert found.words == "PyTorch's varlen_attn"


@pytest.mark.cuda_only
@pytest.mark.parametrize("name", FLASH)
def test_an_installed_package_is_right(name, device) -> None:
    if not is_installed(name):
        pytest.skip(f"the package of {name} is not installed")
    fault = flash_fault(name, HeadShape(device=device, dtype=torch.bfloat16, width=128, groups=4))
    print(f"{name}: {fault or 'right'}")
    assert fault is None or "differs" not in fault  # it may be for another GPU; then the next one is taken
