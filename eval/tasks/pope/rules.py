"""POPE: three readers of yes and no, and F1 of `yes` over its splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from mm_moslora_eval.scoring.estimates import Ratio, mean
from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import AggregationFacts, of_text
from mm_moslora_eval.scoring.scored_sample import Numbers, Samples, Scored, Summed, splits_of


def pope_llava(text: str) -> str:
    """LLaVA for POPE: `No`, `no` or `not` before the first period is a no; anything else, even no answer, is a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in words for word in ("No", "not", "no")) else "yes"


def pope_lmms_eval(text: str) -> str:
    """lmms-eval for POPE: the whole answer is `yes` or `no`, in any case."""
    answer = text.lower().strip()
    return answer if answer in ("yes", "no") else ""


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def rates(verdicts: Sequence[tuple[str, str]], *, unread_is_no: bool = True) -> Numbers:
    """POPE's counts and rates (0 to 1) of (answer, reference) pairs; `yes` is the positive class.

    Answers that cannot be inferred are wrong: an `fn` if yes is correct, but for `recall` only where `unread_is_no`.
    Rates without a denominator are 0.
    """
    tp = sum(answer == reference == "yes" for answer, reference in verdicts)
    tn = sum(answer == reference == "no" for answer, reference in verdicts)
    fp = sum(answer == "yes" and reference == "no" for answer, reference in verdicts)
    missed = [answer for answer, reference in verdicts if answer != "yes" and reference == "yes"]
    precision = _ratio(tp, tp + fp)
    recall = _ratio(tp, tp + (len(missed) if unread_is_no else missed.count("no")))
    counts = {"tp": float(tp), "fp": float(fp), "tn": float(tn), "fn": float(len(missed))}
    return counts | {
        "accuracy": _ratio(tp + tn, len(verdicts)), "precision": precision, "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall), "yes_ratio": _ratio(tp + fp, len(verdicts)),
    }  # fmt: skip


def _verdicts(samples: Samples) -> list[tuple[str, str]]:
    return [(s.parsed.lower(), "".join(s.document.answers[:1]).strip().lower()) for s in samples]


def _by_split(samples: Samples) -> dict[str, list[Scored]]:
    splits: dict[str, list[Scored]] = defaultdict(list)
    for sample in samples:
        for name in splits_of(sample):
            splits[name].append(sample)
    return splits


def _f1(samples: Samples, counts: Sequence[float], *, unread_is_no: bool = True) -> Ratio:
    """F1 of `yes`, with each question counted so often."""
    top, bottom = [], []
    for (answer, reference), count in zip(_verdicts(samples), counts, strict=True):
        hit = answer == reference == "yes"
        alarm = answer == "yes" and reference == "no"
        miss = reference == "yes" and answer != "yes" and (unread_is_no or answer == "no")
        top.append(2.0 * count * hit)
        bottom.append(count * (2.0 * hit + alarm + miss))
    return Ratio(top=top, bottom=bottom)


def _split_numbers(splits: dict[str, list[Scored]]) -> Numbers:
    return {
        f"{number}_{name}": value
        for name, members in sorted(splits.items())
        if name
        for number, value in rates(_verdicts(members)).items()
    }


def pope(samples: Samples) -> Summed:
    """F1 of `yes` over the questions of all splits, with the other rates and every split's F1."""
    splits = _by_split(samples)
    metrics = rates(_verdicts([sample for members in splits.values() for sample in members])) | _split_numbers(splits)
    return Summed(ratios=[_f1(samples, [len(splits_of(sample)) for sample in samples])], metrics=metrics)


def pope_splits(samples: Samples) -> Summed:
    """LLaVA's POPE number: the mean of the F1 of the random, popular and adversarial questions."""
    splits = _by_split(samples)
    each = [_f1(samples, [splits_of(sample).count(name) for sample in samples]) for name in splits]
    f1 = mean([rates(_verdicts(members))["f1"] for members in splits.values()])
    return Summed(ratios=[ratio * (1 / len(splits)) for ratio in each], metrics={"f1": f1} | _split_numbers(splits))


def pope_without_unread(samples: Samples) -> Summed:
    """lmms-eval's F1 of `yes`: recall ignores answers that are neither, and the yes ratio is that of the labels."""
    ratios, verdicts = [_f1(samples, [1.0] * len(samples), unread_is_no=False)], _verdicts(samples)
    found = rates(verdicts, unread_is_no=False)
    metrics = {name: found[name] for name in ("accuracy", "precision", "recall", "f1")}
    yes = _ratio(sum(reference == "yes" for _, reference in verdicts), len(verdicts))
    return Summed(ratios=ratios, metrics=metrics | {"yes_ratio_of_ground_truth": yes})


EXTRACTORS: dict[str, Extractor] = {"pope_llava": of_text(pope_llava), "pope_lmms_eval": of_text(pope_lmms_eval)}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {
    "pope": pope,
    "pope_splits": pope_splits,
    "pope_lmms_eval": pope_without_unread,
}
FACTS = {
    name: AggregationFacts(reads_answers=True, one_answer=True, by_split=True, score=score)
    for name, score in (("pope", "F1"), ("pope_splits", "mean F1"), ("pope_lmms_eval", "F1"))
}
