"""Ranks: this process's rank, the world size, and the collectives that the project needs.

It reads only the launcher variables that all launchers set (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and
MM_MOSLORA_BACKEND.
Without a launcher the world size is one, and every function here still works.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from packaging.version import Version

from mm_moslora.utils.errors import DistributedError
from mm_moslora.utils.hardware import let_segments_grow
from mm_moslora.utils.text_format import LARGEST_PORT, whole_number

logger = logging.getLogger(__name__)
T = TypeVar("T")

BACKEND = "MM_MOSLORA_BACKEND"
"""Environment variable: another backend of torch.distributed, such as `gloo`, with which ranks may share a GPU."""

_SILENT_SECONDS = 60.0
"""Until a rank says that it waits for the others."""

LONE_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables with the number of processes that srun or mpirun started; none of them sets RANK."""


def rank() -> int:
    """This process's global rank; 0 is the main process."""
    return whole_number(os.environ, "RANK", 0)


def world_size() -> int:
    """Number of processes."""
    return whole_number(os.environ, "WORLD_SIZE", 1, least=1)


def local_rank() -> int:
    """This process's rank on its machine."""
    return whole_number(os.environ, "LOCAL_RANK", 0)


def ranks_of_host() -> int:
    """Number of processes on this machine, where the launcher says it (torchrun, DeepSpeed); else all."""
    counts = (whole_number(os.environ, name, 0, least=1) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    return next(filter(None, counts), world_size())


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators, differently on every rank, so that dropout masks differ."""
    random.seed(seed)
    torch.manual_seed(seed * 10_007 + rank())


def device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def gpu_in_words() -> str:
    """Name, memory and compute capability of this rank's GPU; empty on a CPU."""
    own = device()
    if own.type != "cuda":
        return ""
    gpu = torch.cuda.get_device_properties(own)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"


def backend() -> str:
    """The backend of the process group: the variable `BACKEND`, else gloo for host tensors and NCCL for those on GPUs.

    Numbers of the host then never wait for a GPU.
    """
    return os.environ.get(BACKEND) or ("cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo")


def check_launcher() -> None:
    """Refuse variables of a launcher that are missing or contradict each other; torch's messages name few of them."""
    _refuse_lone_tasks()
    remedy = "A launcher sets them all: start the run by one, or unset them."
    if rank() >= world_size():
        raise DistributedError(f"RANK is {rank()} and WORLD_SIZE {world_size()}, but ranks count from 0. {remedy}")
    if world_size() == 1:
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise DistributedError(f"WORLD_SIZE is {world_size()}, but {', '.join(missing)} is not set. {remedy}")
    master_port()


def _refuse_lone_tasks() -> None:
    """Refuse one of several processes that would each train by itself. A batch script of SLURM is no such task."""
    if os.environ.get("RANK") or os.environ.get("WORLD_SIZE"):
        return
    counts = {name: whole_number(os.environ, name, 1) for name in LONE_TASKS}
    if whole_number(os.environ, "SLURM_PROCID", 0) > 0:  # the script has the number 0
        counts["SLURM_NTASKS"] = whole_number(os.environ, "SLURM_NTASKS", 1)
    evidence = next((f"{name} is {count}" for name, count in counts.items() if count > 1), None)
    if evidence is None and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        evidence = "accelerate launch was asked for several processes"  # it starts one, with an address and no rank
    if evidence:
        raise DistributedError(
            f"{evidence}, but RANK is not set, so this process would train alone. Start the ranks by `mm-moslora "
            "launch RECIPE`, in SLURM by one call in the batch script without srun. For processes that have nothing "
            "to do with each other, set WORLD_SIZE=1."
        )


def master_port() -> int:
    """The port where rank 0 listens."""
    return whole_number(os.environ, "MASTER_PORT", 0, least=1, most=LARGEST_PORT)


def join(*, timeout_minutes: float = 30.0) -> None:
    """Join the process group, once per process; the process leaves the group at its end.

    DeepSpeed keeps references to the group, so the group must outlive all engines of the process.
    """
    if dist.is_initialized():
        return
    check_launcher()
    if "LOCAL_RANK" in os.environ:  # below mpirun, a launcher of ranks has others; DeepSpeed refuses two that differ
        os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    let_segments_grow()
    chosen, more = backend(), {}
    if device().type == "cuda":
        more = _on_own_gpu(one_rank_each="nccl" in chosen)
    record_flight()
    if world_size() == 1:  # no process group is needed, so no port is opened and no child inherits an address
        more |= {"store": cast(Any, dist).HashStore(), "rank": 0, "world_size": 1}
    told = threading.Timer(_SILENT_SECONDS, _say_that_it_waits, [timeout_minutes])
    told.daemon = True
    told.start()
    try:
        dist.init_process_group(chosen, timeout=timedelta(minutes=timeout_minutes), **more)
    except (RuntimeError, ValueError, AssertionError) as error:
        hint = f" {BACKEND} asks for the backend {chosen!r}." if os.environ.get(BACKEND) else ""
        if world_size() == 1:
            raise DistributedError(
                f"The backend {chosen!r} of torch.distributed does not start in this process ({error}).{hint} Set "
                f"{BACKEND} to gloo, or, for CPUs and GPUs, to cpu:gloo,cuda:nccl."
            ) from error
        raise DistributedError(
            f"Rank {rank()} of {world_size()} could not join the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')}, where rank 0 listens ({error}). Check that every rank was started, that "
            f"none has ended (its output says why), and that the port is free.{hint}"
        ) from error
    finally:
        told.cancel()
    atexit.register(_leave)


def _say_that_it_waits(minutes: float) -> None:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    logger.warning("Rank %d of %d waits for the others at %s, up to %g minutes.", rank(), world_size(), place, minutes)


def _on_own_gpu(*, one_rank_each: bool) -> dict[str, Any]:
    """Make this rank's GPU the current device, also of libraries; returns arguments for `init_process_group`.

    DeepSpeed uses LOCAL_RANK as the index of the GPU. That is wrong where ranks share GPUs, or where each sees its own
    alone. From here on LOCAL_RANK is that index, for which `device` gives the same GPU.
    """
    count = torch.cuda.device_count()
    # A single visible GPU may be assigned to this rank by its launcher (its own CUDA_VISIBLE_DEVICES).
    if one_rank_each and 1 < count <= local_rank():
        raise DistributedError(
            f"This is rank {local_rank()} of its machine, counted from 0, and there are {count} GPUs; NCCL takes one "
            f"rank per GPU. Start {count} processes here, or name more GPUs in CUDA_VISIBLE_DEVICES. With "
            f"{BACKEND}=gloo ranks share GPUs."
        )
    own = device()
    if "LOCAL_RANK" in os.environ:  # without a launcher, libraries that see it would expect one
        os.environ["LOCAL_RANK"] = str(own.index)
    torch.cuda.set_device(own)
    _try_gpu(own)
    # Without device_id, a barrier of NCCL guesses the GPU from the global rank.
    return {"device_id": own} if one_rank_each else {}


def _try_gpu(own: torch.device) -> None:
    try:
        torch.ones(1, device=own).add_(1).item()
    except RuntimeError as error:
        raise DistributedError(
            f"{gpu_in_words()} does not run PyTorch {torch.__version__} ({str(error).splitlines()[0]}), which was "
            f"built for {', '.join(torch.cuda.get_arch_list()) or 'no GPU'}. Install a PyTorch for this GPU and its "
            'driver, or train on the CPU with CUDA_VISIBLE_DEVICES="".'
        ) from error


def record_flight() -> None:
    """Make NCCL write its flight record when a collective times out; variables that are set already are kept."""
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # torch 2.13 records by default. torch 2.8 and 2.9 warn about this name, but only it makes them write the record
    # (ProcessGroupNCCL.hpp of the wheels); TORCH_FR_BUFFER_SIZE only makes them record (FlightRecorder.hpp).
    if Version(torch.__version__) < Version("2.13") and "TORCH_FR_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")


def _leave() -> None:
    if getattr(sys, "last_value", None) is not None:  # an exception that nobody caught ends the process
        leave_at_once(1)
    if dist.is_initialized():
        dist.destroy_process_group()
        wait_for_gloo()


def leave_at_once(code: int) -> None:
    """End a process that failed without leaving its group; one without other ranks goes on.

    Ranks leave a group of NCCL together: the process would wait for ranks that wait for it in another collective, and
    its launcher, which ends them, would not learn of the failure.
    """
    if _alone():
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, or a stream that is closed
            stream.flush()
    os._exit(code)


def wait_for_gloo(*, seconds: float = 5.0) -> None:
    """Wait until no thread of gloo is running.

    Such a thread drops the tensors of a collective after the rank has continued, and may need the GIL for it. The
    process aborts if the interpreter is shutting down by then (https://github.com/pytorch/pytorch/pull/179291).
    Destroying the groups does not join the threads, since DeepSpeed keeps references to the groups.
    """
    deadline, quiet = time.monotonic() + seconds, 0
    while quiet < 2 and time.monotonic() < deadline:  # twice: a thread may have waited for the GIL at the first check
        time.sleep(0.001)
        quiet = 0 if _gloo_works() else quiet + 1


def _gloo_works() -> bool:
    """Whether a thread of gloo is running or runnable; False where the system does not report it."""
    states = []
    for path in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended
            states.append(path.read_text())
    return any("(pt_gloo_runloop) R" in state for state in states)


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def sum_over_ranks(values: list[float]) -> list[float]:
    """Element-wise sum over all ranks, in fp64, so that counts stay exact."""
    return _reduce(values, dist.ReduceOp.SUM)


def max_over_ranks(values: list[float]) -> list[float]:
    """Element-wise maximum over all ranks."""
    return _reduce(values, dist.ReduceOp.MAX)


def table_over_ranks(values: list[float]) -> list[list[float]]:
    """The values of every rank, in order of rank; all ranks pass equally many."""
    table = gather_objects(values)
    widths = [len(row) for row in table]
    assert len({*widths}) == 1, f"ranks pass tables of different widths: {widths}"
    return table


def _reduce(values: list[float], operation: Any) -> list[float]:
    if _alone():
        return values
    on_host = "gloo" in str(dist.get_backend_config())  # a group of another program may have NCCL alone
    tensor = torch.tensor(values, dtype=torch.float64, device="cpu" if on_host else device())
    dist.all_reduce(tensor, op=operation)
    return [float(value) for value in tensor.tolist()]


def add_up(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all ranks; all ranks pass the same shape."""
    if not _alone():
        dist.all_reduce(tensor)


def barrier() -> None:
    """Wait for all ranks, not for their GPUs."""
    max_over_ranks([0.0])


def from_main(value: T) -> T:
    """Rank 0's value (a JSON-like object), on every rank."""
    if _alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in order of rank, on every rank."""
    if _alone():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


@contextlib.contextmanager
def failing_together(what: str) -> Iterator[None]:
    """A block that fails on every rank when it fails on any, so that no rank waits for a failed one."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failures = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = {index: f"rank {index}: {text}" for index, text in enumerate(failures) if text is not None}
    if failed:
        reasons = "; ".join(list(failed.values())[:3])
        raise DistributedError(f"{what} failed on other ranks: {reasons}", ranks=failed)
