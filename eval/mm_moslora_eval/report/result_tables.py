"""Results and comparisons as text for a terminal. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mm_moslora.reporting.verdicts import amount_text, between, resting_on, score_text
from mm_moslora.utils.text_format import aligned

if TYPE_CHECKING:
    from mm_moslora_eval.run.paired_comparison import PairedComparison
    from mm_moslora_eval.scoring.task_result import TaskResult


def comparison_text(result: PairedComparison) -> str:
    """A comparison as readable text."""
    score, estimate = result.score, result.score.estimate
    lines = [
        f"{result.task}: A {score_text(score.a, score.unit)}, B {score_text(score.b, score.unit)}. "
        f"{between(score.as_difference)}: {score.as_difference.points}, p {estimate.p_value:.3g}.",
        f"A wins {score.wins}, B wins {score.losses}, equal {score.ties} of {score.questions}; sign test p "
        f"{score.sign_p:.3g}.",
        resting_on(estimate.n, estimate.clusters, estimate.groups)
        + (
            f" A true difference of {amount_text(estimate.detectable, score.unit)} is detected with 80 % power."
            if estimate.stderr > 0
            else " They all differ by the same amount; the interval bounds the share of other differences."
            if estimate.clusters > 1
            else ""
        ),
    ]
    lines += [result.caution] if result.caution else []
    lines += result.remarks
    lines += [result.nats.text] if result.nats is not None else []
    if max(len(score.seeds_a), len(score.seeds_b)) > 1:
        a, b = (", ".join(score_text(value, score.unit) for value in seeds) for seeds in (score.seeds_a, score.seeds_b))
        lines.append(
            f"Seeds: A {a}; B {b}. Every sample counts with its mean over the seeds; the spread between seeds is "
            f"{amount_text(result.seed_spread, score.unit)}."
        )
    return "\n".join(lines)


def table(results: Sequence[TaskResult]) -> str:
    """The results as an aligned table, followed by remarks on the numbers."""
    from mm_moslora_eval.report.evaluation_page import names_of
    from mm_moslora_eval.scoring.score_remarks import beside

    rows = []
    names = names_of(results)
    nats = any("nats" in result.likelihood for result in results)
    for name, result in zip(names, results, strict=True):
        counts, likelihood = result.counts, result.likelihood
        cells = ["unscored", "-", "-"]
        if not math.isnan(result.score):
            cells = [f"{result.score:.4f}", f"{result.stderr:.4f}", f"{result.low:.4f} to {result.high:.4f}"]
        if nats:
            stderr = likelihood.get("stderr")
            error = " ± -" if stderr is None or math.isnan(stderr) else f" ± {stderr:.4f}"
            cells.append(f"{likelihood['nats']:.4f}{error}" if "nats" in likelihood else "-")
        numbers = (result.n, counts.failed, counts.not_inferable, counts.truncated)
        rows.append((name, result.mode, *cells, *map(str, numbers)))
    measures = ["score", "stderr", "95 %", *(["nats"] if nats else [])]
    head = ("task", "images", *measures, "n", "failed", "not inferable", "truncated")
    notes = []
    for name, result in zip(names, results, strict=True):
        unscored, odd = result.about.get("unscored"), _odd_count(result)
        learned = result.about.get("learned_from")
        source = f"learned from {learned}." if learned else ""
        silent = f"no likelihood: {result.likelihood['none']}." if "none" in result.likelihood else ""
        rests = _basis(result) if result.folder else ""
        texts = (*result.remarks, unscored, odd, source, silent, rests, *beside(result.about))
        notes += [f"{name}, {result.mode}: {text}" for text in texts if text]
    return "\n".join([*aligned(head, rows), *notes])


def _odd_count(result: TaskResult) -> str:
    """A note if the data is not the whole benchmark, independent of --limit."""
    rows, expected = result.about.get("data", {}).get("rows"), result.about.get("expected_count")
    if expected is None or rows in (None, expected):
        return ""
    doubt = " (an unverified number)" if "expected_count" in result.about.get("unverified", ()) else ""
    return f"the data holds {rows} documents, the full set has {expected}{doubt}."


def _basis(result: TaskResult) -> str:
    """A note where the interval rests on fewer pictures than documents."""
    if not result.scored or result.clusters is None or result.groups is None or result.clusters == result.n:
        return ""
    return resting_on(result.n, result.clusters, result.groups)
