"""The adapter in other people's training code and models: HF `Trainer`, TRL, an open_clip tower."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import open_clip
import peft
import pytest
import torch

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, load_adapter, merge, save_adapter
from mm_moslora.utils.errors import ConfigError
from tests.adapters.adapter_models import train_a_bit

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_hf_trainer_trains_and_its_checkpoints_are_double_folders(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("hf_trainer", EXAMPLES / "hf_trainer.py")
    example = importlib.util.module_from_spec(spec)
    sys.modules["hf_trainer"] = example
    spec.loader.exec_module(example)
    losses = example.train(tmp_path, steps=20)
    assert losses[-1] < 0.95 * losses[0]
    ids = example.Pattern()[3]["input_ids"].unsqueeze(0)
    outputs = []
    for folder in (tmp_path / "adapter", tmp_path / "checkpoint-20"):
        assert (folder / "moslora.safetensors").is_file()
        ours = load_adapter(example.base(), folder)
        stock = peft.PeftModel.from_pretrained(example.base(), folder).eval()
        with torch.no_grad():
            outputs += [ours(ids).logits, stock(ids).logits]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=0)


def test_help_of_the_trainer_example_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hf_trainer.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "hf_trainer.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "folder to write into" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_plain_loop_of_diffusers_trains_what_a_pipeline_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from tests.builders.tiny_pipelines import SIDE, save_pictures, tiny_pipeline

    tiny_pipeline("tiny-sd").save_pretrained(tmp_path / "base")
    save_pictures(tmp_path / "pictures")
    folders = [
        f"--{name}={tmp_path / folder}" for name, folder in (("base", "base"), ("pictures", "pictures"), ("out", "cat"))
    ]
    monkeypatch.setattr(sys, "argv", ["dreambooth.py", *folders, "--steps=40", f"--side={SIDE}", "--lr=1e-2"])
    found = runpy.run_path(str(EXAMPLES / "dreambooth.py"), run_name="__main__")
    assert sum(found["losses"][-10:]) < 0.98 * sum(found["losses"][:10])
    assert "loss " in capsys.readouterr().out
    assert (tmp_path / "cat" / "adapter" / "moslora.json").is_file()
    pictures = []
    for folder in (None, tmp_path / "cat"):
        pipeline = tiny_pipeline("tiny-sd")
        if folder is not None:
            pipeline.load_lora_weights(folder)
        noise = torch.Generator().manual_seed(0)
        size = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "pt", "generator": noise}
        pictures.append(torch.as_tensor(pipeline("a photo of an ikat cat", **size).images))
    assert not torch.equal(*pictures)


def test_one_folder_goes_through_trainer_sft_trainer_and_our_loop(language_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    spec = importlib.util.spec_from_file_location("three_trainers", EXAMPLES / "three_trainers.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.OPTIONS["learning_rate"] = 1e-2
    *losses, stock_loss = example.run(language_folder, tmp_path, steps=4).values()
    assert losses == sorted(losses, reverse=True)
    assert stock_loss == pytest.approx(losses[-1], abs=1e-5)
    ids = torch.arange(12)[None]
    folders = [tmp_path / "trainer" / "adapter", tmp_path / "trl" / "adapter", tmp_path / "adapter"]
    for folder in folders:
        stock = peft.PeftModel.from_pretrained(example.base(language_folder), folder).eval()
        with torch.no_grad():
            live = load_adapter(example.base(language_folder), folder)(ids).logits
            torch.testing.assert_close(stock(ids).logits, live, atol=1e-5, rtol=0)


def test_our_loop_refuses_a_folder_of_another_rank(language_folder: Path, tmp_path: Path) -> None:
    from mm_moslora.config import AdapterConfig, ModelConfig
    from mm_moslora.models.assembly import load_parts
    from mm_moslora.models.trainable_parts import attach_adapters

    model = ModelConfig(language=str(language_folder))
    first = load_parts(model, dtype=torch.float32)
    save_adapter(attach_adapters(first, model, AdapterConfig(rank=4, alpha=8)), tmp_path / "a")
    again = load_parts(model, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"rank 4 and alpha 8, but the recipe says 8 and 8.*adapter\.rank"):
        attach_adapters(again, model, AdapterConfig(rank=8, alpha=8, weights=str(tmp_path / "a")))
    tuned = attach_adapters(again, model, AdapterConfig(rank=4, alpha=8, weights=str(tmp_path / "a")))
    assert {p.requires_grad for name, p in tuned.named_parameters() if "lora_" in name} == {True}


def _tower() -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.transformer.VisionTransformer(
        image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
    ).eval()


def test_an_open_clip_tower_carries_adapters_in_its_mlp(tmp_path: Path) -> None:
    pictures = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = add_moslora(_tower(), MoSLoRAConfig(r=4, lora_alpha=8), targets=["c_fc", "c_proj"])
    with torch.no_grad():
        assert torch.equal(model(pictures), _tower()(pictures))
        train_a_bit(model)
        live = model.eval()(pictures)
        assert (live - _tower()(pictures)).abs().max() > 1e-2
        save_adapter(model, tmp_path / "a")
        assert torch.equal(load_adapter(_tower(), tmp_path / "a")(pictures), live)
        torch.testing.assert_close(merge(model)(pictures), live, atol=1e-5, rtol=1e-5)
