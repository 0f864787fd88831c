"""Import: checkpoints of the original LLaVA code become parts that a recipe names, or whole models.

What is read::

    LLaVA, whole         config.json (model_type llava_llama, ...), weights with model.mm_projector.*
    LLaVA, projector     mm_projector.bin with model.mm_projector.*
    LLaVA, LoRA          adapter_config.json, adapter weights, non_lora_trainables.bin; the base is named

The result is a folder with `projector.safetensors` and, where the source holds or changes it, `language/`.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mm_moslora import adapters
from mm_moslora.config import ModelConfig, ProjectorConfig, VisionConfig
from mm_moslora.models.families import DECODERS
from mm_moslora.models.model_sizes import load_base
from mm_moslora.models.processing.anyres import NEWLINE
from mm_moslora.utils.errors import ModelError
from mm_moslora.utils.file_locks import new_folder
from mm_moslora.utils.files import copy_of_model, read_json
from mm_moslora.utils.run_paths import writing
from mm_moslora.utils.untrusted_files import find_in_model, opened

logger = logging.getLogger(__name__)

_PLAIN_TYPES = {kind: name for name, family in DECODERS.items() for kind in family.llava_types}
_PROJECTOR = re.compile(r"^(?:base_model\.model\.)?(?:model\.)?mm_projector\.(.+)$")
_OF_LLAVA = re.compile(r"^(mm_|image_|tune_|freeze_mm|unfreeze_mm|use_mm|tokenizer_|vision_|im_|s2)")
_BESIDE_WEIGHTS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""Files of a language model besides its configuration and weights."""


@dataclass(kw_only=True)
class Imported:
    """What a source held."""

    folder: Path
    """Where its parts lie now."""
    kind: str
    """Which of the forms it was."""
    projector: str
    """Kind of the projector."""
    settings: dict[str, Any] = field(default_factory=dict)
    """LLaVA's configuration, where there is one."""
    language: str | None = None
    """The language model: a folder here, or the base that the source names."""
    tensors: int = 0
    """Tensors taken over."""
    largest_difference: float = 0.0
    """Between source tensors and what was written, read back; only a merged LoRA rounds."""


def import_parts(source: Path, folder: Path, *, language: str | None = None) -> Imported:
    """Turn a folder or .bin file into parts; `language`: the base of a LoRA, where the one it names cannot be read."""
    with new_folder(folder) as part:  # the same command works as soon as the cause of an error is mended
        imported = _import(source, part, language=language)
    inside = imported.language == str(part / "language")
    return replace(imported, folder=folder, language=str(folder / "language") if inside else imported.language)


def _import(source: Path, folder: Path, *, language: str | None) -> Imported:
    config_file = find_in_model(source if source.is_dir() else source.parent, "config.json")
    settings = {} if config_file is None else dict(read_json(config_file))
    if source.is_dir() and (source / "adapter_config.json").is_file():
        return _import_lora(source, folder, settings, language)
    files = _weight_files(source)
    state = {name: value for file in files for name, value in _tensors(file) if _PROJECTOR.match(name)}
    newline = next((value for file in files for name, value in _tensors(file) if name.endswith(NEWLINE)), None)
    kind = _write_projector(state, folder, newline=newline)
    whole = source.is_dir() and any(not _is_extra(name) for file in files for name, _ in _tensors(file))
    result = Imported(
        folder=folder, kind="LLaVA, whole" if whole else "LLaVA, projector", projector=kind, settings=settings,
        tensors=len(state), largest_difference=_difference(state, folder / "projector.safetensors"),
    )  # fmt: skip
    if whole:
        result.language = str(folder / "language")
        result.tensors += _write_language(source, files, settings, folder / "language")
    return result


def whole_config(imported: Imported, *, vision: str | None = None, language: str | None = None) -> ModelConfig:
    """How to assemble a model from what was imported; tower and language model where the source's are not meant."""
    settings = imported.settings
    tower = vision or settings.get("mm_vision_tower")
    model = language or imported.language
    missing = [name for name, value in (("--vision", tower), ("--language", model)) if not value]
    if missing:
        raise ModelError(
            f"The source ({imported.kind}) does not say what its parts are; name them: {', '.join(missing)}. "
            f"Its projector alone is in {imported.folder / 'projector.safetensors'}."
        )
    aspect = settings.get("image_aspect_ratio", "pad")
    return ModelConfig(
        language=str(model),
        vision=VisionConfig(
            name=str(tower),
            feature_layer=settings.get("mm_vision_select_layer", -2),
            select="cls_patch" if settings.get("mm_vision_select_feature") == "cls_patch" else "patch",
        ),
        projector=ProjectorConfig(kind=imported.projector, weights=str(imported.folder / "projector.safetensors")),
        image_aspect="anyres" if aspect == "anyres" else "pad" if aspect == "pad" else "crop",
    )


def _weight_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    for pattern in ("*.safetensors", "pytorch_model*.bin", "mm_projector.bin"):
        if files := sorted(source.glob(pattern)):
            return [path for path in files if find_in_model(source, path.name)]
    raise ModelError(
        f"{source} holds none of *.safetensors, pytorch_model*.bin, mm_projector.bin and adapter_config.json, so it is "
        "no LLaVA checkpoint. A llava-hf folder needs no import: put it into model.vlm."
    )


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file; pickles are read as weights only."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118  (not a dict)
                    yield name, stream.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{file} is damaged or truncated ({error}). Copy it again.") from error
        return
    try:
        with opened(file, most=None) as source:
            state = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(
            f"{file} cannot be read as weights alone ({type(error).__name__}): it is damaged, no file of torch.save, "
            "or holds code, which is never run here. Save its state_dict with torch.save, or as safetensors."
        ) from error
    for key in ("state_dict", "module", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    yield from ((name, value) for name, value in state.items() if isinstance(value, Tensor))


def _is_extra(name: str) -> bool:
    """Whether a tensor belongs to LLaVA, not to the language model."""
    return bool(_PROJECTOR.match(name)) or "vision_tower" in name or NEWLINE in name


def _own_names(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Kind of a projector, and its tensors under this project's names."""
    local = {}
    for name, value in state.items():
        match = _PROJECTOR.match(name)
        assert match is not None
        own = match[1]
        if own in local:
            raise ModelError(f"The source holds the projector's {own!r} twice ({name!r}). Remove one of the two.")
        local[own] = value
    layers = sorted({int(name.partition(".")[0]) for name in local if name[0].isdigit()})
    if set(local) == {"weight", "bias"}:
        return "linear", {f"linear.{name}": value for name, value in local.items()}
    expected = list(range(0, 2 * len(layers), 2))
    if not layers or layers != expected or set(local) != {f"{n}.{p}" for n in layers for p in ("weight", "bias")}:
        raise ModelError(
            f"The projector has the tensors {', '.join(sorted(local)[:6])}, which are no linear layer and no "
            "mlpNx_gelu with a weight and a bias in each layer. Only these are imported."
        )
    if layers == [0, 2]:
        own = {"0": "linear_1", "2": "linear_2"}
        return "mlp2x_gelu", {f"{own[n.partition('.')[0]]}.{n.partition('.')[2]}": v for n, v in local.items()}
    return f"mlp{len(layers)}x_gelu", {f"layers.{name}": value for name, value in local.items()}


def _write_projector(state: Mapping[str, Tensor], folder: Path, *, newline: Tensor | None = None) -> str:
    if not state:
        raise ModelError("The source holds no projector (no mm_projector.*).")
    kind, own = _own_names(state)
    own |= {} if newline is None else {NEWLINE: newline}
    _check_finite(own, "The projector's")
    tensors = {name: value.float().contiguous().clone() for name, value in own.items()}
    with writing(folder / "projector.safetensors"):
        save_file(tensors, folder / "projector.safetensors")
    return kind


def _check_finite(tensors: Mapping[str, Tensor], whose: str) -> None:
    for name, value in tensors.items():
        if not (value.is_floating_point() and torch.isfinite(value).all()):
            what = "NaN or infinity" if value.is_floating_point() else f"{value.dtype}"
            raise ModelError(f"{whose} {name!r} holds {what}, expected finite floats. Copy the file again.")


def _difference(state: Mapping[str, Tensor], file: Path) -> float:
    """Largest difference between a source's projector and what was written."""
    _, own = _own_names(state)
    written = dict(_tensors(file))
    return max(float((written[name] - value.float()).abs().max()) for name, value in own.items())


def _write_language(source: Path, files: list[Path], settings: dict[str, Any], folder: Path) -> int:
    """The language model of a whole LLaVA checkpoint as a folder of its own."""
    kind = str(settings.get("model_type"))
    if kind not in _PLAIN_TYPES:
        raise ModelError(f"{source} has model_type {kind!r}, expected one of {', '.join(_PLAIN_TYPES)}.")
    folder.mkdir()
    plain = {key: value for key, value in settings.items() if not _OF_LLAVA.match(key) and key != "architectures"}
    plain.pop("auto_map", None)  # code of the source, which is not copied
    plain["model_type"] = _PLAIN_TYPES[kind]
    (folder / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")
    index: dict[str, str] = {}
    for number, file in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        state = {key: value.contiguous() for key, value in _tensors(file) if not _is_extra(key)}
        with writing(folder / name):
            save_file(state, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(state, name)
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    copy_of_model(source, _BESIDE_WEIGHTS, folder)
    return len(index)


def _import_lora(source: Path, folder: Path, settings: dict[str, Any], language: str | None) -> Imported:
    """LLaVA's LoRA folder: the adapter is merged into its base, the projector taken from what trained beside it."""
    extras = "non_lora_trainables.bin"
    state = dict(_tensors(source / extras)) if find_in_model(source, extras) else {}
    projector = {name: value for name, value in state.items() if _PROJECTOR.match(name)}
    kind = _write_projector(projector, folder)
    adapter = read_json(source / "adapter_config.json")
    base = language or adapter.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(f"{source / 'adapter_config.json'} names no base model; name it: --language BASE.")
    logger.info("%s: its base is %s (%s).", source, base, Path(base).resolve() if Path(base).exists() else "the hub")
    model = load_base(AutoModelForCausalLM, base, dtype=torch.float32)
    adapters.merge(adapters.load_adapter(model, source))
    return Imported(
        folder=folder, kind="LLaVA, LoRA", projector=kind, settings=settings,
        language=_save_language(model, base, folder / "language"),
        tensors=len(state), largest_difference=_difference(projector, folder / "projector.safetensors"),
    )  # fmt: skip


def _save_language(model: PreTrainedModel, source: str, folder: Path) -> str:
    """Write a language model with the tokenizer of its source."""
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    with writing(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)
