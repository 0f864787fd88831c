"""POPE: three readers of yes and no, and F1 of `yes` over its splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from mm_moslora_eval.scoring.error_bars import mean
from mm_moslora_eval.scoring.estimates import Ratio
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


@dataclass(frozen=True, kw_only=True)
class BinaryReport:
    """Counts and rates of a yes/no test; `yes` is the positive class, rates are 0 to 1."""

    tp: int
    fp: int
    tn: int
    fn: int
    """An answer that is neither yes nor no counts as not yes: it is a `fn` if yes is correct."""
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    """Share of answers that are yes."""


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def binary_report(verdicts: Sequence[tuple[str, str]]) -> BinaryReport:
    """POPE's rates from (answer, reference) pairs of `yes`, `no` and empty strings.

    Answers that cannot be inferred are wrong. Rates without a denominator are 0.
    """
    tp = sum(answer == reference == "yes" for answer, reference in verdicts)
    tn = sum(answer == reference == "no" for answer, reference in verdicts)
    fp = sum(answer == "yes" and reference == "no" for answer, reference in verdicts)
    fn = sum(answer != "yes" and reference == "yes" for answer, reference in verdicts)
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return BinaryReport(
        tp=tp,
        fp=fp,
        tn=tn,
        fn=fn,
        accuracy=_ratio(tp + tn, len(verdicts)),
        precision=precision,
        recall=recall,
        f1=_ratio(2 * precision * recall, precision + recall),
        yes_ratio=_ratio(tp + fp, len(verdicts)),
    )


def pope_lmms_eval_rates(verdicts: Sequence[tuple[str, str]]) -> dict[str, float]:
    """lmms-eval's POPE rates: recall ignores answers that are neither, and the yes ratio is that of the labels."""
    report = binary_report(verdicts)
    said_no = sum(answer == "no" and reference == "yes" for answer, reference in verdicts)
    recall = _ratio(report.tp, report.tp + said_no)
    return {
        "accuracy": report.accuracy,
        "precision": report.precision,
        "recall": recall,
        "f1": _ratio(2 * report.precision * recall, report.precision + recall),
        "yes_ratio_of_ground_truth": _ratio(sum(reference == "yes" for _, reference in verdicts), len(verdicts)),
    }


def _verdicts(samples: Samples) -> list[tuple[str, str]]:
    return [(s.parsed.lower(), "".join(s.document.answers[:1]).strip().lower()) for s in samples]


def _pope(samples: Samples) -> Numbers:
    report = binary_report(_verdicts(samples))
    return {name: float(value) for name, value in asdict(report).items()}


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
        for number, value in _pope(members).items()
    }


def pope(samples: Samples) -> Summed:
    """F1 of `yes` over the questions of all splits, with the other rates and every split's F1."""
    splits = _by_split(samples)
    metrics = _pope([sample for members in splits.values() for sample in members]) | _split_numbers(splits)
    return Summed(ratios=[_f1(samples, [len(splits_of(sample)) for sample in samples])], metrics=metrics)


def pope_splits(samples: Samples) -> Summed:
    """LLaVA's POPE number: the mean of the F1 of the random, popular and adversarial questions."""
    splits = _by_split(samples)
    each = [_f1(samples, [splits_of(sample).count(name) for sample in samples]) for name in splits]
    f1 = mean([_pope(members)["f1"] for members in splits.values()])
    return Summed(ratios=[ratio * (1 / len(splits)) for ratio in each], metrics={"f1": f1} | _split_numbers(splits))


def pope_without_unread(samples: Samples) -> Summed:
    """lmms-eval's F1 of `yes`: recall ignores answers that are neither, and the yes ratio is that of the labels."""
    ratios = [_f1(samples, [1.0] * len(samples), unread_is_no=False)]
    return Summed(ratios=ratios, metrics=pope_lmms_eval_rates(_verdicts(samples)))


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
