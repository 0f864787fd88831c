"""`data check` and `data cache` by shards: what the undivided command finds and writes, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import make_records

from mm_moslora.cli import run
from mm_moslora.data import token_cache
from mm_moslora.data.check import record_check


@pytest.fixture
def recipe(tmp_path: Path, language_folder: Path, vision_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe with faulty records, copies, repeated ids and pictures, and validation data that share pictures."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(record_check, "_TOGETHER", 4)
    path = make_records(tmp_path, 40)
    lines = path.read_text().splitlines()
    lines[8] = lines[8].replace('"gpt"', '"robot"')
    lines[20] = lines[3]
    lines[21] = "\x00"
    lines[22] = lines[22].replace("{", '{"mood": "good", ', 1)
    path.write_text("\n".join([*lines, '{"id": "x"}', "null"]))
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


def told(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str]:
    capsys.readouterr()
    code = run(["data", *command])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("of", [3, 30])  # shards of several records, and more shards than groups of records
def test_a_check_by_shards_reports_what_the_undivided_one_reports(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], of: int
) -> None:
    shards = ["--output", str(tmp_path / "shards")]
    for number in reversed(range(1, of + 1)):
        assert told(capsys, "check", recipe, *shards, "--shard", f"{number}/{of}")[0] == 0
    for more in ([], ["--json"], ["--all", "--against", str(tmp_path / "images")]):
        whole = told(capsys, "check", recipe, *more)
        assert told(capsys, "check", recipe, *more, *shards, "--merge") == whole
        assert "BAD_ROLE" in whole[1]
        assert "IMAGE_FORMAT" in whole[1]


def test_shards_of_a_check_that_are_missing_foreign_or_damaged_are_named(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    shards = ["check", recipe, "--output", str(folder)]

    def refused(*command: str) -> str:
        capsys.readouterr()
        assert run(["data", *command]) == 1
        return capsys.readouterr().err

    assert "no finished shard" in refused(*shards, "--merge")
    assert run(["data", *shards, "--shard", "2/2"]) == 0
    assert "1 of 2 shards are missing or not finished: 1/2" in refused(*shards, "--merge")
    assert run(["data", *shards, "--shard", "1/2", "--data.max_length", "64"]) == 0
    assert "its data: max_length is 64, expected " in refused(*shards, "--merge")
    assert run(["data", *shards, "--shard", "1/2"]) == 0
    path = folder / "1-of-2.json"
    text = path.read_text()
    stamp = path.stat().st_mtime_ns
    assert run(["data", *shards, "--shard", "1/2"]) == 0  # a second time changes nothing
    assert path.stat().st_mtime_ns == stamp
    for damaged in (
        text[:-30],
        "{}",
        "[]",
        text.replace('"records":', '"record":'),
        text.replace('"lengths": [', '"lengths": ["a", '),
    ):
        path.write_text(damaged)
        assert "1-of-2.json" in refused(*shards, "--merge")
    path.write_text("mine")
    assert "is not replaced" in refused(*shards, "--shard", "1/2")
    path.write_text(text)
    assert run(["data", *shards, "--merge"]) == 0
    images = tmp_path / "train.jsonl"
    images.write_text(images.read_text() + '\n{"id": "y"}')
    assert "its content of data.train.0 is '" in refused(*shards, "--merge")
    for options in (["--shard", "1/2"], ["--merge"], ["--output", "x"], ["--shard", "1/2", "--merge", "--output", "x"]):
        assert "--output FOLDER" in refused("check", recipe, *options)
    assert "expected I/N" in refused(*shards, "--shard", "0/0")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def caches(tmp_path: Path) -> list[dict[str, bytes]]:
    found = [files_of(tmp_path / name) for name in ("tokens", "features")]
    for name in ("tokens", "features"):
        shutil.rmtree(tmp_path / name)
    return [{name: content for name, content in files.items() if not name.endswith(".lock")} for files in found]


@pytest.mark.parametrize("of", [3, 45])  # more shards than the 42 records
def test_caches_by_shards_have_the_bytes_of_undivided_ones(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: int
) -> None:
    monkeypatch.setattr(token_cache, "_ROWS", 4)
    assert run(["data", "cache", recipe]) == 0
    whole = caches(tmp_path)
    assert len(whole[0]) == 12
    assert len(whole[1]) > 16
    for number in reversed(range(1, of + 1)):
        assert run(["data", "cache", recipe, "--shard", f"{number}/{of}"]) == 0
    monkeypatch.setattr(token_cache, "_tokenise", None)
    assert run(["data", "cache", recipe]) == 0
    assert run(["data", "cache", recipe, "--shard", f"1/{of}"]) == 0  # nothing is left to do
    assert caches(tmp_path) == whole


def test_an_interrupted_shard_of_a_cache_is_repeated(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "cache", recipe]) == 0
    whole = caches(tmp_path)
    tokenise = token_cache._tokenise

    def interrupted(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(token_cache, "_tokenise", interrupted)
    assert run(["data", "cache", recipe, "--shard", "1/2"]) == 130
    monkeypatch.setattr(token_cache, "_tokenise", tokenise)
    assert run(["data", "cache", recipe, "--shard", "2/2"]) == 0
    assert run(["data", "cache", recipe, "--shard", "1/2"]) == 0
    assert run(["data", "cache", recipe]) == 0
    assert caches(tmp_path) == whole
    assert run(["data", "cache", recipe, "--shard", "2/2"]) == 0
    assert run(["data", "cache", recipe]) == 0  # a missing shard is named, and its records are tokenised
    assert "1 of 2 shards are missing or not finished: 1/2" in capsys.readouterr().err
    tokens = caches(tmp_path)[0]
    assert {name: content for name, content in tokens.items() if ".shards" not in name} == whole[0]


def test_a_damaged_shard_of_a_cache_is_named(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "cache", recipe, "--shard", "1/1"]) == 0
    for name in ("ids.bin", "table.npy", "faults.json"):
        path = next((tmp_path / "tokens").glob(f"*.shards/1-of-1/{name}"))
        content = path.read_bytes()
        path.write_bytes(content[:-1] if name != "table.npy" else b"")
        capsys.readouterr()
        assert run(["data", "cache", recipe]) == 1
        assert f"{path.parent} is damaged" in capsys.readouterr().err
        path.write_bytes(content)
    table, sums = np.load(path.with_name("table.npy")), path.with_name("sums.json")
    for spoiled in (table[:3], table[0], table[:, :3]):
        np.save(path.with_name("table.npy"), spoiled)
        sums.write_text(json.dumps(token_cache._sums(path.parent)))
        assert run(["data", "cache", recipe]) == 1
        assert f"{path.parent} is damaged" in capsys.readouterr().err
    np.save(path.with_name("table.npy"), table)
    sums.write_text(json.dumps(token_cache._sums(path.parent)))
    assert run(["data", "cache", recipe]) == 0


def test_training_finds_everything_in_the_caches(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        assert run(["data", "cache", recipe, "--shard", f"{number}/2"]) == 0
    monkeypatch.setattr(token_cache, "_tokenise", None)
    steps = ["--train.steps", "2", "--train.global_batch", "4"]
    assert run(["train", recipe, *steps]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["feature_cache_hits"] for row in rows if "feature_cache_hits" in row][-1] == 1


def test_a_recipe_without_a_cache_has_nothing_to_fill(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    none = ["--data.cache", "null", "--model.vision.feature_cache", "null"]
    assert run(["data", "cache", recipe, *none]) == 1
    assert "names no cache" in capsys.readouterr().err
