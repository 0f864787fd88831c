"""Training a diffusion run in one process; a step draws its random numbers from the seed and its number alone."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.adapters import adapter_snapshot, add_moslora, export_adapter, load_adapter
from mm_moslora.adapters.folder_format import DIFFUSERS_WEIGHTS, OWN_CONFIG
from mm_moslora.adapters.folders.load_folder import restore_mixers
from mm_moslora.diffusion.diffusion_recipe import ATTENTION, DiffusionOptimConfig, DiffusionRecipe
from mm_moslora.diffusion.picture_batches import LatentBatches, generator
from mm_moslora.diffusion.pipeline_families import DenoisingLoss, PipelineFamily, load_family, pipeline_source
from mm_moslora.models.model_paths import COMMITS, marks_of
from mm_moslora.models.precision import dtype_of, resolve_precision
from mm_moslora.models.trainable_parts import moslora_config
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, rank_folder, reading_state
from mm_moslora.training.checkpointing.run_checkpoints import changed_keys, choose_checkpoint
from mm_moslora.training.metrics.mixer_metrics import MIXERS, keep_initial_mixers, log_adapter
from mm_moslora.training.run_driver import Session, TrainResult, supervised_run
from mm_moslora.training.supervision.run_faults import peak_memory_gib
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.utils import distributed, files
from mm_moslora.utils.errors import AdapterError, CheckpointError, ConfigError, DivergedError
from mm_moslora.utils.package_requirements import install_extra, is_installed
from mm_moslora.utils.progress_bar import Progress
from mm_moslora.utils.run_paths import checkpoints
from mm_moslora.utils.untrusted_files import find_below, opened

logger = logging.getLogger(__name__)
STATE = "state.pt"  # parameters in fp32, optimiser, schedule, loss scale


def train_diffusion(
    recipe: DiffusionRecipe, *, resume: str = "auto", stop_at: int | None = None, stop: StopRequest | None = None
) -> TrainResult:
    """Train a resolved recipe, from the start or from a checkpoint; `resume` and `stop_at` are those of the verb."""
    if not is_installed("diffusers"):
        raise ConfigError(f"Diffusion models need diffusers, which is missing. Run: {install_extra('diffusion')}")
    if distributed.world_size() > 1:
        raise ConfigError(f"WORLD_SIZE is {distributed.world_size()}, but diffusion models train in one process.")
    precision = resolve_precision(recipe.train.precision)
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision is fp16, which needs a GPU. Choose bf16 or fp32: --train.precision fp32.")
    with supervised_run(recipe, lambda: None, resume=resume, stop_at=stop_at) as (watchdog, ending):
        checkpoint, manifest = find_resume(recipe, resume) or (None, None)
        run = DiffusionRun(recipe, precision, {} if manifest is None else manifest.base)
        if checkpoint is not None and manifest is not None:
            run.restore(checkpoint, manifest)
        session = _Session(run, watchdog, stop or StopRequest(), resumed_from=checkpoint, total=recipe.train.steps)
        ending.begun = True
        result = session.go(stop_at)
        ending.finished = result.finished
    return result


def find_resume(recipe: DiffusionRecipe, resume: str) -> tuple[Path, Manifest] | None:
    """The checkpoint to resume from; see `mm_moslora.training.checkpointing.run_checkpoints.find_resume`."""

    def check(checkpoint: Path, manifest: Manifest) -> None:
        if changed := changed_keys(DiffusionRecipe, manifest.recipe, recipe.to_dict()).other_run:
            raise CheckpointError(
                f"{checkpoint} belongs to another run: {'; '.join(changed[:6])}. Restore this, or choose another "
                f"train.output. To start from its weights: --adapter.weights {checkpoint}."
            )

    return choose_checkpoint(Path(recipe.train.output), resume, check)


class DiffusionRun:
    """The parts of a run, and its step."""

    def __init__(self, recipe: DiffusionRecipe, precision: str, base: Mapping[str, Any]) -> None:
        """`base`: of a checkpoint's manifest; a resumed run keeps to its weights."""
        self.recipe, self.precision, self.folder = recipe, precision, Path(recipe.train.output)
        marks = marks_of(base)
        self.family = load_family(recipe, dtype=dtype_of(precision), commits=marks.get(COMMITS, {}))
        from diffusers.optimization import get_scheduler

        self.source, self.batches = pipeline_source(recipe.model, marks), LatentBatches(self.family)
        self.batches.fill_caches()
        adapt(self.family)
        self.denoiser, self.loss = self.family.denoiser, DenoisingLoss(self.family)
        self.trainable = {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}
        keep_initial_mixers(self.denoiser, self.values())
        self.optimizer = torch.optim.AdamW(parameter_groups(self.trainable, recipe.optim))
        schedule = "constant_with_warmup" if recipe.optim.schedule == "constant" else recipe.optim.schedule
        self.schedule = get_scheduler(
            schedule, self.optimizer, num_warmup_steps=recipe.optim.warmup, num_training_steps=recipe.train.steps
        )
        self.scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
        self.stateful: dict[str, Any] = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        self.data, self.counters = self.batches.digest(), dict[str, float]()

    @property
    def step(self) -> int:
        """Optimiser steps so far."""
        return int(self.counters.get("steps", 0))

    def values(self) -> dict[str, Tensor]:
        """The trained parameters in fp32 on the CPU."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.trainable.items()}

    def optimise(self) -> dict[str, float]:
        """One optimiser step; returns its metrics."""
        train, device, started, total = self.recipe.train, distributed.device(), time.monotonic(), 0.0
        self.denoiser.train()
        torch.manual_seed(generator(train.seed, "dropout", self.step, 0).initial_seed())
        for micro in range(train.accumulation):
            batch = self.batches.batch(self.step, micro, device)
            with torch.autocast(device.type, dtype_of(self.precision), enabled=self.precision != "fp32"):
                loss = self.loss(batch) / train.accumulation
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.trainable.values(), self.recipe.optim.max_grad_norm or math.inf))
        if not math.isfinite(norm) and self.scaler.get_scale() <= 1:  # fp16 skips steps until its loss scale fits
            raise DivergedError(f"The loss or gradient of step {self.step + 1} is not finite. Lower optim.lr.")
        rates = {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if math.isfinite(norm):
            self.schedule.step()
        seconds, pictures = time.monotonic() - started, train.batch * train.accumulation
        for name, value in {"steps": 1.0, "samples": float(pictures), "seconds": seconds}.items():
            self.counters[name] = self.counters.get(name, 0.0) + value
        metrics = {"loss": total, "grad_norm": norm, "step_seconds": seconds, "memory_gib": peak_memory_gib()}
        return metrics | {"pictures_per_second": pictures / seconds} | rates

    def restore(self, folder: Path, manifest: Manifest) -> None:
        """Restore a checkpoint; training then goes on bit for bit."""
        if manifest.data != self.data:
            raise CheckpointError(f"The pictures or prompts are not those of {folder}. Choose another train.output.")
        restore_mixers(self.denoiser, folder / "adapter" / self.family.denoiser_name)
        with reading_state(rank_folder(folder)):
            path = find_below(Path(os.path.realpath(rank_folder(folder))), STATE)
            with opened(path, most=None) as stream:  # `weights_only` keeps a pickle from running code
                state: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for name, parameter in self.trainable.items():
                    parameter.copy_(state["parameters"][name])
            for key, part in self.stateful.items():
                part.load_state_dict(state[key])
        self.counters.update(manifest.counters)


@dataclass(frozen=True, kw_only=True)
class TakenDenoiser:
    """What a checkpoint gets of a run, which takes no step until it is written."""

    run: DiffusionRun
    manifest: Manifest
    values: dict[str, Tensor]

    @property
    def size(self) -> int:
        """Estimate of the bytes that are written: values, two moments, and the adapter in its two forms."""
        return sum(value.numel() for value in self.values.values()) * 4 * 6

    def write(self, folder: Path) -> None:
        """See `Saver.start`."""
        run, name = self.run, self.run.family.denoiser_name
        state = {"parameters": self.values} | {key: part.state_dict() for key, part in run.stateful.items()}
        torch.save(state, rank_folder(folder) / STATE)
        (folder / "config.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
        base = {"id": run.recipe.model.base, "revision": run.recipe.model.revision, "component": name}
        adapter_snapshot(run.denoiser, base=base).write(folder / "adapter" / name)
        try:
            export_adapter(denoiser_adapter(folder), folder, layout="diffusers")
        except AdapterError as error:  # the file cannot express DoRA
            files.discard(folder / DIFFUSERS_WEIGHTS)
            logger.warning("The checkpoint has no %s: %s", DIFFUSERS_WEIGHTS, error)


class _Session(Session[DiffusionRun, TakenDenoiser]):
    """One session that learns to denoise."""

    def _train(self, stop_at: int | None) -> None:
        run, train, mixers_every = self.run, self.run.recipe.train, self.run.recipe.track.mixers_every
        with Progress("train", self.total, initial=run.step) as progress:
            while not self.over:
                self.phase("step")
                metrics = run.optimise()
                progress.update(run.step, f"loss {metrics['loss']:.4f}")
                if run.step % train.log_every == 0 or self.over:
                    self.trackers.log(metrics | self.saves.extra, run.step)
                    self.saves.extra.clear()
                if mixers_every and run.step % mixers_every == 0 and not self.over:
                    log_adapter(run.denoiser, run.values(), self.trackers, run.step)
                if train.save_every and run.step % train.save_every == 0:
                    self.saves.start()
                if self.agree(stop_at):
                    break

    def _taken(self) -> TakenDenoiser:
        run, model, values = self.run, self.run.recipe.model, self.run.values()
        manifest = Manifest(
            step=run.step, world_size=1, recipe=run.recipe.to_dict(),
            base={"id": model.base, "revision": model.revision} | run.source, data=run.data,
            counters=dict(run.counters), trainable={name: list(value.shape) for name, value in values.items()},
            files={}, precision=run.precision,
        )  # fmt: skip
        return TakenDenoiser(run=run, manifest=manifest, values=values)

    def _measure_end(self) -> None:
        run = self.run
        log_adapter(run.denoiser, run.values(), self.trackers, run.step, file=run.folder / "mixers.json")

    def _of_run(self) -> dict[str, Any]:
        run = self.run
        total = sum(p.numel() for name, p in run.denoiser.named_parameters() if "lora_" not in name)
        trainable = sum(map(torch.numel, run.trainable.values()))
        row = {"name": run.family.denoiser_name, "total": total, "trainable": trainable}
        data = {"pictures": len(run.batches.sets[0].files), "resolution": run.family.resolution}
        return {"kind": "diffusion", "components": [row], "base": {"pipeline": run.recipe.model.base}, "data": data}


def denoiser_adapter(folder: Path) -> dict[str, Path]:
    """The adapter folder of a run's newest checkpoint, or of a checkpoint, by its component, for `export_adapter`."""
    newest = [path for _, path in checkpoints(folder)][-1:] if folder.is_dir() else []
    for parent in (folder, *newest):
        for name in ("unet", "transformer"):
            if (parent / "adapter" / name / OWN_CONFIG).is_file():
                return {name: parent / "adapter" / name}
    raise AdapterError(f"{folder} holds no adapter of a diffusion pipeline. Name a run of a diffusion recipe.")


def adapt(family: PipelineFamily) -> None:
    """Put the adapter into the denoiser; that of `adapter.weights`, where the recipe names one."""
    recipe, denoiser = family.recipe, family.denoiser
    torch.manual_seed(recipe.train.seed)
    adapter, targets = recipe.adapter, recipe.adapter.targets
    if targets == ATTENTION:
        paths = [path for path, _ in denoiser.named_modules()]
        targets = [target for target in family.attention if any(path.endswith(f".{target}") for path in paths)]
    start = "gaussian" if adapter.factor_init == "gaussian" else True
    adapted = add_moslora(denoiser, moslora_config(adapter, task_type=None, init_lora_weights=start), targets=targets)
    if adapter.weights is not None:
        (folder,) = denoiser_adapter(Path(adapter.weights)).values()
        load_adapter(adapted, folder, trainable=True)
    if recipe.train.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()


def parameter_groups(trainable: dict[str, nn.Parameter], config: DiffusionOptimConfig) -> list[dict[str, Any]]:
    """Groups of the factors and the mixers."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trainable.items():
        label, lr, decay = "adapter", config.lr, config.weight_decay if parameter.ndim > 1 else 0.0
        if MIXERS in name:
            label, decay = "mixer", config.mixer_weight_decay
            lr = config.lr if config.mixer_lr is None else config.mixer_lr
        group = groups.setdefault(f"{label}/{decay}", {"params": [], "lr": lr, "weight_decay": decay, "name": label})
        group["params"].append(parameter)
    return list(groups.values())
