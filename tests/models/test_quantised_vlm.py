"""Models on 4 and 8 bits: the language model is packed, all else is as it was, and lean layers run over it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as t
from mm_moslora_eval.backends.open_model import open_model
from pass_checks import assert_same_gradients, kept, learnt, texts
from PIL import Image
from tiny import supervised_logits
from transformers import Qwen3VLMoeConfig
from vlm_runs import recipe_for, write_records
from vlms import make_vlm

from mm_moslora import adapters
from mm_moslora.adapters.layers.base_weights import quantisation
from mm_moslora.batch import Batch, Example
from mm_moslora.cli.export_verbs import export
from mm_moslora.config import AdapterConfig, ModelConfig, Recipe
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.models.assembly import Parts, load_parts
from mm_moslora.models.load_model import load
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers, use_loss_head
from mm_moslora.models.pretrained_vlm import outside_decoder
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vlm import part_of
from mm_moslora.serve.terminal_chat import Chat
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ModelError

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

KINDS = {"qwen2_5_vl": "nf4", "internvl": "int8"}


def logits_of(parts: Parts) -> torch.Tensor:
    seen = parts.image_processing.process([Image.linear_gradient("L").convert("RGB").resize((60, 40))])
    turns = [Turn(role="user", text="<image>\nwhat color?"), Turn(role="assistant", text="dark red")]
    encoded = ConversationEncoder.of(parts).encode(turns, pictures=[item.placeholders for item in seen])
    example = Example(id="a", input_ids=encoded.input_ids, supervised=encoded.supervised, pictures=seen)
    with torch.no_grad():
        return supervised_logits(parts.model.eval(), Batch.from_examples([example])).float()


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, its base beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    base = make_vlm(folder / "base", request.param)
    recipe = recipe_for(base, write_records(folder), folder / "run", quantisation=KINDS[request.param])
    recipe = replace(recipe, train=replace(recipe.train, steps=4))
    train(recipe)
    return folder / "run"


def test_the_language_model_alone_is_packed_and_stays_as_it_was(run: Path) -> None:
    tuned = load(run)
    packed = [name for name, module in tuned.model.named_modules() if quantisation(module)]
    assert packed
    assert all(part_of(f"{name}.") == "language" and "lm_head" not in name for name in packed)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert losses[-1] < losses[0]
    base = load_parts(ModelConfig(vlm=str(run.parent / "base"), quantisation=KINDS[tuned.model.config.model_type]))
    assert (logits_of(tuned) - logits_of(base)).abs().max() > 1e-3
    before = {
        name: weight for name, weight in base.model.state_dict().items() if weight.dtype in (torch.uint8, torch.int8)
    }
    after = {name.replace(".base_layer", ""): weight for name, weight in tuned.model.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("to", ["hf", "lora"])
def test_exports_have_the_logits_of_the_run(run: Path, tmp_path: Path, to: str) -> None:
    assert export(run, tmp_path / "out", to=to, dtype="fp32") == 0
    exported = load(tmp_path / "out", merge=False)
    assert all(quantisation(module) is None for module in exported.model.modules())
    live = logits_of(load(run))
    if to == "hf":  # what the packed weights stand for; int8 rounds its inputs, too
        eight = exported.model.config.model_type == "internvl"
        torch.testing.assert_close(logits_of(exported), live, rtol=0, atol=(0.05 if eight else 1e-4) * live.abs().max())
    else:  # the adapter alone, on the base as it is published
        assert exported.base["exported"] == str(run.parent / "base")


def test_a_run_answers_in_the_terminal_and_in_the_harness(run: Path) -> None:
    chat = Chat(load(run), max_new_tokens=3)
    chat.show(run.parent / "images" / "0.png")
    assert isinstance(chat.ask("what color?"), str)
    model = open_model(str(run))
    assert model is not None


def test_an_assembled_model_on_four_bits_is_loaded_and_exported_too(recipe: Recipe, tmp_path: Path) -> None:
    chosen = replace(
        recipe,
        model=replace(recipe.model, quantisation="nf4"),
        train=replace(recipe.train, steps=2, output=str(tmp_path / "run")),
    )
    train(chosen)
    live = load(tmp_path / "run")
    assert any(map(quantisation, live.model.modules()))
    assert export(tmp_path / "run", tmp_path / "out", to="llava", dtype="fp32") == 0
    exported = load(tmp_path / "out")
    assert not any(map(quantisation, exported.model.modules()))
    torch.testing.assert_close(logits_of(exported), logits_of(live), rtol=0, atol=1e-4)


def test_experts_that_would_stay_dense_are_refused() -> None:
    with pytest.raises(ModelError, match=r"nf4, but \d+% of the language model's weights are experts .*gate_up_proj"):
        outside_decoder(Qwen3VLMoeConfig(), "nf4")


def test_what_cannot_be_packed_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_vlm(tmp_path / "model", "qwen2_5_vl")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match=r"quantisation is nf4, but the weights of .* are packed already \(awq\)"):
        load_parts(ModelConfig(vlm=str(folder), quantisation="nf4"))


def test_adapters_of_the_tower_stay_beside_a_packed_language_model(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(
        {"model": {"vlm": str(make_vlm(tmp_path, "qwen2_5_vl")), "quantisation": "nf4", "vision": {"mode": "adapter"}}}
    )
    parts = load_parts(recipe.model)
    attach_adapters(parts, recipe.model, AdapterConfig(rank=2))
    trained = {part_of(name) for name, weight in parts.model.named_parameters() if weight.requires_grad}
    assert trained >= {"language", "vision"}


def language(
    folder: Path, kind: str, *, targets: list[str] | None, dtype: torch.dtype, **options: object
) -> t.LlamaForCausalLM:
    bits = {"load_in_8bit": True}
    if kind in ("nf4", "fp4"):
        bits = {
            "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }  # fmt: skip
    how = t.BitsAndBytesConfig(**bits) if kind in ("nf4", "fp4", "int8") else None
    model = t.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=how)
    model.requires_grad_(False)
    torch.manual_seed(0)
    if targets is not None:
        config = adapters.MoSLoRAConfig(r=4, lora_alpha=8, **options)
        adapters.add_moslora(model, config, targets=targets or "all-linear", autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    set_attention(model, choose_attention(model).name)
    use_loss_head(model)
    return model.train()


def loss_and_gradients(model: t.PreTrainedModel, given: Batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    loss, gradients = learnt(model, given)
    return gradients | {"loss": torch.tensor(loss)}


@pytest.mark.parametrize(
    ("kind", "dropout", "checkpointing"),
    [("nf4", 0.0, False), ("nf4", 0.3, True), ("fp4", 0.3, False)],
)
def test_lean_layers_over_packed_weights_give_the_numbers_of_stock_layers_and_keep_less(
    language_folder: Path, kind: str, dropout: float, checkpointing: bool
) -> None:
    model = language(language_folder, kind, targets=[], dtype=torch.float32, lora_dropout=dropout)
    given = texts(40, 7, 90)
    model.model.layers[-1].is_last = False
    with adapters.use_kernel(model, "reference"):
        stock, before = loss_and_gradients(model, given), kept(model, given)
    assert use_lean_layers(model) == 2
    assert kept(model, given) < 0.7 * before
    model.model.layers[-1].is_last = not dropout  # fewer rows behind the last attention have other masks
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(loss_and_gradients(model, given), stock)


def test_in_bfloat16_lean_layers_over_four_bits_are_as_near_to_float32_as_stock_layers(language_folder: Path) -> None:
    """Both compute with the same dequantised weights, those of bfloat16; so does the truth."""
    model = language(language_folder, "nf4", targets=[], dtype=torch.bfloat16)
    given = texts(40, 7, 90)
    with adapters.use_kernel(model, "reference"):
        stock, before = loss_and_gradients(model, given), kept(model, given)
    use_lean_layers(model)
    lean = loss_and_gradients(model, given)
    assert kept(model, given) < 0.7 * before
    truth = language(language_folder, "nf4", targets=[], dtype=torch.float32)
    for mine, other in zip(truth.parameters(), model.parameters(), strict=True):
        if mine.is_floating_point():
            mine.data = other.data.float()
    true = loss_and_gradients(truth, given)
    far = {name: [((found[name].float() - value).norm() / value.norm()).item() for found in (lean, stock)]
           for name, value in true.items()}  # fmt: skip
    means = [sum(pair[index] for pair in far.values()) / len(far) for index in range(2)]
    assert means[0] < 1.1 * means[1] < 0.1


def test_eight_bits_run_in_stock_layers(language_folder: Path) -> None:
    model = language(language_folder, "int8", targets=[], dtype=torch.float32)
    given = texts(40, 7, 90)
    stock, before = loss_and_gradients(model, given), kept(model, given)
    use_lean_layers(model)
    lean = loss_and_gradients(model, given)
    model.model.layers[-1].is_last = False
    assert kept(model, given) == before
    assert all(torch.allclose(lean[name], value, atol=1e-6) for name, value in stock.items())


def test_quantisation_without_its_library_is_one_clear_error(
    language_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ModelError, match="needs bitsandbytes"):
        load_parts(ModelConfig(language=str(language_folder), quantisation="nf4"))
