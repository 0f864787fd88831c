"""Pairs in rows without padding: losses and gradients are those of TRL's padded rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pairs import logged, make_recipe
from PIL import Image
from tiny import COLOURS
from torch import nn
from vlms import make_vlm

from mm_moslora.batch import Batch, Example
from mm_moslora.config import Recipe
from mm_moslora.models.families import VLMS
from mm_moslora.models.load_model import load
from mm_moslora.models.vlm import supervised_hidden
from mm_moslora.preferences.pair_rows import ROW, PairRows
from mm_moslora.preferences.preference_setup import PairCollator, PreferenceRun, prepare, rows_of
from mm_moslora.preferences.preference_training import train_preferences
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.identity import sha256_of

pytest.importorskip("trl", reason="trl is not installed")
MIXTURE = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.5}
PACKED = {"pack_tokens": 512}
OTHERS = sorted(name for name, family in VLMS.items() if family.packed and name not in ("qwen2_5_vl", "qwen3_vl"))


@pytest.fixture(scope="module")
def mixed_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No, one and two pictures of different sizes, answers of other lengths, which begin alike or not."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "images").mkdir()
    names, lines = list(COLOURS), []
    for index in range(10):
        pictures = [f"{index}-{number}.png" for number in range((1, 2, 0, 1, 1)[index % 5])]
        for number, name in enumerate(pictures):
            size = (30 + 25 * (index % 3), 33 + 20 * number)
            Image.new("RGB", size, COLOURS[names[index % 3]]).save(folder / "images" / name)
        question = "<image>" * len(pictures) + f"what is the color? {index}"
        chosen, rejected = "red " * (1 + index % 4), "red " * (index % 2) + "green blue " * (1 + index % 3)
        turns = [
            {"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"},
            {"role": "user", "content": question}, {"role": "assistant", "content": chosen.strip()},
        ]  # fmt: skip
        record = {"id": f"m{index}", "messages": turns[0 if index % 3 else 2 :], "images": pictures}
        lines.append(json.dumps(record | {"rejected_response": rejected.strip()}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def model(request: Any, recipe: Recipe, tmp_path: Path) -> dict[str, Any]:
    """Adapters in the tower of ready-made ones; of the assembled one it is frozen."""
    if request.param != "assembled":
        return {"vlm": str(make_vlm(tmp_path / "model", request.param)), "vision": {"mode": "adapter"}}
    from mm_moslora.training.training_loop import train

    train(recipe)
    assert recipe.model.vision is not None
    return {
        "language": recipe.model.language, "vision": {"name": recipe.model.vision.name},
        "projector": {"weights": recipe.train.output, "mode": "frozen"},
    }  # fmt: skip


def with_effect(run: PreferenceRun) -> None:
    """Factors other than the reference's."""
    torch.manual_seed(3)
    for name, parameter in run.assembly.model.named_parameters():
        if "lora_B" in name and ".default" in name:
            nn.init.normal_(parameter, std=0.05)


def losses_and_gradients(recipe: Recipe, batches: list[list[int]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of micro-batches of these pairs."""
    from mm_moslora.preferences.trl_trainers import PairTrainer

    run = prepare(recipe)
    trainer = PairTrainer(run, None)  # type: ignore[arg-type]
    with_effect(run)
    run.peft_model.train()
    losses = []
    for numbers in batches:
        rows = [{"item": number, "held_out": 0} for number in numbers]
        inputs = trainer.data_collator(rows)
        trainer.mean_sizes = torch.tensor([4.0, 20.0])
        loss = trainer.compute_loss(run.peft_model, inputs)
        loss.backward()
        losses.append(loss.item())
    return losses, {
        name: parameter.grad for name, parameter in run.assembly.model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize(
    "model",
    ["assembled", "qwen2_5_vl", "qwen3_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
    indirect=True,
)
def test_losses_and_gradients_are_those_of_padded_rows(
    model: dict[str, Any], mixed_pairs: Path, tmp_path: Path
) -> None:
    """Of several micro-batches, and with answers that share a beginning."""
    batches = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9], [2]]

    def recipe(name: str, **data: Any) -> Recipe:
        return make_recipe(tmp_path / name, mixed_pairs, model, preference=MIXTURE, data=data)

    expected, gradients = losses_and_gradients(recipe("padded"), batches)
    found, own = losses_and_gradients(recipe("packed", **PACKED), batches)
    assert found == pytest.approx(expected, rel=1e-5)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("model", ["assembled", "qwen2_5_vl"], indirect=True)
def test_a_picture_is_encoded_once_for_both_answers(model: dict[str, Any], mixed_pairs: Path, tmp_path: Path) -> None:
    """A frozen tower of an assembled model encodes it once for the policy and for the reference, too."""
    from mm_moslora.preferences.trl_trainers import PairTrainer

    run = prepare(make_recipe(tmp_path / "run", mixed_pairs, model, data=PACKED))
    trainer = PairTrainer(run, None)  # type: ignore[arg-type]
    inner: Any = run.assembly.model.model
    seen: list[int] = []
    tower = inner.vision_tower if hasattr(inner, "vision_tower") else inner.visual
    tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["grid_thw"]) if "grid_thw" in kwargs else len(args[0])),
        with_kwargs=True,
    )
    inputs = trainer.data_collator([{"item": number, "held_out": 0} for number in (0, 1, 2, 3)])
    trainer.compute_loss(run.peft_model.eval(), inputs)
    assert seen == ([4, 4] if "vlm" in model else [3])  # two of them are equal after padding


SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "same_prompt", "tokens"),
    [
        pytest.param(transformers.LlamaConfig(**SMALL), True, 20 + 5 + 3, id="shared"),
        pytest.param(transformers.MistralConfig(**SMALL, sliding_window=4), True, 20 + 5 + 3, id="window"),
        pytest.param(transformers.LlamaConfig(**SMALL), False, 20 + 5 + 20 + 3, id="other prompts"),
        pytest.param(transformers.Gemma2Config(**SMALL), True, 20 + 5 + 20 + 3, id="capped scores"),
    ],
)
def test_each_answer_of_a_row_is_as_it_is_alone(config: Any, same_prompt: bool, tokens: int) -> None:
    """Prompts that differ, and those of a decoder whose attention takes no shared ones, stand before each answer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    rows = PairRows.of(model, 512)
    prompt = torch.randint(1, 97, (20,))
    pairs = []
    for _ in range(2):
        prompts = [prompt, prompt if same_prompt else prompt.flip(0)]
        answers = [torch.randint(1, 97, (5,)), torch.randint(1, 97, (3,))]
        chosen, rejected = (
            Example(id="a", input_ids=torch.cat(ids), supervised=torch.arange(len(ids[1]) + 20) >= 20)
            for ids in zip(prompts, answers, strict=True)
        )
        pairs.append((chosen, rejected))
    row = rows.collate(pairs)[ROW]
    assert row.tokens == 2 * tokens
    with torch.no_grad():
        alone = [supervised_hidden(model, Batch.from_examples([one])) for pair in pairs for one in pair]
        torch.testing.assert_close(supervised_hidden(model, row), torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (
            transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4),
            "in a bloom model the conv.* see",
        ),
        (transformers.Lfm2Config(**SMALL, full_attn_idxs=[1]), "in a lfm2 model the conversations of one row see each"),
    ],
)
def test_decoders_that_mix_rows_are_refused_by_name(config: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"pack_tokens is 512, and {fault}.*Set data.pack_tokens to 0"):
        PairRows.of(transformers.AutoModelForCausalLM.from_config(config), 512)


def test_a_model_that_takes_padded_rows_is_refused_by_name(tmp_path: Path, picture_pairs: Path) -> None:
    model = {"vlm": str(make_vlm(tmp_path / "model", "paligemma"))}
    with pytest.raises(ConfigError, match=r"PaliGemmaForConditionalGeneration takes padded rows. Set data.pack_tokens"):
        prepare(make_recipe(tmp_path / "run", picture_pairs, model, data=PACKED))


def test_a_run_learns_and_goes_on_with_the_same_digits_and_any_micro_batch(
    vlm: Path, picture_pairs: Path, tmp_path: Path
) -> None:
    def recipe(name: str, **train: Any) -> Recipe:
        sections: dict[str, Any] = {
            "data": {"max_length": 64, "pack_tokens": 128, "train": [{**source, "hold_out": 3}]},
            "preference": MIXTURE, "train": {"global_batch": 2, "micro_batch": 1, "validate_every": 3} | train,
        }  # fmt: skip
        return make_recipe(tmp_path / name, picture_pairs, {"vlm": str(vlm)}, **sections)

    source = {"path": str(picture_pairs), "image_folder": str(picture_pairs.parent / "images")}
    straight = train_preferences(recipe("straight"))
    losses = logged(tmp_path / "straight")
    assert len(losses) == 6
    counters = read_json(tmp_path / "straight" / "summary.json")["counters"]
    assert 6 * 2 < counters["samples"] <= 6 * 2 * 4
    assert losses[-1] < losses[0] - 0.1
    assert logged(tmp_path / "straight", "rewards/margins")[0] == 0
    assert len(logged(tmp_path / "straight", "validation_loss")) == 2
    train_preferences(recipe("whole", micro_batch=2))
    assert logged(tmp_path / "whole") == pytest.approx(losses, rel=1e-5)
    assert train_preferences(recipe("resumed"), stop_at=2).step == 2
    resumed = train_preferences(recipe("resumed"), resume="required")
    assert logged(tmp_path / "resumed") == losses
    adapter = Path("adapter", "moslora.safetensors")
    assert sha256_of(resumed.checkpoint / adapter) == sha256_of(straight.checkpoint / adapter)
    assert load(tmp_path / "resumed").processor is not None


def test_rows_are_full_and_hold_every_pair_once_an_epoch(vlm: Path, picture_pairs: Path, tmp_path: Path) -> None:
    data = {"max_length": 64, "pack_tokens": 128}
    run = prepare(make_recipe(tmp_path / "run", picture_pairs, {"vlm": str(vlm)}, data=data))
    table = rows_of(run, held_out=False)["item"]
    first = list(table[: run.rows_per_epoch])
    assert sorted(number for row in first for number in row) == list(range(12))
    assert len(table) == 6 * 4
    assert list(table[run.rows_per_epoch : 2 * run.rows_per_epoch]) != first
    tokens = [PairCollator(run=run)([{"item": row, "held_out": 0}])[ROW].tokens for row in first]
    assert max(tokens) <= 128
    assert sum(tokens[:-1]) / len(tokens[:-1]) > 64


@pytest.mark.parametrize("model", ["assembled", "qwen2_5_vl"], indirect=True)
def test_half_precision_and_recomputed_layers(model: dict[str, Any], picture_pairs: Path, tmp_path: Path) -> None:
    train = {"precision": "bf16", "gradient_checkpointing": True, "steps": 3}
    train_preferences(make_recipe(tmp_path / "pairs", picture_pairs, model, data=PACKED, train=train))
    losses = logged(tmp_path / "pairs")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]
