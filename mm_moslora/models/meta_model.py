"""A recipe's model on the meta device, adapters and what trains included: what plans and runs are counted on."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from mm_moslora.adapters.tree import is_adapter_parameter
from mm_moslora.batch import ProcessedImage
from mm_moslora.config import AdapterConfig, ModelConfig
from mm_moslora.kernels.attention.attention_choice import set_attention
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers
from mm_moslora.models.model_paths import hub_names
from mm_moslora.models.pretrained_vlm import PICTURE, decoder_layers, side_of
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vision.vision_tower import ImageSpec
from mm_moslora.models.vlm import needs_padding, part_of
from mm_moslora.utils.errors import ModelError, MoSLoRAError, reason_of
from mm_moslora.utils.network.hub_access import hub_or_cache

FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Keeps no probabilities, and runs on the meta device."""


def kept_bytes(run: Callable[[], object], weights: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of a computation; each storage counts once, weights do not."""
    own = {parameter.untyped_storage()._cdata for parameter in weights.parameters()}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    del result
    return total


class FusedAttention(TorchFunctionMode):
    """Attention on the meta device with the memory of fused kernels: the plain operator keeps all probabilities."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        width = value.shape[-1]
        filled = nn.functional.pad(value, (0, query.shape[-1] - width))  # latent attention has narrower values
        return FUSED_ATTENTION(query, key, filled, scale=(kwargs or {}).get("scale"))[0][..., :width]


class MetaAndHost(TorchDispatchMode):
    """Moves tensors with values to the meta device when an operator mixes them with meta tensors.

    Whole numbers stay on the host until then, since classes read lengths and places as numbers. Tests of a mask return
    true, as for a picture without padded patches.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = (args, kwargs or {})
        on_meta = {item.is_meta for item in tree_leaves(arguments) if isinstance(item, Tensor)}
        if True in on_meta and func is torch.ops.aten._local_scalar_dense.default:
            return True
        moved = func is torch.ops.aten._to_copy.default and _is_number(args[0])
        if moved or (func.overloadpacket is torch.ops.aten.arange and _counts(*args, **arguments[1])):
            arguments = (args, {**arguments[1], "device": torch.device("cpu")})
        if True in on_meta and func is torch.ops.aten.index.Tensor:
            arguments = ((args[0], [place for item in args[1] for place in _places(item)]), {})
        if len(on_meta) == 2:
            arguments = tree_map(lambda item: item.to("meta") if isinstance(item, Tensor) else item, arguments)
        if func is torch.ops.aten._grouped_mm.default:  # on the meta device for bf16 alone; shapes are the same
            narrow = tree_map(lambda item: item.bfloat16() if _is_float(item) else item, arguments)
            return func(*narrow[0], **narrow[1]).to(args[0].dtype)
        return func(*arguments[0], **arguments[1])


def _is_float(item: object) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()


def _is_number(tensor: Tensor) -> bool:
    """Whether a tensor has whole values that are known: places and lengths, which classes read as numbers."""
    return not tensor.is_meta and not tensor.is_floating_point()


def _counts(*bounds: object, dtype: torch.dtype | None = None, **_: object) -> bool:
    """Whether `arange` with these arguments gives whole numbers."""
    return all(isinstance(bound, int) for bound in bounds) if dtype is None else not dtype.is_floating_point


def _places(index: Tensor | None) -> Sequence[Tensor | None]:
    """An index without a mask, of which the meta device does not know how many places it has."""
    if index is None or index.dtype != torch.bool:
        return (index,)
    known = torch.ones(index.shape, dtype=torch.bool) if index.is_meta else index
    return known.nonzero(as_tuple=True)


@contextmanager
def without_autocast_on_meta() -> Iterator[None]:
    """PEFT switches autocast off for the device of experts, and torch has none on the meta device."""
    own: Any = torch.autocast

    def switch(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else own(device_type, *args, **kwargs)

    with patch.object(torch, "autocast", switch):
        yield


def layer_calls(model: PreTrainedModel) -> list[int]:
    """How often a forward pass of a model runs each of its decoder layers: classes may loop over some of them."""
    decoder, calls = model.get_decoder(), {id(layer): 0 for layer in decoder_layers(model)}

    def count(layer: nn.Module, *_: object) -> None:
        calls[id(layer)] += 1

    handles = [layer.register_forward_pre_hook(count) for layer in decoder_layers(model)]
    trains = decoder.training
    try:
        with torch.no_grad(), MetaAndHost(), FusedAttention():
            decoder.eval()(input_ids=torch.zeros(1, 8, dtype=torch.long, device="meta"), use_cache=False)
    finally:
        decoder.train(trains)
        for handle in handles:
            handle.remove()
    if not any(calls.values()):
        raise ModelError(f"{type(decoder).__name__} runs no layer of its own list, so its work cannot be counted.")
    return [calls[id(layer)] for layer in decoder_layers(model)]


@dataclass(frozen=True, kw_only=True)
class MetaModel:
    """A model on the meta device with a decoder layer or two of each kind, or all where its layers are not alike."""

    model: PreTrainedModel
    times: Sequence[int]
    """How many layers of the whole model each decoder layer at hand stands for."""
    runs: Sequence[int]
    """How often a forward pass of the whole model runs these."""
    fault: Exception | None
    """Why that is not known, and only parameters can be counted."""
    tokens_per_image: int
    image: ImageSpec | None
    """Of an assembled model's tower."""
    seen: ProcessedImage | None
    """A picture of the size asked for, as the model's own processor prepares it; see `size_decides`."""
    unseen: str
    """Why there is none, though the size decides."""
    patches: tuple[int, int] | None
    """Rows and columns of a picture's patches, by the configuration alone, where the tower takes any number."""

    @property
    def layers(self) -> int:
        """Decoder layers of the whole model."""
        return sum(self.times)

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers at hand."""
        return decoder_layers(self.model)

    def each(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Name, parameter, and how often the whole model has one of its size."""
        own = [[id(parameter) for parameter in layer.parameters()] for layer in self.decoder_layers]
        holders = Counter(itertools.chain(*own))  # layers share some parameters of PEFT's methods
        times = {
            number: most for numbers, most in zip(own, self.times, strict=True) for number in numbers
            if holders[number] == 1
        }  # fmt: skip
        for name, parameter in self.model.named_parameters():
            yield name, parameter, times.get(id(parameter), 1)

    def parameters(self) -> dict[str, tuple[int, int]]:
        """Parameters and trainable ones of the whole model by part: language, vision, projector, adapter, mixer."""
        counts: dict[str, tuple[int, int]] = {}
        for name, parameter, times in self.each():
            part = part_of(name)
            if is_adapter_parameter(name):  # a projector inside the tower has the tower's adapters
                kind = "mixer" if "lora_mixer" in name else "adapter"
                part = kind if part == "language" else f"vision {kind}"
            total, trainable = counts.get(part, (0, 0))
            size = times * parameter.numel()
            counts[part] = (total + size, trainable + (size if parameter.requires_grad else 0))
        return counts

    def quantisable(self) -> list[int]:
        """Sizes of the language model's linear weights but the head's, which loading in 4 or 8 bits packs."""
        sizes = {
            id(module): [module.weight.numel()] * times
            for layer, times in zip(self.decoder_layers, self.times, strict=True)
            for module in layer.modules()
            if isinstance(module, nn.Linear) and not module.weight.requires_grad
        }
        return list(itertools.chain.from_iterable(sizes.values()))


def build_meta_model(
    config: ModelConfig,
    adapter: AdapterConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    picture: tuple[int, int] = PICTURE,
) -> MetaModel:
    """Build a recipe's model on the meta device, adapters and what trains included."""
    try:
        return _built(config, adapter, dtype=dtype, picture=picture)
    except (MoSLoRAError, OSError):
        raise
    except Exception as error:  # whatever its classes raise
        raise ModelError(
            f"{config.vlm or config.language} cannot be built without weights ({type(error).__name__}: "
            f"{reason_of(error)[:200]}), so nothing of it can be counted. Look for a field that its config.json lacks, "
            "or run a few steps."
        ) from error


def _built(config: ModelConfig, adapter: AdapterConfig, *, dtype: torch.dtype, picture: tuple[int, int]) -> MetaModel:
    with hub_or_cache(*hub_names(config)):
        parts = load_parts(config, weights="shapes")
        model = parts.model
        calls, fault = _runs(model)
        each = _by_number(config, adapter) or {*calls} != {1} or _share(model)
        times = _keep_kinds(model, every=each)
        with torch.device("meta"):
            cast(nn.Module, model).to(dtype)
            attach_adapters(parts, config, adapter)
        seen, unseen = _seen(config, picture) if size_decides(config) else (None, "")
    if not needs_padding(model):
        set_attention(model, SEGMENTS)
        if config.lean_layers and config.quantisation != "int8":  # layers of int8 run in their stock form
            use_lean_layers(model, depth=sum(times))
    tokens, patches = parts.tokens_per_image, None
    if seen is not None:
        tokens = len(seen.placeholders)
    elif parts.is_pretrained_vlm:
        tokens, patches = _tokens_by_size(model.config, picture)
    return MetaModel(
        model=model.train(), times=times, runs=calls if each else times, fault=fault,
        tokens_per_image=tokens, image=parts.image, seen=seen, unseen=unseen, patches=patches,
    )  # fmt: skip


def _by_number(config: ModelConfig, adapter: AdapterConfig) -> bool:
    """Whether a recipe may name layers by their numbers, so that layers of the same shapes are not alike."""
    patterns = [*adapter.rank_pattern, *adapter.alpha_pattern, *adapter.mixer_pattern]
    named = re.search(r"\d", f"{adapter.targets} {adapter.peft} {patterns}")
    return config.language_mode == "last_n" or adapter.weights is not None or bool(named)


def _runs(model: PreTrainedModel) -> tuple[list[int], Exception | None]:
    """How often a forward pass runs each layer; once each, and what its class raised, where it does not compute."""
    try:
        return layer_calls(model), None
    except Exception as error:
        return [1] * len(decoder_layers(model)), error


def _share(model: PreTrainedModel) -> bool:
    """Whether a decoder layer has a parameter that also stands elsewhere."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return any(places[id(parameter)] > 1 for parameter in decoder_layers(model).parameters())


def _keep_kinds(model: PreTrainedModel, *, every: bool) -> list[int]:
    """Leave the first layer and the last of every kind of shapes, in place; gives how many each one stands for."""
    layers = decoder_layers(model)
    if every:
        return [1] * len(layers)
    kinds = [tuple((name, weight.shape) for name, weight in layer.named_parameters()) for layer in layers]
    last = {kind: at for at, kind in enumerate(kinds)}
    times = {at: kinds.count(kind) for kind, at in last.items()}
    if 0 not in times:
        times |= {0: 1, last[kinds[0]]: times[last[kinds[0]]] - 1}
    kept = sorted(times)
    for at in reversed(range(len(kinds))):
        if at not in times:
            del layers[at]
    config = cast(Any, model.get_decoder()).config
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == len(kinds):  # says something of every layer
            setattr(config, name, type(value)(value[at] for at in kept))
    return [times[at] for at in kept]


def size_decides(config: ModelConfig) -> bool:
    """Whether the size of a picture decides how many tiles, patches and tokens it takes: not of one square each."""
    return config.vlm is not None or (config.vision is not None and config.image_aspect == "anyres")


def _seen(config: ModelConfig, picture: tuple[int, int]) -> tuple[ProcessedImage | None, str]:
    """A picture as the model's own processor prepares it, or the reason why it cannot."""
    try:
        processing = load_parts(config, weights="none").image_processing
    except (ModelError, OSError, ValueError, KeyError) as error:
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0]
    assert processing is not None
    # White, since SmolVLM leaves out tiles that are zero everywhere, which grey may be.
    return processing.process([Image.new("RGB", picture, "white")])[0], ""


def _tokens_by_size(config: Any, picture: tuple[int, int]) -> tuple[int, tuple[int, int] | None]:
    """Of a ready-made model, by its configuration: tokens of a picture, and its patches where their number varies."""
    tokens = getattr(config, "image_seq_length", None)
    if tokens is not None:
        return int(tokens), None
    tower = config.vision_config
    merged = getattr(tower, "spatial_merge_size", 1)
    height, width = (max(1, round(side / side_of(tower, "patch_size") / merged)) for side in reversed(picture))
    return height * width, (height * merged, width * merged)
