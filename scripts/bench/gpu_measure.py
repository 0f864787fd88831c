"""Measure one contender of the GPU benchmark in this process; `gpu.py` starts it.

Figures of a row: seconds of whole optimiser steps (CUDA events; median of ten after three warm-ups), real tokens per
second, useful MFU, peak memory, kernels of a step, share of a step in which the device works, gradient errors.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # for all contenders: lengths vary

import torch
import transformers
from gpu_batches import SHAPES, Shape, batches_of, split
from gpu_clock import STEPS, WARM_UP, Clock
from gpu_contenders import BY_NAME, Contender
from gpu_decode import decoding_row
from gpu_models import LeftOutError, Runner, build, gradient_errors, needed_flops, reference
from parent import end_with_parent
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mm_moslora.batch import Example

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


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def launched(clock: Clock, runner: Runner, batch: Sequence[Sequence[Example]], seconds: float) -> dict[str, Any]:
    """Kernels of a step, and the share of its time in which at least one works; on a CPU PyTorch's operators.

    Args:
        clock: of the device.
        runner: the contender.
        batch: in micro-batches.
        seconds: of the same step without a profiler, which takes time.
    """
    on_cpu, prepared = clock.device.type == "cpu", [runner.prepare(part) for part in batch]
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as profiled:
        clock.timed(lambda: runner.step(prepared))
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


def compared_gradients(contender: Contender, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Errors of the gradients of factors against fp64, with two layers of full width, on some 2,500 tokens."""
    shallow = replace(shape, layers=2)
    items = batches_of(shape)[0][0][:4]
    expected = reference(shallow, device, items)
    return gradient_errors(build(shallow, contender, device).gradients(items), expected)


def series(
    clock: Clock, runner: Runner, batches: Sequence[Sequence[Example]], parts: int, *, warm_up: int, steps: int
) -> tuple[list[tuple[int, float]], float]:
    """Numbers of the batches and seconds of the measured steps, which take the batches in turn; and the first loss."""
    prepared = [[runner.prepare(part) for part in split(batch, parts)] for batch in batches]
    times, first = [], None
    for turn in range(warm_up + steps):
        number = turn % len(prepared)
        seconds, loss = clock.timed(lambda number=number: runner.step(prepared[number]))
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


def steps_of(contender: Contender, shape: Shape, clock: Clock, parts: int, peak: float) -> dict[str, Any]:
    """Time, memory and kernels of a contender's optimiser steps; its batches are split into some micro-batches."""
    rotating, full = batches_of(shape)
    flops = needed_flops(shape, contender.rank_of(shape.rank), [*rotating, full])
    tokens = [sum(item.length for item in batch) for batch in (*rotating, full)]
    runner = build(shape, contender, clock.device)
    if clock.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(clock.device)
    times, first = series(clock, runner, rotating, parts, warm_up=WARM_UP, steps=STEPS)
    row = {"micro_batches": parts, "first_loss": first, **figures(times, tokens[:3], flops[:3], peak)}
    row |= {"peak_memory_gib": peak_memory(clock.device), **runner.notes}
    own = statistics.median(seconds for number, seconds in times if number == 0)
    row["profile"] = part(lambda: launched(clock, runner, split(rotating[0], parts), own))

    def full_batch(parts: int) -> dict[str, Any]:
        times, _ = series(clock, runner, [full], parts, warm_up=1, steps=FEWEST)
        return {"micro_batches": parts, **figures(times, tokens[3:], flops[3:], peak)}

    row["full"] = part(lambda: in_fewest_parts(clock.device, full_batch, parts))
    return row


def in_fewest_parts(device: torch.device, work: Callable[[int], dict[str, Any]], parts: int = 1) -> dict[str, Any]:
    """The result of work on a batch in this number of micro-batches, or twice as many, until memory suffices.

    Raises:
        OutOfMemoryError: it does not suffice for `MOST_PARTS`.
    """
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


def training_row(contender: Contender, shape: Shape, clock: Clock) -> dict[str, Any]:
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


def row_of(contender: Contender, shape: Shape, clock: Clock) -> dict[str, Any]:
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
    row = row_of(BY_NAME[options.contender], SHAPES[options.shape], Clock(device, options.until))
    options.row.write_text(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
