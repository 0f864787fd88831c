"""`mm-moslora data view`: training records with every token coloured by supervision, in a terminal or on a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.text import Text

from mm_moslora.data.check.data_views import RecordSample, legend, page, view_record
from mm_moslora.data.record_examples import encode_record
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.open_sources import open_sources
from mm_moslora.planning.recipe_data import BEGINNING, DataParts, parts_of, with_beginnings
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.files import replace_text
from mm_moslora.utils.folder_marks import PAGE_SIGN, output_file

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mm_moslora.config import Recipe
    from mm_moslora.data.sources.record_file import RecordSource


def view_recipe(recipe: Recipe, *, start: int = 0, count: int = 3, records: int = BEGINNING) -> list[RenderableType]:
    """Training records as renderables, every token coloured by supervision; `start` counts over all of data.train, from
    0.
    """
    parts, samples = _samples(with_beginnings(recipe, records)[0], start, count)
    return [legend(), *(_view_one(sample, parts) for sample in samples)]


def view_page(recipe: Recipe, path: Path, *, start: int = 0, count: int = 20, records: int = BEGINNING) -> Path:
    """Write an HTML page of training records; see `view_recipe`."""
    output_file(path, sign=PAGE_SIGN)
    parts, samples = _samples(with_beginnings(recipe, records)[0], start, count)
    text = page(samples, parts.encoder, title=f"Training data of {recipe.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}). Name another path for the page.") from error
    return path


def _samples(recipe: Recipe, start: int, count: int) -> tuple[DataParts, list[RecordSample]]:
    parts = parts_of(recipe)
    files = open_sources(recipe.data.train, objective=recipe.objective, processing=parts.image_processing)
    total = sum(len(file) for file in files)
    if not 0 <= start < total or count < 1:
        raise DataError(
            f"start is {start} and count is {count}, but data.train has {total} records. "
            f"Choose start from 0 to {total - 1} and a count of at least 1."
        )
    return parts, [_sample(files, number, recipe, parts) for number in range(start, min(total, start + count))]


def _sample(files: list[RecordSource], number: int, recipe: Recipe, parts: DataParts) -> RecordSample:
    for file in files:
        if number < len(file):
            break
        number -= len(file)
    try:
        record = file[number]
        encoded = encode_record(record, parts.encoder, parts.image_processing, config=recipe.data)
    except RecordError as error:
        return RecordSample(None, None, error)
    return RecordSample(record, encoded)


def _view_one(sample: RecordSample, parts: DataParts) -> RenderableType:
    if sample.record is None or sample.encoded is None:
        return Panel(Text(str(sample.fault)), title="cannot be used", title_align="left", border_style="red")
    return view_record(sample.record, sample.encoded, parts.encoder)
