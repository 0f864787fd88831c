"""SimpleVQA: lmms-eval's comparison, and attempts beside right answers."""

from __future__ import annotations

from collections.abc import Callable

from mm_moslora_eval.metrics.vqa_accuracy import normalize_evalai
from mm_moslora_eval.scoring.estimates import mean_of
from mm_moslora_eval.scoring.named_parts import Metric
from mm_moslora_eval.scoring.rule_forms import best_of
from mm_moslora_eval.scoring.scored_sample import Samples, Summed


def exact_evalai(text: str, reference: str) -> float:
    """lmms-eval for SimpleVQA: equal after EvalAI's normalisation of both sides."""
    return float(normalize_evalai(text) == normalize_evalai(reference))


def attempts(samples: Samples, *, none: tuple[str, ...]) -> Summed:
    """The share of right answers; beside it those that a judge's replies in `none` call no attempt, the share that is
    right among the other ones, and F1, the harmonic mean of both shares (SimpleVQA)."""
    right, total = sum(sample.score == 1.0 for sample in samples), len(samples) or 1
    without = {reply.casefold() for reply in none}
    tried = sum(not sample.failed and sample.parsed.strip().rstrip(".").casefold() not in without for sample in samples)
    shares = {"not_attempted": 1 - tried / total, "correct_given_attempted": right / tried if tried else 0.0}
    given, of_all = shares["correct_given_attempted"], right / total
    shares["f1"] = 2 * given * of_all / (given + of_all) if given + of_all else 0.0
    known = all(sample.judged for sample in samples)
    return Summed(ratios=[mean_of([sample.score for sample in samples])], metrics=shares if known else {})


METRICS: dict[str, Metric] = {"simplevqa_lmms_eval": best_of(exact_evalai)}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {"simplevqa_attempts": attempts}
