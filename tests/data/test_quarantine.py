"""Quarantine: bad records are counted and written whatever the disk does, and damage found late changes no order."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import make_records

from mm_moslora.config import DataConfig
from mm_moslora.data.batch_loader import BatchLoader
from mm_moslora.data.epoch_order import MicroBatchLimit
from mm_moslora.data.quarantine import Quarantine
from mm_moslora.data.record_faults import Code, Where
from tests.data.sets import damage, make_set


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


def test_damage_that_is_found_late_changes_the_order_of_no_later_epoch(tmp_path: Path) -> None:
    """Only one rank sees the damage; if it changed the plan, the ranks would no longer agree."""
    path = make_records(tmp_path)
    damage(tmp_path / "images" / "5.png")
    data = make_set(path, max_bad_share=0.05)
    limit = MicroBatchLimit(examples=2)
    batches = BatchLoader(data, rank=0, world_size=2, config=data.config, global_batch=8, limit=limit)
    before = batches.plan(1)
    assert data[5] is None
    assert batches.plan(1) == before
