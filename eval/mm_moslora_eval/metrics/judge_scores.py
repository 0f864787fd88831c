"""Parses a judge's replies and aggregates judged scores: MM-Vet and LLaVA-Bench."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from mm_moslora_eval.metrics.metric_text import plain_number

MMVET_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
UNPARSED = (-1.0, -1.0)
"""LLaVA-Bench's mark of a reply without two scores."""


def mmvet_grade(reply: str) -> float | None:
    """The grade in [0, 1] if the reply consists of nothing else, or None."""
    value = plain_number(reply)
    return value if value is not None and 0 <= value <= 1 else None


def mmvet_grade_vlmevalkit(reply: str) -> float | None:
    """VLMEvalKit's rule: text that `float` parses to a value in [0, 1]. Unlike there, `nan` is not a grade."""
    try:
        grade = float(reply)
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def mmvet_grade_lmms_eval(reply: str) -> float | None:
    """lmms-eval's rule: the same for the first word of the reply."""
    return mmvet_grade_vlmevalkit(reply.strip().split(" ")[0])


def mmvet_table_row(question: str, reference: str, prediction: str) -> str:
    """The last line of MM-Vet's table for the judge, which continues it with the grade."""
    spaced = reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return " | ".join([question, spaced, prediction, ""])


def mmvet_scores(grades: Iterable[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """Mean grade times 100 by capability and by combination, from pairs of capabilities (with commas) and grade."""
    capabilities: dict[str, list[float]] = defaultdict(list)
    combinations: dict[str, list[float]] = defaultdict(list)
    for category, grade in grades:
        # By substring, as in the source: no capability's name is a part of another's.
        for name in (*(name for name in MMVET_CAPABILITIES if name in category), "Overall"):
            capabilities[name].append(grade)
        for name in (category.replace(",", "_"), "Overall"):
            combinations[name].append(grade)
    return {"by_capability": _percent(capabilities), "by_integration": _percent(combinations)}


def mmvet_scores_vlmevalkit(grades: Iterable[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """VLMEvalKit's table: one tally serves both halves, so a question with a single capability counts twice."""
    tally: dict[str, list[float]] = defaultdict(list)
    combinations = []
    for category, grade in grades:
        names = [name for name in MMVET_CAPABILITIES if name in category]
        combinations.append(category.replace(",", "_"))
        for name in (*names, "Overall", combinations[-1]):
            tally[name].append(grade)
    means = _percent(tally)
    return {
        "by_capability": {name: means[name] for name in (*MMVET_CAPABILITIES, "Overall") if name in means},
        "by_integration": {name: means[name] for name in dict.fromkeys((*combinations, "Overall"))},
    }


def _percent(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) * 100 for name, values in groups.items()}


def llavabench_scores(reply: str) -> tuple[float, float]:
    """LLaVA's rule: the first line holds exactly two numbers (reference, model), else `UNPARSED`."""
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return UNPARSED
    try:
        reference, model = float(parts[0]), float(parts[1])
    except ValueError:
        return UNPARSED
    return (reference, model) if math.isfinite(reference + model) else UNPARSED


def llavabench_scores_lmms_eval(reply: str) -> tuple[float, float]:
    """lmms-eval's rule: the first two numbers of the first line, with any text between them."""
    line = reply.strip().split("\n")[0]
    numbers = re.findall(r"-?\d+(?:\.\d+)?", line)
    return (float(numbers[0]), float(numbers[1])) if len(numbers) >= 2 else UNPARSED


def ratings_within(reply: str, *, read: Callable[[str], tuple[float, float]]) -> tuple[float, float] | None:
    """The two ratings of a reply if both are from 1 to 10, as the prompt asks for, or None."""
    ratings = read(reply)
    return ratings if all(1 <= rating <= 10 for rating in ratings) else None


def llavabench_summary(scores: Iterable[tuple[str, float, float]]) -> dict[str, tuple[float, float, float]]:
    """Per category and for `all`: (relative score in percent, reference mean x 10, model mean x 10), rounded to 0.1.

    Args:
        scores: (category, score of the reference answer, score of the model's answer).
    """
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for category, reference, model in scores:
        groups[category].append((reference, model))
        groups["all"].append((reference, model))
    summary = {}
    for name, pairs in sorted(groups.items()):
        reference_mean, model_mean = (round(sum(column) / len(pairs), 3) for column in zip(*pairs, strict=True))
        relative = round(model_mean / reference_mean * 100, 1) if reference_mean else float("nan")
        summary[name] = (relative, round(reference_mean * 10, 1), round(model_mean * 10, 1))
    return summary
