"""Hugging Face tables: files, folders of pictures, the hub, streams."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from fake_hub import fake_hub, run_beside
from mm_moslora_eval.sources import hf_dataset
from mm_moslora_eval.sources.source import Source

from mm_moslora.config import SourceConfig
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.data.sources import hf_tables
from mm_moslora.data.sources.endless_sources import EndlessSource
from mm_moslora.data.sources.open_sources import open_source
from mm_moslora.utils.errors import ConfigError, DataError, MoSLoRAError
from tests.data.sets import chat, colour_of, picture


def picture_folder(kind: str) -> dict[str, bytes]:
    """Files of a cat and a dog, as `imagefolder` has them: with a table beside them, or in a folder per class."""
    if kind == "classes":
        return {"train/cat/a.png": picture((1, 0, 0)), "train/dog/b.png": picture((2, 0, 0))}
    table = b"file_name,text\na.png,cat\nb.png,dog\n"
    return {"a.png": picture((1, 0, 0)), "b.png": picture((2, 0, 0)), "metadata.csv": table}


FROM_THE_HUB = """
import json
from mm_moslora.config import SourceConfig
from mm_moslora.data.sources.endless_sources import EndlessSource
from mm_moslora.data.sources.open_sources import open_source

for options in ({}, {"streaming": True, "limit": 2, "limit_by": "first"}):
    for name, column in (("metadata", "text"), ("classes", "label")):
        source = open_source(SourceConfig(path=f"hf:me/{name}", columns={"caption": column}, **options))
        for row in range(2):
            colour = source[row].images[0].rgb().getpixel((0, 0))
            print(json.dumps([len(source), source[row].turns[1].text, colour]))

classes = SourceConfig(path="hf:me/classes", columns={"caption": "label"}, streaming=True)
endless = EndlessSource(classes, "data.train.0", seed=0, shuffled=True)
for _ in range(4):
    record = endless.take()
    print(json.dumps([2, record.turns[1].text, record.images[0].rgb().getpixel((0, 0))]))
"""

WAYS: dict[str, Callable[[str], object]] = {
    "training": lambda path: open_source(SourceConfig(path=path)),
    "streamed": lambda path: open_source(SourceConfig(path=path, streaming=True, limit=1, limit_by="first")),
    "harness": lambda path: hf_dataset.load(Source(kind="hf", path=path, split="train")),
}


class TestTables:
    @pytest.fixture(autouse=True)
    def caches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MM_MOSLORA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    @pytest.fixture
    def table(self):
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

    @pytest.mark.parametrize("options", [{}, {"streaming": True, "limit": 1, "limit_by": "first"}])
    def test_a_folder_whose_readme_lists_files_is_known_by_them(self, tmp_path: Path, monkeypatch, options) -> None:
        """Not by its name and README, by which `datasets` stores its rows."""
        readme = "---\nconfigs:\n- config_name: a\n  data_files: '*.csv'\n  sep: ';'\n---\n"
        fingerprints = []
        for place, answer in (("p", "first"), ("p", "changed"), ("q", "first")):
            folder = tmp_path / place / "folder"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "README.md").write_text(readme)
            (folder / "some[1].csv").write_text(f"question;answer\nq;{answer}\n")
            source = open_source(SourceConfig(path=str(folder), **options))
            assert source[0].turns[1].text == answer
            fingerprints.append(source.fingerprint())
        assert fingerprints[0] != fingerprints[1]

    def test_a_folder_whose_readme_declares_columns_is_read_so(self, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "README.md").write_text(
            "---\ndataset_info:\n  features:\n  - name: question\n    dtype: string\n  - name: answer\n    dtype:\n"
            "      class_label:\n        names:\n          '0': no\n          '1': 'yes'\n---\n"
        )
        (tmp_path / "d" / "some [1].csv").write_text("question,answer\n7,1\n")
        record = open_source(SourceConfig(path=str(tmp_path / "d")))[0]
        assert [turn.text for turn in record.turns] == ["7", "yes"]

    def test_content_parts_and_lists_of_images(self, tmp_path: Path) -> None:
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

    @pytest.mark.parametrize("streamed", [False, True])
    def test_contents_of_several_types_are_read_as_they_were_written(
        self, tmp_path: Path, monkeypatch, streamed
    ) -> None:
        """`datasets` stores them as the text of JSON."""
        parts = [{"type": "text", "text": "yes"}]
        turns = [[{"role": "user", "content": "why?"}, {"role": "assistant", "content": parts}], chat("why?", "yes")]
        lines = [json.dumps({"id": str(number), "messages": messages}) for number, messages in enumerate(turns)]
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "some.json").write_text("\n".join(lines))
        config = SourceConfig(path=str(tmp_path / "d"), streaming=streamed)
        source = open_source(config) if not streamed else None
        stream = EndlessSource(config, "data.train.0", seed=0, shuffled=False) if streamed else None
        for row in range(2):
            record = stream.take() if stream else source[row]
            assert [turn.text for turn in record.turns] == ["why?", "yes"]

    def test_columns_are_renamed_and_pictures_come_first(self, tmp_path: Path) -> None:
        rows = [{"query": "a <image> tag?", "label": "yes", "photo": {"bytes": picture(), "path": None}}]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
        columns = {"question": "query", "answer": "label", "image": "photo"}
        record = open_source(SourceConfig(path=str(tmp_path / "d"), columns=columns))[0]
        assert record.turns[0].parts() == ["", "\na <image> tag?"]
        with pytest.raises(DataError, match="columns are query, label, photo"):
            open_source(SourceConfig(path=str(tmp_path / "d"), columns={"question": "quary"}))

    @pytest.mark.parametrize("path", ["/etc/passwd", "{folder}/private.png"])
    @pytest.mark.parametrize("streamed", [False, True])
    def test_a_picture_column_may_not_name_a_file_elsewhere(self, tmp_path: Path, streamed, path) -> None:
        import pyarrow.parquet

        (tmp_path / "private.png").write_bytes(picture())
        (tmp_path / "d").mkdir()
        row = {"image": {"bytes": None, "path": path.format(folder=tmp_path)}, "question": "q", "answer": "a"}
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
        """The real client, in a process with this machine as its hub."""
        with fake_hub() as hub:
            hub.files = {("datasets", f"me/{kind}"): picture_folder(kind) for kind in ("metadata", "classes")}
            done = run_beside(hub, tmp_path, FROM_THE_HUB)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [(2, "cat", [1, 0, 0]), (2, "dog", [2, 0, 0])]
        assert [tuple(json.loads(line)) for line in done.stdout.splitlines()] == lines * 6

    def test_a_path_into_the_hubs_cache_is_absolute(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(picture())
        named = str(tmp_path / "a.png")
        assert hf_tables.fetched_file("a.png", [tmp_path]) is None
        assert hf_tables.fetched_file(named, [tmp_path / "other"]) is None
        assert hf_tables.fetched_file(named, [tmp_path]).read() == picture()

    @pytest.mark.parametrize("where", ["table", "split"])
    def test_a_saved_set_names_no_table_elsewhere(self, tmp_path: Path, where: str) -> None:
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
        table = datasets.Dataset.from_list([{"question": "q", "answer": "a"}])
        datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "d")
        with pytest.raises(DataError, match="no split 'train', only test"):
            open_source(SourceConfig(path=str(tmp_path / "d")))
        with pytest.raises(DataError, match="No file matches"):
            open_source(SourceConfig(path=str(tmp_path / "*.parquet")))
        with pytest.raises(ConfigError, match="streaming and limit are set, so set limit_by: first"):
            SourceConfig(path="hf:x", streaming=True, limit=3)
        with pytest.raises(DataError, match="it has no end, and only training reads it"):
            open_source(SourceConfig(path="hf:x", streaming=True))

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
        import fsspec

        opened: list[str] = []
        monkeypatch.setattr(fsspec, "open", lambda path, *_, **__: opened.append(path) or io.BytesIO(picture()))
        monkeypatch.setattr("huggingface_hub.HfFileSystem.open", lambda _, path, *__, **___: opened.append(path))
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
        (tmp_path / "private.png").write_bytes(picture())
        inside = {"bytes": None, "path": str(tmp_path / "private.png")}
        row = {"question": "q", "answer": "a", "more": [{"deep": {"photo": inside}}], "sound": inside}
        table = datasets.Dataset.from_list([row])
        kinds = {"more": datasets.List({"deep": {"photo": datasets.Image()}}), "sound": datasets.Image()}
        for name, kind in kinds.items():
            table = table.cast_column(name, kind)
        shown = next(iter(hf_tables.undecoded(table.to_iterable_dataset())))
        assert (shown["more"][0]["deep"]["photo"], shown["sound"]) == (inside, inside)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        "named",
        [
            "data_files: {folder}/private.jsonl", "data_files: ../private.jsonl", "data_files: link.jsonl",
            "data_files: http://127.0.0.1:9/a.jsonl", "data_files: ['reference://b.jsonl::d/refs.json']",
            "data_files: [{{split: train, path: ['zip://a.jsonl::http://127.0.0.1:9/a.zip']}}]",
            "data_dir: file:///etc", "data_files: hf://datasets/other/set/a.jsonl", "data_files: '*.jsonl'",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
    def test_the_readme_of_a_data_set_names_no_file_elsewhere(
        self, tmp_path: Path, monkeypatch, card, named, way
    ) -> None:
        """What is refused by its name is resolved by no library."""
        if "*" not in named:
            monkeypatch.setattr(datasets, "load_dataset_builder", None)
        (tmp_path / "private.jsonl").write_text(json.dumps({"question": "q", "answer": "secret"}) + "\n")
        folder = tmp_path / "d"
        folder.mkdir()
        (folder / "link.jsonl").symlink_to(tmp_path / "private.jsonl")
        rule = "---\n" if card == "README.md" else ""
        config = f"configs:\n- config_name: default\n  {named.format(folder=tmp_path)}\n"
        (folder / card).write_text(f"{rule}{config}{rule}")
        with pytest.raises(MoSLoRAError, match="not one of its own files"):
            WAYS[way](str(folder))

    @pytest.mark.parametrize("options", [{}, {"data_files": "http://127.0.0.1:9/a.jsonl"}])
    def test_a_set_of_the_hub_names_no_file_elsewhere(self, tmp_path: Path, options) -> None:
        code = f"from mm_moslora.data.sources.hf_tables import load_checked; load_checked('me/x', **{options})"
        named = "configs:\n- config_name: default\n  data_files: reference://a.jsonl::http://127.0.0.1:9/refs.json\n"
        with fake_hub() as hub:
            hub.files = {("datasets", "me/x"): {"a.jsonl": b"{}"}}
            if not options:
                hub.files["datasets", "me/x"] |= {"README.md": f"---\n{named}---\n".encode()}
            done = run_beside(hub, tmp_path, code)
        assert "DataError: me/x names the data file" in done.stderr.splitlines()[-1], done.stderr[-2000:]
