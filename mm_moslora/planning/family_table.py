"""`mm-moslora doctor --families`: a Markdown table of the image-text-to-text families of the installed transformers.

A family may hang or take all memory, so each of several is probed in a child process with a time limit.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mm_moslora import __version__
from mm_moslora.launch.child_processes import output_of, python_words
from mm_moslora.planning.model_doctor import family_findings
from mm_moslora.utils.errors import ConfigError, reason_of, suggestion
from mm_moslora.utils.files import read_json, replace_text
from mm_moslora.utils.untrusted_data import read_value

HEAD = (
    "| family | rows | conversations of a row | labels | logits | a step of MoSLoRA |",
    "|---|---|---|---|---|---|",
)


@dataclass(frozen=True, kw_only=True)
class FamilyRow:
    """One family of the table."""

    kind: str
    """Its `model_type`."""
    text: str
    """The row in Markdown."""
    wrong: bool = False
    """Whether it would train wrongly."""
    limit: float | None = None
    """Seconds after which its process was ended, so that more may find more; 0: it broke off; None: it was probed."""


def known_families(kinds: Sequence[str] = ()) -> list[str]:
    """The families to probe.

    Args:
        kinds: `model_type`s; none: all of `AutoModelForImageTextToText`.

    Raises:
        ConfigError: transformers has no such family.
    """
    known = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    for kind in kinds:
        if kind not in known:
            raise ConfigError(
                f"transformers {transformers.__version__} has no image-text-to-text family {kind!r}."
                f"{suggestion(kind, known)} Expected the model_type of a configuration, such as qwen3_vl."
            )
    return [*kinds] or known


def family_row(kind: str) -> FamilyRow:
    """Probe a family in this process.

    Args:
        kind: its `model_type`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            findings = family_findings(kind)
    except Exception as error:  # whatever a family's classes raise is the finding
        return _not_tried(kind, reason_of(error))
    cells = " | ".join(_cell(item.brief or item.detail) for item in findings)
    return FamilyRow(kind=kind, text=f"| `{kind}` | {cells} |", wrong=any(item.status == "bad" for item in findings))


def family_rows(kinds: Sequence[str], *, seconds: float, progress: Path | None = None) -> Iterator[FamilyRow]:
    """Probe families one after the other, each in a process of its own.

    Args:
        kinds: their `model_type`s.
        seconds: that one may take.
        progress: a JSON file that keeps the rows of these versions of the project and its libraries; its families are
            not probed again, but for those whose process broke off or had fewer seconds.

    Raises:
        ConfigError: `progress` is a file of another kind.
    """
    rows = {} if progress is None else _kept(progress)
    for kind in kinds:
        limit = rows[kind].limit if kind in rows else 0
        if limit is not None and limit < seconds:
            rows[kind] = _row_of_child(kind, seconds=seconds)
            if progress is not None:
                kept = {"versions": _versions(), "rows": [asdict(row) for row in rows.values()]}
                replace_text(progress, json.dumps(kept, indent=1))
        yield rows[kind]


def _kept(progress: Path) -> dict[str, FamilyRow]:
    if not progress.exists():
        return {}
    try:
        kept = read_json(progress, linked=True)
        if "versions" not in kept:  # an earlier form, of versions that are not known
            kept = {"versions": {}, "rows": kept["rows"]}
        rows = read_value(list[FamilyRow], kept["rows"], source="it", where="rows")
        return {row.kind: row for row in rows} if kept["versions"] == _versions() else {}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--progress is {str(progress)!r}, which does not hold rows of this table ({reason_of(error)}). Give a new "
            "file, or one that this command has written."
        ) from error


def _versions() -> dict[str, str]:
    """Of all that a row depends on."""
    return {"mm_moslora": __version__} | {name: version(name) for name in ("transformers", "torch", "peft")}


def _row_of_child(kind: str, *, seconds: float) -> FamilyRow:
    try:
        done = output_of(python_words("-m", "mm_moslora", "doctor", "--families", kind), seconds=seconds)
    except TimeoutError:
        return _not_tried(kind, f"it took more than {seconds:g} s (--limit)", limit=seconds)
    row = next((line for line in done.stdout.splitlines() if line.startswith(f"| `{kind}` |")), None)
    if row is None:
        reason = ([line for line in done.stderr.splitlines() if line.strip()] or [""])[-1]
        return _not_tried(kind, f"its process ended with {done.returncode}: {reason}", limit=0)
    return FamilyRow(kind=kind, text=row, wrong=done.returncode != 0)


def _not_tried(kind: str, reason: str, *, limit: float | None = None) -> FamilyRow:
    what = _cell(reason.removeprefix(f"No small model of {kind} can be built from its configuration: "))
    return FamilyRow(kind=kind, text=f"| `{kind}` | not tried: {what} | | | | |", limit=limit)


def _cell(text: str) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= 160 else f"{text[:157]}..."
