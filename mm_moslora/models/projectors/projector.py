"""The table of projectors, which map vision features to the embedding space of the language model.

Shapes: ``N`` images, ``P`` patches per image, ``Q`` visual tokens per image, ``V`` vision width, ``D`` LLM width.

Every class takes a `ProjectorShape`, maps ``[N, P, V]`` to ``[N, Q, D]``, computes ``Q`` from the shape (`tokens`) and
ends in a linear layer: the last of its modules, unless it has an attribute `last`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from mm_moslora.models.projectors.projector_layers import (
    DeepMlpProjector,
    FusedMlpProjector,
    LinearProjector,
    MlpProjector,
    ProjectorShape,
)
from mm_moslora.models.projectors.resamplers import (
    AvgPoolProjector,
    CAbstractorProjector,
    PerceiverProjector,
    PixelShuffleProjector,
    QFormerProjector,
)
from mm_moslora.utils.errors import ModelError, suggestion

Projector = (
    LinearProjector | MlpProjector | DeepMlpProjector | FusedMlpProjector | AvgPoolProjector | PixelShuffleProjector
    | PerceiverProjector | QFormerProjector | CAbstractorProjector
)  # fmt: skip
PROJECTORS: dict[str, type[Projector]] = {
    "linear": LinearProjector,
    "mlp2x_gelu": MlpProjector,
    "mlpNx_gelu": DeepMlpProjector,
    "fused_mlp": FusedMlpProjector,
    "avg_pool": AvgPoolProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "c_abstractor": CAbstractorProjector,
    "perceiver": PerceiverProjector,
    "qformer": QFormerProjector,
}
_DEEP = re.compile(r"mlp([1-9])x_gelu")


def build_projector(kind: str, shape: ProjectorShape) -> Projector:
    """A projector with fresh weights."""
    return projector_class(kind)(shaped(kind, shape))


def projector_tokens(kind: str, shape: ProjectorShape) -> int:
    """Visual tokens per image, before a projector is built."""
    return projector_class(kind).tokens(shaped(kind, shape))


def projector_class(kind: str) -> type[Projector]:
    """The class of a projector."""
    if kind not in PROJECTORS and _DEEP.fullmatch(kind):
        return DeepMlpProjector
    if kind not in PROJECTORS or kind == "mlpNx_gelu":
        raise ModelError(
            f"model.projector.kind is {kind!r}, expected one of {', '.join(PROJECTORS)} (N from 1 to 9)."
            f"{suggestion(kind, PROJECTORS)} One of your own needs --import FILE.py."
        )
    return PROJECTORS[kind]


def shaped(kind: str, shape: ProjectorShape) -> ProjectorShape:
    """The shape with the depth that is part of the name (mlpNx_gelu)."""
    deep = _DEEP.fullmatch(kind)
    return replace(shape, depth=int(deep[1])) if deep else shape
