"""Projectors with fewer visual tokens than patches: learned queries, convolutions, squares folded or pooled.

Shapes: ``N`` images, ``P`` patches per image, ``Q`` visual tokens per image, ``V`` vision width, ``D`` LLM width.

The forward pass of a module uses every parameter that it holds, so that ZeRO-3 gathers it in time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.models.projectors.projector_layers import MlpProjector, ProjectorShape
from mm_moslora.utils.errors import ModelError


def heads_for(width: int) -> int:
    """Number of attention heads of width 64, or of the largest smaller width that divides."""
    return width // next(size for size in (64, 48, 32, 16, 8, 4, 2, 1) if width % size == 0)


class CrossAttention(nn.Module):
    """Queries attend to patches and to each other (Flamingo's perceiver, 2204.14198, section 3.1.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = heads_for(width)
        self.norm_queries, self.norm_patches = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """``[N, Q, V]`` and ``[N, P, V]`` to ``[N, Q, V]``."""
        queries, patches = self.norm_queries(queries), self.norm_patches(patches)
        key, value = self.kv(torch.cat([patches, queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.q(queries), key, value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PerceiverBlock(nn.Module):
    """Cross-attention and a feed-forward layer, both residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = CrossAttention(width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )  # fmt: skip

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """``[N, Q, V]`` and ``[N, P, V]`` to ``[N, Q, V]``."""
        queries = queries + self.attention(queries, patches)
        return queries + self.feed_forward(queries)


class PerceiverProjector(nn.Module):
    """Perceiver resampler: learned tokens attend to the patches in blocks, ``[N, P, V] -> [N, Q, D]``."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(shape.queries, shape.vision_width) * 0.02)
        self.places = nn.Parameter(torch.randn(shape.grid**2, shape.vision_width) * 0.02)
        self.blocks = nn.ModuleList(PerceiverBlock(shape.vision_width) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.vision_width)
        self.linear = nn.Linear(shape.vision_width, shape.language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project ``[N, P, V]`` to ``[N, Q, D]``."""
        patches = features + self.places
        queries = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            queries = block(queries, patches)
        return self.linear(self.norm(queries))

    @staticmethod
    def tokens(shape: ProjectorShape) -> int:
        """Visual tokens per image."""
        return shape.queries


class QFormerProjector(nn.Module):
    """BLIP-2's Q-Former (2301.12597) of transformers, at the tower's width: ``[N, P, V] -> [N, Q, D]``."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        width = shape.vision_width
        self.queries = nn.Parameter(torch.randn(1, shape.queries, width) * 0.02)
        config = Blip2QFormerConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=shape.depth, encoder_hidden_size=width,
            num_attention_heads=heads_for(width), cross_attention_frequency=1, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.qformer = Blip2QFormerModel(config)
        self.linear = nn.Linear(width, shape.language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project ``[N, P, V]`` to ``[N, Q, D]``."""
        queries = self.queries.expand(len(features), -1, -1)
        return self.linear(self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state)

    tokens = staticmethod(PerceiverProjector.tokens)


class CAbstractorProjector(nn.Module):
    """Honeybee's C-Abstractor (2312.06742, section 3.2): RegNet stages around a pooling, then an MLP.

    Its tokens are in the order of the patches' places, which learned queries do not keep: ``[N, P, V] -> [N, Q, D]``.
    """

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        from timm.layers.norm import LayerNorm2d
        from timm.models.regnet import RegStage

        self.grid, self.side = shape.grid, _side(shape.queries)
        width = shape.vision_width
        self.places = nn.Parameter(torch.randn(shape.grid**2, width) * 0.02)

        def stage() -> nn.Module:
            return RegStage(
                shape.depth, width, width, stride=1, dilation=1, group_size=math.gcd(width, 8), act_layer=nn.SiLU,
                norm_layer=LayerNorm2d,
            )  # fmt: skip

        self.before, self.after = stage(), stage()
        self.linear_1 = nn.Linear(width, shape.language_width)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(shape.language_width, shape.language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Project ``[N, P, V]`` to ``[N, Q, D]``."""
        patches = (features + self.places).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        pooled = F.adaptive_avg_pool2d(self.before(patches), self.side)
        return self.linear_2(self.act(self.linear_1(self.after(pooled).flatten(2).transpose(1, 2))))

    @staticmethod
    def tokens(shape: ProjectorShape) -> int:
        """Visual tokens per image."""
        return _side(shape.queries) ** 2


def _side(queries: int) -> int:
    side = math.isqrt(queries)
    if side * side != queries:
        raise ModelError(
            f"model.projector.queries is {queries}, expected a square for the c_abstractor: {side**2} or "
            f"{(side + 1) ** 2}."
        )
    return side


class AvgPoolProjector(MlpProjector):
    """Means of squares of patches (smaller at the edge), an MLP: ``[N, P, V] -> [N, ceil(grid / shuffle)^2, D]``."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__(shape)
        self.grid, self.shuffle = shape.grid, shape.shuffle

    def forward(self, features: Tensor) -> Tensor:
        """Project ``[N, P, V]`` to ``[N, Q, D]``."""
        patches = features.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        pooled = F.avg_pool2d(patches, self.shuffle, ceil_mode=True)
        return super().forward(pooled.flatten(2).transpose(1, 2))

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
