"""QMoSLoRA: a recipe with a language model in 4 bits trains its adapters and leaves the packed weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t

from mm_moslora import adapters
from mm_moslora.batch import Batch, Example
from mm_moslora.config import Recipe
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers, use_loss_head
from mm_moslora.models.memory_efficient.loss_head import head_loss_sum
from mm_moslora.models.meta_model import kept_bytes
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vlm import supervised_hidden
from mm_moslora.training.engine import LossModule, OptimizerSettings, TorchEngine
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.utils.errors import ModelError


def quantised(folder: Path) -> Recipe:
    return Recipe.from_dict(
        {
            "model": {"language": str(folder), "quantisation": "nf4"},
            "adapter": {"rank": 4, "alpha": 8},
            "optim": {"lr": 1e-2},
        }
    )


def test_adapters_train_on_a_base_in_four_bits(language_folder: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    recipe = quantised(language_folder)
    assembly = load_parts(recipe.model, dtype=torch.float32)
    attach_adapters(assembly, recipe.model, recipe.adapter)
    model = assembly.model.train()
    set_attention(model, choose_attention(model).name)
    use_lean_layers(model)
    use_loss_head(model)
    packed = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert packed
    before = [module.weight.data.clone() for module in packed]
    module = LossModule(model, None)
    settings = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    engine = TorchEngine(module, parameter_groups(module, recipe.optim), settings)
    ids = torch.arange(10, 40)
    batch = Batch.from_examples([Example(id="", input_ids=ids, supervised=torch.arange(30) >= 10)])
    losses = [engine.step([batch], 1.0).loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(module.weight.data, old) for module, old in zip(packed, before, strict=True))


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


def some_text() -> Batch:
    torch.manual_seed(1)
    lengths = (40, 7, 90)
    return Batch.from_examples(
        [Example(id="", input_ids=torch.randint(1, 90, (n,)), supervised=torch.arange(n) >= n // 2) for n in lengths]
    )


def loss_and_gradients(model: t.PreTrainedModel) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    given = some_text()
    torch.manual_seed(3)
    loss = head_loss_sum(model, supervised_hidden(model, given), given.targets)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def kept(model: t.PreTrainedModel) -> int:
    given = some_text()
    return kept_bytes(lambda: head_loss_sum(model, supervised_hidden(model, given), given.targets), model)


@pytest.mark.parametrize(
    ("kind", "dropout", "checkpointing"),
    [("nf4", 0.0, False), ("nf4", 0.3, True), ("fp4", 0.3, False)],
)
def test_lean_layers_over_packed_weights_give_the_numbers_of_stock_layers_and_keep_less(
    language_folder: Path, kind: str, dropout: float, checkpointing: bool
) -> None:
    model = language(language_folder, kind, targets=[], dtype=torch.float32, lora_dropout=dropout)
    model.model.layers[-1].is_last = False
    with adapters.use_kernel(model, "reference"):
        stock, before = loss_and_gradients(model), kept(model)
    assert use_lean_layers(model) == 2
    assert kept(model) < 0.7 * before
    model.model.layers[-1].is_last = not dropout  # fewer rows behind the last attention have other masks
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lean = loss_and_gradients(model)
    assert lean.keys() == stock.keys()
    for name, value in stock.items():
        assert (lean[name] - value).norm() <= 3e-5 * value.norm(), name


def test_in_bfloat16_lean_layers_over_four_bits_are_as_near_to_float32_as_stock_layers(language_folder: Path) -> None:
    """Both compute with the same dequantised weights, those of bfloat16; so does the truth."""
    model = language(language_folder, "nf4", targets=[], dtype=torch.bfloat16)
    with adapters.use_kernel(model, "reference"):
        stock, before = loss_and_gradients(model), kept(model)
    use_lean_layers(model)
    lean = loss_and_gradients(model)
    assert kept(model) < 0.7 * before
    truth = language(language_folder, "nf4", targets=[], dtype=torch.float32)
    for mine, other in zip(truth.parameters(), model.parameters(), strict=True):
        if mine.is_floating_point():
            mine.data = other.data.float()
    true = loss_and_gradients(truth)
    far = {name: [((found[name].float() - value).norm() / value.norm()).item() for found in (lean, stock)]
           for name, value in true.items()}  # fmt: skip
    means = [sum(pair[index] for pair in far.values()) / len(far) for index in range(2)]
    assert means[0] < 1.1 * means[1] < 0.1


def test_eight_bits_run_in_stock_layers(language_folder: Path) -> None:
    model = language(language_folder, "int8", targets=[], dtype=torch.float32)
    stock, before = loss_and_gradients(model), kept(model)
    use_lean_layers(model)
    lean = loss_and_gradients(model)
    model.model.layers[-1].is_last = False
    assert kept(model) == before
    assert all(torch.allclose(lean[name], value, atol=1e-6) for name, value in stock.items())


def test_quantisation_without_its_library_is_one_clear_error(
    language_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ModelError, match="needs bitsandbytes"):
        load_parts(quantised(language_folder).model)
