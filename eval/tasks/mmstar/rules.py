"""MMStar: lmms-eval's unweighted mean of sub-categories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

from mm_moslora_eval.scoring.estimates import Ratio
from mm_moslora_eval.scoring.rule_forms import AggregationFacts
from mm_moslora_eval.scoring.scored_sample import Samples, Summed


def macro_average(scores: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """MMStar in lmms-eval: per category and for `average`, the unweighted mean of the sub-categories' means.

    Args:
        scores: (category, sub-category, score) of each question.
    """
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for category, sub_category, score in scores:
        groups[category][sub_category].append(score)
        groups["average"][sub_category].append(score)
    return {
        name: sum(sum(values) / len(values) for values in members.values()) / len(members)
        for name, members in groups.items()
    }


def _within(keys: Sequence[Hashable], values: Sequence[float]) -> list[Ratio]:
    """The mean of the values of each key, all of which weigh equally."""
    names, ratios = list(dict.fromkeys(keys)), []
    for name in names:
        among = [float(key == name) for key in keys]
        right = [value * inside for value, inside in zip(values, among, strict=True)]
        ratios.append(Ratio(top=right, bottom=among) * (1 / len(names)))
    return ratios


def macro(samples: Samples) -> Summed:
    """MMStar in lmms-eval: unweighted mean of the means of the second-level categories."""
    names = [sample.document.category or "" for sample in samples]
    parts = [sample.document.extra.get("l2_category", name) for sample, name in zip(samples, names, strict=True)]
    scores = [sample.score for sample in samples]
    return Summed(ratios=_within(parts, scores), metrics=macro_average(zip(names, parts, scores, strict=True)))


AGGREGATIONS: dict[str, Callable[..., Summed]] = {"mmstar_macro": macro}
FACTS = {"mmstar_macro": AggregationFacts(score="macro average")}
