"""What is stored of a model's answers: nothing that was answered is lost, whatever comes beside or behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from disk_trace import trace_disk
from mm_moslora_eval.run.answer_log import AnswerLog, line, merge, read_folder


def row(key: str, text: str | None = "yes") -> dict[str, Any]:
    """An answer, or the error of a sample without one."""
    error = None if text is not None else "OSError: no route"
    return {"key": key, "text": text, "tokens": 1, "finish_reason": "stop", "options": None, "error": error}


def write(folder: Path, number: int, *rows: dict[str, Any], rest: str = "") -> Path:
    path = folder / f"answers-0000-{number}.jsonl"
    path.write_text("".join(map(line, rows)) + rest)
    return path


def test_an_answer_replaces_an_error_and_no_error_an_answer(tmp_path: Path) -> None:
    write(tmp_path, 1, row("a"), row("b", None), row("c", "old"))
    write(tmp_path, 2, row("a", None), row("b", "no"), row("c", "new"))
    assert {key: found["text"] for key, found in read_folder(tmp_path).items()} == {"a": "yes", "b": "no", "c": "new"}


@pytest.mark.parametrize("damaged", ['{"key": "b", "te', '{"key": "b", "text": 1}\n', "\n\x00\n", '["b"]\n'])
def test_a_damaged_line_costs_its_own_sample_alone(tmp_path: Path, damaged: str) -> None:
    write(tmp_path, 1, row("a"), rest=damaged)
    write(tmp_path, 2, row("c"))
    assert set(read_folder(tmp_path)) == {"a", "c"}


def test_a_merge_keeps_every_answer_and_leaves_files_that_are_written(tmp_path: Path) -> None:
    ended = write(tmp_path, 1, row("b"), row("of another limit"), row("a"))
    with AnswerLog(tmp_path, rank=1, batch_size=1) as log:
        log.add(row("c"))
        merge(tmp_path, ["a", "b"])
        log.add(row("d"))
        assert not ended.exists()
        assert log.path.exists()
    merge(tmp_path, ["a", "b"])
    assert list(read_folder(tmp_path)) == ["a", "b", "of another limit", "c", "d"]
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["answers.jsonl"]


def test_answers_of_a_batch_survive_a_power_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = trace_disk(monkeypatch, tmp_path)
    with AnswerLog(tmp_path, rank=0, batch_size=2) as log:
        for key in "abc":
            log.add(row(key))
        assert events == [f"sync {log.path.name}"]
    assert len(events) == 2
