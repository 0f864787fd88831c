"""`examples/one_step.py` and `examples/own_loop.py` compute what `mm-moslora train` computes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from preloaded import Preloaded
from safetensors.torch import load_file
from trials import losses, make_parts, make_recipe

from mm_moslora.adapters import load_adapter
from mm_moslora.config import OptimConfig, SourceConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.training.training_loop import train

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_parts(tmp_path_factory.mktemp("parts"), records=3)


def printed(command: list[str | Path]) -> str:
    """What an example prints; its process has imported the libraries, and nothing of this package."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def test_one_flat_step_is_a_step_of_train(parts: dict[str, Path], tmp_path: Path, python: Preloaded) -> None:
    images = parts["records"].parent / "images"
    record = {
        "image": "0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is the color?"},
            {"from": "gpt", "value": "red"},
        ],
    }
    (tmp_path / "one.jsonl").write_text(json.dumps(record) + "\n")
    command = [
        python.stock, str(EXAMPLES / "one_step.py"), "--language", str(parts["language"]),
        "--vision", str(parts["vision"]), "--picture", str(images / "0.png"),
        "--question", "what is the color?", "--answer", "red", "--rank", "4", "--output", str(tmp_path / "flat"),
    ]  # fmt: skip
    words = printed(command).split()

    recipe = make_recipe(parts, tmp_path / "run", "none", steps=2, global_batch=1, micro_batch=1)
    recipe = replace(
        recipe,
        adapter=replace(recipe.adapter, mixer_init="orthogonal"),
        optim=OptimConfig(lr=2e-4, projector_lr=1e-3, schedule="constant", warmup=0),
        data=replace(recipe.data, train=[SourceConfig(path=str(tmp_path / "one.jsonl"), image_folder=str(images))]),
    )
    checkpoint = train(recipe, stop_at=1).checkpoint
    train(recipe)
    assert [float(words[1]), float(words[3].rstrip(";"))] == pytest.approx(losses(tmp_path / "run"), abs=2e-6)

    # The saved parts are those of the checkpoint after the first step.
    projector = load_file(tmp_path / "flat" / "projector.safetensors")
    for name, value in load_file(checkpoint / "projector.safetensors").items():
        torch.testing.assert_close(projector[name], value, rtol=0, atol=1e-6)
    flat = load_adapter(load_parts(recipe.model).model, tmp_path / "flat" / "adapter").state_dict()
    trained = load_adapter(load_parts(recipe.model).model, checkpoint / "adapter").state_dict()
    adapter = [name for name in trained if "lora_" in name]
    assert any("lora_mixer" in name for name in adapter)
    for name in adapter:
        torch.testing.assert_close(flat[name], trained[name], rtol=0, atol=1e-6)


def test_the_flat_step_stays_flat() -> None:
    text = (EXAMPLES / "one_step.py").read_text()
    assert len(text.splitlines()) <= 150
    assert "def " not in text


def test_a_plain_loop_learns_and_its_adapter_is_read_back(
    parts: dict[str, Path], tmp_path: Path, python: Preloaded
) -> None:
    text, line = tmp_path / "lines.txt", "what is the color of the circle? red"
    text.write_text(f"{line}\n" * 8)
    command = [
        python.stock, str(EXAMPLES / "own_loop.py"), str(parts["language"]), str(text), str(tmp_path / "out"),
        "--epochs", "120", "--lr", "5e-3",
    ]  # fmt: skip
    *epochs, said = printed(command).strip().splitlines()
    first, last = (float(entry.split()[-1]) for entry in (epochs[0], epochs[-1]))
    assert last < first - 1
    assert said.startswith(line[: len(line) // 2])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(parts["language"])(line + "<|im_end|>", return_tensors="pt").input_ids
    read_back = load_adapter(AutoModelForCausalLM.from_pretrained(parts["language"]), tmp_path / "out").eval()
    assert read_back(ids, labels=ids).loss.item() == pytest.approx(last, abs=0.1)
