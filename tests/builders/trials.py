"""Recipes of tiny runs, on one rank or several, and what they left; for the tests and for scripts/soak."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import make_language, make_records, make_vision

from mm_moslora.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    SourceConfig,
    TrackConfig,
    TrainConfig,
    VisionConfig,
)
from mm_moslora.config.run_config import OPTIMIZERS
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, Saver
from mm_moslora.utils.files import read_json
from mm_moslora.utils.run_paths import shipped_folder

STAGES = ("zero0", "zero1", "zero2", "zero3")
STEPS, HALF = 4, 2


def make_parts(folder: Path, *, records: int = 40) -> dict[str, Path]:
    """A tiny language model, a tiny vision tower, and records."""
    return {
        "language": make_language(folder / "language"),
        "vision": make_vision(folder / "vision"),
        "records": make_records(folder / "records", records),
    }


def make_recipe(
    parts: dict[str, Path], output: Path, zero: str, *, order: str = "grouped", dropout: float = 0.0, **train
) -> Recipe:
    """A tiny VLM; `train` overrides keys of the recipe's `train`."""
    settings = {
        "output": str(output), "steps": STEPS, "global_batch": 8, "micro_batch": 4, "zero": zero, "precision": "fp32",
        "timeout_minutes": 5, "rehearsal": False,
    }  # fmt: skip
    source = SourceConfig(path=str(parts["records"]), image_folder=str(parts["records"].parent / "images"))
    return Recipe(
        name=output.name,
        model=ModelConfig(language=str(parts["language"]), vision=VisionConfig(name=str(parts["vision"]))),
        adapter=AdapterConfig(rank=4, alpha=8, dropout=dropout, mixer_init="kaiming"),
        data=DataConfig(train=[source], order=order, max_length=256),
        optim=OptimConfig(lr=1e-3, projector_lr=5e-3, warmup=1),
        train=TrainConfig(**(settings | train)),
        track=TrackConfig(trackers=[]),
    )


def divided_weights(path: Path) -> str:
    """Settings of a ZeRO-3 that divides small weights, too."""
    settings = read_json(shipped_folder("deepspeed_configs") / "zero3.json")
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(settings))
    return str(path)


def with_train(recipe: Recipe, **changes) -> Recipe:
    """The same with other keys of `train`."""
    return replace(recipe, train=replace(recipe.train, **changes))


def bounded(recipe: Recipe, micro_batch: int, **train) -> Recipe:
    """The same with at most two of its pictures in a micro-batch, by their tokens."""
    short = replace(recipe, data=replace(recipe.data, max_length=64))
    return with_train(short, micro_batch=micro_batch, micro_tokens=128, **train)


def full(recipe: Recipe) -> Recipe:
    """The same with a language model that trains whole, without adapters."""
    return replace(recipe, model=replace(recipe.model, language_mode="full"))


def with_optimizer(recipe: Recipe, name: str) -> Recipe:
    """The same with another optimiser; a test without its package is skipped."""
    package = OPTIMIZERS[name].package
    if package:  # bitsandbytes before 0.50 steps on GPUs only
        pytest.importorskip(package, minversion="0.50", reason=f"optim.optimizer {name} needs {package}")
    return replace(recipe, optim=replace(recipe.optim, optimizer=name, schedule="constant"))


def colour_task(images: Path, folder: Path) -> str:
    """Questions about pictures, as a task of the harness; short answers, since a tiny model does not stop by itself."""
    rows = [
        {"question_id": path.stem, "image": path.name, "text": "what is the color?", "answer": "red"}
        for path in sorted(images.glob("*.png"))
    ]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "llava", "path": "colours.jsonl", "image_folder": str(images)}
    path = folder / "colours.yaml"
    path.write_text(json.dumps({"name": "colours", "source": source, "decoding": {"max_new_tokens": 4}}))
    return str(path)


def write_questions(records: Path, *files: Path, count: int | None = None) -> list[dict[str, str]]:
    """Questions on the colours of pictures of records, as question files; gives their rows."""
    rows = [
        {"question_id": row["id"], "image": row["image"], "text": "what is the color?",
         "answer": row["conversations"][1]["value"]}
        for row in map(json.loads, records.read_text().splitlines()) if "image" in row
    ][:count]  # fmt: skip
    for file in files:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write(recipe: Recipe, name: str = "") -> str:
    """Write a recipe beside its run folder; gives the path."""
    output = Path(recipe.train.output)
    path = output.with_name(f"{name or output.name}.yaml")
    path.write_text(recipe.to_yaml())
    return str(path)


def commit(run: Path, manifest: Manifest, write: Callable[[Path], None]) -> Path:
    """Write one checkpoint and wait for it."""
    saver = Saver(run)
    saver.start(manifest, write)
    return saver.finish()


def metrics(run: Path) -> list[dict[str, float]]:
    """The records of all steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def train_fp16(*arguments: str) -> int:
    """Train with the accelerator's claim that it cannot do fp16 taken back: this CPU can, only slowly."""
    from deepspeed.accelerator import get_accelerator
    from ranks import train_recipes

    get_accelerator().is_fp16_supported = lambda: True
    return train_recipes(list(arguments))


def train_overflowing(*arguments: str) -> int:
    """Train in fp16 with gradients that overflow at any loss scale, below a loss that is finite."""
    import torch

    from mm_moslora.training.engine import LossModule

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    forward = LossModule.forward
    LossModule.forward = lambda self, *args, **more: Overflow.apply(forward(self, *args, **more))
    return train_fp16(*arguments)


def train_counting(*arguments: str) -> int:
    """Train each recipe, and leave in its folder how many adapted layers went by the kernel and how many by modules.

    Passes without a gradient, such as those of a validation, are not counted.
    """
    import torch
    from ranks import train_recipes

    from mm_moslora.adapters.layers.lora_variants import MoSLoRAVariant
    from mm_moslora.config import load_recipe
    from mm_moslora.kernels.lora.lora_linear import TENSORS, _FusedLinears

    counts = {"fused": 0, "modules": 0}
    fused, modules = _FusedLinears.apply, MoSLoRAVariant.forward

    def by_kernel(*args):
        counts["fused"] += torch.is_grad_enabled() * ((len(args) - 2) // TENSORS)
        return fused(*args)

    def by_modules(*args, **kwargs):
        counts["modules"] += torch.is_grad_enabled()
        return modules(*args, **kwargs)

    _FusedLinears.apply, MoSLoRAVariant.forward = by_kernel, staticmethod(by_modules)
    for argument in arguments:
        counts.update(fused=0, modules=0)
        code = train_recipes([argument])
        if code:
            return code
        (Path(load_recipe(argument).train.output) / "kernel.json").write_text(json.dumps(counts))
    return 0


def train_unseeing(*arguments: str) -> int:
    """Train models with zeros as visual tokens, whatever the picture."""
    import torch
    from ranks import train_recipes

    from mm_moslora.models import vlm

    features = vlm.image_features
    vlm.image_features = lambda *args, **kwargs: torch.zeros_like(features(*args, **kwargs))
    return train_recipes(list(arguments))


def hexed(run: Path) -> list[str]:
    return [value.hex() for value in losses(run)]


def weights(run: Path, step: int = STEPS) -> dict[str, str]:
    """Hashes of everything that was trained, by file."""
    files = json.loads((run / f"checkpoint-{step:06d}" / "manifest.json").read_text())["files"]
    return {
        name: entry["sha256"]
        for name, entry in files.items()
        if name.endswith(".safetensors") and not name.startswith("trainer/")
    }


def train_estimating(*arguments: str) -> int:
    """Train with estimated lengths that count the pictures alone, as if a text had no tokens."""
    from ranks import train_recipes

    from mm_moslora.data.batch_loader import BatchLoader
    from mm_moslora.data.training_set import TrainingSet

    def evened(self, batches, to_all=BatchLoader._evened):
        found = to_all(self, batches)
        if len(found) > len(batches):
            print(f"evened from {len(batches)} to {len(found)}", flush=True)
        return found

    BatchLoader._evened = evened
    TrainingSet.__init__ = functools.partialmethod(TrainingSet.__init__, exact_limit=0)
    TrainingSet._tokens_per_character = lambda self: 0.0
    return train_recipes(list(arguments))


def sum_gradients(output: str, *stages: str) -> int:
    """Write the relative error of a step's gradients in bf16, summed over 64 micro-batches of each rank, by stage.

    It is that of the sums alone: the exact ones are fp64 sums of the same gradients.
    """
    import torch

    from mm_moslora.batch import Batch, Example
    from mm_moslora.models.vision.feature_cache import StepFeatureCache
    from mm_moslora.training.engine import OptimizerSettings, build_engine
    from mm_moslora.training.parameter_groups import parameter_groups
    from mm_moslora.utils import distributed

    class Tiny(torch.nn.Module):
        """A one-layer language model in place of `LossModule`."""

        def __init__(self) -> None:
            super().__init__()
            self.pictures, start = StepFeatureCache(), torch.Generator().manual_seed(0)
            self.embed, self.head = (torch.nn.Parameter(torch.randn(16, 8, generator=start)) for _ in range(2))
            self.lora_mixer = torch.nn.Parameter(torch.randn(8, 8, generator=start) / 8**0.5)

        def forward(self, batch: Batch, needs_vision: bool = False, right: Any = None) -> torch.Tensor:
            hidden = torch.tanh(self.embed[batch.input_ids[batch.target_positions]] @ self.lora_mixer)
            return torch.nn.functional.cross_entropy((hidden @ self.head.t()).float(), batch.targets, reduction="sum")

    def batches(rank: int) -> list[Batch]:
        words = torch.Generator().manual_seed(rank)
        ids = [torch.randint(0, 16, (5 + number % 7,), generator=words) for number in range(64)]
        return [
            Batch.from_examples([Example(id="", input_ids=row, supervised=torch.ones(len(row)).bool())]) for row in ids
        ]

    world, model = distributed.world_size(), Tiny().bfloat16()
    everything = [batch for rank in range(world) for batch in batches(rank)]
    count, exact = sum(batch.supervised_tokens for batch in everything), {}
    for batch in everything:
        model.zero_grad()
        (model(batch) * (world / count)).backward()
        for name, parameter in model.named_parameters():
            exact[name] = exact.get(name, 0) + parameter.grad.double().flatten() / world
    errors = {}
    for stage in stages:
        module = Tiny().bfloat16()
        settings = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=0.0)
        config = TrainConfig(micro_batch=1, global_batch=64 * world, zero=stage)
        groups = parameter_groups(module, OptimConfig(lr=0.0))
        engine = build_engine(module, groups, config, precision="bf16", optimizer=settings)
        engine.step(batches(distributed.rank()), 1.0)
        squares = [0.0, 0.0]
        for shard in engine.shards():  # a rank's part; Adam's first moment is a tenth of the gradient
            found = shard.moments["exp_avg"].double().flatten() * 10
            wanted = exact[shard.name][shard.start : shard.start + len(found)]
            squares = [squares[0] + float((found - wanted).square().sum()), squares[1] + float(wanted.square().sum())]
        off, whole = distributed.sum_over_ranks(squares)
        errors[Path(stage).name] = (off / whole) ** 0.5
        engine.close()
    if distributed.is_main():
        Path(output).write_text(json.dumps(errors))
    return 0


def train_measured(*arguments: str) -> int:
    """Train each recipe with the evaluation harness at hand, as the command line does."""
    from mm_moslora_eval.run.in_training import measure

    from mm_moslora.config import load_recipe
    from mm_moslora.training.training_loop import train

    for path in arguments:
        train(load_recipe(path), measure=measure)
    return 0
