"""Measure one contender of the GPU benchmark in this process; `gpu.py` starts it.

Figures of a row: seconds of whole optimiser steps (CUDA events; median of ten after three warm-ups), real tokens per
second, useful MFU, peak memory, kernels of a step, share of a step in which the device works, gradient errors.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import BY_NAME, Contender, Way
from gpu_batches import SHAPES, STEPS, WARM_UP, Clock, GpuShape, batches_of, split
from gpu_decode import decoding_row
from harness import end_with_parent
from llava_models import (
    LeftOutError,
    Runner,
    Shape,
    adapted_layers,
    gradients_of,
    hf,
    hf_best,
    mixer_of,
    needed_flops,
    ours,
    padded,
    with_peft,
)
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mm_moslora.batch import Example
from mm_moslora.config import OptimConfig, TrainConfig
from mm_moslora.models.precision import run_arithmetic
from mm_moslora.training.engine import OptimizerSettings, build_engine
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.utils import distributed

Step = Callable[[Sequence[Any]], Tensor | float]
"""One optimiser step on prepared micro-batches; gives the loss."""
BUILDERS: dict[str, Callable[[Shape, Way, torch.device], Runner]] = {"hf": hf, "hf-best": hf_best, "ours": ours}
FEWEST = 3
"""Steps that are measured although the time is over."""
MOST_PARTS = 8
"""Micro-batches that a batch is split into at most, where memory does not suffice for fewer."""


def ceilings(clock: Clock) -> dict[str, float]:
    """The device's fastest matrix product and copy: TFLOP/s in bf16, and TB/s read and written."""
    small = clock.device.type == "cpu"
    size, room = (256, 2**22) if small else (8192, 2**30)
    left, right = (torch.randn(size, size, device=clock.device).to(torch.bfloat16) for _ in range(2))
    out, source = torch.empty_like(left), torch.randint(256, (room,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    product = clock.median(lambda: torch.mm(left, right.t(), out=out))
    copy = clock.median(lambda: target.copy_(source))
    return {"peak_tflops": 2 * size**3 / product / 1e12, "copy_tbs": 2 * room / copy / 1e12}


def build(shape: Shape, contender: Contender, device: torch.device) -> Runner:
    """A contender's model and its loss."""
    if contender.kind != "ours":
        return BUILDERS[contender.kind](shape, contender, device)
    distributed.join()
    return replace(ours(shape, contender, device), around=partial(run_arithmetic, deterministic=False))


def step_of(runner: Runner, contender: Contender) -> Step:
    """A contender's optimiser step: of this project's engine, or as transformers' Trainer does it."""
    if runner.module is not None:
        return engine_step(runner, contender.zero)
    trained = [parameter for parameter in runner.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=trained[0].is_cuda)

    def step(micro_batches: Sequence[Any]) -> Tensor:
        total = torch.zeros((), device=trained[0].device)
        for batch in micro_batches:
            part = runner.loss(batch) / len(micro_batches)
            part.backward()
            total += part.detach()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def engine_step(runner: Runner, zero: str) -> Step:
    """A step of `mm-moslora train`."""
    engine = build_engine(
        runner.module, parameter_groups(runner.module, OptimConfig()), TrainConfig(zero=zero), precision="bf16",
        optimizer=OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0),
    )  # fmt: skip

    def step(micro_batches: Sequence[Any]) -> float:
        with runner.around():
            result = engine.step(micro_batches, 1.0)
        assert result.applied, "the step was skipped: a loss or gradient is not finite"
        return result.loss

    return step


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def launched(clock: Clock, step: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Kernels of a step that takes some seconds without the profiler, which takes time itself, and the share of them
    in which at least one works; on a CPU PyTorch's operators."""
    on_cpu = clock.device.type == "cpu"
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as profiled:
        clock.timed(step)
    events = [
        event
        for event in profiled.events() or ()
        if event.device_type == (DeviceType.CPU if on_cpu else DeviceType.CUDA)
        and not getattr(event, "is_user_annotation", False)
        and (event.name.startswith("aten::") if on_cpu else not event.name.endswith(" Sync"))
    ]
    if not events:
        raise RuntimeError("the profiler saw no kernel")
    busy = covered((event.time_range.start, event.time_range.end) for event in events) / 1e6
    kernels = sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)
    return {"kernels": kernels, "busy": min(1.0, busy / seconds)}


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reference(shape: Shape, device: torch.device, items: Sequence[Example]) -> dict[str, Tensor]:
    """Gradients in fp64: transformers' layers, PEFT's LoRA with a mixer as one more layer, one conversation at a time.

    RMS norms, the rotation's angles and the softmax of the loss are in fp32, as transformers has them.
    """
    model, wrapped = with_peft(shape, Way(), device)
    for layer in adapted_layers(model):
        mixer_of(layer)
    model.double()
    whole = sum(int(item.supervised[1:].sum()) for item in items)
    for item in items:
        share = int(item.supervised[1:].sum()) / whole
        (wrapped(**padded(model, [item], device, torch.float64), use_cache=False).loss * share).backward()
    return gradients_of(model)


def gradient_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Relative differences ``|g - e| / |e|`` of the gradients of factors: median, worst, and the worst one's name."""
    wanted = [name for name in expected if "lora_A" in name or "lora_B" in name]
    if missing := [name for name in wanted if name not in found]:
        raise RuntimeError(f"{len(missing)} factors have no gradient, {missing[0]} among them.")
    errors = {
        name: float((gradient.double() - expected[name]).norm() / expected[name].norm())
        for name, gradient in found.items()
        if "lora_" in name
    }
    if bad := [name for name, error in errors.items() if not math.isfinite(error)]:
        raise RuntimeError(f"{len(bad)} gradients are not finite, {bad[0]} among them.")
    ordered, worst = sorted(errors.values()), max(errors, key=errors.__getitem__)
    return {"median": ordered[len(ordered) // 2], "worst": errors[worst], "worst_of": worst, "factors": len(errors)}


def compared_gradients(contender: Contender, shape: GpuShape, device: torch.device) -> dict[str, Any]:
    """Errors of the gradients of factors against fp64, with two layers of full width, on some 2,500 tokens."""
    shallow = replace(shape, layers=2)
    items = batches_of(shape)[0][0][:4]
    expected = reference(shallow, device, items)
    return gradient_errors(build(shallow, contender, device).gradients(items), expected)


def series(
    clock: Clock, step: Step, batches: Sequence[Sequence[Any]], *, warm_up: int, steps: int
) -> tuple[list[tuple[int, float]], float]:
    """Numbers of the batches and seconds of the measured steps, which take the batches in turn; and the first loss."""
    times, first = [], None
    for turn in range(warm_up + steps):
        number = turn % len(batches)
        seconds, loss = clock.timed(lambda number=number: step(batches[number]))
        first = float(loss) if first is None else first
        if turn >= warm_up:
            times.append((number, seconds))
        if clock.is_over and len(times) >= min(steps, FEWEST):
            break
    assert first is not None
    return times, first


def figures(times: Sequence[tuple[int, float]], tokens: Sequence[int], flops: Sequence[float], peak: float) -> Any:
    """Medians over steps."""
    return {
        "steps": len(times), "tokens": list(tokens),
        "seconds": statistics.median(seconds for _, seconds in times),
        "tokens_per_second": statistics.median(tokens[number] / seconds for number, seconds in times),
        "mfu": statistics.median(flops[number] / seconds / peak for number, seconds in times),
    }  # fmt: skip


def steps_of(contender: Contender, shape: GpuShape, clock: Clock, parts: int, peak: float) -> dict[str, Any]:
    """Time, memory and kernels of a contender's optimiser steps; its batches are split into some micro-batches."""
    rotating, full = batches_of(shape)
    flops = needed_flops(shape, [*rotating, full])
    tokens = [sum(item.length for item in batch) for batch in (*rotating, full)]
    runner = build(shape, contender, clock.device)
    step = step_of(runner, contender)

    def prepared(batch: Sequence[Example], parts: int) -> list[Any]:
        return [runner.prepare(part) for part in split(batch, parts)]

    if clock.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(clock.device)
    batches = [prepared(batch, parts) for batch in rotating]
    times, first = series(clock, step, batches, warm_up=WARM_UP, steps=STEPS)
    row = {"micro_batches": parts, "first_loss": first, **figures(times, tokens[:3], flops[:3], peak)}
    row |= {"peak_memory_gib": peak_memory(clock.device), **runner.notes}
    own = statistics.median(seconds for number, seconds in times if number == 0)
    row["profile"] = part(lambda: launched(clock, lambda: step(batches[0]), own))

    def full_batch(parts: int) -> dict[str, Any]:
        times, _ = series(clock, step, [prepared(full, parts)], warm_up=1, steps=FEWEST)
        return {"micro_batches": parts, **figures(times, tokens[3:], flops[3:], peak)}

    row["full"] = part(lambda: in_fewest_parts(clock.device, full_batch, parts))
    return row


def in_fewest_parts(device: torch.device, work: Callable[[int], dict[str, Any]], parts: int = 1) -> dict[str, Any]:
    """The result of work on a batch in this number of micro-batches, or twice as many, until memory suffices."""
    while True:
        clear(device)
        try:
            return work(parts)
        except torch.OutOfMemoryError as error:
            if parts >= MOST_PARTS:
                raise
            print(f"{parts} micro-batches do not fit: {in_a_line(error)}", file=sys.stderr)
        parts *= 2  # after the exception, which holds what the step had made


def part(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures beside the main ones; where they fail, such as a profiler that cannot start, the error."""
    try:
        return work()
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        traceback.print_exc()
        return {"error": in_a_line(error)}


def in_a_line(error: Exception) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def training_row(contender: Contender, shape: GpuShape, clock: Clock) -> dict[str, Any]:
    """Ceilings, gradients and steps; where memory does not suffice, with twice as many micro-batches."""
    row: dict[str, Any] = dict(ceilings(clock))
    if contender.gradients:
        row["gradients"] = part(lambda: compared_gradients(contender, shape, clock.device))
    peak = row["peak_tflops"] * 1e12
    return row | in_fewest_parts(clock.device, lambda parts: steps_of(contender, shape, clock, parts, peak))


def clear(device: torch.device) -> None:
    """Free what earlier models held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def row_of(contender: Contender, shape: GpuShape, clock: Clock) -> dict[str, Any]:
    """The figures of a contender, or why it has none."""
    try:
        if contender.kind.startswith("decode"):
            return decoding_row(contender, shape, clock)
        return training_row(contender, shape, clock)
    except LeftOutError as reason:
        return {"left_out": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"error": in_a_line(error)}


def main() -> int:
    """Measure a contender and write its figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=BY_NAME)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--until", type=float, required=True, help="end of the time, on time.monotonic()")
    parser.add_argument("--row", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    end_with_parent()
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    contender, shape = BY_NAME[options.contender], SHAPES[options.shape]
    if contender.half_rank:
        shape = replace(shape, rank=shape.rank // 2)
    row = row_of(contender, shape, Clock(device, options.until))
    options.row.write_text(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
