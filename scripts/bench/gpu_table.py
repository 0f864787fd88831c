"""The table of the GPU benchmark (`gpu.py`) from its rows, as Markdown, with predictions beside what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders import CONTENDERS
from harness import markdown

PREDICTIONS = Path(__file__).with_name("gpu_predictions.json")
MFU_TARGET = 0.45
"""Over the data sheet's peak."""
TARGETED = "llava-1.5-7b"
"""The shape that the targets are for, on an H100."""

Row = Mapping[str, Any]


def table(rows: Sequence[Row], predictions: Path) -> str:
    """Tables of all shapes and cards; of rows with one contender, shape and card the last one counts."""
    predicted: dict[str, Any] = json.loads(predictions.read_text())
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["card"]), {})[row["contender"]] = row
    parts = [part for (shape, card), found in groups.items() for part in _group(shape, card, found, predicted)]
    if not parts:
        return "There are no rows."
    return "\n\n".join([*parts, f"Predictions were made on {predicted['made']}: {predicted['basis']}."])


def _group(shape: str, card: str, by_contender: Mapping[str, Row], predicted: Row) -> list[str]:
    order = [contender.name for contender in CONTENDERS if contender.name in by_contender]
    steps = {name: by_contender[name] for name in order if "seconds" in by_contender[name]}
    decoding = {name: by_contender[name] for name in order if "decoding" in by_contender[name]}
    expected = predicted["shapes"].get(shape, {}) if predicted["card"] in card else {}
    parts = [f"### {shape} on {card}"]
    if steps:
        parts += [_steps(steps, expected), *_summary(steps, shape), _head(steps)]
    if decoding:
        parts.append(_decoding(decoding))
    failed = [
        f"- {name}: {part} failed, {row[part]['error']}"
        for name, row in steps.items()
        for part in ("gradients", "profile", "full")
        if "error" in row.get(part, {})
    ]
    failed += [
        f"- {name}: {'failed' if 'error' in by_contender[name] else 'left out'}, "
        f"{by_contender[name].get('error') or by_contender[name].get('left_out')}"
        for name in order
        if {"error", "left_out"} & by_contender[name].keys()
    ]
    return [*parts, *(["\n".join(failed)] if failed else [])]


def _steps(steps: Mapping[str, Row], expected: Row) -> str:
    head = (
        "contender", "s a step", "predicted", "tokens/s", "predicted", "MFU, data sheet", "predicted",
        "MFU, measured product", "full batch, tokens/s", "GiB", "micro-batches", "kernels", "busy",
        "gradients: median, worst", "time over `ours`",
    )  # fmt: skip
    return markdown(head, [_cells(name, row, expected.get(name, {}), steps.get("ours")) for name, row in steps.items()])


def _cells(name: str, row: Row, expected: Row, ours: Row | None) -> list[str]:
    full, profile, errors = row["full"], row["profile"], row.get("gradients", {})
    return [
        name,
        f"{row['seconds']:.3f}", _range(expected, "seconds", "{:.2f}"),
        f"{row['tokens_per_second']:,.0f}", _range(expected, "tokens_per_second", "{:,.0f}"),
        "" if (of_sheet := sheet_mfu(row)) is None else f"{of_sheet:.3f}", _range(expected, "mfu", "{:.2f}"),
        f"{row['mfu']:.3f}",
        f"{full['tokens_per_second']:,.0f}" if "seconds" in full else "failed",
        f"{row['peak_memory_gib']:.1f}", str(row["micro_batches"]),
        *(("failed", "") if "error" in profile else (f"{profile['kernels']:,}", f"{profile['busy']:.2f}")),
        f"{errors['median']:.1e}, {errors['worst']:.1e}" if "median" in errors else "failed" if errors else "",
        f"{row['seconds'] / ours['seconds']:.2f}" if ours else "",
    ]  # fmt: skip


def sheet_mfu(row: Row) -> float | None:
    """Useful MFU over the peak of the card's data sheet; None: it is not known. A row's is over a measured product."""
    from mm_moslora.training.metrics.gpu_specs import device_peak

    peak = device_peak(row["card"])
    return None if peak is None else row["mfu"] * row["peak_tflops"] * 1e12 / peak


def _range(expected: Row, name: str, form: str) -> str:
    value = expected.get(name)
    if value is None:
        return ""
    return " to ".join(form.format(one) for one in (value if isinstance(value, list) else [value]))


def _summary(steps: Mapping[str, Row], shape: str) -> list[str]:
    """What the targets are about, as far as both sides are there."""
    ours: Row = steps.get("ours", {})
    of_sheet, mfu = sheet_mfu(ours) if ours else None, ours.get("mfu")

    def over(name: str, *others: str) -> float | None:
        times = [steps[other]["seconds"] for other in others if other in steps]
        return steps[name]["seconds"] / min(times) if name in steps and times else None

    slower, dropout = over("ours", "hf-best", "hf-best-checkpointing"), over("ours-dropout", "ours")
    figures = [
        ("real tokens/s", ours.get("tokens_per_second"), ",.0f", ">= 15,000"),
        ("useful MFU, data sheet", of_sheet, ".3f", f">= {MFU_TARGET}"),
        # the same speed in another unit
        ("useful MFU, measured product", mfu, ".3f", f">= {MFU_TARGET * mfu / of_sheet:.2f}" if of_sheet else ""),
        ("time of the best peer over `ours`", slower and 1 / slower, ".2f", ">= 1.3"),
        ("dropout, share of a step", dropout and dropout - 1, ".3f", "<= 0.06"),
        ("MoSLoRA over LoRA", over("ours", "ours-lora"), ".3f", "<= 1.02"),
        ("MoSLoRA over LoRA, half the rank", over("ours-half-rank", "ours-lora-half-rank"), ".3f", "<= 1.02"),
        ("largest difference of first losses", _difference(steps), ".1e", "<= 5e-3"),
    ]
    targeted = shape == TARGETED
    lines = [
        (what, format(figure, form), *([target] if targeted else []))
        for what, figure, form, target in figures
        if figure is not None  # a side was measured, and the card is known
    ]
    head = ("", "measured", *(["target on an H100"] if targeted else []))
    return [markdown(head, lines)] if lines else []


def _difference(steps: Mapping[str, Row]) -> float | None:
    """Of the losses of the first step, relative, among contenders that compute the same one."""
    same = {contender.name for contender in CONTENDERS if not contender.dropout and not contender.half_rank}
    losses = [row["first_loss"] for name, row in steps.items() if name in same]
    return (max(losses) - min(losses)) / min(losses) if len(losses) > 1 else None


def _decoding(decoding: Mapping[str, Row]) -> str:
    sizes = list(next(iter(decoding.values()))["decoding"])
    lines = []
    for name, row in decoding.items():
        lines.append([name, *(_speed(row["decoding"].get(size, {})) for size in sizes)])
    return markdown(("decoding: tokens/s, s to the first token", *(f"batch {size}" for size in sizes)), lines)


def _speed(one: Row) -> str:
    if "seconds" not in one:
        return str(one.get("error", ""))
    return f"{one['tokens_per_second']:,.0f}, {one['first_token_seconds']:.3f}"


def _head(steps: Mapping[str, Row]) -> str:
    """Ceilings, dates and versions."""
    peaks, copies = ([row[name] for row in steps.values()] for name in ("peak_tflops", "copy_tbs"))
    versions: dict[str, set[str]] = {}
    for row in steps.values():
        for package, version in row["versions"].items():
            versions.setdefault(package, set()).add(str(version))
    named = ", ".join(f"{package} {' or '.join(sorted(found))}" for package, found in versions.items())
    dates = sorted(row["date"][:10] for row in steps.values())
    return (
        f"Product peak {min(peaks):.4g} to {max(peaks):.4g} TFLOP/s, copy {min(copies):.3g} to {max(copies):.3g} TB/s. "
        f"{dates[0]} to {dates[-1]}. {named}."
    )
