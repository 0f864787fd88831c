"""MoSLoRA on stacked parameters of experts: forward, merge, fold, folders, and what is refused; by logits."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from preloaded import Preloaded
from torch import Tensor, nn

from mm_moslora.adapters import (
    MoSLoRAConfig,
    adapted_modules,
    add_moslora,
    export_adapter,
    load_adapter,
    merge,
    save_adapter,
)
from mm_moslora.adapters.adapter_inspection import inspect_adapter, inspect_model
from mm_moslora.adapters.experts.expert_targets import layers_read_as_experts
from mm_moslora.adapters.folders.load_folder import read_folder
from mm_moslora.adapters.layers.expert_parameters import MoSLoRAExperts
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import IDS, folded, llama, logits, train_a_bit

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
NAMES = ["experts.gate_up_proj", "experts.down_proj"]


def qwen3_moe(**changes: object) -> nn.Module:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**(SIZES | EXPERTS | changes)))


def partly_dense() -> nn.Module:
    """Its first layer has no experts: gate_proj, up_proj and down_proj are linear layers there."""
    return qwen3_moe(mlp_only_layers=[0])


def qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=40)
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3_vl_moe() -> nn.Module:
    vision = {"depth": 2, "hidden_size": 24, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = SIZES | EXPERTS | {"rope_parameters": rope}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    )


def gpt_oss() -> nn.Module:
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": qwen3_moe, "qwen3_vl_moe": qwen3_vl_moe, "mixtral": mixtral, "gpt_oss": gpt_oss,
    "qwen2_moe": qwen2_moe, "partly_dense": partly_dense,
}  # fmt: skip


def base(name: str = "qwen3_moe") -> nn.Module:
    """In evaluation mode; equal weights at every call, also of experts, which some classes leave empty."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 3:
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted(name: str = "qwen3_moe", **options: object) -> peft.PeftModel:
    config = MoSLoRAConfig(**({"r": 4, "lora_alpha": 8, "target_parameters": NAMES} | options))
    model = add_moslora(base(name), config)
    train_a_bit(model, scale=0.1)
    return model.eval()


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_adapted_merged_and_folded_models_give_the_same_logits(name: str, tmp_path: Path) -> None:
    plain = logits(base(name))
    model = adapted(name)
    live = logits(model)
    assert float((live - plain).abs().max()) > 1e-2 * float(plain.abs().max())
    with model.disable_adapter():
        assert close(logits(model), plain)
    model.merge_adapter()
    assert close(logits(model), live)
    model.unmerge_adapter()
    assert close(logits(model), live)
    save_adapter(model, tmp_path / "own")
    model.save_pretrained(tmp_path / "peft")
    export_adapter(tmp_path / "own", tmp_path / "plain", layout="peft")
    for folder in ("own", "peft"):
        assert torch.equal(logits(load_adapter(base(name), tmp_path / folder)), live)
        assert torch.equal(logits(peft.PeftModel.from_pretrained(base(name), tmp_path / folder)), live)
    assert close(logits(load_adapter(base(name), tmp_path / "plain")), live)
    merged = merge(load_adapter(base(name), tmp_path / "own"))
    assert close(logits(merged), live)
    assert not any(isinstance(module, MoSLoRAExperts) for module in merged.modules())
    assert {key for key, _ in merged.named_parameters()} == {key for key, _ in base(name).named_parameters()}
    if not layers_read_as_experts(base(name), peft.LoraConfig.from_pretrained(tmp_path / "own")):
        assert close(logits(folded(base(name), tmp_path / "own")), live)


def test_plain_peft_without_this_package_computes_the_same(python: Preloaded, tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    base().save_pretrained(tmp_path / "base")
    code = f"""
import peft, sys, torch, transformers
base = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}).eval()
model = peft.PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
with torch.no_grad():
    live = model(torch.tensor({IDS.tolist()})).logits
    merged = model.merge_and_unload()(torch.tensor({IDS.tolist()})).logits
assert "mm_moslora" not in sys.modules
torch.save([live, merged], {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([python.stock, "-c", code], check=True, capture_output=True)
    for found in torch.load(tmp_path / "logits.pt"):
        assert close(found, logits(model))


def test_the_example_trains_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["experts.py", str(tmp_path / "adapter")])
    runpy.run_path(str(Path(__file__).parents[3] / "examples" / "experts.py"))
    printed = capsys.readouterr().out
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed))
    assert last < 0.8 * first
    assert float(printed.rpartition(" ")[2]) < 1e-4
    assert (tmp_path / "adapter" / "moslora.json").is_file()


def test_every_expert_has_a_mixer_and_all_of_them_learn() -> None:
    model = add_moslora(base(), MoSLoRAConfig(r=4, target_parameters=NAMES), targets=[])
    rows = adapted_modules(model)
    assert [(row.path.rpartition(".")[2], row.in_features, row.out_features) for row in rows[:2]] == [
        ("down_proj", 24, 32),
        ("gate_up_proj", 32, 48),
    ]
    assert len(rows) == 4
    mixers = {name: weight for name, weight in model.named_parameters() if "lora_mixer" in name}
    assert all(weight.shape == (4, 4, 4) for weight in mixers.values())
    some = next(iter(mixers.values())).detach()
    assert torch.allclose(some @ some.mT, torch.eye(4).expand(4, 4, 4), atol=1e-5)
    assert not torch.allclose(some[0], some[1])
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.partition(".lora_")[1] for name in trains} == {".lora_"}  # the router is frozen
    train_a_bit(model)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(bool(weight.grad.any()) for name, weight in model.named_parameters() if name in trains)


def test_the_update_is_that_of_the_formula() -> None:
    model = adapted()
    layers = {module.parameter_name: module for module in model.modules() if isinstance(module, MoSLoRAExperts)}
    for layer in layers.values():
        own = layer.factors("default")
        assert own.M is not None
        with layer.adapted_parameter() as seen:
            for expert in range(4):
                update = 2.0 * own.B[expert] @ own.M[expert] @ own.A[expert]
                weight = layer.get_base_layer().parametrizations[layer.parameter_name].original[expert]
                assert torch.allclose(seen[expert], weight + update, atol=1e-5)


def test_a_frozen_identity_is_pefts_lora_bit_for_bit() -> None:
    options = {"r": 4, "lora_alpha": 8, "target_parameters": NAMES, "target_modules": ["q_proj"]}
    torch.manual_seed(1)
    stock = peft.get_peft_model(base(), peft.LoraConfig(**options, init_lora_weights=False))
    torch.manual_seed(1)
    plain = MoSLoRAConfig(**options, init_lora_weights=False, mixer_init="identity", mixer_trainable=False)
    own = peft.get_peft_model(base(), plain)
    assert torch.equal(logits(own.eval()), logits(stock.eval()))
    own.merge_adapter()
    stock.merge_adapter()
    assert torch.equal(logits(own), logits(stock))


@pytest.mark.parametrize("form", ["diagonal", "block_diagonal:2", "low_rank:2"])
def test_every_form_with_a_matrix_folds(form: str, tmp_path: Path) -> None:
    model = adapted(
        mixer_form=form, rank_pattern={"gate_up_proj": 6}, use_rslora=True, mixer_pattern={"q_proj": "none"}
    )
    live = logits(model)
    save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(load_adapter(base(), tmp_path / "a")), live)
    assert close(logits(folded(base(), tmp_path / "a")), live)
    assert close(logits(merge(model)), live)


def test_a_second_adapter_and_a_saved_one_beside_it(tmp_path: Path) -> None:
    model = adapted()
    first = logits(model)
    save_adapter(model, tmp_path / "first")
    load_adapter(model, tmp_path / "first", adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(logits(model), first)
    assert len([module for module in model.modules() if isinstance(module, MoSLoRAExperts)]) == 4


def test_half_precision_rounds_as_the_weights_do(tmp_path: Path) -> None:
    model = add_moslora(base().to(torch.bfloat16), MoSLoRAConfig(r=4, target_parameters=NAMES))
    assert all(weight.dtype == torch.float32 for name, weight in model.named_parameters() if "lora_" in name)
    train_a_bit(model, scale=0.1)
    layers = [layer for layer in model.modules() if isinstance(layer, MoSLoRAExperts)]
    seen = []
    for layer in layers:
        with layer.adapted_parameter() as weight:
            seen.append(weight.detach().clone())
    model.merge_adapter()
    for layer, weight in zip(layers, seen, strict=True):  # logits may differ more: a rounded router takes others
        assert torch.allclose(layer.get_param(), weight, atol=2**-7 * float(weight.abs().max()))


def test_autocast_does_not_round_the_update() -> None:
    model = adapted()
    layer = next(layer for layer in model.modules() if isinstance(layer, MoSLoRAExperts))
    with layer.adapted_parameter() as weight:
        exact = weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        with layer.adapted_parameter() as weight:
            assert torch.equal(weight, exact)
        assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("names", [NAMES, ["down_proj"]])
def test_a_folder_of_stock_peft_trains_on_with_mixers(names: list[str], tmp_path: Path) -> None:
    """Whole names, and the ends that PEFT itself keeps."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names, init_lora_weights=False)
    stock = peft.get_peft_model(base(), config).eval()
    stock.save_pretrained(tmp_path / "stock")
    for trainable in (False, True):
        model = load_adapter(base(), tmp_path / "stock", trainable=trainable).eval()
        assert torch.equal(logits(model), logits(stock))
        assert any("lora_mixer" in name for name, _ in model.named_parameters()) == trainable
    save_adapter(model, tmp_path / "own")
    assert torch.equal(logits(load_adapter(base(), tmp_path / "own")), logits(stock))
    with pytest.raises(AdapterError, match="names experts by their ends only"):
        inspect_adapter(tmp_path / "stock")


def test_a_dense_layer_beside_experts_stays_a_layer() -> None:
    """PEFT takes gate_proj and up_proj for the experts' old names, wherever they are."""
    for name, place in (("qwen2_moe", "shared_expert."), ("partly_dense", "")):
        model = add_moslora(base(name), MoSLoRAConfig(r=4, target_parameters=NAMES))
        paths = {row.path for row in adapted_modules(model)}
        assert {f"model.layers.0.mlp.{place}{kind}_proj" for kind in ("gate", "up", "down")} < paths
        assert {row.rank for row in adapted_modules(model)} == {4}


def test_layers_that_plain_peft_would_take_for_experts_are_known(tmp_path: Path) -> None:
    dense = [f"model.layers.0.mlp.{kind}_proj" for kind in ("down", "gate", "up")]
    for name, expected in (("partly_dense", dense), ("qwen3_moe", []), ("mixtral", [])):
        save_adapter(adapted(name), tmp_path / name)
        config = peft.LoraConfig.from_pretrained(tmp_path / name)
        assert layers_read_as_experts(base(name), config) == expected


@pytest.mark.parametrize("names", [["w1", "w3"], ["q_proj", "w1", "w2", "w3"]])
def test_old_names_of_experts_are_read_as_peft_reads_them(names: list[str], tmp_path: Path) -> None:
    model = peft.get_peft_model(base("mixtral"), MoSLoRAConfig(r=4, target_modules=names))
    train_a_bit(model, scale=0.1)
    live = logits(model.eval())
    assert {row.path.rpartition(".")[2]: row.rank for row in adapted_modules(model)}["gate_up_proj"] == 8
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(logits(load_adapter(base("mixtral"), tmp_path / "a")), live)
    assert close(logits(merge(model)), live)


def test_reports_are_those_of_single_experts(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "a")
    live, kept = inspect_model(model), inspect_adapter(tmp_path / "a")
    assert [report.path for report in live] == [report.path for report in kept]
    paths = [report.path for report in live if "layers.0.mlp" in report.path]
    assert paths == [
        f"model.layers.0.mlp.experts.{name}.{i}" for name in ("down_proj", "gate_up_proj") for i in range(4)
    ]
    assert all(report.rank == 4 and report.moved and report.norm_update > 0 for report in kept)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1: an update of a weight has no input to drop"),
        ({"use_dora": True}, "use_dora is True: PEFT has no DoRA for them"),
        ({"lora_bias": True}, "lora_bias is True: they have no bias"),
        ({"factor_form": "svd"}, "factor_form is 'svd': it places the factors"),
        ({"init_lora_weights": "pissa", "mixer_init": "identity"}, "init_lora_weights is 'pissa'"),
    ],
)
def test_what_experts_cannot_have_is_refused_with_the_reason(options: dict, reason: str) -> None:
    with pytest.raises(AdapterError, match=f"target_parameters adapts experts.*{reason}"):
        MoSLoRAConfig(r=4, target_parameters=NAMES, **options)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["experts.gate_proj"],
            "names 'experts.gate_proj', which is no parameter.*Did you mean 'experts.gate_up_proj'",
        ),
        (["mlp.gate.weight"], r"mlp.gate.weight' cannot carry MoSLoRA: it is \[4, 32\] .*Routers stay frozen"),
        (["q_proj.weight"], "linear layers are adapted as modules"),
    ],
)
def test_names_that_are_no_experts_are_refused(names: list[str], message: str) -> None:
    model = base()
    for call in (
        lambda: add_moslora(model, MoSLoRAConfig(r=4, target_parameters=names)),
        lambda: peft.get_peft_model(model, MoSLoRAConfig(r=4, target_modules=["q_proj"], target_parameters=names)),
    ):
        with pytest.raises(AdapterError, match=message):
            call()
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_layers_that_are_left_out_are_left_out_of_the_experts_too() -> None:
    for options in ({"layers_to_transform": [1]}, {"exclude_modules": r".*layers\.0\..*"}):
        for targets in (["q_proj"], []):
            config = MoSLoRAConfig(r=4, target_parameters=NAMES, target_modules=targets, **options)
            for model in (add_moslora(base(), config), peft.get_peft_model(base(), config)):
                assert {row.path.split(".")[2] for row in adapted_modules(model)} == {"1"}
    with pytest.raises(AdapterError, match="leave none of the 4 stacked parameters"):
        add_moslora(base(), MoSLoRAConfig(r=4, target_parameters=NAMES, exclude_modules=["experts"]))


def test_weights_that_come_through_the_meta_device_are_whole(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "a", low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_without_experts_says_so() -> None:
    with pytest.raises(AdapterError, match="It has no stacked parameters"):
        add_moslora(llama(), MoSLoRAConfig(r=4, target_parameters=NAMES))


@pytest.mark.parametrize("layout", ["vllm", "diffusers", "kohya"])
def test_layouts_without_experts_refuse_them(layout: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(AdapterError, match=r"factors of experts .*Export with layout='peft'"):
        export_adapter(tmp_path / "a", tmp_path / "out", layout=layout)


def test_a_folder_that_nests_parameters_otherwise_is_refused(tmp_path: Path) -> None:
    """PEFT names factors by the order of a module's parameters: another order would exchange them without a word."""
    save_adapter(adapted(), tmp_path / "a")
    path = tmp_path / "a" / "moslora.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["target_parameters"].reverse()
    path.write_text(json.dumps(manifest))
    for load in (load_adapter, peft.PeftModel.from_pretrained):
        with pytest.raises(AdapterError, match=r"holds factors of .*down_proj where the model nests .*gate_up_proj"):
            load(base(), tmp_path / "a")


def test_a_damaged_factor_is_noticed(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "experts.lora_mixer" in name)[1, 0, 0] = float(
            "nan"
        )
    with pytest.raises(AdapterError, match="NaN"):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(AdapterError, match="NaN"):
        merge(model)


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    content = read_folder(tmp_path / "a")
    assert content.config.target_parameters[0] == "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(AdapterError, match="another base model"):
        load_adapter(qwen3_moe(num_experts=8), tmp_path / "a")
