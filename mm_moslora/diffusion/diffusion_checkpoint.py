"""Checkpoints of a diffusion run: the project's folders, with one adapter per component and diffusers' file beside."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.adapters import take_adapter
from mm_moslora.adapters.folder_format import DIFFUSERS_WEIGHTS
from mm_moslora.adapters.folders.kept_start import restore_start
from mm_moslora.adapters.folders.load_folder import restore_frozen_mixers
from mm_moslora.diffusion.diffusion_export import write_lora_file
from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe
from mm_moslora.diffusion.diffusion_setup import CLASS_PICTURES, DiffusionRun
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, Saver, rank_folder
from mm_moslora.training.checkpointing.resume_choice import changed_keys, choose_checkpoint
from mm_moslora.training.checkpointing.run_checkpoints import Retention, Tidier, set_aside_newer
from mm_moslora.utils import distributed, files
from mm_moslora.utils.errors import AdapterError, CheckpointError
from mm_moslora.utils.untrusted_files import find_below, opened

logger = logging.getLogger(__name__)

STATE = "state.pt"
"""File of a rank's trainer state in a checkpoint: parameters in fp32, optimiser, schedule, loss scale."""
_SHARDED = ("base_optimizer_state", "single_partition_of_fp32_groups")
"""What a checkpoint keeps of DeepSpeed's state of ZeRO-1 and 2: tensors and numbers; the rest follows from the run."""


def find_resume(recipe: DiffusionRecipe, folder: Path, resume: str) -> tuple[Path, Manifest] | None:
    """The checkpoint to resume from; see `mm_moslora.training.checkpointing.resume_choice.find_resume`."""

    def check(checkpoint: Path, manifest: Manifest) -> None:
        changed = [*changed_keys(manifest.recipe, recipe.to_dict()).other_run]
        if manifest.world_size != distributed.world_size():
            changed.append(f"processes: {manifest.world_size} -> {distributed.world_size()}")
        if changed:
            raise CheckpointError(
                f"{checkpoint} belongs to another run: {'; '.join(changed[:6])}. Restore this, or choose another "
                f"train.output. To start from its weights: --adapter.weights {checkpoint}."
            )

    return choose_checkpoint(folder, resume, check)


class Checkpoints:
    """Saves and restores the state of a session; all ranks call each method together."""

    def __init__(
        self, run: DiffusionRun, trainable: dict[str, nn.Parameter], optimizer: Any, schedule: Any, accelerator: Any
    ) -> None:
        self.run, self.recipe, self.trainable = run, run.recipe, trainable
        self.optimizer, self.schedule, self.accelerator = optimizer, schedule, accelerator
        self.saver, self.tidier = Saver(run.folder), Tidier(run.folder)
        self.sharded = self.recipe.train.zero != "none"
        self.saved_at = -1
        """Step of the last checkpoint in the run folder."""

    def state(self) -> dict[str, Tensor]:
        """The trained parameters in fp32 on the CPU; all ranks take part."""
        if not self.sharded:
            return {name: p.detach().float().cpu().clone() for name, p in self.trainable.items()}
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).cpu().clone() for name, p in self.trainable.items()}

    def save(self) -> None:
        """Write the checkpoint of this step, and apply the retention policy."""
        run = self.run
        state = self.state()
        taken, base = {}, {"id": self.recipe.model.base, "revision": self.recipe.model.revision}
        for name in run.family.adapted_names():
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            own_frozen = dict(getattr(run.family.pipeline, name).named_parameters())
            full = {key: own.get(key, value.detach()) for key, value in own_frozen.items() if "lora_" in key}
            taken[name] = take_adapter(getattr(run.family.pipeline, name), state=full, base=base | {"component": name})
        trainer: dict[str, Any] = {"optimizer": self._optimizer_state(), "schedule": self.schedule.state_dict()}
        if self.accelerator.scaler is not None:
            trainer["scaler"] = self.accelerator.scaler.state_dict()
        if distributed.is_main():
            trainer["parameters"] = state

        def write(folder: Path) -> None:
            torch.save(trainer, rank_folder(folder) / STATE)
            if distributed.is_main():
                (folder / "config.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
                for name, adapter in taken.items():
                    adapter.write(folder / "adapter" / name)
                try:
                    write_lora_file(folder / "adapter", folder)
                except AdapterError as error:  # the file cannot express DoRA, and mixers that depend on x
                    files.discard(folder / DIFFUSERS_WEIGHTS)
                    logger.warning("The checkpoint has no %s: %s", DIFFUSERS_WEIGHTS, error)

        manifest = Manifest(
            step=run.step, world_size=distributed.world_size(), recipe=self.recipe.to_dict(),
            base=base | run.source | ({} if run.class_digest is None else {CLASS_PICTURES: run.class_digest}),
            counters=dict(run.counters), trainable={name: list(value.shape) for name, value in state.items()}, files={},
            data=run.data, precision=run.precision,
        )  # fmt: skip
        size = sum(value.numel() for value in state.values()) * 4 * 6
        self.saver.start(manifest, write, size=size)
        self.saver.finish()
        self.saved_at = run.step
        if distributed.is_main():
            self.tidier.start(Retention(last=self.recipe.train.keep_last))

    def _optimizer_state(self) -> dict[str, Any]:
        if not self.sharded:
            state: dict[str, Any] = self.optimizer.state_dict()
            return state
        zero = self.optimizer.optimizer
        state = zero.state_dict()
        return {key: state[key] for key in _SHARDED} | {"scale": float(zero.loss_scale)}

    def restore(self, folder: Path, manifest: Manifest) -> None:
        """Restore a checkpoint; training then goes on bit for bit.

        Raises:
            CheckpointError: the pictures or prompts are others.
        """
        run = self.run
        if manifest.data not in (run.data, run.batches.fingerprint(sizes_only=True)):
            raise CheckpointError(
                f"The pictures or prompts differ from those of {folder}. Restore them, or choose another train.output."
            )
        ranks = range(manifest.world_size) if self.sharded else sorted({0, distributed.rank()})
        states = {rank: _state_of(rank_folder(folder, rank)) for rank in ranks}
        own = states[distributed.rank()]
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(states[0]["parameters"][name])
        for name in run.family.adapted_names():
            restore_frozen_mixers(getattr(run.family.pipeline, name), folder / "adapter" / name)
            restore_start(getattr(run.family.pipeline, name), folder / "adapter" / name)
        if self.sharded:
            zero = self.optimizer.optimizer
            scale = own["optimizer"].pop("scale")
            parts = [zero.state_dict() | states[rank]["optimizer"] for rank in ranks]
            zero.load_state_dict(parts, load_optimizer_states=True, load_from_fp32_weights=True)
            zero.loss_scaler.cur_scale = scale
        else:
            self.optimizer.load_state_dict(own["optimizer"])
        self.schedule.load_state_dict(own["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(own["scaler"])
        run.step, run.counters = manifest.step, dict(manifest.counters)
        if folder.resolve().parent == run.folder.resolve():
            self.saved_at = run.step
            if distributed.is_main():
                set_aside_newer(run.folder, run.step)
        logger.info("Continuing from %s, step %d.", folder.name, run.step)


def _state_of(folder: Path) -> dict[str, Any]:
    """The state that a rank wrote; `weights_only` keeps a pickle from running code."""
    with opened(find_below(Path(os.path.realpath(folder)), STATE), most=None) as stream:
        state: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=True)
    return state
