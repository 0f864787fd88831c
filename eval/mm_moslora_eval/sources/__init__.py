"""Readers of data files: LLaVA JSON and JSONL, VLMEvalKit TSV, annotations in JSON, Hugging Face data sets.

One `Document` per question.
"""

from __future__ import annotations

from pathlib import Path

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.identity import md5_of, sha256_of
from mm_moslora.utils.untrusted_files import opened
from mm_moslora_eval.sources import annotation_file, hf_dataset, llava_file, vlmevalkit_tsv
from mm_moslora_eval.sources.document import DataSet, Document, checked
from mm_moslora_eval.sources.reference_boxes import BOX_FORMS, with_reference_box
from mm_moslora_eval.sources.source import Source
from mm_moslora_eval.sources.source_files import find_file, picture_folder
from mm_moslora_eval.sources.source_images import rules_of

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
        read = list(annotation_file.read(path, rules=rules, source=source))
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
