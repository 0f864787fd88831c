"""The training set: what is used, what is left out and written to quarantine, and how it is counted."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from between import just_before
from tiny import make_records

from mm_moslora.config import DataConfig
from mm_moslora.data.batch_loader import BatchLoader
from mm_moslora.data.epoch_order import MicroBatchLimit
from mm_moslora.data.quarantine import Quarantine
from mm_moslora.data.record_faults import Code, Where
from mm_moslora.utils.errors import DataError
from tests.data.sets import damage, make_set


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_records(tmp_path, 20)


def rewrite(path: Path, change) -> None:
    """Change the records of a file in place: `change(index, record)`; None drops it, text is written as it is."""
    lines = []
    for index, line in enumerate(path.read_text().splitlines()):
        record = json.loads(line)
        changed = change(index, record)
        lines.append(changed if isinstance(changed, str) else json.dumps(changed or record))
    path.write_text("\n".join(lines) + "\n")


def quarantined(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_examples_have_their_pixels_and_exact_lengths(path):
    data = make_set(path)
    assert len(data) == 20
    assert not data.estimated
    for index in range(20):
        example = data[index]
        assert example.id == f"r{index}"
        assert example.length == data.lengths[index]
        assert bool(data.has_image[index]) == (index % 4 != 3) == bool(example.pictures)
        assert example.supervised.any()
    (picture,) = data[0].pictures
    assert picture.tensors["pixel_values"].shape == (1, 3, 4, 4)


def test_statistics_for_a_report_are_counts_of_what_is_used(path):
    rewrite(path, lambda index, record: {} if index else {**record, "image": "missing.png"})
    facts = make_set(path, max_bad_share=0.5).statistics()
    data = make_set(path, max_bad_share=0.5)
    lengths = sorted(data[index].length for index in data.usable)
    assert (facts["records"], facts["unusable"], facts["with_pictures"], facts["shortened"]) == (20, 1, 14, 0)
    assert facts["tokens"] == sum(lengths)
    assert (facts["tokens_per_record_median"], facts["tokens_per_record_longest"]) == (lengths[9], lengths[-1])


def test_a_picture_that_vanishes_after_the_start_is_an_error_and_no_record_is_left_out(path):
    """Its record belongs to the order of the run, which could not be resumed without it."""
    data = make_set(path, max_bad_share=0.5)
    picture = path.parent / "images" / "5.png"
    picture.rename(picture.with_suffix(".away"))
    with pytest.raises(DataError, match=r"5\.png.*was there when the run started, so its record is not left out"):
        data[5]
    assert data[6] is not None
    picture.with_suffix(".away").rename(picture)
    assert data[5] is not None
    assert not data.quarantine.codes


def test_progress_is_told(path):
    told = []
    make_set(path, on_progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (20, 20)
    assert len(told) <= 20


def test_sources_lie_behind_each_other(path, tmp_path):
    other = make_records(tmp_path / "other", 5)
    data = make_set(path, other)
    assert len(data) == 25
    assert data[20].id == "r0"
    assert data.usable == list(range(25))
    with pytest.raises(IndexError):
        data.record(25)


def test_a_bad_record_is_named_counted_and_left_out(path, tmp_path):
    (path.parent / "images" / "4.png").unlink()
    rewrite(path, lambda index, record: "{broken" if index == 2 else None)
    file = tmp_path / "run" / "quarantine.jsonl"
    data = make_set(path, quarantine_path=file, max_bad_share=0.2)
    assert data.usable == [index for index in range(20) if index not in (2, 4)]
    assert data.quarantine.codes == {"BAD_JSON": 1, "IMAGE_MISSING": 1}
    broken, missing = quarantined(file)
    assert (broken["line"], broken["row"], broken["code"], broken["id"]) == (3, 2, "BAD_JSON", None)
    assert (missing["line"], missing["code"], missing["id"]) == (5, "IMAGE_MISSING", "r4")
    assert missing["path"].endswith("4.png")
    assert missing["field"] == "image[0]"
    assert str(path) in missing["reason"]


def test_ranks_whose_processes_have_the_same_number_write_one_quarantine(path, tmp_path, monkeypatch):
    """On several hosts, mostly in containers."""
    rewrite(path, lambda index, record: "null" if index == 3 else None)
    file = tmp_path / "quarantine.jsonl"

    def other_rank():
        make_set(path, quarantine_path=file, max_bad_share=0.1)

    just_before(monkeypatch, Path, "replace", other_rank, when=lambda part, _: part.name.startswith(file.name))
    make_set(path, quarantine_path=file, max_bad_share=0.1)
    assert len(quarantined(file)) == 1


def test_above_the_share_it_stops_and_says_why(path, tmp_path):
    rewrite(path, lambda index, record: "null" if index < 3 else None)
    file = tmp_path / "quarantine.jsonl"
    with pytest.raises(DataError, match=r"3 of 20 records \(15.0%\).*max_bad_share.*NOT_AN_OBJECT 3") as error:
        make_set(path, quarantine_path=file, max_bad_share=0.1)
    assert str(file) in str(error.value)
    assert len(quarantined(file)) == 3


def test_on_bad_error_stops_at_the_first(path):
    rewrite(path, lambda index, record: "[]" if index in (5, 7) else None)
    with pytest.raises(DataError, match=r"NOT_AN_OBJECT: .*:6 \(record 5\)"):
        make_set(path, on_bad="error", max_bad_share=1.0)


def test_nothing_usable_is_an_error(path):
    rewrite(path, lambda index, record: "{}")
    with pytest.raises(DataError, match="None of the 20 records"):
        make_set(path, max_bad_share=1.0)
    with pytest.raises(DataError, match=r"20 of 20 records .* Repair the data\.$"):
        make_set(path, max_bad_share=0.1)


def test_no_source_is_an_error():
    with pytest.raises(DataError, match=r"data\.train"):
        make_set()


def test_pictures_without_a_vision_encoder(path):
    data = make_set(path, vision=False, max_bad_share=1.0)
    assert data.quarantine.codes == {"NO_VISION": 15}
    assert data.usable == [3, 7, 11, 15, 19]


def test_long_records_lose_pairs_with_their_images(path):
    def lengthen(index, record):
        if index != 0:
            return None
        more = [{"from": "human", "value": "<image>\nand this? " + "x" * 80}, {"from": "gpt", "value": "no"}]
        return record | {"image": ["0.png", "1.png"], "conversations": record["conversations"] + more}

    rewrite(path, lengthen)
    whole, cut = make_set(path), make_set(path, max_length=100)
    assert whole.truncated == 0
    assert len(whole[0].pictures) == 2
    assert cut.truncated == 1
    assert cut[0].length <= 100
    assert len(cut[0].pictures) == 1
    assert (cut[0].input_ids == cut.encoder.image_token_id).sum() == 4


def test_a_record_whose_first_pair_does_not_fit_is_quarantined(path):
    def lengthen(index, record):
        return record | {"conversations": [{"from": "human", "value": "<image>\n" + "x " * 200},
                                           {"from": "gpt", "value": "no"}]} if index == 0 else None  # fmt: skip

    rewrite(path, lengthen)
    for too_long, share in (("refuse", 0.1), ("drop", 0.0)):  # what is dropped on purpose is not bad
        data = make_set(path, max_length=200, max_bad_share=share, too_long=too_long)
        assert data.quarantine.codes == {"TOO_LONG": 1}


def test_a_picture_damaged_inside_is_found_when_it_is_used(path, tmp_path):
    damage(path.parent / "images" / "4.png")
    file = tmp_path / "quarantine.jsonl"
    data = make_set(path, quarantine_path=file, max_bad_share=0.1)
    assert len(data.quarantine) == 0
    assert data[4] is None
    assert data[4] is None
    assert [line["code"] for line in quarantined(file)] == ["IMAGE_DAMAGED"]
    with pytest.raises(DataError, match="max_bad_share"):
        make_set(path, max_bad_share=0.0)[4]


def test_records_that_are_too_long_are_counted_by_a_sample_where_lengths_are_estimates(path, caplog):
    def lengthen(index, record):
        words = 300 if index < 5 else 1
        return {"id": record["id"], "conversations": [{"from": "human", "value": "what"},
                                                      {"from": "gpt", "value": "no " * words}]}  # fmt: skip

    rewrite(path, lengthen)
    with caplog.at_level(logging.INFO):
        cut, left = (make_set(path, exact_limit=5, max_length=64, too_long=how) for how in ("truncate", "drop"))
    assert (cut.estimated, cut.truncated, left.truncated) == (True, 5, 0)
    assert "5 records are cut off beyond 64 tokens, by a sample of 20" in caplog.text
    assert "5 records do not fit into 64 tokens, by a sample of 20" in caplog.text


def test_estimated_lengths_order_records_like_exact_ones(tmp_path):
    path = make_records(tmp_path, 40)

    def repeat(index, record):
        question = "<image>\n" * ("image" in record) + "what is it? " * (index + 1)
        return record | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]}

    rewrite(path, repeat)
    exact, estimated = make_set(path), make_set(path, exact_limit=10)
    assert estimated.estimated
    for index in range(40):
        assert estimated.lengths[index] == pytest.approx(exact.lengths[index], rel=0.5)
    order = sorted(range(40), key=lambda index: exact.lengths[index])
    rank = {record: place for place, record in enumerate(sorted(range(40), key=lambda i: estimated.lengths[i]))}
    assert max(abs(rank[record] - place) for place, record in enumerate(order)) <= 6


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
