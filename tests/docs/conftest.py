"""A workspace in which the documents' commands run: tiny parts under the names that the documents use."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from trials import write_questions

from mm_moslora import cli
from mm_moslora.quickstart import model_assets, user_recipe

LANGUAGES = ("meta-llama/Llama-3.1-8B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
TOWERS = ("openai/clip-vit-large-patch14-336", "google/siglip-base-patch16-224")


@pytest.fixture(scope="session")
def coarse_tower(tmp_path_factory) -> Path:
    """A tiny tower that gives as many patches at 192 pixels as the quickstart's."""
    import transformers

    folder = tmp_path_factory.mktemp("coarse")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=32
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _parts(start_at_once, monkeypatch, language_folder: Path, coarse_tower: Path) -> None:
    """What the quickstart would fetch, for runs of few steps."""
    monkeypatch.setattr(user_recipe, "MOST_EPOCHS", 2)
    monkeypatch.setattr(model_assets, "language_model", lambda _say: language_folder)
    monkeypatch.setattr(model_assets, "efficientnet_timm", lambda _say: coarse_tower)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, language_folder: Path, vision_folder: Path, records: Path) -> Path:
    """Hub ids as folders, `my/` with pictures and questions, and what README calls RECIPE.yaml, RUN and so on.

    The run's settings are not the defaults, so an example that starts from it must take them over.
    """
    folder = tmp_path_factory.mktemp("workspace")
    for names, part in ((LANGUAGES, language_folder), (TOWERS, vision_folder)):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(part)
    (folder / "my").mkdir()
    shutil.copytree(records.parent / "images", folder / "my" / "images")
    shutil.copytree(records.parent / "images", folder / "images")
    for label, colour in (("cat", "red"), ("tea_pot", "blue")):
        (folder / "photos" / label).mkdir(parents=True)
        for index in range(6):
            Image.new("RGB", (20 + index, 20), colour).save(folder / "photos" / label / f"{index}.png")
    (folder / "PHOTOS").symlink_to("photos")
    shutil.copy(records, folder / "my" / "train.jsonl")
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    questions = write_questions(records, folder / "my" / "test.jsonl", folder / "questions.jsonl", count=8)
    for row in questions:
        shutil.copy(folder / "images" / row["image"], folder / row["image"])
    shutil.copy(folder / "images" / questions[0]["image"], folder / "picture.png")
    if importlib.util.find_spec("diffusers"):
        from tests.builders.tiny_pipelines import save_pictures, tiny_pipeline

        tiny_pipeline("tiny-sdxl").save_pretrained(folder / "PIPELINE")
        save_pictures(folder / "pictures" / "cat")
        shutil.copytree(folder / "pictures" / "cat", folder / "pictures" / "cats")
    (folder / "RECIPE.yaml").write_text(
        f"""
model:
  language: {LANGUAGES[0]}
  vision: {{name: {TOWERS[0]}, feature_layer: -1, select: cls_patch, image_size: 28}}
  image_aspect: resize
  system_prompt: ""
adapter: {{rank: 4, alpha: 8}}
data: {{train: [{{path: my/train.jsonl, image_folder: my/images}}], max_length: 256}}
optim: {{lr: 1.0e-4}}
train: {{output: RUN, steps: 2, global_batch: 8, micro_batch: 8, zero: none, precision: fp32}}
track: {{trackers: []}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Path:
    """The workspace with a run in RUN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        assert cli.run(["train", "RECIPE.yaml"]) == 0
    return workspace
