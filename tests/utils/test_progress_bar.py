"""What people are told while something runs."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from mm_moslora.utils.progress_bar import Progress


def test_the_time_left_is_told_from_the_second_piece_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    # The module's clock alone: the event loop of a server in this process would wait for hours on another one.
    monkeypatch.setattr("mm_moslora.utils.progress_bar.time", SimpleNamespace(monotonic=lambda: clock[-1]))
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    caplog.set_level(logging.INFO, "mm_moslora")
    progress = Progress("task", 48, unit="document")
    for now, done in [(15.0, 1), (15.0, 8), (31.0, 16), (47.0, 24)]:
        clock.append(now)
        progress.update(done)
    assert [record.message for record in caplog.records] == [
        "task: 1/48 documents, 15 s", "task: 16/48 documents, 34 s left", "task: 24/48 documents, 33 s left",
    ]  # fmt: skip
