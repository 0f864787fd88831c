"""The scan finds the values that a JSON parser finds, whatever the chunks cut through."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_moslora.data.sources import record_file
from mm_moslora.data.sources.record_file import RecordFile

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
