"""What a diffusion run needs before its first step: pipeline, pictures, adapters, optimiser, accelerator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mm_moslora.adapters import add_moslora, load_adapter
from mm_moslora.config.value_checks import check_mixers_train
from mm_moslora.data.images.record_picture import check_image
from mm_moslora.diffusion.denoising_loss import DenoisingLoss
from mm_moslora.diffusion.diffusion_export import adapter_parts
from mm_moslora.diffusion.diffusion_recipe import ATTENTION, DiffusionOptimConfig, DiffusionRecipe
from mm_moslora.diffusion.drawing import (
    PICTURES,
    ValidationPictures,
    complete_class_pictures,
    drawn_set,
    untuned_digests,
)
from mm_moslora.diffusion.latent_batches import LatentBatches
from mm_moslora.diffusion.pipeline_families import PipelineFamily, load_family, pipeline_source
from mm_moslora.diffusion.subject_pictures import PictureSet, PromptedPicture, subject_pictures
from mm_moslora.diffusion.tiny_pipelines import drawn_pictures
from mm_moslora.models.model_paths import COMMITS, CONTENTS, marks_of
from mm_moslora.models.precision import dtype_of
from mm_moslora.models.trainable_parts import moslora_config
from mm_moslora.training.deepspeed_start import prepare_deepspeed
from mm_moslora.training.metrics.mixer_metrics import MIXERS
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, DataError, ModelError

CLASS_PICTURES = "class_pictures"
"""Key of a manifest's `base`: the digest in the names of the drawn pictures of the class."""


@dataclass(kw_only=True)
class DiffusionRun:
    """The parts of a run."""

    recipe: DiffusionRecipe
    folder: Path
    precision: str
    family: PipelineFamily
    batches: LatentBatches
    pictures: ValidationPictures
    data: str
    """Fingerprint of the pictures."""
    class_digest: str | None
    """Of the drawn pictures of the class; None without prior preservation."""
    source: dict[str, dict[str, str]]
    """What the manifest keeps of the pipeline; see `pipeline_source`."""
    step: int = 0
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def validate_every(self) -> int:
        """Optimiser steps between validations; 0: only at the end."""
        epoch = len(self.batches.sets[0]) / self.batches.per_step
        wanted = self.recipe.validate.every_epochs * epoch
        return max(1, round(wanted)) if wanted else 0


def prepare(
    recipe: DiffusionRecipe, folder: Path, precision: str, *, base: Mapping[str, Any] = MappingProxyType({})
) -> DiffusionRun:
    """Load the pipeline, read and encode the pictures, draw what the untuned pipeline has to draw, add the adapters.

    Args:
        recipe: resolved.
        folder: of the run.
        precision: resolved.
        base: of the manifest of the checkpoint that the run continues from. Its commits are loaded, and its pictures
            of the class stay, also where `validate`, which draws them, has changed.

    Raises:
        MoSLoRAError: the recipe, the pictures or the pipeline is not acceptable, or has other weights now.
    """
    marks, class_digest = marks_of(base), base.get(CLASS_PICTURES)
    subject_folder = Path(recipe.data.pictures)
    if recipe.data.pictures == "drawn":
        subject_folder = drawn_set(folder / PICTURES / "subject", drawn_pictures())
    subjects = subject_pictures(recipe.data, subject_folder)
    prior = recipe.data.prior
    class_folder = Path((prior and prior.pictures) or folder / PICTURES / "class")
    if class_folder.exists() and not class_folder.is_dir():
        raise DataError(f"data.prior.pictures {class_folder} is no folder. Name a folder, or leave the key out.")
    family = load_family(recipe, dtype=dtype_of(precision), commits=marks.get(COMMITS, {}))
    source = _same_pipeline(pipeline_source(recipe.model, marks.get(COMMITS, {})), marks)
    prompts = [*(item.prompt for item in subjects), *recipe.validate.prompts, *([prior.prompt] if prior else [])]
    family.check_prompts(prompts)
    family.gather()
    pictures = ValidationPictures(family, folder)
    pictures.draw_untuned()
    sets = [_picture_set(family, "subject", subjects)]
    family.gather()
    if prior is not None:
        (digest,) = untuned_digests(family, [(prior.prompt, recipe.train.seed)])
        class_digest = class_digest or digest
        drawn = complete_class_pictures(family, class_folder, class_digest)
        sets.append(_picture_set(family, "class", [PromptedPicture(path=path, prompt=prior.prompt) for path in drawn]))
    batches = LatentBatches(family, sets, rank=distributed.rank(), world_size=distributed.world_size())
    batches.fill_caches()
    _adapt(family)
    return DiffusionRun(
        recipe=recipe, folder=folder, precision=precision, family=family, batches=batches, pictures=pictures,
        data=batches.fingerprint(), class_digest=class_digest, source=source,
    )  # fmt: skip


def _same_pipeline(source: dict[str, dict[str, str]], before: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The marks of a pipeline, if they agree with those of a checkpoint; those of earlier versions have none.

    Raises:
        ModelError: the files are others. Files may come and go, but for an index, which decides what is read.
    """
    new = source[CONTENTS]
    old = before.get(CONTENTS, new)
    changed = [key for key in new if new[key] != old.get(key, "" if key.endswith(".index.json") else new[key])]
    if changed:
        raise ModelError(
            f"{', '.join(changed[:3])}: the files of the pipeline are not those of the checkpoint. Put "
            "the old files there, or choose another train.output."
        )
    return source


def _picture_set(family: PipelineFamily, name: str, pictures: list[PromptedPicture]) -> PictureSet:
    data = family.recipe.data
    for item in pictures:
        check_image(item.path)  # by the header: a file that is no picture is found before the first step
    return PictureSet(
        pictures=pictures, name=name, seed=family.recipe.train.seed, side=family.resolution, crop=data.crop,
        flip=data.flip, repeats=data.repeats if name == "subject" else 1, fixed=data.cache_latents,
    )  # fmt: skip


def _adapt(family: PipelineFamily) -> None:
    """Put the adapters into the components of the pipeline that train."""
    recipe = family.recipe
    torch.manual_seed(recipe.train.seed)
    init = "gaussian" if recipe.adapter.factor_init == "gaussian" else True
    for name in family.adapted_names():
        component, adapter, targets = getattr(family.pipeline, name), recipe.adapter, recipe.adapter.targets
        if name != family.denoiser_name:  # patterns name paths of the denoiser
            adapter = replace(adapter, mixer_pattern={}, rank_pattern={}, alpha_pattern={})
            targets = adapter.text_encoder_targets
        elif targets == ATTENTION:
            paths = [path for path, _ in component.named_modules()]
            targets = [target for target in family.attention if any(path.endswith(f".{target}") for path in paths)]
        config = moslora_config(adapter, task_type=None, init_lora_weights=init)
        adapted = add_moslora(component, config, targets=targets)
        if adapter.weights is not None:
            parts = adapter_parts(Path(adapter.weights))
            if name not in parts:
                raise ConfigError(
                    f"adapter.weights {adapter.weights} has adapters of {', '.join(parts)}, none of {name}, which "
                    "trains. Choose other weights, or model.text_encoders: frozen."
                )
            load_adapter(adapted, parts[name], trainable=True)
        if recipe.train.gradient_checkpointing:
            enable = (
                getattr(component, "enable_gradient_checkpointing", None) or component.gradient_checkpointing_enable
            )
            enable()


def make_optimizer(loss: DenoisingLoss, config: DiffusionOptimConfig) -> torch.optim.Optimizer:
    """AdamW with groups for factors and mixers of the denoiser and of the text encoders."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in loss.parts.named_parameters():
        if not parameter.requires_grad:
            continue
        is_text, is_mixer = name.startswith("text_encoder"), MIXERS in name
        lr = config.text_encoder_lr if is_text and config.text_encoder_lr is not None else config.lr
        if is_mixer:
            lr = lr * config.mixer_factor if config.mixer_lr is None else config.mixer_lr
        label = f"{'text encoder ' if is_text else ''}{'mixer' if is_mixer else 'adapter'}"
        decay = config.mixer_weight_decay if is_mixer else config.weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault(f"{label}/{decay}", {"params": [], "lr": lr, "weight_decay": decay, "name": label})
        group["params"].append(parameter)
    check_mixers_train(config.mixer_factor, train=any("mixer" in group["name"] for group in groups.values()))
    kind: Any = torch.optim.AdamW
    if config.optimizer == "adamw_8bit":
        import bitsandbytes

        kind = bitsandbytes.optim.adamw.AdamW8bit
    made: torch.optim.Optimizer = kind(list(groups.values()), betas=config.betas, eps=config.eps)
    return made


def make_accelerator(run: DiffusionRun) -> Any:
    """accelerate's Accelerator with the recipe's precision, accumulation and ZeRO stage."""
    from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

    train, plugin = run.recipe.train, None
    if train.zero != "none":
        prepare_deepspeed(train.zero)
        plugin = DeepSpeedPlugin(
            zero_stage=int(train.zero[-1]), gradient_accumulation_steps=train.accumulation,
        )  # fmt: skip
        plugin.deepspeed_config["gradient_clipping"] = run.recipe.optim.max_grad_norm  # as an argument, 0 means 1
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = train.batch
        plugin.deepspeed_config["zero_allow_untested_optimizer"] = True
    # SDXL and SD3 read the last layer but one of a text encoder, so adapters behind it get no gradient.
    unused = run.recipe.model.text_encoders == "adapter"
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=unused)]
    if not torch.cuda.is_available() and distributed.world_size() > 1:
        handlers.append(
            InitProcessGroupKwargs(backend="gloo")
        )  # else it counts one process where DeepSpeed runs on CPUs
    return Accelerator(
        mixed_precision="no" if run.precision == "fp32" else run.precision, deepspeed_plugin=plugin,
        gradient_accumulation_steps=train.accumulation, cpu=plugin is None and not torch.cuda.is_available(),
        kwargs_handlers=handlers,
    )  # fmt: skip
