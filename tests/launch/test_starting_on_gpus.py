"""What is decided on the way to a GPU, before the first kernel: which one, which attention, who is to blame."""

from __future__ import annotations

import pytest
import torch
import transformers
from trials import make_recipe

from mm_moslora.batch import Batch, Example
from mm_moslora.kernels.attention import segment_attention
from mm_moslora.training.supervision import watchdog
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import DistributedError

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """Four of them, and what was made the current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_rank_joins_with_its_own_gpu(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("RANK", "10")
    assert distributed._on_own_gpu() == {"device_id": torch.device("cuda", 2)}
    assert gpus == [torch.device("cuda", 2)]


def test_more_ranks_than_gpus_are_refused(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(DistributedError, match="4 GPUs"):
        distributed._on_own_gpu()


def test_one_visible_gpu_may_be_a_ranks_own(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed._on_own_gpu() == {"device_id": torch.device("cuda", 0)}


def test_in_a_step_on_a_gpu_nobody_is_blamed_for_where_he_waits(monkeypatch):
    assert watchdog._own_place("step")
    monkeypatch.setattr(distributed, "device", lambda: CUDA)
    assert not watchdog._own_place("step")
    assert watchdog._own_place("data")


@pytest.fixture
def language():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.mark.parametrize("installed", [True, False])
def test_attention_is_chosen_for_the_device_to_come(language, monkeypatch, installed):
    """The model is still on the CPU then."""
    monkeypatch.setattr(segment_attention, "is_flash_attn_2_available", lambda: installed)
    chosen = segment_attention.training_attention(language, device=CUDA)
    assert chosen == ("flash_attention_2" if installed else segment_attention.SEGMENTS)
    assert segment_attention.training_attention(language.float(), device=CUDA) == segment_attention.SEGMENTS


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
