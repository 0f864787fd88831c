"""What a model was trained with goes into every folder that is written of it, and to all who begin with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from mm_moslora_eval.backends.open_model import open_model
from pairs import make_pairs

from mm_moslora.cli import run as command
from mm_moslora.compare import comparison_cell
from mm_moslora.compare.arms import parse_arms
from mm_moslora.compare.comparison_cell import CellRun
from mm_moslora.compare.comparison_plan import Cell, ComparisonSettings
from mm_moslora.config import load_recipe
from mm_moslora.data.preprocessing_print import differences, preprocessing_of, stored_preprocessing, trained_videos
from mm_moslora.models.assembly import load_parts
from mm_moslora.serve.served_models import load_models
from mm_moslora.serve.terminal_chat import Chat

MODEL = {
    "image_aspect": "resize", "system_prompt": "Look twice.", "chat_template": "chatml", "thinking": "mask",
    "boxes": "qwen3_vl",
}  # fmt: skip
SEEING = {"feature_layer": -1, "image_size": 48}
PIXELS = {"image_mean": [0.3, 0.4, 0.5], "image_std": [0.2, 0.3, 0.4], "resample": 2}
TRAIN = {"steps": 1, "global_batch": 2, "micro_batch": 2, "zero": "none", "precision": "fp32"}
FRAMES = 3
"""No value is the default."""


def written(name: str, folder: Path, **recipe: Any) -> Path:
    """Train a recipe by the command line."""
    file = folder / f"{name}.yaml"
    train = TRAIN | {"output": str(folder / name)}
    file.write_text(yaml.safe_dump({"train": train, "track": {"trackers": []}, **recipe}))
    assert command(["train", str(file)]) == 0
    return folder / name


@pytest.fixture(scope="module")
def root(tmp_path_factory, language_folder, vision_folder) -> Path:
    folder = tmp_path_factory.mktemp("written")
    tower = Path(shutil.copytree(vision_folder, folder / "tower"))
    processor = tower / "preprocessor_config.json"
    known = json.loads(processor.read_text()) if processor.is_file() else {}
    processor.write_text(json.dumps(known | PIXELS))
    return folder


@pytest.fixture(scope="module")
def folders(root, language_folder, records) -> dict[str, Path]:
    """The first run, and what is written from it by every way."""
    pictures = str(records.parent / "images")
    data = {"train": [{"path": str(records), "image_folder": pictures, "video_frames": FRAMES}], "max_length": 256}
    bare = {"train": [{"path": str(records), "image_folder": pictures}], "max_length": 256}
    first = written(
        "train", root, data=data, adapter={"rank": 4, "alpha": 12},
        model=MODEL | {"language": str(language_folder), "vision": {"name": str(root / "tower"), **SEEING}},
    )  # fmt: skip
    pairs = {"train": [{"path": str(make_pairs(root)), "image_folder": str(root / "images")}], "max_length": 256}
    found = {"train": first, "train again": written("again", root, data=bare, adapter={"weights": str(first)})}
    frozen = {"projector": {"mode": "frozen"}}
    found["preferences"] = written(
        "dpo", root, objective="dpo", data=pairs, model=frozen, adapter={"weights": str(first)}
    )
    found["compare"] = compared(root, first, bare)
    for layout in ("llava", "hf", "lora", "vllm"):
        found[layout] = root / layout
        assert command(["export", str(first), str(found[layout]), "--to", layout]) == 0
    return found


def compared(root: Path, first: Path, data: Mapping[str, Any]) -> Path:
    file = root / "compare.yaml"
    recipe = {"data": data, "adapter": {"weights": str(first)}, "train": TRAIN, "track": {"trackers": []}}
    file.write_text(yaml.safe_dump(recipe))
    shared = load_recipe(file)
    settings = ComparisonSettings(
        arms=parse_arms("moslora,moslora@optim.mixer_factor=6", shared), rates=[1e-4], seeds=1, tasks=["loss"]
    )
    cell = Cell(arm=settings.arms[0], rate=1e-4, seed=0, tuning=False)
    run = CellRun(cell=cell, recipe=cell.recipe(shared, root), settings=settings, folder=root)
    run.run_folder.mkdir(parents=True)
    assert comparison_cell._train(run, None)
    return run.run_folder


def started(folder: Path, objective: str) -> dict[str, Any]:
    """The preprocessing of a recipe that names the folder alone."""
    file = folder.parent / "start.yaml"
    source = {"path": "a.jsonl"}
    base: dict[str, Any] = {"model": {"projector": {"mode": "frozen"}}, "adapter": {"weights": str(folder)}}
    if (folder / "config.json").is_file():
        base = {"model": {"vlm": str(folder)}}
    elif (folder / "base").is_dir():
        base["model"] = {"vlm": str(folder / "base")}
    file.write_text(yaml.safe_dump({**base, "objective": objective, "data": {"train": [source]}}))
    recipe = load_recipe(file)
    parts = load_parts(recipe.model, weights="none")
    return preprocessing_of(parts, video_frames=[recipe.data.train[0].video_frames])


def chatted(folder: Path) -> dict[str, Any]:
    chat = Chat.from_folder(folder)
    return preprocessing_of(chat.assembly, video_frames=[chat.video_frames])


def evaluated(folder: Path) -> dict[str, Any]:
    model: Any = open_model(str(folder))
    return preprocessing_of(model.assembly, video_frames=[model.trained_frames])


def served(folder: Path) -> dict[str, Any]:
    """`serve` and `chat --web`."""
    return preprocessing_of(load_models(folder).assembly, video_frames=[FRAMES])


def exported(folder: Path) -> dict[str, Any]:
    output = folder.parent / f"{folder.name} again"
    shutil.rmtree(output, ignore_errors=True)
    assert command(["export", str(folder), str(output), "--to", "hf"]) == 0
    return stored_preprocessing(output)


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "its file": stored_preprocessing, "train": lambda folder: started(folder, "sft"),
    "preferences": lambda folder: started(folder, "dpo"), "chat": chatted, "eval": evaluated, "serve": served,
    "export": exported,
}  # fmt: skip
WRITERS = ("train", "train again", "preferences", "compare", "llava", "hf", "lora")
TRAINERS = ("train", "preferences")


@pytest.mark.parametrize(
    ("writer", "reader"),
    [*((writer, reader) for writer in WRITERS for reader in READERS), ("vllm", "its file")],  # of other programs
)
def test_what_was_trained_with_reaches_whoever_begins_with_a_folder(writer, reader, folders):
    trained = stored_preprocessing(folders["train"])
    assert trained["settings"]["image.image_mean"] == PIXELS["image_mean"]
    read = READERS[reader](folders[writer])
    assert differences(read, trained) == []
    assert (read["settings"]["video_frames"], read["settings"]["boxes"]) == ([FRAMES], "qwen3_vl")
    assert read["settings"]["thinking"] in ("mask", *(() if reader in TRAINERS else ("always",)))  # they ask alike
    assert trained_videos(folders[writer]).frames == FRAMES
