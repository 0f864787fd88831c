"""Diffusion runs on tiny pipelines: resuming bit for bit, and stock diffusers reads what every family exports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from preloaded import Preloaded
from torch.utils._pytree import tree_flatten

from mm_moslora.adapters import load_adapter
from mm_moslora.cli.cli_app import run
from mm_moslora.diffusion import diffusion_training
from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe, load_diffusion_recipe
from mm_moslora.diffusion.diffusion_training import STATE, TakenDenoiser, train_diffusion
from mm_moslora.diffusion.pipeline_families import DenoisingLoss
from mm_moslora.tracking import read_metrics
from mm_moslora.training.checkpointing.checkpoint_folder import read_manifest
from mm_moslora.utils.errors import CheckpointError, ConfigError, DataError, DivergedError, ExitStatus, ModelError
from mm_moslora.utils.identity import sha256_of
from tests.builders.tiny_pipelines import SIDE, tiny_pipeline

Make = Callable[..., DiffusionRecipe]
FILE = "pytorch_lora_weights.safetensors"
BUSY = ("data.crop=random", "data.flip=true", "adapter.dropout=0.1", "optim.schedule=cosine", "optim.warmup=1")
DORA = ("adapter.use_dora=true", "adapter.mixer_init=identity", "adapter.mixer_trainable=false")


def state(checkpoint: Path) -> Any:
    """The trainer's state, tensors as bytes."""
    values, names = tree_flatten(torch.load(checkpoint / "trainer" / "rank-00000" / STATE, weights_only=True))
    return [value.numpy().tobytes() if isinstance(value, torch.Tensor) else value for value in values], names


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize(
    ("kind", "changes"), [("tiny-sdxl", BUSY), ("tiny-flux", ("adapter.mixer_trainable=false",)), ("tiny-sd", DORA)]
)
def test_a_resumed_run_equals_the_straight_one(
    kind: str, changes: Any, recipe: Make, tmp_path: Path, caplog: Any
) -> None:
    straight = train_diffusion(recipe(*changes, kind=kind, run="straight")).checkpoint
    first = train_diffusion(recipe(*changes, kind=kind), stop_at=2)
    assert (first.step, first.checkpoint.name) == (2, "checkpoint-000002")
    torch.manual_seed(999)  # what a new process would have differs from what the first one had
    second = train_diffusion(recipe(*changes, kind=kind)).checkpoint
    assert state(second) == state(straight)
    if changes == DORA:
        assert f"The checkpoint has no {FILE}" in caplog.text
        assert not (second / FILE).exists()
    else:
        assert (second / FILE).read_bytes() == (straight / FILE).read_bytes()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert len(json.loads((tmp_path / "run" / "mixers.json").read_text())) > 8


def test_a_state_of_another_form_is_one_error(recipe: Make) -> None:
    """The manifest agrees with the file, so nothing is damaged."""
    checkpoint = train_diffusion(recipe(), stop_at=1).checkpoint
    name = f"trainer/rank-00000/{STATE}"
    file, manifest = checkpoint / name, read_manifest(checkpoint)
    for content in ({}, {"parameters": {}}, Path):
        torch.save(content, file)
        own = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        (checkpoint / "manifest.json").write_text(json.dumps(replace(manifest, files={name: own}).to_json()))
        with pytest.raises(CheckpointError, match=rf"rank-00000 holds {STATE}, and not the trainer state"):
            train_diffusion(recipe())


_KILLED = """
import os, signal, sys
from mm_moslora.cli.cli_app import run
from mm_moslora.diffusion.pipeline_families import DenoisingLoss
plain, passes = DenoisingLoss.__call__, iter(range(5))  # the sixth is in the third step
def dying(self, batch):
    return os.kill(os.getpid(), signal.SIGKILL) if next(passes, None) is None else plain(self, batch)
DenoisingLoss.__call__ = dying
run(sys.argv[1:])
"""


def test_the_same_command_goes_on_when_killed(recipe: Make, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    straight = train_diffusion(recipe("train.save_every=1", run="straight")).checkpoint
    command = ["train", str(tmp_path / "own.yaml")]
    Path(command[-1]).write_text(recipe("train.save_every=1").to_yaml())
    assert subprocess.run([sys.executable, "-c", _KILLED, *command], check=False).returncode == -signal.SIGKILL
    plain, calls = DenoisingLoss.__call__, []

    def interrupted(self: DenoisingLoss, batch: Any) -> torch.Tensor:
        if not calls:
            os.kill(os.getpid(), signal.SIGUSR1)
        calls.append(batch)
        return plain(self, batch)

    monkeypatch.setattr(DenoisingLoss, "__call__", interrupted)
    assert run(command) == 75
    assert (tmp_path / "run" / "STOPPED").is_file()
    assert {path.name[-1] for path in (tmp_path / "run").glob("checkpoint-*")} == {"2", "3"}  # `keep_last` is 2
    assert [run(command), run(command)] == [0, 0]
    assert len(calls) == 2 * 2  # nothing was left for the last command
    assert 'load_lora_weights("' in capsys.readouterr().out
    assert state(tmp_path / "run" / straight.name) == state(straight)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


_STOCK = """
import sys, torch, diffusers
for base, source, out in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(source)
    torch.save(pipeline("a cat", generator=torch.Generator().manual_seed(0), **{size}).images, out)
assert not any(name.startswith("mm_moslora") for name in sys.modules)
"""


def test_stock_diffusers_draws_the_same_latents(
    recipe: Make, pipelines: Path, tmp_path: Path, python: Preloaded
) -> None:
    """In a program without this package, with what every family exports."""
    size: dict[str, Any] = {"num_inference_steps": 2, "height": SIDE, "width": SIDE, "output_type": "latent"}
    arguments, expected = list[str | Path](), []
    for kind in ("tiny-sd", "tiny-sdxl", "tiny-sd3", "tiny-flux"):
        checkpoint = train_diffusion(recipe("train.steps=2", kind=kind, run=kind)).checkpoint
        kohya = tmp_path / f"{kind}.safetensors"
        wrong = run(["export", str(checkpoint.parent), str(kohya), "--to", "kohya"])
        assert wrong == (kind in ("tiny-sd3", "tiny-flux"))  # its names are of UNets
        pipeline, (adapter,) = tiny_pipeline(kind), (checkpoint / "adapter").iterdir()
        load_adapter(getattr(pipeline, adapter.name), adapter)
        drawn, untuned = (
            one("a cat", generator=torch.Generator().manual_seed(0), **size).images
            for one in (pipeline, tiny_pipeline(kind))
        )
        assert (drawn - untuned).abs().max() > 0.01
        for source in (checkpoint, *([] if wrong else [kohya])):
            arguments += [pipelines / kind, source, tmp_path / f"{len(expected)}.pt"]
            expected.append(drawn)
    command = [python.stock, "-c", _STOCK.format(size=size), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for number, latents in enumerate(expected):
        torch.testing.assert_close(torch.load(tmp_path / f"{number}.pt"), latents, atol=1e-4, rtol=0)


def test_a_run_starts_from_the_weights_of_another(recipe: Make, tmp_path: Path) -> None:
    taught = train_diffusion(recipe("train.steps=1")).checkpoint
    same = recipe("train.steps=1", "optim.lr=0", f"adapter.weights={tmp_path / 'run'}", run="second")
    assert (train_diffusion(same).checkpoint / FILE).read_bytes() == (taught / FILE).read_bytes()


def test_bf16_with_checkpointing_and_another_vae_trains_as_fp32_does(recipe: Make, tmp_path: Path) -> None:
    plain = recipe("train.steps=2", run="plain")
    train_diffusion(plain)
    changes = ("train.precision=bf16", "train.gradient_checkpointing=true", f"model.vae={plain.model.base}/vae")
    changed = train_diffusion(recipe("train.steps=2", *changes)).checkpoint
    values = torch.load(changed / "trainer" / "rank-00000" / STATE, weights_only=True)["parameters"]
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)


def test_the_shipped_recipe_has_the_settings_of_the_paper() -> None:
    recipe = load_diffusion_recipe("sdxl_subject")
    assert DiffusionRecipe.from_yaml(recipe.to_yaml()) == recipe
    own = vars(recipe.adapter) | vars(recipe.optim) | vars(recipe.data) | vars(recipe.train) | vars(recipe.model)
    paper = {
        "rank": 4, "alpha": 4, "mixer_init": "orthogonal", "factor_init": "gaussian", "lr": 1e-4, "weight_decay": 1e-4,
        "mixer_weight_decay": 1e-4, "schedule": "constant", "warmup": 0, "steps": 500, "batch": 1, "accumulation": 4,
        "precision": "fp16", "resolution": 1024, "prior": None, "prompt": "a photo of ikat cat",
        "cache_latents": True, "vae": "madebyollin/sdxl-vae-fp16-fix",
    }  # fmt: skip
    assert {key: own[key] for key in paper} == paper


@pytest.mark.parametrize(
    ("change", "kind", "error", "said"),
    [
        ("adapter.rnk=4", "tiny-sd", ConfigError, "Did you mean 'rank'"),
        ("data.resolution=4", "tiny-sd", ConfigError, "data.resolution is 4"),
        ("data.prior.weight=1", "tiny-sd", ConfigError, "missing data.prior.prompt"),
        ("adapter.peft={type: HIRA}", "tiny-sd", ConfigError, "which diffusion recipes do not take"),
        ("loss.min_snr_gamma=5", "tiny-sd3", ConfigError, "matches flows"),
        ("data.resolution=60", "tiny-flux", ConfigError, "data.resolution is 60, .* takes multiples of 8. Choose 64"),
        ("model.base=/dev", "tiny-sd", ModelError, "cannot be loaded"),
        ("data.pictures=/none", "tiny-sd", DataError, "is no folder"),
        ("train.precision=fp16", "tiny-sd", ConfigError, "needs a GPU"),
    ],
)
def test_bad_input_is_one_error_each(change: str, kind: str, error: type, said: str, recipe: Make) -> None:
    with pytest.raises(error, match=said):
        train_diffusion(recipe(change, kind=kind))


def test_several_processes_and_infinite_numbers_are_refused(recipe: Make, tmp_path: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but diffusion models train in one process"):
            train_diffusion(recipe())
        patch.setattr(diffusion_training, "is_installed", lambda name: False)
        with pytest.raises(ConfigError, match=r"need diffusers, which is missing. Run: pip install .*diffusers>=0.41"):
            train_diffusion(recipe())
    assert not (tmp_path / "run").exists()
    plain = DenoisingLoss.__call__
    monkeypatch.setattr(DenoisingLoss, "__call__", lambda self, batch: plain(self, batch) * float("nan"))
    with pytest.raises(DivergedError, match="gradient of step 1 is not finite"):
        train_diffusion(recipe())
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "failed"


def test_a_run_keeps_the_promises_of_every_run(
    recipe: Make, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A save that fails loses its checkpoint only, a hang is ended with its stacks, the measured end is recorded."""
    write, steps = TakenDenoiser.write, {1}

    def full(self: TakenDenoiser, folder: Path) -> None:
        if self.manifest.step in steps:
            raise OSError(28, "No space left on device")
        write(self, folder)

    monkeypatch.setattr(TakenDenoiser, "write", full)
    few = ("train.save_every=1", "train.steps=3", "train.keep_last=0")
    result = train_diffusion(recipe(*few))
    assert [path.name[-1] for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["2", "3"]
    assert "Training continues" in caplog.text
    assert read_manifest(result.checkpoint).counters["finished_at"] == 3
    steps |= {1, 2, 3}
    with pytest.raises(CheckpointError, match="The last 3 saves failed; stopped"):
        train_diffusion(recipe(*few, run="full"))
    hanging = [sys.executable, "-c", _HANGING, "train", str(tmp_path / "own.yaml")]
    Path(hanging[-1]).write_text(recipe("train.timeout_minutes=0.05", run="hung").to_yaml())
    assert subprocess.run(hanging, check=False).returncode == ExitStatus.HANG
    assert "No progress" in json.loads((tmp_path / "hung" / "state.json").read_text())["reason"]
    assert "stuck" in (tmp_path / "hung" / "stacks" / "rank-00000.txt").read_text()


_HANGING = """
import sys, time
from mm_moslora.cli.cli_app import run
from mm_moslora.diffusion.pipeline_families import DenoisingLoss
def stuck(self, batch):
    time.sleep(60)
DenoisingLoss.__call__ = stuck
run(sys.argv[1:])
"""


def test_a_run_goes_on_with_its_own_input(recipe: Make, pipelines: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Its recipe, pictures and weights; in the hub's cache lies a newer commit later on."""
    repository = tmp_path / "models--acme--tiny"
    base = shutil.copytree(pipelines / "tiny-sd", repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    pictures = shutil.copytree(pipelines / "pictures", tmp_path / "pictures")
    own = ["model.base=acme/tiny", f"data.pictures={pictures}", "train.steps=2"]
    kept = read_manifest(train_diffusion(recipe(*own), stop_at=1).checkpoint).base
    assert kept["commits"] == {"model.base": "a" * 40}
    shutil.copytree(pipelines / "tiny-sd-v", repository / "snapshots" / ("b" * 40))
    (repository / "refs" / "main").write_text("b" * 40)
    with pytest.raises(CheckpointError, match=r"optim.lr: 0.02 -> 0.01"):
        train_diffusion(recipe(*own, "optim.lr=0.01"))
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    for path, error, said in (
        (pictures / "0.png", CheckpointError, "pictures or prompts are not those"),
        (weights, ModelError, "^model.base/unet/diffusion.*: the files of the pipeline are not those of"),
    ):
        original = path.read_bytes()
        path.write_bytes(original[:-4] + b"\0\0\x80?")
        with pytest.raises(error, match=said):
            train_diffusion(recipe(*own))
        path.write_bytes(original)
    assert read_manifest(train_diffusion(recipe(*own)).checkpoint).base == kept
