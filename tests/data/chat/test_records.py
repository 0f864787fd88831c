"""Every bad record is refused with its code, its place and a remedy; every good one is read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.images.record_picture import LocalPicture, PictureRules
from mm_moslora.data.record_faults import Code, RecordError, Where
from mm_moslora.data.sources import record_file
from mm_moslora.data.sources.record_file import RecordFile
from mm_moslora.utils.errors import DataError
from tests.data.sets import parsed

QA = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def with_image(name: object, question: str = "<image>\nq") -> dict[str, object]:
    return {"id": "x", "image": name, "conversations": [{"from": "human", "value": question}, QA[1]]}


def chat(*turns: tuple[str, object]) -> dict[str, object]:
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns]}


class TestGoodRecords:
    def test_llava_json_and_jsonl_give_the_same_records(self, tmp_path: Path) -> None:
        rows = [with_image("a.png"), {"id": 7, "conversations": QA}, {"conversations": QA}]
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
        (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
        first, second = RecordFile(tmp_path / "a.json"), RecordFile(tmp_path / "a.jsonl")
        assert [record.id for record in first] == ["x", "7", "2"]
        assert [(r.id, r.turns, r.images) for r in first] == [(r.id, r.turns, r.images) for r in second]
        assert first[0].images == (LocalPicture(tmp_path / "a.png"),)
        assert [second[row].where.line for row in range(3)] == [1, 3, 5]

    def test_byte_order_mark_and_crlf_do_not_matter(self, tmp_path: Path) -> None:
        line = json.dumps({"id": "é", "conversations": QA}, ensure_ascii=False)
        for name, text in (("a.jsonl", f"{line}\r\n{line}\r\n"), ("a.json", f"[\r\n{line},\r\n{line}\r\n]\r\n")):
            (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
            assert [record.id for record in RecordFile(tmp_path / name)] == ["é", "é"]

    def test_messages_with_content_parts(self, tmp_path: Path) -> None:
        parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what is <image>?"}]
        row = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts},
                            {"role": "assistant", "content": [{"type": "text", "text": "a tag"}]}]}  # fmt: skip
        record = parsed(row, tmp_path)
        assert [turn.role for turn in record.turns] == ["system", "user", "assistant"]
        assert record.turns[1].parts() == ["", "\nwhat is <image>?"]  # the typed one is text
        assert record.images == (LocalPicture(tmp_path / "a.png"),)

    def test_images_named_beside_messages_fill_the_parts(self, tmp_path: Path) -> None:
        parts = [
            {"type": "text", "text": "left "},
            {"type": "image"},
            {"type": "text", "text": "right "},
            {"type": "image"},
        ]
        row = {
            "images": ["a.png", "b.png"],
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}],
        }
        record = parsed(row, tmp_path)
        assert [picture.path.name for picture in record.images] == ["a.png", "b.png"]
        assert record.turns[0].images == 2

    def test_a_placeholder_in_an_answer_is_text(self, tmp_path: Path) -> None:
        row = chat(("human", "which tag?"), ("gpt", "<image>"))
        assert parsed(row, tmp_path).turns[1].images == 0


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


LINES = {
    "broken": ('{"id": 1', Code.BAD_JSON, "column"),
    "key twice": ('{"id": "a", "id": "b"}', Code.BAD_JSON, "'id' is written twice"),
    "many digits": ('{"id": 1' + "0" * 5000 + "}", Code.BAD_JSON, "digits"),
    "very deep": ('{"id": ' + deep(100_000) + "}", Code.TOO_DEEP, "levels deep"),
    "deep": ('{"x": ' + deep(100) + "}", Code.TOO_DEEP, "levels deep"),
    "not utf-8": (b'{"id": "\xff"}', Code.BAD_JSON, "UTF-8 at byte 8"),
}
ROWS = {
    "a list": ([], Code.NOT_AN_OBJECT, "a list"),
    "a string": ("x", Code.NOT_AN_OBJECT, "a string"),
    "null": (None, Code.NOT_AN_OBJECT, "null"),
    "a number": (7, Code.NOT_AN_OBJECT, "a number"),
    "id object": ({"id": {}, "conversations": QA}, Code.BAD_ID, "an object"),
    "no conversations": ({"id": "x"}, Code.NO_TURNS, "missing"),
    "misspelt": ({"id": "x", "conversation": QA}, Code.NO_TURNS, "the record has 'id', 'conversation'; write conv"),
    "null conversations": ({"conversations": None}, Code.NO_TURNS, "conversations"),
    "messages are an object": ({"messages": {}}, Code.NO_TURNS, "messages"),
    "empty conversations": ({"id": "x", "conversations": []}, Code.NO_TURNS, "empty"),
    "turn is a string": ({"id": "x", "conversations": ["hi"]}, Code.BAD_TURN, "a string"),
    "role": (chat(("bing", "q"), ("gpt", "a")), Code.BAD_ROLE, '"bing"'),
    "role object": ({"conversations": [{"from": {}, "value": "q"}]}, Code.BAD_ROLE, "{}"),
    "gpt first": (chat(("gpt", "a"), ("human", "q")), Code.ROLES_DO_NOT_ALTERNATE, "[0]"),
    "human twice": (chat(("human", "q"), ("human", "q"), ("gpt", "a")), Code.ROLES_DO_NOT_ALTERNATE, "[1]"),
    "no answer": (chat(("human", "q")), Code.NO_ANSWER, "nothing is answered"),
    "only system": (chat(("system", "s")), Code.NO_ANSWER, "nothing is answered"),
    "nan for turns": ({"conversations": float("nan")}, Code.NO_TURNS, "is NaN"),
    "nan text": (chat(("human", float("nan")), ("gpt", "a")), Code.BAD_TEXT, "text is NaN"),
    "infinite id": ({"id": float("inf"), "conversations": QA}, Code.BAD_ID, "a number"),
    "null text": (chat(("human", None), ("gpt", "a")), Code.BAD_TEXT, "null"),
    "number text": (chat(("human", "q"), ("gpt", 5)), Code.BAD_TEXT, "a number"),
    "null answer": (chat(("human", "q"), ("gpt", None)), Code.BAD_TEXT, "null"),
    "no letter in the answer": (chat(("human", "q"), ("gpt", "")), Code.EMPTY_ANSWER, "conversations[1]"),
    "empty answer": (chat(("human", "q"), ("gpt", " \n")), Code.EMPTY_ANSWER, "conversations[1]"),
    "surrogate": (chat(("human", "q\ud83d"), ("gpt", "a")), Code.BAD_CHARACTER, "U+D83D"),
    "nul": (chat(("human", "q"), ("gpt", "a\0")), Code.BAD_CHARACTER, "U+0000 at character 1"),
    "escape": (chat(("human", "\x1b[31m"), ("gpt", "a")), Code.BAD_CHARACTER, "U+001B"),
    "huge text": (chat(("human", "q" * 2_000_001), ("gpt", "a")), Code.TOO_LARGE, "2000001 characters"),
    "unknown part": (chat(("human", [{"type": "audio"}]), ("gpt", "a")), Code.BAD_TURN, "content[0]"),
    "image in an answer": (chat(("human", "q"), ("gpt", [{"type": "image"}])), Code.BAD_TURN, "user's turns"),
    "no placeholder": (with_image("a.png", "q"), Code.IMAGE_COUNT, "0 <image> in the questions, 1 images"),
    "two placeholders": (with_image("a.png", "<image><image>"), Code.IMAGE_COUNT, "2 <image>"),
    "placeholder without image": (chat(("human", "<image>"), ("gpt", "a")), Code.IMAGE_COUNT, "0 images"),
    "placeholder in the answer": (
        {"image": "a.png", **chat(("human", "q"), ("gpt", "<image>"))}, Code.IMAGE_COUNT, "turns [1] do not count"
    ),
    "named twice": ({**with_image("a.png"), "images": ["a.png"]}, Code.IMAGE_COUNT, "both"),
    "parent": (with_image("../../etc/passwd"), Code.PATH_ESCAPES, "leaves /"),
    "parent inside": (with_image("a/../../b"), Code.PATH_ESCAPES, "leaves /"),
    "absolute": (with_image("/etc/passwd"), Code.PATH_ESCAPES, "leaves /"),
    "absolute, up again": (with_image("/etc/../etc/passwd"), Code.PATH_ESCAPES, "leaves /"),
    "link": (with_image("out/secret.png"), Code.PATH_ESCAPES, "links out"),
    "http": (with_image("http://host/a.png"), Code.BAD_IMAGE_NAME, "nothing is downloaded"),
    "file scheme": (with_image("file:///etc/passwd"), Code.BAD_IMAGE_NAME, "scheme"),
    "data scheme": (with_image("data:text/html;base64,AAAA"), Code.BAD_IMAGE_NAME, "scheme"),
    "data base64": (with_image("data:image/png;base64,A*AA"), Code.BAD_IMAGE_NAME, "no base64"),
    "home": (with_image("~/a.png"), Code.BAD_IMAGE_NAME, "~"),
    "percent": (with_image("%2e%2E/a.png"), Code.BAD_IMAGE_NAME, "escapes"),
    "backslash": (with_image("..\\a.png"), Code.BAD_IMAGE_NAME, "backslash"),
    "nul in name": (with_image("a\0.png"), Code.BAD_IMAGE_NAME, "plain relative path"),
    "surrogate in name": (with_image("\ud83d.png"), Code.BAD_IMAGE_NAME, "plain relative path"),
    "image number": (with_image(5), Code.BAD_IMAGE_NAME, "a number"),
    "image null": (with_image(None), Code.IMAGE_COUNT, "0 images"),
    "image nan": (with_image(float("nan")), Code.IMAGE_COUNT, "0 images"),
    "image object": (with_image({"file": "a.png"}), Code.BAD_IMAGE_NAME, "an object"),
    "list of lists": (with_image([["a.png"]]), Code.BAD_IMAGE_NAME, "a list"),
    "null in a list": (with_image([None]), Code.BAD_IMAGE_NAME, "null"),
    "no letter in the name": (with_image(""), Code.BAD_IMAGE_NAME, "empty"),
    "empty name": (with_image(" "), Code.BAD_IMAGE_NAME, "empty"),
}  # fmt: skip


class TestBadRecords:
    @pytest.mark.parametrize("name", LINES)
    def test_bad_line_costs_one_record(self, tmp_path: Path, name: str) -> None:
        line, code, text = LINES[name]
        good = json.dumps({"id": "good", "conversations": QA}).encode()
        raw = line if isinstance(line, bytes) else line.encode()
        path = tmp_path / "d.jsonl"
        path.write_bytes(good + b"\n" + raw + b"\n" + good + b"\n")
        file = RecordFile(path)
        assert (file[0].id, file[2].id, len(file)) == ("good", "good", 3)
        with pytest.raises(RecordError) as caught:
            file[1]
        assert caught.value.code == code
        assert str(caught.value).startswith(f"{code}: {path}:2 (record 1) field -: ")
        assert text in str(caught.value)

    @pytest.mark.parametrize("name", ROWS)
    def test_bad_row_is_named(self, tmp_path: Path, name: str) -> None:
        row, code, text = ROWS[name]
        folder = tmp_path / "images"
        folder.mkdir()
        (folder / "out").symlink_to(tmp_path)
        with pytest.raises(RecordError) as caught:
            parse_record(row, Where(file=Path("d.jsonl"), line=3, row=2), PictureRules(folder=folder.resolve()))
        message = str(caught.value)
        assert caught.value.code == code, message
        assert message.startswith(f"{code}: d.jsonl:3 (record 2")
        assert text in message
        assert "; " in message  # what; what to do
        message.encode()  # can be written to a log

    def test_a_link_out_of_the_folder_is_followed_when_asked(self, tmp_path: Path) -> None:
        folder = tmp_path / "images"
        folder.mkdir()
        (folder / "a.png").symlink_to(tmp_path / "store.png")
        where = Where(file=tmp_path, line=None, row=0)
        assert parse_record(with_image("a.png"), where, PictureRules(folder=folder, follow_links=True)).images == (
            LocalPicture(folder / "a.png"),
        )

    @settings(deadline=None, max_examples=200)
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
            | st.sampled_from(["human", "gpt"]),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["id", "image", "conversations", "messages", "from", "value", "content", "type"]),
                inner, max_size=4,
            ),
            max_leaves=12,
        )
    )  # fmt: skip
    def test_anything_is_a_record_or_a_named_error(self, value) -> None:
        with contextlib.suppress(RecordError):  # anything else is a failure
            parsed(value, Path("/nowhere"))


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b"", "0 records"),
            (b" \n\n", "0 records"),
            (b"[]", "0 records"),
            (b"\xef\xbb\xbf", "0 records"),
            (b'[{"id": 1}, {"id": 2}, {"id"', r"at byte 23: record 2 breaks off .*; the 2 records before it are whole"),
            (b'[{"id": 1},]', "at byte 11"),
            (b'[{"id": 1} {"id": 2}]', "neither a comma"),
            (b'[{"id": 1}', "neither a comma"),
            (b"[1] 2", "behind the end"),
            (b"[" + b"[" * 100_000, "nested too deeply"),
            ('[{"id": 1}]'.encode("utf-16"), "UTF-16"),
            ('[{"id": 1}]'.encode("utf-16-le"), "UTF-16"),
        ],
    )
    def test_a_file_that_cannot_be_read_says_why(self, tmp_path: Path, content: bytes, text: str) -> None:
        path = tmp_path / "d.json"
        path.write_bytes(content)
        with pytest.raises(DataError, match=text) as caught:
            RecordFile(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("name", ["missing.json", "."])
    def test_a_file_that_is_none_says_so(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError, match="does not exist or is no file"):
            RecordFile(tmp_path / name)

    def test_a_record_beyond_the_limit_is_not_read(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(record_file, "MAX_VALUE_BYTES", 100)
        path = tmp_path / "d.jsonl"
        path.write_text(json.dumps({"id": "x" * 200}) + "\n" + json.dumps({"conversations": QA}))
        file = RecordFile(path)
        with pytest.raises(RecordError, match="TOO_LARGE") as caught:
            file[0]
        assert caught.value.code == Code.TOO_LARGE
        assert file[1].turns[1].text == "a"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("what?\n<image>", "<image>\nwhat?"),
        (" red <image> or blue? ", "<image>\nred  or blue?"),
        ("<image>\nwhat?", "<image>\nwhat?"),
        ("<image>", "<image>"),
    ],
)
def test_the_only_image_of_a_question_stands_first_as_in_llava(written: str, read: str) -> None:
    row = {"image": "a.png", "conversations": [{"from": "human", "value": written}, {"from": "gpt", "value": "red"}]}
    record = parsed(row, Path("/nowhere"))
    assert record.turns[0].text == read
    assert record.turns[0].images == 1


def test_several_images_of_a_question_stay_in_place() -> None:
    talk = [{"from": "human", "value": "is <image> like <image>?"}, {"from": "gpt", "value": "no"}]
    row = {"image": ["a.png", "b.png"], "conversations": talk}
    record = parsed(row, Path("/nowhere"))
    assert record.turns[0].text == "is <image> like <image>?"


texts = st.text(st.sampled_from('a"\\[]{},: \n\té🙂'), max_size=12)
values = st.recursive(texts | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=4)
objects = st.dictionaries(texts, values, max_size=3)
relaxed = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(
    st.lists(objects, min_size=1, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.sampled_from([3, 7, 64])
)
def test_a_list_gives_its_values(tmp_path: Path, monkeypatch, rows, indent, ascii_only, chunk) -> None:
    monkeypatch.setattr(record_file, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(f" \n{json.dumps(rows, indent=indent, ensure_ascii=ascii_only)} \n", encoding="utf-8")
    file = RecordFile(path)
    assert [file.value(row) for row in range(len(file))] == rows


@relaxed
@given(
    st.lists(st.one_of(objects.map(json.dumps), st.sampled_from(["", "  ", "\t", " {}", "7"])), max_size=8),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.sampled_from([3, 7, 64]),
)
def test_lines_give_their_values_and_numbers(tmp_path: Path, monkeypatch, lines, ending, closed, chunk) -> None:
    monkeypatch.setattr(record_file, "CHUNK", chunk)
    path = tmp_path / "a.jsonl"
    path.write_bytes((ending.join(lines) + ending * closed).encode())
    starts, ends, numbers = record_file.scan_lines(path)
    raw = path.read_bytes()
    found = [
        (number, raw[start:end].strip().decode()) for start, end, number in zip(starts, ends, numbers, strict=True)
    ]
    assert found == [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
