"""MMStar: lmms-eval's unweighted mean of sub-categories."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from mm_moslora_eval.scoring.estimates import Ratio, value_of
from mm_moslora_eval.scoring.rule_forms import AggregationFacts
from mm_moslora_eval.scoring.scored_sample import Samples, Summed


def _within(keys: Sequence[Hashable], values: Sequence[float]) -> list[Ratio]:
    """The mean of the values of each key, all of which weigh equally."""
    names, ratios = list(dict.fromkeys(keys)), []
    for name in names:
        among = [float(key == name) for key in keys]
        right = [value * inside for value, inside in zip(values, among, strict=True)]
        ratios.append(Ratio(top=right, bottom=among) * (1 / len(names)))
    return ratios


def macro(samples: Samples) -> Summed:
    """MMStar in lmms-eval: unweighted mean of the means of the second-level categories; the same of each category."""
    names = [sample.document.category or "" for sample in samples]
    parts = [sample.document.extra.get("l2_category", name) for sample, name in zip(samples, names, strict=True)]
    whole = _within(parts, [sample.score for sample in samples])
    metrics = {"average": value_of(whole)}
    for category in dict.fromkeys(names):
        members = [number for number, name in enumerate(names) if name == category]
        ratios = _within([parts[number] for number in members], [samples[number].score for number in members])
        metrics[category] = value_of(ratios)
    return Summed(ratios=whole, metrics=metrics)


AGGREGATIONS: dict[str, Callable[..., Summed]] = {"mmstar_macro": macro}
FACTS = {"mmstar_macro": AggregationFacts(score="macro average")}
