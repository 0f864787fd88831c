"""Yes or no? Four extractors, and what POPE, MME and HallusionBench make of the verdicts.

Extractors return `yes`, `no` or an empty string when neither can be inferred.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .vqa import punctuation_vlmevalkit

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
    """LLaVA for POPE: `No`, `no` or `not` before the first period is a no; everything else, silence too, a yes."""
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
    """An answer that is neither yes nor no counts as not yes: it is a `fn` where yes was right."""
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

    Not inferable answers are wrong. Rates without a denominator are 0.
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


def _verdicts(samples: Iterable[Sample], extract: Callable[[str], str]) -> list[tuple[str, str]]:
    return [(extract(sample["prediction"]), sample["answer"].strip().lower()) for sample in samples]


def pope_report_llava(samples: Sequence[Sample]) -> dict[str, float]:
    """LLaVA's POPE numbers for one file.

    Raises:
        ZeroDivisionError: no positive answers, references or hits, as in the source.
    """
    report = pope(_verdicts(samples, pope_llava))
    if not report.tp:
        raise ZeroDivisionError("no answer `yes` is right, so F1 has no value")
    counts = {"TP": report.tp, "FP": report.fp, "TN": report.tn, "FN": report.fn}
    return counts | {name: getattr(report, name) for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")}


def pope_report_lmms_eval(samples: Sequence[Sample]) -> dict[str, float]:
    """lmms-eval's POPE numbers: recall ignores answers that are neither, and the yes ratio is that of the labels."""
    verdicts = _verdicts(samples, pope_lmms_eval)
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


def pope_report_vlmevalkit(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """VLMEvalKit's POPE numbers in percent, overall and per category; a row may name several categories."""
    exploded = [(name, sample) for sample in samples for name in sample["category"].split(",")]
    groups: dict[str, list[Sample]] = {"Overall": [sample for _, sample in exploded]}
    for name, sample in exploded:
        groups.setdefault(name, []).append(sample)
    reports = {name: pope(_verdicts(members, vlmevalkit)) for name, members in groups.items()}
    return {
        name: {
            "f1": report.f1 * 100,
            "acc": report.accuracy * 100,
            "precision": report.precision * 100,
            "recall": report.recall * 100,
        }
        for name, report in reports.items()
    }


MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme(scores: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """MME's acc + acc+ (0 to 200) per sub-task, and the sums `perception` (to 2000) and `cognition` (to 800).

    acc is the percentage of right questions, acc+ that of images with every question right.

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


def _mme(samples: Iterable[Sample], extract: Callable[[str], str]) -> dict[str, float]:
    return mme(
        (
            sample["category"],
            sample["question_id"],
            float(extract(sample["prediction"]) == sample["answer"].lower().strip().replace(".", "")),
        )
        for sample in samples
    )


def mme_report_lmms_eval(samples: Iterable[Sample]) -> dict[str, float]:
    """lmms-eval's two sums."""
    scores = _mme(samples, mme_lmms_eval)
    return {"mme_perception_score": scores["perception"], "mme_cognition_score": scores["cognition"]}


def mme_report_vlmevalkit(samples: Iterable[Sample]) -> dict[str, float]:
    """VLMEvalKit's sums (it calls cognition `reasoning`) and sub-tasks."""
    scores = _mme(samples, vlmevalkit)
    scores["reasoning"] = scores.pop("cognition")
    return scores


def _share_all_right(samples: Sequence[Sample], right: Sequence[bool], key: Callable[[Sample], Hashable]) -> float:
    groups: dict[Hashable, bool] = {}
    for sample, verdict in zip(samples, right, strict=True):
        groups[key(sample)] = groups.get(key(sample), True) and verdict
    return _ratio(sum(groups.values()), len(groups))


def _hallusion(
    samples: Sequence[Sample], right: Sequence[bool], place: Callable[[Sample], tuple[str, ...]]
) -> dict[str, float]:
    return {
        "aAcc": _ratio(sum(right), len(right)),
        "fAcc": _share_all_right(samples, right, lambda item: (*place(item), item["set_id"], item["figure_id"])),
        "qAcc": _share_all_right(samples, right, lambda item: (*place(item), item["set_id"], item["question_id"])),
    }


def _place(sample: Sample) -> tuple[str, ...]:
    return (sample["category"], sample["subcategory"])


def hallusionbench(samples: Sequence[Sample], right: Sequence[bool]) -> dict[str, float]:
    """HallusionBench's three shares: questions (aAcc), figures (fAcc) and questions over all figures (qAcc) all right.

    Args:
        samples: with category, subcategory, set_id, figure_id and question_id.
        right: whether each answer is right.
    """
    return _hallusion(samples, right, _place)


def hallusionbench_lmms_eval(samples: Sequence[Sample]) -> dict[str, float]:
    """lmms-eval without its judge: `yes` anywhere in the answer is a yes, everything else a no."""
    right = [("yes" in sample["prediction"].lower()) == (sample["answer"].lower() == "yes") for sample in samples]
    return hallusionbench(samples, right)


def hallusionbench_vlmevalkit(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """VLMEvalKit without its judge, in percent; figures are grouped by sub-category, whatever the category."""
    right = [answer == reference for answer, reference in _verdicts(samples, vlmevalkit)]
    groups: dict[str, list[int]] = {"Overall": list(range(len(samples)))}
    for index, sample in enumerate(samples):
        for name in dict.fromkeys((sample["category"], sample["subcategory"])):
            groups.setdefault(name, []).append(index)
    reports = {}
    for name, members in groups.items():
        chosen, verdicts = [samples[index] for index in members], [right[index] for index in members]
        shares = _hallusion(chosen, verdicts, lambda sample: (sample["subcategory"],))
        reports[name] = {key: 100 * value for key, value in shares.items()}
    return reports
