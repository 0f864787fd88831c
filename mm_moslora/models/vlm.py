"""The vision-language model: LLaVA of transformers with any projector, and its forward pass on a padding-free batch.

Shapes: ``S`` tokens of the batch, ``K`` supervised positions, ``D`` LLM width, ``N`` images, ``Q`` visual tokens per
image, ``L`` tokens of a tower per image (before any is dropped), ``V`` width of the selected layers together.

With a stock tower and `mlp2x_gelu` the model is a `LlavaForConditionalGeneration`. Other parts make a
`VlmForConditionalGeneration`: the same composition with another projector, registered with the Auto classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

from mm_moslora.batch import Batch, Example
from mm_moslora.models.batching.packed_batch import packed_hidden, packs
from mm_moslora.models.batching.padded_batch import padded_hidden
from mm_moslora.models.families import PROJECTOR, PROJECTOR_ITSELF, TOWER_NAMES
from mm_moslora.models.memory_efficient.decoder_layers import packed_row_hidden
from mm_moslora.models.memory_efficient.loss_head import head_loss_sum
from mm_moslora.models.memory_efficient.row_share import WHOLE_ROW, RowShare
from mm_moslora.models.projectors.projector import build_projector
from mm_moslora.models.projectors.projector_layers import ProjectorShape
from mm_moslora.models.vision.feature_cache import StepFeatureCache
from mm_moslora.utils.errors import ModelError

_Layers = int | list[int]


class VlmConfig(LlavaConfig):
    """LLaVA's configuration with a projector by name and the tower's prefix tokens."""

    model_type = "mm_moslora_vlm"

    projector_kind: str = "mlp2x_gelu"
    """See `mm_moslora.models.projectors.projector.PROJECTORS`."""
    projector_shuffle: int = 2
    """See `ProjectorShape.shuffle`."""
    projector_queries: int = 64
    """See `ProjectorShape.queries`."""
    projector_depth: int = 2
    """See `ProjectorShape.depth`."""
    vision_width: int = 0
    """Width of the selected vision features."""
    vision_grid: int = 0
    """Patches along one side."""
    vision_prefix: int = 0
    """Tokens before the first patch that are dropped."""

    @property
    def projector_shape(self) -> ProjectorShape:
        """The projector's shape."""
        return ProjectorShape(
            vision_width=self.vision_width,
            language_width=self.get_text_config().hidden_size,
            grid=self.vision_grid,
            shuffle=self.projector_shuffle,
            queries=self.projector_queries,
            depth=self.projector_depth,
        )


class VlmModel(LlavaModel):
    """LLaVA without its head, with any projector."""

    config_class = VlmConfig

    def __init__(self, config: VlmConfig) -> None:
        super().__init__(config)
        projector: Any = build_projector(config.projector_kind, config.projector_shape)
        self.multi_modal_projector = projector
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor, vision_feature_layer: int | list[int] | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Encode and project images.

        Returns:
            `pooler_output` is a list of ``N`` tensors ``[Q, D]``.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        states = tower_states(self.vision_tower, layer, pixel_values)
        return BaseModelOutputWithPooling(pooler_output=cast(Any, list(_project(self, states))))


class VlmForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with its head and any projector."""

    config_class = VlmConfig

    def __init__(self, config: VlmConfig) -> None:
        super().__init__(config)
        self.model = VlmModel(config)
        self.post_init()


AutoConfig.register(VlmConfig.model_type, VlmConfig)
AutoModelForImageTextToText.register(VlmConfig, VlmForConditionalGeneration)


def is_multimodal(model: PreTrainedModel) -> bool:
    """Whether the model has a vision tower."""
    return getattr(model.config, "vision_config", None) is not None


def has_own_forward(model: PreTrainedModel) -> bool:
    """Whether the model's forward pass places the pictures: all vision-language models but LLaVA and `VlmModel`.

    Such a model reads prompts as padded rows (`mm_moslora.models.batching.padded_batch`).
    """
    return is_multimodal(model) and not isinstance(model, LlavaForConditionalGeneration)


def needs_padding(model: PreTrainedModel) -> bool:
    """Whether the model cannot train on packed rows and needs padded ones."""
    return has_own_forward(model) and not packs(model)


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to: projector, vision or language."""
    if PROJECTOR.search(name):
        return "projector"
    return "vision" if any(part in name for part in TOWER_NAMES) else "language"


def projectors(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The projectors by path: one module, in Qwen3-VL several after one tower."""
    return {path: module for path, module in model.named_modules() if PROJECTOR_ITSELF.search(path)}


def image_features(
    model: PreTrainedModel, pixel_values: Tensor, *, keys: Sequence[str] = (), cache: StepFeatureCache | None = None
) -> Tensor:
    """Encode and project images, once for all images of a batch.

    Args:
        keys: hashes of the pictures; a frozen tower encodes those with the same key once.

    Returns:
        ``[N, Q, D]``.
    """
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    weight = next(tower.parameters())
    dtype = weight.dtype if weight.is_floating_point() else None
    pixels = pixel_values.to(device=weight.device, dtype=dtype, non_blocking=True)
    if not _is_frozen(tower):
        return _project(model.model, tower_states(tower, layer, pixels))
    states = _unique_states(tower, layer, pixels, keys=keys, cache=cache)
    with torch.no_grad() if _is_frozen(model.model.multi_modal_projector) else contextlib.nullcontext():
        return _project(model.model, states)


def _is_frozen(module: nn.Module) -> bool:
    """Whether nothing in a module trains, adapters included."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def tower_states(tower: PreTrainedModel, layer: _Layers, pixels: Tensor) -> Tensor:
    """Selected hidden states side by side, ``[N, L, V]``.

    Raises:
        ModelError: the installed transformers does not give these layers.
    """
    output: Any = tower(pixels, output_hidden_states=layer, return_dict=True)
    states = [output.hidden_states[item] for item in ([layer] if isinstance(layer, int) else layer)]
    if any(state is None for state in states):
        raise ModelError(
            f"{type(tower).__name__} of transformers {transformers.__version__} does not give the hidden states of "
            f"feature_layer {layer}. Install a release in the range that `mm-moslora doctor` names."
        )
    return states[0] if len(states) == 1 else torch.cat(states, dim=-1)


def _unique_states(
    tower: PreTrainedModel, layer: _Layers, pixels: Tensor, *, keys: Sequence[str], cache: StepFeatureCache | None
) -> Tensor:
    """`tower_states` of a frozen tower without a graph; pictures with the same key are encoded once.

    The tower is in evaluation mode: dropout of a frozen tower is off in training, too.
    """
    if tower.training:
        tower.eval()
    sharded = any(hasattr(parameter, "ds_id") for parameter in tower.parameters())

    def encode(chosen: Tensor) -> Tensor:
        # ZeRO-3 prefetches weights of the layers behind the tower, which train: they must not be inference tensors.
        with torch.no_grad() if sharded else torch.inference_mode():
            return tower_states(tower, layer, chosen)

    return (cache or StepFeatureCache()).states(pixels, keys, encode, together=sharded)


def _project(model: Any, states: Tensor) -> Tensor:
    """Visual tokens ``[N, Q, D]`` of a tower's hidden states, without the tokens before the first patch."""
    config = model.config
    stock = int(config.vision_feature_select_strategy == "default")
    features = states[:, getattr(config, "vision_prefix", stock) :]
    tokens: Tensor = model.multi_modal_projector(features.to(next(model.multi_modal_projector.parameters()).dtype))
    return tokens


def supervised_hidden(
    model: PreTrainedModel,
    batch: Batch,
    *,
    dummy: Batch | None = None,
    cache: StepFeatureCache | None = None,
    share: RowShare = WHOLE_ROW,
) -> Tensor:
    """The hidden states at the supervised positions of a padding-free batch.

    Args:
        dummy: one picture, for a batch without images where other ranks have some: the vision path runs with a weight
            of zero, so that all ranks take part in the same collectives.
        share: the part of the row that this rank computes; only models without a forward pass of their own take one.

    Returns:
        ``[K, D]``.

    Raises:
        ModelError: placeholders and images do not match.
    """
    if has_own_forward(model):
        hidden_of = padded_hidden if needs_padding(model) else packed_hidden
        return hidden_of(model, batch, dummy=dummy)
    inputs = {"position_ids": batch.position_ids[None]}
    if is_multimodal(model):
        inputs["inputs_embeds"] = _embeddings(model, batch, dummy, cache)
    else:
        inputs["input_ids"] = batch.input_ids[None]
    return packed_row_hidden(model, batch, share=share, **inputs)


def _embeddings(model: PreTrainedModel, batch: Batch, dummy: Batch | None, cache: StepFeatureCache | None) -> Tensor:
    """Word embeddings with the visual tokens at their placeholders, ``[1, S, D]``."""
    embeddings: Tensor = model.get_input_embeddings()(batch.input_ids[None])
    if batch.pixel_values is None:
        if dummy is None or dummy.pixel_values is None:
            return embeddings
        tokens = image_features(model, dummy.pixel_values, keys=dummy.image_keys, cache=cache)
        return embeddings + 0.0 * tokens.sum().to(embeddings.dtype)
    features = image_features(model, batch.pixel_values, keys=batch.image_keys, cache=cache)
    # On the host: the number of placeholders is a value, which the host would have to wait for on an accelerator.
    positions = (batch.on_host.input_ids == model.config.image_token_id).nonzero()[:, 0]
    expected = features.shape[0] * features.shape[1]
    if len(positions) != expected:
        raise ModelError(
            f"The batch holds {len(positions)} image placeholders, but its {features.shape[0]} images give {expected} "
            f"visual tokens ({features.shape[1]} each). Records: {', '.join(batch.ids[:4])}."
        )
    positions = positions.to(embeddings.device, non_blocking=True)
    return embeddings[0].index_copy(0, positions, features.flatten(0, 1).to(embeddings.dtype))[None]


class LossModule(nn.Module):
    """The module that an engine wraps: it maps a micro-batch to the sum of its token losses."""

    def __init__(
        self,
        model: PreTrainedModel,
        dummy: Example | None,
        *,
        memory: StepFeatureCache | None = None,
        share: RowShare = WHOLE_ROW,
    ) -> None:
        super().__init__()
        self.model, self.share = model, share
        self.dummy = None if dummy is None else Batch.from_examples([dummy])
        # A text then has no path to what trains, and its loss no gradient.
        self.language_is_frozen = not any(p.requires_grad for p in model.get_decoder().parameters())
        self.pictures = StepFeatureCache() if memory is None else memory
        """Features that a frozen tower has already computed."""

    def forward(self, batch: Batch, needs_vision: bool, right: Tensor | None = None) -> Tensor:
        """Weighted sum of cross entropies over the supervised tokens of the batch, or of this rank's part; fp32 scalar.

        Args:
            needs_vision: some rank has images in this micro-batch, so every rank must run the vision path. It also runs
                where the language model is frozen.
        """
        vision = (needs_vision or self.language_is_frozen) and not batch.images
        dummy = self.dummy.to(batch.input_ids.device) if self.dummy and vision else None
        hidden = supervised_hidden(self.model, batch, dummy=dummy, cache=self.pictures, share=self.share)
        own = slice(None) if self.share.of == 1 else self.share.targets(batch)
        weights = None if batch.weights is None else batch.weights[own]
        return head_loss_sum(self.model, hidden, batch.targets[own], right, weights)
