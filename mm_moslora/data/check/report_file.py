"""A report of checked data as plain data, so that the reports of shards can be added up in another process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from mm_moslora.data.check.record_check import CheckReport
from mm_moslora.data.images.perceptual_hash import Fingerprint
from mm_moslora.data.record_faults import Code, plain_fault, read_fault
from mm_moslora.utils.errors import DataError

_KEYS: Mapping[str, Callable[[Any], Any]] = {
    "bad": Code, "contents": bytes.fromhex, "sizes": tuple, "endings": tuple, "turns": int,
}  # fmt: skip
"""How the keys of counters are read that are no texts."""


def plain_report(report: CheckReport) -> dict[str, Any]:
    """The report as JSON-like data, without its form of thinking, which follows from the endings."""
    data = {item.name: getattr(report, item.name) for item in fields(report) if item.name != "form"}
    for name, value in data.items():
        if isinstance(value, Counter):
            data[name] = [[key.hex() if isinstance(key, bytes) else key, count] for key, count in value.items()]
    return data | {"faults": [plain_fault(fault) for fault in report.faults]}


def read_report(data: Any, *, source: str) -> CheckReport:
    """The inverse of `plain_report`.

    Args:
        data: plain data.
        source: of the data, for messages.

    Raises:
        DataError: they are no report.
    """
    report = CheckReport(sources=[], max_length=0, max_bad_share=0.0)
    try:
        for item in fields(report):
            empty = getattr(report, item.name)
            if isinstance(empty, Counter):
                key = _KEYS.get(item.name, str)
                setattr(report, item.name, Counter({key(name): int(count) for name, count in data[item.name]}))
            elif item.name != "form":
                setattr(report, item.name, type(empty)(data[item.name]))
        report.lengths = [int(length) for length in report.lengths]
        report.faults = [read_fault(fault) for fault in data["faults"]]
        report.images = {name: _mark(mark) for name, mark in data["images"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{source} is damaged ({type(error).__name__}: {error}). Repeat this shard.") from error
    return report


def _mark(value: Any) -> Fingerprint | None:
    if value is None:
        return None
    gradient, (red, green, blue) = value
    return Fingerprint(int(gradient), (int(red), int(green), int(blue)))
