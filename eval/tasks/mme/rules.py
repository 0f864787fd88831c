"""MME: lmms-eval's reader, and the sums of acc and acc+ of its sub-tasks."""

from __future__ import annotations

from collections.abc import Callable

from mm_moslora_eval.scoring.estimates import Ratio, value_of
from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.parts.grouped_scores import all_right
from mm_moslora_eval.scoring.rule_forms import AggregationFacts, of_text
from mm_moslora_eval.scoring.scored_sample import Samples, Scored, Summed


def mme_lmms_eval(text: str) -> str:
    """lmms-eval for MME: `yes` or `no` within the first four characters (so `yesterday` is a yes), or y and n."""
    answer = text.lower().strip().replace(".", "")
    if answer in ("yes", "no"):
        return answer
    if len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer, "")
    return next((word for word in ("yes", "no") if word in answer[:4]), "")


_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme(samples: Samples) -> Summed:
    """MME's perception sum (0 to 2000), with cognition (0 to 800) and every sub-task.

    A sub-task has acc + acc+ (0 to 200): the percentages of right questions, and of pictures with every question right.
    Of cognition alone, the score is the cognition sum.
    """
    names = [sample.document.category or "" for sample in samples]
    keys = [(name, _mme_pair(sample)) for name, sample in zip(names, samples, strict=True)]
    pictures = all_right(keys, [sample.score > 0 for sample in samples])
    ratios: dict[str, list[Ratio]] = {}
    for name in dict.fromkeys(names):
        inside = [float(other == name) for other in names]
        right = [one * sample.score for one, sample in zip(inside, samples, strict=True)]
        top, bottom = (
            [one * part for one, part in zip(inside, side, strict=True)] for side in (pictures.top, pictures.bottom)
        )
        ratios[name] = [Ratio(top=right, bottom=inside) * 100.0, Ratio(top=top, bottom=bottom) * 100.0]
    metrics = {name: value_of(parts) for name, parts in ratios.items()}
    sums = {"perception": _PERCEPTION, "cognition": _COGNITION}
    totals = {total: sum(metrics.get(name, 0.0) for name in of) for total, of in sums.items()}
    counted = ratios.keys() & _PERCEPTION or ratios.keys() & _COGNITION
    summed = [ratio for name in sorted(counted) for ratio in ratios[name]]
    return Summed(ratios=summed, metrics=totals | metrics, together=keys)


def _mme_pair(sample: Scored) -> str:
    """Key of the picture's two questions: its name, so that equal pictures under two names are two pairs."""
    extra = sample.document.extra
    return str(extra.get("question_id") or extra.get("image_path") or sample.cluster)


EXTRACTORS: dict[str, Extractor] = {"mme_lmms_eval": of_text(mme_lmms_eval)}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {"mme": mme}
FACTS = {"mme": AggregationFacts(one_answer=True, is_sum=True, score="perception", full_marks=2000.0)}
