"""`mm-moslora data check|stats|view`: a recipe's data as they are trained on, without loading the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.panel import Panel
from rich.text import Text

from mm_moslora.batch import ImageProcessing
from mm_moslora.config import SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.thinking_form import settled
from mm_moslora.data.check.check_findings import Finding, findings, leakage, length_percentiles, repeated_records
from mm_moslora.data.check.data_views import (
    RecordSample,
    legend,
    page,
    view_findings,
    view_matches,
    view_record,
    view_report,
    view_statistics,
)
from mm_moslora.data.check.record_check import CheckReport, Fingerprint, Match, check, fingerprint
from mm_moslora.data.epoch_order import fill_rate, pack, repeats_of
from mm_moslora.data.images.record_picture import ImageError, open_image
from mm_moslora.data.record_examples import encode_record
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.open_sources import beginning, open_source, open_sources, require_sources
from mm_moslora.models.assembly import load_parts
from mm_moslora.planning.run_plan import DataSize
from mm_moslora.training.preflight import check_data
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.files import replace_text
from mm_moslora.utils.folder_marks import PAGE_SIGN, output_file
from mm_moslora.utils.progress_bar import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mm_moslora.config import Recipe
    from mm_moslora.data.sources.record_file import RecordSource


COUNTED = 1000
"""Records of each source that are read to plan a run; of a larger source these are a random choice, whose mean is off
by 3 % of the standard deviation of single records."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
BEGINNING = 1000
"""Records of a stream without an end that are looked at."""


class DataParts(NamedTuple):
    """The parts that turn a recipe's records into tensors."""

    encoder: ConversationEncoder
    image_processing: ImageProcessing | None


class Checked(NamedTuple):
    """The result of a check."""

    shown: list[RenderableType]
    """Renderables for a rich console."""
    plain: dict[str, Any]
    """The same result as plain data."""
    code: int
    """Exit code: 1 when the data would stop a run."""


def check_recipe(
    recipe: Recipe,
    *,
    against: Sequence[Path] = (),
    processes: int | None = None,
    everything: bool = False,
    records: int = BEGINNING,
) -> Checked:
    """Read all records and pictures of a recipe's data, of a stream the first `records`; find leaks to `against`."""
    check_data(recipe.data)
    recipe, streams = with_beginnings(recipe, records)
    parts = parts_of(recipe)
    shown, plain = _of_streams(streams)
    reports = {
        name: _check(name, sources, recipe, parts, decode=True, processes=processes)
        for name, sources in data_sets(recipe)
    }
    for name, report in reports.items():
        shown += [Text(f"data.{name}", style="bold"), *view_report(report, everything=everything)]
        plain[name] = _plain(report, findings(report))
    held_out: dict[str, dict[str, Fingerprint | None]] = {str(folder): _folder(folder) for folder in against}
    if "validation" in reports:
        held_out["data.validation"] = reports["validation"].images
    leaks: list[Finding] = []
    matches: list[Match] = []
    for name, marks in held_out.items():
        finding, pairs = leakage(reports["train"].images, marks, name=name)
        leaks, matches = [*leaks, finding], matches + pairs
    if "validation" in reports:
        leaks.append(repeated_records(reports["train"], reports["validation"]))
    if leaks:
        shown += [view_findings(leaks), view_matches(matches, everything=everything)]
        plain["leakage"] = {"findings": [item._asdict() for item in leaks], "pairs": [list(pair) for pair in matches]}
    return Checked(shown, plain, int(not all(report.ok for report in reports.values())))


def statistics_of(recipe: Recipe, *, processes: int | None = None, records: int = BEGINNING) -> Checked:
    """Statistics of a recipe's data; of pictures only the headers are read. See `check_recipe`."""
    check_data(recipe.data)
    recipe, streams = with_beginnings(recipe, records)
    parts = parts_of(recipe)
    shown, plain = _of_streams(streams)
    for name, sources in data_sets(recipe):
        report = _check(name, sources, recipe, parts, decode=False, processes=processes)
        shown += [Text(f"data.{name}", style="bold"), *view_statistics(report)]
        plain[name] = _plain(report, [])
        rates = {}
        for tokens in (recipe.data.pack_tokens, 4096, 8192) if recipe.objective == "sft" else ():
            if tokens and tokens >= report.max_length:
                packed = pack(range(report.usable), report.lengths, tokens=tokens)
                rates[tokens] = fill_rate(packed, report.lengths, tokens=tokens)
        plain[name]["packing_fill_rate"] = rates
        text = ", ".join(f"{rate:.1%} of rows of {tokens} tokens" for tokens, rate in rates.items())
        shown.append(Text(f"Packed, records would fill {text}." if text else ""))
        if bad := report.records - report.usable:
            shown.append(Text(f"{bad} records cannot be used and are not counted: see `mm-moslora data check`."))
    return Checked(shown, plain, 0)


def size_of(recipe: Recipe) -> tuple[DataSize, str]:
    """The size of an epoch of the recipe's training data, and a sentence on how it was found."""
    sources = recipe.data.train
    for source in sources:
        if source.path.startswith("hf:") or source.streaming or source.image_hosts:
            raise DataError(f"Records or images of {source.path} would be fetched to count them.")
    require_sources(sources)
    parts = parts_of(recipe)
    counts = [len(open_source(source)) for source in sources]
    reports = [
        _check(
            "data", [source if count <= COUNTED else replace(source, limit=COUNTED, limit_by="random", hold_out=0)],
            recipe, parts, decode=False, processes=1,
        )
        for source, count in zip(sources, counts, strict=True)
    ]  # fmt: skip
    usable = [report.usable / max(1, report.records) for report in reports]
    sizes = [round(count * share) for count, share in zip(counts, usable, strict=True)]
    weights = repeats_of(
        sizes, [source.weight for source in sources], [source.replay for source in sources],
        mixing=recipe.data.mixing if any(sizes) else "repeats", records=recipe.data.epoch_records,
    )  # fmt: skip
    samples = [weight * size for weight, size in zip(weights, sizes, strict=True)]
    if not (total := sum(samples)):
        raise DataError(f"No record of {sources[0].path} can be used: see `mm-moslora data check`.")

    def mean(name: str) -> float:
        """Per record of an epoch, of what a report counts over its usable records."""
        means = (getattr(report, name) / max(1, report.usable) for report in reports)
        return sum(number * each for number, each in zip(samples, means, strict=True)) / total

    read = sum(report.records for report in reports)
    how = "counted in all" if read == sum(counts) else f"estimated from a random {read:,} of"
    lost = read - sum(report.usable for report in reports)
    size = DataSize(
        samples=round(total), tokens=mean("tokens"), supervised=mean("supervised_tokens") / mean("tokens"),
        pictures=mean("pictures"),
    )  # fmt: skip
    return size, f"Size of the data: {how} {sum(counts):,} records; {lost:,} of those read cannot be used."


def data_sets(recipe: Recipe) -> list[tuple[str, list[SourceConfig]]]:
    """The sources of the training data, and of the validation data if there are any."""
    sets = [("train", recipe.data.train)]
    return [*sets, ("validation", recipe.data.held_out)] if recipe.data.held_out else sets


def with_beginnings(recipe: Recipe, records: int) -> tuple[Recipe, list[SourceConfig]]:
    """The recipe with the first records of its streams in place of these, and what these became."""
    if records < 1:
        raise DataError(f"records is {records}, expected 1 or more: the first ones of a stream without an end.")
    train = [beginning(source, records) for source in recipe.data.train]
    streams = [source for source, before in zip(train, recipe.data.train, strict=True) if before.endless]
    return replace(recipe, data=replace(recipe.data, train=train)), streams


def _of_streams(streams: Sequence[SourceConfig]) -> tuple[list[RenderableType], dict[str, Any]]:
    """How many records of each stream are looked at, on the console and as plain data."""
    shown: list[RenderableType] = []
    plain: list[dict[str, Any]] = []
    for source in streams:
        count, limit = len(open_source(source)), source.limit or 0
        of = "an unknown number; --records looks at more" if count == limit else "as many: these are all"
        shown.append(Text(f"{source.path} is a stream: its first {count:,} records are looked at, of {of}.", "yellow"))
        plain.append({"source": source.path, "records": count, "all": count < limit})
    return shown, {"streams": plain} if plain else {}


def _check(
    name: str, sources: list[SourceConfig], recipe: Recipe, parts: DataParts, *, decode: bool, processes: int | None
) -> CheckReport:  # fmt: skip
    with Progress(f"check {name}", 0, unit="record") as progress:
        return check(
            sources, parts.encoder, config=recipe.data,
            image_processing=parts.image_processing, decode=decode,
            processes=processes, objective=recipe.objective, on_progress=progress.of,
        )  # fmt: skip


def _folder(folder: Path) -> dict[str, Fingerprint | None]:
    """Perceptual hashes of the pictures of a folder; other files are ignored."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Name a folder of held-out pictures.")
    marks: dict[str, Fingerprint | None] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES:
            try:
                marks[str(path)] = fingerprint(open_image(path))
            except ImageError:
                continue
    return marks


def _plain(report: CheckReport, remarks: list[Finding]) -> dict[str, Any]:
    names = (
        "records", "usable", "text_only", "one_image", "several_images", "videos", "boxes", "answers",
        "context_answers", "weighed", "tools", "tokens",
        "supervised_tokens", "supervised_share", "refused", "dropped", "truncated", "thoughts", "dropped_thoughts",
        "special_text", "separator_text", "endless", "duplicates", "ok",
    )  # fmt: skip
    return {name: getattr(report, name) for name in names} | {
        "images": len(report.images), "bad": {code.value: count for code, count in report.bad.items()},
        "faults": [str(fault) for fault in report.faults], "lengths": length_percentiles(report),
        "histogram": report.histogram(), "repeated_ids": dict(report.repeated_ids.most_common()),
        "not_offered": dict(report.not_offered.most_common()),
        "findings": [item._asdict() for item in remarks],
    }  # fmt: skip


def parts_of(recipe: Recipe) -> DataParts:
    """Load them, with the form of thinking that the training data decide."""
    parts = load_parts(recipe.model, weights="none")
    files = open_sources(recipe.data.train, objective=recipe.objective)
    encoder, _ = settled(ConversationEncoder.of(parts), files, recipe.data.supervise)
    return DataParts(encoder, parts.image_processing)


def view_recipe(recipe: Recipe, *, start: int = 0, count: int = 3, records: int = BEGINNING) -> list[RenderableType]:
    """Training records with every token coloured by supervision; `start` counts over all of data.train, from 0."""
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
