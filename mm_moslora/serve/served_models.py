"""The served models: one base and a variant for each adapter, switched without reloading.

Shapes: ``N`` images, ``Q`` visual tokens per image, ``D`` LLM width.

A variant is an adapter with the projector that was trained with it. The weights of the base are in memory once.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mm_moslora import adapters
from mm_moslora.batch import ProcessedImage
from mm_moslora.config import ModelConfig
from mm_moslora.config.recipe_keys import ANY_ADAPTER
from mm_moslora.data.boxes.box_forms import FoundBox, read_boxes
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.data.preprocessing_print import check_preprocessing, preprocessing_digest
from mm_moslora.models.assembly import Parts, load_parts, load_projector
from mm_moslora.models.decoding.generation import Prompt, embed_prompt, encode_images, prefill_row, stop_token_ids
from mm_moslora.models.decoding.prefix_cache import Decoder
from mm_moslora.models.load_model import load, model_of, recipe_of
from mm_moslora.models.model_paths import stored_fingerprints
from mm_moslora.models.processing.anyres import newline_of
from mm_moslora.models.processing.llava_processor import plain_template
from mm_moslora.models.vision.feature_cache import FeatureCache
from mm_moslora.models.vision.feature_store import tensor_hash
from mm_moslora.models.vlm import has_own_forward
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, ModelError
from mm_moslora.utils.identity import difference
from mm_moslora.utils.run_paths import ADAPTER_CONFIG, MANIFEST, find_checkpoint, projector_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model that clients can name."""

    adapter: str | None
    """The adapter's name in PEFT; None: no adapter is active."""
    projector: nn.Module | None
    """None for a text-only model and for models without a projector of this name."""
    newline: nn.Parameter | None = None
    """The newline embedding of an anyres model, which is trained with the projector."""
    source: str
    """Name of its folder, for `/v1/models`."""


class Models:
    """One base and its variants (the default first); used by one thread at a time."""

    def __init__(self, assembly: Parts, variants: Mapping[str, Variant], *, preprocessing: str = "") -> None:
        self.assembly, self.variants = assembly, dict(variants)
        self.preprocessing = preprocessing
        """See `preprocessing_digest`; empty: unknown, or accepted although it differs from the training's."""
        self.encoder = ConversationEncoder.of(assembly)
        self.stops = stop_token_ids(assembly.model, assembly.tokenizer.eos_token_id)
        self.reads_alone = has_own_forward(assembly.model) or not Decoder(assembly.model).can_share
        """Whether every prompt is run by itself: ready-made models prepare each row themselves."""
        self.joins = Decoder(assembly.model).can_share
        """Whether answers can be decoded in one batch; models with a sliding window do not support padded rows."""
        # A processor changes its tokenizer's settings during a call, so one thread at a time may use it.
        self._alone = threading.Lock() if assembly.is_pretrained_vlm else nullcontext()
        self._vision_keys = {name: _vision_key(assembly, variant) for name, variant in self.variants.items()}
        self.features = FeatureCache()
        """Cache of visual tokens: a conversation sends the same picture at every turn."""

    @property
    def default(self) -> str:
        """The first variant."""
        return next(iter(self.variants))

    @property
    def takes_pictures(self) -> bool:
        """Whether the model has a vision encoder."""
        return self.assembly.image_processing is not None

    @property
    def context(self) -> int | None:
        """Context length of the language model, tokens."""
        limit = getattr(self.assembly.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    @property
    def pads_to_squares(self) -> bool:
        """Whether the image processor pads a picture to a square before it scales it down."""
        processing = self.assembly.image_processing
        pads = getattr(getattr(self.assembly.processor, "image_processor", None), "do_pad", False)
        return processing is not None and processing.fixed and bool(pads)

    def visual_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Visual tokens of pictures of these widths and heights, with the placeholders around them. Thread-safe."""
        if self.assembly.image_processing is None or not sizes or any(0 in size for size in sizes):
            return 0
        with self._alone:
            return sum(len(ids) for ids in self.assembly.image_processing.placeholders(sizes))

    def prompt(
        self, turns: Sequence[Turn], pictures: Sequence[Image.Image], *, thinking: bool | None = None
    ) -> tuple[Tensor, list[ProcessedImage]]:
        """Model inputs of a conversation that ends with a question: ids ``[T]`` and its pictures. Thread-safe."""
        with self._alone:
            processing = self.assembly.image_processing
            try:
                images = processing.process(pictures) if processing and pictures else []
            except Exception as error:  # processors raise nearly anything
                raise ModelError("The model's processor cannot take one of the pictures.") from error
            placeholders = [item.placeholders for item in images]
            return self.encoder.encode_prompt(turns, pictures=placeholders, thinking=thinking), images

    def boxes(self, answer: str, size: tuple[int, int]) -> list[FoundBox]:
        """The boxes in an answer about a picture of this size, see `read_boxes`; none where they cannot be placed."""
        with self._alone, suppress(ModelError):
            return read_boxes(answer, self.assembly.image_processing, size)
        return []

    def read(self, name: str, prompts: Sequence[tuple[Tensor, Sequence[ProcessedImage]]]) -> Decoder:
        """Run prompts for the active variant, one at a time under `reads_alone`; returns the decoder after them."""
        model = self.assembly.model
        if has_own_forward(model):
            ((ids, images),) = prompts
            return prefill_row(model, ids, images)
        decoder = Decoder(model)
        with_features = [Prompt(input_ids=ids, features=self.image_tokens(name, images)) for ids, images in prompts]
        decoder.append([embed_prompt(model, prompt) for prompt in with_features])
        return decoder

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Activate a variant."""
        variant, peft_model = self.variants[name], self.assembly.peft_model
        if variant.projector is not None:
            self.assembly.model.model.multi_modal_projector = variant.projector
        if variant.newline is not None:
            self.assembly.model.model.image_newline = variant.newline
        if peft_model is None:
            yield
        elif variant.adapter is None:
            with peft_model.disable_adapter():
                yield
        else:
            if peft_model.active_adapter != variant.adapter:
                peft_model.set_adapter(variant.adapter, inference_mode=True)
            yield

    def image_tokens(self, name: str, images: Sequence[ProcessedImage]) -> Tensor | None:
        """Visual tokens of pictures, ``[N * Q, D]``; None without pictures. The variant must be active."""
        if not images:
            return None
        pixels = [item.tensors["pixel_values"][0] for item in images]
        keys = [f"{self._vision_keys[name]} {tensor_hash(item)}" for item in pixels]

        def encode(numbers: Sequence[int]) -> Sequence[Tensor]:
            if not numbers:
                return []
            encoded = encode_images(self.assembly.model, torch.stack([pixels[number] for number in numbers]))
            return [row.clone() for row in encoded]  # a row without its own storage would keep the others in memory

        return torch.cat(self.features.get_many(keys, encode))


def _vision_key(assembly: Parts, variant: Variant) -> str:
    """A key for what decides visual tokens besides the base: the projector, and an adapter before the LLM."""
    inner = getattr(assembly.model, "model", None)
    parts = [getattr(inner, name, None) for name in ("vision_tower", "multi_modal_projector")]
    # PEFT keeps the parameters of an adapter, of any type, in containers under the adapter's name.
    reached = any(
        variant.adapter in name.split(".")
        for part in parts
        if part is not None
        for name, _ in (*part.named_parameters(), *part.named_buffers())
    )
    return f"{variant.adapter if reached else ''} {id(variant.projector)}"


def load_models(
    path: Path,
    *,
    name: str | None = None,
    further: Mapping[str, Path] | None = None,
    with_base: bool = False,
    dtype: torch.dtype = torch.float32,
    other_preprocessing: bool = False,
) -> Models:
    """Load a run, a checkpoint or an export, and `further` adapters of its base by their names for clients."""
    main = name or path.resolve().name
    further = dict(further or {})
    names = [main, *further, *([f"{main}-base"] if with_base else [])]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two models have the same name: {', '.join(names)}. Give each adapter a unique name.")
    if with_base and (why := why_no_base(path)):
        raise ModelError(f"The model before tuning cannot be served: {why}. Leave out --with-base.")
    alone = len(names) == 1
    assembly = load(path, merge=alone, dtype=dtype)
    differs = check_preprocessing(path, assembly, accepted=other_preprocessing)
    own, newline = _projector(assembly)
    active = None if assembly.peft_model is None else str(assembly.peft_model.active_adapter)
    variants = {main: Variant(adapter=active, projector=own, newline=newline, source=path.name)}
    for number, (other, folder) in enumerate(further.items()):
        variants[other] = _add(assembly, other, folder, adapter=f"served{number}", main=path)
    if with_base:
        projector, newline = _untuned_projector(assembly, path)
        variants[f"{main}-base"] = Variant(adapter=None, projector=projector, newline=newline, source=path.name)
    assembly.model.requires_grad_(False).eval()
    device = distributed.device()
    for part in (assembly.model, *(part for item in variants.values() for part in (item.projector, item.newline))):
        if isinstance(part, nn.Parameter):
            part.data = part.data.to(device)
        elif part is not None:
            part.to(device)  # type: ignore[arg-type]
    return Models(assembly, variants, preprocessing="" if differs else preprocessing_digest(path))


def why_no_base(path: Path) -> str | None:
    """Why the model before tuning is not available beside a tuned one; None where it is."""
    checkpoint = find_checkpoint(path)
    if not (checkpoint / MANIFEST).is_file():
        return f"{path} is not a run, so its base is unknown"
    if trained := _trained_weights(checkpoint):
        return f"{path} trained its {trained} weights, and memory holds the base only once"
    if not (checkpoint / "adapter").is_dir() and _first_projector(checkpoint) is None:
        return f"{path} trained its projector alone, and no file holds the projector before tuning"
    return None


def _trained_weights(checkpoint: Path) -> str | None:
    """A component with trained weights of its own; such a checkpoint is not an adapter of its base."""
    is_pretrained_vlm = recipe_of(checkpoint).model.vlm is not None
    parts = ("vision", "language", *(("projector",) if is_pretrained_vlm else ()))
    return next((part for part in parts if (checkpoint / f"{part}.safetensors").is_file()), None)


def _add(assembly: Parts, name: str, path: Path, *, adapter: str, main: Path) -> Variant:
    """Load one more adapter, with its projector, into the base."""
    projector, newline = _projector(assembly)
    checkpoint = find_checkpoint(path)
    # Also where the `adapter/` of a run is given: it was trained with the projector of the run.
    of_run = (checkpoint / MANIFEST).is_file()
    if of_run and (trained := _trained_weights(checkpoint)):
        raise ModelError(
            f"{path} trained its {trained} weights, so it is not an adapter of the served model. Serve it on its own."
        )
    folder = checkpoint / "adapter" if of_run else path
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{path} holds no adapter. Give a run with an adapter, or an adapter folder.")
    if of_run:
        refuse_other_settings(assembly, main, checkpoint)
        projector, newline = _read_projector(assembly, checkpoint / "projector.safetensors")
    elif projector is not None and not assembly.is_pretrained_vlm:
        logger.warning(
            "%s is not part of a run, so %s gets the projector of %s and its image settings.", path, name, main
        )
    model: Any = assembly.model if assembly.peft_model is None else assembly.peft_model
    assembly.peft_model = adapters.load_adapter(model, folder, adapter_name=adapter)
    return Variant(adapter=adapter, projector=projector, newline=newline, source=path.name)


def _projector(assembly: Parts) -> tuple[nn.Module | None, nn.Parameter | None]:
    """The projector and the newline embedding that is trained with it."""
    has_newline = not assembly.is_pretrained_vlm and assembly.image_processing
    projector = getattr(getattr(assembly.model, "model", None), "multi_modal_projector", None)
    return projector, newline_of(assembly.model) if has_newline else None


def _untuned_projector(assembly: Parts, path: Path) -> tuple[nn.Module | None, nn.Parameter | None]:
    """The projector that tuning started from, where its file exists; else the tuned one, with a warning."""
    file = _first_projector(find_checkpoint(path))
    if file is None and _projector(assembly)[0] is not None and not assembly.is_pretrained_vlm:
        logger.warning(
            "The projector that %s started from (model.projector.weights) is missing, so the model before tuning "
            "gets the tuned one.", path,
        )  # fmt: skip
    return _read_projector(assembly, file)


def _first_projector(checkpoint: Path) -> Path | None:
    """The file of the projector that a run started from, as the recipe names it; None where it is missing."""
    weights = model_of(checkpoint).projector.weights
    file = projector_file(weights) if weights else None
    return file if file is not None and file.is_file() else None


def _read_projector(assembly: Parts, file: Path | None) -> tuple[nn.Module | None, nn.Parameter | None]:
    """Copies of the projector and the newline embedding with the values of a file; the originals without a file."""
    own, newline = _projector(assembly)
    if own is None or assembly.is_pretrained_vlm or file is None or not file.is_file():
        return own, newline
    projector, newline = copy.deepcopy(own), copy.deepcopy(newline)
    load_projector(projector, file, newline=newline)
    return projector.requires_grad_(False).eval(), newline


_REVISIONS = {
    "model.language": "model.language_revision", "model.vlm": "model.vlm_revision",
    "model.vision.name": "model.vision.revision",
}  # fmt: skip


def refuse_other_settings(assembly: Parts, main: Path, checkpoint: Path) -> None:
    """Refuse an adapter that was trained with other prompts, pictures or base weights."""
    served = find_checkpoint(main)
    if (served / MANIFEST).is_file():
        differing = _differing_keys(served, checkpoint)
    else:
        differing = _differing_parts(assembly, model_of(checkpoint))
    if differing:
        raise ModelError(
            f"{checkpoint} cannot be an adapter of {main}: {'; '.join(differing)}. Its adapter was trained with other "
            "prompts, pictures or weights, and its answers would be worse. Serve it on its own."
        )


def _differing_keys(served: Path, added: Path) -> list[str]:
    """Recipe keys with different values in two checkpoints."""
    a, b = (
        {key: repr(value) for key, value in values.items() if key.startswith("model.")}
        for values in (recipe_of(folder).values(without=ANY_ADAPTER) for folder in (served, added))
    )
    hash_a, hash_b = stored_fingerprints(served), stored_fingerprints(added)
    for key in hash_a.keys() & hash_b.keys() & a.keys() & b.keys():
        # Models are compared by content; their paths may differ.
        if hash_a[key] == hash_b[key]:
            b |= {same: a[same] for same in (key, _REVISIONS.get(key, key)) if same in a}
        else:
            _, first, second = difference(hash_a[key], hash_b[key])
            a[key], b[key] = f"{a[key]} ({first})", f"{b[key]} ({second})"
    keys = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    return [f"{key} is {a.get(key, 'unset')} in the served model, {b.get(key, 'unset')} here" for key in keys]


def _differing_parts(assembly: Parts, added: ModelConfig) -> list[str]:
    """Differences between an export, which has no recipe, and a run, found by comparing the loaded parts."""
    parts = load_parts(added, weights="none")
    config = assembly.model.config
    template = assembly.processor.chat_template if assembly.is_pretrained_vlm else assembly.tokenizer.chat_template
    other = parts.tokenizer if parts.template_processor is None else parts.template_processor
    vision = added.vision if added.vlm is None else None
    pairs: dict[str, tuple[Any, Any]] = {
        "the chat template or system prompt": (plain_template(template), plain_template(other.chat_template)),
        "the number of visual tokens": (assembly.tokens_per_image, parts.tokens_per_image),
        **_image_settings(
            getattr(assembly.processor, "image_processor", None), getattr(parts.processor, "image_processor", None)
        ),
    }
    if vision is not None:
        pairs["model.vision.feature_layer"] = (getattr(config, "vision_feature_layer", None), vision.feature_layer)
    return [
        f"{name} differs" if isinstance(a, str) else f"{name} is {a} in the served model, {b} here"
        for name, (a, b) in pairs.items()
        if a != b
    ]


def _image_settings(served: Any, added: Any) -> dict[str, tuple[Any, Any]]:
    """Settings of two image processors by name; only settings that both have are compared."""
    if served is None or added is None:
        return {"the vision encoder": (served is not None, added is not None)}
    a, b = served.to_dict(), added.to_dict()
    names = sorted((a.keys() & b.keys()) - {"image_processor_type", "processor_class", "_processor_class"})
    return {f"{name} of pictures": (_plain(a[name]), _plain(b[name])) for name in names}


def _plain(value: Any) -> Any:
    """A setting in a comparable form: sizes without unset sides, lists for tuples."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {key: item for key, item in dict(value).items() if item is not None}
    return list(value) if isinstance(value, list | tuple) else value
