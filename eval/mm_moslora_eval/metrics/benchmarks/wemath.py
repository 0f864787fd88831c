"""We-Math's value of a problem, which has two or three steps and a last question that needs them all."""

from __future__ import annotations

from collections.abc import Sequence


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
