"""Training data without an end: the windows of a stream, their steps, their place."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.batch_loader import BatchLoader
from mm_moslora.data.epoch_order import MicroBatchLimit
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.endless_sources import EndlessSource
from mm_moslora.data.sources.open_sources import beginning, open_source
from mm_moslora.data.sources.webdataset_tars import TarSource
from mm_moslora.data.training_stream import TrainingStream
from mm_moslora.utils.errors import ConfigError, DataError
from tests.data.sets import chat, chatml_encoder, picture, tiny_tower

BATCH = 4


def write(path: Path, numbers: range, *, prefix: str = "r") -> None:
    """Records without pictures, of different lengths."""
    lines = [{"id": f"{prefix}{n}", "messages": chat("why" + "?" * (n % 5), "a" * (1 + n % 3))} for n in numbers]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    for number in range(3):
        write(folder / f"{number}.jsonl", range(10 * number, 10 * number + 10))
    return folder


def stream_of(
    *paths: Path | SourceConfig, quarantine: Path | None = None, fresh: bool = True,     **data,
) -> TrainingStream:  # fmt: skip
    sources = [
        path if isinstance(path, SourceConfig) else SourceConfig(path=str(path), streaming=True) for path in paths
    ]
    config = DataConfig(train=sources, **{"shuffle_buffer": 8, "order": "random"} | data)
    return TrainingStream(
        sources, chatml_encoder(), tiny_tower(), config=config, seed=3, global_batch=BATCH, fresh=fresh,
        quarantine_path=quarantine,
    )  # fmt: skip


def loader_of(stream: TrainingStream, *, rank: int = 0, world: int = 1, start: int = 0) -> BatchLoader:
    limit = MicroBatchLimit(examples=BATCH // world)
    return BatchLoader(
        stream, rank=rank, world_size=world, config=stream.config, global_batch=BATCH, limit=limit, seed=3,
        start_step=start,
    )  # fmt: skip


def steps_of(loader: BatchLoader, count: int) -> list[list[str]]:
    """Ids of the records of the next steps."""
    with loader:
        batches = iter(loader)
        return [[name for batch in next(batches) for name in batch.ids] for _ in range(count)]


def test_every_record_once_in_a_pass_and_then_again(shards: Path) -> None:
    names = [name for step in steps_of(loader_of(stream_of(shards, shuffle_buffer=20)), 15) for name in step]
    assert Counter(names) == {f"r{number}": 2 for number in range(30)}
    assert names[:30] != names[30:]
    files = [int(name[1:]) // 10 for name in names]
    assert len(set(files[:20])) == 2, "a window of 20 comes from two files of 10"
    assert files[:10] != sorted(files[:10])


def test_ranks_share_the_steps_of_one(shards: Path) -> None:
    alone = steps_of(loader_of(stream_of(shards)), 9)
    ranks = [steps_of(loader_of(stream_of(shards), rank=rank, world=2), 9) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert len(parts[0]) == len(parts[1]) == BATCH // 2
        assert sorted(whole) == sorted(parts[0] + parts[1])


def write_tar(path: Path, texts: dict[str, bytes]) -> None:
    """Records of a caption and a picture, by name."""
    with tarfile.open(path, "w") as tar:
        for number, (name, text) in enumerate(texts.items()):
            for suffix, data in (("txt", text), ("png", picture((number, 0, 0)))):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def tables(folder: Path) -> None:
    """Two parquet files of 4 and 3 rows with pictures and classes."""
    import datasets

    rows = [
        {"id": f"r{n}", "query": f"what? {n}", "picture": {"bytes": picture((n, 0, 0)), "path": None}, "kind": n % 2}
        for n in range(7)
    ]
    table = datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image())
    table = table.cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))
    for part in range(2):
        table.select(range(4 * part, min(7, 4 * part + 4))).to_parquet(folder / f"{part}.parquet")


def sources_of(kind: str, folder: Path) -> list[SourceConfig]:
    """A stream of every kind of source, 7 to 10 records long."""
    if kind == "table":
        tables(folder)
        columns = {"question": "query", "answer": "kind", "image": "picture"}
        return [SourceConfig(path=str(folder / "*.parquet"), streaming=True, columns=columns)]
    if kind == "tar":
        for part in range(2):
            write_tar(folder / f"{part}.tar", {f"{part}{n}": b"red" for n in range(4)})
        return [SourceConfig(path=str(folder), streaming=True)]
    for part in range(3):
        write(folder / "shards" / f"{part}.jsonl", range(3 * part, 3 * part + 3))
    sources = [SourceConfig(path=str(folder / "shards"), streaming=True, weight=3)]
    if kind == "jsonl and replay":
        write(folder / "old.jsonl", range(5), prefix="old")
        sources.append(SourceConfig(path=str(folder / "old.jsonl")))
    return sources


@pytest.mark.parametrize("options", [{}, {"pack_tokens": 300, "max_length": 300}, {"order": "grouped", "workers": 2}])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl and replay", "tar", "table"])
def test_the_place_of_a_step_gives_the_steps_behind_it(tmp_path: Path, kind: str, options: dict[str, object]) -> None:
    sources = sources_of(kind, tmp_path)
    straight = stream_of(*sources, **options)
    expected, places = [], []
    with loader_of(straight) as loader:
        batches = iter(loader)
        for number in range(8):
            places.append(json.loads(json.dumps(straight.place(number))))
            expected.append([name for batch in next(batches) for name in batch.ids])
    for number in (0, 1, 5):
        again = stream_of(*sources, fresh=False, **options)
        again.go_to(places[number])
        assert steps_of(loader_of(again, start=number), 3) == expected[number : number + 3]


def test_packed_windows_have_steps_of_about_equal_size(shards: Path) -> None:
    stream = stream_of(shards, pack_tokens=64, max_length=64, shuffle_buffer=20)
    plan = loader_of(stream).plan_units(0)
    sizes = [len(step) for step in plan]
    assert sum(len(unit) for step in plan for unit in step) == 20
    assert max(sizes) <= BATCH
    assert max(sizes) - min(sizes) <= 1


def test_sources_are_mixed_by_weight_and_an_ending_one_is_replayed(shards: Path, tmp_path: Path) -> None:
    write(tmp_path / "old.jsonl", range(5), prefix="old")
    replay = SourceConfig(path=str(tmp_path / "old.jsonl"), weight=0.25)
    stream = SourceConfig(path=str(shards / "*.jsonl"), streaming=True, weight=0.75)
    steps = steps_of(loader_of(stream_of(stream, replay)), 20)
    old = [name for step in steps for name in step if name.startswith("old")]
    assert len(old) == 20
    assert Counter(old) == {f"old{number}": 4 for number in range(5)}
    assert old[:5] != old[5:10]


def test_bad_records_are_counted_once_and_replaced(shards: Path, tmp_path: Path) -> None:
    lines = (shards / "1.jsonl").read_text().splitlines()
    lines[3], lines[4] = "{broken", json.dumps({"id": "x", "messages": []})
    (shards / "1.jsonl").write_text("\n".join(lines))
    quarantine = tmp_path / "quarantine.jsonl"
    stream = stream_of(shards, quarantine=quarantine, order="sequential")
    steps = steps_of(loader_of(stream), 4)  # the second pass is not read ahead as far as the bad ones
    assert [len(step) for step in steps] == [BATCH] * 4
    assert stream.quarantine.codes["BAD_JSON"] == 1
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(row["code"], row["line"], row["record"]) for row in rows[:2]] == [("BAD_JSON", 4, 13), ("NO_TURNS", 5, 14)]
    again = stream_of(shards, quarantine=quarantine, order="sequential", fresh=False)
    again.go_to(stream.place(1))
    assert steps_of(loader_of(again, start=1), 3) == steps[1:]
    lines = quarantine.read_text().splitlines()
    assert len({json.loads(line)["record"] for line in lines}) == len(lines), "no line twice"


def test_a_stream_of_bad_records_ends(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n" * 50)
    stream = stream_of(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=r"11 of 1000 records \(1.1%\) cannot be used"):
        loader_of(stream)


def test_a_source_that_vanishes_is_named_with_its_place(shards: Path) -> None:
    stream = stream_of(shards, order="sequential")
    with loader_of(stream) as loader:
        batches = iter(loader)
        next(batches)
        (shards / "2.jsonl").unlink()
        with pytest.raises(DataError, match=r"data\.train\.0 .* broke off in pass 1 behind record \d\d: .*2\.jsonl"):
            deque(islice(batches, 9))


def grown(path: Path) -> None:
    write(path, range(11))


def same_size(path: Path) -> None:
    path.write_text(path.read_text().replace('"r', '"n'))
    os.utime(path, (1, 1))  # clocks of file systems are coarse


@pytest.mark.parametrize(("change", "what"), [(grown, "bytes instead of"), (same_size, "been written again")])
def test_a_file_that_changes_during_a_run_ends_it_and_comes_back(shards: Path, change: Callable, what: str) -> None:
    stream = stream_of(shards, order="sequential")
    before = (shards / "0.jsonl").read_text()
    names: list[str] = []
    with loader_of(stream) as loader:
        batches = iter(loader)
        names += [name for batch in next(batches) for name in batch.ids]
        change(shards / "0.jsonl")
        with pytest.raises(DataError, match=rf"broke off .*0\.jsonl has .*{what}.* since"):
            names.extend(name for step in batches for batch in step for name in batch.ids)
    assert {*names} <= {f"r{n}" for n in range(30)}
    assert not stream.quarantine.codes
    (shards / "0.jsonl").write_text(before)
    again = stream_of(shards, order="sequential", fresh=False)
    assert again.fingerprint == stream.fingerprint
    again.go_to(json.loads(json.dumps(stream.place(1))))


def test_a_tar_that_is_written_again_gives_no_bytes_of_other_places(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a": b"red"})
    record = TarSource(str(tmp_path / "0.tar"), PictureRules(folder=tmp_path))[0]
    write_tar(tmp_path / "0.tar", {"a": b"red" * 9000})
    with pytest.raises(DataError, match=r"0\.tar has .* bytes instead of"):
        record.images[0].rgb()


@pytest.mark.parametrize("nothing", ["\n\n", "[]"])
def test_an_empty_file_is_left_out_and_counted(shards: Path, nothing: str, caplog) -> None:
    for number in (1, 3):
        (shards / f"{number}.jsonl").write_text(nothing)
    stream = stream_of(shards, order="sequential")
    steps = steps_of(loader_of(stream), 10)
    names = [name for step in steps for name in step]
    assert Counter(names) == {f"r{n}": 2 for n in (*range(10), *range(20, 30))}
    assert caplog.text.count("1.jsonl is empty and left out") == caplog.text.count("is empty and left out") / 2 == 1
    assert stream.statistics()["empty_files"] == 2
    assert len(open_source(beginning(SourceConfig(path=str(shards), streaming=True), 100))) == 20
    for path in shards.glob("*"):
        path.write_text(nothing)
    with pytest.raises(DataError, match="is empty: 0 records"):
        stream_of(shards).at_hand  # noqa: B018
    with pytest.raises(DataError, match="is empty: 0 records"):
        open_source(beginning(SourceConfig(path=str(shards), streaming=True), 100))


def test_files_of_equal_names_are_told_apart(tmp_path: Path) -> None:
    for folder in "abc":
        write(tmp_path / folder / "0.jsonl", range(10))
    stream = stream_of(tmp_path / "*" / "0.jsonl")
    stored = json.loads(json.dumps(stream.place(0)))
    (tmp_path / "b" / "0.jsonl").unlink()
    write(tmp_path / "c" / "0.jsonl", range(9))
    fault = stream_of(tmp_path / "*" / "0.jsonl").what_changed(stored)
    assert "b/0.jsonl (1049 bytes before, absent now), c/0.jsonl (1049 bytes before, " in fault


def test_rows_of_tables_in_order_and_files_that_changed(tmp_path: Path) -> None:
    sources = sources_of("table", tmp_path)
    stream = stream_of(*sources, order="sequential", shuffle_buffer=16)
    records = [stream.at_hand.record(row) for row in range(16)]
    assert [record.id for record in records] == [f"r{n % 7}" for n in range(16)]
    assert [record.images[0].rgb().getpixel((0, 0))[0] for record in records] == [n % 7 for n in range(16)]
    assert [record.turns[1].text for record in records[:7]] == ["cat", "dog", "cat", "dog", "cat", "dog", "cat"]
    (tmp_path / "0.parquet").rename(tmp_path / "2.parquet")
    later = stream_of(*sources, order="sequential", fresh=False)
    assert later.fingerprint != stream.fingerprint
    assert "0.parquet (2840 bytes before, absent now), 2.parquet (absent before, " in later.what_changed(
        json.loads(json.dumps(stream.place(0)))
    )
    source = stream.sources[0]
    source.seek(stream.place(0)["sources"][0])
    with pytest.raises(DataError, match=r"broke off .*0\.parquet"):
        source.take()


def test_a_row_may_not_name_a_file_elsewhere(tmp_path: Path) -> None:
    import datasets

    rows = [{"image": {"bytes": None, "path": "/etc/passwd"}, "question": "q", "answer": "a"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    with pytest.raises(RecordError, match="PATH_ESCAPES"):
        EndlessSource(
            SourceConfig(path=str(tmp_path / "d"), streaming=True), "data.train.0", seed=0, shuffled=True
        ).take()


def test_what_a_stream_cannot_do_is_refused(shards: Path) -> None:
    endless = SourceConfig(path=str(shards), streaming=True)
    for options, words in (
        ({"cache": "x"}, "data.cache is 'x'"), ({"mixing": "parts", "epoch_records": 3}, "data.epoch_records is 3"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer is 0"), ({"validation": [endless]}, "a validation has an end"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            DataConfig(train=[endless], **options)
    with pytest.raises(ConfigError, match="hold_out is 2"):
        SourceConfig(path="x", streaming=True, hold_out=2)
    with pytest.raises(DataError, match="does not exist"):
        stream_of(shards / "none-*.jsonl")
