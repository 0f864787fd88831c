"""Sources of every kind give the same records; limits, mixtures and caches choose and keep them as they say."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from tiny import make_records

from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.images import remote_files
from mm_moslora.data.images.record_picture import ImageError
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.data.sources.open_sources import RecordFile, open_source, open_sources
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.utils.errors import ConfigError, DataError
from mm_moslora.utils.network.http_fetch import FetchError, fetch
from tests.data.sets import chatml_encoder, colour_of, make_set, picture, tiny_tower


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
                        asked.append("all of it")
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

    def test_a_download_that_breaks_off_is_no_download(self, server) -> None:
        with pytest.raises(FetchError, match="breaks off after 48 bytes"):
            fetch(f"{server[0]}/cut.png", hosts=["127.0.0.1"], most=10**6, seconds=60)

    @pytest.mark.parametrize("name", ["cut.png", "cut-without-length.png"])
    def test_a_picture_that_breaks_off_is_not_kept(self, tmp_path: Path, server, name: str) -> None:
        address, asked = server
        record = self.record(tmp_path, f"{address}/{name}", ["127.0.0.1"])
        with pytest.raises(ImageError):
            record.images[0].rgb()
        assert colour_of(record) == (200, 30, 20)
        assert asked == [f"/{name}"] * 2

    def test_a_host_that_gives_byte_after_byte_is_given_up(self, tmp_path: Path, server, monkeypatch) -> None:
        address, asked = server
        monkeypatch.setattr(remote_files, "SECONDS", 0.4)
        record = self.record(tmp_path, f"{address}/slow.png", ["127.0.0.1"])
        with pytest.raises(ImageError, match=r"takes longer than 0.4 s"):
            record.images[0].rgb()
        assert asked == ["/slow.png"]

    def test_a_host_that_sends_too_much_is_given_up(self, tmp_path: Path, server, monkeypatch) -> None:
        monkeypatch.setattr(remote_files, "MAX_BYTES", 10)
        with pytest.raises(ImageError, match="sends too much"):
            self.record(tmp_path, f"{server[0]}/a.png", ["127.0.0.1"]).images[0].rgb()

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
    def test_held_out_records_are_a_fixed_random_choice_and_the_rest_trains(self, tmp_path: Path) -> None:
        path = make_records(tmp_path, 40)
        config = DataConfig(train=[SourceConfig(path=str(path), hold_out=8, weight=0.5, limit=30)])
        (held,) = config.held_out
        kept, out = ({record.id for record in open_source(source)} for source in (config.train[0], held))
        assert (len(kept), len(out), held.weight) == (22, 8, 1.0)
        assert kept | out == {record.id for record in open_source(SourceConfig(path=str(path), limit=30))}
        assert out == {record.id for record in open_source(config.held_out[0])}
        with pytest.raises(DataError, match="hold_out is 40 of 40 records, so that none is left"):
            open_source(SourceConfig(path=str(path), hold_out=40))
        with pytest.raises(ConfigError, match=r"data\.validation, 'x': hold_out is for data\.train"):
            DataConfig(validation=[SourceConfig(path="x", hold_out=1)])

    def test_a_source_that_holds_records_out_is_named_once(self, tmp_path: Path) -> None:
        path = make_records(tmp_path, 40)
        once, again = SourceConfig(path=str(path), hold_out=8), SourceConfig(path=str(tmp_path / "." / path.name))
        for twice in ([once, again], [again, once], [once, once]):
            with pytest.raises(DataError, match=r"hold_out: 8, but data\.train names it 2 times"):
                open_sources(twice)
        assert [len(file) for file in open_sources([again, again])] == [40, 40]
        assert len(open_sources(DataConfig(train=[once], validation=[again]).held_out)) == 2

    def test_a_limit_takes_the_first_or_a_fixed_random_choice(self, tmp_path: Path) -> None:
        path = make_records(tmp_path, 40)
        first = open_source(SourceConfig(path=str(path), limit=5, limit_by="first"))
        assert [record.id for record in first] == [f"r{n}" for n in range(5)]
        chosen = [[r.id for r in open_source(SourceConfig(path=str(path), limit=5))] for _ in range(2)]
        assert chosen[0] == chosen[1] != [f"r{n}" for n in range(5)]
        assert open_source(SourceConfig(path=str(path), limit=5))[4].where.row > 4
        assert len(open_source(SourceConfig(path=str(path), limit=100))) == 40


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("q.csv", b"image,question,answer\na.jpg,what?,cat\n", False),
        ("q.json", b'image\tquestion\n"a.jpg"\t"{what?}"\n', False),
        ("photos.zip", b"PK\x03\x04\x14\x00\x00\x00\x08\x00{}\n", False),
        ("late.jsonl", b'no record\n\n  {"question": "q", "answer": "a"}\n', True),
        ("marked.json", b'\xef\xbb\xbf [{"question": "q", "answer": "a"}]', True),
    ],
)
def test_a_file_of_another_kind_is_one_error(name: str, content: bytes, read: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with contextlib.nullcontext() if read else pytest.raises(DataError, match="A table such as CSV is not read"):
        assert len(RecordFile(tmp_path / name)) in (1, 2)


def test_parts_share_an_epoch(tmp_path: Path) -> None:
    from mm_moslora.data.batch_loader import BatchLoader
    from mm_moslora.data.epoch_order import MicroBatchLimit

    paths = [make_records(tmp_path / name, count) for name, count in (("a", 30), ("b", 10))]
    config = {"mixing": "parts", "epoch_records": 60, "order": "random"}
    data = make_set(*paths, weights=[1.0, 3.0], **config)
    limit = MicroBatchLimit(examples=4)
    loader = BatchLoader(data, rank=0, world_size=1, config=data.config, global_batch=4, limit=limit)
    seen = Counter(number >= 30 for step in loader.plan(0) for number in step)
    assert seen == {False: 15, True: 45}


def test_sources_of_all_kinds_train_together(tmp_path: Path) -> None:
    import datasets

    path = make_records(tmp_path, 6)
    rows = [{"question": "what?", "answer": "red", "image": {"bytes": picture(), "path": None}}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    sources = [
        SourceConfig(path=str(path), image_folder=str(tmp_path / "images")),
        SourceConfig(path=str(tmp_path / "d")),
    ]
    data = TrainingSet(sources, chatml_encoder(), tiny_tower(), config=DataConfig())
    assert len(data.usable) == 7
    (shown,) = data.load(6).pictures
    assert shown.tensors["pixel_values"].shape == (1, 3, 4, 4)
