"""Projectors with a token per patch: a linear layer, and MLPs of any depth.

Shapes: ``N`` images, ``P`` patches per image, ``V`` vision width, ``D`` LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ProjectorShape:
    """The widths and sizes of a projector."""

    vision_width: int
    """``V``."""
    language_width: int
    """``D``."""
    grid: int
    """Patches along one side; ``P = grid * grid``."""
    shuffle: int = 2
    """pixel_shuffle and avg_pool: side of the square of patches that becomes one token."""
    queries: int = 64
    """perceiver, qformer and c_abstractor: visual tokens."""
    depth: int = 2
    """mlpNx_gelu: N. perceiver, qformer and c_abstractor: blocks (per stage)."""


class LinearProjector(nn.Module):
    """One linear layer (LLaVA 1.0): ``[N, P, V] -> [N, P, D]``."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.vision_width, shape.language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project ``[N, P, V]`` to ``[N, P, D]``."""
        return self.linear(features)

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

    tokens = staticmethod(LinearProjector.tokens)


class DeepMlpProjector(nn.Module):
    """``depth`` linear layers with GELU between them (LLaVA's mlpNx_gelu, named as its `nn.Sequential`)."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(shape.vision_width, shape.language_width)]
        for _ in range(shape.depth - 1):
            layers += [nn.GELU(), nn.Linear(shape.language_width, shape.language_width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Project ``[N, P, V]`` to ``[N, P, D]``."""
        return self.layers(features)

    tokens = staticmethod(LinearProjector.tokens)


class FusedMlpProjector(nn.Module):
    """Three linear layers; the first widens to four times the vision width (prismatic's fused-gelu-mlp)."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        wide = 4 * shape.vision_width
        self.linear_1 = nn.Linear(shape.vision_width, wide)
        self.linear_2 = nn.Linear(wide, shape.language_width)
        self.linear_3 = nn.Linear(shape.language_width, shape.language_width)
        self.act = nn.GELU()

    def forward(self, features: Tensor) -> Tensor:
        """Project ``[N, P, V]`` to ``[N, P, D]``."""
        return self.linear_3(self.act(self.linear_2(self.act(self.linear_1(features)))))

    tokens = staticmethod(LinearProjector.tokens)
