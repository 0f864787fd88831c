"""The double folder: exact for us, right for stock PEFT, and damage is noticed."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from preloaded import Preloaded
from safetensors.torch import load_file, save_file
from torch import nn

from mm_moslora.adapters import (
    MIXER_INITS,
    MoSLoRAConfig,
    adapted_modules,
    add_moslora,
    export_adapter,
    load_adapter,
    merge,
    save_adapter,
)
from mm_moslora.adapters.folder_format import PREFIX
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.identity import sha256_of
from tests.adapters.adapter_models import IDS, llama, llava, llava_inputs, logits, train_a_bit

TARGETS = ["q_proj", "down_proj"]
FILES = {"adapter_config.json", "adapter_model.safetensors", "moslora.json", "moslora.safetensors"}


def _adapted(**options) -> peft.PeftModel:
    model = add_moslora(llama(), MoSLoRAConfig(**({"r": 4, "lora_alpha": 6} | options)), targets=TARGETS)
    train_a_bit(model)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(_adapted(), folder, base={"id": "tiny", "revision": "1"})
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.mark.parametrize("kind", MIXER_INITS)
@pytest.mark.parametrize("trainable", [True, False])
def test_save_and_load_are_exact(tmp_path: Path, kind: str, trainable: bool) -> None:
    model = _adapted(mixer_init=kind, mixer_trainable=trainable, rank_pattern={"down_proj": 2}, use_rslora=True)
    save_adapter(model, tmp_path / "a")
    start = set() if kind == "identity" and not trainable else {"moslora_start.safetensors"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES | start
    loaded = load_adapter(llama(), tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    assert adapted_modules(loaded) == adapted_modules(model)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_values_go_into_an_adapter_that_is_there(saved: Path) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=6), targets=TARGETS)
    assert load_adapter(model, saved, trainable=True) is model
    assert torch.equal(logits(model), logits(_adapted()))
    assert sum(p.requires_grad for p in model.parameters()) == 12


def test_a_second_adapter_is_added_beside_the_first(saved: Path) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=2), targets=["v_proj"])
    load_adapter(model, saved, adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(_adapted()))


def test_saving_again_replaces_the_files_and_keeps_others(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    save_adapter(_adapted(), folder)
    (folder / "notes.txt").write_text("mine")
    model = _adapted(mixer_init="kaiming")
    save_adapter(model, folder)
    assert {path.name for path in folder.iterdir()} == FILES | {"notes.txt", "moslora_start.safetensors"}
    assert torch.equal(logits(load_adapter(llama(), folder)), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


_STOCK = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
import torch, peft, transformers
folder, base, inputs, out = sys.argv[1:]
model = getattr(transformers, sys.stdin.read()).from_pretrained(base)
model = peft.PeftModel.from_pretrained(model, folder)
with torch.no_grad():
    torch.save(model(**torch.load(inputs)).logits, out)
assert not any(name.startswith("mm_moslora") for name in sys.modules)
"""


def _stock_logits(
    python: Preloaded, model: nn.Module, folder: Path, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> torch.Tensor:
    """Logits of stock PEFT in a process that never imports this package; a warning there is an error."""
    model.save_pretrained(tmp_path / "base")
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [str(folder), str(tmp_path / "base"), str(tmp_path / "inputs.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(
        [python.stock, "-c", _STOCK, *arguments], input=type(model).__name__, text=True, check=True, cwd=tmp_path,
        timeout=240,
    )  # fmt: skip
    return torch.load(tmp_path / "logits.pt")


def test_stock_peft_gives_the_same_logits(saved: Path, tmp_path: Path, python: Preloaded) -> None:
    found = _stock_logits(python, llama(), saved, {"input_ids": IDS}, tmp_path)
    torch.testing.assert_close(found, logits(_adapted()), atol=1e-5, rtol=0)


def test_stock_peft_gives_the_same_logits_in_a_llava(tmp_path: Path, python: Preloaded) -> None:
    config = MoSLoRAConfig(r=4, lora_alpha=8, rank_pattern={r"model\.vision_tower\..*": 2}, task_type="CAUSAL_LM")
    model = add_moslora(llava(), config, component=["model.language_model", "model.vision_tower"]).eval()
    train_a_bit(model)
    save_adapter(model, tmp_path / "a")
    with torch.no_grad():
        live = model(**llava_inputs()).logits
        loaded = load_adapter(llava(), tmp_path / "a")(**llava_inputs()).logits
    assert torch.equal(live, loaded)
    torch.testing.assert_close(
        _stock_logits(python, llava(), tmp_path / "a", llava_inputs(), tmp_path), live, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("trainable", [True, False])
def test_a_plain_lora_folder_is_an_identity_mixer(tmp_path: Path, trainable: bool) -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=TARGETS, rank_pattern={"q_proj": 2}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(tmp_path / "a")
    loaded = load_adapter(llama(), tmp_path / "a", trainable=trainable).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)
    mixers = [name for name, p in loaded.named_parameters() if "lora_mixer" in name and p.requires_grad]
    assert len(mixers) == (4 if trainable else 0)


def test_saved_masters_win_over_the_model(tmp_path: Path) -> None:
    model = _adapted()
    state = {name: p.detach() + 1 for name, p in model.named_parameters() if p.requires_grad}
    state["base_model.model.model.something_else.weight"] = torch.zeros(3)
    save_adapter(model, tmp_path / "a", state=state)
    for name, tensor in load_file(tmp_path / "a" / "moslora.safetensors").items():
        assert torch.equal(tensor, state[name.replace(".weight", ".default.weight")])
    base_names = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    save_adapter(model, tmp_path / "b", state=base_names)
    assert (tmp_path / "a/moslora.json").read_text() == (tmp_path / "b/moslora.json").read_text()


@pytest.mark.parametrize("factor", ["lora_A", "lora_mixer", "lora_B"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensor: torch.empty(0), "is empty"),
        (lambda tensor: tensor[:-1], "has shape"),
        (lambda tensor: tensor * float("nan"), "NaN"),
        (None, "lacks 1 parameters"),
    ],
)
def test_broken_factors_are_not_saved(
    tmp_path: Path, factor: str, damage: Callable[[torch.Tensor], torch.Tensor] | None, words: str
) -> None:
    model = _adapted()
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    name = next(name for name in state if factor in name)
    if damage is None:
        del state[name]
    else:
        state[name] = damage(state[name])
    with pytest.raises(AdapterError, match=words):
        save_adapter(model, tmp_path / "a", state=state)
    assert list(tmp_path.iterdir()) == []


def _edited(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / "moslora.json").read_text())
        change(data)
        (folder / "moslora.json").write_text(json.dumps(data))

    return edit


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def _retrain_folded(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


def _edit_tensor(folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Change (None: remove) the first tensor with `part` in its name, in a folder with hashes that agree."""
    path = folder / "moslora.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if part in name)
    changed = {} if change is None else {name: change(tensors.pop(name))}
    save_file({other: tensor for other, tensor in tensors.items() if other != name} | changed, path)
    _edited(lambda data: data["files"].update({path.name: sha256_of(path)}))(folder)


def _mixers_as_stock(folder: Path) -> None:
    (folder / "moslora.safetensors").replace(folder / "adapter_model.safetensors")
    (folder / "moslora.json").unlink()


DAMAGE = {
    "truncated": (_truncate("moslora.safetensors"), "damaged or truncated"),
    "truncated_folded": (_truncate("adapter_model.safetensors"), "not the fold of"),
    "stale_folded": (_retrain_folded, "another program saved over it"),
    "mixer_shape": (
        lambda folder: _edit_tensor(folder, "lora_mixer", lambda _: torch.eye(3)),
        r"lora_mixer.weight has shape \[3, 3\], expected \[4, 4\]",
    ),
    "no_folded": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "lacks adapter_model"),
    "no_manifest": (lambda folder: (folder / "moslora.json").unlink(), "no moslora.json"),
    "no_factors": (lambda folder: (folder / "moslora.safetensors").unlink(), "no moslora.safetensors"),
    "bad_json": (lambda folder: (folder / "moslora.json").write_text("{"), "not valid JSON"),
    "newer": (_edited(lambda data: data.update(format_version=99)), "format version 99"),
    "unknown_key": (_edited(lambda data: data["config"].update(mixer_ini="x")), "Did you mean"),
    "other_base": (_edited(lambda data: data["base"].update(fingerprint="0")), "another base model"),
    "no_hashes": (_edited(lambda data: data.pop("files")), "lacks 'files'"),
    "no_config": (_edited(lambda data: data.update(config="r=4")), "lacks 'config'"),
    "no_hash": (_edited(lambda data: data["files"].pop("moslora.safetensors")), "no sha256 of moslora.safetensors"),
    "alpha": (_edited(lambda data: data["config"].update(lora_alpha="8")), "json: lora_alpha is '8', expected a num"),
    "pattern": (_edited(lambda data: data["config"].update(mixer_pattern=5)), "mixer_pattern is 5, expected a dict"),
    "bias": (_edited(lambda data: data["config"].update(bias="x")), "configuration sets bias to 'x'"),
    "no_declaration": (_mixers_as_stock, "holds mixers"),
    "gone": (shutil.rmtree, "no adapter folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_error_and_nothing_is_half_loaded(copied: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    damage(copied)
    model = llama()
    with pytest.raises(AdapterError, match=words):
        load_adapter(model, copied)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_an_adapter_for_another_base_is_refused(saved: Path) -> None:
    for other in (llama(num_hidden_layers=1), llama(intermediate_size=40)):
        with pytest.raises(AdapterError, match="another base model"):
            load_adapter(other, saved)
    with pytest.raises(AdapterError, match="revision '1', this one has '2'"):
        load_adapter(llama(), saved, base={"id": "tiny", "revision": "2"})
    load_adapter(llama(), saved, base={"id": "tiny", "revision": "1", "date": "today"})


def test_new_rows_of_an_adapted_embedding_come_back(tmp_path: Path) -> None:
    def grown() -> nn.Module:
        base = llama()
        base.resize_token_embeddings(66)
        return base

    model = add_moslora(grown(), MoSLoRAConfig(r=4), targets=["embed_tokens", "q_proj"])
    train_a_bit(model)
    model.get_input_embeddings().base_layer.weight.data[64:] += 1
    model.eval().save_pretrained(tmp_path / "a")
    load_adapter(grown(), tmp_path / "a").save_pretrained(tmp_path / "b")
    ids = torch.tensor([[64, 65, 3]])
    with torch.no_grad():
        live = model(ids).logits
        for folder in (tmp_path / "a", tmp_path / "b"):
            for loaded in (load_adapter(grown(), folder), peft.PeftModel.from_pretrained(grown(), folder)):
                torch.testing.assert_close(loaded.eval()(ids).logits, live, atol=1e-5, rtol=0)


def test_a_bias_without_a_place_is_not_merged() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _adapted(lora_bias=True)
    before = logits(model)
    with pytest.raises(AdapterError, match=r"lora_bias, and .* has no bias to merge it into"):
        merge(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("change", [None, lambda tensor: tensor[:-1].clone()], ids=["lost", "cut"])
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"use_dora": True, "mixer_init": "identity", "mixer_trainable": False}, "magnitude"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"trainable_token_indices": [1, 2]}, "trainable_tokens"),
        ({"lora_bias": True}, "lora_B.bias"),
    ],
)
def test_what_a_folder_holds_besides_factors_must_fit_too(tmp_path: Path, options: dict, part: str, change) -> None:
    save_adapter(_adapted(**options), tmp_path / "a")
    _edit_tensor(tmp_path / "a", part, change)
    alone, beside = llama(), _adapted()
    before = logits(beside)
    for model in (alone, beside):
        with pytest.raises(AdapterError, match=rf"(lacks|holds) '.*{part}.*made for another base"):
            load_adapter(model, tmp_path / "a", adapter_name="new")
    assert alone.state_dict().keys() == llama().state_dict().keys()
    assert list(beside.peft_config) == ["default"]
    assert not any(".new" in name for name in beside.state_dict())
    assert torch.equal(logits(beside), before)


@pytest.mark.parametrize(
    "part", ["model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.lora_C.weight"]
)
def test_an_entry_without_a_place_is_refused_by_every_way(tmp_path: Path, part: str) -> None:
    """PEFT wrote the norm over the base's, and dropped what it did not know."""
    model, name = _adapted(), f"{PREFIX}{part}"
    save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "moslora.safetensors"
    save_file(load_file(path) | {name: torch.ones(32)}, path)
    _edited(lambda data: data["files"].update({path.name: sha256_of(path)}))(tmp_path / "a")
    before = logits(model)
    for way in (
        lambda: load_adapter(llama(), tmp_path / "a"),
        lambda: peft.PeftModel.from_pretrained(llama(), tmp_path / "a"),
        lambda: model.load_adapter(tmp_path / "a", "default"),
        lambda: peft.set_peft_model_state_dict(model, load_file(path)),
        lambda: export_adapter(tmp_path / "a", tmp_path / "out", layout="peft"),
    ):
        with pytest.raises(AdapterError, match=rf"hold.*{part}.*no place"):
            way()
    assert torch.equal(logits(model), before)
    assert not (tmp_path / "out").exists()
