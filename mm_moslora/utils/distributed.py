"""Ranks: who am I, how many are we, and the few collectives that the project needs.

Of the launcher it reads what every one sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and nothing else.
Without a launcher it is a world of one, and every function here still works.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from packaging.version import Version

from mm_moslora.utils.errors import DistributedError

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 is the main one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def join(*, timeout_minutes: float = 30.0) -> None:
    """Join the process group, once per process; the process leaves it when it ends.

    DeepSpeed keeps references to the group, so it must outlive every engine of the process.

    Args:
        timeout_minutes: limit of one collective.

    Raises:
        DistributedError: the other ranks cannot be reached.
    """
    if dist.is_initialized():
        return
    backend, more = "gloo", {}
    if device().type == "cuda":
        backend, more = "nccl", _on_own_gpu()
    _record_flight()
    if world_size() == 1:  # nobody to meet, so no port is opened and no child inherits an address
        more |= {"store": cast(Any, dist).HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **more)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"Rank {rank()} of {world_size()} could not join the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} ({error}). Check that every rank was started and the port is free."
        ) from error
    atexit.register(_leave)


def _on_own_gpu() -> dict[str, Any]:
    """Make this rank's GPU the current one; what `init_process_group` is to know of it.

    Raises:
        DistributedError: there are more ranks than GPUs on this machine.
    """
    count = torch.cuda.device_count()
    # One GPU may be a launcher's choice for this rank alone (CUDA_VISIBLE_DEVICES of its own).
    if 1 < count <= local_rank():
        raise DistributedError(
            f"This is rank {local_rank()} of its machine, counted from 0, and there are {count} GPUs; NCCL takes one "
            f"rank per GPU. Start {count} processes here, or name more GPUs in CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(device())
    # Without it, a barrier guesses the GPU from the global rank. Releases before 2.7.1 may hang with it
    # (https://github.com/pytorch/pytorch/issues/153960); there the guess counts.
    return {"device_id": device()} if Version(torch.__version__) >= Version("2.7.1") else {}


def _record_flight() -> None:
    """Have what the ranks were waiting for written down when a collective times out; what is already set wins."""
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # torch 2.13 records by default. 2.8 and 2.9 warn of this name, but know it alone where they decide whether to write
    # (ProcessGroupNCCL.hpp of the wheels); TORCH_FR_BUFFER_SIZE only makes them record (FlightRecorder.hpp).
    if Version(torch.__version__) < Version("2.13") and "TORCH_FR_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        _wait_for_gloo()


def _wait_for_gloo(*, seconds: float = 5.0) -> None:
    """Wait until no thread of gloo is at work.

    Such a thread drops the tensors of a collective after the rank has gone on, and may need the interpreter for it. The
    process aborts if the interpreter is ending by then (https://github.com/pytorch/pytorch/pull/179291). Destroying the
    groups does not join the threads: DeepSpeed keeps the groups.
    """
    deadline, quiet = time.monotonic() + seconds, 0
    while quiet < 2 and time.monotonic() < deadline:  # twice: a thread may have waited for the interpreter at the first
        time.sleep(0.001)
        quiet = 0 if _gloo_works() else quiet + 1


def _gloo_works() -> bool:
    """Whether a thread of gloo runs or could run; False where the system does not tell."""
    states = []
    for path in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended
            states.append(path.read_text())
    return any("(pt_gloo_runloop) R" in state for state in states)


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def sum_over_ranks(values: list[float]) -> list[float]:
    """Element-wise sum over all ranks, in fp64 (counts stay exact)."""
    return _reduce(values, dist.ReduceOp.SUM)


def max_over_ranks(values: list[float]) -> list[float]:
    """Element-wise maximum over all ranks."""
    return _reduce(values, dist.ReduceOp.MAX)


def table_over_ranks(values: list[float]) -> list[list[float]]:
    """The values of every rank, in order of rank; each passes as many. One sum of a table that is zero elsewhere."""
    world, width = world_size(), len(values)
    table = [0.0] * (world * width)
    table[rank() * width : (rank() + 1) * width] = values
    table = sum_over_ranks(table)
    return [table[start : start + width] for start in range(0, world * width, width)]


def _reduce(values: list[float], operation: Any) -> list[float]:
    if _alone():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=operation)
    return [float(value) for value in tensor.tolist()]


def add_up(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all ranks; every rank passes one of the same shape."""
    if not _alone():
        dist.all_reduce(tensor)


def barrier() -> None:
    """Wait for all ranks."""
    if not _alone():
        dist.barrier()


def from_main(value: T) -> T:
    """Rank 0's value, on every rank (JSON-like objects)."""
    if _alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in order of rank, on every rank."""
    if _alone():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def agree(error: Exception | None, *, what: str) -> None:
    """Fail on every rank when any rank failed, instead of leaving the others waiting.

    Args:
        error: this rank's failure, or None.
        what: what was being done, for the message.

    Raises:
        DistributedError: naming the ranks that failed, on ranks that did not; the own error on those that did.
    """
    failures = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = {index: f"rank {index}: {text}" for index, text in enumerate(failures) if text is not None}
    if failed:
        told = "; ".join(list(failed.values())[:3])
        raise DistributedError(f"{what} failed on other ranks: {told}", ranks=failed)
