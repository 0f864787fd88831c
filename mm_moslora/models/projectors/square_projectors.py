"""Projectors that fold or pool squares of patches into one token.

Shapes: ``N`` images, ``P`` patches per image, ``Q`` visual tokens per image, ``V`` vision width, ``D`` LLM width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.models.projectors.projector_layers import ProjectorShape
from mm_moslora.utils.errors import ModelError


class AvgPoolProjector(nn.Module):
    """Means of squares of patches (smaller at the edge), an MLP: ``[N, P, V] -> [N, ceil(grid / shuffle)^2, D]``."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.grid, self.shuffle = shape.grid, shape.shuffle
        self.linear_1 = nn.Linear(shape.vision_width, shape.language_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(shape.language_width, shape.language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project ``[N, P, V]`` to ``[N, Q, D]``."""
        patches = features.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        pooled = F.avg_pool2d(patches, self.shuffle, ceil_mode=True)
        return self.linear_2(self.act(self.linear_1(pooled.flatten(2).transpose(1, 2))))

    @staticmethod
    def tokens(shape: ProjectorShape) -> int:
        """Visual tokens per image."""
        return (-(-shape.grid // shape.shuffle)) ** 2


class PixelShuffleProjector(nn.Module):
    """Squares of patches folded into tokens, norm and MLP (as in InternVL): ``[N, P, V] -> [N, P / shuffle^2, D]``."""

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

    @staticmethod
    def tokens(shape: ProjectorShape) -> int:
        """Visual tokens per image."""
        return (shape.grid // shape.shuffle) ** 2
