"""What is decided on the way to a GPU, before the first kernel: which one, which attention, who is to blame."""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from trials import make_recipe

from mm_moslora.batch import Batch, Example
from mm_moslora.config import Recipe
from mm_moslora.kernels.attention import attention_choice, gpu_attention
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.assembly import Parts
from mm_moslora.models.precision import run_arithmetic
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.training.engine import model_execution
from mm_moslora.training.supervision import watchdog
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, DistributedError

CUDA = torch.device("cuda", 0)


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
        distributed._try_gpu(CUDA)


def test_in_a_step_on_a_gpu_nobody_is_blamed_for_where_he_waits(monkeypatch):
    assert watchdog._blocking_line("step")
    monkeypatch.setattr(distributed, "device", lambda: CUDA)
    assert not watchdog._blocking_line("step")
    assert watchdog._blocking_line("data")


@pytest.fixture
def language():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def choose(language, monkeypatch, installed, faults=None, requested="auto"):
    """The choice for a GPU while the model is on the CPU, with flash-attention packages and kernels that fail."""
    monkeypatch.setattr(attention_choice, "is_installed", lambda name: name in installed)
    monkeypatch.setattr(attention_choice, "flash_fault", lambda name, _: (faults or {}).get(name))
    found = gpu_attention.Tried(kernel=None, words="PyTorch's")
    monkeypatch.setattr(attention_choice, "pytorch_kernel", lambda _: found)
    return attention_choice.choose_attention(language, requested, device=CUDA)


def test_attention_is_chosen_for_the_device_to_come(language, monkeypatch):
    two, three, four = (f"flash_attention_{number}" for number in (2, 3, 4))
    assert choose(language, monkeypatch, {two}).name == two
    assert choose(language, monkeypatch, {two, three, four}).name == four
    assert choose(language, monkeypatch, {two}, requested=SEGMENTS).name == SEGMENTS
    own = choose(language, monkeypatch, {})
    assert (own.name, own.words) == (SEGMENTS, "PyTorch's")
    with run_arithmetic(deterministic=True):
        assert choose(language, monkeypatch, {two}).name == SEGMENTS, "its order of sums is not PyTorch's to choose"
    assert choose(language.float(), monkeypatch, {two, three}).name == SEGMENTS


def test_attention_that_does_not_load_is_named_and_the_next_one_taken(language, monkeypatch):
    two, three = "flash_attention_2", "flash_attention_3"
    broken = {three: "ImportError: undefined symbol"}
    found = choose(language, monkeypatch, {two, three}, broken)
    assert (found.name, found.words) == (two, two)
    assert found.faults == ("flash_attention_3 does not run here: ImportError: undefined symbol",)
    with pytest.raises(ConfigError, match="undefined symbol"):
        choose(language, monkeypatch, {two, three}, broken, requested=three)
    monkeypatch.setattr(attention_choice, "is_installed", lambda _: False)
    with pytest.raises(ConfigError, match="flash-attn-3"):
        attention_choice.require_attention("flash_attention_3")


def test_different_gpus_among_the_ranks_are_named_once(monkeypatch, caplog):
    others = [([("A100, 80 GiB", "varlen")], ("one fault",)), ([("L4, 23 GiB", "loop")], ("one fault",))]
    monkeypatch.setattr(distributed, "gather_objects", lambda _: others)
    model_execution.log_what_runs(attention_choice.AttentionChoice(name=SEGMENTS, words="varlen"), "fp32")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings[0] == "one fault."
    assert "ranks 0: A100, 80 GiB (attention: varlen); ranks 1: L4, 23 GiB (attention: loop)" in warnings[1]
    assert len(warnings) == 2


def test_a_rank_touches_no_other_gpu_when_it_draws_adapters(gpus, language, monkeypatch):
    touched = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: touched.append(devices) or nullcontext())
    recipe = Recipe.from_dict({"model": {"language": "none"}})
    attach_adapters(Parts(model=language), recipe.model, recipe.adapter)
    assert [devices for devices in touched if devices] == [[3]]


def test_a_gpu_that_emulates_bf16_is_named(monkeypatch, caplog):
    monkeypatch.setattr(distributed, "gpu_in_words", lambda: "T4, 15 GiB, compute capability 7.5")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    for precision in ("bf16", "fp16"):
        model_execution.log_what_runs(attention_choice.AttentionChoice(name=SEGMENTS), precision)
    assert caplog.text.count("T4, 15 GiB, compute capability 7.5 emulates bf16") == 1


def test_a_batch_on_a_device_knows_the_host_it_came_from():
    example = Example(id="a", input_ids=torch.arange(4), supervised=torch.ones(4, dtype=torch.bool))
    batch = Batch.from_examples([example])
    moved = batch.to("meta")
    assert moved.on_host is batch
    assert moved.to("cpu") is batch
    assert batch.to("cpu").host is None


def test_chat_and_server_run_on_the_accelerator(language_folder, vision_folder, records, tmp_path, monkeypatch):
    from mm_moslora.serve.inference.served_models import load_models
    from mm_moslora.serve.terminal_chat import Chat
    from mm_moslora.training.training_loop import train

    parts = {"language": language_folder, "vision": vision_folder, "records": records}
    run = train(make_recipe(parts, tmp_path / "run", "none", steps=1)).checkpoint
    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    models = (Chat.from_folder(run).assembly.model, load_models(run).assembly.model)
    assert {parameter.device.type for model in models for parameter in model.parameters()} == {"meta"}
