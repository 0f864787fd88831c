"""The loaded model with everything it can be: one base, and a variant for each adapter, switched without reloading.

Shapes: ``N`` images, ``Q`` visual tokens per image, ``D`` LLM width.

A variant is an adapter with the projector that was trained beside it. Weights of the base are in memory once.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mm_moslora import adapters, distributed
from mm_moslora.batch import Example, Seen
from mm_moslora.data.conversation import Encoder
from mm_moslora.data.records import Turn
from mm_moslora.errors import ConfigError, ModelError
from mm_moslora.folders import MANIFEST, find_checkpoint
from mm_moslora.models.branching import Decoder
from mm_moslora.models.build import Assembly, load_projector
from mm_moslora.models.generation import Prompt, embed_prompt, encode_images, stop_token_ids
from mm_moslora.models.load import load, model_of
from mm_moslora.models.rows import start_row
from mm_moslora.models.vlm import takes_rows

_KEPT_IMAGES = 256
"""Pictures whose visual tokens stay in memory: a conversation shows the same picture at every turn."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model by name."""

    name: str
    adapter: str | None
    """The adapter's name in PEFT; None: no adapter is active."""
    projector: nn.Module | None
    """None for a language model alone and for models that have none of this name."""
    source: str
    """Name of the folder it came from, for `/v1/models`."""


class Models:
    """One base and its variants; used by one thread at a time.

    Args:
        assembly: the base, with or without adapters in it.
        variants: by name, the default first.
    """

    def __init__(self, assembly: Assembly, variants: Mapping[str, Variant]) -> None:
        self.assembly, self.variants = assembly, dict(variants)
        self.encoder = Encoder.of(assembly)
        self.stops = stop_token_ids(assembly.model, assembly.tokenizer.eos_token_id)
        self.reads_alone = takes_rows(assembly.model) or not Decoder(assembly.model).can_share
        """Whether every prompt is run by itself: ready-made models prepare rows of their own."""
        self.joins = Decoder(assembly.model).can_share
        """Whether answers can be decoded together; with a sliding window rows may not be padded."""
        # A processor changes its tokenizer's settings while it works, so one thread at a time may use it.
        self._alone = threading.Lock() if assembly.ready_made else nullcontext()
        self._seen: OrderedDict[tuple[int, bytes], Tensor] = OrderedDict()
        self.image_hits = self.image_misses = 0

    @property
    def default(self) -> str:
        """The variant that was named first."""
        return next(iter(self.variants))

    @property
    def sees(self) -> bool:
        """Whether it can look at pictures."""
        return self.assembly.eyes is not None

    @property
    def context(self) -> int | None:
        """Tokens that the language model was made for."""
        limit = getattr(self.assembly.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def prompt(self, turns: Sequence[Turn], pictures: Sequence[Image.Image]) -> tuple[Tensor, list[Seen]]:
        """A conversation that ends with a question, for the model: ids ``[T]`` and its pictures. From any thread.

        Args:
            turns: the conversation.
            pictures: RGB, in order; none where the model has no eyes.

        Raises:
            ModelError: the model's own processor takes no such picture.
            DataError: the chat template cannot express the conversation.
        """
        with self._alone:
            try:
                seen = self.assembly.eyes.see(pictures) if self.assembly.eyes and pictures else []
            except Exception as error:  # processors raise nearly anything
                raise ModelError("The model's processor cannot take one of the pictures.") from error
            return self.encoder.encode_prompt(turns, pictures=[item.placeholders for item in seen]), seen

    def read(self, name: str, prompts: Sequence[tuple[Tensor, Sequence[Seen]]]) -> Decoder:
        """Run prompts, one only where `reads_alone`; the decoder stands at their ends. The variant must be active.

        Args:
            name: a variant.
            prompts: from `prompt`.
        """
        model = self.assembly.model
        if takes_rows(model):
            ((ids, seen),) = prompts
            nothing = torch.zeros(len(ids), dtype=torch.bool)
            return start_row(model, Example.of(id="", input_ids=ids, supervised=nothing, seen=seen))
        decoder = Decoder(model)
        made = [Prompt(input_ids=ids, features=self.image_tokens(name, seen)) for ids, seen in prompts]
        decoder.append([embed_prompt(model, prompt) for prompt in made])
        return decoder

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Make one variant the active one."""
        variant, peft_model = self.variants[name], self.assembly.peft_model
        if variant.projector is not None:
            self.assembly.model.model.multi_modal_projector = variant.projector
        if peft_model is None:
            yield
        elif variant.adapter is None:
            with peft_model.disable_adapter():
                yield
        else:
            if peft_model.active_adapter != variant.adapter:
                peft_model.set_adapter(variant.adapter, inference_mode=True)
            yield

    def image_tokens(self, name: str, seen: Sequence[Seen]) -> Tensor | None:
        """Visual tokens of pictures, ``[N * Q, D]``; the variant must be the active one. None without pictures."""
        if not seen:
            return None
        pixels = [item.tensors["pixel_values"][0] for item in seen]
        projector = id(self.variants[name].projector)
        keys = [(projector, hashlib.sha256(item.numpy().tobytes()).digest()) for item in pixels]
        fresh = {key: item for key, item in zip(keys, pixels, strict=True) if key not in self._seen}
        self.image_misses += len(fresh)
        self.image_hits += len(keys) - len(fresh)
        if fresh:
            made = encode_images(self.assembly.model, torch.stack(list(fresh.values())))
            self._seen.update(zip(fresh, made, strict=True))
        for key in keys:
            self._seen.move_to_end(key)
        result = torch.cat([self._seen[key] for key in keys])
        while len(self._seen) > _KEPT_IMAGES:
            self._seen.popitem(last=False)
        return result


def load_models(
    path: Path,
    *,
    name: str | None = None,
    further: Mapping[str, Path] | None = None,
    with_base: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Models:
    """Load a run, a checkpoint or an export, and further adapters for the same base.

    Args:
        path: the main model; alone, its adapter is merged, which is faster.
        name: what clients call it; None: the folder's name.
        further: runs, checkpoints or adapter folders by the name that clients use.
        with_base: also offer the model before tuning, as `NAME-base`.
        dtype: dtype of the base.

    Raises:
        ConfigError: two models of one name.
        ModelError, AdapterError: a folder cannot be loaded, or belongs to another base.
    """
    main = name or path.resolve().name
    further = dict(further or {})
    names = [main, *further, *([f"{main}-base"] if with_base else [])]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two models have the same name: {', '.join(names)}. Give each adapter a name of its own.")
    alone = len(names) == 1
    assembly = load(path, merge=alone, dtype=dtype)
    own = _projector(assembly)
    active = None if assembly.peft_model is None else str(assembly.peft_model.active_adapter)
    variants = {main: Variant(name=main, adapter=active, projector=own, source=path.name)}
    for number, (other, folder) in enumerate(further.items()):
        variants[other] = _add(assembly, other, folder, f"served{number}")
    if with_base:
        variants[f"{main}-base"] = Variant(
            name=f"{main}-base", adapter=None, projector=_untuned_projector(path, own), source=path.name
        )
    assembly.model.requires_grad_(False).eval()
    device = distributed.device()
    for part in (assembly.model, *(variant.projector for variant in variants.values())):
        if part is not None:
            part.to(device)  # type: ignore[arg-type]
    return Models(assembly, variants)


def _add(assembly: Assembly, name: str, path: Path, adapter: str) -> Variant:
    """Put one more adapter, and the projector beside it, into the base."""
    projector = _projector(assembly)
    if not (path / "adapter_config.json").is_file():
        checkpoint = find_checkpoint(path)
        own_parts = ("vision", "language", *(("projector",) if assembly.ready_made else ()))
        for component in own_parts:
            if (checkpoint / f"{component}.safetensors").is_file():
                raise ModelError(
                    f"{path} trained its {component} weights, so it is no adapter of the model that is served. "
                    "Serve it on its own."
                )
        if not (checkpoint / "adapter").is_dir():
            raise ModelError(f"{path} holds no adapter. Give a run with an adapter, or an adapter folder.")
        projector = _read_projector(projector, checkpoint / "projector.safetensors")
        path = checkpoint / "adapter"
    model: Any = assembly.model if assembly.peft_model is None else assembly.peft_model
    assembly.peft_model = adapters.load_adapter(model, path, adapter_name=adapter)
    return Variant(name=name, adapter=adapter, projector=projector, source=path.name)


def _projector(assembly: Assembly) -> nn.Module | None:
    return getattr(getattr(assembly.model, "model", None), "multi_modal_projector", None)


def _untuned_projector(path: Path, own: nn.Module | None) -> nn.Module | None:
    """The projector that tuning started from, where its file is still there; else the tuned one."""
    checkpoint = find_checkpoint(path)
    if own is None or not (checkpoint / MANIFEST).is_file():
        return own
    weights = model_of(checkpoint).projector.weights
    return own if weights is None else _read_projector(own, Path(weights))


def _read_projector(like: nn.Module | None, file: Path) -> nn.Module | None:
    if like is None or not file.is_file():
        return like
    made = copy.deepcopy(like)
    load_projector(made, file)
    return made.requires_grad_(False).eval()
