"""Options of strangers' folders and of recipes name no files, models or code that PEFT would open."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import save_file

from mm_moslora import adapters
from mm_moslora.adapters.folders.permitted_options import permitted_options
from mm_moslora.adapters.peft_methods import method_config, method_named, method_names
from mm_moslora.config import AdapterConfig
from mm_moslora.models.trainable_parts import adapter_config
from mm_moslora.utils.errors import AdapterError, MoSLoRAError
from tests.adapters.adapter_models import llama


def _folder(folder: Path, **options: Any) -> Path:
    """A folder of stock PEFT with other options."""
    given = {"peft_type": "LORA"} | options
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    return folder


@pytest.mark.parametrize("kind", ["SHADOW", "shadow", "XLORA", "PREFIX_TUNING", "lora", "NEW", "", None, 7, ["LORA"]])
def test_a_folder_of_another_kind_is_not_handed_to_peft(tmp_path: Path, monkeypatch: Any, kind: Any) -> None:
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", lambda *_, **__: pytest.fail("PEFT was asked"))
    folder = _folder(tmp_path / "a", peft_type=kind, shadow_model=str(tmp_path / "a/shadow"), adapters={"x": "a/b"})
    with pytest.raises(AdapterError, match=r"has peft_type .*, which is not loaded.* Expected one of BEFT"):
        adapters.load_method(llama(), folder)
    with pytest.raises(AdapterError, match="peft_type"):
        adapters.load_adapter(llama(), folder)


BAD: dict[str, Any] = {
    "corda_config.cache_file": {"init_lora_weights": "corda", "corda_config": {"cache_file": "there/is.pt"}},
    "corda_config.covariance_file": {"corda_config": {"corda_method": "kpm", "covariance_file": "x"}},
    "megatron_core": {"megatron_config": None, "megatron_core": "a_module_here"},
    "arrow_config.task_adapter_names": {"arrow_config": {"task_adapter_names": ["me/adapter"]}},
    "init_lora_weights": {"init_lora_weights": "pissa_niter_4/../x"},
    "bias": {"bias": "../x"},
    "rank_pattern": {"rank_pattern": {"q_proj": "there/is.pt"}},
    "r": {"r": "2"},
    "alpha_pattern": {"alpha_pattern": {"([a-z_.0-9]+)+X": 2}},
    "modules_to_save": {"modules_to_save": ["(.*"]},
    "exclude_modules": {"exclude_modules": ".*.*.*.*.*.*.*X"},
    "init_lora_weights ": {"init_lora_weights": "pissa_niter_999999999"},
    "eva_config.other": {"eva_config": {"other": "x"}},
}


DROPPED = {"eva_config.other"}
"""What PEFT's `LoraConfig` drops itself: keys that its nested configurations do not have."""


@pytest.mark.parametrize(
    ("load", "named"),
    [(adapters.load_method, name) for name in BAD]
    + [(adapters.load_adapter, name) for name in BAD if name not in DROPPED],
)
def test_an_option_of_a_folder_names_no_file(tmp_path: Path, monkeypatch: Any, named: str, load: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_module_here.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    folder = _folder(tmp_path / "a", **BAD[named])
    with pytest.raises(AdapterError):
        load(llama(), folder)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "a_module_here.py"]
    with pytest.raises(AdapterError, match=f"sets {named.strip()} to .*Leave it out"):
        permitted_options(peft.LoraConfig, json.loads((folder / "adapter_config.json").read_text()), "a")


def test_the_own_file_of_an_adapter_is_held_to_the_same(tmp_path: Path) -> None:
    config = adapters.MoSLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapters.save_adapter(peft.get_peft_model(llama(), config), tmp_path)
    file = tmp_path / "moslora.json"
    manifest = json.loads(file.read_text())
    assert adapters.load_adapter(llama(), tmp_path)
    manifest["config"]["corda_config"] = {"cache_file": "x"}
    file.write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match=r"sets corda_config.cache_file to 'x'"):
        adapters.load_adapter(llama(), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "corda", "corda_config": {"cache_file": "x"}},
        {"init_lora_weights": "corda", "corda_config": {"covariance_file": ".config/x"}},
        {"init_lora_weights": "lora_ga", "lora_ga_config": {"cache_file": "x"}},
        {"megatron_core": "a_module"},
    ],
)
def test_an_option_of_a_recipe_names_no_file(options: dict[str, Any]) -> None:
    with pytest.raises(
        MoSLoRAError, match=r"adapter.peft sets .* Leave it out|unknown key 'adapter.peft.lora_ga_config.cache_file'"
    ):
        adapter_config(AdapterConfig(peft={"type": "LORA"} | options))


def test_short_expressions_for_modules_are_permitted() -> None:
    wanted = r"^(?!.*vision).*layers\.(0|1|2)\..*(q_proj|k_proj)$"
    options = {"target_modules": wanted, "rank_pattern": {r"^a\.\d+\.b": 3}, "init_lora_weights": "pissa_niter_16"}
    assert permitted_options(peft.LoraConfig, options, "a")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", method_names())
def test_what_peft_writes_is_permitted_and_no_option_takes_a_path(name: str) -> None:
    method = method_named(name)
    whole = method_config(method, {}, rank=8, alpha=8, dropout=0.0)
    whole.target_modules = {"q_proj"}
    kind = method.config
    assert permitted_options(kind, json.loads(json.dumps(whole.to_dict(), default=list)), "a")
    for option in method.options:
        for path in ("there/is.pt", "/etc/passwd", "~/x", "https://host/x", "own/model"):
            for value in (path, [path], {path: 1}, {"a": path}, {"a": {"b": [path]}}):
                with pytest.raises(AdapterError, match=f"sets {option}"):
                    permitted_options(kind, {option: value}, "a")
    for nested in _nested(kind):
        for item in dataclasses.fields(nested[1]):
            with pytest.raises(AdapterError):
                permitted_options(kind, {nested[0]: {item.name: "there/is.pt"}}, "a")


def _nested(kind: type[Any]) -> list[tuple[str, type[Any]]]:
    hints = {item.name: typing.get_type_hints(kind)[item.name] for item in dataclasses.fields(kind)}
    return [
        (name, part) for name, hint in hints.items() for part in (hint, *typing.get_args(hint))
        if dataclasses.is_dataclass(part) and name != "runtime_config"
    ]  # fmt: skip


def test_a_new_option_of_a_later_release_is_refused_until_it_is_known() -> None:
    @dataclasses.dataclass
    class Later(peft.LoraConfig):
        teacher: str | None = None
        start: typing.Literal["zero", "other"] = "zero"
        places: dict | None = None

    globals()["Later"] = Later
    assert permitted_options(Later, {"teacher": None, "start": "other", "unknown": "a/b", "r": 2}, "a") == {
        "teacher": None, "start": "other", "r": 2
    }  # fmt: skip
    for option in ({"teacher": "word"}, {"start": "third"}, {"places": {"a": 1}}):
        with pytest.raises(AdapterError, match=r"a sets (teacher|start|places) to"):
            permitted_options(Later, option, "a")


def test_peft_does_not_look_for_the_base_that_a_folder_names(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", refuse)
    monkeypatch.setattr("peft.utils.save_and_load.hf_hub_download", refuse)
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", refuse)
    auto = {"base_model_class": "Evil", "parent_library": "evil"}
    folder = _folder(
        tmp_path / "own" / "adapter", base_model_name_or_path="someone/else", auto_mapping=auto, extra="x/y"
    )
    loaded = adapters.load_method(llama(), folder)
    assert loaded.peft_config["default"].base_model_name_or_path is None
    assert loaded.peft_config["default"].auto_mapping is None
    (folder / "adapter_model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.undo()
    asked: list[Any] = []
    monkeypatch.setattr("peft.utils.save_and_load.hf_hub_download", lambda repo, *_, **__: asked.append(repo))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError):
        adapters.load_method(llama(), "own/adapter")
    assert "own/adapter" not in asked
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError):
        adapters.load_method(llama(), "own/adapter")
