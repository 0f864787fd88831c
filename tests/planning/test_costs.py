"""What a plan counts, held against what is measured: peak memory, and torch's own count of FLOPs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import planning_worker
import pytest
import torch
import transformers as t
from planning_configs import memory_of
from preloaded import Preloaded
from torch.utils.flop_counter import FlopCounterMode

from mm_moslora import adapters
from mm_moslora.batch import Batch, Example, ProcessedImage
from mm_moslora.config import Recipe
from mm_moslora.kernels.attention import cpu_attention
from mm_moslora.kernels.attention.attention_choice import set_attention
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers
from mm_moslora.models.memory_efficient.loss_head import CHUNK_BYTES
from mm_moslora.training.engine import LossModule, StepResult
from mm_moslora.training.metrics.gpu_memory import RunEstimate, StepMemory
from mm_moslora.training.metrics.gpu_specs import card_of, device_peak
from mm_moslora.training.metrics.model_cost import FlopCounter, PictureWork, StepShape
from mm_moslora.training.run_logging import Speedometer, rank_figures

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, python: Preloaded) -> tuple[Path, list[dict[str, int]]]:
    """What two real steps took, from `planning_worker`, and its folder."""
    folder = tmp_path_factory.mktemp("measured")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    worker = [python.ours, str(TESTS / "builders" / "planning_worker.py"), str(folder)]
    output = subprocess.run(worker, capture_output=True, text=True, check=True, env=environment, timeout=540).stdout
    return folder, [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def planned(recipe: Recipe, row: dict[str, int], *, tokens: int, images: int = 0) -> float:
    size = memory_of(recipe, dtype=torch.float32)
    step = StepMemory(size=size, zero="none", world=1, checkpointing=False, logit_chunk=CHUNK_BYTES["cpu"])
    needed = step.of(tokens, supervised=row["supervised"], images=images)
    return needed.total - needed.context


@pytest.mark.slow
def test_the_memory_model_is_within_a_tenth_of_the_measured_peak_and_in_four_bits(measured) -> None:
    folder, rows = measured[0], [row for row in measured[1] if "width" in row]
    assert len(rows) == 3
    for row in rows:
        recipe = planning_worker.recipe(folder / str(row["width"]), row["quantisation"])
        expected = row["start"] + planned(recipe, row, tokens=row["tokens"])
        assert expected == pytest.approx(row["peak"], rel=0.10), (row, expected)


@pytest.mark.slow
def test_what_checkpointing_a_tower_saves_is_planned_within_a_tenth(measured) -> None:
    folder, rows = measured[0] / "seeing", [row for row in measured[1] if "checkpointing" in row]
    expected = [
        planned(
            planning_worker.with_tower(folder, row["checkpointing"]), row, tokens=planning_worker.TOKENS,
            images=planning_worker.PICTURES,
        )
        for row in rows
    ]  # fmt: skip
    for row, planned_bytes in zip(rows, expected, strict=True):
        assert row["start"] + planned_bytes == pytest.approx(row["peak"], rel=0.10), (row, planned_bytes)
    saved = rows[0]["peak"] - rows[0]["start"] - (rows[1]["peak"] - rows[1]["start"])
    assert expected[0] - expected[1] == pytest.approx(saved, rel=0.10)


def vlm(*, mode: str) -> t.PreTrainedModel:
    vision = t.CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = t.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    config = t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=511, image_seq_length=16)
    model = t.LlavaForConditionalGeneration(config).requires_grad_(False)
    if mode == "adapters":
        adapters.add_moslora(model, adapters.MoSLoRAConfig(r=8), component="model.language_model")
    elif mode == "full":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)
    return model.train()


@pytest.mark.parametrize("mode", ["adapters", "projector alone", "full"])
@pytest.mark.parametrize("lean", [False, True])
def test_flops_are_within_two_per_cent_of_torchs_count(mode: str, lean: bool, monkeypatch) -> None:
    # Some torch count the kernel, some do not.
    monkeypatch.setattr(cpu_attention, "products_are_faster", lambda _: True)
    model = vlm(mode=mode)
    set_attention(model, "mm_moslora_segments" if lean else "eager")
    if lean:
        use_lean_layers(model)
    length = 128
    ids = torch.randint(0, 500, (length,))
    ids[:16] = 511
    supervised = torch.arange(length) >= 100
    example = Example(
        id="",
        input_ids=ids,
        supervised=supervised,
        pictures=[ProcessedImage(tensors={"pixel_values": torch.randn(1, 3, 56, 56)})],
    )
    batch = Batch.from_examples([example])
    # torch's counter knows no in-place addmm_, which adapters add themselves with.
    known = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    if lean:  # attention in blocks computes scores twice and some pairs for nothing, which no step needs
        known[torch.ops.aten.bmm] = lambda *_, **__: 0
    with FlopCounterMode(display=False, custom_mapping=known) as counted:
        LossModule(model, None)(batch, True).backward()
    # Eager attention multiplies whole squares.
    shape = StepShape(tokens=length, supervised=batch.supervised_tokens, pairs=0 if lean else length**2, images=1)
    assert FlopCounter(model).count(shape).total == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_checkpointing_a_frozen_base_costs_half_as_much_again() -> None:
    counter = FlopCounter(vlm(mode="adapters"))
    shape = StepShape.of([300, 200], supervised=50)
    plain, again = counter.count(shape), counter.count(shape, checkpointing=True)
    assert again.base == pytest.approx(1.5 * plain.base)
    assert again.head == plain.head


def test_a_step_logs_its_mfu_on_a_known_device_alone() -> None:
    model = vlm(mode="adapters")
    ids = torch.arange(1, 101)
    example = Example(id="", input_ids=ids, supervised=torch.arange(100) >= 80)
    batch = Batch.from_examples([example] * 2)
    result = StepResult(loss=1.0, grad_norm=1.0, applied=True, supervised_tokens=40, tokens=200, images=0)
    needed = FlopCounter(model).count(StepShape.of([100, 100], supervised=40)).total
    known, figures = RunEstimate(None, PictureWork(), device_peak("NVIDIA A100-SXM4-80GB")), rank_figures(seconds=2.0)
    found = Speedometer(model, known).of(result, [batch], figures)
    assert found["mfu"] == pytest.approx(needed / (2.0 * 312e12))
    assert found["padding_share"] == 0.0
    for unknown in (known._replace(peak=0.0), known._replace(picture=None)):
        assert "mfu" not in Speedometer(model, unknown).of(result, [batch], figures)


@pytest.mark.parametrize(
    "name", ["NVIDIA A10G", "NVIDIA RTX 6000 Ada Generation", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe"]
)
def test_a_card_that_is_asked_has_the_peak_of_its_own_name(name: str) -> None:
    assert card_of(name, 80e9).peak == device_peak(name)
