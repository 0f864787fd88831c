"""The contents of a checkpoint: copied, so that they can be written while training continues."""

# Each rank writes its shards of flat parameters as safetensors, and any number of ranks on any ZeRO stage reads what it
# needs from all files. Nothing here needs pickle.

from __future__ import annotations

import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mm_moslora import adapters
from mm_moslora.adapters.peft_methods import MethodSnapshot
from mm_moslora.data.preprocessing_print import write_preprocessing
from mm_moslora.data.training_stream import TrainingStream
from mm_moslora.models.processing.anyres import NEWLINE
from mm_moslora.models.processing.llava_processor import save_processor
from mm_moslora.models.trainable_parts import component_of
from mm_moslora.models.vlm import is_multimodal
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, rank_folder
from mm_moslora.training.engine import TrainingEngine
from mm_moslora.training.run_setup import Run, RunParts
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import CheckpointError, DataError
from mm_moslora.utils.untrusted_data import parse_json
from mm_moslora.utils.untrusted_files import read_text_below

logger = logging.getLogger(__name__)

MASTER = "master"
OPTIMIZER, OPTIMIZER_DETAILS = "optimizer.safetensors", "optimizer.json"
PROJECTOR = "model.multi_modal_projector."
_COMPONENTS = ("vision", "language")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run's state at one step, in main memory; later steps do not change it."""

    run: Run
    manifest: Manifest
    weights: dict[str, Tensor]
    """fp32 masters of all trained parameters, in full; on rank 0 only."""
    adapter: adapters.AdapterSnapshot | MethodSnapshot | None
    """Adapter tensors, made from `weights`; on rank 0 only."""
    optimizer: OptimizerState
    """This rank's part of the optimiser state."""
    random_state: RandomState

    @property
    def size(self) -> int:
        """Estimate of the bytes that this rank will write."""
        return self.optimizer.bytes + sum(value.nbytes for value in self.weights.values())

    def write(self, folder: Path) -> None:
        """Write this rank's part into a checkpoint's folder; see `Saver.start`."""
        if distributed.is_main():
            write_model(self.run, folder, weights=self.weights, adapter=self.adapter)
        own = rank_folder(folder)
        self.optimizer.write(own)
        self.random_state.write(own)


def snapshot(run: Run) -> Snapshot:
    """Copy a run's state; all ranks take part."""
    place = run.training_set.place(run.step) if isinstance(run.training_set, TrainingStream) else {}
    read = distributed.gather_objects(place["taken"]) if place else []
    if any(taken != read[0] for taken in read):
        raise DataError(
            f"The ranks have read different numbers of records from the sources of data.train: {read}, by rank. One of "
            "them could not read a file or picture that others could; its output says which. Bring it back; the same "
            "command goes on from the last checkpoint."
        )
    weights = run.engine.trainable_state(keep=distributed.is_main())
    expected = {name for name, parameter in run.assembly.model.named_parameters() if parameter.requires_grad}
    if set(weights) != expected:
        odd = sorted(set(weights) ^ expected)
        raise CheckpointError(f"The weights to save are not the trained weights; they differ in {odd[:4]}.")
    manifest = run.manifest(weights, run.training_set.fingerprint, place=place, micro_tokens=run.limit.tokens)
    if not distributed.is_main():
        weights = {}
    else:
        weights |= {name: value.detach().cpu().clone() for name, value in moving_statistics(run.assembly.model).items()}
    adapter: adapters.AdapterSnapshot | MethodSnapshot | None = None
    if distributed.is_main() and run.assembly.peft_model is not None:
        # Read here and not in the writing thread: under ZeRO-3, reading a weight during a forward pass starts a gather,
        # in which the other ranks do not take part.
        chosen = {name: value for name, value in weights.items() if adapters.is_adapter_parameter(name)}
        if run.recipe.adapter.peft:
            adapter = adapters.method_snapshot(run.assembly.peft_model, state=chosen)
        else:
            adapter = adapters.adapter_snapshot(run.assembly.peft_model, state=chosen, base=run.assembly.base)
    return Snapshot(
        run=run, manifest=manifest, weights=weights, adapter=adapter,
        optimizer=OptimizerState.copy_of(run.engine), random_state=RandomState.now(),
    )  # fmt: skip


def moving_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of trained normalisation layers: buffers, which are trained state all the same."""
    return {
        f"{prefix}.{name}": buffer
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        for name, buffer in module.named_buffers(recurse=False)
    }


def write_model(
    run: RunParts,
    folder: Path,
    *,
    weights: dict[str, Tensor],
    adapter: adapters.AdapterSnapshot | MethodSnapshot | None,
) -> None:
    """Write the part of a checkpoint for use; it reads no weight of the live model, which may be training meanwhile."""
    state, assembly = weights, run.assembly
    model = assembly.model
    (folder / "config.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    if adapter is not None:
        adapter.write(folder / "adapter")
    if is_multimodal(model) and not assembly.is_pretrained_vlm:
        trained = {name.removeprefix(PROJECTOR): value for name, value in state.items() if name.startswith(PROJECTOR)}
        newline = state.get(f"model.{NEWLINE}")
        trained |= {} if newline is None else {NEWLINE: newline}
        save_file(_contiguous(run.frozen_projector | trained), folder / "projector.safetensors")
    for component in (*_COMPONENTS, *(("projector",) if assembly.is_pretrained_vlm else ())):
        # A projector inside an adapted tower has its weights below the adapters; the base model has other names.
        part = {
            name.replace(".base_layer.", "."): value for name, value in state.items() if component_of(name) == component
        }
        if part:
            save_file(_contiguous(part), folder / f"{component}.safetensors")
    if assembly.processor is not None:
        save_processor(assembly.processor, folder / "processor")
    else:
        assembly.tokenizer.save_pretrained(folder / "processor")
    write_preprocessing(run.preprocessing, folder)


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in state.items()}


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """A copy of this rank's part of the optimiser state in main memory."""

    tensors: dict[str, Tensor]
    """`KIND.START.NAME` to flat values."""
    steps: dict[str, float]
    """Steps by parameter name, where the optimiser counts them."""
    scaler: dict[str, float]
    """Dynamic loss scale (fp16)."""

    @classmethod
    def copy_of(cls, engine: TrainingEngine) -> OptimizerState:
        """Copy; where every rank holds the whole state, each takes every n-th parameter."""
        shards, tensors = engine.shards(), {}
        if engine.replicated:
            shards = shards[distributed.rank() :: distributed.world_size()]
        for shard in shards:
            for kind, value in {MASTER: shard.master, **shard.moments}.items():
                tensors[f"{kind}.{shard.start}.{shard.name}"] = value.detach().to("cpu", copy=True).contiguous()
        steps = {shard.name: shard.step for shard in shards if shard.step is not None}
        return cls(tensors=tensors, steps=steps, scaler=engine.scaler_state())

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, folder: Path) -> None:
        """Write both files into a folder that exists."""
        save_file(self.tensors, folder / OPTIMIZER)
        details = {"steps": self.steps, "scaler": self.scaler}
        (folder / OPTIMIZER_DETAILS).write_text(json.dumps(details), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """The random generators of this rank."""

    tensors: dict[str, Tensor]
    python: str

    @classmethod
    def now(cls) -> RandomState:
        """Their current state."""
        tensors = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        version, words, gauss = random.getstate()
        return cls(tensors=tensors, python=json.dumps([version, list(words), gauss]))

    def restore(self) -> None:
        """Restore this state."""
        torch.set_rng_state(self.tensors["torch"])
        if "cuda" in self.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.tensors["cuda"])
        version, words, gauss = parse_json(self.python)
        random.setstate((version, tuple(words), gauss))

    def write(self, folder: Path) -> None:
        """Write it as safetensors and JSON."""
        save_file(self.tensors, folder / "random.safetensors")
        (folder / "random.json").write_text(self.python, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RandomState:
        """Read what `write` wrote."""
        python = read_text_below(folder, "random.json") or ""
        return cls(tensors=load_file(folder / "random.safetensors"), python=python)
