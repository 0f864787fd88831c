"""Calling the kernels with tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_moslora.native import library

SUFFIXES = {torch.float32: "full", torch.bfloat16: "half"}
"""Of the functions for a dtype."""


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on a CPU, all of one dtype that they know.

    Not under a mode that looks at every operator, such as a counter of FLOPs: it would not see the kernels.
    """
    first = tensors[0].dtype
    alike = all(tensor.dtype == first and tensor.device.type == "cpu" for tensor in tensors)
    return alike and first in SUFFIXES and torch._C._len_torch_dispatch_stack() == 0


def call(name: str, like: Tensor, *arguments: int | float) -> None:
    """Run a kernel on as many threads as PyTorch's operators.

    Args:
        name: of the function, without its suffix.
        like: has the dtype.
        arguments: of the function but for the threads; addresses as `Tensor.data_ptr` has them.
    """
    library()[f"{name}_{SUFFIXES[like.dtype]}"](*arguments, torch.get_num_threads())
