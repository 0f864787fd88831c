"""How a rank joins the others, and with which GPU."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from waiting import wait_until

from mm_moslora.utils import distributed
from mm_moslora.utils.errors import DistributedError


@pytest.fixture
def gpus(monkeypatch):
    """Four of them, and what was made the current one."""
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "0")  # a rank that joins sets it
    monkeypatch.delenv(distributed.BACKEND, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "_try_gpu", lambda _: None)
    return chosen


@pytest.fixture
def group(monkeypatch):
    """What `join` asks of torch.distributed."""
    asked = {}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **more: asked.update(more, to=backend))
    monkeypatch.setattr(distributed.atexit, "register", lambda _: None)
    return asked


def test_a_rank_joins_with_its_own_gpu(gpus, group, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("RANK", "10")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setenv("MASTER_PORT", "29400")
    distributed.join()
    assert gpus == [torch.device("cuda", 2)]
    assert group["device_id"] == torch.device("cuda", 2)
    assert group["to"] == "cpu:gloo,cuda:nccl", "numbers of the host would wait for the GPU"


def test_a_backend_that_does_not_start_in_one_process_is_named(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv(distributed.BACKEND, "cpu:nccl" if not torch.cuda.is_available() else "smoke signals")
    with pytest.raises(
        DistributedError, match=r"The backend '.*' of torch.distributed .*Set MM_MOSLORA_BACKEND to gloo"
    ) as told:
        distributed.join()
    assert "None" not in str(told.value)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DistributedError, match=r"RANK is 1 and WORLD_SIZE 1, but ranks count from 0"):
        distributed.join()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DistributedError, match=r"WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set"):
        distributed.join()


def test_more_ranks_than_gpus_are_refused_unless_they_can_share(gpus, group, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(DistributedError, match=r"4 GPUs.*MM_MOSLORA_BACKEND=gloo"):
        distributed.join()
    monkeypatch.setenv(distributed.BACKEND, "gloo")
    distributed.join()
    assert group["to"] == "gloo"
    assert "device_id" not in group
    assert gpus == [torch.device("cuda", 1)]


def test_one_visible_gpu_may_be_a_ranks_own(gpus, group, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    distributed.join()
    assert group["device_id"] == torch.device("cuda", 0)


@pytest.mark.parametrize(("local_rank", "count", "backend"), [(5, 1, None), (5, 4, "gloo"), (2, 4, None)])
def test_deepspeed_takes_the_gpu_of_this_project(gpus, group, monkeypatch, local_rank, count, backend):
    """A rank that sees its own GPU alone, one that shares a GPU, and the common one; below one process of mpirun."""
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.runtime import engine

    def set_device(device):
        index = device if isinstance(device, int) else torch.device(device).index
        if index >= count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        gpus.append(torch.device("cuda", index))

    cuda, live = CUDA_Accelerator(), SimpleNamespace()
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    if backend:
        monkeypatch.setenv(distributed.BACKEND, backend)
    before = distributed.device()
    distributed.join()
    monkeypatch.setattr(engine, "get_accelerator", lambda: cuda)
    monkeypatch.setattr(engine, "dist", SimpleNamespace(get_world_size=lambda: 8, get_rank=lambda: local_rank))
    engine.DeepSpeedEngine._configure_with_arguments(live, None, None)
    engine.DeepSpeedEngine._set_distributed_vars(live, None)
    of_zero_3 = torch.device(cuda.device_name(os.environ["LOCAL_RANK"]))  # as `zero.Init` names it
    assert {before, distributed.device(), live.device, of_zero_3, *gpus} == {before}


def test_a_process_without_a_launcher_does_not_look_like_a_rank(gpus, group, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK")
    distributed.join()
    assert "LOCAL_RANK" not in os.environ


def test_a_gpu_that_this_pytorch_does_not_run_on_is_named(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch, "ones", broken)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(distributed, "gpu_in_words", lambda: "Tesla K80, 12 GiB, compute capability 3.7")
    with pytest.raises(DistributedError, match=r"Tesla K80.*3\.7 does not run PyTorch.*no kernel image.*sm_75, sm_90"):
        distributed._try_gpu(torch.device("cuda", 0))


def test_a_rank_that_waits_for_the_others_says_where(group, monkeypatch, caplog):
    monkeypatch.setattr(distributed, "_SILENT_SECONDS", 0.01)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: wait_until(lambda: caplog.messages))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "other", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    distributed.join(timeout_minutes=2)
    assert caplog.messages == ["Rank 1 of 2 waits for the others at other:29500, up to 2 minutes."]
