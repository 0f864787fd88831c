"""We-Math: VLMEvalKit's letters, and the value of a problem, which has two or three steps and a last question."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from mm_moslora_eval.scoring.estimates import Ratio
from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.parts.grouped_scores import values_of
from mm_moslora_eval.scoring.rule_forms import of_text
from mm_moslora_eval.scoring.scored_sample import Samples, Summed


def wemath_vlmevalkit(text: str) -> str:
    """VLMEvalKit for We-Math without a judge: the first sign behind the last `Answer`, if it is from A to H."""
    tail = re.sub(r"[<>:.]", "", text.split("Answer")[-1].strip()).strip()
    return tail[:1] if tail[:1] in tuple("ABCDEFGH") else ""


def problem_value(steps: Sequence[bool], last: bool, *, strict: bool) -> float:
    """1 for mastery, 0.5 where the steps are right and the last question is not (inadequate generalisation), else 0.

    The source counts the same as 1 less the shares of insufficient knowledge and rote memorisation, and less half of
    inadequate generalisation.

    Args:
        steps: whether each step is right.
        last: whether the last question is.
        strict: all steps must be right for mastery; otherwise one.
    """
    if last:
        return float(all(steps) if strict else any(steps))
    return 0.5 if all(steps) else 0.0


def wemath(samples: Samples, *, problem: str = "ID", step: str = "key", strict: bool = True) -> Summed:
    """We-Math: a problem counts 1 with its last question and all steps right, 0.5 with the steps alone, else 0.

    With `strict: false` one right step beside the right last question is enough.
    """
    names = [name for (name,) in values_of(samples, (problem,), named="wemath")]
    steps = [name for (name,) in values_of(samples, (step,), named="wemath")]
    members: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        members[name].append(number)
    right = [sample.score == 1.0 for sample in samples]
    whole = {name: _parts(numbers, steps, right) for name, numbers in members.items()}
    top, bottom = [0.0] * len(names), [0.0] * len(names)
    for name, numbers in members.items():
        value = problem_value(*whole[name], strict=strict)
        for number in numbers:
            top[number], bottom[number] = value / len(numbers), 1 / len(numbers)
    other = [problem_value(*parts, strict=not strict) for parts in whole.values()]
    metrics = {"loose" if strict else "strict": sum(other) / len(other) if other else 0.0}
    return Summed(ratios=[Ratio(top=top, bottom=bottom)], metrics=metrics, units=names)


def _parts(numbers: Sequence[int], steps: Sequence[str], right: Sequence[bool]) -> tuple[list[bool], bool]:
    """Which steps of a problem are right, and whether its last question is."""
    last = [number for number in numbers if steps[number].endswith("multi")]
    return [right[number] for number in numbers if number not in last], any(right[number] for number in last)


EXTRACTORS: dict[str, Extractor] = {"wemath_vlmevalkit": of_text(wemath_vlmevalkit)}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {"wemath": wemath}
