"""Readers of data files: LLaVA JSON and JSONL, VLMEvalKit TSV, annotations in JSON, Hugging Face data sets.

One `Document` per question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.identity import md5_of, sha256_of
from mm_moslora.utils.untrusted_files import opened
from mm_moslora_eval.sources import hf_dataset, llava_file, vlmevalkit_tsv
from mm_moslora_eval.sources.answer_options import BOX_FORMS, with_reference_box
from mm_moslora_eval.sources.document import DataSet, Document, checked
from mm_moslora_eval.sources.source import Source, find_file, picture_folder
from mm_moslora_eval.sources.source_images import pictures_of_record, rules_of

if TYPE_CHECKING:
    from mm_moslora.data.images.record_picture import PictureRules

VLMEVALKIT = "https://opencompass.openxlab.space/utils/VLMEval/"
"""Where the files are whose checksums shipped tasks know."""

__all__ = ["Source", "find_file", "load"]


def load(source: Source, *, beside: Path | None = None) -> DataSet:
    """Read the documents."""
    if source.kind == "hf":
        return hf_dataset.load(source, beside=beside)
    where = f" VLMEvalKit's files are at {VLMEVALKIT}{source.path}." if source.kind == "tsv" and source.md5 else ""
    path = find_file(source.path, beside=beside, where=where)
    sha256 = _checksum(path, source.md5)
    folder = picture_folder(source.image_folder, path, beside=beside)
    rules = rules_of(folder, source)
    read: list[Document | None]
    if source.kind == "llava":
        read = list(llava_file.read(path, rules=rules, where=source.where))
    elif source.kind == "annotations":
        read = list(_annotated(path, rules=rules, source=source))
    else:
        read = list(
            vlmevalkit_tsv.read(
                path, rules=rules, drop_without_image=source.drop_without_image, answer_lists=source.answer_lists,
                where=source.where,
            )
        )  # fmt: skip
    kept = [document for document in read if document is not None]
    if source.answer_is in BOX_FORMS:
        kept = [with_reference_box(document, source.answer_is) for document in kept]
    dropped = read.count(None)
    documents = checked(kept, source, path=str(path), dropped=dropped)
    return DataSet(documents=documents, path=str(path), sha256=sha256, dropped=dropped)


def _checksum(path: Path, expected_md5: str | None) -> str:
    with opened(path, most=None) as stream:
        sha256 = sha256_of(stream)
        stream.seek(0)
        md5 = md5_of(stream)
    if expected_md5 is not None and md5 != expected_md5:
        raise EvalError(
            f"{path} has MD5 {md5}, the protocol expects {expected_md5}: it is another version or damaged. "
            "Fetch it again, or copy the task file and change `source.md5`."
        )
    return sha256


def _annotated(path: Path, *, rules: PictureRules, source: Source) -> Iterator[Document]:
    """Annotated pictures as documents without references: a JSON list or JSON lines, each object about one picture.

    `columns` names the values of a document by their place, such as `page_info.image_path`; a picture may be
    `images/{page_info.image_path}`.
    """
    image_at = source.columns.get("image", "image")
    for row, record in llava_file.records(path):
        image = _at(record, image_at)
        if not isinstance(image, str) or not image:
            raise EvalError(
                f"{path}, record {row} has no name at {image_at!r}; found {', '.join(record) or 'nothing'}."
            )
        images, problem = pictures_of_record([image], file=path, row=row, rules=rules)
        category = _at(record, source.columns.get("category", "category"))
        yield Document(
            id=str(_at(record, source.columns.get("id", image_at)) or row),
            images=images,
            question="",
            answers=(),
            category=None if category in (None, "") else str(category),
            problem=problem,
        )


def _at(record: Any, place: str) -> Any:
    """The value at a place, or a text such as `images/{page.name}` with places in braces."""
    if "{" in place:
        return re.sub(r"\{([^{}]+)\}", lambda match: str(_at(record, match[1]) or ""), place)
    for key in place.split("."):
        record = record.get(key) if isinstance(record, Mapping) else None
    return record
