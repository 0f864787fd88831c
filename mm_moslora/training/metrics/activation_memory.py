"""Memory of a model per token: activations are counted on the meta device, weights and temporaries are computed.

Shapes: ``T`` tokens, ``D`` LLM width, ``F`` MLP width, ``N`` images.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from mm_moslora.adapters.tree import is_adapter_parameter
from mm_moslora.config import AdapterConfig, ModelConfig
from mm_moslora.kernels.attention.segment_attention import segment_arguments
from mm_moslora.models.batching.padded_batch import picture_inputs
from mm_moslora.models.memory_efficient.loss_head import forward_instead
from mm_moslora.models.meta_execution import (
    FUSED_ATTENTION,
    FusedAttention,
    MetaAndHost,
    kept_bytes,
    without_autocast_on_meta,
)
from mm_moslora.models.meta_model import MetaModel, build_meta_model
from mm_moslora.models.pretrained_vlm import PICTURE, side_of, tower_path
from mm_moslora.models.trainable_parts import checkpoint_layers
from mm_moslora.models.transformers_patches import wrap_checkpointing
from mm_moslora.models.vision.vision_tower import ImageSpec
from mm_moslora.models.vlm import has_own_forward, image_features, is_multimodal, needs_padding
from mm_moslora.training.metrics.step_flops import FlopCounter, PictureCost
from mm_moslora.utils.errors import ModelError, MoSLoRAError, reason_of

NF4_BYTES = 0.516
"""Bytes per weight: 4 bits, and 0.127 bits for the doubly quantised scales."""
PROBE = 256
"""Tokens for which activations are counted, and for twice as many: some recurrences take blocks of 64."""
_DENSE = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
"""Matrix products with weights; all other products belong to attention."""

_nothing = functools.partial(torch.zeros, device="meta")


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """Sizes of a model, in bytes per token or image unless stated otherwise."""

    parts: dict[str, tuple[int, int]]
    """All parameters and trainable parameters by part."""
    frozen: int
    trainable: int
    weight_bytes: float
    """All frozen weights, as they are loaded."""
    value_bytes: int
    """Bytes of a value in the compute dtype."""
    layers: int
    runs: int
    """Runs of decoder layers in a forward pass: more than layers where the class loops over some."""
    width: int
    vocabulary: int
    tokens_per_image: int
    tiles: int
    """Tiles of a picture, the whole view included; 0: a language model alone."""
    unseen: str
    """Why tiles and tokens of a picture come from the configuration instead of the model's own processor."""
    kept_per_layer: float
    """Kept by one run of a decoder layer for its backward pass."""
    products: int
    """Kept by all decoder layers for any number of tokens, in bytes: the products B M of the adapters."""
    kept_elsewhere: float
    """Kept by embeddings and the last norm."""
    kept_per_image: float
    """Kept by the projector and by a tower that trains; with checkpointing: its layers' inputs and one layer."""
    workspace_per_token: float
    workspace_per_image: float
    made_dense: int
    """The largest quantised weight in the compute dtype, which exists during its matrix product."""
    dequantised: float
    """Read and written to make every quantised weight dense once, in bytes."""
    vision_checkpointing: bool
    """Whether the backward pass recomputes the tower's layers."""
    is_lean: bool
    """Whether decoder layers keep at most about 8 tensors of their width and 2 of the MLP's width."""
    elements: dict[int, int]
    """Parameters by their number of elements."""
    largest_adapter: int
    """Elements of the largest A, B or mixer that trains; 0 without adapters."""
    counter: FlopCounter
    model: PreTrainedModel = field(compare=False)
    """On the meta device, with a few of its decoder layers."""


def activation_memory(
    model: ModelConfig,
    adapter: AdapterConfig,
    *,
    vision_checkpointing: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    picture: tuple[int, int] = PICTURE,
) -> ActivationMemory:
    """Measure a recipe's model on the meta device; `picture` (width, height) counts where a model's cost depends on it.

    Raises:
        ModelError: its configuration cannot be read, or it does not compute without weights.
    """
    bones = build_meta_model(model, adapter, dtype=dtype, picture=picture)
    try:
        return _measured(bones, model, vision_checkpointing=vision_checkpointing, dtype=dtype)
    except MoSLoRAError:
        raise
    except Exception as error:  # whatever its classes raise on the meta device
        what = f"PEFT's {adapter.peft['type']}" if adapter.peft else type(bones.model).__name__
        raise ModelError(
            f"The memory of a step cannot be counted: {what} computes nothing without weights "
            f"({type(error).__name__}: {reason_of(error)[:200]}). Find the largest train.micro_batch by a few steps."
        ) from error


def _measured(
    bones: MetaModel, model: ModelConfig, *, vision_checkpointing: bool, dtype: torch.dtype
) -> ActivationMemory:
    if bones.fault is not None:
        raise bones.fault
    parts = bones.parameters()
    trainable = sum(mine for _, mine in parts.values())
    frozen = sum(total for total, _ in parts.values()) - trainable
    size = torch.finfo(dtype).bits // 8
    linears = bones.quantisable() if model.quantisation != "none" else []
    packed = sum(linears)
    each = {"none": 0.0, "nf4": NF4_BYTES, "int8": 1.0}[model.quantisation]
    config: Any = bones.model.config.get_text_config()
    inner = _inner_width(config, bones)
    elements: Counter[int] = Counter()
    for _, parameter, times in bones.each():
        elements[parameter.numel()] += times
    adapters = (p.numel() for name, p, _ in bones.each() if is_adapter_parameter(name) and p.requires_grad)
    kept, image = _kept(bones, size), _per_image(bones, dtype, checkpointing=vision_checkpointing)
    return ActivationMemory(
        parts=parts, frozen=frozen, trainable=trainable, weight_bytes=(frozen - packed) * size + packed * each,
        value_bytes=size, layers=bones.layers, runs=sum(bones.runs), width=config.hidden_size,
        vocabulary=config.vocab_size, tokens_per_image=bones.tokens_per_image, tiles=image.tiles, unseen=bones.unseen,
        kept_per_layer=kept.per_token, products=kept.fixed,
        kept_elsewhere=config.hidden_size * (2 * size + 4), kept_per_image=image.kept,
        # A gated MLP's backward pass holds four tensors of its inner width and four of the model's width.
        workspace_per_token=4 * (inner + config.hidden_size) * size,
        workspace_per_image=image.workspace, vision_checkpointing=vision_checkpointing,
        made_dense=max(linears, default=0) * size, dequantised=packed * (each + size),
        is_lean=kept.per_token <= (10 * config.hidden_size + 2.5 * inner) * size,
        elements=dict(elements), largest_adapter=max(adapters, default=0),
        counter=FlopCounter(bones.model, runs=bones.runs, picture=image.cost), model=bones.model,
    )  # fmt: skip


def _inner_width(config: Any, bones: MetaModel) -> int:
    """Of the widest MLP; where the configuration states none, the longest side of a layer's matrices."""
    stated = getattr(config, "intermediate_size", None) or getattr(config, "moe_intermediate_size", None)
    if stated is None:
        stated = [max(weight.shape) for weight in bones.decoder_layers.parameters() if weight.ndim == 2]
    return int(max(stated) if isinstance(stated, list | tuple) else stated)


def _kept_by_layers(bones: MetaModel, tokens: int) -> list[int]:
    """Bytes that each decoder layer at hand keeps in all its runs, in a pass of the decoder over so many tokens."""
    kept = [0] * len(bones.decoder_layers)

    def measured(at: int, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            result: list[Any] = []
            hidden = hidden_states.detach().requires_grad_()
            kept[at] += kept_bytes(lambda: result.append(forward(hidden, *args, **kwargs)), layer)
            return result[0]

        return run

    with ExitStack() as stack, MetaAndHost(), FusedAttention(), without_autocast_on_meta():
        for at, layer in enumerate(bones.decoder_layers):
            stack.enter_context(forward_instead(layer, measured(at, layer, layer.forward)))
        ids = _nothing(1, tokens, dtype=torch.long)
        segments = {} if needs_padding(bones.model) else segment_arguments((tokens,), ids.device)
        cast(Any, bones.model.get_decoder())(input_ids=ids, use_cache=False, **segments)
    return kept


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What decoder layers keep for the backward pass."""

    per_token: float
    """Bytes of a layer, mean of all."""
    fixed: int
    """Bytes of all layers for any number of tokens."""


def _kept(bones: MetaModel, size: int) -> _Kept:
    fewer, more = (_kept_by_layers(bones, tokens) for tokens in (PROBE, 2 * PROBE))
    slopes = [(most - least) / PROBE for least, most in zip(fewer, more, strict=True)]
    fixed = [max(0.0, least - PROBE * slope) for least, slope in zip(fewer, slopes, strict=True)]
    return _Kept(
        per_token=sum(map(operator.mul, slopes, bones.times)) / sum(bones.runs),
        fixed=round(sum(map(operator.mul, fixed, bones.times))),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _PerImage:
    """The memory and FLOPs of one picture, counted by running tower and projector on the meta device."""

    kept: float = 0.0
    workspace: float = 0.0
    tiles: int = 0
    cost: PictureCost | None = None
    """None: there is no tower."""


def _per_image(bones: MetaModel, dtype: torch.dtype, *, checkpointing: bool) -> _PerImage:
    if not is_multimodal(bones.model):
        return _PerImage()
    tower = bones.model.get_submodule(tower_path(bones.model))
    size = torch.finfo(dtype).bits // 8
    with MetaAndHost(), FusedAttention():
        look = _look(bones, tower, dtype)
        with torch.no_grad(), _widest(tower) as widest, _watched(tower) as measured:
            look()
        largest = _largest_again(tower) if checkpointing else [0]
        saved = kept_bytes(look, bones.model) + max(largest)
    tiles, patches, width = _tiles(bones.image, tower, measured)
    # The widest layer's input and output, the residual stream and a norm's copies of it, and the picture itself.
    workspace = max(widest) + 4 * patches * width * size + measured.pixels.numel() * (4 + size)
    flops = measured.counter.get_flop_counts()["Global"]
    attention = sum(number for kind, number in flops.items() if kind not in _DENSE)
    cost = PictureCost(flops=float(sum(flops.values())), attention=float(attention), patches=patches, tiles=tiles)
    return _PerImage(kept=float(saved), workspace=float(workspace), tiles=tiles, cost=cost)


def _look(bones: MetaModel, tower: nn.Module, dtype: torch.dtype) -> Callable[[], object]:
    """Run one picture through tower and projector as in a step; without a processor, one tile through the tower."""
    model: Any = bones.model
    if bones.seen is not None:
        tensors = dict(bones.seen.tensors)
        pixels = tensors.pop("pixel_values")
        inputs = picture_inputs(model, pixels, tensors, device=torch.device("cpu"))
        return lambda: model.base_model.get_image_features(**inputs, return_dict=True)
    if (spec := bones.image) is not None and not has_own_forward(model):
        return lambda: image_features(model, _nothing(1, 3, spec.size, spec.size))
    config: Any = tower.config
    if bones.patches is not None:
        grid = torch.tensor([[1, *bones.patches]])
        wide = 3 * config.temporal_patch_size * side_of(config, "patch_size") ** 2
        pixels = _nothing(int(grid.prod()), wide, dtype=dtype)
        return lambda: tower(pixels, grid_thw=grid)
    side = side_of(config, "image_size")
    return lambda: tower(_nothing(1, 3, side, side, dtype=dtype))


@dataclass(kw_only=True)
class _MeasuredPass:
    """One pass through a tower."""

    counter: FlopCounterMode
    pixels: Any = None
    output: Any = None


def _tiles(spec: ImageSpec | None, tower: Any, measured: _MeasuredPass) -> tuple[int, int, int]:
    """Tiles of a picture, patches of all tiles (prefix tokens included), and the width of one patch."""
    tiles = measured.pixels.shape[0]
    if spec is not None:
        return tiles, tiles * (spec.tokens + spec.prefix), spec.width
    width = getattr(tower.config, "embed_dim", None) or tower.config.hidden_size
    if measured.pixels.ndim == 2:  # Qwen-VL takes the patches themselves
        return 1, tiles, width
    return tiles, measured.output.last_hidden_state.shape[:2].numel(), width


@contextmanager
def _watched(tower: nn.Module) -> Iterator[_MeasuredPass]:
    """Input, output and FLOPs of a tower."""
    counted = {FUSED_ATTENTION: lambda *shapes, out_shape=None, **_: sdpa_flop_count(*shapes[:3])}
    measured, stack = _MeasuredPass(counter=FlopCounterMode(display=False, custom_mapping=counted)), ExitStack()

    def before(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        measured.pixels = next(item for item in (*args, *keywords.values()) if isinstance(item, Tensor))
        stack.enter_context(measured.counter)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        stack.close()
        measured.output = output

    handles = [tower.register_forward_pre_hook(before, with_kwargs=True), tower.register_forward_hook(after)]
    try:
        yield measured
    finally:
        for handle in handles:
            handle.remove()
        stack.close()


def _largest_again(tower: Any) -> list[int]:
    """Checkpoint a tower's layers, and record the bytes that each keeps when the backward pass recomputes it."""
    checkpoint_layers(tower)
    sizes: list[int] = [0]

    def noting(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any) -> Any:
            sizes.append(kept_bytes(lambda: function(*args), layer))
            return checkpoint(function, *args)

        return run

    wrap_checkpointing(tower, noting)
    return sizes


@contextmanager
def _widest(module: nn.Module) -> Iterator[list[int]]:
    """Bytes of the inputs and outputs of each leaf module."""
    sizes: list[int] = [0]

    def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        sizes.append(sum(item.nbytes for item in (*inputs, output) if isinstance(item, Tensor)))

    handles = [leaf.register_forward_hook(note) for leaf in module.modules() if not list(leaf.children())]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()
