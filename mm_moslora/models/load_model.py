"""Loading for use: a run, one of its checkpoints, an export or an adapter folder, told apart by what is in it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)

from mm_moslora import adapters
from mm_moslora.adapters.folder_format import read_json
from mm_moslora.config import BoxChoice, BoxFormName, ModelConfig, Recipe, Thinking
from mm_moslora.config.llava_chat_templates import notes_thinking
from mm_moslora.models.assembly import Parts, load_parts, load_projector, pretrained_parts
from mm_moslora.models.model_paths import resolve_model_paths
from mm_moslora.models.model_sizes import is_packed, load_base, make_dense, refuse_configuration
from mm_moslora.models.pretrained_vlm import load_pretrained_processor
from mm_moslora.models.processing.anyres import newline_of
from mm_moslora.models.processing.llava_processor import takes_plain_contents
from mm_moslora.models.vision.timm_open_clip_tower import cast_parameters
from mm_moslora.models.vision.vision_tower import ImageSpec
from mm_moslora.models.vlm import is_multimodal
from mm_moslora.utils.errors import AdapterError, ModelError, MoSLoRAError, reason_of
from mm_moslora.utils.identity import check_stored
from mm_moslora.utils.network.hub_access import hub_or_cache
from mm_moslora.utils.run_paths import ADAPTER_CONFIG, BASE, MANIFEST, PREPROCESSING, find_checkpoint
from mm_moslora.utils.untrusted_files import read_text, read_text_below

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    merge: bool = True,
    dtype: torch.dtype = torch.float32,
    base: str | Path | None = None,
    packed: Literal["keep", "dense", "reload"] = "keep",
) -> Parts:
    """Load a model for inference.

    Args:
        path: a run, one of its checkpoints, an exported folder, or an adapter folder of any trainer.
        merge: fold adapters into the base weights (faster); False leaves them live in `Parts.peft_model`. Those on
            packed weights stay live, as a merge would round them anew.
        base: for an adapter folder, the model it belongs to; None takes the one that it names.
        packed: for a run on a base of 4 or 8 bits. `keep`: as it trained; `dense`: with the same values in `dtype`, or
            in float32 where adapters are merged; `reload`: the base's own weights, which were not rounded.

    Raises:
        ModelError: nothing loadable there, or its parts do not fit together.
        AdapterError: the adapter is damaged or belongs to another base.
        CheckpointError: a file of the checkpoint is not the one that its manifest names.
    """
    folder = find_checkpoint(Path(path))
    is_checkpoint, is_adapter = (folder / MANIFEST).is_file(), (folder / ADAPTER_CONFIG).is_file()
    if base is not None and (is_checkpoint or not is_adapter):
        raise ModelError(f"{folder} is no adapter of another trainer; it knows its base. Leave out base.")
    if is_checkpoint:
        return _load_checkpoint(folder, merge=merge, dtype=dtype, packed=packed)
    if is_adapter:
        return _load_adapter(folder, base, merge=merge, dtype=dtype)
    return _load_exported(folder, dtype=dtype)


def load_unweighted(path: str | Path) -> Parts:
    """All that turns conversations into a model's inputs, without its weights.

    Raises:
        ModelError: nothing loadable there.
    """
    folder = find_checkpoint(Path(path))
    if (folder / MANIFEST).is_file():
        return load_parts(model_of(folder), weights="none")
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{folder} is an adapter folder, which holds no tokenizer. Give a run or an export.")
    return _load_exported(folder, dtype=torch.float32, weights=False)


def recipe_of(folder: Path) -> Recipe:
    """The resolved recipe of a checkpoint."""
    file = folder / "config.yaml"
    text = read_text_below(folder, file.name)
    if text is None:
        raise ModelError(f"{folder} lacks {file.name}, the recipe of the checkpoint. Copy the folder again.")
    return Recipe.from_yaml(text, source=str(file))


def model_of(folder: Path) -> ModelConfig:
    """The recipe's `model` of a checkpoint, its relative paths as they are found from here."""
    return resolve_model_paths(recipe_of(folder).model, folder)


def _load_checkpoint(folder: Path, *, merge: bool, dtype: torch.dtype, packed: str) -> Parts:
    check_stored(folder)
    recipe_model = recipe_of(folder).model
    projector = dataclasses.replace(recipe_model.projector, weights=None)  # which the checkpoint holds
    config = resolve_model_paths(dataclasses.replace(recipe_model, projector=projector), folder)
    if packed == "reload":
        config = dataclasses.replace(config, quantisation="none")
    # Weights are merged in fp32 and rounded once at the end.
    stays = packed == "keep" and config.quantisation != "none"
    assembly = load_parts(config, dtype=dtype if stays else torch.float32)
    if packed == "dense" and is_packed(assembly.model):
        make_dense(assembly.model, torch.float32)
        assembly.changed = True
    if is_multimodal(assembly.model) and not assembly.is_pretrained_vlm:
        load_projector(
            assembly.model.model.multi_modal_projector,
            folder / "projector.safetensors",
            newline=newline_of(assembly.model),
        )
        assembly.changed = True
    for component in ("vision", "language", *(("projector",) if assembly.is_pretrained_vlm else ())):
        if (folder / f"{component}.safetensors").is_file():
            _load_trained(assembly, folder / f"{component}.safetensors")
            assembly.changed = True
    if (folder / "adapter").is_dir():
        load_adapter = adapters.load_method if recipe_of(folder).adapter.peft else adapters.load_adapter
        assembly.peft_model = load_adapter(assembly.model, folder / "adapter")
        if merge:
            _merge(assembly)
    cast_parameters(assembly.model.requires_grad_(False), dtype)
    return assembly


def _merge(assembly: Parts) -> None:
    """Merge the adapter, unless it stays live: on packed weights, and methods of PEFT without a merge."""
    assert assembly.peft_model is not None
    if is_packed(assembly.model):
        logger.info("The adapter stays live: merged, the packed weights would be rounded anew.")
        return
    try:
        adapters.merge(assembly.peft_model)
    except AdapterError as reason:
        if isinstance(assembly.peft_model.peft_config["default"], adapters.MoSLoRAConfig):
            raise
        logger.info("The adapter stays live. %s", reason)
        return
    assembly.peft_model = None


def _load_trained(assembly: Parts, file: Path) -> None:
    state = load_file(file)
    own = assembly.model.state_dict()
    odd = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    if odd:
        raise ModelError(f"{file} does not fit the model: {odd[0]!r} is unknown or of another shape.")
    assembly.model.load_state_dict(state, strict=False)


def _load_adapter(folder: Path, base: str | Path | None, *, merge: bool, dtype: torch.dtype) -> Parts:
    """An adapter of another trainer, on the model that it names."""
    config = read_json(folder / ADAPTER_CONFIG)
    named = base or config.get("base_model_name_or_path")
    if base is None and (folder / BASE).is_dir():  # wherever the folder was moved
        named = folder / BASE
    if not isinstance(named, str | Path) or not str(named):
        raise ModelError(f"{folder} is an adapter that does not name its base model. Give it with --base.")
    stated = config.get("revision") if base is None and not Path(named).exists() else None
    revision = stated if isinstance(stated, str) else None
    where = f"the hub, {revision or 'newest commit'}" if not Path(named).exists() else Path(named).resolve()
    logger.info("%s: its base is %s (%s).", folder, named, where)
    try:
        assembly = _load_exported(named, dtype=torch.float32, revision=revision)
    except OSError as error:
        raise ModelError(
            f"The base model {str(named)!r} of {folder} does not load ({reason_of(error)}). Give it with --base."
        ) from error
    template = folder / "chat_template.jinja"
    if template.is_file() and notes_thinking(read_text(template)):
        assembly.ask("always")
    load_adapter = adapters.load_adapter if config.get("peft_type") == "LORA" else adapters.load_method
    assembly.peft_model = load_adapter(assembly.model, folder)
    if merge:
        _merge(assembly)
    cast_parameters(assembly.model.requires_grad_(False), dtype)
    return assembly


def _load_exported(
    folder: str | Path, *, dtype: torch.dtype, revision: str | None = None, weights: bool = True
) -> Parts:
    try:
        with hub_or_cache(folder):
            return _load_stock(folder, dtype=dtype, revision=revision, weights=weights)
    except MoSLoRAError:
        raise
    except ValueError as error:
        raise ModelError(f"{folder} does not load: {reason_of(error)}.") from error


def _load_stock(folder: str | Path, *, dtype: torch.dtype, revision: str | None, weights: bool) -> Parts:
    def load_stock(auto: Any) -> Any:
        if weights:
            return load_base(auto, folder, revision=revision, dtype=dtype)
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False)

    refuse_configuration(str(folder), revision)
    config, _ = PretrainedConfig.get_config_dict(folder, revision=revision)
    base = {"exported": str(folder), "revision": revision}
    if "vision_config" not in config:
        language = load_stock(AutoModelForCausalLM)
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False)
        thinking = _thinking_of(tokenizer.chat_template)
        return Parts(model=language.eval(), tokenizer=tokenizer, base=base, thinking=thinking)
    model = load_stock(AutoModelForImageTextToText).eval()
    processor: Any = load_pretrained_processor(str(folder), revision)
    if not (isinstance(model, LlavaForConditionalGeneration) and takes_plain_contents(processor)):
        thinking = _thinking_of(processor.chat_template)
        return pretrained_parts(processor, model=model, base=base, thinking=thinking, boxes=trained_boxes(folder))
    processor = AutoProcessor.from_pretrained(folder, revision=revision, backend="pil", trust_remote_code=False)
    images = processor.image_processor
    crop: Any = images.crop_size
    spec = ImageSpec(
        size=int(crop["height"]),
        tokens=int(model.config.image_seq_length),
        width=int(cast(Any, model.config.vision_config).hidden_size),
        prefix=int(getattr(processor, "num_additional_image_tokens", 0)),
        patch=int(getattr(processor, "patch_size", 0) or 0),
        mean=tuple(images.image_mean),
        std=tuple(images.image_std),
    )
    tokenizer = processor.tokenizer
    if tokenizer.chat_template is None:  # it has lost its own
        tokenizer.chat_template = processor.chat_template
    return Parts(
        model=model, tokenizer=tokenizer, processor=processor, image=spec,
        tokens_per_image=int(model.config.image_seq_length), base=base, thinking=_thinking_of(tokenizer.chat_template),
        boxes=trained_boxes(folder),
    )  # fmt: skip


def _thinking_of(template: Any) -> Thinking:
    """The form in which the model of an export is asked, as its chat template records it."""
    return "always" if notes_thinking(template) else "auto"


def trained_boxes(folder: str | Path) -> BoxChoice:
    """The form of boxes that an export was trained with; auto where it holds none."""
    try:
        form = read_json(Path(folder) / PREPROCESSING)["settings"]["boxes"]
    except (OSError, MoSLoRAError, KeyError, TypeError):  # it has none, or a damaged one, which is said elsewhere
        return "auto"
    return next((name for name in get_args(BoxFormName) if name == form), "auto")
