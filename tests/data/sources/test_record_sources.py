"""Sources of every kind give the same records; limits, mixtures and caches choose and keep them as they say."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import itertools
import json
import multiprocessing
import os
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import fake_hub, run_beside
from PIL import Image
from tiny import make_records

from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data import token_cache
from mm_moslora.data.images import remote_files
from mm_moslora.data.images.record_picture import ImageError
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.data.sources import hf_tables
from mm_moslora.data.sources.open_sources import RecordFile, open_source
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.data.worker_processes import in_processes
from mm_moslora.utils import files
from mm_moslora.utils.errors import ConfigError, DataError
from mm_moslora.utils.file_locks import held
from tests.data.sets import chatml_encoder, make_set, tiny_eyes


def picture(colour: tuple[int, int, int] = (200, 30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def colour_of(record, number: int = 0) -> tuple[int, ...]:
    return record.images[number].rgb().getpixel((0, 0))


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def picture_folder(kind: str) -> dict[str, bytes]:
    """Files of a cat and a dog, as `imagefolder` has them: with a table beside them, or in a folder per class."""
    if kind == "classes":
        return {"train/cat/a.png": picture((1, 0, 0)), "train/dog/b.png": picture((2, 0, 0))}
    table = b"file_name,text\na.png,cat\nb.png,dog\n"
    return {"a.png": picture((1, 0, 0)), "b.png": picture((2, 0, 0)), "metadata.csv": table}


FROM_THE_HUB = """
import json
from mm_moslora.config import SourceConfig
from mm_moslora.data.sources.open_sources import open_source

for options in ({}, {"streaming": True, "limit": 2, "limit_by": "first"}):
    for name, column in (("metadata", "text"), ("classes", "label")):
        source = open_source(SourceConfig(path=f"hf:me/{name}", columns={"caption": column}, **options))
        for row in range(2):
            colour = source[row].images[0].rgb().getpixel((0, 0))
            print(json.dumps([len(source), source[row].turns[1].text, colour]))
"""


class TestTables:
    @pytest.fixture
    def table(self):
        import datasets

        rows = [
            {
                "id": f"r{n}", "messages": chat("<image>\nwhat?", f"a{n}"),
                "image": {"bytes": picture((n, 0, 0)), "path": None},
            }
            for n in range(6)
        ]  # fmt: skip
        return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())

    @pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "saved", "saved splits", "streamed"])
    def test_every_way_gives_the_same_records(self, tmp_path: Path, monkeypatch, table, kind: str) -> None:
        import datasets

        monkeypatch.setenv("MM_MOSLORA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        options = {}
        path = tmp_path / "d"
        if kind in ("parquet", "streamed"):
            path = tmp_path / "d.parquet"
            table.to_parquet(path)
        elif kind == "folder of parquet":
            path.mkdir()
            table.to_parquet(path / "0.parquet")
        elif kind == "saved":
            table.save_to_disk(path)
        else:
            datasets.DatasetDict({"test": table}).save_to_disk(path)
            options["split"] = "test"
        if kind == "streamed":
            options |= {"streaming": True, "limit": 4, "limit_by": "first"}
        source = open_source(SourceConfig(path=str(path), **options))
        assert len(source) == (4 if kind == "streamed" else 6)
        assert [source[n].id for n in range(len(source))] == [f"r{n}" for n in range(len(source))]
        assert [turn.text for turn in source[3].turns] == ["<image>\nwhat?", "a3"]
        assert colour_of(source[3]) == (3, 0, 0)
        if kind == "streamed":  # kept: nothing is read from the stream again
            monkeypatch.setattr(datasets, "load_dataset", None)
            assert len(open_source(SourceConfig(path=str(path), **options))) == 4

    def test_content_parts_and_lists_of_images(self, tmp_path: Path) -> None:
        import datasets

        parts = [{"type": "image", "text": None}, {"type": "image", "text": None}, {"type": "text", "text": "differ?"}]
        rows = [{
            "images": [{"bytes": picture((5, 0, 0)), "path": None}, {"bytes": picture((7, 0, 0)), "path": None}],
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
            ],
        }]  # fmt: skip
        table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
        table.save_to_disk(tmp_path / "d")
        record = open_source(SourceConfig(path=str(tmp_path / "d")))[0]
        assert record.turns[0].images == 2
        assert [colour_of(record, n) for n in (0, 1)] == [(5, 0, 0), (7, 0, 0)]

    def test_columns_are_renamed_and_pictures_come_first(self, tmp_path: Path) -> None:
        import datasets

        rows = [{"query": "a <image> tag?", "label": "yes", "photo": {"bytes": picture(), "path": None}}]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
        columns = {"question": "query", "answer": "label", "image": "photo"}
        record = open_source(SourceConfig(path=str(tmp_path / "d"), columns=columns))[0]
        assert record.turns[0].parts() == ["", "\na <image> tag?"]
        with pytest.raises(DataError, match="columns are query, label, photo"):
            open_source(SourceConfig(path=str(tmp_path / "d"), columns={"question": "quary"}))

    def test_a_path_in_a_table_may_not_leave_the_folder(self, tmp_path: Path) -> None:
        import datasets

        rows = [{"image": {"bytes": None, "path": "/etc/passwd"}, "question": "q", "answer": "a"}]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
        with pytest.raises(RecordError) as caught:
            open_source(SourceConfig(path=str(tmp_path / "d")))[0]
        assert caught.value.code == Code.PATH_ESCAPES

    @pytest.mark.parametrize("streamed", [False, True])
    def test_a_picture_column_may_not_name_a_file_elsewhere(self, tmp_path: Path, monkeypatch, streamed) -> None:
        import datasets
        import pyarrow.parquet

        monkeypatch.setenv("MM_MOSLORA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        (tmp_path / "private.png").write_bytes(picture())
        (tmp_path / "d").mkdir()
        row = {"image": {"bytes": None, "path": str(tmp_path / "private.png")}, "question": "q", "answer": "a"}
        table = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image(decode=False))
        pyarrow.parquet.write_table(table.data.table, tmp_path / "d" / "0.parquet")
        options = {"streaming": True, "limit": 1, "limit_by": "first"} if streamed else {}
        source = open_source(SourceConfig(path=str(tmp_path / "d" / "0.parquet"), **options))
        with pytest.raises(RecordError) as caught:
            source[0]
        assert caught.value.code == Code.PATH_ESCAPES

    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize("kind", ["metadata", "classes"])
    def test_folders_of_pictures(self, tmp_path: Path, monkeypatch, kind: str, streamed) -> None:
        import datasets

        monkeypatch.setenv("MM_MOSLORA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        for name, data in picture_folder(kind).items():
            (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / name).write_bytes(data)
        options = {"streaming": True, "limit": 2, "limit_by": "first"} if streamed else {}
        columns = {"caption": "label" if kind == "classes" else "text"}
        source = open_source(SourceConfig(path=str(tmp_path / "d"), columns=columns, **options))
        assert [source[n].turns[1].text for n in range(2)] == ["cat", "dog"]
        assert [colour_of(source[n]) for n in range(2)] == [(1, 0, 0), (2, 0, 0)]
        with pytest.raises(RecordError, match=r"the record has 'image', '(label|text)'; write"):
            open_source(SourceConfig(path=str(tmp_path / "d"), **options))[0]

    def test_folders_of_pictures_on_the_hub(self, tmp_path: Path) -> None:
        """The real client, in a process whose hub is this machine."""
        with fake_hub() as hub:
            hub.files = {("datasets", f"me/{kind}"): picture_folder(kind) for kind in ("metadata", "classes")}
            done = run_beside(hub, tmp_path, FROM_THE_HUB)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [(2, "cat", [1, 0, 0]), (2, "dog", [2, 0, 0])]
        assert [tuple(json.loads(line)) for line in done.stdout.splitlines()] == lines * 4

    @pytest.mark.parametrize("where", ["table", "split"])
    def test_a_saved_set_names_no_table_elsewhere(self, tmp_path: Path, where: str) -> None:
        import datasets

        table = datasets.Dataset.from_list([{"question": "q", "answer": "secret"}])
        table.save_to_disk(tmp_path / "private")
        datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "d")
        if where == "split":
            (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["../private"]}')
        else:
            state = tmp_path / "d" / "train" / "state.json"
            name = "../../private/data-00000-of-00001.arrow"
            state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match="leaves"):
            open_source(SourceConfig(path=str(tmp_path / "d")))

    def test_what_does_not_load_says_so(self, tmp_path: Path) -> None:
        import datasets

        table = datasets.Dataset.from_list([{"question": "q", "answer": "a"}])
        datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "d")
        with pytest.raises(DataError, match="no split 'train', only test"):
            open_source(SourceConfig(path=str(tmp_path / "d")))
        with pytest.raises(DataError, match="No file matches"):
            open_source(SourceConfig(path=str(tmp_path / "*.parquet")))
        with pytest.raises(ConfigError, match="streaming is set, so set limit"):
            SourceConfig(path="hf:x", streaming=True)

    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize(
        "path",
        [
            "reference://p.png::hf://datasets/evil/set@main/r.json", "zip://a.png::hf://datasets/evil/set@main/a.zip",
            "hf://datasets/other/set@main/a.png", "HF://datasets/evil/set@main/a.png", "file:///etc/passwd",
            "/dev/zero",
        ],
    )  # fmt: skip
    def test_a_cell_of_a_hub_set_opens_no_other_protocol(self, tmp_path: Path, monkeypatch, path, streamed) -> None:
        """fsspec reads any local file through such a chain."""
        import datasets
        import fsspec

        opened: list[str] = []
        monkeypatch.setattr(fsspec, "open", lambda path, *_, **__: opened.append(path) or io.BytesIO(picture()))
        monkeypatch.setattr("huggingface_hub.HfFileSystem.open", lambda _, path, *__, **___: opened.append(path))
        monkeypatch.setenv("MM_MOSLORA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        row = {"image": {"bytes": None, "path": path}, "question": "q", "answer": "a"}
        table = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image(decode=False))
        loaded = table.cast_column("image", datasets.Image())
        monkeypatch.setattr(hf_tables, "load_checked", lambda **_: loaded.to_iterable_dataset() if streamed else loaded)
        options = {"streaming": True, "limit": 1, "limit_by": "first"} if streamed else {}
        with pytest.raises(RecordError) as caught:
            open_source(SourceConfig(path="hf:evil/set", **options))[0]
        assert caught.value.code in (Code.BAD_IMAGE_NAME, Code.PATH_ESCAPES)
        assert opened == []

    def test_pictures_deep_inside_a_column_are_not_opened_by_the_library(self, tmp_path: Path, monkeypatch) -> None:
        import datasets

        monkeypatch.setenv("MM_MOSLORA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        (tmp_path / "private.png").write_bytes(picture())
        inside = {"bytes": None, "path": str(tmp_path / "private.png")}
        row = {"question": "q", "answer": "a", "more": [{"deep": {"photo": inside}}], "sound": inside}
        table = datasets.Dataset.from_list([row])
        kinds = {"more": datasets.List({"deep": {"photo": datasets.Image()}}), "sound": datasets.Image()}
        for name, kind in kinds.items():
            table = table.cast_column(name, kind)
        shown = next(iter(hf_tables.undecoded(table.to_iterable_dataset())))
        assert (shown["more"][0]["deep"]["photo"], shown["sound"]) == (inside, inside)

    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize("named", ["{folder}/private.jsonl", "../private.jsonl", "link.jsonl"])
    def test_the_readme_of_a_data_set_names_no_file_elsewhere(
        self, tmp_path: Path, monkeypatch, named, streamed
    ) -> None:
        import datasets

        monkeypatch.setenv("MM_MOSLORA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        (tmp_path / "private.jsonl").write_text(json.dumps({"question": "q", "answer": "secret"}) + "\n")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "link.jsonl").symlink_to(tmp_path / "private.jsonl")
        config = f"configs:\n- config_name: default\n  data_files: {named.format(folder=tmp_path)}"
        (tmp_path / "d" / "README.md").write_text(f"---\n{config}\n---\n")
        options = {"streaming": True, "limit": 1, "limit_by": "first"} if streamed else {}
        with pytest.raises(DataError, match=r"not one of its own files|does not load"):
            open_source(SourceConfig(path=str(tmp_path / "d"), **options))


class TestTarFiles:
    def write(self, path: Path, *members: tuple[str, bytes], mode: str = "w", kind: bytes = tarfile.REGTYPE) -> Path:
        with tarfile.open(path, mode) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size, info.type = (len(data), kind) if kind == tarfile.REGTYPE else (0, kind)
                tar.addfile(info, io.BytesIO(data))
        return path

    def test_members_with_one_key_are_one_record(self, tmp_path: Path) -> None:
        record = {"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]}
        self.write(tmp_path / "s-00.tar", ("a/1.jpg", picture((1, 0, 0))), ("a/1.json", json.dumps(record).encode()))
        self.write(
            tmp_path / "s-01.tar", ("b/1.png", picture((2, 0, 0))), ("b/1.txt", b" a red card \n"), ("c.cls", b"3")
        )
        source = open_source(SourceConfig(path=str(tmp_path / "s-{00..01}.tar"), format="webdataset"))
        assert len(source) == len(open_source(SourceConfig(path=str(tmp_path / "*.tar")))) == 3
        assert [source[n].id for n in (0, 1)] == ["a/1", "b/1"]
        assert source[1].turns[1].text == "a red card"
        assert [colour_of(source[n]) for n in (0, 1)] == [(1, 0, 0), (2, 0, 0)]
        with pytest.raises(RecordError, match="members cls, but neither json nor txt"):
            source[2]

    def test_a_json_member_names_members_of_its_record(self, tmp_path: Path) -> None:
        record = {"images": ["1.b.png", "1.a.png"], "question": "which?", "answer": "left"}
        self.write(
            tmp_path / "s.tar", ("x/1.a.png", picture((1, 0, 0))), ("x/1.b.png", picture((2, 0, 0))),
            ("x/1.json", json.dumps(record).encode()),
        )  # fmt: skip
        (row,) = list(open_source(SourceConfig(path=str(tmp_path / "s.tar"))))
        assert [colour_of(row, n) for n in (0, 1)] == [(2, 0, 0), (1, 0, 0)]

    @pytest.mark.parametrize(
        ("members", "options", "text"),
        [
            ([("../x.txt", b"a")], {}, "leaves the archive"),
            ([("/x.txt", b"a")], {}, "leaves the archive"),
            ([("x.txt", b"")], {"kind": tarfile.SYMTYPE}, "link or a device"),
            ([("x.txt", b"")], {"kind": tarfile.CHRTYPE}, "link or a device"),
            ([("x.txt", b"a")], {"mode": "w:gz"}, "unpack it to .tar first"),
            ([], {}, "0 records"),
        ],
    )
    def test_an_archive_that_plays_tricks_is_refused(self, tmp_path: Path, members, options, text) -> None:
        path = self.write(tmp_path / "s.tar", *members, **options)
        with pytest.raises(DataError, match=text):
            open_source(SourceConfig(path=str(path)))

    def test_a_cut_file_is_refused(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "s.tar", ("1.txt", b"a" * 3000))
        path.write_bytes(path.read_bytes()[:1500])
        with pytest.raises(DataError, match=r"breaks off|cannot be read"):
            open_source(SourceConfig(path=str(path)))


class TestForms:
    def read(self, tmp_path: Path, row: dict[str, object]):
        (tmp_path / "d.jsonl").write_text(json.dumps(row))
        return RecordFile(tmp_path / "d.jsonl")[0]

    def test_openai_parts_with_data_urls(self, tmp_path: Path) -> None:
        url = "data:image/png;base64," + base64.b64encode(picture()).decode()
        parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
        row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a card"}]}
        record = self.read(tmp_path, row)
        assert colour_of(record) == (200, 30, 20)
        assert record.turns[0].images == 1

    def test_sharegpt_system_and_pairs(self, tmp_path: Path) -> None:
        row = {"system": "Be brief.", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
        assert [turn.role for turn in self.read(tmp_path, row).turns] == ["system", "user", "assistant"]
        row = {"texts": [{"user": "a <image>?", "assistant": "b"}, {"user": "c", "assistant": "d"}]}
        record = self.read(tmp_path, row)
        assert [turn.text for turn in record.turns] == ["a <image>?", "b", "c", "d"]
        assert record.turns[0].images == 0

    def test_a_caption_is_asked_for_by_its_picture_alone(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(picture())
        record = self.read(tmp_path, {"image": "a.png", "caption": "a card"})
        assert [turn.text for turn in record.turns] == ["<image>", "a card"]


class TestRemotePictures:
    @pytest.fixture
    def server(self, tmp_path: Path, monkeypatch):
        monkeypatch.setenv("MM_MOSLORA_CACHE", str(tmp_path / "cache"))
        asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                away = self.path == "/away.png"
                self.send_response(302 if away else 200)
                if away:
                    self.send_header("Location", "http://localhost:1/x.png")
                if self.path == "/cut.png":  # and the connection ends before the file does
                    self.send_header("Content-Length", str(len(picture())))
                self.end_headers()
                if self.path == "/slow.png":
                    with contextlib.suppress(OSError):
                        for byte in picture():
                            self.wfile.write(bytes([byte]))
                            time.sleep(0.05)
                    return
                part = self.path in ("/cut.png", "/cut-without-length.png") and len(asked) == 1
                self.wfile.write(b"" if away else picture()[:48] if part else picture())

            def log_message(self, *_: object) -> None:
                pass

        served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}", asked
        served.shutdown()
        served.server_close()

    def record(self, tmp_path: Path, url: str, hosts: list[str]):
        (tmp_path / "d.jsonl").write_text(json.dumps({"image": url, "question": "q", "answer": "a"}))
        return open_source(SourceConfig(path=str(tmp_path / "d.jsonl"), image_hosts=hosts))[0]

    def test_an_allowed_host_is_asked_once(self, tmp_path: Path, server) -> None:
        address, asked = server
        record = self.record(tmp_path, f"{address}/a.png", ["127.0.0.1"])
        assert asked == []
        assert [colour_of(record), colour_of(record)] == [(200, 30, 20)] * 2
        assert asked == ["/a.png"]

    @pytest.mark.parametrize("name", ["cut.png", "cut-without-length.png"])
    def test_a_picture_that_breaks_off_is_not_kept(self, tmp_path: Path, server, name: str) -> None:
        address, asked = server
        record = self.record(tmp_path, f"{address}/{name}", ["127.0.0.1"])
        with pytest.raises(ImageError):
            record.images[0].rgb()
        assert colour_of(record) == (200, 30, 20)
        assert asked == [f"/{name}"] * 2

    def test_a_host_that_gives_byte_after_byte_is_given_up(self, tmp_path: Path, server, monkeypatch) -> None:
        address, _ = server
        monkeypatch.setattr(remote_files, "SECONDS", 0.4)
        record = self.record(tmp_path, f"{address}/slow.png", ["127.0.0.1"])
        begun = time.monotonic()
        with pytest.raises(ImageError, match=r"takes longer than 0.4 s"):
            record.images[0].rgb()
        assert time.monotonic() - begun < 3

    @pytest.mark.parametrize("hosts", [[], ["example.org"]])
    def test_no_other_host_is_asked(self, tmp_path: Path, server, hosts) -> None:
        address, asked = server
        with pytest.raises(RecordError) as caught:
            self.record(tmp_path, f"{address}/a.png", hosts)
        assert caught.value.code == Code.BAD_IMAGE_NAME
        assert asked == []

    def test_a_redirect_may_not_leave_the_hosts(self, tmp_path: Path, server) -> None:
        address, _ = server
        with pytest.raises(ImageError, match="image_hosts does not allow"):
            colour_of(self.record(tmp_path, f"{address}/away.png", ["127.0.0.1"]))


class TestLimits:
    def test_a_limit_takes_the_first_or_a_fixed_random_choice(self, tmp_path: Path) -> None:
        path = make_records(tmp_path, 40)
        first = open_source(SourceConfig(path=str(path), limit=5, limit_by="first"))
        assert [record.id for record in first] == [f"r{n}" for n in range(5)]
        chosen = [[r.id for r in open_source(SourceConfig(path=str(path), limit=5))] for _ in range(2)]
        assert chosen[0] == chosen[1] != [f"r{n}" for n in range(5)]
        assert open_source(SourceConfig(path=str(path), limit=5))[4].where.row > 4
        assert len(open_source(SourceConfig(path=str(path), limit=100))) == 40


def test_parts_share_an_epoch(tmp_path: Path) -> None:
    from mm_moslora.data.batch_loader import BatchLoader

    paths = [make_records(tmp_path / name, count) for name, count in (("a", 30), ("b", 10))]
    config = {"mixing": "parts", "epoch_records": 60, "order": "random"}
    data = make_set(*paths, weights=[1.0, 3.0], **config)
    loader = BatchLoader(data, rank=0, world_size=1, config=data.config, global_batch=4, micro_batch=4)
    seen = Counter(number >= 30 for step in loader.plan(0) for number in step)
    assert seen == {False: 15, True: 45}


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class TestTokenCache:
    def sets(self, path: Path, cache: Path, **options):
        plain = make_set(path, **options)
        return plain, make_set(path, cache=str(cache), **options)

    def test_it_gives_the_same_examples_and_the_same_faults(self, tmp_path: Path) -> None:
        path = make_records(tmp_path, 20)
        with path.open("a") as stream:
            stream.write('{"id": "bad"}\n{"id": NaN}\n')
        plain, cached = self.sets(path, tmp_path / "cache", max_bad_share=0.5)
        assert list(plain.lengths) == list(cached.lengths)
        assert plain.members == cached.members
        assert plain.has_image == cached.has_image
        assert plain.quarantine.codes == cached.quarantine.codes
        for number in plain.usable:
            one, other = plain.load(number), cached.load(number)
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.supervised, other.supervised)
            assert (one.pixel_values is None) == (other.pixel_values is None)
        with pytest.raises(RecordError, match=r"train.jsonl:21 \(record 20, id='bad'\)"):
            cached.load(20)

    def test_a_second_run_tokenises_nothing(self, tmp_path: Path, monkeypatch) -> None:
        path = make_records(tmp_path, 12)
        first = make_set(path, cache=str(tmp_path / "cache"))
        monkeypatch.setattr(type(first.encoder), "encode", None)
        again = make_set(path, cache=str(tmp_path / "cache"))
        assert list(again.lengths) == list(first.lengths)
        assert again.load(3) is not None

    def test_other_content_or_another_limit_makes_another_cache(self, tmp_path: Path) -> None:
        path, cache = make_records(tmp_path, 12), tmp_path / "cache"
        make_set(path, cache=str(cache))
        make_set(path, cache=str(cache), max_length=64)
        path.write_text(path.read_text().replace("color", "colour"))
        make_set(path, cache=str(cache))
        assert len([item for item in cache.iterdir() if item.is_dir()]) == 3

    def test_what_pictures_may_be_decides_which_records_are_faulty_so_other_rules_make_another_cache(
        self, tmp_path: Path
    ) -> None:
        path, cache = make_records(tmp_path, 12, text_only_every=0), tmp_path / "cache"
        path.write_text(path.read_text().replace('"image": "0.png"', '"image": "https://pictures.example/0.png"'))

        def usable(**rules: Any) -> int:
            source = SourceConfig(path=str(path), image_folder=str(tmp_path / "images"), **rules)
            config = DataConfig(cache=str(cache), max_bad_share=0.5)
            return len(TrainingSet([source], chatml_encoder(), tiny_eyes(), config=config).usable)

        assert usable() == 11
        assert usable(image_hosts=["pictures.example"]) == 12
        assert usable() == 11
        assert len([item for item in cache.iterdir() if item.is_dir()]) == 2

    def test_what_a_killed_process_left_is_no_cache(self, tmp_path: Path) -> None:
        path, cache = make_records(tmp_path, 12), tmp_path / "cache"
        make_set(path, cache=str(cache))
        (folder,) = [item for item in cache.iterdir() if item.is_dir()]
        folder.rename(folder.with_name(folder.name + ".part"))
        (folder.with_name(folder.name + ".part") / "table.npy").write_bytes(b"half")
        assert len(make_set(path, cache=str(cache)).usable) == 12

    def test_a_folder_that_holds_nothing_but_the_mark_is_no_cache(self, tmp_path: Path) -> None:
        path, cache = make_records(tmp_path, 12), tmp_path / "cache"
        first = make_set(path, cache=str(cache))
        (folder,) = [item for item in cache.iterdir() if item.is_dir()]
        for item in folder.iterdir():
            item.unlink()
        files.mark(folder, "temporary")
        assert list(make_set(path, cache=str(cache)).lengths) == list(first.lengths)

    @pytest.mark.parametrize("hidden", [2, 3])
    def test_a_host_that_does_not_see_yet_that_another_was_first_uses_what_is_there(
        self, hidden: int, tmp_path: Path, monkeypatch
    ) -> None:
        """As on a network file system that remembers for some seconds what was not there."""
        path, cache = make_records(tmp_path, 12), tmp_path / "cache"
        first = make_set(path, cache=str(cache))
        (folder,) = [item for item in cache.iterdir() if item.is_dir()]
        looks = itertools.count()
        iterdir = Path.iterdir

        def seen(self: Path) -> Iterator[Path]:
            if self == folder and next(looks) < hidden:
                raise FileNotFoundError(self)
            return iterdir(self)

        monkeypatch.setattr(Path, "iterdir", seen)
        assert list(make_set(path, cache=str(cache)).lengths) == list(first.lengths)
        assert next(looks) > hidden
        assert not list(cache.glob("*.part"))

    def test_a_build_that_is_killed_leaves_no_process_and_no_lock(self, tmp_path: Path) -> None:
        """As when memory runs out: whoever came next would wait for ever."""

        def work(number: int) -> int:
            (tmp_path / f"{os.getpid()}.pid").touch()
            time.sleep(0.01)
            return number

        def build() -> None:
            with held(tmp_path / "cache.lock", wait=True):
                for _ in in_processes(work, range(10**6), processes=2):
                    pass

        process = multiprocessing.get_context("fork").Process(target=build)
        process.start()
        wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        process.kill()
        process.join()
        with held(tmp_path / "cache.lock", wait=False):
            pass
        wait_until(lambda: not any(alive(int(path.stem)) for path in tmp_path.glob("*.pid")))

    @pytest.mark.slow
    def test_processes_that_come_together_build_it_once(self, tmp_path: Path, monkeypatch) -> None:
        path = make_records(tmp_path, 60)
        counter = tmp_path / "built"
        build = token_cache._build

        def counted(*arguments) -> None:
            with counter.open("a") as stream:
                stream.write("x")
            build(*arguments)

        monkeypatch.setattr(token_cache, "_build", counted)
        monkeypatch.setattr(token_cache, "_ROWS", 8)  # several processes tokenise
        context = multiprocessing.get_context("fork")
        results = context.Queue()

        def work() -> None:
            results.put(list(make_set(path, cache=str(tmp_path / "cache")).lengths))

        processes = [context.Process(target=work) for _ in range(3)]
        for process in processes:
            process.start()
        lengths = [results.get(timeout=180) for _ in processes]
        for process in processes:
            process.join()
        assert counter.read_text() == "x"
        assert lengths[0] == lengths[1] == lengths[2] == list(make_set(path).lengths)


def test_sources_of_all_kinds_train_together(tmp_path: Path) -> None:
    import datasets

    path = make_records(tmp_path, 6)
    rows = [{"question": "what?", "answer": "red", "image": {"bytes": picture(), "path": None}}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    sources = [
        SourceConfig(path=str(path), image_folder=str(tmp_path / "images")),
        SourceConfig(path=str(tmp_path / "d")),
    ]
    data = TrainingSet(sources, chatml_encoder(), tiny_eyes(), config=DataConfig())
    assert len(data.usable) == 7
    assert data.load(6).pixel_values.shape == (1, 3, 4, 4)
