"""PEFT's own entrances give A, M and B back, and the functions of PEFT that are replaced are those that were read."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mm_moslora.adapters import MoSLoRAConfig, MoSLoRALayer, add_moslora, load_adapter, peft_patches, save_adapter
from mm_moslora.adapters.folders.folder_tensors import initial_mixers
from mm_moslora.adapters.tuner import MoSLoRAModel
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import folded, llama, logits, train_a_bit

TARGETS = ["q_proj", "v_proj"]


def adapted(base: nn.Module | None = None, **changes) -> peft.PeftModel:
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = add_moslora(llama() if base is None else base, MoSLoRAConfig(**(options | changes)))
    train_a_bit(model)
    return model.eval()


def factors(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    return {
        name.replace(f".{adapter_name}", ""): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if "lora_" in name and f".{adapter_name}." in name
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a`: the adapter; `base`: the model that it names."""
    root = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(root / "base")
    save_adapter(adapted(LlamaForCausalLM.from_pretrained(root / "base").eval()), root / "a")
    return root / "a"


FORMS = [{}, {"mixer_init": "butterfly", "mixer_trainable": False}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trainable", [True, False])
def test_from_pretrained_gives_every_form_back(form: dict, trainable: bool, tmp_path: Path) -> None:
    model = adapted(**form)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=trainable)
    assert same(factors(loaded), factors(model))
    assert trained(loaded) == (trained(model) if trainable else set())
    assert isinstance(loaded.base_model, MoSLoRAModel)
    assert isinstance(loaded.peft_config["default"], MoSLoRAConfig)


@pytest.mark.parametrize("trainable", [True, False])
def test_auto_peft_model_loads_base_and_adapter(saved: Path, trainable: bool) -> None:
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(saved, is_trainable=trainable)
    assert same(factors(loaded), factors(adapted()))
    assert bool(trained(loaded)) == trainable
    assert torch.equal(logits(loaded.eval()), logits(load_adapter(llama(), saved)))


def test_load_adapter_takes_a_new_name_and_one_that_is_there(saved: Path, tmp_path: Path) -> None:
    expected = factors(adapted())
    model = peft.PeftModel.from_pretrained(llama(), saved, is_trainable=True)
    model.load_adapter(saved, "second", is_trainable=True)
    assert same(factors(model, "second"), expected)
    assert any(".second." in name for name in trained(model))
    before = trained(model)
    train_a_bit(model.train())
    assert not same(factors(model), expected)
    model.load_adapter(saved, "default", is_trainable=True)
    assert same(factors(model), expected)
    assert trained(model) == before
    assert model.training
    damaged = Path(shutil.copytree(saved, tmp_path / "a"))
    (damaged / "moslora.safetensors").write_bytes(b"short")
    with pytest.raises(AdapterError, match="damaged or truncated"):
        model.load_adapter(damaged, "default")


def test_a_plain_lora_adapter_gets_the_folded_factors(saved: Path) -> None:
    plain = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    into = peft.get_peft_model(llama(), plain)
    into.load_adapter(saved, "default")
    named = peft.PeftModel.from_pretrained(llama(), saved, config=peft.LoraConfig.from_pretrained(saved))
    for model in (into, named):
        assert not any(isinstance(module, MoSLoRALayer) for module in model.modules())
        assert torch.equal(logits(model.eval()), logits(folded(llama(), saved)))
        torch.testing.assert_close(logits(model), logits(adapted()), atol=1e-5, rtol=0)
    config = peft.PeftConfig.from_pretrained(saved)
    assert type(config) is peft.LoraConfig
    fresh, base = peft.get_peft_model(llama(), config), llama()
    peft.inject_adapter_in_model(config, base)
    base_of_transformers = llama()
    base_of_transformers.load_adapter(saved)
    for model in (fresh, base, base_of_transformers):
        assert not any(isinstance(module, MoSLoRALayer) for module in model.modules())
    assert torch.equal(logits(base_of_transformers), logits(folded(llama(), saved)))
    own = MoSLoRAConfig.from_pretrained(saved)
    assert any("lora_mixer" in name for name, _ in peft.get_peft_model(llama(), own).named_parameters())


def test_a_configuration_written_by_hand_names_the_type_moslora(tmp_path: Path) -> None:
    """PEFT drops unknown keys with a warning: a misspelt one would give another start than was asked for."""
    given = {"peft_type": "MOSLORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": TARGETS}
    assert given["peft_type"] not in list(peft.PeftType)  # PEFT alone refuses the file
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(given | {"mixer_init": "kaiming"}))
    ways = (peft.PeftConfig.from_pretrained, peft.LoraConfig.from_pretrained, MoSLoRAConfig.from_pretrained)
    found = [*(way(str(tmp_path)) for way in ways), peft.get_peft_config(json.loads(file.read_text()))]
    assert all(type(config) is MoSLoRAConfig and config == found[0] for config in found)
    assert (found[0].mixer_init, found[0].inference_mode, found[0].peft_type) == ("kaiming", False, "LORA")
    assert any("lora_mixer" in name for name, _ in peft.get_peft_model(llama(), found[0]).named_parameters())
    file.write_text(json.dumps(given | {"mixer_inti": "kaiming"}))
    for way in ways:
        with pytest.raises(AdapterError, match=r"unknown keys \['mixer_inti'\]\. Did you mean 'mixer_init'"):
            way(str(tmp_path))


def test_an_adapter_on_the_hub_and_in_a_subfolder_comes_back(saved: Path, tmp_path: Path) -> None:
    """The hub's cache answers as the hub does."""
    snapshot = tmp_path / "models--someone--adapter" / "snapshots" / ("a" * 40)
    for place in (snapshot, snapshot / "inside"):
        shutil.copytree(saved, place, dirs_exist_ok=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    for where in ({}, {"subfolder": "inside"}):
        model = peft.PeftModel.from_pretrained(llama(), "someone/adapter", cache_dir=str(tmp_path), **where)
        assert same(factors(model), factors(adapted()))
    assert same(factors(peft.PeftModel.from_pretrained(llama(), snapshot, subfolder="inside")), factors(adapted()))
    for name in ("moslora.json", "moslora.safetensors"):
        (snapshot / name).unlink()
    plain = peft.PeftModel.from_pretrained(llama(), "someone/adapter", cache_dir=str(tmp_path))
    assert torch.equal(logits(plain), logits(folded(llama(), saved)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 2}, r"is \[2, 32\] there and \[4, 32\] here"),
        ({"target_modules": ["q_proj"]}, r"it has no .*v_proj\.lora_A\.weight"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, r"they lack .*k_proj\.lora_A"),
    ],
)
def test_values_of_another_adapter_are_refused_and_nothing_is_loaded(saved: Path, changes: dict, message: str) -> None:
    model = adapted(**changes)
    before = factors(model)
    with pytest.raises(AdapterError, match=message):
        model.load_adapter(saved, "default")
    assert same(factors(model), before)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"peft_type": "IA3", "target_modules": ["q_proj"]}', "peft_type 'IA3', expected LORA"),
        ("[]", "holds a list, expected an object"),
        ("{", "not valid JSON"),
        (None, "holds mixers and no configuration of them"),
    ],
)
def test_the_configuration_of_a_folder_is_its_own_or_an_error(
    saved: Path, tmp_path: Path, content: str | None, words: str
) -> None:
    folder = tmp_path / "a"
    if content is None:
        shutil.copytree(saved, folder)
        (folder / "moslora.json").unlink()
    else:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=words):
        MoSLoRAConfig.from_pretrained(folder)


def test_mixed_models_load_mixers_and_x_lora_loads_the_fold(saved: Path) -> None:
    mixed = peft.PeftMixedModel.from_pretrained(llama(), str(saved))
    assert torch.equal(logits(mixed.eval()), logits(load_adapter(llama(), saved)))
    base = llama()
    base.config.use_cache = False
    options = {"hidden_size": 32, "xlora_depth": 1, "adapters": {"0": str(saved), "1": str(saved)}}
    model = peft.get_peft_model(base, peft.XLoraConfig(task_type="CAUSAL_LM", **options))
    plain = factors(folded(llama(), saved))
    found = {name.replace(".0.weight", ".weight"): t for name, t in model.state_dict().items() if ".0.weight" in name}
    found = {name: tensor for name, tensor in found.items() if "lora_A" in name or "lora_B" in name}
    ends = {name[name.index("layers.") :]: tensor for name, tensor in plain.items()}
    assert same({name[name.index("layers.") :]: tensor for name, tensor in found.items()}, ends)


def test_trl_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(language_folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = Dataset.from_list([{"text": f"{number} and {number + 1} are two numbers."} for number in range(16)])
    config = MoSLoRAConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")

    def run(folder: str, resume: Path | None) -> dict[str, Tensor]:
        arguments = trl.SFTConfig(
            str(tmp_path / folder), per_device_train_batch_size=4, max_steps=4, save_steps=2, learning_rate=3e-2,
            report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, logging_strategy="no", max_length=32,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            AutoModelForCausalLM.from_pretrained(language_folder), arguments, train_dataset=rows, peft_config=config,
            processing_class=AutoTokenizer.from_pretrained(language_folder, trust_remote_code=False),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return factors(trainer.model) | initial_mixers(trainer.model, "default")

    whole = run("whole", None)
    torch.rand(1)  # so that the mixers that the checkpoint replaces are drawn as others
    assert any("lora_start" in name for name in whole)
    assert same(run("resumed", tmp_path / "whole" / "checkpoint-2"), whole)


def test_what_is_replaced_in_peft_is_what_was_read() -> None:
    """Read the new function, and its callers, before the expected words change."""
    replaced = (
        peft_patches._stock_state,
        peft_patches._stock_weights,
    )
    found = {f"{function.__module__}.{function.__name__}{inspect.signature(function)}" for function in replaced}
    assert found == {
        "peft.utils.save_and_load.get_peft_model_state_dict(model, state_dict=None, adapter_name: 'str' = 'default', "
        "unwrap_compiled: 'bool' = False, save_embedding_layers: \"bool | Literal['auto']\" = 'auto')",
        "peft.utils.save_and_load.load_peft_weights(model_id: 'str', device: 'Optional[str]' = None, key_mapping: "
        "'Optional[dict[str, str]]' = None, **hf_hub_download_kwargs) -> 'dict'",
    }
    assert "= get_peft_model_state_dict(" in inspect.getsource(peft.PeftModel.save_pretrained)
    assert peft.PeftModel.save_pretrained.__globals__["get_peft_model_state_dict"] is peft_patches.whole_state
    for caller in (peft.PeftModel.load_adapter, hotswap.hotswap_adapter):
        assert "load_peft_weights(" in inspect.getsource(caller)
        assert caller.__globals__["load_peft_weights"] is peft_patches.load_peft_weights


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (LoraModel, "_prepare_adapter_config", "self peft_config model_config"),
        (
            LoraModel, "_create_and_replace",
            "self lora_config adapter_name target target_name parent current_key parameter_name",
        ),
        (BaseTuner, "inject_adapter", "self model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict"),
        (LoraModel, "_check_merge_allowed", "self"),
        (LoraModel, "_get_adapter_state_dict", "model config adapter_name state_dict unwanted_adapter_names"),
        (LoraModel, "_remap_adapter_state_dict_for_load", "model config adapter_name state_dict"),
    ],
)  # fmt: skip
def test_the_methods_that_the_tuner_overrides_take_what_they_took(owner: type, name: str, parameters: str) -> None:
    assert name in vars(owner)
    assert name not in vars(LoraModel) or owner is LoraModel
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters.split()
