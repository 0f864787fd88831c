"""What we hand on, as others take it: stock transformers in a process of its own, the command line, the model card."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
import yaml
from between import just_before
from fake_hub import fake_hub, run_beside
from llava_checkpoint import write_llava_checkpoint
from PIL import Image
from safetensors.torch import save_file
from tiny import make_vision
from vlm_runs import recipe_for, write_records

from mm_moslora.cli import run
from mm_moslora.config import ModelConfig, ProjectorConfig, VisionConfig
from mm_moslora.models.export.export_huggingface import largest_logit_difference
from mm_moslora.models.load_model import load
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ModelError

STOCK = """
import sys
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, image, expected = sys.argv[1:4]
if len(sys.argv) > 4:
    import mm_moslora.models
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder, backend="pil")
messages = [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": "what color?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**inputs).logits
print("difference", float((logits - load_file(expected)["logits"]).abs().max()))
speak = pipeline("image-text-to-text", model=model, processor=processor)
print("answer", repr(speak(text=messages, max_new_tokens=3, return_full_text=False)[0]["generated_text"]))
print("ours", any(name.startswith("mm_moslora") for name in sys.modules))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, language_folder):
    """Two short runs: one with stock parts, one with a projector of ours."""
    folder = tmp_path_factory.mktemp("hub")
    tower, records = str(make_vision(folder / "clip", "clip")), write_records(folder)
    import dataclasses

    for name, kind in (("stock", "mlp2x_gelu"), ("own", "perceiver")):
        model = ModelConfig(
            language=str(language_folder), vision=VisionConfig(name=tower), projector=ProjectorConfig(kind=kind)
        )
        train(dataclasses.replace(recipe_for("x", records, folder / name), model=model, name=f"tiny {name}"))
    return folder


@pytest.mark.parametrize(("name", "to"), [("stock", "llava"), ("own", "hf")])
def test_another_process_gives_the_same_logits_and_answers_through_a_pipeline(name, to, folder, tmp_path, python):
    assert run(["export", str(folder / name), str(tmp_path / "out"), "--to", to]) == 0
    picture = Image.linear_gradient("L").convert("RGB").resize((50, 30))
    picture.save(tmp_path / "p.png")
    tuned = load(folder / name)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}]
    text = tuned.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tuned.processor(images=[picture], text=text, return_tensors="pt")
    with torch.no_grad():
        save_file({"logits": tuned.model(**inputs).logits}, tmp_path / "expected.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or name == "own"}
    command = [python.stock, "-c", STOCK, *(str(tmp_path / x) for x in ("out", "p.png", "expected.safetensors"))]
    done = subprocess.run(
        [*command, *(["import ours"] if name == "own" else [])], capture_output=True, text=True, env=environment,
        cwd=tmp_path if name == "stock" else None, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(
        line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in ("difference", "ours")
    )
    assert float(lines["difference"]) < 1e-5
    assert lines["ours"] == str(name == "own")


def test_the_card_says_what_the_model_is_made_of(folder, tmp_path, capsys):
    assert run(["export", str(folder / "stock"), str(tmp_path / "out"), "--licence", "apache-2.0"]) == 0
    assert "largest logit difference" in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "image-text-to-text"
    assert "# tiny stock" in text
    assert "sha256 `" in text
    assert "mixer kaiming" in text
    recipe = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert recipe["adapter"]["rank"] == 4


def test_the_card_lists_the_scores_of_the_run(folder, tmp_path, monkeypatch):
    scores = folder / "own" / "evaluation"
    scores.mkdir()
    item = {"task": "pope", "protocol": "llava", "mode": "own", "score": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    named = item | {"task": "mine", "about": {"aggregation": "of_mine", "unit": "F1"}}
    (scores / "results.json").write_text(json.dumps({"results": [item, named]}))
    going = folder / "own" / "going"  # as folders do while a run trains on
    going.mkdir()
    just_before(monkeypatch, os, "scandir", going.rmdir, when=lambda path=".": path in (going, str(going)))
    assert run(["export", str(folder / "own"), str(tmp_path / "out"), "--to", "hf"]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "pope (llava, own) | 50.0 [40.0, 60.0], n 10" in text
    assert "mine (llava, own) | F1 0.500 [0.400, 0.600], n 10" in text
    assert "import mm_moslora.models" in text
    assert not going.exists()


def test_the_command_line_goes_to_other_layouts_and_back(folder, tmp_path, capsys):
    tower = str(folder / "clip")
    assert run(["export", str(folder / "stock"), str(tmp_path / "g"), "--to", "gguf", "--dtype", "fp16"]) == 0
    assert "model.gguf, mmproj.gguf, largest tensor difference" in capsys.readouterr().out
    write_llava_checkpoint(load(folder / "stock"), tmp_path / "l")
    assert run(["import", str(tmp_path / "l"), str(tmp_path / "back"), "--vision", tower]) == 0
    out = capsys.readouterr().out
    assert "LLaVA, whole, mlp2x_gelu projector" in out
    assert "LlavaForConditionalGeneration, largest logit difference" in out
    assert run(["export", str(folder / "own"), str(tmp_path / "x"), "--to", "gguf"]) == 1
    assert run(["export", str(folder / "stock"), str(tmp_path / "y"), "--to", "gguf", "--dtype", "bf16"]) == 1
    assert "fp32 or fp16" in capsys.readouterr().err


PUSHED = """
import sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

stock, own, image = sys.argv[1:]
def numbers(name):
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(name, backend="pil")
    messages = [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": "what color?"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model, processor, model(**inputs).logits
for folder in (stock, own):
    if folder == own:
        import mm_moslora.models
    model, processor, before = numbers(folder)
    name = "me/" + folder.rpartition("/")[2]
    for part in (model, processor):
        part.push_to_hub(name)
    after = numbers(name)[2]
    ours = any(key.startswith("mm_moslora") for key in sys.modules)
    print(name, float((after - before).abs().max()), ours, type(model).__name__)
"""


def test_what_is_pushed_to_the_hub_comes_back_by_its_name(folder, tmp_path):
    """The real client against a hub on this machine: stock parts without this package, ours with it."""
    for name, to in (("stock", "llava"), ("own", "hf")):
        assert run(["export", str(folder / name), str(tmp_path / name), "--to", to]) == 0
    Image.linear_gradient("L").convert("RGB").resize((50, 30)).save(tmp_path / "p.png")
    with fake_hub() as hub:
        done = run_beside(hub, tmp_path, PUSHED, *(str(tmp_path / name) for name in ("stock", "own", "p.png")))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split() for line in done.stdout.splitlines() if line.startswith("me/")] == [
        ["me/stock", "0.0", "False", "LlavaForConditionalGeneration"],
        ["me/own", "0.0", "True", "VlmForConditionalGeneration"],
    ]
    assert {"config.json", "model.safetensors", "processor_config.json"} <= hub.files["models", "me/own"].keys()
    assert not hub.unknown


def test_an_export_is_pushed_by_its_verb(folder, tmp_path, capsys):
    words = ["export", str(folder / "stock"), str(tmp_path / "out"), "--push"]
    assert run([*words, "me/it"]) == 1  # the tests are offline
    assert run([*words, "no name"]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    code = "import sys; from mm_moslora.cli import run; sys.exit(run(sys.argv[1:]))"
    with fake_hub() as hub:
        done = run_beside(hub, tmp_path, code, *words, "me/it")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Uploaded: http" in done.stdout
    files = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*.*")}
    assert hub.files["models", "me/it"] == {name: path.read_bytes() for name, path in files.items()}
    assert not hub.unknown


def test_rounding_grows_with_the_logits_and_another_model_is_refused():
    """SmolLM2's logits reach 40, and its folded adapter differs by 8e-4 in fp32: that is rounding."""
    logits = torch.linspace(-40, 40, 101)
    found = largest_logit_difference(logits, logits + 8e-4)
    assert (found, found.scale) == pytest.approx((8e-4, 40), rel=0.01)
    for other in (logits + 0.01, logits * 1.001, torch.full_like(logits, torch.nan)):
        with pytest.raises(ModelError, match="files give other logits"):
            largest_logit_difference(logits, other)
    with pytest.raises(ModelError, match="accepted 1e-04"):
        largest_logit_difference(logits / 100, logits / 100 + 2e-4)
