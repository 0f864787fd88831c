"""How sample scores add up to a benchmark's number: means, and the field's corpus metrics.

Each aggregation gives the ratios of its score, from which `measured_scores` gets value, error and interval alike.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, replace

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.metrics import caption, judge_scores, ptb_tokeniser, yes_no
from mm_moslora_eval.metrics import question_groups as groups
from mm_moslora_eval.metrics.document_vqa import OCRBENCH_GROUPS
from mm_moslora_eval.scoring import error_bars
from mm_moslora_eval.scoring.estimates import Ratio, mean_of
from mm_moslora_eval.scoring.named_parts import NamedParts, name_of, options_of
from mm_moslora_eval.scoring.parts import parts_named
from mm_moslora_eval.scoring.scored_sample import Numbers, Samples, Scored, Summed
from mm_moslora_eval.sources.document import Document


def mean(samples: Samples) -> Summed:
    """Mean score."""
    return Summed(ratios=[mean_of([sample.score for sample in samples])])


def _within(keys: Sequence[Hashable], values: Sequence[float]) -> list[Ratio]:
    """The mean of the values of each key, all of which weigh equally."""
    names, ratios = list(dict.fromkeys(keys)), []
    for name in names:
        among = [float(key == name) for key in keys]
        right = [value * inside for value, inside in zip(values, among, strict=True)]
        ratios.append(Ratio(top=right, bottom=among) * (1 / len(names)))
    return ratios


def _verdicts(samples: Samples) -> list[tuple[str, str]]:
    return [(s.parsed.lower(), "".join(s.document.answers[:1]).strip().lower()) for s in samples]


def _pope(samples: Samples) -> Numbers:
    report = yes_no.pope(_verdicts(samples))
    return {name: float(value) for name, value in asdict(report).items()}


def splits_of(sample: Scored) -> list[str]:
    """The splits of a question; VLMEvalKit's file stores it once with all its splits, as `random,popular`."""
    return [name.strip() for name in (sample.document.category or "").split(",")]


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
    f1 = error_bars.mean([_pope(members)["f1"] for members in splits.values()])
    return Summed(ratios=[ratio * (1 / len(splits)) for ratio in each], metrics={"f1": f1} | _split_numbers(splits))


def pope_lmms_eval(samples: Samples) -> Summed:
    """lmms-eval's F1 of `yes`: recall ignores answers that are neither, and the yes ratio is that of the labels."""
    ratios = [_f1(samples, [1.0] * len(samples), unread_is_no=False)]
    return Summed(ratios=ratios, metrics=yes_no.pope_lmms_eval_rates(_verdicts(samples)))


def mme(samples: Samples) -> Summed:
    """MME's perception sum (0 to 2000), with cognition (0 to 800) and every sub-task.

    Of cognition alone, the score is the cognition sum.
    """
    metrics = yes_no.mme((s.document.category or "", _mme_pair(s), s.score) for s in samples)
    names = [sample.document.category or "" for sample in samples]
    counted = set(names) & set(yes_no.MME_PERCEPTION) or set(names) & set(yes_no.MME_COGNITION)
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


def _hallusion_columns(sample: Scored) -> dict[str, str]:
    """Columns of the original data, or the parts of VLMEvalKit's index (`VD_figure_v_set_figure_question`)."""
    extra = sample.document.extra
    parts = sample.document.id.split("_")
    from_id = dict(zip(("set_id", "figure_id", "question_id"), parts[-3:], strict=False)) if len(parts) >= 6 else {}
    numbers = {key: extra.get(key, from_id.get(key, "")) for key in ("set_id", "figure_id", "question_id")}
    subcategory = extra.get("subcategory", extra.get("l2-category", ""))
    return {"category": sample.document.category or "", "subcategory": subcategory, **numbers}


def hallusionbench(samples: Samples) -> Summed:
    """HallusionBench's aAcc, with fAcc and qAcc."""
    return _hallusion(samples, ("category", "subcategory"))


def hallusionbench_vlmevalkit(samples: Samples) -> Summed:
    """The same with VLMEvalKit's grouping, by sub-category only; with the three shares of every category."""
    members: dict[str, list[Scored]] = defaultdict(list)
    for sample in samples:
        columns = _hallusion_columns(sample)
        for name in dict.fromkeys((columns["category"], columns["subcategory"])):
            members[name].append(sample)
    whole = _hallusion(samples, ("subcategory",))
    shares = {name: _hallusion(some, ("subcategory",)).metrics for name, some in sorted(members.items()) if name}
    by_name = {f"{number}_{name}": share for name, item in shares.items() for number, share in item.items()}
    return replace(whole, metrics=whole.metrics | by_name)


def _hallusion(samples: Samples, within: Sequence[str]) -> Summed:
    right = [sample.score == 1.0 for sample in samples]
    columns = [_hallusion_columns(sample) for sample in samples]
    metrics = yes_no.hallusionbench(columns, right, within=within)
    sets = [tuple(values[name] for name in (*within, "set_id")) for values in columns]
    return Summed(ratios=[mean_of([float(hit) for hit in right])], metrics=metrics, together=sets)


def circular(samples: Samples) -> Summed:
    """MMBench: a question counts if all rotations of its options are answered correctly."""
    numbers = [int(sample.document.id) for sample in samples]
    hits = groups.circular_hits((number, s.score == 1.0) for number, s in zip(numbers, samples, strict=True))
    rotations: dict[int, int] = defaultdict(int)
    for number in numbers:
        rotations[groups.group_of(number)] += 1
    part = [1 / rotations[groups.group_of(number)] for number in numbers]
    right = [share * hits[groups.group_of(number)] for share, number in zip(part, numbers, strict=True)]
    vanilla = error_bars.mean([sample.score for sample in samples])
    metrics = {"questions": float(len(hits)), "vanilla": vanilla}
    return Summed(
        ratios=[Ratio(top=right, bottom=part)], metrics=metrics, units=[str(groups.group_of(n)) for n in numbers]
    )


def check_ids(aggregation: str, documents: Sequence[Document]) -> None:
    """Refuse documents that an aggregation could not group after their answers.

    Raises:
        EvalError: `circular`, which reads the question from an id, with an id that is no integer; an aggregation whose
            options do not fit the data, such as a column that it has not.
    """
    if options_of(aggregation) and not AGGREGATIONS.origin(aggregation):
        _summed(aggregation, [Scored(document=one, text="", parsed="", score=0.0) for one in documents])
    odd = [document.id for document in documents if not document.id.isdecimal()] if aggregation == "circular" else []
    if odd:
        raise EvalError(
            f"{len(odd)} of {len(documents)} ids are no integers (first: {odd[0]!r}). `aggregation: circular` reads "
            f"the question from the id: rotation k of question n is n + k x {groups.ROTATION:,}. Number the documents "
            "so, or choose another aggregation."
        )


def together(aggregation: str, samples: Samples) -> list[Hashable]:
    """Equal for samples that an aggregation counts together, such as the rotations of a question."""
    own: list[Hashable] = [sample.document.id for sample in samples]
    if not samples or name_of(aggregation) in READS_ANSWERS:
        return own
    found = _summed(aggregation, samples)
    return list(found.together or found.units or own)


def documents_together(aggregation: str, documents: Sequence[Document]) -> list[Hashable]:
    """The same of documents; each is alone to an aggregation of others that needs answers."""
    samples = [Scored(document=one, text="", parsed="", score=0.0, cluster=one.id) for one in documents]
    try:
        return together(aggregation, samples)
    except EvalError:
        if not AGGREGATIONS.origin(aggregation):
            raise
        return [one.id for one in documents]


def macro(samples: Samples) -> Summed:
    """MMStar in lmms-eval: unweighted mean of the means of the second-level categories."""
    names = [sample.document.category or "" for sample in samples]
    parts = [sample.document.extra.get("l2_category", name) for sample, name in zip(samples, names, strict=True)]
    scores = [sample.score for sample in samples]
    return Summed(ratios=_within(parts, scores), metrics=groups.macro_average(zip(names, parts, scores, strict=True)))


def ocrbench(samples: Samples) -> Summed:
    """OCRBench: the share of hits as headline, with the total sum and the sums of the five groups."""
    sums: Numbers = defaultdict(float)
    for sample in samples:
        sums["total"] += sample.score
        sums[OCRBENCH_GROUPS.get(sample.document.category or "", "other")] += sample.score
    return Summed(ratios=mean(samples).ratios, metrics=dict(sums))


def caption_scores(samples: Samples) -> Summed:
    """COCO captions: CIDEr-D of the set, with BLEU-1 to 4 and ROUGE-L.

    CIDEr-D weighs words by the whole set, so the error, which comes from the per-image values, is an approximation.
    """
    return _captions(samples, ptb_tokeniser.tokenize)


def caption_scores_plain(samples: Samples) -> Summed:
    """The same on unchanged text: VLMEvalKit's number divided by 100. ROUGE-L splits at single spaces, as there."""
    return _captions(samples, str)


_MOST_CIDER = 10.0


def _captions(samples: Samples, tokenize: Callable[[str], str]) -> Summed:
    report = _caption_report(
        tuple(sample.parsed for sample in samples), tuple(sample.document.answers for sample in samples), tokenize
    )
    numbers = {"cider": report.cider, "rouge_l": report.rouge_l}
    numbers |= {f"bleu_{order}": value for order, value in enumerate(report.bleu, start=1)}
    return Summed(ratios=[mean_of(report.cider_per_image, high=_MOST_CIDER)], metrics=numbers)


@functools.lru_cache(maxsize=8)
def _caption_report(
    captions: tuple[str, ...], references: tuple[tuple[str, ...], ...], tokenize: Callable[[str], str]
) -> caption.CaptionReport:
    """Kept, since a set is scored once for its result and once for each difference."""
    people = [[tokenize(answer) for answer in answers] for answers in references]
    return caption.caption_report([tokenize(text) for text in captions], people)


def mmvet(samples: Samples) -> Summed:
    """MM-Vet: the mean grade, with that of every capability and combination (each 0 to 1)."""
    return _mmvet(samples, judge_scores.mmvet_scores)


def mmvet_vlmevalkit(samples: Samples) -> Summed:
    """The same with VLMEvalKit's table, in which one tally serves capabilities and combinations."""
    return _mmvet(samples, judge_scores.mmvet_scores_vlmevalkit)


def _mmvet(samples: Samples, tabulate: Callable[[Iterable[tuple[str, float]]], dict[str, Numbers]]) -> Summed:
    table = tabulate((s.document.category or "", s.score) for s in samples)
    numbers = {name: value / 100 for name, value in table["by_capability"].items()}
    numbers |= {f"combination_{name}": value / 100 for name, value in table["by_integration"].items()}
    return Summed(ratios=mean(samples).ratios, metrics=numbers)


_MOST_RELATIVE = 10.0
"""A rating of 10 over one of 1."""


def llavabench(samples: Samples) -> Summed:
    """LLaVA-Bench: mean rating of the answers over that of the references (1 is equality), and both means (0 to 1).

    The same for every category. The score has all digits, the further numbers have those of the source.
    """
    references, answers = zip(*(sample.numbers or judge_scores.UNPARSED for sample in samples), strict=True)
    rated = zip((sample.document.category or "" for sample in samples), references, answers, strict=True)
    kinds = ("", "reference_", "answer_")
    metrics = {
        f"{kind}{name}": value / 100
        for name, values in judge_scores.llavabench_summary(rated).items()
        for kind, value in zip(kinds, values, strict=True)
    }
    return Summed(ratios=[Ratio(top=answers, bottom=references, high=_MOST_RELATIVE)], metrics=metrics)


_OWN: dict[str, Callable[..., Summed]] = {
    "mean": mean,
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
AGGREGATIONS: NamedParts[Callable[[Samples], Summed]] = NamedParts("aggregation", _OWN | parts_named("AGGREGATIONS"))
"""Name -> function that sums up scored samples."""


class AggregationError(EvalError):
    """An aggregation failed on the samples that it was given."""


class NoScoreError(AggregationError):
    """None of the samples has a part that the score sums up."""


def summed(aggregation: str, samples: Samples) -> Summed:
    """The samples as a task sums them up.

    Raises:
        AggregationError: a function of others failed.
        NoScoreError: no sample has a part that the score sums up.
        EvalError: options that do not fit the data.
    """
    found = _summed(aggregation, samples)
    if samples and not found.ratios:
        raise NoScoreError(f"The score of {name_of(aggregation)!r} has no part in any of {len(samples)} samples.")
    return found


def _summed(aggregation: str, samples: Samples) -> Summed:
    function = AGGREGATIONS[aggregation]
    if not AGGREGATIONS.origin(aggregation):
        return function(samples)
    try:
        found = function(samples)
        if not isinstance(found, Summed):
            raise TypeError(f"it gave {found!r}, expected Summed")
    except Exception as error:  # whatever a function of others raises
        raise AggregationError(
            f"The aggregation {name_of(aggregation)!r} failed on {len(samples)} samples: {type(error).__name__}: "
            f"{error}. Mend it, then score again (mm-moslora eval score)."
        ) from error
    return found


CAPTIONS = frozenset({"caption", "caption_plain"})
"""Aggregations of captions, which are neither right nor wrong."""
POPE = frozenset({"pope", "pope_splits", "pope_lmms_eval"})
READS_ANSWERS = POPE | CAPTIONS
"""Aggregations that use the answers themselves instead of the scores of single samples."""
