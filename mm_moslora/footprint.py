"""What a model needs per token: kept activations counted on the meta device, weights and temporaries by arithmetic.

Shapes: ``T`` tokens, ``D`` LLM width, ``F`` MLP width, ``N`` images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from mm_moslora.config import Recipe
from mm_moslora.errors import ModelError
from mm_moslora.models.packed import has_three_part_positions
from mm_moslora.models.pictures import is_frozen
from mm_moslora.models.ready import READY_PIXELS, side_of, tower_path
from mm_moslora.models.skeleton import Skeleton, skeleton
from mm_moslora.models.trainable import checkpoint_layers
from mm_moslora.models.vlm import is_multimodal, is_padded
from mm_moslora.training.flops import FlopCounter

NF4_BYTES = 0.516
"""Per weight: 4 bits and, doubly quantised, 0.127 bits of scale."""
PROBE = 256
"""Tokens with which activations are counted; they grow in proportion."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Sizes of a model, in bytes per token or image where not said otherwise."""

    parts: dict[str, tuple[int, int]]
    """Parameters and trainable ones by part."""
    frozen: int
    trainable: int
    weight_bytes: float
    """All frozen weights, as they are loaded."""
    value_bytes: int
    """Of a value in the compute dtype."""
    layers: int
    width: int
    vocabulary: int
    tokens_per_image: int
    kept_per_layer: float
    """Kept by one decoder layer for its backward pass."""
    kept_elsewhere: float
    """Kept by embeddings and the last norm."""
    kept_per_image: float
    """Kept by the projector and by a tower that trains; with its checkpointing, its layers' inputs and one layer."""
    workspace_per_token: float
    workspace_per_image: float
    made_dense: int
    """The largest quantised weight in the compute dtype, for the length of its product."""
    vision_checkpointing: bool
    """Whether the tower's layers run again in its backward pass."""
    is_lean: bool
    """Whether decoder layers keep no more than about 8 of their width and twice the MLP's."""
    counter: FlopCounter


def footprint(recipe: Recipe, *, dtype: torch.dtype = torch.bfloat16) -> Footprint:
    """Measure a recipe's model on the meta device.

    Args:
        recipe: its parts' configurations are read.
        dtype: the compute dtype.
    """
    bones = skeleton(recipe, dtype=dtype)
    parts = bones.parameters()
    trainable = sum(mine for _, mine in parts.values())
    frozen = sum(total for total, _ in parts.values()) - trainable
    size = torch.finfo(dtype).bits // 8
    linears = bones.quantisable() if recipe.model.quantisation != "none" else []
    packed = sum(linears)
    each = {"none": 0.0, "nf4": NF4_BYTES, "int8": 1.0}[recipe.model.quantisation]
    config: Any = bones.model.config.get_text_config()
    inner = config.intermediate_size
    kept = _kept_by_layer(bones, dtype) / PROBE
    image = _per_image(bones, dtype, checkpointing=recipe.train.vision_gradient_checkpointing)
    return Footprint(
        parts=parts, frozen=frozen, trainable=trainable, weight_bytes=(frozen - packed) * size + packed * each,
        value_bytes=size, layers=bones.layers, width=config.hidden_size, vocabulary=config.vocab_size,
        tokens_per_image=bones.tokens_per_image, kept_per_layer=kept,
        kept_elsewhere=config.hidden_size * (2 * size + 4), kept_per_image=image.kept,
        # A gated MLP's backward pass holds four of its inner width and as many of the model's.
        workspace_per_token=4 * (inner + config.hidden_size) * size,
        workspace_per_image=image.workspace, vision_checkpointing=recipe.train.vision_gradient_checkpointing,
        made_dense=max(linears, default=0) * size,
        is_lean=kept <= (10 * config.hidden_size + 2.5 * inner) * size,
        counter=FlopCounter(bones.model, layers=bones.layers, tower_flops=image.flops),
    )  # fmt: skip


def kept_bytes(run: Callable[[], object], weights: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of a computation, each storage once, weights left out."""
    own = {parameter.untyped_storage()._cdata for parameter in weights.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    del result
    return total


def _kept_by_layer(bones: Skeleton, dtype: torch.dtype) -> int:
    decoder: Any = bones.model.get_decoder()
    layer: Any = bones.held[0]
    width = bones.model.config.get_text_config().hidden_size
    with torch.device("meta"):
        hidden = torch.zeros(1, PROBE, width, dtype=dtype, requires_grad=True)
        positions = torch.zeros(1, PROBE, dtype=torch.long)
        rope = positions.expand(3, 1, PROBE) if has_three_part_positions(bones.model) else positions
        try:
            embeddings = decoder.rotary_emb(hidden, rope)
            arguments: dict[str, Any] = {"position_ids": positions, "position_embeddings": embeddings}
            if not is_padded(bones.model):
                arguments["segment_lengths"] = (PROBE,)
            return kept_bytes(lambda: layer(hidden, attention_mask=None, **arguments), layer)
        except (AttributeError, TypeError) as error:
            raise ModelError(f"{type(layer).__name__} cannot be planned: {error}") from error


@dataclass(frozen=True, kw_only=True)
class _PerImage:
    """What one picture costs, counted by running tower and projector on the meta device."""

    kept: float = 0.0
    workspace: float = 0.0
    flops: float | None = None
    """Of the tower's forward pass; None: there is no tower."""


def _per_image(bones: Skeleton, dtype: torch.dtype, *, checkpointing: bool) -> _PerImage:
    if not is_multimodal(bones.model):
        return _PerImage()
    tower = bones.model.get_submodule(tower_path(bones.model))
    size, kept = torch.finfo(dtype).bits // 8, 0
    with _MetaAndHost():
        if bones.image is not None:
            projector = cast(nn.Module, bones.model.model.multi_modal_projector)
            features = _nothing(1, bones.image.tokens, bones.image.width, dtype=dtype)
            kept += kept_bytes(lambda: projector(features), projector)
        picture = _picture(bones, tower, _dtype_of(tower, dtype))
        with torch.no_grad(), _widest(tower) as widest, FlopCounterMode(display=False) as counted:
            tower(picture.pixels, **picture.inputs)
        largest = _largest_again(tower) if checkpointing else [0]
        if not is_frozen(tower):
            with _FusedAttention():
                kept += kept_bytes(lambda: tower(picture.pixels, **picture.inputs), tower)
            kept += max(largest)
    # The widest layer's input and output, the residual stream and a norm's copies of it, and the picture itself.
    workspace = max(widest) + 4 * picture.patches * picture.width * size + picture.pixels.numel() * (4 + size)
    return _PerImage(kept=float(kept), workspace=float(workspace), flops=float(counted.get_total_flops()))


def _largest_again(tower: Any) -> list[int]:
    """Checkpoint a tower's layers, and note what each keeps when the backward pass runs it again."""
    checkpoint_layers(tower)
    found: list[int] = [0]
    for layer in tower.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer._gradient_checkpointing_func = _noting(found, layer, layer._gradient_checkpointing_func)
    return found


def _noting(found: list[int], layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any) -> Any:
        found.append(kept_bytes(lambda: function(*args), layer))
        return checkpoint(function, *args)

    return run


class _Picture(NamedTuple):
    """A picture as a tower takes it; of a model that cuts pictures up, one tile."""

    pixels: Tensor
    inputs: dict[str, Tensor]
    patches: int
    width: int


def _picture(bones: Skeleton, tower: nn.Module, dtype: torch.dtype) -> _Picture:
    if (spec := bones.image) is not None:
        return _Picture(_nothing(1, 3, spec.size, spec.size, dtype=dtype), {}, spec.tokens, spec.width)
    config: Any = tower.config
    width, patch = getattr(config, "embed_dim", None) or config.hidden_size, side_of(config, "patch_size")
    if hasattr(config, "spatial_merge_size"):  # Qwen-VL takes patches of pictures of any size, and where they were
        side = READY_PIXELS // (patch * config.spatial_merge_size) * config.spatial_merge_size
        pixels = _nothing(side**2, 3 * config.temporal_patch_size * patch**2, dtype=dtype)
        return _Picture(pixels, {"grid_thw": torch.tensor([[1, side, side]])}, side**2, width)
    side = side_of(config, "image_size")
    return _Picture(_nothing(1, 3, side, side, dtype=dtype), {}, (side // patch) ** 2, width)


_nothing = functools.partial(torch.zeros, device="meta")


class _FusedAttention(TorchFunctionMode):
    """Attention on the meta device as fused kernels do it: left alone, it keeps every probability."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(*args[:3], scale=(kwargs or {}).get("scale"))[0]


class _MetaAndHost(TorchDispatchMode):
    """Lets a tower without values compute on sizes that have some: what meets the meta device goes there.

    A test of a mask is answered with yes: every patch of the picture is one to look at.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = (args, kwargs or {})
        tensors = [item for item in tree_leaves(arguments) if isinstance(item, Tensor)]
        if any(item.is_meta for item in tensors):
            if func is torch.ops.aten._local_scalar_dense.default:
                return True
            arguments = tree_map(lambda item: item.to("meta") if isinstance(item, Tensor) else item, arguments)
        return func(*arguments[0], **arguments[1])


def _dtype_of(tower: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Convolutions need pixels in their own type: towers with running statistics stay in fp32."""
    return next((parameter.dtype for parameter in tower.parameters()), dtype)


@contextmanager
def _widest(module: nn.Module) -> Iterator[list[int]]:
    """Bytes that each leaf module takes in and gives out."""
    found: list[int] = [0]

    def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [item for item in (*inputs, output) if isinstance(item, Tensor)]
        found.append(sum(item.nbytes for item in tensors))

    handles = [leaf.register_forward_hook(note) for leaf in module.modules() if not list(leaf.children())]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
