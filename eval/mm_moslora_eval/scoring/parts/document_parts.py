"""Pages as Markdown: OmniDocBench."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mm_moslora.utils.untrusted_data import StrictJsonError, parse_object
from mm_moslora_eval.metrics.documents.omnidocbench import page_numbers
from mm_moslora_eval.metrics.general.timed_calls import PROCESS
from mm_moslora_eval.scoring.estimates import Ratio
from mm_moslora_eval.scoring.scored_sample import Numbers, Samples, Summed
from mm_moslora_eval.sources.document import Document

PAGE_SECONDS = 120.0
"""Time for one page."""
Version = Literal["1.0", "1.5"]
_EDITS = ("text", "formula", "table", "order")
_TEDS = ("teds", "teds_structure")


def omnidocbench_blocks(
    text: str,
    document: Document,
    *,
    version: Version,
    match: Literal["quick", "simple", "no_split"] = "quick",
    seconds: float = PAGE_SECONDS,
) -> str:
    """OmniDocBench: what is compared of a page, in numbers: edits and lengths of texts, formulas, tables and order of
    reading, and TEDS of every table. `match` is the matching of blocks; the other two exist in version 1.0.
    A page that takes longer than `seconds` has no score and is counted.
    """
    if match != "quick" and version != "1.0":
        raise ValueError(f"match {match} exists in version 1.0 alone")
    numbers = PROCESS.result(
        page_numbers, seconds=seconds, annotation=parse_object(document.answers[0]), answer=text,
        old=version == "1.0", match=match,
    )  # fmt: skip
    return json.dumps(numbers)


def omnidocbench_page(parsed: str, document: Document, *, version: Version) -> float:
    """OmniDocBench: the mean of what a page has of the parts of the whole score (`omnidocbench`), or 1 without any."""
    shares = _shares(parse_object(parsed))
    parts = [1 - shares[name] for name in _EDITS if name in shares] if version == "1.0" else _good(shares)
    return min(1.0, max(0.0, sum(parts) / len(parts))) if parts else 1.0


def _good(shares: Mapping[str, float]) -> list[float]:
    """Of version 1.5 the parts of the whole score that need no renderer."""
    return [value for name, value in (("text", 1 - shares.get("text", 0.0)), ("teds", shares.get("teds", 0.0)))
            if name in shares]  # fmt: skip


def _shares(numbers: Mapping[str, Any]) -> Numbers:
    """Of a page, as far as it has them: edits as shares of lengths, and the mean TEDS."""
    edits = {name: numbers[name][0] / numbers[name][1] for name in _EDITS if numbers[name][1]}
    return edits | {name: sum(numbers[name]) / len(numbers[name]) for name in _TEDS if numbers[name]}


@functools.lru_cache(maxsize=4096)
def _nothing(annotation: str, old: bool) -> str:
    """The numbers of a page without an answer; a faulty reference has no parts, as its answers no score."""
    try:
        return json.dumps(page_numbers(parse_object(annotation), "", old=old))
    except (StrictJsonError, KeyError, TypeError, AttributeError, ValueError):
        return json.dumps(page_numbers({"layout_dets": []}, "", old=old))


@functools.lru_cache(maxsize=4096)
def _attributes(annotation: str) -> dict[str, str]:
    """Attributes of a page: its language, its kind (`data_source`), its layout."""
    info = parse_object(annotation).get("page_info")
    found = info.get("page_attribute") if isinstance(info, dict) else None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


_LANGUAGES = {"english": "en", "simplified_chinese": "zh"}
_SHOWN = {"language": (*_EDITS, *_TEDS), "data_source": ("text",), "layout": ("order",)}
"""Attribute of a page -> what is shown by it, as in the source's tables."""


def omnidocbench(samples: Samples, *, version: Version) -> Summed:
    """OmniDocBench: of version 1.0, 1 less the mean of `overall_edit_en` and `overall_edit_zh`, which are means of the
    edit distances of texts, formulas, tables and order; of 1.5, `overall_without_formulas`, the mean of 1 less the edit
    distance of texts and TEDS, since its own score has CDM in it, which needs a renderer. Pages weigh alike.
    """
    annotations = ["".join(sample.document.answers[:1]) for sample in samples]
    parsed = [
        sample.parsed or _nothing(annotation, version == "1.0")
        for sample, annotation in zip(samples, annotations, strict=True)
    ]
    shares = [_shares(parse_object(text)) for text in parsed]
    attributes = [_attributes(annotation) for annotation in annotations]
    metrics = {_name(part): _mean(shares, part) for part in (*_EDITS, *_TEDS) if any(part in page for page in shares)}
    for attribute, parts in _SHOWN.items():
        for value in sorted({page[attribute] for page in attributes if attribute in page}):
            inside = [page for page, own in zip(shares, attributes, strict=True) if own.get(attribute) == value]
            found = [part for part in parts if any(part in page for page in inside)]
            metrics |= {f"{_name(part)}_{value}": _mean(inside, part) for part in found}
    if version == "1.5":
        ratios = _equal_parts([_ratio(shares, part, good=part == "teds") for part in ("text", "teds")])
        metrics["overall_without_formulas"] = sum(ratio.values()[0] for ratio in ratios)
        return Summed(ratios=ratios, metrics=metrics)
    languages = []
    for language, short in _LANGUAGES.items():
        of_it = [page if own.get("language") == language else {} for page, own in zip(shares, attributes, strict=True)]
        ratios = _equal_parts([_ratio(of_it, part, good=False) for part in _EDITS])
        if ratios:
            languages.append(ratios)
            metrics[f"overall_edit_{short}"] = 1 - sum(ratio.values()[0] for ratio in ratios)
    return Summed(ratios=[ratio * (1 / len(languages)) for ratios in languages for ratio in ratios], metrics=metrics)


def _name(part: str) -> str:
    return part if part in _TEDS else f"{part}_edit"


def _mean(pages: Sequence[Mapping[str, float]], part: str) -> float:
    values = [page[part] for page in pages if part in page]
    return sum(values) / len(values)


def _ratio(pages: Sequence[Mapping[str, float]], part: str, *, good: bool) -> Ratio:
    """The mean of a part over the pages that have it, such that more is better."""
    top = [(page[part] if good else 1 - page[part]) if part in page else 0.0 for page in pages]
    return Ratio(top=top, bottom=[float(part in page) for page in pages])


def _equal_parts(ratios: Sequence[Ratio]) -> list[Ratio]:
    """Those that some page has, with equal weights."""
    found = [ratio for ratio in ratios if any(ratio.bottom)]
    return [ratio * (1 / len(found)) for ratio in found]


EXTRACTORS: dict[str, Callable[..., str]] = {"omnidocbench": omnidocbench_blocks}
METRICS: dict[str, Callable[..., float]] = {"omnidocbench": omnidocbench_page}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {"omnidocbench": omnidocbench}
