"""How many floating-point operations a training step takes, counted from the model; and how many a device can do.

Shapes: ``S`` tokens, ``K`` supervised positions, ``D`` LLM width, ``R`` rank, ``C`` vocabulary, ``N`` images.

A multiply-add is two. With ``g`` = 1 under full gradient checkpointing, else 0, per token and linear layer of ``n``
weights: ``2 n`` forward, ``2 n`` for the input's gradient, ``2 n`` for the weight's where it trains, ``2 n g`` again.
A frozen base therefore costs 4 N per token (6 N checkpointed), an adapter of ``a = r (d_in + d_out)`` weights 6 a, full
tuning 6 N. The fused mixer costs ``8 d_out r^2`` per layer and micro-batch, whatever the tokens. Causal attention costs
``12 D`` per pair of tokens that see each other. The head scores supervised positions only, and so does what lies behind
the last layer's attention where the layers are lean. A frozen tower runs forward once. Embeddings, norms and
activations are left out (below 1 %).

MFU is these FLOPs without the recomputation (g = 0), over time, over the devices' dense peak in the training precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mm_moslora.adapters.inject import named_base_modules
from mm_moslora.adapters.layer import MoSLoRALayer
from mm_moslora.models.lean import drops_positions
from mm_moslora.models.ready import PICTURE, side_of, tower_path
from mm_moslora.models.vlm import is_multimodal


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step works on."""

    tokens: int
    supervised: int
    pairs: float
    """Pairs of tokens of which one sees the other: the sum of ``T (T + 1) / 2`` over the segments."""
    images: int = 0
    micro_batches: int = 1

    @classmethod
    def of(cls, segment_lengths: Sequence[int], *, supervised: int, images: int = 0) -> StepShape:
        """One micro-batch of segments."""
        return cls(
            tokens=sum(segment_lengths), supervised=supervised, images=images,
            pairs=sum(length * (length + 1) / 2 for length in segment_lengths),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs by part."""

    base: float = 0.0
    """Linear layers of the decoder."""
    adapters: float = 0.0
    """Adapters and mixers."""
    attention: float = 0.0
    head: float = 0.0
    vision: float = 0.0
    """Tower, its adapters and the projector."""

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(getattr(self, item.name) for item in fields(self)))


@dataclass(frozen=True, kw_only=True)
class _Linears:
    """Weights of a group of linear layers."""

    frozen: float = 0.0
    trained: float = 0.0
    adapters: float = 0.0
    mixers: float = 0.0
    """Sum of ``d_out r^2``."""

    def times(self, factor: float) -> _Linears:
        """So many of them."""
        return _Linears(**{item.name: factor * getattr(self, item.name) for item in fields(self)})

    def cost(self, tokens: float, *, passes_back: bool, again: int) -> float:
        """FLOPs of the weights themselves."""
        every = 2 + 2 * again + (2 if passes_back else 0)
        return tokens * (every * (self.frozen + self.trained) + 2 * self.trained)

    def adapter_cost(self, tokens: float, micro_batches: int, *, again: int) -> float:
        """FLOPs of adapters and mixers."""
        return tokens * self.adapters * (6 + 2 * again) + micro_batches * self.mixers * (8 + 2 * again)


@dataclass(frozen=True, kw_only=True)
class PictureCost:
    """Of one picture's way through the tower, tiles and all, as it was counted by running it."""

    flops: float
    """Of the forward pass."""
    attention: float
    """Of those."""
    patches: float
    """Prefixes included."""
    tokens: float
    """Visual ones, of the language model."""


class FlopCounter:
    """Counts what a model costs; made once, as it walks over the model's modules.

    Args:
        model: causal language model or VLM with whatever trains set; may be on the meta device.
        layers: decoder layers to count, where the model at hand holds only some of them; None: its own.
        picture: None: by arithmetic, which knows transformers' towers and one tile.
    """

    def __init__(
        self, model: PreTrainedModel, *, layers: int | None = None, picture: PictureCost | None = None
    ) -> None:
        decoder: Any = model.get_decoder()
        config = model.config.get_text_config()
        held = list(decoder.layers)
        count = layers or len(held)
        behind = ("o_proj", "dense", "gate_proj", "up_proj", "down_proj", "gate_up_proj")
        frozen = not any(p.requires_grad for name, p in held[-1].named_parameters() if "lora_" not in name)
        self.drops = drops_positions(model) and frozen  # a trained layer runs in its stock form
        self.decoder = _count([module for layer in held for module in _with_paths(layer)]).times(count / len(held))
        self.behind = _count([(path, m) for path, m in _with_paths(held[-1]) if path.rpartition(".")[2] in behind])
        head = model.get_output_embeddings()
        self.head, self.head_trains = head.weight.shape[-1] * head.weight.shape[0], head.weight.requires_grad
        if hasattr(head.weight, "ds_numel"):
            self.head = head.weight.ds_numel
        heads = config.num_attention_heads
        self.attention_width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) * count
        self._count_vision(model, picture)
        needs = any(parameter.requires_grad for parameter in decoder.parameters())
        self.passes_back = needs or self.projector_trains or self.tower_trains

    def _count_vision(self, model: PreTrainedModel, picture: PictureCost | None) -> None:
        tower: Any = model.get_submodule(tower_path(model)) if is_multimodal(model) else None
        projector = getattr(getattr(model, "model", None), "multi_modal_projector", None)
        self.tower, self.projector = _count(_with_paths(tower)), _count(_with_paths(projector))
        linears: list[Any] = [base for _, (base, _) in _with_paths(projector)]
        self.projector_entry = float(linears[0].in_features * linears[0].out_features) if linears else 0.0
        self.tower_trains, self.projector_trains = _trains(tower), _trains(projector)
        self.patches = self.tower_pairs = self.tower_once = self.visual_tokens = 0.0
        if tower is None:
            return
        if picture is not None:
            self.visual_tokens, self.patches = picture.tokens, picture.patches
            self.tower_pairs = picture.attention / 4
            self.tower_once = picture.flops - picture.attention - 2 * picture.patches * self.tower.adapters
            return
        config = tower.config
        self.visual_tokens = float(getattr(model.config, "image_seq_length", 256))
        self.patches = float(_patches(model.config, config))
        self.tower_pairs = self.patches**2 * config.hidden_size * getattr(config, "num_hidden_layers", 0)
        pixels = 3 * (side_of(config, "patch_size") or 16) ** 2
        self.tower_once = 2 * self.patches * (self.tower.frozen + self.tower.trained + pixels * config.hidden_size)

    def count(self, shape: StepShape, *, checkpointing: bool = False, vision_checkpointing: bool = False) -> Flops:
        """FLOPs of forward and backward passes.

        Args:
            shape: of the step, on one rank or over all.
            checkpointing: full gradient checkpointing of the decoder, its recomputation counted.
            vision_checkpointing: the same of a tower that trains.
        """
        again, steps = int(checkpointing), shape.micro_batches
        dropped = shape.tokens - shape.supervised if self.drops else 0
        base = self.decoder.cost(shape.tokens, passes_back=self.passes_back, again=again)
        base -= self.behind.cost(dropped, passes_back=self.passes_back, again=again)
        adapters = self.decoder.adapter_cost(shape.tokens, steps, again=again)
        adapters -= self.behind.adapter_cost(dropped, 0, again=again)
        passes = 1 + again + (2 if self.passes_back else 0)
        vision_tokens = shape.images * self.patches
        own = self.tower.trained / max(1.0, self.tower.frozen + self.tower.trained)
        seen_again = int(vision_checkpointing and self.tower_trains)
        linear, attention = (2 + own + seen_again, 3 + seen_again) if self.tower_trains else (1, 1)
        vision = shape.images * (linear * self.tower_once + 4 * attention * self.tower_pairs)
        vision += self.tower.adapter_cost(vision_tokens, steps, again=seen_again)
        seen = shape.images * self.visual_tokens
        vision += self.projector.cost(seen, passes_back=self.tower_trains or self.projector_trains, again=0)
        if self.projector_trains and not self.tower_trains:
            vision -= 2 * seen * self.projector_entry  # nothing asks for the gradient of a frozen tower's features
        head = shape.supervised * self.head * (2 + (2 if self.passes_back else 0) + (2 if self.head_trains else 0))
        return Flops(
            base=base, adapters=adapters, attention=4 * self.attention_width * shape.pairs * passes, head=head,
            vision=vision,
        )  # fmt: skip


def _patches(model: Any, tower: Any) -> int:
    """Tokens in the tower, prefix included; our own models know them, whatever the size of the tower's training."""
    if getattr(model, "vision_grid", 0):
        return int(model.vision_grid) ** 2 + int(model.vision_prefix)
    prefix = not getattr(tower, "model_type", "").startswith("siglip")
    if hasattr(model, "image_seq_length"):
        return round(model.image_seq_length / getattr(model, "downsample_ratio", 1.0) ** 2) + prefix
    side, patch = side_of(tower, "image_size"), side_of(tower, "patch_size") or 16
    width, height = (side, side) if side else PICTURE
    return (width // patch) * (height // patch)


def _trains(module: nn.Module | None) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())


def _with_paths(module: nn.Module | None) -> list[tuple[str, tuple[nn.Module, nn.Module]]]:
    """Linear layers without what lies inside adapters: path, the base layer and the module around it."""
    if module is None:
        return []
    around = dict(module.named_modules())
    return [
        (path, (base, around.get(path, base)))
        for path, base in named_base_modules(module)
        if isinstance(getattr(base, "in_features", None), int) and hasattr(base, "weight")
    ]


def _count(linears: Sequence[tuple[str, tuple[nn.Module, nn.Module]]]) -> _Linears:
    frozen = trained = adapters = mixers = 0.0
    for _, (base, around) in linears:
        linear: Any = base
        size = float(linear.in_features * linear.out_features)
        if isinstance(linear.weight, torch.Tensor) and linear.weight.requires_grad:
            trained += size
        else:
            frozen += size
        if isinstance(around, MoSLoRALayer):
            for name in around.adapter_names():
                rank = around.r[name]
                adapters += rank * (linear.in_features + linear.out_features)
                mixers += rank * rank * linear.out_features
    return _Linears(frozen=frozen, trained=trained, adapters=adapters, mixers=mixers)
