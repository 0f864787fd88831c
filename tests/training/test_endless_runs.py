"""Runs over streams without an end: they stop at a step, go on exactly, and outlive a source that vanishes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from trials import hexed, with_train

from mm_moslora.config import Recipe, SourceConfig
from mm_moslora.data.sources.endless_sources import EndlessSource
from mm_moslora.training.checkpointing.checkpoint_folder import read_manifest
from mm_moslora.training.checkpointing.run_checkpoints import newest_valid
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import CheckpointError, ConfigError, DataError


@pytest.fixture
def stream(recipe: Recipe, records: Path, tmp_path: Path) -> Recipe:
    """Two files as a stream, and a third to replay."""
    lines = records.read_text().splitlines()
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, part in (("0", lines[:10]), ("1", lines[10:19])):
        (folder / f"{name}.jsonl").write_text("\n".join(part))
    (tmp_path / "old.jsonl").write_text("\n".join(lines[19:]))
    images = str(records.parent / "images")
    sources = [
        SourceConfig(path=str(folder), streaming=True, image_folder=images, weight=3),
        SourceConfig(path=str(tmp_path / "old.jsonl"), image_folder=images),
    ]
    return replace(recipe, data=replace(recipe.data, train=sources, shuffle_buffer=16))


@pytest.mark.parametrize("pack_tokens", [0, 256])
def test_a_stopped_run_goes_on_exactly(stream: Recipe, tmp_path: Path, pack_tokens: int) -> None:
    small = {"global_batch": 2, "micro_batch": 2} if pack_tokens else {}
    stream = with_train(replace(stream, data=replace(stream.data, pack_tokens=pack_tokens)), **small)
    straight = with_train(stream, output=str(tmp_path / "straight"), rehearsal=False)
    assert train(straight).step == 6
    stream = with_train(stream, rehearsal=False)
    train(stream, stop_at=2)
    train(stream, stop_at=3)
    assert train(stream).finished
    assert hexed(Path(stream.train.output)) == hexed(Path(straight.train.output))
    places = [read_manifest(tmp_path / "run" / f"checkpoint-{step:06d}").place for step in (3, 6)]
    assert places[0]["window"] < places[1]["window"]


def test_a_run_outlives_a_source_that_vanishes(stream: Recipe, tmp_path: Path, monkeypatch) -> None:
    stream = with_train(stream, rehearsal=False, save_every=1)
    straight = with_train(stream, output=str(tmp_path / "straight"))
    train(straight)
    file, elsewhere = tmp_path / "shards" / "1.jsonl", tmp_path / "elsewhere"
    take = EndlessSource.take

    def vanishing(source: EndlessSource) -> object:
        if source.passes == 1 and file.exists():  # in the second window, which is read ahead
            file.rename(elsewhere)
        return take(source)

    with monkeypatch.context() as patched:
        patched.setattr(EndlessSource, "take", vanishing)
        with pytest.raises(
            DataError, match=r"data\.train\.0 .*shards\) broke off in pass \d behind record \d+: .*1\.js"
        ):
            train(stream)
    gone = rf"differs .*: data\.train\.0 \({file.parent}\): 1\.jsonl \(\d+ bytes before, absent now\), so"
    with pytest.raises(CheckpointError, match=gone):
        train(stream)
    text = elsewhere.read_text()
    elsewhere.write_text(text + "\n")
    elsewhere.rename(file)
    with pytest.raises(CheckpointError, match=rf"1\.jsonl \({len(text)} bytes before, {len(text) + 1} bytes now\)"):
        train(stream)
    file.write_text(text)
    assert 0 < newest_valid(Path(stream.train.output))[1].step < 6
    assert train(stream).finished
    assert hexed(Path(stream.train.output)) == hexed(Path(straight.train.output))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["records"] >= 48


def test_ranks_that_read_other_records_write_no_checkpoint(stream: Recipe, tmp_path: Path, monkeypatch) -> None:
    def gathered(value: object) -> list[object]:
        return [value, [9, 0]] if isinstance(value, list) and isinstance(value[0], int) else [value]

    monkeypatch.setattr("mm_moslora.utils.distributed.gather_objects", gathered)
    with pytest.raises(DataError, match=r"read different numbers of records .*: \[\[\d+, \d+\], \[9, 0\]\], by rank"):
        train(with_train(stream, rehearsal=False))
    assert not [*(tmp_path / "run").glob("checkpoint-*")]


def test_a_stream_needs_a_number_of_steps(stream: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"it has no end: set train\.steps"):
        with_train(stream, steps=None)
