"""Extractions, metrics and aggregations of single benchmarks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from string import ascii_uppercase

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.metrics import multiple_choice, vqa_accuracy
from mm_moslora_eval.metrics.benchmarks import counts, dynamath, letter_readers, mathvision, video_letters
from mm_moslora_eval.metrics.benchmarks.wemath import problem_value
from mm_moslora_eval.metrics.exact_match import best
from mm_moslora_eval.scoring.estimates import Ratio, mean_of
from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.scoring.parts.grouped_scores import values_of
from mm_moslora_eval.scoring.scored_sample import Samples, Summed
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.vlmevalkit_tsv import parse_list

_BETWEEN = ", "
"""Between several letters that count."""


def _of_text(read: Callable[[str], str]) -> Extractor:
    return lambda text, _: read(text)


def _of_options(read: Callable[[str, Mapping[str, str]], str]) -> Extractor:
    return lambda text, document: read(text, document.options)


def mmmu_pro_vlmevalkit(text: str, document: Document) -> str:
    """VLMEvalKit for MMMU-Pro with reasoning: its letter of what follows `Answer:` in the last such line."""
    return multiple_choice.vlmevalkit(letter_readers.mmmu_pro_vlmevalkit(text), document.options)


def naturalbench(text: str, document: Document, *, column: str = "Question_Type") -> str:
    """NaturalBench: `Yes` or `No`, or A or B by the value in `column`, whichever is first; an article is A."""
    return letter_readers.naturalbench(text, document.extra.get(column, "yes_no"))


def dynamath_short(text: str, document: Document) -> str:
    """DynaMath: the `short answer` of a JSON reply, else the reply, as a number, a letter or text."""
    return dynamath.short_answer(text, document.extra.get("answer_type", ""))


def _letters(read: Callable[[str, Mapping[str, str]], list[str]]) -> Extractor:
    return lambda text, document: _BETWEEN.join(read(text, document.options))


def mathvision_vlmevalkit(text: str, document: Document) -> str:
    """VLMEvalKit for MATH-Vision: the letter by its usual rule, to an open question the whole answer."""
    # Its file has the choices in one cell and no option columns.
    options = document.options or dict(
        zip(ascii_uppercase, parse_list(document.extra.get("choices", "")), strict=False)
    )
    return multiple_choice.vlmevalkit(text, options) if options else text.strip()


EXTRACTORS: dict[str, Extractor] = {
    "mathvision": _of_text(mathvision.mathvision_answer),
    "mmmu_pro_official": _of_options(letter_readers.mmmu_pro_official),
    "mmmu_pro_vlmevalkit": mmmu_pro_vlmevalkit,
    "blink_official": _of_options(letter_readers.blink_official),
    "first_letter_lmms_eval": _of_text(letter_readers.first_letter_lmms_eval),
    "vstar_lmms_eval": _of_text(letter_readers.vstar_lmms_eval),
    "mmvp_lmms_eval": _of_text(letter_readers.mmvp_lmms_eval),
    "visulogic_lmms_eval": _of_text(letter_readers.visulogic_lmms_eval),
    "visulogic_vlmevalkit": _of_text(letter_readers.visulogic_vlmevalkit),
    "naturalbench": naturalbench,
    "mme_realworld": _of_text(letter_readers.mme_realworld),
    "mme_realworld_vlmevalkit": _of_text(letter_readers.mme_realworld_vlmevalkit),
    "wemath_vlmevalkit": _of_text(letter_readers.wemath_vlmevalkit),
    "count_lmms_eval": _of_text(counts.count_lmms_eval),
    "first_digits": _of_text(counts.first_digits),
    "dynamath_vlmevalkit": dynamath_short,
    "mathvision_vlmevalkit": mathvision_vlmevalkit,
    "mvbench_official": _letters(video_letters.mvbench_official),
    "mvbench_vlmevalkit": _letters(video_letters.mvbench_vlmevalkit),
    "mvbench_lmms_eval": _of_text(video_letters.mvbench_lmms_eval),
    "mlvu_vlmevalkit": _letters(video_letters.mlvu_vlmevalkit),
    "lvbench_official": _of_text(video_letters.lvbench_official),
}


def mathvision_score(parsed: str, document: Document) -> float:
    """MATH-Vision: the letter or the text of the right option, equal as texts or in value to two decimals."""
    right = [text for answer in document.answers for text in (answer, document.options.get(answer, answer))]
    return float(any(mathvision.mathvision_equal(parsed, text) for text in right))


def first_digits(parsed: str, document: Document) -> float:
    """lmms-eval for PixmoCount: the first digits of answer and reference are equal."""
    return best(lambda answer, reference: float(answer == counts.first_digits(reference)), parsed, document.answers)


def exact_evalai(parsed: str, document: Document) -> float:
    """lmms-eval for SimpleVQA: equal after EvalAI's normalisation of both sides."""
    plain = vqa_accuracy.normalize_evalai
    return best(lambda answer, reference: float(plain(answer) == plain(reference)), parsed, document.answers)


def contains_vlmevalkit(parsed: str, document: Document) -> float:
    """VLMEvalKit for CountBench: the reference lies anywhere in the answer, so `12` contains `2`."""
    return best(counts.contains_vlmevalkit, parsed, document.answers)


def dynamath_score(parsed: str, document: Document) -> float:
    """DynaMath: a number within 0.001, the letter, or a text that lies within the reference."""
    kind = document.extra.get("answer_type", "")
    return best(lambda answer, reference: dynamath.score(answer, reference, kind), parsed, document.answers)


def one_of_letters(parsed: str, document: Document) -> float:
    """The right letter is one of those that the extraction gives."""
    return float(bool(set(parsed.split(_BETWEEN)) & set(document.answers)))


def mathvision_vlmevalkit_score(parsed: str, document: Document) -> float:
    """VLMEvalKit for MATH-Vision: equal as texts, or in value to six decimals; nothing is evaluated as code."""
    return best(lambda a, b: float(mathvision.equal_vlmevalkit(a, b)), parsed, document.answers)


METRICS: dict[str, Metric] = {
    "one_of_letters": one_of_letters,
    "mathvision_vlmevalkit": mathvision_vlmevalkit_score,
    "mathvision": mathvision_score,
    "first_digits": first_digits,
    "exact_evalai": exact_evalai,
    "contains_vlmevalkit": contains_vlmevalkit,
    "dynamath_vlmevalkit": dynamath_score,
}


def wemath(samples: Samples, *, problem: str = "ID", step: str = "key", strict: bool = True) -> Summed:
    """We-Math: a problem counts 1 with its last question and all steps right, 0.5 with the steps alone, else 0.

    With `strict: false` one right step beside the right last question is enough.
    """
    names = [name for (name,) in values_of(samples, (problem,), named="wemath")]
    steps = [name for (name,) in values_of(samples, (step,), named="wemath")]
    members: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        members[name].append(number)
    right = [sample.score == 1.0 for sample in samples]
    whole = {name: _parts(numbers, steps, right) for name, numbers in members.items()}
    top, bottom = [0.0] * len(names), [0.0] * len(names)
    for name, numbers in members.items():
        value = problem_value(*whole[name], strict=strict)
        for number in numbers:
            top[number], bottom[number] = value / len(numbers), 1 / len(numbers)
    other = [problem_value(*parts, strict=not strict) for parts in whole.values()]
    metrics = {"loose" if strict else "strict": sum(other) / len(other) if other else 0.0}
    return Summed(ratios=[Ratio(top=top, bottom=bottom)], metrics=metrics, units=names)


def _parts(numbers: Sequence[int], steps: Sequence[str], right: Sequence[bool]) -> tuple[list[bool], bool]:
    """Which steps of a problem are right, and whether its last question is."""
    last = [number for number in numbers if steps[number].endswith("multi")]
    return [right[number] for number in numbers if number not in last], any(right[number] for number in last)


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
    whole = _all_right([group for group, _ in places], right)
    metrics = {"vanilla": mean_of([sample.score for sample in samples]).values()[0]}
    for name, smaller in (further or {}).items():
        part_of = {place: number for number, part in enumerate(smaller) for place in part}
        kept = [number for number, (_, place) in enumerate(places) if place in part_of]
        keys = [(places[number][0], part_of[places[number][1]]) for number in kept]
        metrics[name] = _all_right(keys, [right[number] for number in kept]).values()[0]
    return Summed(ratios=[whole], metrics=metrics, units=[str(group) for group, _ in places])


def _all_right(keys: Sequence[Hashable], right: Sequence[bool]) -> Ratio:
    """The share of keys whose answers are all right."""
    members: dict[Hashable, list[bool]] = defaultdict(list)
    for key, hit in zip(keys, right, strict=True):
        members[key].append(hit)
    share = [1 / len(members[key]) for key in keys]
    return Ratio(top=[part * all(members[key]) for part, key in zip(share, keys, strict=True)], bottom=share)


AGGREGATIONS: dict[str, Callable[..., Summed]] = {"wemath": wemath, "consecutive": consecutive}
