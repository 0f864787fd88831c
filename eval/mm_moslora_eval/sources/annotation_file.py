"""Annotated pictures as documents without references: a JSON list or JSON lines, each object about one picture.

`columns` names the values of a document by their place, such as `page_info.image_path`; a picture may be
`images/{page_info.image_path}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.llava_file import records
from mm_moslora_eval.sources.source import Source
from mm_moslora_eval.sources.source_images import pictures_of_record

if TYPE_CHECKING:
    from mm_moslora.data.images.record_picture import PictureRules


def read(path: Path, *, rules: PictureRules, source: Source) -> Iterator[Document]:
    """Read the objects of a file."""
    image_at = source.columns.get("image", "image")
    for row, record in records(path):
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
