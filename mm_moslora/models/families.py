"""The model families: what is known of towers, decoders and ready-made models by their name in transformers.

A family is one entry of `TOWERS`, `DECODERS` or `VLMS`, keyed by `model_type`. A model without an entry works, too, on
the defaults. What a model shows by itself is asked of it and not kept here: its image token, positions of three parts,
deepstack layers. Projections that read one input are in `adapters.layers.fused_linear`, llama.cpp's names of language
models in `export.gguf_model.FAMILIES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mm_moslora.config import BoxFormName


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation of pixels per channel, after scaling to 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Statistics(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP = Statistics(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
_HALF = Statistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class TowerFamily:
    """Vision towers of one `model_type`."""

    statistics: Statistics = IMAGENET
    """Of pictures, where the checkpoint has no preprocessor file."""
    whole: str | None = None
    """`model_type` of the contrastive model that the tower is the vision half of."""
    vision_half: str | None = None
    """Class of that half."""
    any_size: bool = False
    """Whether position embeddings are interpolated to the size of the picture without being asked."""
    patches_vary: bool = False
    """Whether the number of patches depends on the picture, which an assembled model does not take."""
    nested_names: bool = False
    """Whether published LLaVA checkpoints keep one more level (`vision_model`) in the names of its tensors."""


TOWERS = {
    "clip_vision_model": TowerFamily(
        statistics=CLIP, whole="clip", vision_half="CLIPVisionModel", nested_names=True
    ),
    "siglip_vision_model": TowerFamily(
        statistics=_HALF, whole="siglip", vision_half="SiglipVisionModel", nested_names=True
    ),
    "siglip2_vision_model": TowerFamily(whole="siglip2", patches_vary=True),
    "vit": TowerFamily(statistics=_HALF),
    "dinov2": TowerFamily(any_size=True),
    "dinov2_with_registers": TowerFamily(any_size=True),
    "dinov3_vit": TowerFamily(any_size=True),
    "dinov3_convnext": TowerFamily(any_size=True),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """Language models of one `model_type`."""

    lean_layer: str | None = None
    """Class of its decoder layers, where `use_lean_layers` knows them: pre-norm layers with RMS norms, a gated MLP and
    rotary embedding in halves."""
    plain_attention: bool = False
    """Whether attention is ordinary softmax attention, so that rows share the keys and values of a prefix."""
    llava_types: tuple[str, ...] = ()
    """`model_type`s in the original LLaVA code."""


DECODERS = {
    "llama": DecoderFamily(
        lean_layer="LlamaDecoderLayer", plain_attention=True, llava_types=("llava_llama", "llava"),
    ),
    "mistral": DecoderFamily(
        lean_layer="MistralDecoderLayer", plain_attention=True, llava_types=("llava_mistral",),
    ),
    "qwen2": DecoderFamily(
        lean_layer="Qwen2DecoderLayer", plain_attention=True, llava_types=("llava_qwen", "llava_qwen2"),
    ),
    "qwen3": DecoderFamily(lean_layer="Qwen3DecoderLayer", plain_attention=True),
    "qwen2_vl_text": DecoderFamily(lean_layer="Qwen2VLDecoderLayer"),
    "qwen2_5_vl_text": DecoderFamily(lean_layer="Qwen2_5_VLDecoderLayer"),
    "qwen3_vl_text": DecoderFamily(lean_layer="Qwen3VLTextDecoderLayer"),
    "phi": DecoderFamily(plain_attention=True),
    "phi3": DecoderFamily(plain_attention=True, llava_types=("llava_phi",)),
    "gemma": DecoderFamily(plain_attention=True, llava_types=("llava_gemma",)),
    "smollm3": DecoderFamily(plain_attention=True),
    "olmo2": DecoderFamily(plain_attention=True),
    "stablelm": DecoderFamily(plain_attention=True),
}  # fmt: skip

LEAN_LAYERS = {family.lean_layer: name for name, family in DECODERS.items() if family.lean_layer is not None}
"""Classes of decoder layers with a lean form and their families; other families' models may be made of them, too."""


@dataclass(frozen=True, kw_only=True)
class VlmFamily:
    """Ready-made vision-language models of one `model_type`."""

    tower: str = "model.vision_tower"
    """Path of the vision tower."""
    projectors: tuple[str, ...] = ("multi_modal_projector",)
    """Last parts of the paths of what makes visual tokens of features, as regular expressions; none: the tower."""
    processor: str = ""
    """Class of the processor, where it has a peculiarity named below."""
    boxes: BoxFormName | None = None
    """Form of boxes that its models were trained on, where their vocabulary does not show it."""
    packed: bool = False
    """Whether it trains on packed rows: attention is causal throughout, and `tests/models` tries it."""
    one_image_list: bool = False
    """Whether image tensors are ``[samples, pictures, ...]`` and are read in order."""
    untiled_when_several: bool = False
    """Whether the processor does not tile pictures that come together."""
    adds_text: bool = False
    """Whether the processor puts tokens behind a picture that belong to the question: BOS and a line break."""
    prefix: bool = False
    """Whether all before the first answer sees each other; types of tokens then mark the answer and not pictures."""
    host_inputs: tuple[str, ...] = ()
    """Image inputs that are read as numbers alone: they stay in main memory."""
    read_inputs: tuple[str, ...] = ()
    """Image inputs that the host reads, too: they are copied to the device later, so that a read does not wait."""


_IDEFICS: dict[str, Any] = {"tower": "model.vision_model", "projectors": ("connector",), "one_image_list": True}
_QWEN: dict[str, Any] = {
    "tower": "model.visual", "projectors": ("merger",), "packed": True,
    "read_inputs": ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"),
}  # fmt: skip

VLMS = {
    "llava": VlmFamily(),
    "llava_next": VlmFamily(packed=True, host_inputs=("image_sizes",)),
    "llava_onevision": VlmFamily(
        packed=True, processor="LlavaOnevisionProcessor", untiled_when_several=True,
        host_inputs=("image_sizes", "batch_num_images"),
    ),
    "idefics2": VlmFamily(**_IDEFICS, processor="Idefics2Processor"),
    "idefics3": VlmFamily(**_IDEFICS, processor="Idefics3Processor", packed=True),
    "smolvlm": VlmFamily(**_IDEFICS, processor="SmolVLMProcessor", packed=True),
    "internvl": VlmFamily(packed=True),
    "qwen2_vl": VlmFamily(**_QWEN, processor="Qwen2VLProcessor", boxes="qwen2_vl"),
    "qwen2_5_vl": VlmFamily(**_QWEN, processor="Qwen2_5_VLProcessor", boxes="qwen2_5_vl"),
    "qwen3_vl": VlmFamily(
        **_QWEN | {"projectors": ("merger", r"deepstack_merger_list\.\d+")}, processor="Qwen3VLProcessor",
        boxes="qwen3_vl",
    ),
    "paligemma": VlmFamily(processor="PaliGemmaProcessor", adds_text=True, prefix=True),
    "fuyu": VlmFamily(tower="model.vision_embed_tokens", projectors=()),
}  # fmt: skip

TOWER_PATHS = tuple(dict.fromkeys(family.tower for family in VLMS.values()))
"""Where any ready-made model may have its vision tower, in the order in which they are looked for."""
TOWER_NAMES = tuple(f"{path.rpartition('.')[2]}." for path in TOWER_PATHS)
"""What the names of a tower's modules and parameters hold."""
_PROJECTORS = "|".join(dict.fromkeys(name for family in VLMS.values() for name in family.projectors))
PROJECTOR_ITSELF = re.compile(rf"(^|\.)({_PROJECTORS})$")
"""Finds projectors by their paths."""
PROJECTOR = re.compile(rf"(^|\.)({_PROJECTORS}|image_newline)(\.|$)")
"""Finds what belongs to a projector, the newline embedding behind rows of patches included."""
HOST_INPUTS = frozenset().union(*(family.host_inputs for family in VLMS.values()))
"""Image inputs that models read as numbers and do nothing else with: they stay in main memory."""
READ_INPUTS = HOST_INPUTS.union(*(family.read_inputs for family in VLMS.values()))
"""Image inputs that the host reads: from main memory, so that it does not wait for the device."""


_BOX_TOKENS: dict[str, BoxFormName] = {"<loc0000>": "paligemma", "<box>": "internvl"}
"""Tokens of a ready-made model's vocabulary that show its form of boxes."""


def tower_family(model_type: str) -> TowerFamily:
    """The family of a tower, or of the contrastive model around it; the defaults for others."""
    by_whole = {family.whole: family for family in TOWERS.values() if family.whole is not None}
    return TOWERS.get(model_type) or by_whole.get(model_type, TowerFamily())


def decoder_family(model_type: str) -> DecoderFamily:
    """The family of a language model; the defaults for others."""
    return DECODERS.get(model_type, DecoderFamily())


def vlm_family(model_type: str) -> VlmFamily:
    """The family of a ready-made model; the defaults for others."""
    return VLMS.get(model_type, VlmFamily())


def processor_family(processor: Any) -> VlmFamily:
    """The family that a processor belongs to, where that has a peculiarity; the defaults for others."""
    kind = type(processor).__name__
    return next((family for family in VLMS.values() if family.processor == kind), VlmFamily())


def box_form_of(processor: Any) -> BoxFormName | None:
    """The form in which a ready-made model knows boxes; None: neither its family nor its vocabulary says it."""
    vocabulary = processor.tokenizer.get_vocab()
    shown = next((form for token, form in _BOX_TOKENS.items() if token in vocabulary), None)
    return processor_family(processor).boxes or shown
