"""Files that data name: nothing outside the root is opened, nothing blocks and nothing is endless."""

from __future__ import annotations

import ast
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


CHECKOUT = Path(__file__).parents[2]
PACKAGES = ("mm_moslora", "eval/mm_moslora_eval")
DOORS = ("mm_moslora/utils/files.py", "mm_moslora/utils/untrusted_files.py")
READERS = frozenset({
    "open", "fdopen", "memmap", "fromfile", "loadtxt", "genfromtxt", "load_dataset", "load_from_disk",
    "load_dataset_builder", "urlopen", "read_csv", "read_parquet", "read_table", "ParquetFile", "ZipFile", "url_to_fs",
    "filesystem",
})  # fmt: skip
"""Calls that open a file to read it, unless an argument says that they write."""
READERS_OF = {
    "load": {"np", "numpy", "torch"}, "copy": {"shutil"}, "copy2": {"shutil"}, "copyfile": {"shutil"},
    "copytree": {"shutil"},
}  # fmt: skip
"""The same of modules."""
ALLOWED = {
    "mm_moslora/diffusion/diffusion_checkpoint.py:_state_of": "a stream",
    "mm_moslora/models/importing/import_checkpoint.py:_tensors": "a stream",
    "mm_moslora/models/weights_fingerprint.py:fingerprint": "regular files of a model that a recipe names",
    "mm_moslora/models/weights_fingerprint.py:_of_texts": "regular files of a model that a recipe names",
    "mm_moslora/planning/doctor.py:_read": "a file of the system",
    "mm_moslora/quickstart/asset_cache.py:unpack": "a download, whose checksum was checked",
    "mm_moslora/quickstart/debian_packages.py:_ar_members": "a download, whose checksum was checked",
    "mm_moslora/quickstart/debian_packages.py:unpack_deb_in_python": "a stream",
    "mm_moslora/quickstart/instruction_data.py:_differs": "the set of this project, in a marked folder",
    "mm_moslora/quickstart/asset_conversion.py:convert_efficientnet": "a download, whose checksum was checked",
    "mm_moslora/quickstart/stamp_data.py:square": "a picture of a download, whose checksum was checked",
    "mm_moslora/serve/inference/request_images.py:_with_header": "bytes in memory",
    "mm_moslora/models/precision.py:resolve_precision": "a file of the system",
    "mm_moslora/training/supervision/rank_agreement.py:software": "files of the package",
    "mm_moslora/training/supervision/watchdog.py:_is_sibling": "a file of the system",
    "mm_moslora/utils/distributed.py:_gloo_works": "files of the system",
    "mm_moslora/utils/hardware.py:available_memory": "files of the system",
    "mm_moslora/launch/heartbeat.py:process_start": "a file of the system",
    "mm_moslora/utils/hardware.py:hardware": "files of the system",
    "mm_moslora/utils/hardware.py:made_by_amd": "a file of the system",
    "mm_moslora/utils/network/http_fetch.py:fetch": "the network, within the rules of the caller",
    "mm_moslora/utils/package_requirements.py:_all": "the project file of the checkout",
    "mm_moslora/data/images/pyav_decode.py:_container": "a stream; FFmpeg opens nothing by itself",
    "mm_moslora/data/images/record_picture.py:_opened": "a stream",
    "mm_moslora/data/images/video_clip.py:_of_animation": "a stream",
    "mm_moslora/reporting/inline_images.py:shrunk": "a stream",
    "mm_moslora/data/images/remote_files.py:read_hub_file": "the hub's client, for files of the data set alone",
    "mm_moslora/data/sources/hf_tables.py:load_checked": "data files were found to lie in the data set",
    "mm_moslora/data/sources/hf_tables.py:_own_files": "lists the files, and reads none of them",
    "mm_moslora/data/sources/hf_tables.py:load_saved": "tables were found to lie in the data set",
    "mm_moslora/data/sources/hf_tables.py:_streamed": "the cache of this project",
    "mm_moslora/data/token_cache.py:__init__": "the cache of this project",
    "mm_moslora/data/sources/webdataset_tars.py:_members": "a stream",
    "mm_moslora/reporting/page_templates.py:asset": "a file of the package",
    "eval/mm_moslora_eval/backends/openai_endpoint.py:_post": "an endpoint that a person names, over http",
    "eval/mm_moslora_eval/backends/openai_endpoint.py:get": "the same",
    "eval/mm_moslora_eval/backends/stored_answers.py:_workbook": "bytes in memory",
}


def openers(path: Path) -> list[str]:
    """Calls of a module that open a file to read it, by the function they stand in."""
    found = []

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and _opens(node):
            found.append(f"{path.relative_to(CHECKOUT)}:{function}")
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(ast.parse(path.read_text()), "")
    return found


def _opens(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "read_bytes"):  # functions of these names are those of named_files
        return isinstance(call.func, ast.Attribute)
    if name in READERS_OF:
        return isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in READERS_OF[name]
    given = [*call.args, *(key.value for key in call.keywords if key.arg == "mode")]
    words = [item.value for item in given if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    writes = any(set(word) <= set("rwxabt+") and set(word) & set("wxa") for word in words)
    return name in READERS and not writes and "O_WRONLY" not in ast.unparse(call)


@pytest.mark.parametrize(
    ("code", "reads"),
    [
        ("open(p)", True), ("open(p, 'rb')", True), ("p.open(encoding='utf-8')", True), ("Image.open(p)", True),
        ("os.open(p, os.O_RDONLY)", True), ("p.read_bytes()", True), ("shutil.copyfile(p, q)", True),
        ("np.load(p)", True), ("fsspec.open(u)", True), ("open(p, 'w')", False), ("p.open(mode='ab')", False),
        ("os.open(p, os.O_WRONLY | os.O_CREAT)", False), ("read_text(p)", False), ("image.copy()", False),
        ("opened(p, most=1)", False),
    ],
)  # fmt: skip
def test_openers_are_recognised(code: str, reads: bool) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert _opens(call) is reads


def test_two_modules_alone_open_files_to_read_them() -> None:
    modules = {path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py")}
    found = {place for path in modules - {CHECKOUT / door for door in DOORS} for place in openers(path)}
    assert sorted(found - ALLOWED.keys()) == [], "open what data name through mm_moslora.utils.untrusted_files"
    assert sorted(ALLOWED.keys() - found) == [], "these open nothing any more: take them off the list"
