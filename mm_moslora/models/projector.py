"""Projectors: from vision features to the language model's embedding space. One table, one class each.

Shapes: ``N`` images, ``P`` patches per image, ``Q`` visual tokens per image, ``V`` vision width, ``D`` LLM width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_moslora.errors import ModelError, suggestion


@dataclass(frozen=True, kw_only=True)
class ProjectorShape:
    """What a projector is built for."""

    vision_width: int
    """``V``."""
    language_width: int
    """``D``."""
    grid: int
    """Patches along one side; ``P = grid * grid``."""
    shuffle: int = 2
    """pixel_shuffle only: side of the square of patches folded into one token."""


class LinearProjector(nn.Module):
    """One linear layer (LLaVA 1.0): ``[N, P, V] -> [N, P, D]``."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.vision_width, shape.language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project ``[N, P, V]`` to ``[N, P, D]``."""
        return self.linear(features)

    @property
    def last(self) -> nn.Linear:
        """The layer whose output is the visual tokens."""
        return self.linear

    @staticmethod
    def tokens(shape: ProjectorShape) -> int:
        """Visual tokens per image."""
        return shape.grid * shape.grid


class MlpProjector(nn.Module):
    """Linear, GELU, linear (LLaVA 1.5), with the parameter names of transformers' LLaVA."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(shape.vision_width, shape.language_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(shape.language_width, shape.language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project ``[N, P, V]`` to ``[N, P, D]``."""
        return self.linear_2(self.act(self.linear_1(features)))

    @property
    def last(self) -> nn.Linear:
        """The layer whose output is the visual tokens."""
        return self.linear_2

    tokens = staticmethod(LinearProjector.tokens)


class PixelShuffleProjector(nn.Module):
    """Fold squares of ``shuffle x shuffle`` patches into one token, then norm and MLP (as in InternVL).

    ``[N, P, V] -> [N, P / shuffle^2, D]``: fewer visual tokens, nothing thrown away.
    """

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        if shape.grid % shape.shuffle:
            raise ModelError(
                f"model.projector.shuffle is {shape.shuffle}, which does not divide the grid of {shape.grid} x "
                f"{shape.grid} patches. Divisors: {[n for n in range(1, shape.grid + 1) if shape.grid % n == 0]}."
            )
        self.grid, self.shuffle = shape.grid, shape.shuffle
        folded = shape.vision_width * shape.shuffle**2
        self.norm = nn.LayerNorm(folded)
        self.linear_1 = nn.Linear(folded, shape.language_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(shape.language_width, shape.language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project ``[N, P, V]`` to ``[N, P / shuffle^2, D]``."""
        images, _, width = features.shape
        side, s = self.grid // self.shuffle, self.shuffle
        squares = features.view(images, side, s, side, s, width).permute(0, 1, 3, 2, 4, 5)
        folded = squares.reshape(images, side * side, s * s * width)
        return self.linear_2(self.act(self.linear_1(self.norm(folded))))

    @property
    def last(self) -> nn.Linear:
        """The layer whose output is the visual tokens."""
        return self.linear_2

    @staticmethod
    def tokens(shape: ProjectorShape) -> int:
        """Visual tokens per image."""
        return (shape.grid // shape.shuffle) ** 2


Projector = LinearProjector | MlpProjector | PixelShuffleProjector

PROJECTORS: dict[str, type[LinearProjector] | type[MlpProjector] | type[PixelShuffleProjector]] = {
    "linear": LinearProjector,
    "mlp2x_gelu": MlpProjector,
    "pixel_shuffle": PixelShuffleProjector,
}


def projector_class(kind: str) -> type[LinearProjector] | type[MlpProjector] | type[PixelShuffleProjector]:
    """Look a projector up by name.

    Raises:
        ModelError: no such projector.
    """
    if kind not in PROJECTORS:
        raise ModelError(
            f"model.projector.kind is {kind!r}, expected one of {', '.join(PROJECTORS)}.{suggestion(kind, PROJECTORS)}"
        )
    return PROJECTORS[kind]


@torch.no_grad()
def scale_to_embeddings(last: nn.Linear, project: Callable[[], Tensor], embeddings: Tensor) -> float:
    """Scale a projector's last layer so that visual tokens have the size of word embeddings.

    A fresh projector gives tokens several times larger or smaller than the words beside them; training first has to
    undo that. Called once, on the features of real images.

    Args:
        last: the projector's last layer; changed in place.
        project: gives visual tokens ``[..., D]`` of some real images.
        embeddings: word embeddings ``[vocabulary, D]``.

    Returns:
        The factor applied.
    """
    target = embeddings.float().pow(2).mean().sqrt()
    factor = float(target / project().float().pow(2).mean().sqrt().clamp_min(1e-12))
    last.weight.mul_(factor)
    last.bias.mul_(factor)
    return factor
