"""Aggregates sample scores to a benchmark's number: plain means and the field's corpus metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from mm_moslora.reporting.verdicts import SCORE_NAMES, Difference
from mm_moslora_eval.metrics import caption, judge_scores, ptb_tokeniser, yes_no
from mm_moslora_eval.metrics import question_groups as groups
from mm_moslora_eval.metrics.document_vqa import OCRBENCH_GROUPS
from mm_moslora_eval.scoring import error_bars
from mm_moslora_eval.scoring.scored_sample import Aggregate, Scored, difference_between, graded_pairs, mean_with_error

Samples = Sequence[Scored]
Numbers = dict[str, float]
_ROUNDS = 500
_SEED = 20240617  # fixed, so that a score file is reproduced to the last digit


class _Copies:
    """The samples of a bootstrap draw; copies of a sample that is drawn several times are numbered."""

    def __init__(self, samples: Samples) -> None:
        self._copies = [[sample] for sample in samples]

    def __call__(self, drawn: Iterable[int]) -> list[Scored]:
        seen = [0] * len(self._copies)
        chosen = []
        for index in drawn:
            copies, number = self._copies[index], seen[index]
            if number == len(copies):
                copies.append(replace(copies[0], draw=number))
            chosen.append(copies[number])
            seen[index] += 1
        return chosen


def _clusters(samples: Samples) -> list[list[int]]:
    """Sample numbers by cluster."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        members[sample.cluster].append(index)
    return list(members.values())


def _bootstrapped(samples: Samples, numbers: Callable[[Samples], Numbers], *, headline: str) -> Aggregate:
    """A corpus metric with an error from a bootstrap over whole clusters."""
    result, copies = numbers(samples), _Copies(samples)
    stderr, low, high = error_bars.bootstrap_stderr(
        _clusters(samples), lambda drawn: numbers(copies(drawn))[headline], rounds=_ROUNDS, seed=_SEED
    )
    return Aggregate(score=result[headline], stderr=stderr, low=low, high=high, stderr_kind="bootstrap", metrics=result)


def _verdicts(samples: Samples) -> list[tuple[str, str]]:
    return [(s.parsed.lower(), "".join(s.document.answers[:1]).strip().lower()) for s in samples]


def _pope(samples: Samples) -> Numbers:
    report = yes_no.pope(_verdicts(samples))
    return {name: float(value) for name, value in asdict(report).items()}


def _by_split(samples: Samples) -> dict[str, list[Scored]]:
    """The splits of a question; VLMEvalKit's file stores it once with all its splits, as `random,popular`."""
    splits: dict[str, list[Scored]] = defaultdict(list)
    for sample in samples:
        for name in (sample.document.category or "").split(","):
            splits[name.strip()].append(sample)
    return splits


def _pope_numbers(samples: Samples) -> Numbers:
    splits = _by_split(samples)
    return _pope([sample for members in splits.values() for sample in members]) | _split_numbers(splits)


def _split_numbers(splits: dict[str, list[Scored]]) -> Numbers:
    return {
        f"{number}_{name}": value
        for name, members in sorted(splits.items())
        if name
        for number, value in _pope(members).items()
    }


def pope(samples: Samples) -> Aggregate:
    """F1 of `yes` over the questions of all splits, with the other rates and every split's F1."""
    return _bootstrapped(samples, _pope_numbers, headline="f1")


def _pope_split_numbers(samples: Samples) -> Numbers:
    splits = _by_split(samples)
    return {"f1": error_bars.mean([_pope(members)["f1"] for members in splits.values()])} | _split_numbers(splits)


def pope_splits(samples: Samples) -> Aggregate:
    """LLaVA's POPE number: the mean of the F1 of the random, popular and adversarial questions."""
    return _bootstrapped(samples, _pope_split_numbers, headline="f1")


def _pope_lmms_eval_numbers(samples: Samples) -> Numbers:
    return yes_no.pope_lmms_eval_rates(_verdicts(samples))


def pope_lmms_eval(samples: Samples) -> Aggregate:
    """lmms-eval's F1 of `yes`: recall ignores answers that are neither, and the yes ratio is that of the labels."""
    return _bootstrapped(samples, _pope_lmms_eval_numbers, headline="f1")


def _mme_numbers(samples: Samples) -> Numbers:
    return yes_no.mme((s.document.category or "", _mme_pair(s), s.score) for s in samples)


def mme(samples: Samples) -> Aggregate:
    """MME's perception sum (0 to 2000), with cognition (0 to 800) and every sub-task."""
    return _bootstrapped(samples, _mme_numbers, headline="perception")


def _mme_pair(sample: Scored) -> str:
    """Key of the picture's two questions: its name, so that equal pictures under two names are two pairs."""
    extra = sample.document.extra
    return f"{extra.get('question_id') or extra.get('image_path') or sample.cluster} (draw {sample.draw})"


def _hallusion_place(sample: Scored) -> dict[str, str]:
    """Columns of the original data, or the parts of VLMEvalKit's index (`VD_figure_v_set_figure_question`)."""
    extra = sample.document.extra
    parts = sample.document.id.split("_")
    from_id = dict(zip(("set_id", "figure_id", "question_id"), parts[-3:], strict=False)) if len(parts) >= 6 else {}
    place = {key: extra.get(key, from_id.get(key, "")) for key in ("set_id", "figure_id", "question_id")}
    subcategory = extra.get("subcategory", extra.get("l2-category", ""))
    return {"category": sample.document.category or "", "subcategory": subcategory, **place}


def hallusionbench(samples: Samples) -> Aggregate:
    """HallusionBench's aAcc, with fAcc and qAcc."""
    return _bootstrapped(samples, _hallusion_numbers(samples, ("category", "subcategory")), headline="aAcc")


def hallusionbench_vlmevalkit(samples: Samples) -> Aggregate:
    """The same with VLMEvalKit's grouping, by sub-category only; with the three shares of every category."""
    numbers = _hallusion_numbers(samples, ("subcategory",))
    members: dict[str, list[Scored]] = defaultdict(list)
    for sample in samples:
        place = _hallusion_place(sample)
        for name in dict.fromkeys((place["category"], place["subcategory"])):
            members[name].append(sample)
    shares = {name: numbers(some) for name, some in sorted(members.items()) if name}
    by_name = {f"{number}_{name}": share for name, item in shares.items() for number, share in item.items()}
    result = _bootstrapped(samples, numbers, headline="aAcc")
    return replace(result, metrics=result.metrics | by_name)


def _hallusion_numbers(samples: Samples, within: Sequence[str]) -> Callable[[Samples], Numbers]:
    places = {sample.document.id: _hallusion_place(sample) for sample in samples}

    def numbers(drawn: Samples) -> Numbers:
        rows = [dict(places[sample.document.id]) for sample in drawn]
        for row, sample in zip(rows, drawn, strict=True):
            if sample.draw:
                row["set_id"] = f"{row['set_id']} (draw {sample.draw})"
        return yes_no.hallusionbench(rows, [sample.score == 1.0 for sample in drawn], within=within)

    return numbers


def circular(samples: Samples) -> Aggregate:
    """MMBench: a question counts if all rotations of its options are answered correctly."""
    grouped = _questions(samples)
    vanilla = error_bars.mean([sample.score for sample in samples])
    return replace(mean_with_error(grouped), metrics={"questions": float(len(grouped)), "vanilla": vanilla})


def _questions(samples: Samples) -> list[Scored]:
    """One sample per question, which is right if all rotations of its options are."""
    rows = [(int(sample.document.id), sample.score == 1.0) for sample in samples]
    hits = groups.circular_hits(rows)
    first = {groups.group_of(index): sample for (index, _), sample in reversed(list(zip(rows, samples, strict=True)))}
    return [
        replace(first[group], score=float(hit), document=replace(first[group].document, id=str(group)))
        for group, hit in hits.items()
    ]


def _macro_numbers(samples: Samples) -> Numbers:
    return groups.macro_average(
        (s.document.category or "", s.document.extra.get("l2_category", s.document.category or ""), s.score)
        for s in samples
    )


def macro(samples: Samples) -> Aggregate:
    """MMStar in lmms-eval: unweighted mean of the means of the second-level categories."""
    return _bootstrapped(samples, _macro_numbers, headline="average")


def ocrbench(samples: Samples) -> Aggregate:
    """OCRBench: the share of hits as headline, with the total sum and the sums of the five groups."""
    sums: Numbers = defaultdict(float)
    for sample in samples:
        sums["total"] += sample.score
        sums[OCRBENCH_GROUPS.get(sample.document.category or "", "other")] += sample.score
    return replace(mean_with_error(samples), metrics=dict(sums))


def caption_scores(samples: Samples) -> Aggregate:
    """COCO captions: CIDEr-D of the set, with BLEU-1 to 4 and ROUGE-L.

    CIDEr-D weighs words by the whole set, so the error, which comes from the per-image values, is an approximation.
    """
    return _captions(samples, _TOKENIZERS["caption"])


def caption_scores_plain(samples: Samples) -> Aggregate:
    """The same on unchanged text: VLMEvalKit's number divided by 100. ROUGE-L splits at single spaces, as there."""
    return _captions(samples, _TOKENIZERS["caption_plain"])


_TOKENIZERS: dict[str, Callable[[str], str]] = {
    "caption": ptb_tokeniser.tokenize,
    "caption_plain": str,
}


def _tokenized(samples: Samples, tokenize: Callable[[str], str]) -> tuple[list[str], list[list[str]]]:
    """Captions and their references."""
    references = [[tokenize(answer) for answer in sample.document.answers] for sample in samples]
    return [tokenize(sample.parsed) for sample in samples], references


def _captions(samples: Samples, tokenize: Callable[[str], str]) -> Aggregate:
    report = caption.caption_report(*_tokenized(samples, tokenize))
    clusters = [sample.cluster for sample in samples]
    stderr, kind = error_bars.mean_stderr(report.cider_per_image), "analytic"
    if len(set(clusters)) < len(clusters):
        stderr, kind = error_bars.clustered_stderr(report.cider_per_image, clusters), "clustered"
    low, high = error_bars.normal_interval(report.cider, stderr)
    numbers = {"cider": report.cider, "rouge_l": report.rouge_l}
    numbers |= {f"bleu_{order}": value for order, value in enumerate(report.bleu, start=1)}
    return Aggregate(score=report.cider, stderr=stderr, low=low, high=high, stderr_kind=kind, metrics=numbers)


def mmvet(samples: Samples) -> Aggregate:
    """MM-Vet: the mean grade, with that of every capability and combination (each 0 to 1)."""
    return _mmvet(samples, judge_scores.mmvet_scores)


def mmvet_vlmevalkit(samples: Samples) -> Aggregate:
    """The same with VLMEvalKit's table, in which one tally serves capabilities and combinations."""
    return _mmvet(samples, judge_scores.mmvet_scores_vlmevalkit)


def _mmvet(samples: Samples, tabulate: Callable[[Iterable[tuple[str, float]]], dict[str, Numbers]]) -> Aggregate:
    table = tabulate((s.document.category or "", s.score) for s in samples)
    numbers = {name: value / 100 for name, value in table["by_capability"].items()}
    numbers |= {f"combination_{name}": value / 100 for name, value in table["by_integration"].items()}
    return replace(mean_with_error(samples), metrics=numbers)


def llavabench(samples: Samples) -> Aggregate:
    """LLaVA-Bench: mean rating of the answers over that of the references (1 is equality), and both means (0 to 1).

    The same for every category.
    """

    return _bootstrapped(samples, _llavabench_numbers, headline="all")


def _llavabench_numbers(samples: Samples) -> Numbers:
    rated = []
    for sample in samples:
        reference, model = sample.numbers or judge_scores.UNPARSED
        rated.append((sample.document.category or "", reference, model))
    kinds = ("", "reference_", "answer_")
    return {
        f"{kind}{name}": value / 100
        for name, values in judge_scores.llavabench_summary(rated).items()
        for kind, value in zip(kinds, values, strict=True)
    }


AGGREGATIONS: dict[str, Callable[[Samples], Aggregate]] = {
    "mean": mean_with_error,
    "pope": pope,
    "pope_splits": pope_splits,
    "pope_lmms_eval": pope_lmms_eval,
    "mme": mme,
    "hallusionbench": hallusionbench,
    "hallusionbench_vlmevalkit": hallusionbench_vlmevalkit,
    "circular": circular,
    "macro": macro,
    "ocrbench": ocrbench,
    "mmvet": mmvet,
    "mmvet_vlmevalkit": mmvet_vlmevalkit,
    "llavabench": llavabench,
    "caption": caption_scores,
    "caption_plain": caption_scores_plain,
}
"""Name -> function that aggregates scored samples."""

HEADLINES: dict[str, Callable[[Samples], float]] = {
    "pope": lambda samples: _pope_numbers(samples)["f1"],
    "pope_splits": lambda samples: _pope_split_numbers(samples)["f1"],
    "pope_lmms_eval": lambda samples: _pope_lmms_eval_numbers(samples)["f1"],
    "mme": lambda samples: _mme_numbers(samples)["perception"],
    "macro": lambda samples: _macro_numbers(samples)["average"],
    "llavabench": lambda samples: _llavabench_numbers(samples)["all"],
}
"""Aggregation without a mean as its headline -> function that computes the headline, without an error."""
READS_ANSWERS = frozenset({"pope", "pope_splits", "pope_lmms_eval", *_TOKENIZERS})
"""Aggregations that use the answers themselves instead of the scores of single samples."""
CAPTIONS = frozenset(_TOKENIZERS)
"""Aggregations of captions, which are neither right nor wrong."""


@dataclass(frozen=True, kw_only=True)
class HeadlineDifference:
    """A - B of a corpus metric on the same samples."""

    name: str
    a: float
    b: float
    stderr: float
    low: float
    high: float
    """95 % interval from a joint bootstrap over whole clusters of both systems."""


def headline_difference(aggregation: str, a: Samples, b: Samples) -> HeadlineDifference | None:
    """Compare the headline of two systems on the same samples in the same order; None for a mean of their scores."""
    if aggregation not in SCORE_NAMES:
        return None
    left, right = (_of_draws(aggregation, samples) for samples in (a, b))
    stderr, low, high = error_bars.bootstrap_stderr(
        _clusters(a), lambda drawn: left(drawn) - right(drawn), rounds=_ROUNDS, seed=_SEED
    )
    whole = range(len(a))
    name = SCORE_NAMES[aggregation]
    return HeadlineDifference(name=name, a=left(whole), b=right(whole), stderr=stderr, low=low, high=high)


def _of_draws(aggregation: str, samples: Samples) -> Callable[[Sequence[int]], float]:
    """The headline of drawn samples, by their numbers.

    CIDEr-D weighs words by the references of the whole set in every draw, as its own error does.
    """
    if aggregation in _TOKENIZERS:
        by_image = caption.cider(*_tokenized(samples, _TOKENIZERS[aggregation]))
        return lambda drawn: error_bars.mean([by_image[index] for index in drawn])
    number, copies = HEADLINES[aggregation], _Copies(samples)
    return lambda drawn: number(copies(drawn))


def score_by_sample(aggregation: str, samples: Samples) -> list[float]:
    """The contribution of every sample to the task's score; their mean is that score.

    For a mean these are the samples' own scores, for captions the CIDEr-D of each. Otherwise they come from the
    jackknife (Tukey 1958): the change of the score without a cluster, divided among the cluster's samples.

    Args:
        aggregation: of the task.
        samples: scored, at least one.
    """
    if aggregation in _TOKENIZERS:
        return caption.cider(*_tokenized(samples, _TOKENIZERS[aggregation]))
    number = {**HEADLINES, "circular": lambda some: mean_with_error(_questions(some)).score}.get(aggregation)
    clusters = _clusters(samples)
    if number is None or len(clusters) < 2:
        return [sample.score for sample in samples]
    whole, count = number(samples), len(samples)
    brought = [0.0] * count
    for members in clusters:
        left_out = set(members)
        without = number([sample for index, sample in enumerate(samples) if index not in left_out])
        for index in members:
            brought[index] = (whole - without) * (count - len(members)) / len(members)
    centre = whole - error_bars.mean(brought)
    return [value + centre for value in brought]


def difference_of_scores(aggregation: str, a: Samples, b: Samples) -> Difference:
    """The difference A - B of the task's score on the documents for which both have one.

    Args:
        aggregation: the task's aggregation.
        a: samples of one system.
        b: samples of another system, in any order.
    """
    a, b = graded_pairs(a, b)
    if aggregation == "circular":
        return difference_between(_questions(a), _questions(b))
    found = headline_difference(aggregation, a, b)
    if found is None:
        return difference_between(a, b)
    groups = len(_clusters(a))
    return Difference(value=found.a - found.b, low=found.low, high=found.high, groups=groups, unit=found.name)
