"""The mixer M of MoSLoRA: how it starts, and the module that holds it.

Shapes: ``R`` rank, ``D_in`` and ``D_out`` the adapted layer's widths; A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``.

The update is ``s * B M A``. Cut A into R rows and B into R columns: M holds the weight of every pair of a column
and a row (arXiv 2406.11909, section 3). Plain LoRA is M = I: each row is paired with its own column only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.kernels.lora.lora_math import autocasts, mixer_matrix
from mm_moslora.utils.errors import AdapterError, suggestion

MixerInit = Literal["orthogonal", "kaiming", "identity", "butterfly"]
MIXER_INITS: tuple[str, ...] = get_args(MixerInit)


def init_mixer(
    rank: int,
    kind: str,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A fresh mixer.

    It is drawn on the CPU in float32 and cast afterwards: half precision has no QR, and the same seed then gives the
    same mixer on every device.

    Args:
        rank: R.
        kind: orthogonal (keeps LoRA's scale, condition number 1), kaiming (uniform, a = sqrt(5); the paper's best on
            commonsense reasoning), identity (LoRA's starting point) or butterfly (the paper's two-subspaces mixing).
        generator: source of randomness; None is torch's global CPU generator.
        dtype: of the result.
        device: of the result; on `meta` nothing is drawn.

    Returns:
        ``[R, R]``.

    Raises:
        AdapterError: unknown kind, rank below 1, or an odd rank with butterfly.
    """
    if rank < 1:
        raise AdapterError(f"The rank is {rank}, expected at least 1.")
    check_mixer_init(kind, "mixer_init")
    if torch.device(device).type == "meta":
        return torch.empty(rank, rank, dtype=dtype, device="meta")
    if kind == "butterfly":
        mixer = butterfly(rank)
    elif kind == "identity":
        mixer = torch.eye(rank, device="cpu")
    else:
        mixer = torch.empty(rank, rank, dtype=torch.float32, device="cpu")
        if kind == "orthogonal":
            nn.init.orthogonal_(mixer, generator=generator)
        else:
            nn.init.kaiming_uniform_(mixer, a=math.sqrt(5), generator=generator)
    return mixer.to(device=device, dtype=dtype)


def check_mixer_init(kind: str, where: str) -> None:
    """Refuse what is not a mixer initialisation, with the reason.

    Args:
        kind: the name to check.
        where: the option that holds it, for the message.

    Raises:
        AdapterError: unknown, or `zeros`.
    """
    if kind in ("zeros", "zero"):
        raise AdapterError(
            f"{where} is {kind!r}: with M = 0 and B = 0 the gradients of A, M and B are all exactly zero, so training "
            f"never starts. Use one of {', '.join(MIXER_INITS)}."
        )
    if kind not in MIXER_INITS:
        raise AdapterError(
            f"{where} is {kind!r}, expected one of {', '.join(MIXER_INITS)}.{suggestion(str(kind), MIXER_INITS)}"
        )


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
    half = torch.eye(rank // 2, device="cpu")
    return half.repeat(2, 2)


def orthonormal_rows(rank: int, width: int) -> Tensor:
    """Random ``[R, width]`` with orthonormal rows, float32 on the CPU.

    Args:
        rank: R, at most `width`.
        width: length of a row.
    """
    rows = torch.empty(rank, width, dtype=torch.float32, device="cpu")
    nn.init.orthogonal_(rows)
    return rows


class _Factor(nn.Module):
    """A factor that is a buffer where it must not train.

    No optimiser, no `requires_grad_` sweep of PEFT and no sharding can then make it move.
    """

    weight: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        try:
            return super()._apply(fn, recurse)
        except NotImplementedError:
            # Loading through the meta device fills it later; until then PEFT moves all but parameters that are empty.
            if "weight" in self._buffers and self.weight.is_meta:
                return self
            raise


class Mixer(_Factor):
    """Holds M and applies it to a row vector of subspace coordinates."""

    def __init__(self, weight: Tensor, *, trainable: bool) -> None:
        """Keep ``[R, R]``, or ``[R]`` for a diagonal mixer."""
        super().__init__()
        if trainable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    @property
    def trainable(self) -> bool:
        """Whether M is a parameter."""
        return "weight" in self._parameters

    def matrix(self) -> Tensor:
        """M as ``[R, R]``; the parameter itself unless the mixer is diagonal."""
        return mixer_matrix(self.weight)

    def forward(self, z: Tensor) -> Tensor:
        """``z M^T`` for ``z`` of shape ``[..., R]``."""
        # PEFT casts parameters to float32 but leaves buffers in the base's dtype: the narrower side follows.
        if self.trainable and not autocasts(z.device):
            z = z.to(self.weight.dtype)
        weight = self.weight if self.trainable else self.weight.to(z.dtype)
        return F.linear(z, weight) if weight.ndim == 2 else z * weight

    def extra_repr(self) -> str:
        """Size, form and whether it trains."""
        form = "dense" if self.weight.ndim == 2 else "diagonal"
        return f"rank={self.weight.shape[0]}, form={form}, trainable={self.trainable}"


class FrozenFactor(_Factor):
    """A or B that must not train (LoRA-XS): a linear layer with its weight in a buffer."""

    def __init__(self, weight: Tensor) -> None:
        """Keep the factor, ``[out, in]``."""
        super().__init__()
        self.register_buffer("weight", weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T`` in the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype))
