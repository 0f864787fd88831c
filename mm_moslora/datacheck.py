"""`mm-moslora data check|view`: a recipe's data as the trainer will see them, without loading the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rich.panel import Panel
from rich.text import Text

from mm_moslora.batch import Eyes
from mm_moslora.data.check import check
from mm_moslora.data.conversation import Encoder
from mm_moslora.data.dataset import encode_record, placeholders_of
from mm_moslora.data.faults import RecordError
from mm_moslora.data.sources import open_sources
from mm_moslora.data.view import legend, view_record, view_report
from mm_moslora.errors import DataError
from mm_moslora.models.build import text_and_images
from mm_moslora.training.progress import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mm_moslora.config import Recipe
    from mm_moslora.data.sources import RecordSource


class _Parts(NamedTuple):
    encoder: Encoder
    eyes: Eyes | None


def check_recipe(recipe: Recipe) -> tuple[list[RenderableType], int]:
    """Read every record and decode every picture of a recipe's training and validation data.

    Args:
        recipe: resolved.

    Returns:
        What was found, for a rich console, and an exit code: 1 when a run would stop because of the data.

    Raises:
        DataError: a source cannot be read at all.
        ModelError: the tokenizer or the vision encoder does not load.
    """
    parts = _parts(recipe)
    shown: list[RenderableType] = []
    code = 0
    for name, sources in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        if not sources and name == "validation":
            continue
        total = sum(len(file) for file in open_sources(sources))
        with Progress(f"check {name}", total, unit="record") as progress:

            def tell(done: int, _: int, progress: Progress = progress) -> None:
                progress.update(done)

            report = check(
                sources,
                parts.encoder,
                config=recipe.data,
                vision=parts.eyes is not None,
                eyes=parts.eyes,
                on_progress=tell,
            )
        shown += [Text(f"data.{name}", style="bold"), *view_report(report)]
        code = code if report.ok else 1
    return shown, code


def view_recipe(recipe: Recipe, *, start: int = 0, count: int = 3) -> list[RenderableType]:
    """Show training records with every token coloured by supervision.

    Args:
        recipe: resolved.
        start: number of the first record over all of data.train, from 0.
        count: how many.

    Raises:
        DataError: `start` lies outside the data, `count` is no count, or a source cannot be read at all.
    """
    files = open_sources(recipe.data.train)
    total = sum(len(file) for file in files)
    if not 0 <= start < total or count < 1:
        raise DataError(
            f"start is {start} and count is {count}, but data.train has {total} records. "
            f"Choose start from 0 to {total - 1} and a count of at least 1."
        )
    parts = _parts(recipe)
    numbers = range(start, min(total, start + count))
    return [legend(), *(_view_one(files, number, recipe, parts) for number in numbers)]


def _parts(recipe: Recipe) -> _Parts:
    parts = text_and_images(recipe.model)
    encoder = Encoder(
        parts.tokenizer,
        image_token_id=parts.image_token_id,
        tokens_per_image=parts.tokens_per_image,
        processor=parts.processor,
    )
    return _Parts(encoder, parts.eyes)


def _view_one(files: list[RecordSource], number: int, recipe: Recipe, parts: _Parts) -> RenderableType:
    for file in files:
        if number < len(file):
            break
        number -= len(file)
    try:
        record = file[number]
        encoded = encode_record(
            record,
            parts.encoder,
            max_length=recipe.data.max_length,
            vision=parts.eyes is not None,
            pictures=placeholders_of(record, parts.eyes),
        )
    except RecordError as error:
        return Panel(Text(str(error)), title="cannot be used", title_align="left", border_style="red")
    return view_record(record, encoded, parts.encoder)
