"""The mixer M of MoSLoRA, and how it starts.

Shapes: ``R`` rank, ``D_in`` and ``D_out`` the adapted layer's widths; A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``.

The update is ``s * B M A``. Cut A into R rows and B into R columns: M holds the weight of every pair of a column
and a row (arXiv 2406.11909, section 3). Plain LoRA is M = I: each row is paired with its own column only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.kernels.lora.lora_math import autocasts
from mm_moslora.utils.errors import AdapterError, suggestion

MixerInit = Literal["orthogonal", "kaiming", "identity", "butterfly"]
MIXER_INITS: tuple[str, ...] = get_args(MixerInit)
NO_MIXER = "none"
"""In `mixer_pattern`: a module without a mixer, plain LoRA."""


def init_mixer(rank: int, kind: str, *, generator: torch.Generator | None = None) -> Tensor:
    """A fresh mixer, in float32 on the CPU: half precision has no QR, and a seed gives one mixer on every device.

    Args:
        kind: orthogonal (keeps LoRA's scale, condition number 1), kaiming (uniform, a = sqrt(5); the paper's best on
            commonsense reasoning), identity (LoRA's starting point) or butterfly (the paper's two-subspaces mixing).
        generator: source of randomness; None is torch's global CPU generator.

    Returns:
        ``[R, R]``.

    Raises:
        AdapterError: unknown kind, rank below 1, or an odd rank with butterfly.
    """
    if rank < 1:
        raise AdapterError(f"The rank is {rank}, expected at least 1.")
    check_mixer_init(kind, "mixer_init")
    if kind == "butterfly":
        return butterfly(rank)
    if kind == "identity":
        return torch.eye(rank, dtype=torch.float32, device="cpu")
    mixer = torch.empty(rank, rank, dtype=torch.float32, device="cpu")
    if kind == "orthogonal":
        return nn.init.orthogonal_(mixer, generator=generator)
    return nn.init.kaiming_uniform_(mixer, a=math.sqrt(5), generator=generator)


@contextmanager
def random_stream_of_mixers() -> Iterator[None]:
    """Use a separate stream of random numbers within the block; the CPU's global one is unaffected."""
    # So the start of a mixer changes no A: with one seed, LoRA and MoSLoRA begin at the same A in every layer.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), device="cpu")))
        yield


def check_mixer_init(kind: str, where: str, *, choices: tuple[str, ...] = MIXER_INITS) -> None:
    """Refuse what is not a mixer initialisation, with the reason; `where` is the option that holds it."""
    if kind in ("zeros", "zero"):
        raise AdapterError(
            f"{where} is {kind!r}: with M = 0 and B = 0 the gradients of A, M and B are all exactly zero, so training "
            f"never starts. Use one of {', '.join(MIXER_INITS)}."
        )
    if kind not in choices:
        hint = suggestion(str(kind), choices)
        raise AdapterError(f"{where} is {kind!r}, expected one of {', '.join(choices)}.{hint}")


def butterfly(rank: int) -> Tensor:
    """The fixed mixer of two-subspaces mixing, ``[[I, I], [I, I]]`` with identity blocks of size R / 2.

    With A1, A2 the upper and lower half of A's rows and B1, B2 the left and right half of B's columns, ``B M A`` is
    ``(B1 + B2)(A1 + A2)``: LoRA's ``B1 A1 + B2 A2`` and the crossed pairs ``B1 A2 + B2 A1`` (arXiv 2406.11909, 2.2).

    Args:
        rank: R, even.

    Returns:
        float32 ``[R, R]`` of matrix rank R / 2.

    Raises:
        AdapterError: R is odd.
    """
    if rank % 2:
        raise AdapterError(
            f"The butterfly mixer pairs two halves of the rank, but the rank is {rank}. Use an even rank."
        )
    return torch.eye(rank // 2, dtype=torch.float32, device="cpu").repeat(2, 2)


class Mixer(nn.Module):
    """Holds M and applies it to a row vector of subspace coordinates.

    An M that does not train is a buffer: no optimiser, no `requires_grad_` sweep of PEFT and no sharding can then make
    it move.
    """

    weight: Tensor
    """``[R, R]``."""

    def __init__(self, weight: Tensor, *, trainable: bool) -> None:
        """Keep M.

        Args:
            weight: ``[R, R]``.
        """
        super().__init__()
        if trainable:
            self.register_parameter("weight", nn.Parameter(weight))
        else:
            self.register_buffer("weight", weight)

    @property
    def trainable(self) -> bool:
        """Whether M is a parameter."""
        return next(self.parameters(), None) is not None

    def forward(self, z: Tensor) -> Tensor:
        """``z M^T`` for ``z`` of shape ``[..., R]``."""
        weight = self.weight
        # PEFT casts parameters to float32 but leaves buffers in the base's dtype: the narrower side follows.
        if not self.trainable:
            weight = weight.to(z.dtype)
        elif not autocasts(z.device):
            z = z.to(weight.dtype)
        return F.linear(z, weight)

    def extra_repr(self) -> str:
        """Shape, and whether it trains."""
        return f"{list(self.weight.shape)}, trainable={self.trainable}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        try:
            return super()._apply(fn, recurse)
        except NotImplementedError:
            # Loading through the meta device fills it later; until then PEFT moves all but parameters that are empty.
            if any(buffer.is_meta for buffer in self.buffers(recurse=False)):
                return self
            raise
