"""Ready-made models on packed rows and lean layers: the numbers of padded rows on stock layers, with less kept."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText
from vlm_runs import conversation, example_of, picture, recipe_for, write_records
from vlms import FAMILIES, make_vlm

from mm_moslora.adapters import MoSLoRALinear
from mm_moslora.batch import Batch
from mm_moslora.config import AdapterConfig, ModelConfig, ValidateConfig, VisionConfig
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.assembly import Parts, load_parts
from mm_moslora.models.batching.padded_batch import padded_hidden
from mm_moslora.models.families import VLMS
from mm_moslora.models.load_model import load
from mm_moslora.models.memory_efficient.decoder_layers import drops_positions
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers
from mm_moslora.models.memory_efficient.loss_head import head_loss_sum
from mm_moslora.models.meta_model import kept_bytes
from mm_moslora.models.processing.image_processing import dummy_image_example
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vlm import needs_padding, part_of, supervised_hidden
from mm_moslora.serve.terminal_chat import Chat
from mm_moslora.training.run_setup import prepare
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ModelError

Read = Callable[..., torch.Tensor]
PACKED = sorted(name for name, family in VLMS.items() if family.packed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make_vlm(tmp_path_factory.mktemp(family), family) for family in PACKED}


def tuned(folder, *, layers: int = 3, dtype: torch.dtype = torch.float32) -> Parts:
    """Adapters in the decoder and in the tower, none of which is zero."""
    config = ModelConfig(vlm=str(folder), vision=VisionConfig(mode="adapter"))
    assembly = load_parts(config)
    shape = copy.deepcopy(assembly.model.config)
    text = shape.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1] * layers
    torch.manual_seed(0)
    assembly.model = AutoModelForImageTextToText.from_config(shape)
    attach_adapters(assembly, config, AdapterConfig(rank=4, alpha=8))
    for name, parameter in assembly.model.named_parameters():
        if name.endswith("bias") or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assembly.model.to(dtype).train()
    return assembly


def pack(model) -> None:
    """As `mm-moslora train` does it."""
    set_attention(model, choose_attention(model).name)
    assert use_lean_layers(model) == len(model.get_decoder().layers)


def sighted(assembly: Parts) -> Batch:
    """None, one and several pictures of different sizes, and answers in two turns."""
    return Batch.from_examples(
        [
            example_of(assembly, conversation("<image>\nwhat color is the shape?", "red and blue"), [picture(50, 70)]),
            example_of(assembly, conversation("say red"), name="b"),
            example_of(
                assembly, [*conversation("<image>\n<image>\nsame?", "no"), *conversation("is it red?", "yes")],
                [picture(90, 40), picture(30, 60)], name="c",
            ),
            example_of(assembly, conversation("<image>\nred?", "no"), [picture(33, 90)], name="d"),
        ]
    )  # fmt: skip


def blind(assembly: Parts) -> Batch:
    return Batch.from_examples(
        [
            example_of(assembly, conversation("say red")),
            example_of(assembly, conversation("what is the color of the shape?", "blue"), name="b"),
        ]
    )


def loss(model, read: Read, batch: Batch, **options) -> torch.Tensor:
    return head_loss_sum(model, read(model, batch, **options), batch.targets)


def loss_and_gradients(model, read: Read, batches: Sequence[Batch], **options) -> tuple[float, dict]:
    """Of all micro-batches."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        part = loss(model, read, batch, **options)
        part.backward()
        total += part.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: tuple[float, dict], expected: tuple[float, dict]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_what_is_packed_is_tested_and_a_prefix_that_sees_ahead_is_padded(tmp_path):
    assert set(FAMILIES) >= set(PACKED)
    assert needs_padding(load_parts(ModelConfig(vlm=str(make_vlm(tmp_path, "paligemma")))).model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", PACKED)
def test_a_packed_lean_step_has_the_loss_and_gradients_of_a_padded_stock_step(family, checkpointing, folders):
    assembly = tuned(folders[family])
    model = assembly.model
    if checkpointing:
        model.get_decoder().gradient_checkpointing_enable({"use_reentrant": False})
    batches = [sighted(assembly), blind(assembly), sighted(assembly)]
    expected = loss_and_gradients(model, padded_hidden, batches)
    assert {part_of(name) for name in expected[1]} >= {"language", "vision"}
    pack(model)
    assert model.get_decoder().config._attn_implementation == SEGMENTS
    assert drops_positions(model)
    assert_equal(loss_and_gradients(model, supervised_hidden, batches), expected)


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_half_as_much_is_kept(family, folders):
    assembly = tuned(folders[family])
    model, batch = assembly.model, blind(assembly)  # the tower keeps the same
    stock = kept_bytes(lambda: loss(model, padded_hidden, batch), model)
    pack(model)
    layers = [module for module in model.modules() if isinstance(module, MoSLoRALinear)]
    products = sum(layer.lora_B["default"].weight.nbytes for layer in layers)  # the same for any number of tokens
    assert kept_bytes(lambda: loss(model, supervised_hidden, batch), model) - products < 0.5 * stock


@pytest.mark.parametrize("family", PACKED)
def test_a_rank_without_pictures_takes_part_with_a_weight_of_zero(family, folders):
    assembly = tuned(folders[family])
    model, batch = assembly.model, blind(assembly)
    dummy = Batch.from_examples([dummy_image_example(assembly.image_processing)])
    expected = loss_and_gradients(model, padded_hidden, [batch], dummy=dummy)
    alone = loss_and_gradients(model, padded_hidden, [batch])
    pack(model)
    found = loss_and_gradients(model, supervised_hidden, [batch], dummy=dummy)
    assert found[1].keys() > alone[1].keys()
    assert_equal(found, expected)
    assert_equal(loss_and_gradients(model, supervised_hidden, [batch]), alone)


@pytest.mark.parametrize("family", PACKED)
def test_a_picture_too_few_is_told_with_the_records(family, folders):
    assembly = tuned(folders[family])
    batch = sighted(assembly)
    fewer = Batch.from_examples([example_of(assembly, conversation("<image>\nred?"), [picture(50, 70)])])
    fewer = replace(batch, pixel_values=fewer.pixel_values, image_inputs=fewer.image_inputs)
    with pytest.raises(ModelError, match=r"do not match.* Records: a, b, c, d"):
        supervised_hidden(assembly.model, fewer)


def test_a_last_layer_that_deepstack_reaches_keeps_all_positions(folders):
    assembly = tuned(folders["qwen3_vl"], layers=2)  # and two deepstack layers
    batch = sighted(assembly)
    expected = loss_and_gradients(assembly.model, padded_hidden, [batch])
    pack(assembly.model)
    assert not drops_positions(assembly.model)
    assert_equal(loss_and_gradients(assembly.model, supervised_hidden, [batch]), expected)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_an_attention_with_a_mask_keeps_conversations_apart(family, name, folders):
    assembly = tuned(folders[family])
    batch = sighted(assembly)
    expected = loss_and_gradients(assembly.model, padded_hidden, [batch])
    set_attention(assembly.model, name)
    assert_equal(loss_and_gradients(assembly.model, supervised_hidden, [batch]), expected)


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_in_half_precision_losses_stay_together(family, folders):
    assembly = tuned(folders[family], dtype=torch.bfloat16)
    batch = sighted(assembly)
    expected, _ = loss_and_gradients(assembly.model, padded_hidden, [batch])
    pack(assembly.model)
    assert loss_and_gradients(assembly.model, supervised_hidden, [batch])[0] == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_measuring_in_between_changes_nothing_and_measures_what_padded_rows_would(family, folders, tmp_path):
    plain = recipe_for(folders[family], write_records(tmp_path), tmp_path / "plain")
    watched = replace(
        plain,
        data=replace(plain.data, validation=plain.data.train),
        train=replace(plain.train, output=str(tmp_path / "watched"), validate_every=1),
        validate=ValidateConfig(samples=8, sample_tokens=4),
    )
    train(plain)
    train(watched)
    runs = (tmp_path / "plain" / "metrics.jsonl", tmp_path / "watched" / "metrics.jsonl")
    lines, measured = ([json.loads(line) for line in path.read_text().splitlines()] for path in runs)
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in measured if "loss" in line]

    tuned_model = load(tmp_path / "watched", merge=False).model
    records = prepare(replace(plain, train=replace(plain.train, output=str(tmp_path / "again")))).training_set
    batch = Batch.from_examples([records[index] for index in range(len(records))])
    with torch.no_grad():
        expected = loss(tuned_model, padded_hidden, batch).item() / batch.supervised_tokens
    assert [line["validation_loss"] for line in measured if "validation_loss" in line][-1] == pytest.approx(
        expected, rel=1e-5
    )
    samples = [json.loads(line) for line in (tmp_path / "watched" / "tracked_samples.jsonl").read_text().splitlines()]
    blind_one = next(sample for sample in reversed(samples) if not sample["image"])
    chat = Chat(load(tmp_path / "watched", merge=False), max_new_tokens=4)
    assert blind_one["prediction"] == chat.ask(blind_one["question"])
