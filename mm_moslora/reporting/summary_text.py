"""Verdicts and key figures of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm_moslora.reporting.run_data import EvaluationRow, RunData, SampleRow
from mm_moslora.reporting.verdicts import AGAINST, Difference, Mood, judge_tuning, score_text, unread_text
from mm_moslora.utils.text_format import format_seconds

EXPLAINED = {
    "tuned": "the model after tuning",
    "untuned": "the model before tuning, which does not know the form of the answers",
    "untuned_lenient": "before tuning, every answer that contains the right word counted as right",
    "wrong_image": "the tuned model with another item's picture",
    "blind": "the tuned model with a plain picture of the mean colour",
    "majority": "no model: always the most frequent answer",
    "best_answer": "no model: the most frequent answer to each question",
}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One key figure of the summary."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The conclusion from one task's rows, and whether it is good news."""

    task: str
    mood: Mood
    sentences: list[str]


def scale_of(rows: Sequence[EvaluationRow]) -> list[str]:
    """Marks of the axis of a task's bars, from 0 to `top_of`."""
    unit, top = rows[0].unit, top_of(rows)
    marks = [f"{top * share:.2g}" if unit else f"{100 * share:.0f}" for share in (0, 0.25, 0.5, 0.75, 1)]
    return [*marks[:-1], f"{unit} {marks[-1]}" if unit else f"{marks[-1]} %"]


def top_of(rows: Sequence[EvaluationRow]) -> float:
    """Upper end of a task's bars: all right, or the largest of other scores."""
    return max((row.score.high for row in rows), default=0.0) or 1.0 if rows[0].unit else 1.0


def format_count(count: float) -> str:
    """`134.5 M`, `1.2 k` or `17`."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            digits = 0 if count / limit >= 1000 else 1
            return f"{count / limit:.{digits}f} {suffix}"
    return f"{count:g}"


def progress(data: RunData) -> tuple[int | None, int | None]:
    """The last known step, and the total number of steps."""
    summary = data.summary
    logged = [record["step"] for record in data.metrics or () if isinstance(record.get("step"), int)]
    steps = [step for step in (*logged[-1:], summary.get("steps")) if isinstance(step, int)]
    total = summary.get("total_steps")
    return max(steps, default=0) or None, total if isinstance(total, int) else None


def standing(data: RunData) -> Verdict | None:
    """The state of an unfinished run in sentences; None for a finished one."""
    step, total = progress(data)
    at_step = (f" at step {step}" + (f" of {total}" if total else "")) if step else " before its first step"
    remedy = "The same command continues it from its last checkpoint."
    why = [f"{data.state.reason.rstrip('.')}."] if data.state.reason else []
    sentences = {
        "running": [f"This run is under way{f',{at_step}' if step else ''}.", *why],
        "stopped": [f"This run was stopped{at_step}.", remedy],
        "killed": [
            f"The processes of this run ended{at_step} without recording an end: they were killed, or the "
            "machine failed.",
            *why,
            remedy,
        ],
        "failed": [f"This run failed{at_step}.", *(why or ["The run folder records no reason."])],
    }.get(data.state.name)
    mood: Mood = "mixed" if data.state.name in ("running", "stopped") else "bad"
    return Verdict(task="", mood=mood, sentences=sentences) if sentences else None


def tasks(data: RunData) -> list[tuple[str, list[EvaluationRow]]]:
    """Evaluation rows by what they were measured on: tasks in the order of the file, largest question set first."""
    groups: dict[tuple[Any, ...], list[EvaluationRow]] = {}
    for row in data.evaluation:
        groups.setdefault(row.measured_on, []).append(row)
    names = headings([rows[0] for rows in groups.values()])
    first = list(dict.fromkeys(row.task for row in data.evaluation))
    ordered = sorted(groups.values(), key=lambda rows: (first.index(rows[0].task), -rows[0].score.n))
    return [(names[rows[0].measured_on], rows) for rows in ordered]


def headings(rows: Sequence[EvaluationRow]) -> dict[tuple[Any, ...], str]:
    """A heading per group of rows: the task, with further facts where they are needed to tell groups apart."""

    def parts(row: EvaluationRow) -> tuple[str, ...]:
        part = "" if row.selection == "all" else f", {row.selection} questions"
        return f"{row.task}{part}", f", {row.score.n} questions", f", {row.protocol}", f" [{row.subject[:8]}]"

    facts = {row.measured_on: parts(row) for row in rows}
    names = {key: part[0] for key, part in facts.items()}
    for number in (1, 2, 3):
        uses = Counter(names.values())
        more = {key: [facts[other][number] for other in names if names[other] == names[key]] for key in names}
        names = {
            key: name + facts[key][number] if uses[name] > 1 and len(set(more[key])) > 1 else name
            for key, name in names.items()
        }
    return names


def explained(row: EvaluationRow) -> str:
    """Description of a row, with the source of its answers; empty for an unknown name."""
    about = EXPLAINED.get(row.name, "")
    return f"{about}, learned from {_LEARNED.get(row.learned_from, row.learned_from)}" if row.learned_from else about


_LEARNED = {"training answers": "the training answers", "the evaluated set": "the evaluated set itself"}


def verdict(task: str, rows: list[EvaluationRow]) -> Verdict | None:
    """Whether tuning helped, by the rules of `mm_moslora.reporting.verdicts`; None without a tuned row."""
    by_name = {row.name: row for row in rows}
    tuned = by_name.get("tuned")
    if tuned is None:
        return None
    judgement = judge_tuning(differences(rows), pictures=tuned.pictures)
    conclusion, *evidence = judgement.sentences
    score, before, lenient = tuned.score, by_name.get("untuned"), by_name.get("untuned_lenient")
    unit = tuned.unit
    mean, low, high = (score_text(value, unit, named=False) for value in (score.mean, score.low, score.high))
    numbers = f"{unit} is {mean} on {score.n} held-out questions" if unit else (
        f"{mean} of {score.n} held-out questions are answered right"
    )  # fmt: skip
    numbers = f"After tuning, {numbers} (95 % interval {low} to {high})"
    if before is not None:
        numbers += f"; before tuning it was {score_text(before.score.mean, unit, named=False)}"
        if lenient is not None:
            shown = score_text(lenient.score.mean, unit, named=False)
            numbers += f", or {shown} if every answer that contains the right word counts"
    unread = [
        f"{row.label}: {text}."
        for row in rows
        if row is not tuned
        and row is not lenient
        and (text := unread_text(row.not_inferable, row.score.n - row.failed))
    ]
    sentences = [conclusion, f"{numbers}.", *evidence, *tuned.remarks, *unread]
    return Verdict(task=task, mood=judgement.mood, sentences=sentences)


def differences(rows: Sequence[EvaluationRow]) -> dict[str, Difference]:
    """The tuned row minus every other one."""
    # Where rows were not paired question by question, their intervals are subtracted, which is valid for any
    # correlation. The best answer per question is left out where it was learned from the evaluated set, since it knows
    # the answers.
    tuned = next(row for row in rows if row.name == "tuned")
    return {
        row.name: row.less
        or Difference.of_intervals(
            *((score.mean, score.low, score.high) for score in (tuned.score, row.score)),
            groups=min(tuned.score.n, row.score.n) or None, unit=tuned.unit,
        )
        for row in rows
        if row.name in AGAINST and (row.name, row.learned_from) != ("best_answer", "the evaluated set")
    }  # fmt: skip


def tiles(data: RunData) -> list[Tile]:
    """The key figures of the summary; unknown ones are left out."""
    figures = []
    for task, rows in tasks(data)[:2]:
        by_name = {row.name: row for row in rows}
        if "tuned" in by_name:
            score, unit = by_name["tuned"].score, by_name["tuned"].unit
            mean, low, high = (score_text(value, unit, named=False) for value in (score.mean, score.low, score.high))
            note = f"{low} to {high}"
            if "untuned" in by_name:
                before = by_name.get("untuned_lenient", by_name["untuned"])
                words = (
                    ", counting every answer that contains the right word" if before.name == "untuned_lenient" else ""
                )
                note += f"; before tuning {score_text(before.score.mean, unit, named=False)}{words}"
            label = f"{unit or 'Right answers'}{f', {task}' if task else ''}"
            figures.append(Tile(label=label, value=mean, note=note))
    total, trainable = parameters(data.summary)
    if total:
        figures.append(
            Tile(
                label="Trainable parameters",
                value=format_count(trainable),
                note=f"{100 * trainable / total:.2g} % of {format_count(total)}",
            )
        )
    seconds, stepping = training_seconds(data)
    counters = data.summary.get("counters") or {}
    if seconds:
        notes = [f"{format_count(counters['tokens'])} tokens"] if counters.get("tokens") else []
        if stepping < 0.95 * seconds:
            notes.append(f"{format_seconds(stepping)} of it in optimiser steps")
        if data.summary.get("seconds"):
            notes.append(f"whole run {format_seconds(float(data.summary['seconds']))}")
        figures.append(Tile(label="Training time", value=format_seconds(seconds), note=", ".join(notes)))
    if equal := int(counters.get("equal_rewards", 0)):
        note = f"of {data.summary.get('steps')}: all answers to each question had the same reward"
        figures.append(Tile(label="Steps that taught nothing", value=str(equal), note=note))
    if data.summary.get("memory_gib"):
        figures.append(
            Tile(label="Peak memory", value=f"{float(data.summary['memory_gib']):.2f} GiB", note="per process")
        )
    return figures


def parameters(summary: dict[str, Any]) -> tuple[int, int]:
    """Total and trainable parameters; zeros where the summary lacks them."""
    components = [item for item in summary.get("components") or [] if isinstance(item, dict)]
    return sum(int(c.get("total", 0)) for c in components), sum(int(c.get("trainable", 0)) for c in components)


def training_seconds(data: RunData) -> tuple[float, float]:
    """Seconds of training with saves, validations and waiting, and of optimiser steps alone; zeros if unknown."""
    counters = data.summary.get("counters") or {}
    return float(counters.get("wall_seconds", 0.0)), float(counters.get("seconds", 0.0))


def sample_kind(sample: SampleRow) -> str:
    """fixed, broken, right or wrong; correct or incorrect where nothing was asked before tuning; open (not scored)."""
    if sample.after_correct is None:
        return "open"
    if sample.before_correct is None:
        return "correct" if sample.after_correct else "incorrect"
    if sample.after_correct:
        return "right" if sample.before_correct else "fixed"
    return "broken" if sample.before_correct else "wrong"
