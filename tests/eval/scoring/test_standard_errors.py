"""The standard error of every aggregation against numpy: whole pictures drawn with replacement, copies kept apart.

A draw of whole clusters is a weight per cluster, so each number is written here once as a function of weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from mm_moslora_eval.metrics import caption
from mm_moslora_eval.scoring.measured_scores import aggregate, score_by_sample
from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS, facts_of
from mm_moslora_eval.scoring.score_differences import difference_of_scores
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document

PICTURES, DRAWS = 80, 4000
Array = np.ndarray
WITH_OPTIONS = {
    "all_within": 'all_within {"columns": ["picture"]}',
    "simplevqa_attempts": 'simplevqa_attempts {"none": ["no"]}',
    "detailed_mean": 'detailed_mean {"groups": {"pictures": ["picture"]}}',
    "weighted": 'weighted {"column": "weight"}',
    "wemath": 'wemath {"problem": "picture", "step": "split"}',
    "ccocr_fields_sets": 'ccocr_fields_sets {"column": "category"}',
    "consecutive": 'consecutive {"size": 10}',
}
PARTS = [WITH_OPTIONS.get(name, name) for name in AGGREGATIONS]
CATEGORIES = ("OCR", "count", "scene", "posters")
SPLITS = ("random", "popular", "adversarial")


def samples_of(seed: int, *, rotations: bool = False) -> list[Scored]:
    """Two to four questions on each picture, with correlated scores."""
    generator = np.random.default_rng(seed)
    made = []
    for picture in range(PICTURES):
        skill = generator.beta(0.8, 0.5)
        for number in range(generator.integers(2, 5)):
            score = float(generator.random() < skill)
            index = picture + 1_000_000 * number if rotations else 10 * picture + number
            answer = ("yes", "no")[int(generator.integers(2))]
            parsed = answer if score else {"yes": "no", "no": "yes"}[answer]
            words = ("a cat on a red mat", "a dog in the green park")[int(score)]
            made.append(
                Scored(
                    document=Document(
                        id=str(index), question="?", answers=(answer, "a dog in a park", "dogs run in a park"),
                        category=CATEGORIES[picture % 4],
                        extra={"split": SPLITS[number % 3], "picture": str(picture), "weight": str(1 + number)},
                    ),
                    text=words, parsed=parsed, score=score, cluster=f"picture {picture}",
                    numbers=(float(generator.integers(5, 11)), float(generator.integers(1, 5) + 5 * score)),
                )
            )  # fmt: skip
    return made


def clusters_of(samples: list[Scored]) -> Array:
    names = {sample.cluster: number for number, sample in enumerate({s.cluster: s for s in samples}.values())}
    return np.array([names[sample.cluster] for sample in samples])


def weights_of(samples: list[Scored], draws: int = DRAWS) -> Array:
    """How often each sample occurs, draw by draw."""
    members = clusters_of(samples)
    count = members.max() + 1
    return np.random.default_rng(1).multinomial(count, np.full(count, 1 / count), size=draws)[:, members]


def mean(weights: Array, values: Array) -> Array:
    return (weights * values).sum(1) / weights.sum(1)


def scores(samples: list[Scored]) -> Array:
    return np.array([sample.score for sample in samples])


def f1(samples: list[Scored], weights: Array) -> Array:
    said = np.array([sample.parsed == "yes" for sample in samples])
    true = np.array([sample.document.answers[0] == "yes" for sample in samples])
    hits, alarms, misses = ((weights * part).sum(1) for part in (said & true, said & ~true, ~said & true))
    return 2 * hits / (2 * hits + alarms + misses)


def part(samples: list[Scored], weights: Array, key: Callable[[Scored], str], name: str) -> tuple[list[Scored], Array]:
    chosen = [number for number, sample in enumerate(samples) if key(sample) == name]
    return [samples[number] for number in chosen], weights[:, chosen]


def category(sample: Scored) -> str:
    return sample.document.category or ""


def f1_of_splits(samples: list[Scored], weights: Array) -> Array:
    return np.mean([f1(*part(samples, weights, category, name)) for name in SPLITS], axis=0)


def mme(samples: list[Scored], weights: Array) -> Array:
    total = np.zeros(len(weights))
    for name in CATEGORIES:
        members, share = part(samples, weights, category, name)
        total += 100 * mean(share, scores(members))
        numbers = clusters_of(members)
        first = np.unique(numbers, return_index=True)[1]
        both = np.array([scores(members)[numbers == number].min() for number in range(numbers.max() + 1)])
        total += 100 * mean(share[:, first], both)
    return total


def macro(samples: list[Scored], weights: Array) -> Array:
    parts = [part(samples, weights, category, name) for name in CATEGORIES]
    return np.mean([mean(share, scores(members)) for members, share in parts], axis=0)


def rated(samples: list[Scored], weights: Array) -> Array:
    reference, model = (np.array([sample.numbers[place] for sample in samples]) for place in (0, 1))
    return (weights * model).sum(1) / (weights * reference).sum(1)


def every_rotation(samples: list[Scored], weights: Array) -> Array:
    numbers = clusters_of(samples)
    first = np.unique(numbers, return_index=True)[1]
    return mean(weights[:, first], np.array([scores(samples)[numbers == n].min() for n in range(numbers.max() + 1)]))


def cider(samples: list[Scored], weights: Array) -> Array:
    references = [list(sample.document.answers) for sample in samples]
    report = caption.caption_report([sample.parsed for sample in samples], references)
    return mean(weights, np.array(report.cider_per_image))


def plain(samples: list[Scored], weights: Array) -> Array:
    return mean(weights, scores(samples))


def by_weight(samples: list[Scored], weights: Array) -> Array:
    return mean(weights * np.array([float(sample.document.extra["weight"]) for sample in samples]), scores(samples))


def steps_alone(samples: list[Scored], weights: Array) -> Array:
    """Of problems without a last question half counts where all steps are right."""
    return every_rotation(samples, weights) / 2


NUMBERS: dict[str, Callable[[list[Scored], Array], Array]] = {
    "pope": f1, "pope_lmms_eval": f1, "pope_splits": f1_of_splits, "mme": mme, "mmstar_macro": macro,
    "llavabench": rated, "circular": every_rotation, "caption": cider, "caption_plain": cider, "tree": macro,
    WITH_OPTIONS["all_within"]: every_rotation, WITH_OPTIONS["weighted"]: by_weight,
    WITH_OPTIONS["wemath"]: steps_alone, WITH_OPTIONS["consecutive"]: every_rotation,
    WITH_OPTIONS["ccocr_fields_sets"]: macro,
}  # fmt: skip
"""What is no plain mean of the samples."""


def prepared(name: str, seed: int) -> list[Scored]:
    samples = samples_of(seed, rotations=name == "circular")
    if name == "pope_splits":
        samples = [replace(s, document=replace(s.document, category=s.document.extra["split"])) for s in samples]
    if name in ("caption", "caption_plain"):
        samples = [replace(sample, parsed=sample.text) for sample in samples]
    return as_json(samples) if name.startswith("ccocr_fields") else samples


def as_json(samples: list[Scored]) -> list[Scored]:
    """The same with one field in answer and reference."""
    return [
        replace(
            sample, parsed=json.dumps(sample.parsed),
            document=replace(sample.document, answers=(json.dumps(sample.document.answers[0]),)),
        )
        for sample in samples
    ]  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_the_standard_error_is_that_of_drawing_whole_pictures(name: str) -> None:
    samples = prepared(name, seed=3)
    number = NUMBERS.get(name, plain)
    found = aggregate(name, samples)
    assert found.value == pytest.approx(number(samples, np.ones((1, len(samples))))[0], abs=5e-4)  # llavabench rounds
    assert found.stderr == pytest.approx(number(samples, weights_of(samples)).std(ddof=1), rel=0.1)


@pytest.mark.parametrize("name", [name for name in PARTS if facts_of(name).score])
def test_the_error_of_a_difference_is_that_of_the_same_draws_of_both(name: str) -> None:
    a, b = prepared(name, seed=3), prepared(name, seed=3)
    worse = np.random.default_rng(9).random(len(b)) < 0.3
    other = {"yes": "no", "no": "yes"}
    b = [
        replace(s, score=0.0, parsed=other[s.document.answers[0]], numbers=(s.numbers[0], 1.0)) if w else s
        for s, w in zip(b, worse, strict=True)
    ]
    weights = weights_of(a)
    found = difference_of_scores(name, [a], [b]).estimate
    expected = NUMBERS[name](a, weights) - NUMBERS[name](b, weights)
    assert found.stderr == pytest.approx(expected.std(ddof=1), rel=0.1)


@pytest.mark.parametrize("name", PARTS)
def test_contributions_of_samples_have_the_mean_and_the_error_of_the_score(name: str) -> None:
    samples = prepared(name, seed=3)
    brought = np.array(score_by_sample(name, samples))
    assert brought.mean() == pytest.approx(aggregate(name, samples).value)
    _, numbers = np.unique([str(sample.cluster) for sample in samples], return_inverse=True)
    error = np.linalg.norm(np.bincount(numbers, brought - brought.mean())) / len(samples)
    expected = NUMBERS.get(name, plain)(samples, weights_of(samples)).std(ddof=1)
    assert error == pytest.approx(expected, rel=0.1)
