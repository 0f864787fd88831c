"""The file in which a rank says of itself where it is."""

from __future__ import annotations

import threading
from pathlib import Path

from between import just_before

from mm_moslora.training.watchdog import Watchdog


def test_two_threads_may_say_where_the_rank_is(tmp_path, monkeypatch):
    """`verdict` does it in the main thread, beside the watching one."""
    watchdog = Watchdog(tmp_path)
    watchdog.beats.mkdir()

    def beside():
        other = threading.Thread(target=watchdog._write)
        other.start()
        other.join()

    just_before(monkeypatch, Path, "replace", beside, when=lambda *_: True)
    watchdog._write()
    assert [beat.rank for beat in watchdog.read()] == [0]
    assert len(list(watchdog.beats.iterdir())) == 1
