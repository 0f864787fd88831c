"""What the system will not write is one error that names the path, whoever writes."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, export_adapter, save_adapter
from mm_moslora.adapters.adapter_inspection import inspect_adapter
from mm_moslora.reporting.lens_maps import draw_lens
from mm_moslora.utils.errors import AdapterError, ConfigError
from tests.adapters.adapter_models import llama


def _model():
    return add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8))


def _draw(folder: Path, picture: Path) -> Path:
    return draw_lens([report.row() for report in inspect_adapter(folder)], picture)


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "save_adapter": lambda _, out: save_adapter(_model(), out),
    "peft": lambda folder, out: export_adapter(folder, out, layout="peft"),
    "vllm": lambda folder, out: export_adapter(folder, out, layout="vllm"),
    "diffusers": lambda folder, out: export_adapter(folder, out, layout="diffusers"),
    "picture": lambda folder, out: _draw(folder, out.with_suffix(".png")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a"
    save_adapter(_model(), path)
    return path


@contextmanager
def _little_room() -> Iterator[None]:
    """No file may grow beyond 8 KiB, as on a disk that is about to be full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["full", "/proc"])
def test_the_error_names_the_path(way: str, place: str, folder: Path, tmp_path: Path) -> None:
    out = (tmp_path if place == "full" else Path(place)) / "out"
    with pytest.raises(OSError, match=r"large|not whole|No such file") as caught, _little_room():
        WAYS[way](folder, out)
    assert str(caught.value.filename).removesuffix(".png") == str(out)
    assert not list(out.parent.glob(".out*"))


def test_a_picture_of_no_format_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"ends in 'doc', expected one of .*png"):
        _draw(folder, tmp_path / "mixers.doc")


@pytest.mark.parametrize("way", ["peft", "vllm"])
def test_an_export_replaces_nothing(way: str, folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "adapter_model.safetensors"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not replaced"):
        WAYS[way](folder, tmp_path / "out")
    assert mine.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_a_picture_replaces_its_own_kind_alone(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        WAYS["picture"](folder, tmp_path / "out")
    (tmp_path / "out.png").write_bytes(b"\x89PNG a photo of mine")
    with pytest.raises(ConfigError, match=r"out\.png exists and is not replaced"):
        WAYS["picture"](folder, tmp_path / "out")
    assert (tmp_path / "out.png").read_bytes() == b"\x89PNG a photo of mine"
