"""The number format of a run, and how its sums are rounded and ordered on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLASH = "FLASH_ATTENTION_DETERMINISTIC"
"""Environment variable of transformers, for the packages of flash-attention."""


def resolve_precision(precision: str) -> str:
    """Resolve `auto` of `train.precision`: bf16 where the hardware multiplies it fast, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8", errors="replace") if flags.is_file() else ""
    return "bf16" if "amx_bf16" in text or "avx512_bf16" in text else "fp32"


@contextmanager
def run_arithmetic(*, deterministic: bool) -> Iterator[None]:
    """Sums in fp32 within the block and, if asked, always in the same order; what was set before comes back.

    cuBLAS may round the parts of a long sum to half precision; PyTorch allows it by default. The gradients of A and of
    ``s B M`` are sums over all tokens of a micro-batch, so here it does not. It reads its variable once.
    """
    products = torch.backends.cuda.matmul
    with ExitStack() as stack:
        for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
            _turn_off(stack, products, name)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            stack.callback(_put_back, FLASH, os.environ.get(FLASH))
            os.environ[FLASH] = "1"
            stack.callback(
                torch.use_deterministic_algorithms,
                torch.are_deterministic_algorithms_enabled(),
                warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            torch.use_deterministic_algorithms(True)
            # Filling all new memory costs time, and nothing here reads memory before it writes it.
            _turn_off(stack, torch.utils.deterministic, "fill_uninitialized_memory")
            _turn_off(stack, torch.backends.cudnn, "benchmark")
        yield


def _put_back(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


def _turn_off(stack: ExitStack, owner: Any, name: str) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, False)


def dtype_of(precision: str) -> torch.dtype:
    """Torch dtype of a resolved precision."""
    return _DTYPES[precision]
