"""Diffusion runs on tiny pipelines: resuming bit for bit, every family, stock diffusers draws the same pictures."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from preloaded import Preloaded
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="diffusers is not installed")

from mm_moslora.cli.cli_app import run
from mm_moslora.diffusion import diffusion_training
from mm_moslora.diffusion.denoising_loss import DenoisingLoss
from mm_moslora.diffusion.diffusion_checkpoint import STATE
from mm_moslora.diffusion.diffusion_export import write_lora_file
from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe
from mm_moslora.diffusion.diffusion_training import train_diffusion
from mm_moslora.diffusion.latent_batches import LatentBatches
from mm_moslora.diffusion.tiny_pipelines import SIDE, tiny_pipeline
from mm_moslora.tracking import read_metrics
from mm_moslora.training.checkpointing import checkpoint_folder
from mm_moslora.training.checkpointing.checkpoint_folder import read_manifest
from mm_moslora.utils.errors import AdapterError, CheckpointError, ConfigError, DataError, DivergedError, ModelError

Make = Callable[..., DiffusionRecipe]
PROMPT = "a photo of an ikat cat in a bucket"


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested dictionaries and lists; numbers as hexadecimals."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, item in items for key, leaf in flat(item, f"{name}.{k}").items()}
    if isinstance(value, torch.Tensor):
        return {name: value.numpy().tobytes().hex()}
    return {name: value.hex() if isinstance(value, float) else value}


def state(checkpoint: Path) -> dict[str, Any]:
    return flat(torch.load(checkpoint / "trainer" / "rank-00000" / STATE, weights_only=True))


def losses(run: Path) -> list[str]:
    return [record["loss"].hex() for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


BUSY = (
    "model.text_encoders=adapter", "data.crop=random", "data.flip=true", "data.repeats=2", "adapter.dropout=0.1",
    "optim.schedule=cosine", "optim.warmup=1",
)  # fmt: skip


def test_an_interrupted_run_equals_the_straight_run_to_the_last_bit(recipe: Make, tmp_path: Path) -> None:
    straight = train_diffusion(recipe(*BUSY, run="straight"))
    first = train_diffusion(recipe(*BUSY, run="cut"), stop_at=2)
    assert (first.step, first.checkpoint.name) == (2, "checkpoint-000002")
    torch.manual_seed(999)  # what a new process would have differs from what the first one had
    second = train_diffusion(recipe(*BUSY, run="cut"))
    assert state(second.checkpoint) == state(straight.checkpoint)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "cut")) == 4


def test_a_signal_finishes_the_step_saves_and_ends_with_75_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, calls = DenoisingLoss.forward, []

    def interrupted(self: DenoisingLoss, batch: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 3:  # the first forward pass of the second step
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(self, batch)

    monkeypatch.setattr(DenoisingLoss, "forward", interrupted)
    words = ["diffusion", "train", "tiny_subject", "--train.steps", "3", "--train.save_every", "0"]
    words += ["--train.precision", "fp32", "--validate.prompts", "[]", "--track.trackers", "[]", "--train.output"]
    assert run([*words, str(tmp_path / "run")]) == 75
    assert (tmp_path / "run" / "STOPPED").is_file()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-000002"]
    assert run([*words, str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "STOPPED").exists()
    assert run([*words, str(tmp_path / "straight")]) == 0
    assert 'load_lora_weights("' in capsys.readouterr().out
    last = [state(tmp_path / name / "checkpoint-000003") for name in ("run", "straight")]
    assert last[0] == last[1]
    assert run([*words, str(tmp_path / "run")]) == 0  # nothing is left
    assert len(calls) == 2 * 2 + 2 + 3 * 2


def drawn_by_stock(base: str, source: Path, prompt: str = PROMPT) -> np.ndarray:
    pipeline = tiny_pipeline(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(source))
    noise = torch.Generator().manual_seed(0)
    picture = pipeline(prompt, num_inference_steps=2, height=SIDE, width=SIDE, generator=noise).images[0]
    return np.asarray(picture, dtype=int)


def own_picture(run: Path, folder: str) -> np.ndarray:
    (path,) = (run / "pictures" / folder).glob("0-0*.png")
    return np.asarray(Image.open(path), dtype=int)


DRAWS = (f"validate.prompts=[{PROMPT}]", "validate.sampling_steps=2", "validate.pictures=1", "validate.every_epochs=0")


@pytest.mark.parametrize("base", ["tiny-sd-v", "tiny-sd3", "tiny-flux"])
def test_every_family_trains_and_stock_diffusers_draws_the_same_picture(
    base: str, recipe: Make, tmp_path: Path
) -> None:
    own = recipe(f"model.base={base}", "model.text_encoders=adapter", "train.steps=2", "track.mixers_every=1", *DRAWS)
    result, folder = train_diffusion(own), tmp_path / "run"
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if line.get("mixer/row_angle", 0) > 0] == [1, 2]
    tuned, untuned = own_picture(folder, "step-000002"), own_picture(folder, "untuned")
    assert np.abs(tuned - untuned).max() > 8
    assert np.abs(drawn_by_stock(base, result.checkpoint) - tuned).max() <= 1
    moved = [entry["moved"] for entry in json.loads((folder / "mixers.json").read_text())]
    assert len([share for share in moved if share > 0]) > 8
    if base == "tiny-sd-v":
        return
    parts = {path.name for path in (result.checkpoint / "adapter").iterdir()}
    second = {"text_encoder_2"} if base == "tiny-sd3" else set()  # Flux's second is T5
    assert parts == {"transformer", "text_encoder"} | second
    with pytest.raises(AdapterError, match="Kohya's layout names"):
        write_lora_file(folder, tmp_path / "kohya.safetensors", layout="kohya")


_STOCK = """
import sys, torch, diffusers
for source, out in zip(sys.argv[2::2], sys.argv[3::2]):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(source)
    noise = torch.Generator().manual_seed(0)
    pipeline({prompt!r}, num_inference_steps=2, height={side}, width={side}, generator=noise).images[0].save(out)
assert not any(name.startswith("mm_moslora") for name in sys.modules)
"""


@pytest.mark.parametrize("base", ["tiny-sd", "tiny-sdxl"])
def test_a_program_without_this_package_draws_the_same_picture_from_both_files(
    base: str, recipe: Make, tmp_path: Path, python: Preloaded
) -> None:
    tiny_pipeline(base).save_pretrained(tmp_path / "base")
    own = recipe(f"model.base={tmp_path / 'base'}", "model.text_encoders=adapter", "train.steps=2", *DRAWS)
    checkpoint = train_diffusion(own).checkpoint
    kohya = write_lora_file(checkpoint, tmp_path / "kohya.safetensors", layout="kohya")
    words = [tmp_path / "base", checkpoint, tmp_path / "1.png", kohya, tmp_path / "2.png"]
    code = _STOCK.format(prompt=PROMPT, side=SIDE)
    done = subprocess.run([python.stock, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    tuned = own_picture(tmp_path / "run", "step-000002")
    for name in ("1.png", "2.png"):
        drawn = np.asarray(Image.open(tmp_path / name), dtype=int)
        assert np.abs(drawn - tuned).max() <= 1


def test_kohya_names_have_alphas_and_a_file_of_the_user_is_kept(recipe: Make, tmp_path: Path) -> None:
    from safetensors import safe_open

    train_diffusion(recipe("model.base=tiny-sd", "model.text_encoders=adapter", "train.steps=1"))
    out = write_lora_file(tmp_path / "run", tmp_path / "k.safetensors", layout="kohya")
    with safe_open(out, "pt") as file:
        names = set(file.keys())
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= names
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in names
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="is not replaced"):
        write_lora_file(tmp_path / "run", tmp_path / "mine.safetensors", layout="kohya")
    with pytest.raises(AdapterError, match="holds no adapters"):
        write_lora_file(tmp_path / "nothing", tmp_path / "k")


@pytest.mark.parametrize("change", ["adapter.mixer_trainable=false"])
def test_other_adapters_train_and_resume(
    change: str, recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = train_diffusion(recipe(change, "train.steps=2", run="straight"))
    train_diffusion(recipe(change, "train.steps=2"), stop_at=1)
    resumed = train_diffusion(recipe(change, "train.steps=2"))
    assert state(resumed.checkpoint) == state(straight.checkpoint)
    plain = resumed.checkpoint / "pytorch_lora_weights.safetensors"
    assert plain.is_file()


def test_lora_is_the_same_keys_and_a_run_starts_from_anothers_weights(recipe: Make, tmp_path: Path) -> None:
    lora = ("adapter.mixer_init=identity", "adapter.mixer_trainable=false")
    result = train_diffusion(recipe(*lora, "train.steps=2"))
    taught = state(result.checkpoint)
    assert not any("lora_mixer" in name for name in taught)
    started = recipe(*lora, "train.steps=1", "optim.lr=0", f"adapter.weights={tmp_path / 'run'}", run="second")
    again = state(train_diffusion(started).checkpoint)
    assert {k: v for k, v in again.items() if k.startswith(".parameters")} == {
        k: v for k, v in taught.items() if k.startswith(".parameters")
    }


def test_prior_preservation_draws_missing_class_pictures_and_keeps_those_that_are_there(
    recipe: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "cats"
    folder.mkdir()
    Image.new("RGB", (70, 64), "green").save(folder / "mine.png")
    before = (folder / "mine.png").read_bytes()
    prior = ("data.prior.prompt=a cat", "data.prior.count=3", f"data.prior.pictures={folder}", "train.steps=2")
    more = ("data.cache_latents=true", "loss.min_snr_gamma=5")
    train_diffusion(recipe(*prior, *more, "validate.sampling_steps=2"), stop_at=1)
    train_diffusion(recipe(*prior, *more, "validate.sampling_steps=1"))  # a free key, which draws no others now
    names = [path.name for path in sorted(folder.iterdir())]
    assert [name[:6] + name[-9:] for name in names[:2]] == ["drawn-00000.png", "drawn-00001.png"]
    assert names[2:] == ["mine.png"]
    assert (folder / "mine.png").read_bytes() == before
    off = train_diffusion(recipe("train.steps=2", run="off"))
    assert losses(tmp_path / "off") != losses(tmp_path / "run")
    assert not list((off.checkpoint.parent / "pictures").glob("class*"))


def test_bad_input_is_one_error_each(recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="the scheduler of tiny-sd-v says v_prediction"):
        train_diffusion(recipe("model.base=tiny-sd-v", "model.prediction=epsilon", run="a"))
    with pytest.raises(ConfigError, match="matches flows"):
        train_diffusion(recipe("model.base=tiny-sd3", "loss.min_snr_gamma=5", run="b"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        train_diffusion(recipe(f"model.base={tmp_path}", run="c"))
    with pytest.raises(DataError, match="is no folder"):
        train_diffusion(recipe(f"data.pictures={tmp_path / 'none'}", run="d"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.prior.pictures .*file is no folder"):
        train_diffusion(recipe("data.prior.prompt=a cat", f"data.prior.pictures={tmp_path / 'file'}", run="d"))
    with pytest.raises(ConfigError, match="needs a GPU"):
        train_diffusion(recipe("train.precision=fp16", run="e"))
    long = f"data.prompt={'cat ' * 60}"
    with pytest.raises(DataError, match=r"1 of 1 prompts are too long: .* 182 tokens, and the text encoder reads 77"):
        train_diffusion(recipe(long, run="f"))
    with caplog.at_level(logging.WARNING):
        train_diffusion(recipe(long, "data.long_prompts=truncate", "train.steps=1", run="g"))
    assert "1 of 1 prompts are cut" in caplog.text


def test_a_run_folder_is_continued_by_its_own_recipe_only(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = LatentBatches.fingerprint
    with monkeypatch.context() as earlier:  # earlier versions compared sizes
        earlier.setattr(LatentBatches, "fingerprint", lambda self: now(self, sizes_only=True))
        train_diffusion(recipe("train.steps=2"), stop_at=1)
    with pytest.raises(CheckpointError, match=r"optim.lr: 0.02 -> 0.01"):
        train_diffusion(recipe("train.steps=2", "optim.lr=0.01"))
    with pytest.raises(CheckpointError, match="resume is never"):
        train_diffusion(recipe("train.steps=2"), resume="never")
    train_diffusion(recipe("train.steps=2"))
    Image.new("RGB", (64, 64)).save(tmp_path / "run" / "pictures" / "subject" / "more.png")
    with pytest.raises(CheckpointError, match="pictures or prompts differ"):
        train_diffusion(recipe("train.steps=2"))
    (tmp_path / "mine" / "pictures").mkdir(parents=True)
    with pytest.raises(ConfigError, match="already holds pictures"):
        train_diffusion(recipe(run="mine"))


def test_numbers_that_are_not_finite_stop_the_run(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mm_moslora.diffusion import denoising_loss

    monkeypatch.setattr(denoising_loss.DenoisingLoss, "forward", _not_a_number)
    with pytest.raises(DivergedError, match="3 steps in a row"):
        train_diffusion(recipe("train.max_skipped_steps=3", "train.steps=9"))
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "failed"


def _not_a_number(self: Any, batch: Any) -> torch.Tensor:
    return sum(p.sum() for p in self.parameters() if p.requires_grad) * float("nan")


def test_adam_in_8_bits_trains_and_resumes(recipe: Make) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    eight = recipe("train.steps=2", "optim.optimizer=adamw_8bit")
    train_diffusion(eight, stop_at=1)
    assert train_diffusion(eight).step == 2


def test_bf16_with_checkpointing_trains_as_fp32_does(recipe: Make, tmp_path: Path) -> None:
    train_diffusion(recipe("train.steps=2", run="plain"))
    changes = ("train.precision=bf16", "train.gradient_checkpointing=true", "model.text_encoders=adapter")
    changed = train_diffusion(recipe("train.steps=2", *changes, *DRAWS))
    values = torch.load(changed.checkpoint / "trainer" / "rank-00000" / STATE, weights_only=True)["parameters"]
    assert {value.dtype for value in values.values()} == {torch.float32}
    plain, own = ([float.fromhex(loss) for loss in losses(tmp_path / name)] for name in ("plain", "run"))
    assert own == pytest.approx(plain, rel=0.02)


def test_a_pipeline_in_a_folder_with_another_vae_trains(recipe: Make, tmp_path: Path) -> None:
    tiny_pipeline("tiny-sdxl").save_pretrained(tmp_path / "base")
    tiny_pipeline("tiny-sdxl").vae.save_pretrained(tmp_path / "vae")
    folder = recipe(f"model.base={tmp_path / 'base'}", f"model.vae={tmp_path / 'vae'}", "train.steps=2")
    built_in = recipe("train.steps=2", run="built-in")
    train_diffusion(folder)
    train_diffusion(built_in)
    numbers = [[float.fromhex(loss) for loss in losses(tmp_path / name)] for name in ("run", "built-in")]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)
    named = json.loads((tmp_path / "base" / "model_index.json").read_text()) | {"_class_name": "KandinskyPipeline"}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(named))
    with pytest.raises(ModelError, match="is a KandinskyPipeline, expected one of StableDiffusionPipeline"):
        train_diffusion(recipe(f"model.base={tmp_path / 'base'}", run="other"))


@pytest.mark.parametrize("on_hub", [False, True])
def test_a_run_goes_on_with_the_weights_of_its_beginning(
    on_hub: bool, recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the hub's cache lies a newer commit now, and then a file of the old one is another."""
    repository, base = tmp_path / "hub" / "models--acme--tiny", tmp_path / "base"
    commits = [repository / "snapshots" / (letter * 40) for letter in "ab"] if on_hub else [base]
    for number, folder in enumerate(commits):
        torch.manual_seed(number)
        tiny_pipeline("tiny-sd").save_pretrained(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    name, newest = ("acme/tiny" if on_hub else str(base)), repository / "refs" / "main"
    newest.parent.mkdir(parents=True)
    newest.write_text("a" * 40)
    changes = [f"model.base={name}", "model.vae=null"]
    whole = train_diffusion(recipe(*changes, run="whole")).checkpoint
    first = train_diffusion(recipe(*changes), stop_at=2).checkpoint
    kept = read_manifest(first).base
    assert kept["commits"] == ({"model.base": "a" * 40} if on_hub else {})
    stored = "model.base/unet/diffusion_pytorch_model.safetensors"
    assert {stored, "model.base/model_index.json"} <= kept["contents"].keys()
    newest.write_text("b" * 40)
    last = train_diffusion(recipe(*changes), stop_at=3).checkpoint
    assert read_manifest(last).base == kept
    weights = commits[0] / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, original = load_file(weights), weights.read_bytes()
    save_file({key: value + 0.001 * (key == min(tensors)) for key, value in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=f"^{re.escape(stored)}: the files of the pipeline are not those of the"):
        train_diffusion(recipe(*changes))
    weights.write_bytes(original)
    index = weights.with_name(f"{weights.name}.index.json")
    size = sum(value.numel() * 4 for value in tensors.values())
    places = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, weights.name)}
    index.write_text(json.dumps(places))
    (weights.parent / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"safetensors\.index\.json: the files of the pipeline"):
        train_diffusion(recipe(*changes))
    index.unlink()
    (weights.parent / "notes.txt").unlink()
    amend_without_marks(last)  # as an earlier version wrote it
    newest.write_text("a" * 40)
    ended = train_diffusion(recipe(*changes)).checkpoint
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert read_manifest(ended).base == read_manifest(whole).base


def amend_without_marks(checkpoint: Path) -> None:
    """Leave out of a manifest what versions before this one did not write."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for key in ("contents", "commits"):
        del manifest["base"][key]
    checksum = checkpoint_folder._checksum(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum}))


def encoders(folder: Path) -> tuple[Path, Path]:
    """A DINO and a CLIP of random weights."""
    import transformers

    tokenizer = tiny_pipeline("tiny-sd").tokenizer
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    dino = transformers.ViTConfig(**shape, image_size=32, patch_size=16)
    transformers.ViTModel(dino).save_pretrained(folder / "dino")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "dino")
    last = len(tokenizer) - 1
    text = {**shape, "vocab_size": last + 1, "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    vision = {**shape, "image_size": 32, "patch_size": 16}
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(clip).save_pretrained(folder / "clip")
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder / "clip")
    return folder / "dino", folder / "clip"


def test_scores_are_measured_where_encoders_are_at_hand_and_named_where_not(
    recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dino, clip = encoders(tmp_path)
    train_diffusion(recipe("train.steps=1", *DRAWS, f"validate.dino={dino}", f"validate.clip={clip}"))
    scores = json.loads((tmp_path / "run" / "subject_scores.json").read_text())
    assert set(scores["tuned"]) == set(scores["untuned"]) == {"dino", "clip_i", "clip_t"}
    assert all(-1 <= value <= 1 for value in scores["tuned"].values())
    assert scores["tuned"] != scores["untuned"]
    logged = [row["eval/dino"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/dino" in row]
    assert logged == [scores["tuned"]["dino"]]
    train_diffusion(recipe("train.steps=1", *DRAWS, f"validate.clip={tmp_path / 'none'}", run="without"))
    assert "no clip scores" in caplog.text
    assert not (tmp_path / "without" / "subject_scores.json").exists()


def test_zero_2_steps_as_plain_training_and_resumes(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from accelerate.state import AcceleratorState

    plugins: list[Any] = []
    make = diffusion_training.make_accelerator

    def noted(run: Any) -> Any:
        accelerator = make(run)
        plugins.append(accelerator.state.deepspeed_plugin)
        return accelerator

    monkeypatch.setattr(diffusion_training, "make_accelerator", noted)
    three = ("train.steps=3", "optim.max_grad_norm=0")
    plain = train_diffusion(recipe(*three, run="plain"))
    sharded = train_diffusion(recipe(*three, "train.zero=zero2"))
    assert plugins[0] is None
    assert plugins[1].deepspeed_config["gradient_clipping"] == 0
    # Otherwise the next Trainer of this process would take DeepSpeed.
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    assert AcceleratorState._shared_state == {}
    train_diffusion(recipe(*three, "train.zero=zero2", run="cut"), stop_at=2)
    train_diffusion(recipe(*three, "train.zero=zero2", run="cut"))
    numbers = {name: [float.fromhex(value) for value in losses(tmp_path / name)] for name in ("plain", "run", "cut")}
    assert numbers["run"] == pytest.approx(numbers["plain"], rel=1e-5)
    assert numbers["cut"] == numbers["run"]
    values = [
        torch.load(result.checkpoint / "trainer" / "rank-00000" / STATE, weights_only=True)["parameters"]
        for result in (plain, sharded)
    ]
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, atol=1e-5, rtol=1e-4)
