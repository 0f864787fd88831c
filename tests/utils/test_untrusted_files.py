"""Files that data name: nothing outside the root is opened, nothing blocks and nothing is endless."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_moslora.utils.errors import MoSLoRAError
from mm_moslora.utils.untrusted_files import (
    FileError,
    FileFault,
    find_below,
    find_in_model,
    opened,
    read_bytes,
    read_text_below,
)

BAD, ESCAPES = FileFault.BAD_NAME, FileFault.ESCAPES


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path.resolve() / "root"
    (folder / "inside").mkdir(parents=True)
    (folder / "inside" / "a.txt").write_text("own")
    (tmp_path / "private.txt").write_text("private")
    return folder


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("/etc/passwd", ESCAPES), ("//etc/passwd", ESCAPES), ("../private.txt", ESCAPES),
        ("inside/../../private.txt", ESCAPES),
        ("..", ESCAPES), ("inside/..", ESCAPES), ("file:///etc/passwd", BAD), ("FILE:///etc/passwd", BAD),
        ("data:text/plain,x", BAD), ("http://example.org/a.png", BAD), ("HTTPS://example.org/a.png", BAD),
        ("hf://datasets/a/b@main/c.png", BAD), ("reference://p.png::hf://datasets/a/b@main/r.json", BAD),
        ("zip://a.png::/etc/b.zip", BAD), ("0::a.png", BAD), ("a\0b", BAD), ("~/.ssh/id_rsa", BAD), ("~root/x", BAD),
        ("inside\\a.txt", BAD), ("%2e%2e/private.txt", BAD), ("\udcff.png", BAD), ("\x1b[31m.png", BAD), ("", BAD),
        ("  ", BAD), (None, BAD), (7, BAD), (b"inside/a.txt", BAD), (["inside/a.txt"], BAD),
    ],
)  # fmt: skip
def test_a_name_that_leads_out_is_refused(root: Path, name: object, fault: FileFault) -> None:
    with pytest.raises(FileError) as caught:
        find_below(root, name)
    assert caught.value.fault == fault


@pytest.mark.parametrize("name", ["inside/a.txt", "./inside//a.txt", "{root}/inside/a.txt"])
def test_the_working_directory_decides_nothing(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = root.parent / "elsewhere"
    (elsewhere / "inside").mkdir(parents=True)
    (elsewhere / "inside" / "a.txt").write_text("another one")
    monkeypatch.chdir(elsewhere)
    assert read_bytes(find_below(root, name.format(root=root)), most=3) == b"own"


def test_links_are_followed_within_the_root_alone(root: Path) -> None:
    (root / "near").symlink_to(root / "inside" / "a.txt")
    (root.parent / "alias").symlink_to(root)
    assert read_bytes(find_below(root, str(root.parent / "alias" / "inside" / "a.txt")), most=9) == b"own"
    assert find_below(root, str(root / "far"), follow_links=True) == root / "far"
    (root / "far").symlink_to(root.parent / "private.txt")
    (root / "folder").symlink_to(root.parent)
    assert read_bytes(find_below(root, "near"), most=9) == b"own"
    for name in ("far", "folder/private.txt"):
        with pytest.raises(FileError, match="links out of"):
            find_below(root, name)
        assert read_bytes(find_below(root, name, follow_links=True), most=9) == b"private"


@pytest.mark.parametrize("inside", ["", "sub/deeper"])
def test_links_of_the_hubs_cache_lead_to_its_blobs_alone(root: Path, inside: str) -> None:
    """Anybody may call the folder of an archive `snapshots`."""
    folder = root / "snapshots" / "0" / inside
    for made in (folder, root / "blobs"):
        made.mkdir(parents=True)
    (root / "blobs" / "1").write_text("a blob")
    up = "../" * len(folder.relative_to(root).parts)
    for name, target in (("blob", "blobs/1"), ("own", "inside/a.txt"), ("far", "../private.txt")):
        (folder / name).symlink_to(f"{up}{target}")
    assert read_bytes(find_in_model(folder, "blob") or root, most=9) == b"a blob"
    assert find_in_model(folder, "absent") is None
    for name in ("own", "far"):
        with pytest.raises(FileError, match="links out of"):
            find_in_model(folder, name)


def _loop(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


def _socket(path: Path) -> None:
    os.chdir(path.parent)  # names of sockets are short
    socket.socket(socket.AF_UNIX).bind(path.name)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda path: None, FileFault.MISSING), (Path.mkdir, FileFault.NOT_A_FILE), (os.mkfifo, FileFault.NOT_A_FILE),
        (_socket, FileFault.NOT_A_FILE), (lambda path: path.symlink_to("nowhere"), FileFault.MISSING),
        (_loop, FileFault.MISSING), (lambda path: os.truncate(_empty(path), 2**40), FileFault.TOO_LARGE),
    ],
    ids=["nothing", "folder", "pipe", "socket", "dangling link", "loop of links", "a terabyte"],
)  # fmt: skip
def test_what_is_no_file_is_not_opened(
    root: Path, make: Callable[[Path], None], fault: FileFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    make(root / "it")
    with pytest.raises(FileError) as caught:
        read_bytes(find_below(root, "it"), most=10)
    assert caught.value.fault == fault


def _empty(path: Path) -> Path:
    path.touch()
    return path


def test_devices_and_very_long_names_are_not_opened(root: Path) -> None:
    for path, fault in ((Path("/dev/zero"), FileFault.NOT_A_FILE), (root / ("x" * 5000), FileFault.MISSING)):
        with pytest.raises(FileError) as caught, opened(path, most=None):
            pass
        assert caught.value.fault == fault
    (root / "zero").symlink_to("/dev/zero")
    with pytest.raises(FileError, match="links out of"):
        find_below(root, "zero")


def test_a_file_that_gives_more_than_it_says_is_read_up_to_its_limit() -> None:
    with pytest.raises(FileError, match="gives more than 10 bytes"):  # regular, of size 0, and yet with content
        read_bytes(Path("/proc/cpuinfo"), most=10)


def test_what_is_not_there_is_none_and_a_link_that_leads_out_is_an_error(root: Path) -> None:
    (root / "far").symlink_to(root.parent / "private.txt")
    (root / "gone").symlink_to(root / "nothing")
    assert read_text_below(root, "inside/a.txt") == "own"
    assert read_text_below(root, "other.txt") is None
    assert read_text_below(root, "gone") is None
    with pytest.raises(FileError, match="links out of"):
        read_text_below(root, "far")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is a folder, a pipe or a device"), (lambda path: path.symlink_to("/etc/hostname"), "links out of"),
        (lambda path: os.truncate(_empty(path), 2**40), "stay below"), (lambda path: None, "lacks config.yaml"),
    ],
)  # fmt: skip
def test_the_recipe_of_a_checkpoint_is_a_file_inside_it(make: Callable[[Path], None], words: str, root: Path) -> None:
    from mm_moslora.models.load_model import recipe_of

    make(root / "config.yaml")
    with pytest.raises(MoSLoRAError, match=words):
        recipe_of(root)
