"""Factors that layers share: which layers, their gradients, folders, folds and merges, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM

from mm_moslora.adapters import (
    SHARINGS,
    MoSLoRAConfig,
    Sharing,
    adapted_modules,
    add_moslora,
    export_adapter,
    load_adapter,
    merge,
    save_adapter,
    use_kernel,
)
from mm_moslora.adapters.adapter_inspection import trained_parameters
from mm_moslora.adapters.folder_format import OWN_CONFIG, OWN_WEIGHTS
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.files import sha256_of
from tests.adapters.adapter_models import IDS, gpt2, llama, llava, logits, train_a_bit

FORMS = ("inputs", "layers:2")
LORA = {"mixer_init": "identity", "mixer_trainable": False}


def shared(share: str, model: nn.Module | None = None, **options: object) -> peft.PeftModel:
    return add_moslora(model or llama(), MoSLoRAConfig(r=4, lora_alpha=8, share=share, **options))


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def groups(model: peft.PeftModel) -> dict[str, list[list[str]]]:
    return model.peft_config["default"].shared_factors


def ends(model: peft.PeftModel, number: int) -> set[tuple[str, ...]]:
    """The names of the layers that share A, of one layer of the model."""
    return {
        tuple(path.rpartition(".")[2] for path in group) for group in groups(model)["A"] if f".{number}." in group[0]
    }


def test_layers_that_read_the_same_tensor_share_one_A() -> None:
    model = shared("inputs")
    assert ends(model, 1) == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    own = trained(shared("none"))
    assert own - trained(model) == 2 * 4 * (2 * 32 + 32)  # two layers, rank 4: two A of attention, one of the MLP
    assert sum(row.parameters for row in adapted_modules(model)) == trained(model)
    layers = dict(named_adapter_layers(model))
    q, k = (layers[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj"))
    assert q.outer_factors("default")[0] is k.outer_factors("default")[0]
    assert not torch.equal(q.factors("default").M, k.factors("default").M)


def test_successive_layers_of_one_kind_share_A_and_B() -> None:
    model = shared("layers:2", llama(num_hidden_layers=5))
    kinds = [group for group in groups(model)["B"] if group[0].endswith("q_proj")]
    assert kinds == [[f"model.layers.{n}.self_attn.q_proj" for n in pair] for pair in ((0, 1), (2, 3))]
    one = trained(shared("none", llama(num_hidden_layers=1)))
    assert trained(model) == 3 * one + 2 * 7 * 4 * 4  # three pairs A and B, seven mixers in the two other layers
    assert sum(row.parameters for row in adapted_modules(model)) == trained(model)


def test_a_unet_shares_within_blocks_of_one_width() -> None:
    blocks = nn.ModuleDict()  # the paths of a UNet: two attentions in each block, blocks of 32 and of 64
    for number, width in (("0", 32), ("1", 64)):
        pair = nn.ModuleList(nn.ModuleDict({"to_q": nn.Linear(width, width)}) for _ in range(3))
        blocks[number] = nn.ModuleDict({"attentions": pair})
    alone = nn.ModuleList(nn.ModuleDict({"proj_in": nn.Linear(width, 8)}) for width in (8, 16))
    unet = nn.ModuleDict({"up_blocks": blocks, "mid": nn.ModuleDict({"to_q": nn.Linear(32, 32)})})
    paths = [path for path, module in unet.named_modules() if isinstance(module, nn.Linear)]
    assert SHARINGS["layers"]("layers:2", 2).groups(unet, paths) == [
        *([f"up_blocks.{block}.attentions.{n}.to_q" for n in pair] for block in (0, 1) for pair in ((0, 1), (2,))),
    ]
    unequal = ["0.proj_in", "1.proj_in"]  # nothing to count by: one group, which is refused for its widths
    assert SHARINGS["layers"]("layers:2", 2).groups(alone, unequal) == [unequal]


def test_a_pass_shows_what_layers_read_whatever_their_names() -> None:
    both = add_moslora(
        llava(), MoSLoRAConfig(r=4, share="inputs"), component=["model.language_model", "model.vision_tower"]
    )
    assert ends(both, 0) == {("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj", "q_proj"), ("gate_proj", "up_proj")}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    parallel = CohereForCausalLM(CohereConfig(vocab_size=64, num_key_value_heads=2, pad_token_id=0, **sizes))
    assert ends(shared("inputs", parallel), 0) == {("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}


def test_one_configuration_serves_several_models() -> None:
    config = MoSLoRAConfig(r=4, share="layers:2", target_modules=["q_proj"])
    two, five = (peft.get_peft_model(llama(num_hidden_layers=layers), config) for layers in (2, 5))
    assert [len(groups(model)["A"]) for model in (two, five)] == [1, 2]
    assert not config.shared_factors


def test_a_model_without_values_has_the_same_groups() -> None:
    with torch.device("meta"):
        bare = add_moslora(llama(), MoSLoRAConfig(r=4, share="inputs"))
    assert groups(bare) == groups(shared("inputs"))


def gradients(model: nn.Module, kernel: str) -> dict[str, Tensor]:
    """Gradients of two micro-batches by the names of parameters."""
    model.zero_grad()
    model.train()
    torch.manual_seed(0)  # of dropout
    with use_kernel(model, kernel):
        for last in (False, True):
            model(IDS + last, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kernel", ["fused", "reference"])
@pytest.mark.parametrize(("share", "options"), [(FORMS[0], {}), (FORMS[1], {"lora_dropout": 0.2}), (FORMS[0], LORA)])
def test_the_gradient_of_a_shared_factor_is_the_sum_of_those_of_its_copies(share, options, kernel) -> None:
    model = shared(share, **options)
    train_a_bit(model)
    apart = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8, **options))
    apart.load_state_dict(model.state_dict())
    assert trained(apart) > trained(model)
    torch.testing.assert_close(logits(apart.eval()), logits(model.eval()))
    together, single = gradients(model, kernel), gradients(apart, kernel)
    for factor, found in groups(model).items():
        for group in found:
            names = [f"base_model.model.{path}.lora_{factor}.default.weight" for path in group]
            assert set(names) & together.keys() == {names[0]}
            single[names[0]] = sum(single.pop(name) for name in names)
    assert together.keys() == single.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, single[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.fixture(scope="module", params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose layers share factors, after some training; its logits lie beside it."""
    path = tmp_path_factory.mktemp("shared") / "adapter"
    model = shared(request.param)
    train_a_bit(model)
    save_adapter(model, path)
    torch.save(logits(model), path.parent / "logits.pt")
    return path


def expected(folder: Path) -> Tensor:
    return torch.load(folder.parent / "logits.pt")


def test_a_folder_holds_every_layers_own_factors_and_trains_on_as_shared(folder: Path) -> None:
    again = load_adapter(llama(), folder, trainable=True)
    torch.testing.assert_close(logits(again), expected(folder))
    fresh = shared(again.peft_config["default"].share)
    assert trained(again) == trained(fresh)
    assert groups(again) == groups(fresh)
    by_peft = peft.PeftModel.from_pretrained(llama(), str(folder), is_trainable=True, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(by_peft), expected(folder))
    assert trained(by_peft) == trained(fresh)
    assert trained_parameters(folder) == trained(fresh)
    load_adapter(fresh, folder, trainable=True)  # into an adapter that is there
    torch.testing.assert_close(logits(fresh), expected(folder))


def test_fold_merge_and_export_know_nothing_of_sharing(folder: Path, tmp_path: Path) -> None:
    plain = peft.PeftModel.from_pretrained(llama(), str(folder), config=peft.LoraConfig.from_pretrained(str(folder)))
    torch.testing.assert_close(logits(plain), expected(folder), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(merge(load_adapter(llama(), folder))), expected(folder), atol=1e-5, rtol=1e-4)
    export_adapter(folder, tmp_path / "plain", layout="peft")
    exported = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert not {"share", "shared_factors"} & exported.keys()
    read = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "plain"))
    torch.testing.assert_close(logits(read), expected(folder), atol=1e-5, rtol=1e-4)


def test_masters_of_a_trainer_are_saved_for_every_layer(tmp_path: Path) -> None:
    model = shared("layers:2")
    state = {name: torch.randn_like(value) for name, value in model.named_parameters() if value.requires_grad}
    save_adapter(model, tmp_path, state=state)
    again = load_adapter(llama(), tmp_path)
    for name, value in again.named_parameters():
        if name in state:
            assert torch.equal(value, state[name])


def test_copies_that_differ_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / OWN_WEIGHTS)
    name = next(name for name in tensors if "layers.1.self_attn.k_proj.lora_A" in name)
    tensors[name] = tensors[name] + 1
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / OWN_WEIGHTS)
    manifest = json.loads((tmp_path / OWN_CONFIG).read_text())
    manifest["files"][OWN_WEIGHTS] = sha256_of(tmp_path / OWN_WEIGHTS)
    (tmp_path / OWN_CONFIG).write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match="its configuration says that layers share them"):
        load_adapter(llama(), tmp_path)
    model = load_adapter(llama(), folder)
    before = logits(model)
    with pytest.raises(AdapterError, match="its layers share"):
        peft.set_peft_model_state_dict(model, tensors)
    manifest["config"] |= {"share": "none", "shared_factors": {}}  # a folder of layers that share nothing
    (tmp_path / OWN_CONFIG).write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match="layers share"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


class Values(Sharing):
    """The values of all layers share A."""

    def groups(self, model, paths):
        return [[path for path in paths if path.endswith("v_proj")]]


def test_a_form_of_ones_own_is_loaded_without_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(SHARINGS, "values", Values)
        model = shared("values")
        train_a_bit(model)
        save_adapter(model, tmp_path)
    assert groups(model) == {"A": [[f"model.layers.{n}.self_attn.v_proj" for n in range(2)]]}
    with pytest.raises(AdapterError, match="share is 'values', expected one of none, inputs, layers"):
        MoSLoRAConfig(share="values")
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path, trainable=True)), logits(model))


REFUSED = {
    "an unknown form": ({"share": "input"}, "expected one of none, inputs, layers. Did you mean 'inputs'"),
    "no size": ({"share": "layers"}, "layers takes how many successive layers"),
    "a size": ({"share": "inputs:2"}, "takes no size"),
    "one layer": ({"share": "layers:1"}, "one layer alone shares nothing"),
    "one target": ({"share": "inputs", "target_modules": ["q_proj"]}, "nothing to share"),
    "no mixer": ({"share": "layers:2"} | LORA, "all get the same update"),
    "a fixed mixer": (
        {"share": "layers:2", "mixer_init": "butterfly", "mixer_trainable": False},
        "or with one that is fixed, all get the same update",
    ),
    "no mixer somewhere": (
        {"share": "layers:2", "mixer_pattern": {"layers.1.*q_proj": "none"}},
        "has no mixer of its own",
    ),
    "two ranks": ({"share": "inputs", "rank_pattern": {"v_proj": 2}}, r"rank and width \(4, 32\) and \(2, 32\)"),
    "places of factors": ({"share": "inputs", "factor_form": "stella"}, "it places A and B of every layer"),
    "a start by layer": ({"share": "inputs", "init_lora_weights": "olora"} | LORA, "a start of each layer"),
    "a random B": ({"share": "inputs", "init_lora_weights": False}, "a start of each layer"),
    "an empty group": ({"shared_factors": {"A": [[]]}}, "each a list of two or more"),
    "no groups": ({"shared_factors": ["a"]}, "expected A, B or both"),
    "bias of B": ({"share": "layers:2", "lora_bias": True}, "the bias of B"),
    "unequal widths": (
        {"shared_factors": {"A": [["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]]}},
        r"A of model.layers.0.mlp.up_proj and model.layers.0.mlp.down_proj cannot be one: .*\(4, 32\) and \(4, 48\)",
    ),
    "no such layer": ({"shared_factors": {"A": [["model.layers.0.mlp.up_proj", "model.norm"]]}}, "no adapted linear"),
    "another factor": ({"shared_factors": {"M": [["a", "b"]]}}, "expected A, B or both"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_share_is_refused_and_the_model_stays(case: str) -> None:
    options, message = REFUSED[case]
    model = llama()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(AdapterError, match=message):
        add_moslora(model, MoSLoRAConfig(r=4, lora_alpha=8, **options), targets=options.get("target_modules"))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_layers_of_other_widths_and_models_that_cannot_be_probed_are_refused() -> None:
    with pytest.raises(AdapterError, match="nothing to share"):
        shared("inputs", gpt2())  # its query, key and value are one layer
    with pytest.raises(AdapterError, match="called by a model of transformers"):
        shared("inputs", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    wide = llama()
    wide.model.layers[1].mlp.down_proj = nn.Linear(20, 32, bias=False)
    with pytest.raises(AdapterError, match=r"layers.0.mlp.down_proj and model.layers.1.mlp.down_proj cannot be one"):
        shared("layers:2", wide)
