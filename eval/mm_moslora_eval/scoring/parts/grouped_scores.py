"""Aggregations of a whole set: questions that count together, a tree of categories, weights, captions."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.metrics import caption, ptb_tokeniser
from mm_moslora_eval.scoring.estimates import Ratio, mean_of
from mm_moslora_eval.scoring.scored_sample import Numbers, Samples, Summed, joined

Columns = tuple[str, ...]


def values_of(samples: Samples, columns: Sequence[str], *, named: str) -> list[tuple[str, ...]]:
    """The values of every sample in columns: `id`, `category`, or a further column of the data."""
    if not columns:
        raise EvalError(f"{named} needs the name of a column.")
    for column in columns:
        without = [sample for sample in samples if not sample.column(column)]
        if without:
            known = dict.fromkeys(["id", "category", *(key for sample in samples for key in sample.document.extra)])
            raise EvalError(
                f"{named}: {len(without)} of {len(samples)} documents have nothing in the column {column!r} (first: "
                f"{without[0].document.id!r}). Columns: {', '.join(known)}."
            )
    return [tuple(sample.column(column) for column in columns) for sample in samples]


def all_within(samples: Samples, *, columns: Columns, further: dict[str, Columns] | None = None) -> Summed:
    """The share of groups (equal in all `columns`) in which every answer is right, such as the pairs of MMVP.

    `further` names more groupings, whose shares are given beside it, and `vanilla` is the mean of the single answers.
    """
    keys = values_of(samples, columns, named="all_within")
    metrics = {"vanilla": _mean([sample.score for sample in samples]), "groups": float(len(set(keys)))}
    others = {
        name: values_of(samples, columns, named=f"all_within, further.{name}")
        for name, columns in (further or {}).items()
    }
    metrics |= {name: _ratio_of_groups(samples, within).values()[0] for name, within in others.items()}
    return Summed(
        ratios=[_ratio_of_groups(samples, keys)], metrics=metrics, units=[" / ".join(key) for key in keys],
        together=joined(keys, *others.values()),
    )  # fmt: skip


def _ratio_of_groups(samples: Samples, keys: Sequence[Hashable]) -> Ratio:
    """The share of groups that are right, to which every sample of a group adds the same."""
    return all_right(keys, [sample.score == 1.0 for sample in samples])


def detailed_mean(samples: Samples, *, groups: dict[str, Columns] | None = None, labels: str | None = None) -> Summed:
    """The mean of the single answers, with further numbers beside it.

    For every name in `groups` the share of groups (equal in all its columns) in which every answer is right, such as
    the consistency of NLVR2. With `labels` the mean of each label in that column, which may hold several with commas.
    """
    keys = {
        name: values_of(samples, columns, named=f"detailed_mean, groups.{name}")
        for name, columns in (groups or {}).items()
    }
    metrics: Numbers = {name: _ratio_of_groups(samples, within).values()[0] for name, within in keys.items()}
    of_label: dict[str, list[float]] = defaultdict(list)
    for sample, (cell,) in zip(
        samples, values_of(samples, (labels,), named="detailed_mean") if labels else (), strict=False
    ):
        for label in dict.fromkeys(part.strip() for part in cell.split(",")):
            of_label[label].append(sample.score)
    metrics |= {label: _mean(scores) for label, scores in of_label.items()}
    ratios = [mean_of([sample.score for sample in samples])]
    return Summed(ratios=ratios, metrics=metrics, together=joined(*keys.values()))


def tree(samples: Samples, *, levels: Columns = ("category",), weights: dict[str, float] | None = None) -> Summed:
    """The mean over the categories of `levels`, from the top down: every branch counts alike, or by its weight.

    `weights` gives branches of the lowest or a higher level by name; then all branches beside it need one, too. The
    scores of all branches are given beside it.
    """
    paths = values_of(samples, levels, named="tree")
    scores = [sample.score for sample in samples]
    shares = _shares(paths, weights or {})
    ratios = []
    for leaf, share in shares.items():
        among = [float(path == leaf) for path in paths]
        top = [score * inside for score, inside in zip(scores, among, strict=True)]
        ratios.append(Ratio(top=top, bottom=among) * share)
    means = {leaf: ratio.values()[0] for leaf, ratio in zip(shares, ratios, strict=True)}
    return Summed(ratios=ratios, metrics=_branches(means, shares))


def _shares(paths: Sequence[tuple[str, ...]], weights: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    """The share of every leaf in the score."""
    leaves = list(dict.fromkeys(paths))
    children: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for leaf in leaves:
        for depth, name in enumerate(leaf):
            if name not in children[leaf[:depth]]:
                children[leaf[:depth]].append(name)
    portion: dict[tuple[str, ...], float] = {}
    for parent, names in children.items():
        weighed = [name for name in names if name in weights]
        if weighed and len(weighed) < len(names):
            odd = next(name for name in names if name not in weights)
            raise EvalError(f"tree: weights has {weighed[0]!r}, and nothing for {odd!r} beside it.")
        numbers = [weights.get(name, 1.0) for name in names]
        if min(numbers) < 0 or not sum(numbers) > 0:
            raise EvalError(f"tree: the weights of {', '.join(names)} are {numbers}, expected no negative ones.")
        portion |= {(*parent, name): number / sum(numbers) for name, number in zip(names, numbers, strict=True)}
    return {leaf: math.prod(portion[leaf[: depth + 1]] for depth in range(len(leaf))) for leaf in leaves}


def _branches(means: Mapping[tuple[str, ...], float], shares: Mapping[tuple[str, ...], float]) -> Numbers:
    """The score of every branch; the weights within it are those within the whole."""
    found: Numbers = {}
    for depth in range(1, max(map(len, means), default=0) + 1):
        for branch in dict.fromkeys(leaf[:depth] for leaf in means):
            inside = {leaf: shares[leaf] for leaf in means if leaf[:depth] == branch}
            whole = math.fsum(inside.values())
            value = math.fsum(means[leaf] / shares[leaf] * share for leaf, share in inside.items() if share)
            found[" / ".join(branch)] = value / whole if whole else 0.0
    return found


def weighted(samples: Samples, *, column: str, weights: dict[str, float] | None = None) -> Summed:
    """The mean with weights: the number in `column`, or what `weights` gives for the value there."""
    values = [key[0] for key in values_of(samples, (column,), named="weighted")]
    counts = [_weight(value, column, weights) for value in values]
    top = [count * sample.score for count, sample in zip(counts, samples, strict=True)]
    return Summed(ratios=[Ratio(top=top, bottom=counts)], metrics={"vanilla": _mean([s.score for s in samples])})


def _weight(value: str, column: str, weights: Mapping[str, float] | None) -> float:
    if weights is not None and value not in weights:
        raise EvalError(f"weighted: weights has nothing for {value!r} of the column {column!r}, only {list(weights)}.")
    try:
        number = float(value) if weights is None else weights[value]
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise EvalError(f"weighted: the weight {value!r} of the column {column!r} is {number}, expected 0 or more.")
    return number


Groups = tuple[tuple[int, ...], ...]


def consecutive(
    samples: Samples, *, size: int, first: int | None = None, further: dict[str, Groups] | None = None
) -> Summed:
    """The share of groups of `size` documents with consecutive numbers (ids) in which every answer is right.

    `first` is the number of the first document, by default the least id of the data set. `further` names smaller groups
    by the places within a group, such as `{question: [[0, 1], [2, 3]]}`; their shares are given beside it, with
    `vanilla`, the mean of the single answers.
    """
    if size < 1:
        raise EvalError(f"consecutive: size is {size}, expected 1 or more.")
    odd = [sample.document.id for sample in samples if not sample.document.id.isdecimal()]
    if odd:
        raise EvalError(f"consecutive: {len(odd)} ids are no numbers (first: {odd[0]!r}).")
    numbers = [int(sample.document.id) for sample in samples]
    known = [sample.document.first_id for sample in samples if sample.document.first_id is not None]
    start = min(known or numbers, default=0) if first is None else first
    places = [divmod(number - start, size) for number in numbers]
    right = [sample.score == 1.0 for sample in samples]
    whole = all_right([group for group, _ in places], right)
    metrics = {"vanilla": mean_of([sample.score for sample in samples]).values()[0]}
    for name, smaller in (further or {}).items():
        part_of = {place: number for number, part in enumerate(smaller) for place in part}
        kept = [number for number, (_, place) in enumerate(places) if place in part_of]
        keys = [(places[number][0], part_of[places[number][1]]) for number in kept]
        metrics[name] = all_right(keys, [right[number] for number in kept]).values()[0]
    return Summed(ratios=[whole], metrics=metrics, units=[str(group) for group, _ in places])


def all_right(keys: Sequence[Hashable], right: Sequence[bool]) -> Ratio:
    """The share of keys whose answers are all right."""
    members: dict[Hashable, list[bool]] = defaultdict(list)
    for key, hit in zip(keys, right, strict=True):
        members[key].append(hit)
    share = [1 / len(members[key]) for key in keys]
    return Ratio(top=[part * all(members[key]) for part, key in zip(share, keys, strict=True)], bottom=share)


def _mean(scores: Sequence[float]) -> float:
    return mean_of(scores).values()[0]


ROTATION = 1_000_000
"""Difference between the ids of consecutive rotations of one question, as MMBench numbers them."""


def circular(samples: Samples) -> Summed:
    """MMBench: a question counts if all rotations of its options are answered correctly."""
    questions = [int(sample.document.id) % ROTATION for sample in samples]
    hits = all_right(questions, [sample.score == 1.0 for sample in samples])
    vanilla = _mean([sample.score for sample in samples])
    metrics = {"questions": float(len(set(questions))), "vanilla": vanilla}
    return Summed(ratios=[hits], metrics=metrics, units=[str(one) for one in questions])


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


AGGREGATIONS: dict[str, Callable[..., Summed]] = {
    "caption": caption_scores, "caption_plain": caption_scores_plain,
    "all_within": all_within, "circular": circular, "consecutive": consecutive, "detailed_mean": detailed_mean,
    "tree": tree, "weighted": weighted,
}  # fmt: skip
"""Name -> function that sums up scored samples."""
