"""Yes/no questions: four extractors, and the scores of POPE, MME and HallusionBench.

Extractors return `yes`, `no` or an empty string when neither can be inferred.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mm_moslora_eval.metrics.vqa_accuracy import punctuation_vlmevalkit

Sample = Mapping[str, str]


def vlmevalkit(text: str) -> str:
    """VLMEvalKit: the word `yes` or the word `no`, but not both."""
    words = punctuation_vlmevalkit(text.lower()).split()
    yes, no = "yes" in words, "no" in words
    return "" if yes == no else "yes" if yes else "no"


extract_yes_no = vlmevalkit
"""The default."""


def mme_lmms_eval(text: str) -> str:
    """lmms-eval for MME: `yes` or `no` within the first four characters (so `yesterday` is a yes), or y and n."""
    answer = text.lower().strip().replace(".", "")
    if answer in ("yes", "no"):
        return answer
    if len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer, "")
    return next((word for word in ("yes", "no") if word in answer[:4]), "")


def pope_llava(text: str) -> str:
    """LLaVA for POPE: `No`, `no` or `not` before the first period is a no; anything else, even no answer, is a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in words for word in ("No", "not", "no")) else "yes"


def hallusionbench_lmms_eval(text: str) -> str:
    """lmms-eval for HallusionBench without its judge: `yes` anywhere in the answer is a yes, everything else a no."""
    return "yes" if "yes" in text.lower() else "no"


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


def pope(verdicts: Sequence[tuple[str, str]]) -> BinaryReport:
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
    report = pope(verdicts)
    said_no = sum(answer == "no" and reference == "yes" for answer, reference in verdicts)
    recall = _ratio(report.tp, report.tp + said_no)
    return {
        "accuracy": report.accuracy,
        "precision": report.precision,
        "recall": recall,
        "f1": _ratio(2 * report.precision * recall, report.precision + recall),
        "yes_ratio_of_ground_truth": _ratio(sum(reference == "yes" for _, reference in verdicts), len(verdicts)),
    }


MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme(scores: Iterable[tuple[str, str, float]]) -> dict[str, float]:
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
    sums = {
        "perception": sum(per_task.get(name, 0.0) for name in MME_PERCEPTION),
        "cognition": sum(per_task.get(name, 0.0) for name in MME_COGNITION),
    }
    return sums | per_task


def _share_all_right(samples: Sequence[Sample], right: Sequence[bool], columns: Sequence[str]) -> float:
    groups: dict[tuple[str, ...], bool] = {}
    for sample, verdict in zip(samples, right, strict=True):
        key = tuple(sample[name] for name in columns)
        groups[key] = groups.get(key, True) and verdict
    return _ratio(sum(groups.values()), len(groups))


def hallusionbench(
    samples: Sequence[Sample], right: Sequence[bool], *, within: Sequence[str] = ("category", "subcategory")
) -> dict[str, float]:
    """HallusionBench's shares of correct questions (aAcc), figures (fAcc) and questions over all figures (qAcc).

    Args:
        samples: with category, subcategory, set_id, figure_id and question_id.
        right: whether each answer is correct.
        within: the columns that distinguish sets of the same number. The benchmark's own script and lmms-eval use both
            columns. VLMEvalKit uses only the sub-category, so `VD` and `VS` share the sets of a sub-category.
    """
    return {
        "aAcc": _ratio(sum(right), len(right)),
        "fAcc": _share_all_right(samples, right, (*within, "set_id", "figure_id")),
        "qAcc": _share_all_right(samples, right, (*within, "set_id", "question_id")),
    }
