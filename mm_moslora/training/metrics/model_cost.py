"""What a step of a model costs: bytes kept per token and picture, and floating-point operations.

Activations and pictures are counted on the meta device; weights, temporaries and a decoder's FLOPs are computed.

Shapes: ``T`` tokens, ``D`` LLM width, ``F`` MLP width, ``R`` rank, ``C`` vocabulary.

A multiply-add counts as two FLOPs. With ``g`` the share of checkpointed layers, a linear layer of ``n`` weights costs
per token ``2 n`` forward, ``2 n`` for the input's gradient, ``2 n`` for the weight's gradient where it trains, and
``2 n g`` again. The fused mixer costs ``8 d_out r^2`` per layer and micro-batch, whatever the tokens. Causal attention
costs ``12 D`` per pair of tokens with attention between them. The head runs on supervised positions only, and so do the
operations after the last layer's attention where the layers are lean. torch counts tower and projector, whose work is
taken as proportional to the pixels. Embeddings, norms and activations are left out (below 1 %).
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.tree import is_adapter_parameter, named_base_modules
from mm_moslora.batch import Batch
from mm_moslora.config import AdapterConfig, ModelConfig
from mm_moslora.kernels.attention.segment_attention import segment_arguments
from mm_moslora.models.batching.padded_batch import picture_inputs
from mm_moslora.models.memory_efficient.decoder_layers import drops_positions
from mm_moslora.models.memory_efficient.loss_head import forward_instead
from mm_moslora.models.meta_model import (
    FUSED_ATTENTION,
    FusedAttention,
    MetaAndHost,
    MetaModel,
    build_meta_model,
    kept_bytes,
    without_autocast_on_meta,
)
from mm_moslora.models.pretrained_vlm import PICTURE, decoder_layers, side_of, tower_path
from mm_moslora.models.trainable_parts import checkpoint_layers
from mm_moslora.models.transformers_patches import wrap_checkpointing
from mm_moslora.models.vlm import has_own_forward, image_features, is_multimodal, needs_padding
from mm_moslora.utils.errors import ModelError, MoSLoRAError, reason_of

NF4_BYTES = 0.516
"""Bytes per weight: 4 bits, and 0.127 bits for the doubly quantised scales."""
PROBE = 256
"""Tokens for which activations are counted, and for twice as many: some recurrences take blocks of 64."""
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_COUNTED = {
    FUSED_ATTENTION: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    _BACKWARD: lambda _, *shapes, **__: 2 * sdpa_flop_count(*shapes[:3]),
    torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1],
}
"""What torch's counter does not know: the CPU's fused attention, and how adapters add themselves."""

_nothing = functools.partial(torch.zeros, device="meta")


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The amount of work in a step."""

    tokens: int
    supervised: int
    pairs: float
    """Pairs of tokens with attention between them: the sum of ``T (T + 1) / 2`` over the segments."""
    images: float = 0
    """Pictures of the size that was counted."""
    micro_batches: int = 1

    @classmethod
    def of(cls, segment_lengths: Sequence[int], *, supervised: int, images: float = 0) -> StepShape:
        """One micro-batch of segments."""
        pairs = sum(length * (length + 1) / 2 for length in segment_lengths)
        return cls(tokens=sum(segment_lengths), supervised=supervised, images=images, pairs=pairs)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs by part."""

    base: float = 0.0
    """Linear layers of the decoder."""
    adapters: float = 0.0
    """Adapters and mixers of the decoder."""
    attention: float = 0.0
    head: float = 0.0
    vision: float = 0.0
    """Tower, its adapters and the projector."""

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(getattr(self, item.name) for item in fields(self)))


@dataclass(frozen=True, kw_only=True)
class PictureWork:
    """What a typical picture takes in tower and projector, forward and backward; all zero without a tower."""

    flops: float = 0.0
    again: float = 0.0
    """FLOPs of the recomputation, where the tower is checkpointed."""
    values: int = 1
    """Pixel values, by which other pictures are measured."""
    tiles: int = 0
    """Tiles of a picture, the whole view included."""
    kept: float = 0.0
    """Bytes kept for the backward pass."""
    workspace: float = 0.0
    """Bytes of the largest temporaries."""

    def count(self, batch: Batch) -> float:
        """How many such pictures those of a micro-batch are worth."""
        host = batch.on_host
        if not host.images:
            return 0.0
        assert host.pixel_values is not None
        pixels = host.pixel_values
        if pixels.ndim > 4:  # tiles of zeros fill up pictures with fewer
            tiles = pixels.flatten(0, -4)
            return int(tiles[:, :, 0].flatten(1).any(dim=1).sum()) * tiles[0].numel() / self.values
        return pixels.numel() / self.values


class FlopCounter:
    """Counts the FLOPs of a model; `runs`: of each decoder layer at hand in a pass, `picture`: work of a usual one."""

    def __init__(
        self, model: PreTrainedModel, *, runs: Sequence[int] | None = None, picture: PictureWork | None = None
    ) -> None:
        blocks = list(decoder_layers(model))
        times = runs or [1] * len(blocks)
        behind = ("o_proj", "dense", "gate_proj", "up_proj", "down_proj", "gate_up_proj")
        self.drops = drops_positions(model)
        self.decoder = _Linears()
        for block, most in zip(blocks, times, strict=True):
            self.decoder.add(block, times=most)
        self.behind = _Linears()
        self.behind.add(blocks[-1], named=behind)
        head = model.get_output_embeddings()
        self.head = getattr(head.weight, "ds_numel", None) or head.weight.numel()  # under ZeRO-3, of all ranks
        self.head_trains = head.weight.requires_grad
        self.attention_width = _attention_width(blocks, times, model.config.get_text_config())
        if picture is None and is_multimodal(model) and not has_own_forward(model):
            side, device = side_of(cast(Any, model.config).vision_config, "image_size"), head.weight.device
            pixels = torch.zeros(1, 3, side, side, device=device)
            with MetaAndHost(), FusedAttention():
                picture = PictureWork(flops=_flops_of(lambda: image_features(model, pixels), model))
        self.picture = picture or PictureWork()
        self.passes_back = any(p.requires_grad for p in model.parameters() if p is not head.weight)

    def count(self, shape: StepShape, *, checkpointing: float = 0.0, vision_checkpointing: bool = False) -> Flops:
        """FLOPs of a step's passes, with the recomputation of a share of the decoder layers, and of a tower."""
        again = float(checkpointing)
        every = 2 + 2 * again + (2 if self.passes_back else 0)
        dropped = shape.tokens - shape.supervised if self.drops else 0
        base = shape.tokens * self.decoder.base(every) - dropped * self.behind.base(every)
        adapted = shape.tokens * self.decoder.adapters - dropped * self.behind.adapters
        passes = 1 + again + (2 if self.passes_back else 0)
        head = shape.supervised * self.head * (2 + (2 if self.passes_back else 0) + (2 if self.head_trains else 0))
        return Flops(
            base=base,
            adapters=adapted * (6 + 2 * again) + shape.micro_batches * self.decoder.mixers * (8 + 2 * again),
            attention=4 * self.attention_width * shape.pairs * passes, head=head,
            vision=shape.images * (self.picture.flops + (self.picture.again if vision_checkpointing else 0)),
        )  # fmt: skip


@dataclass(kw_only=True)
class _Linears:
    """Weights of a group of linear layers."""

    frozen: float = 0.0
    trained: float = 0.0
    adapters: float = 0.0
    mixers: float = 0.0
    """Multiplications of the mixers with B, ``d_out r^2``."""

    def base(self, every: float) -> float:
        """FLOPs of a token in the base weights, with so many per weight besides gradients of weights."""
        return every * (self.frozen + self.trained) + 2 * self.trained

    def add(self, module: nn.Module, *, times: int = 1, named: Sequence[str] = ()) -> None:
        """Add the linear layers of a module outside adapters, or those with these names."""
        around = dict(module.named_modules())
        for path, base in named_base_modules(module):
            sides = _sides(base)
            if not isinstance(sides[0], int) or not hasattr(base, "weight"):
                continue
            if named and path.rpartition(".")[2] not in named:
                continue
            size = float(sides[0] * sides[1]) * times
            weight = cast(Any, base).weight
            if isinstance(weight, Tensor) and weight.requires_grad:
                self.trained += size
            else:
                self.frozen += size
            layer = around.get(path)
            if isinstance(layer, MoSLoRALayer):
                for name in layer.adapter_names():
                    rank = layer.r[name]
                    self.adapters += times * rank * sum(sides)
                    self.mixers += times * rank * rank * sides[1] if name in layer.lora_mixer else 0
            elif isinstance(layer, BaseTunerLayer):  # an estimate: every trained weight is one of a product
                self.adapters += times * sum(w.numel() for w in around[path].parameters() if w.requires_grad)


def _sides(linear: Any) -> tuple[Any, Any]:
    """Widths of a linear layer's input and output, also under ZeRO-3; of another module whatever it has."""
    names = ("nx", "nf") if isinstance(linear, Conv1D) else ("in_features", "out_features")
    return getattr(linear, names[0], None), getattr(linear, names[1], None)


def _attention_width(layers: Sequence[nn.Module], times: Sequence[int], config: Any) -> int:
    """Heads times their width, of all layers that compute attention, where their projections have the usual names."""
    named = [getattr(getattr(layer, "self_attn", None), "o_proj", None) for layer in layers]
    widths = [int(getattr(projection, "in_features", 0)) for projection in named]
    if any(widths):
        return sum(map(operator.mul, widths, times))
    heads = config.num_attention_heads
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) * sum(times))


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_COUNTED)


def _flops_of(look: Callable[[], object], model: nn.Module) -> float:
    """FLOPs of a computation and of its backward pass to what trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _counter() as counted:
        made = [item for item in tree_leaves(look()) if isinstance(item, Tensor) and item.requires_grad]
        if made:
            torch.autograd.grad(made, trained, [torch.ones_like(item) for item in made], allow_unused=True)
    return float(counted.get_total_flops())


@dataclass(frozen=True, kw_only=True)
class ModelCost:
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
    unseen: str
    """Why tiles and tokens of a picture come from the configuration instead of the model's own processor."""
    kept_per_layer: float
    """Kept by one run of a decoder layer for its backward pass."""
    products: int
    """Kept by all decoder layers for any number of tokens, in bytes: the products B M of the adapters."""
    kept_elsewhere: float
    """Kept by embeddings and the last norm."""
    workspace_per_token: float
    made_dense: int
    """The largest quantised weight in the compute dtype, which exists during its matrix product."""
    dequantised: float
    """Read and written to make every quantised weight dense once, in bytes."""
    is_lean: bool
    """Whether decoder layers keep at most about 8 tensors of their width and 2 of the MLP's width."""
    elements: dict[int, int]
    """Parameters by their number of elements."""
    largest_adapter: int
    """Elements of the largest A, B or mixer that trains; 0 without adapters."""
    picture: PictureWork
    """Of a picture of the size that was asked for."""
    counter: FlopCounter = field(compare=False)
    model: PreTrainedModel = field(compare=False)
    """On the meta device, with a few of its decoder layers."""


def model_cost(
    model: ModelConfig,
    adapter: AdapterConfig,
    *,
    vision_checkpointing: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    picture: tuple[int, int] = PICTURE,
) -> ModelCost:
    """Measure a recipe's model on the meta device with a picture of (width, height); ModelError where it cannot."""
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


def _measured(bones: MetaModel, model: ModelConfig, *, vision_checkpointing: bool, dtype: torch.dtype) -> ModelCost:
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
    per_token, products = _kept(bones)
    picture = _picture_work(bones, dtype, checkpointing=vision_checkpointing)
    return ModelCost(
        parts=parts, frozen=frozen, trainable=trainable, weight_bytes=(frozen - packed) * size + packed * each,
        value_bytes=size, layers=bones.layers, runs=sum(bones.runs), width=config.hidden_size,
        vocabulary=config.vocab_size, tokens_per_image=bones.tokens_per_image, unseen=bones.unseen,
        kept_per_layer=per_token, products=products, kept_elsewhere=config.hidden_size * (2 * size + 4),
        # A gated MLP's backward pass holds four tensors of its inner width and four of the model's width.
        workspace_per_token=4 * (inner + config.hidden_size) * size,
        made_dense=max(linears, default=0) * size, dequantised=packed * (each + size),
        is_lean=per_token <= (10 * config.hidden_size + 2.5 * inner) * size,
        elements=dict(elements), largest_adapter=max(adapters, default=0), picture=picture,
        counter=FlopCounter(bones.model, runs=bones.runs, picture=picture), model=bones.model,
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


def _kept(bones: MetaModel) -> tuple[float, int]:
    """Bytes for the backward pass: of a layer per token, mean of all, and of all layers for any number of tokens."""
    fewer, more = (_kept_by_layers(bones, tokens) for tokens in (PROBE, 2 * PROBE))
    slopes = [(most - least) / PROBE for least, most in zip(fewer, more, strict=True)]
    fixed = [max(0.0, least - PROBE * slope) for least, slope in zip(fewer, slopes, strict=True)]
    per_token = sum(map(operator.mul, slopes, bones.times)) / sum(bones.runs)
    return per_token, round(sum(map(operator.mul, fixed, bones.times)))


def _picture_work(bones: MetaModel, dtype: torch.dtype, *, checkpointing: bool) -> PictureWork:
    """Run tower and projector on the meta device with one picture."""
    if not is_multimodal(bones.model):
        return PictureWork()
    tower: Any = bones.model.get_submodule(tower_path(bones.model))
    size, largest, again = torch.finfo(dtype).bits // 8, 0, 0

    def noting(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any) -> Any:
            nonlocal largest, again
            with _counter() as counted:
                kept = kept_bytes(lambda: function(*args), layer)
            largest, again = max(largest, kept), again + (counted.get_total_flops() if kept else 0)
            return checkpoint(function, *args)

        return run

    with MetaAndHost(), FusedAttention():
        look = _look(bones, tower, dtype)
        with torch.no_grad(), _observed(tower) as seen:
            look()
        flops = _flops_of(look, bones.model)
        if checkpointing:
            checkpoint_layers(tower)
            wrap_checkpointing(tower, noting)
        kept = kept_bytes(look, bones.model)
    # The widest layer's input and output, the residual stream and a norm's copies of it, and the picture itself.
    workspace = seen.widest + 4 * seen.states.nbytes + seen.pixels.numel() * (4 + size)
    tiles = 1 if seen.pixels.ndim == 2 else len(seen.pixels)  # Qwen-VL takes the patches themselves
    return PictureWork(
        flops=flops, again=float(again), values=seen.pixels.numel(), tiles=tiles, kept=float(kept + largest),
        workspace=float(workspace),
    )  # fmt: skip


def _look(bones: MetaModel, tower: nn.Module, dtype: torch.dtype) -> Callable[[], object]:
    """Run one picture through tower and projector as in a step; without a processor, one tile through the tower."""
    model: Any = bones.model
    if bones.seen is not None:
        tensors = dict(bones.seen.tensors)
        pixels = tensors.pop("pixel_values")
        inputs = picture_inputs(model, pixels, tensors, device=torch.device("cpu"))

        def features() -> object:
            output = model.base_model.get_image_features(**inputs, return_dict=True)
            return output.pooler_output, getattr(output, "deepstack_features", ())

        return features
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
class _Seen:
    """One pass through a tower."""

    widest: int = 0
    """Bytes of the input and output of a leaf module."""
    pixels: Any = None
    states: Any = None


@contextmanager
def _observed(tower: nn.Module) -> Iterator[_Seen]:
    """Input and output of a tower and of its widest module."""
    seen = _Seen()

    def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.widest = max(seen.widest, sum(item.nbytes for item in (*inputs, output) if isinstance(item, Tensor)))

    def whole(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        seen.pixels = next(item for item in (*args, *keywords.values()) if isinstance(item, Tensor))
        seen.states = next(item for item in tree_leaves(output) if isinstance(item, Tensor))

    handles = [leaf.register_forward_hook(note) for leaf in tower.modules() if not list(leaf.children())]
    handles.append(tower.register_forward_hook(whole, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
