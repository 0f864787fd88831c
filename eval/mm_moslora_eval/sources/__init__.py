"""Readers of data files: LLaVA JSON and JSONL, VLMEvalKit TSV, Hugging Face data sets. One `Document` per question."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from mm_moslora.errors import EvalError

from ..documents import DataSet, Document, checked
from . import hf, llava, tsv
from .files import find_file
from .source import Source

__all__ = ["Source", "find_file", "load"]


def load(source: Source, *, beside: Path | None = None) -> DataSet:
    """Read the documents.

    Args:
        source: where they are.
        beside: folder of the task file; data files are looked for there too.

    Raises:
        EvalError: the file is missing, has another checksum, or cannot be read; the message says where.
    """
    if source.kind == "hf":
        return hf.load(source)
    path = find_file(source.path, beside=beside)
    sha256 = _checksum(path, source.md5)
    read = list(_read(source, path))
    documents = checked((document for document in read if document is not None), source=str(path))
    return DataSet(documents=documents, path=str(path), sha256=sha256, dropped=read.count(None))


def _read(source: Source, path: Path) -> Iterator[Document | None]:
    if source.kind == "llava":
        return llava.read(path, image_folder=source.image_folder, where=source.where)
    return tsv.read(
        path, drop_without_image=source.drop_without_image, answer_lists=source.answer_lists, where=source.where
    )


def _checksum(path: Path, expected_md5: str | None) -> str:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            sha256.update(chunk)
            md5.update(chunk)
    if expected_md5 is not None and md5.hexdigest() != expected_md5:
        raise EvalError(
            f"{path} has MD5 {md5.hexdigest()}, the protocol expects {expected_md5}: it is another version or damaged. "
            "Fetch it again, or copy the task file and change `source.md5`."
        )
    return sha256.hexdigest()
