"""`data check --caches` fills what a training reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import make_records

from mm_moslora.cli import run
from mm_moslora.data import token_cache


@pytest.fixture
def recipe(tmp_path: Path, language_folder: Path, vision_folder: Path) -> str:
    """A recipe with faulty records and pictures, and validation data that share pictures."""
    path = make_records(tmp_path, 40)
    lines = path.read_text().splitlines()
    lines[8] = lines[8].replace('"gpt"', '"robot"')
    lines[21] = "\x00"
    path.write_text("\n".join(lines))
    (tmp_path / "images" / "5.png").unlink()
    (tmp_path / "images" / "30.png").write_bytes(b"no picture")
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines[:7]))
    source = {"image_folder": str(tmp_path / "images")}
    content = {
        "name": "t",
        "model": {
            "language": str(language_folder),
            "vision": {"name": str(vision_folder), "mode": "frozen", "feature_cache": str(tmp_path / "features")},
        },
        "data": {
            "train": [{"path": str(path)} | source],
            "validation": [{"path": str(tmp_path / "held_out.jsonl")} | source],
            "cache": str(tmp_path / "tokens"),
            "max_bad_share": 0.5,
        },
        "train": {"output": str(tmp_path / "run"), "precision": "fp32"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "recipe.yaml")


def test_training_finds_everything_in_the_caches(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for _ in range(2):
        assert run(["data", "check", recipe, "--caches"]) == 0
        told.append(capsys.readouterr().out)
        monkeypatch.setattr(token_cache, "_tokenise", None)
    assert told[0].startswith("Caches: tokens of 47 records; features of ")
    assert " 0 of them new, 2 pictures cannot be read." in told[1]
    steps = ["--train.steps", "2", "--train.global_batch", "4"]
    assert run(["train", recipe, *steps]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["feature_cache_hits"] for row in rows if "feature_cache_hits" in row][-1] == 1


def test_a_recipe_without_a_cache_has_nothing_to_fill(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    none = ["--data.cache", "null", "--model.vision.feature_cache", "null"]
    assert run(["data", "check", recipe, "--caches", *none]) == 1
    assert "names no cache" in capsys.readouterr().err
