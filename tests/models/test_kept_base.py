"""Loading one base several times: the values of `load_parts`, whatever was done to earlier loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mm_moslora import adapters
from mm_moslora.config import AdapterConfig, ModelConfig, VisionConfig
from mm_moslora.models import kept_base
from mm_moslora.models.assembly import Parts, load_parts
from mm_moslora.models.kept_base import KeptBase
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.utils import hardware


def state(parts: Parts) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in parts.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.fixture
def config(language_folder: Path, vision_folder: Path) -> ModelConfig:
    return ModelConfig(language=str(language_folder), vision=VisionConfig(name=str(vision_folder)))


def test_what_is_done_to_a_model_does_not_reach_the_next(config: ModelConfig) -> None:
    load = KeptBase()
    torch.manual_seed(3)
    plain = load_parts(config, dtype=torch.bfloat16)
    drawn, expected = torch.get_rng_state(), state(plain)
    for number in range(3):
        torch.manual_seed(3)
        parts = load(config, dtype=torch.bfloat16)
        assert torch.equal(torch.get_rng_state(), drawn), "the random stream of what follows is shifted"
        assert same(state(parts), expected)
        assert parts.model.config.to_dict() == plain.model.config.to_dict()
        assert parts.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
        assert parts.model.get_input_embeddings().weight is not parts.model.model.vision_tower
        attach_adapters(parts, config, AdapterConfig(rank=2, alpha=4))
        assert parts.peft_model is not None
        adapters.merge(parts.peft_model)
        for value in parts.model.parameters():
            value.data.add_(number + 1)
        parts.model.config.text_config.vocab_size = 1
        parts.tokenizer.add_tokens(["another"])
        parts.model.forward = None
    assert (load.reads, load.copies) == (1, 2)


def test_drawn_weights_follow_the_seed_and_a_language_model_has_none(config: ModelConfig) -> None:
    load = KeptBase()
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        parts = load(config)
        torch.manual_seed(seed)
        assert same(state(parts), state(load_parts(config)))
    assert (load.reads, load.copies) == (2, 1), "a new projector is drawn for every seed"
    alone = ModelConfig(language=config.language)
    for seed, dtype in ((1, torch.float32), (2, torch.bfloat16), (3, torch.float32), (4, torch.bfloat16)):
        torch.manual_seed(seed)
        load(alone, dtype=dtype)
    assert (load.reads, load.copies) == (4, 3)


def test_a_model_that_is_large_for_the_machine_is_read_again(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kept_base, "available_memory", lambda: 1000)
    load = KeptBase()
    load(config)
    load(config)
    assert (load.reads, load.copies) == (2, 0)
    monkeypatch.setattr(hardware, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    assert hardware.available_memory() == 0
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:  4 kB\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.available_memory() == 4096
    (tmp_path / "memory.max").write_text("3000\n")
    assert hardware.available_memory() == 2000
