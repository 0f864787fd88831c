"""Floating-point operations of a training step, counted from the model's modules.

Shapes: ``S`` tokens, ``K`` supervised positions, ``D`` LLM width, ``R`` rank, ``C`` vocabulary, ``N`` images.

A multiply-add counts as two. With ``g`` the share of checkpointed layers, a linear layer of ``n`` weights
costs per token: ``2 n`` forward, ``2 n`` for the input's gradient, ``2 n`` for the weight's gradient where it trains,
and ``2 n g`` for the recomputation.
A frozen base therefore costs 4 N per token (6 N checkpointed), an adapter of ``a = r (d_in + d_out)`` weights 6 a, full
tuning 6 N. The fused mixer costs ``8 d_out r^2`` per layer and micro-batch, whatever the tokens. Causal attention
costs ``12 D`` per pair of tokens with attention between them. The head runs on supervised positions only, and so do the
operations after the last layer's attention where the layers are lean. A frozen tower runs forward once. Embeddings,
norms and activations are left out (below 1 %).

MFU divides these FLOPs without recomputation (g = 0) by time and by the devices' dense peak in the training precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.tree import named_base_modules
from mm_moslora.models.memory_efficient.decoder_layers import drops_positions
from mm_moslora.models.pretrained_vlm import decoder_layers, tower_path
from mm_moslora.models.vlm import is_multimodal, part_of, projectors
from mm_moslora.training.metrics.vision_flops import TowerShape, VisionWork

_POOLS = (".head.", ".attn_pool.", ".pooler.")
"""Parts of towers that process one token per picture."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The amount of work in a step."""

    tokens: int
    supervised: int
    pairs: float
    """Pairs of tokens with attention between them: the sum of ``T (T + 1) / 2`` over the segments."""
    images: int = 0
    vision_work: VisionWork | None = None
    """Vision work of all pictures; None: the counter's default per picture times the number of images."""
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
    """Multiplications of the mixers with B, ``d_out r^2``."""

    @property
    def forward(self) -> float:
        """Multiply-adds per row, without mixers."""
        return self.frozen + self.trained + self.adapters

    def cost(self, tokens: float, *, passes_back: bool, again: float) -> float:
        """FLOPs of the base weights."""
        every = 2 + 2 * again + (2 if passes_back else 0)
        return tokens * (every * (self.frozen + self.trained) + 2 * self.trained)

    def adapter_cost(self, tokens: float, micro_batches: int, *, again: float) -> float:
        """FLOPs of adapters and mixers."""
        return tokens * self.adapters * (6 + 2 * again) + micro_batches * self.mixers * (8 + 2 * again)


@dataclass(frozen=True, kw_only=True)
class PictureCost:
    """FLOPs of one picture in the tower, tiles included, measured by running it."""

    flops: float
    """FLOPs of the forward pass."""
    attention: float
    """FLOPs of its attention, included in `flops`."""
    patches: float
    """Prefixes included."""
    tiles: int


class FlopCounter:
    """Counts the FLOPs of a model. Construction walks over the model's modules, so make one counter per model.

    Args:
        runs: how often a forward pass runs each decoder layer, and those it stands for where the model holds only some
            of them; None: once.
        picture: FLOPs of one picture; None: computed from the configuration, for transformers' towers and one tile.
    """

    def __init__(
        self, model: PreTrainedModel, *, runs: Sequence[int] | None = None, picture: PictureCost | None = None
    ) -> None:
        decoder: Any = model.get_decoder()
        config: Any = model.config.get_text_config()
        blocks = list(decoder_layers(model))
        times = runs or [1] * len(blocks)
        behind = ("o_proj", "dense", "gate_proj", "up_proj", "down_proj", "gate_up_proj")
        self.drops = drops_positions(model)
        each = zip(map(_with_paths, blocks), times, strict=True)
        self.decoder = _count([pair for linears, most in each for pair in linears * most])
        self.behind = _count([(path, m) for path, m in _with_paths(blocks[-1]) if path.rpartition(".")[2] in behind])
        head = model.get_output_embeddings()
        self.head, self.head_trains = head.weight.shape[-1] * head.weight.shape[0], head.weight.requires_grad
        if hasattr(head.weight, "ds_numel"):
            self.head = head.weight.ds_numel
        self.attention_width = _attention_width(blocks, times, config)
        self._count_vision(model, picture)
        needs = any(parameter.requires_grad for parameter in decoder.parameters())
        self.passes_back = needs or self.projector_trains or self.tower_trains

    def _count_vision(self, model: PreTrainedModel, picture: PictureCost | None) -> None:
        self.tower = self.projector = _Linears()
        self.projector_entry = self.per_patch = 0.0
        self.tower_trains = self.projector_trains = False
        self.shape: TowerShape | None = None
        self.picture = VisionWork()
        """The default work per picture, for a step without its own numbers."""
        if not is_multimodal(model):
            return
        path = f"{tower_path(model)}."
        between = {name: (module, _with_paths(module)) for name, module in projectors(model).items()}
        self.projector = _count([pair for _, linears in between.values() for pair in linears])
        within = _count([pair for name, (_, linears) in between.items() if name.startswith(path) for pair in linears])
        apart = tuple(f"{name}." for name in between)
        tower = [(path + name, pair) for name, pair in _with_paths(model.get_submodule(path[:-1]))]
        tower = [pair for pair in tower if not pair[0].startswith(apart)]
        self.tower = _count([pair for pair in tower if not any(part in pair[0] for part in _POOLS)])
        entries = [(module, linears[0][1][0]) for module, linears in between.values() if linears]
        for module, entry in entries:
            trained = next((p for p in module.parameters() if p.requires_grad), None)
            if trained is entry.weight:  # otherwise a norm before it needs its input's gradient
                self.projector_entry += _size(entry)
        training = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.projector_trains = any(part_of(name) == "projector" for name in training)
        self.tower_trains = any(name.startswith(path) and part_of(name) != "projector" for name in training)
        self.shape = shape = TowerShape(model, entry=int(cast(Any, entries[0][1]).in_features) if entries else 0)
        if picture is None:
            vision: Any = shape.config
            values = 3 * getattr(vision, "temporal_patch_size", 1) * shape.patch**2
            self.picture = shape.of_picture()
            self.per_patch = 2 * (self.tower.frozen + self.tower.trained + values * shape.width)
            return
        tokens = shape.tokens(picture.patches, picture.tiles)
        self.picture = VisionWork(patches=picture.patches, pairs=picture.attention / 4, tokens=tokens)
        counted_apart = picture.patches * self.tower.adapters + tokens * within.forward
        self.per_patch = (picture.flops - picture.attention - 2 * counted_apart) / picture.patches

    def count(self, shape: StepShape, *, checkpointing: float = 0.0, vision_checkpointing: bool = False) -> Flops:
        """FLOPs of forward and backward passes of a step, on one rank or over all; recomputation of the share of
        decoder layers with gradient `checkpointing`, and of a tower that trains, is counted."""
        again, steps = float(checkpointing), shape.micro_batches
        dropped = shape.tokens - shape.supervised if self.drops else 0
        base = self.decoder.cost(shape.tokens, passes_back=self.passes_back, again=again)
        base -= self.behind.cost(dropped, passes_back=self.passes_back, again=again)
        adapters = self.decoder.adapter_cost(shape.tokens, steps, again=again)
        adapters -= self.behind.adapter_cost(dropped, 0, again=again)
        passes = 1 + again + (2 if self.passes_back else 0)
        vision_work = self.picture.times(shape.images) if shape.vision_work is None else shape.vision_work
        own = self.tower.trained / max(1.0, self.tower.frozen + self.tower.trained)
        seen_again = int(vision_checkpointing and self.tower_trains)
        linear, attention = (2 + own + seen_again, 3 + seen_again) if self.tower_trains else (1, 1)
        vision = linear * vision_work.patches * self.per_patch + 4 * attention * vision_work.pairs
        vision += self.tower.adapter_cost(vision_work.patches, steps, again=seen_again)
        vision += self.projector.cost(
            vision_work.tokens, passes_back=self.tower_trains or self.projector_trains, again=0
        )
        vision += self.projector.adapter_cost(vision_work.tokens, steps, again=0)
        if self.projector_trains and not self.tower_trains:
            vision -= 2 * vision_work.tokens * self.projector_entry  # a frozen tower needs no gradient of its output
        head = shape.supervised * self.head * (2 + (2 if self.passes_back else 0) + (2 if self.head_trains else 0))
        return Flops(
            base=base, adapters=adapters, attention=4 * self.attention_width * shape.pairs * passes, head=head,
            vision=vision,
        )  # fmt: skip


def _attention_width(layers: Sequence[nn.Module], times: Sequence[int], config: Any) -> int:
    """Heads times their width, of all layers that compute attention, where their projections have the usual names."""
    named = [getattr(getattr(layer, "self_attn", None), "o_proj", None) for layer in layers]
    widths = [int(getattr(projection, "in_features", 0)) for projection in named]
    if any(widths):
        return sum(width * most for width, most in zip(widths, times, strict=True))
    heads = config.num_attention_heads
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) * sum(times))


def _with_paths(module: nn.Module | None) -> list[tuple[str, tuple[nn.Module, nn.Module]]]:
    """Linear layers outside adapters: path, base layer and the module around it."""
    if module is None:
        return []
    around = dict(module.named_modules())
    return [
        (path, (base, around.get(path, base)))
        for path, base in named_base_modules(module)
        if isinstance(_sides(base)[0], int) and hasattr(base, "weight")
    ]


def _sides(linear: Any) -> tuple[Any, Any]:
    """Widths of a linear layer's input and output, also under ZeRO-3; of another module whatever it has."""
    names = ("nx", "nf") if isinstance(linear, Conv1D) else ("in_features", "out_features")
    return getattr(linear, names[0], None), getattr(linear, names[1], None)


def _size(linear: Any) -> float:
    """Number of weights of a layer."""
    width_in, width_out = _sides(linear)
    return float(width_in * width_out)


def _count(linears: Sequence[tuple[str, tuple[nn.Module, nn.Module]]]) -> _Linears:
    frozen = trained = adapters = mixers = 0.0
    for _, (base, around) in linears:
        linear: Any = base
        size, sides = _size(base), _sides(base)
        if isinstance(linear.weight, torch.Tensor) and linear.weight.requires_grad:
            trained += size
        else:
            frozen += size
        if isinstance(around, MoSLoRALayer):
            for name in around.adapter_names():
                rank = around.r[name]
                adapters += rank * sum(sides)
                if name in around.lora_mixer:
                    mixers += rank * rank * sides[1]
        elif isinstance(around, BaseTunerLayer):  # an estimate: every trained weight of the method is one of a product
            adapters += sum(weight.numel() for weight in around.parameters() if weight.requires_grad)
    return _Linears(frozen=frozen, trained=trained, adapters=adapters, mixers=mixers)
