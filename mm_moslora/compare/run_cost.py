"""The cost of a comparison by arm, from its finished runs and from the first steps of others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from mm_moslora.compare.comparison_cell import CellRun, metrics
from mm_moslora.compare.comparison_plan import Outcome
from mm_moslora.reporting.run_data import Component
from mm_moslora.utils.files import read_json
from mm_moslora.utils.text_format import format_seconds
from mm_moslora.utils.untrusted_data import build_known

PROBE_STEPS = 3
"""Steps of a run that estimate its speed."""


@dataclass(frozen=True, kw_only=True)
class ArmCost:
    """The cost of an arm's missing runs."""

    arm: str
    runs: int
    """Missing runs."""
    trainable: int = 0
    step_seconds: float = math.nan
    steps: int = 0
    """Optimiser steps of a run."""
    run_seconds: float = math.nan
    """Seconds of a run: loading, training and measuring if one has finished, else training alone."""
    memory_gib: float = math.nan
    finished: bool = False
    """Whether a run has finished."""
    problem: str = ""
    """Reason why its first steps ended early."""

    @property
    def seconds(self) -> float:
        """Seconds of all missing runs."""
        return self.run_seconds * self.runs if self.runs else 0.0


def cost_of(arm: str, runs: int, outcomes: Sequence[Outcome], probe: CellRun | None) -> ArmCost:
    """The cost of an arm's missing runs, from its ended runs; from a probe of a few steps where none has finished."""
    done = [outcome for outcome in outcomes if outcome.status == "ok"]
    if done:
        return ArmCost(
            arm=arm, runs=runs, trainable=done[0].trainable, steps=done[0].steps, finished=True,
            step_seconds=median(outcome.step_seconds for outcome in done),
            run_seconds=fmean(outcome.total_seconds for outcome in done),
            memory_gib=max(outcome.memory_gib for outcome in done),
        )  # fmt: skip
    unknown = ArmCost(arm=arm, runs=runs)
    if probe is None:
        return unknown
    try:
        rows = [row for row in metrics(probe.run_folder) if "step_seconds" in row]
        if len(rows) < PROBE_STEPS:
            return unknown
        last, each = rows[-1], median(row["step_seconds"] for row in rows)
        steps = probe.recipe.train.total_steps(last["step"] / last["epoch"])
        parts = read_json(probe.run_folder / "summary.json")["components"]
        return replace(
            unknown, trainable=sum(build_known(Component, part, source="it").trainable for part in parts), steps=steps,
            step_seconds=each, run_seconds=each * steps, memory_gib=float(last["memory_gib"]),
        )  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        return replace(unknown, problem=f"{probe.run_folder} is damaged ({error})")


def cost_table(costs: Sequence[ArmCost]) -> list[str]:
    """The costs as lines of text, with the sum below."""
    heads = ("arm", "trainable", "s a step", "steps", "min a run", "GiB", "runs", "hours")
    rows = [_cells(cost) for cost in costs]
    total = math.fsum(cost.seconds for cost in costs if not math.isnan(cost.seconds))
    rows.append(("all", "", "", "", "", "", str(sum(cost.runs for cost in costs)), f"{total / 3600:.2f}"))
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = [
        "  ".join(text.ljust(width) if column == 0 else text.rjust(width) for column, (text, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in (heads, *rows))
    ]
    unknown = [f"{cost.arm}: {cost.problem or 'shorter than the first steps'}" for cost in costs if _unknown(cost)]
    if unknown:
        lines.append("Not in the sum: " + "; ".join(unknown))
    if any(not cost.finished and not _unknown(cost) for cost in costs):
        lines.append("Where no run has finished, minutes are of training alone, without loading and measuring.")
    return lines


def _unknown(cost: ArmCost) -> bool:
    return bool(cost.runs) and math.isnan(cost.run_seconds)


def _cells(cost: ArmCost) -> tuple[str, ...]:
    def shown(value: float, form: str) -> str:
        return "" if math.isnan(value) else format(value, form)

    return (
        cost.arm, f"{cost.trainable:,}" if cost.trainable else "", shown(cost.step_seconds, ".3g"),
        str(cost.steps or ""), shown(cost.run_seconds / 60, ".2f"), shown(cost.memory_gib, ".1f"), str(cost.runs),
        shown(cost.seconds / 3600, ".2f"),
    )  # fmt: skip


def cost_line(cost: ArmCost) -> str:
    """The cost of all runs of a comparison, estimated from the first steps of its first run."""
    return (
        f"Cost: {cost.step_seconds:.2f} s a step, {cost.steps} steps a run, {cost.runs} runs: about "
        f"{format_seconds(cost.seconds)} of training in all (and loading and measuring), {cost.memory_gib:.1f} GiB a "
        f"run, measured on {cost.arm}."
    )
