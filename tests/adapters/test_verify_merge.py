"""A merge is proved from files alone, and what a trainer's merge did wrong is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, merge, save_adapter
from mm_moslora.adapters.folders.verify_merge import verify_merge
from mm_moslora.cli import run
from mm_moslora.utils.errors import AdapterError

TARGETS = ["q_proj", "down_proj", "embed_tokens"]
NAME = "model.layers.0.self_attn.q_proj.weight"


def base_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def fill(model: torch.nn.Module, size: float = 0.05) -> None:
    for name, weight in model.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            torch.nn.init.normal_(weight, std=size)


def made(folder: Path, kind: str = "lora", dtype: torch.dtype = torch.float32, size: float = 0.05) -> list[Path]:
    """Base, adapter and the merge of PEFT, or of this package, in one folder."""
    base, adapter, merged = (folder / name for name in ("base", "adapter", "merged"))
    model = base_model(dtype)
    model.save_pretrained(base)
    if kind == "moslora":
        tuned = add_moslora(model, MoSLoRAConfig(r=4, lora_alpha=16, target_modules=TARGETS))
        fill(tuned, size)
        save_adapter(tuned, adapter)
        merge(tuned).save_pretrained(merged, max_shard_size="20KB")
        return [base, adapter, merged]
    options = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "head": {"modules_to_save": ["lm_head"]}}
    targets = TARGETS[:2] if kind == "dora" else TARGETS
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, **options.get(kind, {}))
    )
    fill(tuned, size)
    if kind == "head":
        torch.nn.init.normal_(tuned.base_model.model.lm_head.modules_to_save["default"].weight)
    tuned.save_pretrained(adapter, save_embedding_layers=False)
    tuned.merge_and_unload().save_pretrained(merged, max_shard_size="20KB")
    return [base, adapter, merged]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "moslora", "head"])
def test_a_right_merge_of_any_trainer_is_proved(kind, dtype, tmp_path):
    proof = verify_merge(*made(tmp_path, kind, dtype))
    assert proof.proved
    assert len(proof.folded) == {"dora": 4, "head": 6}.get(kind, 5)
    assert proof.largest <= 1


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")


def scaled(share: float):
    """The merge with another scale of the update."""
    return lambda base, merged: {name: base[name] + share * (merged[name] - base[name]) for name in base}


@pytest.mark.parametrize(
    ("change", "list_of", "count"),
    [
        (lambda base, merged: base, "unmerged", 5),
        (lambda base, merged: merged | {NAME: base[NAME]}, "unmerged", 1),
        (scaled(0.5), "different", 5),
        (scaled(2), "different", 5),
        (scaled(1.01), "different", 5),
        (lambda base, merged: merged | {NAME: merged[NAME] * float("nan")}, "different", 1),
        (lambda base, merged: merged | {"model.norm.weight": merged["model.norm.weight"] + 1e-3}, "different", 1),
        (lambda base, merged: {name: merged[name] for name in merged if name != NAME}, "lost", 1),
        (lambda base, merged: merged | {"mtp.fc.weight": torch.ones(3, 3)}, "extra", 1),
        (lambda base, merged: {"lost.x.weight" if name == NAME else name: merged[name] for name in merged}, "lost", 1),
    ],
    ids=["base", "one-left", "half", "twice", "bit-more", "nan", "norm", "lost", "extra", "other-name"],
)
def test_what_a_merge_did_wrong_is_named(change, list_of, count, tmp_path, capsys):
    base, adapter, merged = made(tmp_path)
    rewrite(merged, change(whole(base), whole(merged)))
    proof = verify_merge(base, adapter, merged)
    assert not proof.proved
    assert len(getattr(proof, list_of)) == count
    assert run(["verify", str(base), str(adapter), str(merged)]) == 1
    assert min(getattr(proof, list_of)) in capsys.readouterr().out


def test_an_update_of_the_wrong_size_below_the_rounding_of_bf16_is_found(tmp_path):
    base, adapter, merged = made(tmp_path, dtype=torch.float32, size=2e-4)
    fold = whole(merged)
    rewrite(merged, {name: value.bfloat16() for name, value in fold.items()})
    assert verify_merge(base, adapter, merged).proved
    twice = scaled(3)(whole(base), fold)
    rewrite(merged, {name: value.bfloat16() for name, value in twice.items()})
    assert verify_merge(base, adapter, merged).different


def test_other_names_are_mapped_and_a_tied_head_is_no_loss(tmp_path, capsys):
    base, adapter, merged = made(tmp_path)
    tensors = whole(merged)
    nested = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
    rewrite(merged, nested)
    assert run(["verify", str(base), str(adapter), str(merged)]) == 0
    assert "renamed: model. -> model.language_model." in capsys.readouterr().out
    assert run(["adapters", "inspect", str(adapter), "--base", str(merged)]) == 0
    assert "model. -> model.language_model." in capsys.readouterr().out
    before = whole(base)
    rewrite(base, before | {"lm_head.weight": before["model.embed_tokens.weight"].clone()})
    rewrite(merged, {name: value for name, value in nested.items() if name != "lm_head.weight"})
    assert verify_merge(base, adapter, merged).tied == ("lm_head.weight",)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def index_with(folder: Path, **names: str) -> None:
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"weight_map": content["weight_map"] | names}))


def spoil_adapter(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda base, adapter, merged: cut(next(merged.glob("*.safetensors"))), "truncated"),
        (lambda base, adapter, merged: cut(base / "model.safetensors"), "truncated"),
        (lambda base, adapter, merged: next(merged.glob("*.safetensors")).unlink(), "lacks"),
        (lambda base, adapter, merged: index_with(merged, absent="model-00001-of-00009.safetensors"), "lacks"),
        (
            lambda base, adapter, merged: index_with(merged, **{NAME: sorted(merged.glob("*.safetensors"))[-1].name}),
            NAME,
        ),
        (lambda base, adapter, merged: shutil.copy(base / "model.safetensors", merged), "beside"),
        (lambda base, adapter, merged: (merged / "model.safetensors.index.json").write_text("{}"), "index"),
        (lambda base, adapter, merged: shutil.copy(base / "model.safetensors", base / "other.safetensors"), "twice"),
        (lambda base, adapter, merged: spoil_adapter(adapter), "NaN"),
        (lambda base, adapter, merged: rewrite(base, {"a.b.weight": torch.ones(2)}), "lacks"),
        (lambda base, adapter, merged: shutil.rmtree(merged), "no folder"),
    ],
    ids=[
        "cut-shard",
        "cut-base",
        "no-shard",
        "no-file",
        "other-shard",
        "two-models",
        "no-index",
        "twice",
        "nan",
        "other-base",
        "absent",
    ],
)
def test_damaged_folders_are_refused(spoil, named, tmp_path):
    folders = made(tmp_path)
    spoil(*folders)
    with pytest.raises(AdapterError) as error:
        verify_merge(*folders)
    assert named in str(error.value)


def test_a_name_that_fits_twice_is_refused(tmp_path):
    base, adapter, merged = made(tmp_path)
    tensors = whole(base)
    doubled = {f"{part}.{name}": value.clone() for name, value in tensors.items() for part in ("left", "right")}
    rewrite(base, doubled)
    with pytest.raises(AdapterError, match=r"two ways: .*left.* or .*right"):
        verify_merge(base, adapter, merged)
