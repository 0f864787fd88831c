"""Export: to folders that stock libraries load, each checked by loading it back and comparing logits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from mm_moslora import adapters
from mm_moslora.adapters.folders.export_adapter import layers_read_as_experts
from mm_moslora.adapters.folders.save_folder import name_base
from mm_moslora.models.assembly import Parts
from mm_moslora.models.batching.padded_batch import padded_inputs
from mm_moslora.models.export.base_tensors import copy_unloaded
from mm_moslora.models.families import tower_family
from mm_moslora.models.language_model import savable_generation_config
from mm_moslora.models.model_paths import cached_snapshot
from mm_moslora.models.model_sizes import load_base
from mm_moslora.models.processing.llava_processor import save_processor, takes_plain_contents
from mm_moslora.models.vision.timm_open_clip_tower import cast_parameters
from mm_moslora.models.vlm import VlmForConditionalGeneration, is_multimodal
from mm_moslora.utils.errors import ModelError
from mm_moslora.utils.file_locks import new_folder
from mm_moslora.utils.files import read_json
from mm_moslora.utils.run_paths import BASE, writing

TOLERANCE = 1e-4
"""Largest accepted difference of logits in fp32, relative to the largest logit (but to no less than 1)."""
_PICTURE = Image.linear_gradient("L").convert("RGB")
"""What the model and its written files are shown: a gradient from dark to light."""


class LogitDifference(float):
    """The largest difference between the logits of two models, in nats, with the largest logit as its scale."""

    scale: float

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> LogitDifference:
        """That of logits ``[T, C]``; not a number where a logit is none."""
        made = cls((ours.float() - theirs.float()).abs().max())
        made.scale = float(ours.float().abs().max())
        return made

    def __str__(self) -> str:
        return f"{float(self):.2e} (logits reach {self.scale:.3g})"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote."""

    folder: Path
    architecture: str
    """Class that loads it."""
    stock: bool
    """Whether transformers alone loads it; else `import mm_moslora.models` first."""
    max_logit_difference: LogitDifference
    """Between the model in memory and the folder loaded back, fp32."""
    copied: list[str] = field(default_factory=list)
    """Tensors of the base that its class does not load, written as they are."""


def refuse_own_class(model: nn.Module) -> None:
    """Refuse a model that transformers alone cannot load."""
    if isinstance(model, VlmForConditionalGeneration):
        raise ModelError(why_not_stock(model))


def export_model(assembly: Parts, folder: Path, *, require_stock: bool = False) -> Exported:
    """Write the whole model, adapters merged, as a Hugging Face folder.

    Args:
        assembly: loaded with `merge=True`, in the dtype to be written.
        folder: new or empty; it appears once it is written and checked.

    Raises:
        ModelError: the model cannot be expressed, or what was written gives other logits.
        ConfigError: the folder is not empty.
    """
    model = assembly.model
    if assembly.peft_model is not None:
        raise ModelError("The model still carries live adapters; load it with merge=True before exporting it whole.")
    stock = not isinstance(model, VlmForConditionalGeneration)
    if require_stock:
        refuse_own_class(model)
    savable_generation_config(model)
    with writing(folder), new_folder(folder) as part:
        model.save_pretrained(part)
        source = _base_folder(assembly)
        copied = [] if source is None else copy_unloaded(source, part)
        if assembly.processor is not None:
            if not assembly.is_pretrained_vlm and tower_family(model.config.vision_config.model_type).nested_names:
                _rename_tensors(part, "vision_tower.", "vision_tower.vision_model.")
            save_processor(assembly.processor, part)
        else:
            assembly.tokenizer.save_pretrained(part)
        difference = _check(assembly, part)
    return Exported(
        folder=folder, architecture=type(model).__name__, stock=stock, max_logit_difference=difference, copied=copied
    )


def _base_folder(assembly: Parts) -> Path | None:
    """Where the ready-made model lies that the assembly was loaded from; None for one put together here."""
    base = assembly.base
    if base.get("exported") or base.get("vlm"):
        name, revision = base.get("exported") or base["vlm"], base.get("revision") or base.get("vlm_revision")
    elif base.get("language") and not is_multimodal(assembly.model):
        name, revision = base["language"], base.get("language_revision")
    else:
        return None
    return Path(name) if Path(name).is_dir() else cached_snapshot(name, revision)


@dataclass(frozen=True, kw_only=True)
class ExportedLora:
    """What an export of an adapter wrote."""

    base: str
    """The model it belongs to: a folder or a hub id."""
    loader: str
    """PEFT's class that loads adapter and base together."""
    stock: bool
    """Whether that needs nothing of this project; else `import mm_moslora.models` first."""
    max_logit_difference: LogitDifference
    """Between the live adapter and the folder as stock PEFT loads it, fp32."""


def published_base(assembly: Parts) -> tuple[str, str | None] | None:
    """Name and hub revision of the model that the adapter belongs to; None where it lies nowhere but in memory."""
    base, model = assembly.base, assembly.model
    if assembly.changed:
        return None
    if base.get("exported"):
        return _absolute(base["exported"]), base.get("revision")
    if base.get("vlm"):
        return _absolute(base["vlm"]), base.get("vlm_revision")
    if base.get("language") and not is_multimodal(model):
        return _absolute(base["language"]), base.get("language_revision")
    return None


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def export_lora(
    assembly: Parts, folder: Path, *, dtype: torch.dtype = torch.float32, final: Path | None = None
) -> ExportedLora:
    """Write the adapter, folded to plain LoRA, for stock PEFT, vLLM and others, and the base where none is published.

    The folder names its base, so that PEFT's Auto classes load both. An assembled model's base, the projector of the
    run in it, is published nowhere: it is written below, in `base`.

    Args:
        assembly: loaded with `merge=False`; its adapter is replaced by the plain LoRA that was written.
        final: where the folder will lie, if not here.
    """
    if assembly.peft_model is None:
        raise ModelError("The model carries no adapter, so there is none to export. Export the whole model instead.")
    kind: Any = assembly.peft_model.peft_config["default"]
    if not isinstance(kind, adapters.MoSLoRAConfig):
        raise ModelError(
            f"The adapter is of PEFT's {kind.peft_type.value} (adapter.peft), and not of this package. The folder "
            "`adapter` of a checkpoint is PEFT's own; export the whole model for another program."
        )
    model, published = assembly.model, published_base(assembly)
    if published is None:
        _round_base(model, dtype)
    live = _probe(assembly, model)
    with writing(folder), new_folder(folder) as part:
        adapters.save_adapter(assembly.peft_model, part, base=assembly.base)
        assembly.peft_model.unload()
        assembly.peft_model = None
        if misread := layers_read_as_experts(model, peft.LoraConfig.from_pretrained(str(part))):
            raise ModelError(
                f"PEFT {peft.__version__} takes {misread[0]} for an expert by its name and would load this adapter "
                "wrongly. Export the whole model (--to hf), or load the checkpoint with mm_moslora.adapters."
            )
        if published is None:
            cast_parameters(model, dtype)
            export_model(assembly, part / BASE)
            cast_parameters(model, torch.float32)
        name, revision = published or (str(((final or folder) / BASE).resolve()), None)
        sees = is_multimodal(model)
        name_base(part, name, revision=revision, kind=type(model) if sees else None)
        if assembly.processor is not None:
            save_processor(assembly.processor, part)
        else:
            assembly.tokenizer.save_pretrained(part)
        assembly.peft_model = peft.PeftModel.from_pretrained(model, part).eval()
        difference = largest_logit_difference(live, _probe(assembly, model))
    return ExportedLora(
        base=name, loader="AutoPeftModel" if sees else "AutoPeftModelForCausalLM",
        stock=not isinstance(model, VlmForConditionalGeneration), max_logit_difference=difference,
    )  # fmt: skip


@torch.no_grad()
def _round_base(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the weights besides the adapters the values that they have once written."""
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            weight.copy_(weight.to(dtype))


@torch.no_grad()
def merge_adapter(assembly: Parts, dtype: torch.dtype) -> LogitDifference | None:
    """Merge the live adapter in fp32, then cast; the difference of logits, rounding included (None: no adapter)."""
    live = None if assembly.peft_model is None else _probe(assembly, assembly.model)
    if assembly.peft_model is not None:
        adapters.merge(assembly.peft_model)
        assembly.peft_model = None
    cast_parameters(assembly.model, dtype)
    return None if live is None else LogitDifference.between(live, _probe(assembly, assembly.model))


def why_not_stock(model: VlmForConditionalGeneration) -> str:
    """Why transformers alone cannot load the model, and what comes closest."""
    config: Any = model.config
    vision: Any = config.vision_config
    reasons = []
    if config.projector_kind != "mlp2x_gelu":
        reasons.append(f"its projector is {config.projector_kind} (stock LLaVA has mlp2x_gelu only)")
    if vision.model_type == "mm_moslora_vision":
        reasons.append(f"its {vision.library} vision tower has no transformers class")
    if vision.model_type == "mm_moslora_fused_vision":
        reasons.append("it has two vision towers side by side")
    if config.vision_prefix > 1:
        reasons.append(f"its tower puts {config.vision_prefix} tokens before the patches (stock LLaVA drops one)")
    return (
        f"The model is no LlavaForConditionalGeneration: {'; '.join(reasons)}. Export it with --to hf, which loads "
        "after `import mm_moslora.models`, or train with one CLIP, SigLIP, ViT or DINOv2 tower (without registers) and "
        "mlp2x_gelu."
    )


def _rename_tensors(folder: Path, old: str, new: str) -> None:
    """Rename tensors in every shard of a saved model, and in its index."""
    renamed: dict[str, str] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        for key in [key for key in state if key.startswith(old) and not key.startswith(new)]:
            renamed[key] = new + key.removeprefix(old)
            state[renamed[key]] = state.pop(key)
        save_file(state, shard, metadata=metadata)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = read_json(index)
        content["weight_map"] = {renamed.get(key, key): file for key, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _check(assembly: Parts, folder: Path) -> LogitDifference:
    """Load the folder back in fp32; compare the tokens of a picture, where there is a tower, and logits on a prompt."""
    model = assembly.model
    loader = AutoModelForImageTextToText if is_multimodal(model) else AutoModelForCausalLM
    twin = load_base(loader, folder, dtype=next(model.parameters()).dtype).eval()
    if type(twin) is not type(model):
        raise ModelError(f"The written files load as {type(twin).__name__}, expected {type(model).__name__}.")
    if assembly.image_processing is not None and takes_plain_contents(assembly.processor):
        written = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        ids = written(images=[_PICTURE], text=[written.image_token])["input_ids"][0]
        (picture,) = assembly.image_processing.process([_PICTURE])
        counts = [list(tokens).count(assembly.image_token_id) for tokens in (ids, picture.placeholders)]
        if counts[0] != counts[1]:
            raise ModelError(f"The written processor gives a picture {counts[0]} tokens, the model {counts[1]}.")
    return largest_logit_difference(_probe(assembly, model), _probe(assembly, twin))


def largest_logit_difference(ours: Tensor, theirs: Tensor) -> LogitDifference:
    """The largest difference between a model's logits and those of its written files."""
    difference = LogitDifference.between(ours, theirs)
    accepted = TOLERANCE * max(1.0, difference.scale)
    if not difference <= accepted:  # not a number is no agreement
        raise ModelError(
            f"The written files give other logits than the model (largest difference {difference}, accepted "
            f"{accepted:.0e}), so they were deleted. Export in fp32 (--dtype fp32), and report the model's class."
        )
    return difference


@torch.no_grad()
def _probe(assembly: Parts, model: PreTrainedModel) -> Tensor:
    """Logits ``[T, C]`` of a prompt with a picture, where the model sees."""
    text = assembly.tokenizer("A short check of the weights.", return_tensors="pt")["input_ids"][0]
    if assembly.image_processing is None:
        return model(input_ids=text[None]).logits[0]
    (picture,) = assembly.image_processing.process([_PICTURE])
    ids = torch.cat([torch.tensor(picture.placeholders), text])
    others = {name: value for name, value in picture.tensors.items() if name != "pixel_values"}
    inputs = padded_inputs(model, [ids], picture.tensors["pixel_values"], others, answers=[len(ids)])
    return model(**inputs).logits[0]
