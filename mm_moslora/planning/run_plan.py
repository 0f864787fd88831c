"""Memory, time and cost of a run before it starts, from a recipe and a list of GPUs; only configurations are read.

A setting fits when its largest micro-batch does: examples of `data.max_length` tokens, or full packed rows, up to
`train.micro_batch` and `train.micro_tokens`. Time is that of mean examples. Formulas and checks: docs/planning.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from mm_moslora.config import Recipe, SourceConfig
from mm_moslora.config.run_config import OPTIMIZERS
from mm_moslora.models.meta_model import size_decides
from mm_moslora.models.pretrained_vlm import PICTURE
from mm_moslora.training.deepspeed_presets import ZeroSettings
from mm_moslora.training.engine import check_file, refuse_ranks
from mm_moslora.training.metrics.gpu_memory import FREE_SHARE, Memory, StepMemory
from mm_moslora.training.metrics.gpu_specs import Gpus
from mm_moslora.training.metrics.model_cost import Flops, ModelCost, StepShape, model_cost
from mm_moslora.training.preflight import check_model, check_zero
from mm_moslora.utils.errors import ConfigError

STAGES = ("zero1", "zero2", "zero3")

KNOWN_DATA = {
    "llava_v1_5_mix665k": (665_298, 838, 0.939), "blip_laion_cc_sbu_558k": (558_128, 620, 1.0),
    "commonsense_170k": (170_420, 110, 0.0),
}  # fmt: skip
"""Data file: samples, mean tokens per sample with 576 visual ones (assumed lengths), share with a picture."""
LLAVA_VISUAL = 576
LAUNCHES_FORWARD, LAUNCHES = 58, 161
"""Kernels of a lean decoder layer with seven adapted linear layers: forward, and with the backward pass."""
LAUNCH_SECONDS = 10e-6
"""Time in which a host launches one kernel of PyTorch, with autograd's own work (not measured here)."""


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Size of an epoch."""

    samples: int
    tokens: float
    """Mean tokens per sample, visual tokens included."""
    supervised: float = 0.15
    """Share of the tokens."""
    pictures: float = 1.0
    """Mean per sample."""
    per_row: float = 1.0
    """Samples in a packed row (`data.pack_tokens`); batch sizes then count rows, and rows are assumed full."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One setting with its estimate."""

    step: StepMemory = field(repr=False)
    micro_batch: int
    most: int | None
    """Most tokens of a micro-batch, where that is less than `micro_batch` of the longest examples."""
    memory: Memory
    """Memory of the largest micro-batch."""
    tokens_per_second: float
    """Over all GPUs, at the middle of the expected utilisation."""
    fits: bool
    main_memory: float
    """Main memory of the first host, bytes; see `StepMemory.main_memory`."""
    generating: float
    """Memory of a validation that generates, bytes; see `StepMemory.generating`. 0: none does."""

    @property
    def zero(self) -> str:
        """See `StepMemory.zero`."""
        return self.step.zero

    @property
    def checkpointing(self) -> bool | int:
        """See `StepMemory.checkpointing`."""
        return self.step.checkpointing

    @property
    def peak(self) -> float:
        """Bytes on one GPU, validations included."""
        return max(self.memory.total, self.generating)

    @property
    def label(self) -> str:
        """Display name."""
        most = "" if self.most is None else f" up to {self.most:,} tokens"
        some = "" if self.checkpointing is True else f" of {self.checkpointing} layers"
        again = f", checkpointing{some}" if self.checkpointing else ""
        again += ", offload" if self.step.offload else ""
        return f"{Path(self.zero).name}, micro-batch {self.micro_batch}{most}{again}"


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The fastest setting that fits, and all other settings."""

    gpus: Gpus
    cost: ModelCost
    picture: tuple[int, int] | None
    """Width and height of a typical picture; None: every picture costs the same."""
    data: DataSize
    epochs: float
    flops: Flops
    """FLOPs of a mean sample, with the recomputation of the chosen setting."""
    best: Option | None
    options: list[Option]
    idle: int
    """GPUs without a record in a step, when a step has fewer records than GPUs."""
    own: Option
    """The recipe's own setting."""
    remedy: str
    """Change that would make the recipe fit, or use the memory, as a sentence; empty where there is none."""

    def hours(self, option: Option) -> float:
        """Wall time of the run."""
        return self.data.samples * self.data.tokens * self.epochs / option.tokens_per_second / 3600


def known_data(sources: Sequence[SourceConfig], tokens_per_image: int) -> DataSize | None:
    """Size of the first source that is a well-known data file; None: there is none."""
    for source in sources:
        size = KNOWN_DATA.get(Path(source.path).stem)
        if size:
            samples, tokens, pictures = size
            mean = tokens + (tokens_per_image - LLAVA_VISUAL) * pictures
            return DataSize(samples=samples, tokens=mean, pictures=pictures)
    return None


def utilisation(gpus: Gpus, size: ModelCost) -> float:
    """Share of the peak that executed FLOPs reach; published runs lie within a fifth of these figures."""
    decoder, newer = size.counter.decoder, gpus.peak > 5e14
    if not decoder.trained and not decoder.adapters:
        return 0.43 if newer else 0.48
    if size.is_lean:
        return 0.40 if newer else 0.45
    return 0.30 if newer else 0.33


def speed(step: StepMemory, gpus: Gpus, data: DataSize, *, samples: float, number: float = 1.0) -> float:
    """Tokens per second over all GPUs with mean micro-batches of so many samples, `number` of a GPU in a step."""
    # ZeRO-3's gathers overlap with computation as far as possible, the exchange of gradients does not. Weights of a
    # quantised base are made dense in every pass over the decoder. A micro-batch takes at least the time in which its
    # passes read the weights, and in which the host launches its kernels.
    size, zero, again = step.size, step.settings, step.share_again
    work = _flops(size, data, samples, checkpointing=again).total
    peak = gpus.peak_fp32 if size.value_bytes == 4 else gpus.peak
    computing = work / (peak * utilisation(gpus, size)) + (2 + again) * size.dequantised / gpus.memory_bandwidth
    reading = (2 + again) * size.weight_bytes / gpus.memory_bandwidth
    seconds = max(computing, reading, size.runs * (LAUNCHES + again * LAUNCHES_FORWARD) * LAUNCH_SECONDS)
    if zero is not None and gpus.count > 1:
        gathers, gradients = _exchange(step, zero, gpus, number=number)
        seconds = max(seconds, gathers) + gradients
    return gpus.count * samples * data.tokens / seconds


def _exchange(step: StepMemory, zero: ZeroSettings, gpus: Gpus, *, number: float) -> tuple[float, float]:
    """Seconds of a micro-batch in which ZeRO-3 gathers weights, and in which gradients and updates are exchanged."""
    trained = step.size.trainable * step.size.value_bytes
    if zero.stage < 2:
        return 0.0, 2 * trained / number / gpus.across
    if zero.stage == 2:  # gradients of every micro-batch
        return 0.0, trained * (1 + 1 / number) / gpus.across
    fetched, copies = (2 + step.share_again) * step.fetched, zero.secondary
    # Without second copies, all weights come from all GPUs; else only updated ones do, once a step.
    first = fetched if copies == 1 else min(trained, step.fetched) / number
    gathers = first * (1 - 1 / gpus.count) / gpus.across + (fetched - first) * (1 - 1 / copies) / gpus.bandwidth
    return gathers, trained / gpus.across


def busy_share(global_batch: int, gpus: int) -> float:
    """Busy share of the GPUs' time: where records cannot be divided evenly, all wait for the GPU with the most."""
    return global_batch / (gpus * math.ceil(global_batch / gpus))


def _flops(size: ModelCost, data: DataSize, count: float, *, checkpointing: float) -> Flops:
    shape = StepShape(
        tokens=round(count * data.tokens), supervised=round(count * data.tokens * data.supervised),
        pairs=count * data.tokens * (data.tokens + 1) / 2, images=count * data.pictures,
    )  # fmt: skip
    return size.counter.count(shape, checkpointing=checkpointing, vision_checkpointing=True)


def _simplest(options: list[Option]) -> Option | None:
    """Order of about equally fast settings: ZeRO-2, 1, 3, then the larger micro-batch (fewer, larger kernels)."""
    order = {"zero0": 0, "zero2": 0, "zero1": 1, "zero3": 2}
    return min(options, key=lambda o: (bool(o.checkpointing), order[o.zero], -o.micro_batch), default=None)


def settings(
    global_batch: int, gpus: Gpus, *, together: int = 1, optimizer: str = "adamw"
) -> Iterator[tuple[str, bool, int]]:
    """ZeRO stage, checkpointing and micro-batch to try; the global batch is kept, and `together` ranks share a row."""
    share = max(1, global_batch * together // gpus.count)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= share and global_batch % size == 0]
    stages = STAGES if gpus.count > 1 and not OPTIMIZERS[optimizer].whole_because else ("zero0",)
    for zero in stages:
        for checkpointing in (False, True):
            for micro_batch in sizes:
                yield zero, checkpointing, micro_batch


def plan(
    recipe: Recipe, gpus: Gpus, data: DataSize | None = None, *, picture: tuple[int, int] | None = None
) -> RunPlan:
    """Try every setting and choose the fastest that fits.

    Args:
        gpus: from `parse_gpus`.
        data: size of the data; None: `known_data`.
        picture: width and height of a typical picture, for models that cut pictures into tiles or take them in any
            size; None: `PICTURE`.
    """
    train, varies = recipe.train, size_decides(recipe.model)
    if picture is not None and not varies:
        raise ConfigError(
            f"A picture of {picture[0]} x {picture[1]} pixels is asked for, but this model turns every picture into "
            "one square of the same size. Leave --image-size out."
        )
    size = _checked_cost(recipe, gpus, picture or PICTURE)
    data = _epoch(recipe, data or known_data(recipe.data.train, size.tokens_per_image))
    option, together = partial(_option, recipe, gpus, size, data), train.sequence_parallel
    options = [
        option(*setting)
        for setting in settings(train.global_batch, gpus, together=together, optimizer=recipe.optim.optimizer)
    ]
    own = option(
        recipe.for_ranks(gpus.count).train.zero, train.gradient_checkpointing,
        min(train.micro_batch, _share(recipe, gpus)), offload=train.activation_offload,
    )  # fmt: skip
    fitting = [option for option in options if option.fits]
    # Estimates are good to a fifth (see `utilisation`), so a difference of 2 % decides nothing.
    best = _simplest([o for o in fitting if o.tokens_per_second >= 0.98 * max(f.tokens_per_second for f in fitting)])
    return RunPlan(
        gpus=gpus, cost=size, picture=(picture or PICTURE) if varies else None, data=data,
        epochs=train.steps * train.global_batch * data.per_row / data.samples if train.steps else train.epochs,
        flops=_flops(size, data, 1, checkpointing=float(best.checkpointing) if best else 0.0),
        best=best, options=options, idle=max(0, gpus.count - together * train.global_batch), own=own,
        remedy=_remedy(recipe, gpus, own),
    )  # fmt: skip


def _checked_cost(recipe: Recipe, gpus: Gpus, picture: tuple[int, int]) -> ModelCost:
    """The cost of the recipe's model, after the checks that a run on these GPUs makes."""
    train, chosen = recipe.train, recipe.for_ranks(gpus.count)
    in_fp32 = train.precision == "fp32" or (train.precision == "auto" and not gpus.has_bf16)
    size = model_cost(
        recipe.model, recipe.adapter, vision_checkpointing=train.vision_gradient_checkpointing, picture=picture,
        dtype=torch.float32 if in_fp32 else torch.bfloat16,
    )  # fmt: skip
    refuse_ranks(chosen.train, gpus.count)
    check_zero(chosen)
    if chosen.train.zero.endswith(".json"):
        resolved = "fp32" if in_fp32 else "bf16" if train.precision == "auto" else train.precision
        check_file(chosen.train, precision=resolved, max_grad_norm=recipe.optim.max_grad_norm, trains_here=False)
    check_model(recipe, size.model, layers=size.layers)
    return size


def _epoch(recipe: Recipe, data: DataSize | None) -> DataSize:
    """The size of an epoch of examples that are cut, packed and supervised as the recipe says."""
    if data is None:
        raise ConfigError("The size of the data is not known. Give --samples and --tokens-per-sample.")
    tokens = min(data.tokens, recipe.data.max_length)
    supervised = 1.0 if recipe.data.train_on == "all" else data.supervised
    return replace(data, tokens=tokens, per_row=max(1.0, recipe.data.pack_tokens / tokens), supervised=supervised)


def _share(recipe: Recipe, gpus: Gpus) -> int:
    """Of a step's rows, the most that a rank gets."""
    return math.ceil(recipe.train.global_batch * recipe.train.sequence_parallel / gpus.count)


def _option(
    recipe: Recipe, gpus: Gpus, size: ModelCost, data: DataSize, zero: str, checkpointing: bool | int,
    micro_batch: int, *, offload: bool = False,
) -> Option:  # fmt: skip
    """The estimate of one setting."""
    train, longest, together = recipe.train, recipe.data.longest, recipe.train.sequence_parallel
    step = StepMemory(
        size=size, zero=zero, world=gpus.count, checkpointing=checkpointing, offload=offload, together=together,
        optimizer=recipe.optim.optimizer,
    )  # fmt: skip
    budget = train.micro_tokens or step.token_budget(gpus.memory, longest=longest) or longest
    tokens = min(budget, micro_batch * longest)
    needed = step.worst(tokens)
    generating = step.generating if recipe.validate.samples or recipe.validate.tasks else 0.0
    samples = min(micro_batch * data.per_row, budget / data.tokens)
    number = max(1.0, _share(recipe, gpus) * data.per_row / samples)
    busy = busy_share(train.global_batch, max(1, gpus.count // together))
    return Option(
        step=step, micro_batch=micro_batch, most=tokens if tokens < micro_batch * longest else None, memory=needed,
        tokens_per_second=busy * speed(step, gpus, data, samples=samples / together, number=number),
        fits=max(needed.total, generating) <= FREE_SHARE * gpus.memory, generating=generating,
        main_memory=step.main_memory(packed=recipe.model.quantisation != "none"),
    )  # fmt: skip


def _remedy(recipe: Recipe, gpus: Gpus, own: Option) -> str:
    step = own.step
    if own.generating and (reason := step.cannot_generate(gpus.memory)):
        return reason
    budget, fits = recipe.train.micro_tokens or 0, step.token_budget(gpus.memory, longest=recipe.data.longest)
    if own.fits:
        small = 0 < 2 * budget < min(fits, own.micro_batch * recipe.data.longest)
        return f"train.micro_tokens is {budget}, and {fits} fit, which is faster: leave it out." if small else ""
    if fits:
        return f"train.micro_tokens up to {fits} fits, or leave it out."
    change = step.remedies(gpus.memory, longest=recipe.data.longest, key=recipe.data.longest_key)
    return f"To make it fit, {change}."
