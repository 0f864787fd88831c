"""Quarantine: every kind of bad record is named with its place, and damage found late changes no order."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_records

from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.batch_loader import BatchLoader
from mm_moslora.data.epoch_order import MicroBatchLimit
from mm_moslora.data.quarantine import Quarantine
from mm_moslora.data.record_faults import Code, Where
from mm_moslora.data.training_set import TrainingSet
from tests.data.conftest import Setup
from tests.data.sets import TinyTower

Write = Callable[..., Path]


def transform(image: Image.Image) -> torch.Tensor:
    assert image.mode == "RGB"
    return torch.from_numpy(np.asarray(image.resize((4, 4))).copy()).permute(2, 0, 1).float() / 255


def record(name: str, *pairs: tuple[str, str], image: str | None = None) -> dict[str, object]:
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {})


def build(
    setup: Setup, *paths: Path, out: Path | None = None, config: DataConfig | None = None, **options
) -> TrainingSet:
    config = config or DataConfig()
    sources = [SourceConfig(path=str(path), image_folder=str(path.parent / "images")) for path in paths]
    to_pixels = options.pop("transform", transform)
    encoder = setup.encoder()
    image_processing = None if to_pixels is None else TinyTower(to_pixels, token=encoder.image_token_id, tokens=3)
    return TrainingSet(sources, encoder, image_processing, config=config, quarantine_path=out, **options)


@pytest.fixture
def records_file(tmp_path: Path) -> Path:
    """24 records, every fourth without a picture."""
    return make_records(tmp_path)


class TestQuarantine:
    @pytest.fixture
    def mixed(self, write: Write, tmp_path: Path) -> Path:
        """Ten good records and seven bad ones."""
        (tmp_path / "images").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "good.png")
        (tmp_path / "images" / "empty.png").write_bytes(b"")
        (tmp_path / "images" / "page.png").write_text("<!DOCTYPE html>")
        good = [record(f"g{number}", ("<image>\nq", "a"), image="good.png") for number in range(10)]
        bad = [
            record("missing", ("<image>\nq", "a"), image="good.jpg"),
            record("empty", ("<image>\nq", "a"), image="empty.png"),
            record("page", ("<image>\nq", "a"), image="page.png"),
            record("long", ("q", "a " * 4000)),
            record("count", ("q", "a"), image="good.png"),
            record("away", ("<image>\nq", "a"), image="../x.png"),
            record("silent", ("q", "")),
        ]
        return write(*good, *bad)

    def test_bad_records_are_written_counted_and_left_out(self, chatml: Setup, mixed: Path, tmp_path: Path) -> None:
        out = tmp_path / "run" / "quarantine.jsonl"
        data = build(chatml, mixed, out=out, config=DataConfig(max_bad_share=0.5))
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert {line["id"]: line["code"] for line in lines} == {
            "missing": "IMAGE_MISSING", "empty": "IMAGE_EMPTY", "page": "IMAGE_FORMAT", "long": "TOO_LONG",
            "count": "IMAGE_COUNT", "away": "PATH_ESCAPES", "silent": "EMPTY_ANSWER",
        }  # fmt: skip
        assert [(line["record"], line["row"], line["line"]) for line in lines] == [
            (row, row, row + 1) for row in range(10, 17)
        ]
        assert lines[0]["field"] == "image[0]"
        assert lines[0]["path"].endswith("good.jpg")
        assert "There is 'good.png'" in lines[0]["reason"]
        assert lines[3]["field"] == "conversations"
        assert data.members == [list(range(10))]


def test_a_full_disk_stops_no_run_for_a_bad_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "gone" / "quarantine.jsonl"
    error = Where(file=Path("a.jsonl"), line=1, row=0).error(Code.IMAGE_MISSING, "image", "is missing", "restore it")
    quarantine = Quarantine(file, 1000, DataConfig())
    (tmp_path / "gone").touch()  # no folder can be made there
    quarantine.add(0, error)
    quarantine.close()
    quarantine.add(1, error)
    assert quarantine.codes == {"IMAGE_MISSING": 2}
    assert caplog.text.count("cannot be written") == 1
    (tmp_path / "gone").unlink()
    (tmp_path / "gone").mkdir()
    quarantine.add(2, error)
    assert [json.loads(line)["record"] for line in file.read_text().splitlines()] == [0, 1, 2]


def test_bad_records_that_threads_find_at_one_time_are_each_counted_and_written_once(tmp_path: Path) -> None:
    file, count = tmp_path / "quarantine.jsonl", 3000
    error = Where(file=Path("a.jsonl"), line=1, row=0).error(Code.IMAGE_MISSING, "image", "is missing", "restore it")
    quarantine = Quarantine(file, count, DataConfig(max_bad_share=1.0))
    quarantine.close()
    numbers = iter(range(count))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: quarantine.add(number, error), numbers))
    assert quarantine.codes == {"IMAGE_MISSING": count}
    assert sorted(json.loads(line)["record"] for line in file.read_text().splitlines()) == [*range(count)]


class TestDamageFoundLate:
    """A picture with a good header and broken pixels."""

    @pytest.fixture
    def data(self, chatml: Setup, records_file: Path, tmp_path: Path) -> TrainingSet:
        path = records_file.parent / "images" / "5.png"
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:-900])
        return build(chatml, records_file, out=tmp_path / "q.jsonl", config=DataConfig(max_bad_share=0.05))

    def test_the_order_of_later_epochs_does_not_change(self, data: TrainingSet) -> None:
        """Only one rank sees the damage; if it changed the plan, the ranks would no longer agree."""
        limit = MicroBatchLimit(examples=2)
        batches = BatchLoader(data, rank=0, world_size=2, config=data.config, global_batch=8, limit=limit)
        before = batches.plan(1)
        assert data[5] is None
        assert batches.plan(1) == before
