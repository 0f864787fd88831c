"""`export` and `adapters inspect` on an adapter folder of another trainer, and on damaged ones."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, load_adapter, save_adapter
from mm_moslora.adapters.folders.export_adapter import largest_difference
from mm_moslora.cli import run
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.identity import sha256_of

IDS = torch.arange(3, 15)[None]


def _base(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapter(language_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `Trainer.save_model` leaves behind: a double folder that names its base."""
    folder = tmp_path_factory.mktemp("theirs") / "adapter"
    model = add_moslora(_base(language_folder), MoSLoRAConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def _live(language_folder: Path, adapter: Path) -> torch.Tensor:
    return load_adapter(_base(language_folder), adapter)(IDS).logits


def _difference(text: str) -> float:
    found = re.search(r"argest logit difference [^\n]*?(\d\.\d+e[-+]\d+)", text)
    assert found, text
    return float(found[1])


def test_merge_takes_an_adapter_of_another_trainer(adapter: Path, language_folder: Path, tmp_path: Path, capsys):
    assert run(["export", str(adapter), str(tmp_path / "merged"), "--to", "hf"]) == 0
    text = capsys.readouterr().out
    assert "from the live adapter" in text
    assert _difference(text) < 1e-4
    with torch.no_grad():
        merged = _base(tmp_path / "merged")(IDS).logits
    live = _live(language_folder, adapter)
    torch.testing.assert_close(merged, live, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert (live - _base(language_folder)(IDS).logits).abs().max() > 1e-2
    assert run(["export", str(tmp_path / "merged"), str(tmp_path / "again"), "--to", "hf"]) == 0
    assert "no adapter" in capsys.readouterr().out


def test_export_to_lora_compares_stock_peft_with_the_live_adapter(
    adapter: Path, language_folder: Path, tmp_path: Path, capsys
):
    assert run(["export", str(adapter), str(tmp_path / "lora"), "--to", "lora"]) == 0
    text = capsys.readouterr().out
    assert "stock PEFT on this folder" in text
    assert _difference(text) < 1e-4
    with torch.no_grad():
        stock = PeftModel.from_pretrained(_base(language_folder), tmp_path / "lora").eval()(IDS).logits
        auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()(IDS).logits
    torch.testing.assert_close(stock, _live(language_folder, adapter), atol=1e-5, rtol=0)
    torch.testing.assert_close(auto, stock, atol=1e-5, rtol=0)
    named = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == language_folder.resolve(), "a published base is pointed to"
    assert not (tmp_path / "lora" / "base").exists()
    assert run(["export", str(adapter), str(tmp_path / "lora"), "--to", "lora"]) == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["vllm", "diffusers"])
def test_export_for_programs_that_read_no_double_folder(adapter: Path, tmp_path: Path, capsys, to: str):
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-000001" / "adapter")
    part = {"component": "transformer"} if to == "diffusers" else {}
    words = [f"--component={name}" for name in part.values()]
    assert run(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", to, *words]) == 0
    text = capsys.readouterr().out
    assert "folded to plain LoRA" in text
    assert 0 < float(re.search(r"from the adapter's: (\S+) of", text).group(1)) < 1e-6
    (file,) = (tmp_path / "out").glob("*.safetensors")
    names = load_file(file)
    start = "transformer.model." if part else "base_model.model.model."
    assert all(name.startswith(start) and ("lora_A" in name or "lora_B" in name) for name in names)
    damaged = next(name for name in names if name.endswith("lora_B.weight"))
    save_file(names | {damaged: names[damaged] * 1.01}, file)
    assert largest_difference(adapter, tmp_path / "out", layout=to, **part) == pytest.approx(0.01, rel=1e-3)
    save_file({name: factor for name, factor in names.items() if name != damaged}, file)
    with pytest.raises(AdapterError, match="has no factors for"):
        largest_difference(adapter, tmp_path / "out", layout=to, **part)
    assert run(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", to]) == 1
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(["export", str(tmp_path / "empty"), str(tmp_path / "other"), "--to", to]) == 1
    assert "not an adapter folder" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_folder_that_names_no_base_wants_one(adapter: Path, language_folder: Path, tmp_path: Path, capsys):
    nameless = tmp_path / "nameless"
    save_adapter(load_adapter(_base(language_folder), adapter), nameless)
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    shutil.copytree(nameless, tmp_path / "lost")
    (tmp_path / "lost" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    assert run(["export", str(nameless), str(tmp_path / "m"), "--to", "hf"]) == 1
    assert "does not name its base model. Give it with --base" in capsys.readouterr().err
    assert run(["export", str(tmp_path / "lost"), str(tmp_path / "m"), "--to", "hf"]) == 1
    assert "The base model '/gone'" in capsys.readouterr().err
    assert run(["export", str(nameless), str(tmp_path / "m"), "--base", str(language_folder), "--to", "hf"]) == 0


def _truncate(folder: Path) -> None:
    file = folder / "moslora.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def _stale(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


def _nan(folder: Path) -> None:
    _rewrite(folder, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))


def _wrong_mixer(folder: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "lora_mixer" in name)
        tensors[name] = torch.eye(3)

    _rewrite(folder, shrink)


def _other_method(folder: Path) -> None:
    _plain(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "IA3"}))


def _empty(folder: Path) -> None:
    _plain(folder)
    save_file({}, folder / "adapter_model.safetensors")


def _plain(folder: Path) -> None:
    for name in ("moslora.json", "moslora.safetensors"):
        (folder / name).unlink()


def _rewrite(folder: Path, change) -> None:
    """Change the unfolded factors and make their hash fit, as a careless tool would."""

    file, manifest = folder / "moslora.safetensors", folder / "moslora.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    content = json.loads(manifest.read_text())
    content["files"][file.name] = sha256_of(file)
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is damaged or truncated"),
        (_stale, "is not the fold of moslora.safetensors"),
        (_nan, "NaN or infinity"),
        (_wrong_mixer, "lora_mixer"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds a list"),
        (_other_method, "peft_type 'IA3'"),
        (_empty, "holds no factors of an adapter"),
    ],
)
def test_a_bad_folder_is_one_clear_error_and_nothing_is_written(
    adapter: Path, tmp_path: Path, capsys, damage, message: str
):
    bad = tmp_path / "bad"
    shutil.copytree(adapter, bad)
    damage(bad)
    assert run(["export", str(bad), str(tmp_path / "out"), "--to", "hf"]) == 1
    *before, line = capsys.readouterr().err.strip().splitlines()
    assert all("its base is" in said for said in before)
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_base_is_refused(adapter: Path, language_folder: Path, tmp_path: Path, capsys):
    other = tmp_path / "other"
    shutil.copytree(language_folder, other)
    config = AutoConfig.from_pretrained(other)
    config.intermediate_size *= 2
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    assert run(["export", str(adapter), str(tmp_path / "out"), "--base", str(other), "--to", "hf"]) == 1
    assert "was made for another base model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_takes_a_run_as_well(adapter: Path, tmp_path: Path, capsys):
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-000001" / "adapter")
    assert run(["adapters", "inspect", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("q_proj") == 2
    numbers = load_file(adapter / "moslora.safetensors").values()
    assert f"trained parameters           {sum(value.numel() for value in numbers):,}" in shown
    assert run(["adapters", "inspect", str(tmp_path)]) == 1
    assert "it is not an adapter folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["adapters inspect IN", "export IN OUT --to hf", "export IN OUT --to lora", "export IN OUT --to vllm"]
)
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("trainer", "holds checkpoint-10, checkpoint-20. Give the folder of one of them"),
        ("named", "holds second, third. Give"),
        ("file", "is a file, expected"),
        ("nowhere", r"(does not exist|There is no adapter folder)"),
        ("empty", "(no|not an) adapter"),
    ],
)
def test_a_folder_that_only_holds_adapters_names_them(
    adapter: Path, tmp_path: Path, capsys, command: str, place: str, message: str
):
    for name in ("trainer/checkpoint-10", "trainer/checkpoint-20", "named/second", "named/third"):
        shutil.copytree(adapter, tmp_path / name)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    given = [str(tmp_path / "out") if word == "OUT" else word for word in command.split()]
    assert run([str(tmp_path / place) if word == "IN" else word for word in given]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "lora", "gguf"])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/proc/nowhere/out", "cannot be made in /proc: No such file"),
        ("file", "is a file or a broken link"),
        ("file/out", "is a file or a broken link"),
        ("link", "is a file or a broken link"),
        ("full", "is not empty"),
    ],
)
def test_where_nothing_can_be_written_is_told_before_the_model_is_loaded(
    adapter: Path, tmp_path: Path, capsys, monkeypatch, to: str, place: str, message: str
):
    monkeypatch.setattr("mm_moslora.models.load_model.load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "full" / "something").mkdir(parents=True)
    assert run(["export", str(adapter), str(tmp_path / place), "--to", to]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize("to", ["hf", "lora", "gguf"])
def test_a_disk_that_fills_is_one_line_with_the_path(adapter: Path, tmp_path: Path, capsys, to: str):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, hard))
    try:
        assert run(["export", str(adapter), str(tmp_path / "out"), "--to", to]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {tmp_path / 'out'}")
    assert "too large" in line or "not whole" in line
