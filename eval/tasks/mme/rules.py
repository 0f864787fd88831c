"""MME: lmms-eval's reader, and the sums of acc and acc+ of its sub-tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from mm_moslora_eval.scoring.estimates import Ratio
from mm_moslora_eval.scoring.named_parts import Extractor
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


def sums(scores: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """MME's acc + acc+ (0 to 200) per sub-task, and the sums `perception` (to 2000) and `cognition` (to 800).

    acc is the percentage of correct questions, acc+ that of images with every question correct.

    Args:
        scores: (sub-task, image, 1 or 0) of each question.
    """
    images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for category, image, score in scores:
        images[category][image].append(score)
    per_task = {}
    for category, members in images.items():
        questions = [score for values in members.values() for score in values]
        both = [float(all(values)) for values in members.values()]
        per_task[category] = 100 * sum(questions) / len(questions) + 100 * sum(both) / len(both)
    both_sums = {
        "perception": sum(per_task.get(name, 0.0) for name in _PERCEPTION),
        "cognition": sum(per_task.get(name, 0.0) for name in _COGNITION),
    }
    return both_sums | per_task


def mme(samples: Samples) -> Summed:
    """MME's perception sum (0 to 2000), with cognition (0 to 800) and every sub-task.

    Of cognition alone, the score is the cognition sum.
    """
    metrics = sums((s.document.category or "", _mme_pair(s), s.score) for s in samples)
    names = [sample.document.category or "" for sample in samples]
    counted = set(names) & set(_PERCEPTION) or set(names) & set(_COGNITION)
    pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
    keys = [(name, _mme_pair(sample)) for name, sample in zip(names, samples, strict=True)]
    for key, sample in zip(keys, samples, strict=True):
        pairs[key].append(sample.score)
    ratios = []
    for name in sorted(counted):
        inside = [float(other == name) for other in names]
        share = [one / len(pairs[key]) for one, key in zip(inside, keys, strict=True)]
        right = [one * sample.score for one, sample in zip(inside, samples, strict=True)]
        both = [part * all(pairs[key]) for part, key in zip(share, keys, strict=True)]
        ratios += [Ratio(top=right, bottom=inside) * 100.0, Ratio(top=both, bottom=share) * 100.0]
    return Summed(ratios=ratios, metrics=metrics, together=keys)


def _mme_pair(sample: Scored) -> str:
    """Key of the picture's two questions: its name, so that equal pictures under two names are two pairs."""
    extra = sample.document.extra
    return str(extra.get("question_id") or extra.get("image_path") or sample.cluster)


EXTRACTORS: dict[str, Extractor] = {"mme_lmms_eval": of_text(mme_lmms_eval)}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {"mme": mme}
FACTS = {"mme": AggregationFacts(one_answer=True, is_sum=True, score="perception", full_marks=2000.0)}
