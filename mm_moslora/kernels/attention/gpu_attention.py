"""Attention of packed rows on a GPU: kernels that take all segments in one call, each tried before it is used.

Shapes: ``H`` heads of queries, ``K`` of keys and values, ``G = H / K``, ``T`` tokens of the row, ``E`` head width.

PyTorch brings FlashAttention 2 (`varlen_attn`: half precision, compute capability 8.0 or more). transformers runs the
packages flash-attn, flash-attn-3 and flash-attn-4. A trial finds a package that was built for another GPU or PyTorch.

`varlen_attn` documents fewer heads of keys than of queries where it has the argument `enable_gqa`. Without it the heads
are not looked at, so it gets shared heads where a trial finds the results right, and repeated ones elsewhere.
FlexAttention is a kernel only under torch.compile (else it computes all scores of the row).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import import_utils

FLASH = ("flash_attention_4", "flash_attention_3", "flash_attention_2")
"""transformers' names for the packages, in the order in which they are tried."""
LENGTHS = (70, 1, 133)
"""Segments of the row on which a kernel is tried: more than a block of it, one token, more than two blocks.

A fault that only longer rows show is not seen."""
TOLERANCE = 0.02
"""Largest relative error; half precision gives 0.002 to 0.006."""
OLDEST_CAPABILITY = (8, 0)
"""Of a GPU that PyTorch's kernel runs on."""


VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None, int], Tensor]
"""Causal attention within the segments of a row; see `_varlen_attn`."""


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """What a kernel is tried with."""

    device: torch.device
    dtype: torch.dtype
    width: int
    """``E``."""
    groups: int = 1
    """``G``."""


@dataclass(frozen=True, kw_only=True)
class KernelTrial:
    """What runs, and what was tried before it."""

    kernel: VarlenKernel | None
    """None: a loop over segments."""
    words: str
    """For the log, after "Attention runs on"."""
    faults: tuple[str, ...] = ()
    """A sentence for every kernel that should run here and does not."""


@cache
def pytorch_kernel(shape: HeadShape) -> KernelTrial:
    """PyTorch's kernel where it runs and is right, with shared heads if it can; else nothing."""
    if reason := _why_not_pytorch(shape):
        return KernelTrial(kernel=None, words=f"a loop over segments, since {reason}")
    faults: list[str] = []
    for repeats, words in ((False, "PyTorch's varlen_attn"), (True, "PyTorch's varlen_attn with repeated heads")):
        if repeats and shape.groups == 1:
            continue
        kernel: VarlenKernel = partial(_varlen_attn, repeats=repeats)
        fault = fault_of(partial(_of_row, kernel), shape)
        if fault is None:
            return KernelTrial(kernel=kernel, words=words, faults=tuple(faults))
        shared = " with shared heads" if shape.groups > 1 and not repeats else ""
        faults.append(f"PyTorch's varlen_attn{shared} does not run here: {fault}")
    return KernelTrial(kernel=None, words="a loop over segments, which takes a call for each", faults=tuple(faults))


def _why_not_pytorch(shape: HeadShape) -> str | None:
    """Why PyTorch's kernel is not tried, as a clause."""
    if shape.device.type != "cuda" or torch.version.hip:
        return "PyTorch's varlen_attn is for NVIDIA GPUs"
    if shape.dtype not in (torch.float16, torch.bfloat16):
        return f"PyTorch's varlen_attn is for bf16 and fp16, and the model is {str(shape.dtype).removeprefix('torch.')}"
    if shape.width % 8 or shape.width > 256:
        return f"heads are {shape.width} wide, and PyTorch's varlen_attn takes multiples of 8 up to 256"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without FlashAttention"
    capability = torch.cuda.get_device_capability(shape.device)
    if capability < OLDEST_CAPABILITY:
        actual, least = (".".join(map(str, pair)) for pair in (capability, OLDEST_CAPABILITY))
        return f"the GPU has compute capability {actual}, and PyTorch's varlen_attn needs {least}"
    return None


def _varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float | None, window: int, *,
    repeats: bool,
) -> Tensor:  # fmt: skip
    """``[T, H, E]``; a token sees `window` earlier ones (-1: all), `repeats` makes as many heads of keys as queries."""
    from torch.nn.attention.varlen import varlen_attn

    groups, options = query.shape[1] // key.shape[1], {}
    if repeats and groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    elif _documents_shared_heads(varlen_attn):
        options["enable_gqa"] = groups > 1
    attend: Callable[..., Any] = varlen_attn
    output: Tensor = attend(
        query, key, value, ends, ends, longest, longest, scale=scale, window_size=(window, 0), **options
    )
    return output


@cache
def _documents_shared_heads(function: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(function).parameters


def _of_row(kernel: VarlenKernel, query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
    """A kernel on ``[1, H, T, E]``, as `fault_of` calls it."""
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return kernel(q, k, v, ends, max(LENGTHS), None, -1)[None]


def is_installed(name: str) -> bool:
    """Whether transformers finds the package of one of `FLASH`, and a GPU."""
    return bool(getattr(import_utils, f"is_flash_attn_{name[-1]}_available")())


@cache
def flash_fault(name: str, shape: HeadShape) -> str | None:
    """Why one of `FLASH` does not run; None: it runs."""
    module = SimpleNamespace(is_causal=True, config=SimpleNamespace(_attn_implementation=name))

    def attend(query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
        segments: dict[str, Any] = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        segments |= {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
        output: Tensor = ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, None, **segments)[0]
        return output

    return fault_of(attend, shape)


def fault_of(attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], shape: HeadShape) -> str | None:
    """Run a kernel, from ``[1, H, T, E]`` to ``[1, T, H, E]``, and its backward pass; None: it agrees with fp32."""
    inputs, ends = _small_row(shape), torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    try:
        # The caller may be in inference mode, under autocast or in a backward pass.
        with torch.inference_mode(mode=False), torch.enable_grad(), torch.autocast(shape.device.type, enabled=False):
            *rows, pull = (tensor.to(shape.device, copy=True) for tensor in inputs)
            q, k, v = leaves = [row.requires_grad_() for row in rows]
            output = attend(q, k, v, ends.to(shape.device))
            results = [output, *torch.autograd.grad(output, leaves, pull)]
            results = [tensor.detach().to("cpu", torch.float32) for tensor in results]
    except Exception as error:  # an unsuitable build fails in many ways
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    for what, mine, exact in zip(("output", "dq", "dk", "dv"), results, _by_products(*inputs), strict=True):
        apart = float((mine - exact).norm() / exact.norm())
        if not apart <= TOLERANCE:  # also where it is not a number
            return f"its {what} differs from products in fp32 by {apart:.1%}"
    return None


def _small_row(shape: HeadShape) -> list[Tensor]:
    """q, k, v and the gradient of the output, on the CPU; the same at every call."""
    generator, heads = torch.Generator().manual_seed(0), 2 * shape.groups
    sizes = [(1, count, sum(LENGTHS), shape.width) for count in (heads, 2, 2)]
    sizes.append((1, sum(LENGTHS), heads, shape.width))
    with torch.inference_mode(mode=False), torch.no_grad():
        return [torch.randn(size, generator=generator).to(shape.dtype) for size in sizes]


def _by_products(query: Tensor, key: Tensor, value: Tensor, pull: Tensor) -> list[Tensor]:
    """The output and the three gradients in fp32."""
    with torch.inference_mode(mode=False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        leaves = [tensor.float().requires_grad_() for tensor in (query, key, value)]
        groups = query.shape[1] // key.shape[1]
        wide = [leaves[0], *(leaf.repeat_interleave(groups, dim=1) for leaf in leaves[1:])]
        parts = zip(*(tensor.split(LENGTHS, dim=2) for tensor in wide), strict=True)
        attended = [nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in parts]
        output = torch.cat(attended, dim=2).transpose(1, 2)
        return [output.detach(), *torch.autograd.grad(output, leaves, pull.float())]
