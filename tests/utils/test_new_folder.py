"""A new folder appears whole or not at all."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.file_locks import new_folder
from mm_moslora.utils.files import staging


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as part:
        with new_folder(part) as same:  # a function that writes a whole by itself, as a part of this one
            (same / "a").write_text("1")
        assert not (tmp_path / "out").exists()
        with new_folder(part / "inner") as inner:
            (inner / "b").write_text("2")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "out", "out/a", "out/inner", "out/inner/b"
    ]  # fmt: skip


def test_what_is_staged_in_a_new_folder_lies_in_its_temporary_one(tmp_path: Path) -> None:
    """So the next call clears what a killed process leaves."""
    with new_folder(tmp_path / "out") as part, staging(part, ["a"]) as staged:
        (staged / "a").write_text("1")
        assert {path.name for path in tmp_path.iterdir()} <= {".out.partial", ".out.lock"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_nothing_and_the_same_command_works_again(error: BaseException, tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        (part / "half").write_text("1")
        raise error

    with pytest.raises(type(error)), new_folder(tmp_path / "out") as part:
        fail(part)
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as part:
        (part / "whole").write_text("1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_a_link_to_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with new_folder(tmp_path / "link") as part:
        (part / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "1"


def test_a_full_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match="is not empty"), new_folder(tmp_path / "out"):
        pytest.fail("it is the user's")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_two_at_once_one_wins_whole(tmp_path: Path) -> None:
    refused = []

    def fill(name: str) -> None:
        try:
            with new_folder(tmp_path / "out") as part:
                (part / name).write_text(name)
        except ConfigError as error:
            refused.append(str(error))

    threads = [Thread(target=fill, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    assert "is not empty" in refused[0]
    assert len(list((tmp_path / "out").iterdir())) == 1
