"""What can be known without loading is refused before loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator
from trials import write

from mm_moslora.cli import run
from mm_moslora.config import Recipe, SourceConfig, ValidateConfig
from mm_moslora.training import training_loop
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import MoSLoRAError

CHECKOUT = Path(__file__).parents[2]
FROM_FILES: dict[str, tuple[str, str]] = {
    "preset": ("--train.zero zero9", "train.zero is 'zero9', expected auto, none, zero0"),
    "settings that are not there": ("--train.zero HERE/gone.json", "gone.json', which does not exist"),
    "settings that are no JSON": ("--train.zero HERE/text.json", "no JSON object of DeepSpeed's settings"),
    "fp16 on plain torch": ("--train.zero none --train.precision fp16", "train.precision is fp16"),
    "tracker": ("--track.trackers [tensorbord]", "Did you mean 'tensorboard'?"),
    "tracker that is not installed": ("--track.trackers [mlflow]", "needs mlflow, which is not installed"),
    "quantisation": ("--model.quantisation nf4", "needs bitsandbytes, which is not installed"),
    "kernels": ("--model.kernels liger", "needs liger-kernel, which is not installed"),
    "template": ("--model.chat_template vicuna", "model.chat_template is 'vicuna', expected one of"),
    "task": ("--validate.tasks [popes]", "Did you mean 'pope'"),
    "group": ("--validate.tasks.0 @llava1", "Did you mean 'llava15'"),
    "group of a file": ("--validate.tasks.0 @HERE/gone.yaml:mine", "there is no file"),
    "best of nothing": ("--validate.best validation_loss --train.validate_every 2", "nothing is measured for it"),
    "best at the end": ("--validate.best validation_loss", "train.validate_every is 0"),
    "best of another task": (
        "--validate.best eval/mme/score --validate.tasks [pope] --train.validate_every 2",
        "expected one of eval/pope/",
    ),
    "best of a misspelt name": (
        "--validate.best validation_los --data.validation [{path: HERE/gone.jsonl}] --train.validate_every 2",
        "Did you mean 'validation_loss'",
    ),
    "patience for nothing": ("--validate.patience 1", "validate.best names no metric"),
    "samples of nothing": ("--validate.samples 3", "data.validation names no source"),
    "data": ("--data.train.0.path HERE/gone.jsonl", "gone.jsonl does not exist"),
    "tables": ("--data.train.0.path HERE/gone.parquet", "No file matches"),
    "tars": ("--data.train.0.path HERE/{000..003}.tar", "000.tar does not exist"),
    "no data": ("--data.train []", "No data source is named"),
    "pictures": ("--data.train.0.image_folder HERE/file", "file, which is no folder"),
    "held-out data": ("--data.validation [{path: HERE/gone.jsonl}]", "gone.jsonl does not exist"),
    "token cache": ("--data.cache HERE/file", "data.cache is"),
    "projector": ("--model.projector.weights HERE/empty", "is a folder without checkpoints and projector"),
    "projector that is not there": ("--model.projector.weights HERE/gone", "does not exist"),
    "adapter": ("--adapter.weights HERE/empty", "holds no adapter"),
    "adapter that is not there": ("--adapter.weights HERE/gone", "There is no adapter folder"),
    "model": ("--model.language HERE/gone", "nothing is there"),
    "model without configuration": ("--model.language HERE/empty", "a folder without config.json"),
    "tower": ("--model.vision.name HERE/empty", "a folder without config.json"),
    "nothing trains": ("--model.language_mode frozen --model.projector.mode frozen", "Nothing would train"),
    "output": ("--train.output HERE/file/run", "file is a file. Choose another train.output"),
    "somebody else's folder": ("--train.output HERE/foreign", "nothing shows that a run of mm_moslora wrote it"),
    "resume required": ("--resume required", "holds no checkpoint, but resume is required"),
    "resume never": ("--train.output HERE/old --resume never", "already holds checkpoints, but resume is never"),
}
"""Words after `train RECIPE`, and what is said."""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with something wrong of every kind."""
    for name in ("empty", "foreign", "old/checkpoint-000002"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "old" / "run.lock").touch()
    (tmp_path / "foreign" / "config.yaml").write_text("mine: true\n")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "text.json").write_text("mine")
    return tmp_path


def test_what_files_and_packages_tell_is_refused_before_anything_is_imported(recipe: Recipe, here: Path) -> None:
    """By `train` and by `launch`, which starts no rank then."""
    path = write(recipe)
    words = [text.replace("HERE", str(here)) for text, _ in FROM_FILES.values()]
    lines = [_split(text) for text in words]
    code = f"""
import importlib.util, subprocess, sys
from mm_moslora.cli import run
find = importlib.util.find_spec
missing = ("bitsandbytes", "mlflow", "liger_kernel")
importlib.util.find_spec = lambda name, *rest: None if name in missing else find(name, *rest)
for verb in ("train", "launch"):
    for words in {lines!r}:
        print(flush=True, file=sys.stderr)
        assert run([verb, {path!r}, *words]) == 1, (verb, words)
        assert not {{"torch", "transformers", "datasets", "pyarrow"}} & set(sys.modules), words
"""
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'eval'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line]
    assert len(said) == 2 * len(FROM_FILES)
    for line, (name, (_, expected)) in zip(said, [*FROM_FILES.items()] * 2, strict=True):
        assert line.startswith("error: "), line
        assert expected in line, name
    assert not Path(recipe.train.output).exists()
    assert (here / "file").read_text() == "mine"


def _split(text: str) -> list[str]:
    """Words in pairs: a key, and a value that may hold spaces."""
    words: list[str] = []
    for word in text.split(" "):
        if word.startswith("--") or words[-1].startswith("--"):
            words.append(word)
        else:
            words[-1] += f" {word}"
    return words


SETTINGS = json.loads((CHECKOUT / "deepspeed_configs" / "zero2.json").read_text())
FROM_LIBRARIES: dict[str, tuple[str, str]] = {
    "attention": ("--model.attention sdpaa", "Did you mean 'sdpa'"),
    "attention of towers": ("--model.attention mm_moslora_pictures", "expected one of auto, eager"),
    "flash attention": ("--model.attention flash_attention_2", "flash-attn"),
    "projector": ("--model.projector.kind mlp_gelu", "model.projector.kind is 'mlp_gelu', expected one of"),
    "compiler": ("--train.compile inductr", "Did you mean 'inductor'"),
    "open_clip": ("--model.vision.name open_clip:ViT-B-99", "open_clip has no model 'ViT-B-99'"),
    "timm": ("--model.vision.name timm:resnet5000", "timm has no model 'resnet5000'"),
    "precision": ("--train.zero zero2 --train.precision fp16", "train.precision is fp16"),
    "a key of DeepSpeed": ("--train.zero HERE/key.json", "DeepSpeed knows no key 'zero_optimisation'"),
    "a key in a group": ("--train.zero HERE/inner.json", "DeepSpeed refuses train.zero"),
    "quantised weights": ("--train.zero zeropp", "zeropp needs DeepSpeed's operator Quantizer"),
    "weights on a disk": ("--train.zero zero3_nvme", "MM_MOSLORA_NVME is not set"),
    "state on a disk": ("--train.zero HERE/disk.json", "where checkpoints cannot read it"),
    "a file against the recipe": ("--train.zero HERE/half.json", "bf16.enabled is True, but train.precision is fp32"),
    "compiled on ZeRO-3": ("--train.zero zero3 --train.compile inductor", "train.compile is 'inductor' with"),
}


@pytest.mark.parametrize("name", FROM_LIBRARIES)
def test_what_libraries_tell_is_refused_before_models_and_records_are_loaded(
    name: str, recipe: Recipe, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("something is loaded")

    for place in ("transformers.AutoModelForCausalLM", "transformers.AutoTokenizer", "transformers.AutoModel"):
        monkeypatch.setattr(f"{place}.from_pretrained", load)
    monkeypatch.setattr("mm_moslora.data.record_examples.open_sources", load)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)  # some processors multiply fp16
    broken = {
        "key": SETTINGS | {"zero_optimisation": {"stage": 2}},
        "inner": SETTINGS | {"zero_optimization": {"stage": 2, "reduce_bucket_sise": 1}},
        "disk": SETTINGS | {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "half": SETTINGS | {"bf16": {"enabled": True}},
    }
    for stem, content in broken.items():
        (here / f"{stem}.json").write_text(json.dumps(content))
    words, expected = FROM_LIBRARIES[name]
    assert run(["train", write(recipe), *words.replace("HERE", str(here)).split()]) == 1
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("error: ") == 1


def test_a_preset_of_ones_own_with_keys_that_deepspeed_reads_is_taken(recipe: Recipe, here: Path) -> None:
    own = here / "own.json"
    own.write_text(json.dumps(SETTINGS | {"_comment": "mine", "activation_checkpointing": {}, "aio": {}}))
    train(replace(recipe, train=replace(recipe.train, zero=str(own), steps=1)))


def test_programs_that_call_train_are_refused_first_too(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop.run_setup, "prepare", lambda *_, **__: pytest.fail("the model is loaded"))
    gone = replace(recipe, data=replace(recipe.data, validation=[SourceConfig(path="gone.jsonl")]))
    unmeasured = replace(recipe, validate=ValidateConfig(tasks=["pope"]))
    for refused, said in ((gone, r"gone\.jsonl does not exist"), (unmeasured, "has no evaluation harness")):
        with pytest.raises(MoSLoRAError, match=said):
            train(refused)
    assert not Path(recipe.train.output).exists()


def test_data_check_names_a_file_that_is_not_there_before_it_loads_a_tokenizer(
    recipe: Recipe, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "mm_moslora.planning.recipe_data.load_parts", lambda *_, **__: pytest.fail("the tokenizer is loaded")
    )
    for options in ([], ["--stats"]):
        assert run(["data", "check", write(recipe), *options, "--data.train.0.path", str(here / "gone.jsonl")]) == 1
        assert "gone.jsonl does not exist" in capsys.readouterr().err
