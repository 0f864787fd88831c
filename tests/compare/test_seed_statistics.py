"""The error of a difference over documents and seeds, against simulation, scipy and hand calculation."""

from __future__ import annotations

import dataclasses
import math
import random
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from mm_moslora.compare.seed_statistics import ArmEstimate, Components, TaskScores, arm_mean, differences, holm
from tests.support.paired_scores import paired


def scores(rows, clusters=None) -> TaskScores:
    return TaskScores(scores=rows, clusters=clusters or list(range(len(rows[0]))))


def difference(a, b, *, bounded: bool = True) -> ArmEstimate:
    return differences({"": a}, b, bounded=bounded)[""]


def test_one_seed_is_the_paired_t_test():
    a, b = [1.0, 0.0, 1.0, 1.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    ours = difference({"t": scores([a])}, {"t": scores([b])})
    theirs = paired(a, b)
    assert (ours.value, ours.stderr) == pytest.approx((theirs.value, theirs.stderr))
    # The harness ends the interval of a difference of shares at 1; a row of a comparison does so, too.
    assert (ours.low, min(ours.high, 1.0), ours.p_value) == pytest.approx((theirs.low, theirs.high, theirs.p_value))
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed (extra dev)")
    assert ours.p_value == pytest.approx(scipy.ttest_rel(a, b).pvalue)


def runs(*means: float, documents: int = 50, seeds=()) -> dict[str, TaskScores]:
    """An arm whose documents all score the same, so that only its runs differ."""
    return {"t": TaskScores(scores=[[mean] * documents for mean in means], clusters=range(documents), seeds=seeds)}


def test_two_arms_without_variance_between_documents_are_a_paired_t_test_of_seeds():
    ours_a, ours_b = (0.50, 0.58, 0.54, 0.51), (0.40, 0.46, 0.49, 0.40)
    ours = difference(runs(*ours_a), runs(*ours_b), bounded=False)
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed (extra dev)")
    theirs = scipy.ttest_rel(ours_a, ours_b)
    assert (ours.p_value, ours.degrees) == pytest.approx((theirs.pvalue, 3))
    assert ours.documents == pytest.approx(0.0, abs=1e-12)


def test_several_arms_are_a_randomised_block_design():
    """The residual of arms and seeds, worked by hand: the difference of two means has the variance 2 MS / K."""
    table = np.array([[0.50, 0.58, 0.54], [0.41, 0.48, 0.46], [0.61, 0.66, 0.65]])
    found = differences({"b": runs(*table[1]), "c": runs(*table[2])}, runs(*table[0]), bounded=False)
    rest = table - table.mean(0) - table.mean(1)[:, None] + table.mean()
    square = np.square(rest).sum() / 4
    for one in found.values():
        assert (one.stderr, one.degrees) == pytest.approx((math.sqrt(2 * square / 3), 4))
        assert one.components.seeds == pytest.approx(2 * square)


def test_an_uneven_arm_keeps_its_own_variance():
    even = [runs(0.50, 0.58, 0.54), runs(0.41, 0.49, 0.46), runs(0.61, 0.69, 0.65)]
    found = differences({"b": even[1], "c": even[2], "wide": runs(0.50, 0.40, 0.75)}, even[0])
    assert found["wide"].stderr > 1.2 * found["b"].stderr
    assert found["wide"].degrees < 4


def test_the_variance_of_an_uneven_arm_is_one_source_of_error():
    """It is a part of the mean over arms, too. Worked by hand with the squares that the arm adds to the others'."""
    tables = {"wide": (0.30, 0.66, 0.50), "b": (0.50, 0.58, 0.54), "reference": (0.41, 0.48, 0.46)}

    def squares(*names):
        table = np.array([tables[name] for name in names])
        return float(np.square(table - table.mean(0) - table.mean(1)[:, None] + table.mean()).sum())

    rest = squares("b", "reference")
    own = squares(*tables) - rest
    arms = {name: runs(*tables[name]) for name in ("wide", "b")}
    found = differences(arms, runs(*tables["reference"]), bounded=False)["wide"]
    parts = (own / 2 + own / 4, rest / 4)  # its own variance, and its part and the rest of the mean over arms
    assert found.stderr**2 == pytest.approx(sum(parts) / 3)
    assert found.degrees == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 2))
    assert found.run_degrees == pytest.approx(found.degrees)
    assert found.degrees < 2.5


@pytest.mark.parametrize("rivals", [1, 4])
@pytest.mark.parametrize("documents", [1, 30], ids=["each seed", "each document of each seed"])
def test_what_a_seed_does_to_all_arms_alike_changes_nothing(rivals: int, documents: int):
    generator = np.random.default_rng(3)
    tables = generator.normal(0, 0.1, (rivals + 1, 4, 30))

    def found(shift):
        reference, *arms = ({"t": scores(table + shift)} for table in tables)
        return differences(dict(enumerate(arms)), reference, bounded=False)

    plain, shifted = found(np.zeros((4, 1))), found(generator.normal(0, 5, (4, documents)))
    for name, one in plain.items():
        assert (shifted[name].value, shifted[name].stderr, shifted[name].degrees) == pytest.approx(
            (one.value, one.stderr, one.degrees), rel=1e-6
        )
        assert shifted[name].components.answers == pytest.approx(one.components.answers, rel=1e-6)


def test_what_a_seed_does_to_both_arms_is_no_error_where_answers_are_missing():
    generator = np.random.default_rng(4)
    arm, reference = generator.normal(0, 0.1, (2, 4, 30))
    arm[3, 6:] = math.nan
    plain, shifted = (
        difference({"t": scores(arm + shift)}, {"t": scores(reference + shift)}, bounded=False)
        for shift in (0.0, np.array([[0.0], [0.0], [0.0], [5.0]]))
    )
    assert (shifted.value, shifted.stderr) == pytest.approx((plain.value, plain.stderr), rel=1e-6)


def test_a_seed_with_few_answers_counts_in_the_error_as_in_the_estimate():
    """A run that is off by 1 moves the mean of four by 0.25, however few of its answers are there."""
    generator = np.random.default_rng(5)
    arm, reference = generator.normal(0, 0.1, (2, 4, 30))
    arm[3] += 1.0
    whole = difference({"t": scores(arm)}, {"t": scores(reference)}, bounded=False)
    for table in (arm, reference):
        table[3, 2:] = math.nan
    found = difference({"t": scores(arm)}, {"t": scores(reference)}, bounded=False)
    assert found.value == pytest.approx(whole.value, abs=0.1)
    assert found.stderr > 0.8 * whole.stderr


def test_a_seed_that_answered_only_what_the_other_arm_lacks_does_not_count():
    nan = math.nan
    arm = [[0.3, nan, nan, nan], [nan, 0.5, 0.2, 0.9], [0.1, 0.4, 0.3, 0.7]]
    reference = [[nan, 0.2, 0.1, 0.4]] * 3
    found = difference({"t": scores(arm)}, {"t": scores(reference)}, bounded=False)
    left = difference({"t": scores(arm[1:])}, {"t": scores(reference[1:])}, bounded=False)
    assert (found.value, found.stderr) == pytest.approx((left.value, left.stderr))
    assert found.size == left.size == (2, 3)


def test_arms_are_compared_on_the_seeds_that_both_have():
    """A seed moves both arms by 0.3; the arm that lacks it is not blamed, whatever the order of the rows."""
    reference = runs(0.50, 0.82, 0.52, 0.81, seeds=[0, 1, 2, 3])
    arm = runs(0.83, 0.55, 0.60, seeds=[3, 0, 2])
    found = difference(arm, reference, bounded=False)
    assert found.value == pytest.approx((0.02 + 0.05 + 0.08) / 3)
    assert found.size[0] == 3
    assert found.stderr == pytest.approx(0.03 / math.sqrt(3))
    strange = runs(0.5, 0.6, seeds=[4, 5])
    assert list(differences({"a": arm, "strange": strange}, reference)) == ["a"]
    assert differences({"strange": strange}, reference) == {}
    assert differences({"a": arm}, {"t": TaskScores(scores=[], clusters=range(50))}) == {}
    assert differences({"strange": strange}, reference) == {}


def test_an_arm_with_fewer_seeds_lends_its_degrees_of_freedom():
    """The third arm has two of four seeds; its residual counts for the others."""
    generator = np.random.default_rng(3)
    tables = [runs(*(0.5 + generator.normal(0, 0.05, count))) for count in (4, 4, 2)]
    both = differences({"b": tables[1], "c": tables[2]}, tables[0], bounded=False)
    alone = difference(tables[1], tables[0], bounded=False)
    assert (both["b"].degrees, alone.degrees) == pytest.approx((4, 3))
    assert both["b"].value == pytest.approx(alone.value)


def holds(clusters, *, tasks=1, rounds=400) -> float:
    """How often the interval of one seed holds, where what documents of a cluster share decides."""
    generator, found = np.random.default_rng(0), 0
    for _ in range(rounds):
        shared = generator.normal(0, 0.05, max(map(max, clusters)) + 1)
        arm = {f"t{i}": scores([list(shared[list(of)])], list(of)) for i, of in enumerate(clusters)}
        estimate = difference(arm, {name: scores([[0.0] * len(t.clusters)], t.clusters) for name, t in arm.items()})
        found += estimate.low <= 0 <= estimate.high
    return found / rounds


@pytest.mark.parametrize(
    "clusters",
    [
        [[index // 6 for index in range(18)]],
        [[index // 6 for index in range(48)]],
        [[0] * 90 + list(range(1, 31))],
        [list(range(5)), list(range(300))],
        [list(range(5)), list(range(300, 600))],
    ],
    ids=["3 even", "8 even", "one holds three quarters", "a few of many pictures", "few and many pictures"],
)
def test_few_and_uneven_clusters_keep_the_rate_of_their_intervals(clusters):
    assert holds(clusters) > 0.93


def test_a_task_that_cannot_show_its_error_shows_no_difference():
    """Three documents, or one, that all differ by 1 say little of others, whatever another task knows."""
    generator = np.random.default_rng(1)
    for documents, pictures in ((1, 300), (3, 300), (1, 0), (3, 0)):
        own = list(range(pictures, pictures + 300))
        many = {name: scores((generator.random((3, 300)) < 0.5).astype(float), own) for name in ("arm", "reference")}
        arm = {"few": scores([[1.0] * documents] * 3), "many": many["arm"]}
        reference = {"few": scores([[0.0] * documents] * 3), "many": many["reference"]}
        found = difference(arm, reference)
        assert found.fewest < 10
        assert found.low < 0.25


@pytest.mark.parametrize("bounded", [True, False])
def test_documents_of_one_picture_show_no_difference(bounded: bool):
    generator = np.random.default_rng(2)
    arm, reference = 0.6 + generator.normal(0, 0.02, (3, 20)), 0.5 + generator.normal(0, 0.02, (3, 20))
    found = difference({"t": scores(arm, [0] * 20)}, {"t": scores(reference, [0] * 20)}, bounded=bounded)
    assert not found.p_value < 0.5  # unknown without bounds
    assert math.isnan(found.low) != bounded
    assert found.components.documents >= 0


def test_questions_on_one_picture_count_together():
    a = [[1.0] * 4 + [0.0] * 4 + [1.0] * 4]
    b = [[0.0] * 4 + [0.0] * 4 + [1.0] * 4]
    pictures = [index // 4 for index in range(12)]
    apart = difference({"t": scores(a)}, {"t": scores(b)})
    together = difference({"t": scores(a, pictures)}, {"t": scores(b, pictures)})
    assert together.stderr > 1.8 * apart.stderr
    assert together.degrees == 2


def test_tasks_on_the_same_pictures_bring_no_more_documents():
    generator = np.random.default_rng(6)
    a, b = (generator.random((2, 3, 100)) < 0.5).astype(float)
    one = difference({"t": scores(a)}, {"t": scores(b)})
    twice = difference({"t": scores(a), "u": scores(a)}, {"t": scores(b), "u": scores(b)})
    assert (twice.value, twice.stderr, twice.degrees) == pytest.approx((one.value, one.stderr, one.degrees), rel=0.02)
    assert (one.groups, twice.groups) == (100, 100)
    others = [("u", number) for number in range(100)]
    apart = difference({"t": scores(a), "u": scores(a, others)}, {"t": scores(b), "u": scores(b, others)})
    assert apart.groups == 200
    assert apart.stderr < one.stderr


def test_equal_differences_in_each_of_two_tasks_prove_no_more_than_the_smaller_task():
    a = {"small": scores([[1.0] * 3] * 2), "large": scores([[1.0] * 100] * 2, [("l", n) for n in range(100)])}
    b = a | {"small": scores([[0.0] * 3] * 2)}
    both, alone = difference(a, b), difference({"t": a["small"]}, {"t": b["small"]})
    assert (both.stderr, both.value) == (0.0, 0.5)
    assert (both.p_value, alone.p_value) == pytest.approx((0.25, 0.25))
    assert (both.groups, both.fewest) == (103, 3)


def test_more_comparisons_take_a_larger_difference():
    a, b = np.random.default_rng(7).normal(0, 1, (2, 4, 30))
    found = difference({"t": scores(a)}, {"t": scores(b)}, bounded=False)
    assert found.detectable(comparisons=2) > found.detectable()
    equal = difference({"t": scores([[1.0] * 9] * 3)}, {"t": scores([[1.0] * 9] * 3)})
    assert equal.detectable(comparisons=2) > equal.detectable()


def test_the_variance_of_runs_is_known_from_other_arms():
    one = runs(0.5, seeds=[0])
    alone = differences({"a": one}, runs(0.4, 0.45, 0.43))["a"]
    among = differences({"a": one, "b": runs(0.5, 0.56, 0.53)}, runs(0.4, 0.45, 0.43))["a"]
    assert (alone.run_degrees, among.run_degrees) == (0.0, 2.0)
    assert among.stderr > alone.stderr == 0


def test_tasks_weigh_equally():
    long, short = [[1.0, 0.0] * 50], [[1.0] * 4]
    nothing = {"long": scores([[0.0] * 100]), "short": scores([[0.0] * 4])}
    assert difference({"long": scores(long), "short": scores(short)}, nothing).value == pytest.approx(0.75)


def simulate(generator: random.Random, *, seeds: int, documents: int, spread: float, effect: float):
    """Right/wrong scores; their probability depends on the document, the arm's run and chance."""
    hardness = [generator.gauss(0, 1.0) for _ in range(documents)]

    def arm(shift):
        rows = []
        for _ in range(seeds):
            run = generator.gauss(0, spread)
            rows.append(
                [float(generator.random() < 1 / (1 + math.exp(-(h + run + shift)))) for h in hardness]
            )  # fmt: skip
        return {"t": scores(rows)}

    return arm(effect), arm(0.0)


@pytest.mark.parametrize(("spread", "seeds"), [(0.0, 3), (0.5, 3), (0.5, 5)])
def test_two_equal_arms_rarely_differ_significantly(spread, seeds):
    """The rate of false positives stays near 5 %; an error from documents alone would give several times that."""
    generator = random.Random(7)
    runs = [simulate(generator, seeds=seeds, documents=80, spread=spread, effect=0.0) for _ in range(250)]
    alarms = sum(difference(a, b).p_value < 0.05 for a, b in runs) / len(runs)
    naive = 0
    for a, b in runs:
        means = [[fmean(column) for column in zip(*arm["t"].scores, strict=True)] for arm in (a, b)]
        naive += paired(*means).p_value < 0.05
    assert alarms <= 0.08
    if spread:
        assert naive / len(runs) > 0.2


def test_a_true_difference_of_about_the_detectable_size_is_seen():
    generator = random.Random(3)
    pairs = [simulate(generator, seeds=5, documents=200, spread=0.1, effect=0.45) for _ in range(150)]
    found = [difference(a, b) for a, b in pairs]
    seen = sum(item.p_value < 0.05 and item.value > 0 for item in found) / len(found)
    claimed = sorted(item.detectable() for item in found)[len(found) // 2]
    true = sum(item.value for item in found) / len(found)
    assert true > claimed
    assert 0.7 < seen < 0.95  # four times out of five, and degrees of freedom as few as four
    assert found[0].detectable(comparisons=5) > found[0].detectable()


@pytest.mark.parametrize(
    ("wide", "least"), [(None, 0.94), (1, 0.91), (0, 0.89)], ids=["even", "an arm", "the reference"]
)
def test_the_variance_between_runs_is_pooled_over_arms(wide: int | None, least: float):
    """Seven arms of three runs: narrow intervals that hold, also where the runs of one spread three times as much."""
    generator, held, widths = np.random.default_rng(11), [], []
    for _ in range(120):
        hard = generator.normal(0, 1, 50)
        arms = {
            str(arm): {
                "t": scores(
                    hard
                    + (3 if arm == wide else 1) * generator.normal(0, 0.3, (3, 1))
                    + generator.normal(0, 1, (3, 50))
                )
            }
            for arm in range(7)
        }
        reference = arms.pop("0")
        found = differences(arms, reference, bounded=False)
        held.append([one.low <= 0 <= one.high for one in found.values()])
        alone = difference(arms["1"], reference, bounded=False)
        assert alone.value == found["1"].value
        widths.append((found["1"].half_width, alone.half_width))
    assert np.mean(held) > least
    if wide is None:
        pooled, alone = np.median(widths, axis=0)
        assert pooled < 0.95 * alone


@pytest.mark.parametrize("of", ["arms", "runs"])
def test_equal_scores_have_an_unknown_error_instead_of_zero(of: str):
    """Three equal differences show nothing, thirty do, and thirty equal scores bound the difference."""

    def less(a, b, clusters=None):
        if of == "runs":
            return paired(a, b, clusters=clusters)
        return difference({"t": scores([a], clusters)}, {"t": scores([b], clusters)})

    few, many = less([1.0] * 3, [0.0] * 3), less([0.9] * 30, [0.4] * 30)
    assert few.p_value == pytest.approx(0.25)
    assert few.low < 0 < few.high
    assert many.p_value < 1e-6
    assert 0 < many.low < 0.5 == pytest.approx(many.high)
    one_picture = less([1.0] * 30, [0.0] * 30, [index // 10 for index in range(30)])
    assert (one_picture.p_value, one_picture.groups) == (pytest.approx(0.25), 3)
    for size in (5, 6, 7):
        exact = less([0.0] * size, [1.0] * size)
        assert (exact.p_value < 0.05) == (exact.high < 0), "the interval and the test contradict each other"
    same = less([1.0, 0.0] * 15, [1.0, 0.0] * 15)
    assert same.p_value == 1.0
    assert (same.low, same.high) == (pytest.approx(-0.0950, abs=1e-4), pytest.approx(0.0950, abs=1e-4))


def test_the_error_of_an_arms_mean_includes_its_seeds():
    rows = [[1.0, 0.0] * 100, [1.0, 1.0, 1.0, 0.0] * 50]
    one, two = arm_mean({"t": scores(rows[:1])}), arm_mean({"t": scores(rows)})
    assert (one.value, two.value) == (0.5, 0.625)
    assert two.stderr > one.stderr


def test_missing_answers_leave_the_estimate_and_its_coverage_alone():
    """A fifth of the answers is missing, more of one arm and of one seed; the interval still holds the truth."""
    generator, held, runs = random.Random(5), 0, 200
    for _ in range(runs):
        hardness = [generator.gauss(0, 1.0) for _ in range(60)]

        def arm(share, hard=hardness):
            rows = []
            for _ in range(4):
                shift = generator.gauss(0, 0.3)
                answers = [shift + h + generator.gauss(0, 0.5) for h in hard]
                rows.append([answer if generator.random() > share else math.nan for answer in answers])
            return {"t": scores(rows)}

        found = difference(arm(0.1), arm(0.3), bounded=False)
        held += found.low <= 0 <= found.high
    assert 0.92 < held / runs < 0.99


def test_hostile_scores_are_refused_or_leave_the_error_unknown():
    grid = [[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    whole = difference({"t": scores(grid)}, {"t": scores([[0.0] * 3] * 2)})
    gone = difference({"t": scores([*grid, [math.nan] * 3])}, {"t": scores([[0.0] * 3] * 2)})
    assert gone == whole, "a seed without any answer does not count"
    with pytest.raises(ValueError, match="different documents"):
        difference({"t": scores(grid)}, {"t": scores(grid, ["a", "b", "c"])})
    with pytest.raises(ValueError, match="different tasks"):
        difference({"t": scores(grid)}, {"u": scores(grid)})
    with pytest.raises(ValueError, match="no document has a score of every arm"):
        difference({"t": scores([[1.0, math.nan]])}, {"t": scores([[math.nan, 1.0]])})
    one = difference({"t": scores([[-1.0], [-1.2]])}, {"t": scores([[-2.0], [-2.1]])}, bounded=False)
    assert one.degrees < 3, "one document: the error is that of the seeds"
    right = difference({"t": scores([[1.0] * 9] * 3)}, {"t": scores([[1.0] * 9] * 3)})
    assert (right.value, right.stderr) == (0.0, 0.0)
    assert right.high == pytest.approx(1 - 0.05 ** (1 / 9))
    alike = difference({"t": scores([[-1.0] * 9])}, {"t": scores([[-2.0] * 9])}, bounded=False)
    assert math.isnan(alike.stderr)
    assert math.isnan(alike.p_value)


def test_holm():
    """Worked by hand: sorted 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.2 x 1, each at least the one before."""
    assert holm([0.03, 0.01, math.nan, 0.02, 0.2])[:2] == pytest.approx([0.06, 0.04])
    assert holm([0.03, 0.01, math.nan, 0.02, 0.2])[3:] == pytest.approx([0.06, 0.2])
    assert math.isnan(holm([0.03, math.nan])[1])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def answers(generator: np.random.Generator, parts: Components, *, seeds: int, documents: int, effect: float = 0.0):
    """Scores of two arms with these components of their difference."""
    common = generator.normal(0, 1, documents)  # cancels
    own = generator.normal(0, math.sqrt(parts.documents), documents)
    arms = []
    for shift in (effect + own, 0.0):
        run = generator.normal(0, math.sqrt(parts.seeds / 2), (seeds, 1))
        arms.append(common + shift + run + generator.normal(0, math.sqrt(parts.answers / 2), (seeds, documents)))
    return arms


def between(arms, seeds: int, *, missing: Any = None):
    rows = [arm[:seeds].copy() for arm in arms]
    for arm in rows if missing is not None else ():
        arm[missing.random(arm.shape) < 0.2] = math.nan
    return difference(*({"t": scores(arm)} for arm in rows), bounded=False)


@pytest.mark.parametrize("missing", [False, True])
def test_known_components_are_recovered(missing: bool):
    parts = Components(documents=0.5, seeds=0.1, answers=1.5)
    generator = np.random.default_rng(1)
    found = [
        between(answers(generator, parts, seeds=4, documents=60), 4, missing=generator if missing else None)
        for _ in range(200)
    ]
    # Of four answers of which a fifth is missing, the mean has 1.365 times the variance of four.
    expected = dataclasses.asdict(parts) | ({"answers": 1.365 * parts.answers} if missing else {})
    for name, value in expected.items():
        mean = sum(getattr(one.components, name) for one in found) / len(found)
        # An arm that looks uneven counts alone and in the mean, so that the part of the seeds is rather too large.
        assert mean == pytest.approx(value, rel=0.4 if name == "seeds" else 0.2), name
    held = sum(one.low <= 0 <= one.high for one in found) / len(found)
    assert 0.92 < held < 0.985


@pytest.mark.parametrize("wide", [None, 1], ids=["even", "an arm uneven"])
def test_intervals_of_many_arms_hold(wide: int | None):
    """Seven rivals that are equal to the reference, on two tasks; runs of an uneven arm spread more."""
    generator, held = np.random.default_rng(3), []
    for _ in range(40):
        alike, *runs = generator.normal(0, math.sqrt(0.05), (9, 3, 1))
        drawn: list[dict[str, TaskScores]] = [{} for _ in runs]
        for task in range(2):
            common = generator.normal(0, 1, 60)
            for arm, run in enumerate(runs):
                own = generator.normal(0, math.sqrt(0.15), 60) + generator.normal(0, math.sqrt(0.5), (3, 60))
                latent = common + own + alike + (3 * run if arm == wide else run)
                drawn[arm][f"task {task}"] = scores(latent, [(task, number) for number in range(60)])
        reference, *arms = drawn
        found = differences(dict(enumerate(arms)), reference, bounded=False)
        held.append([one.low <= 0 <= one.high for one in found.values()])
    assert np.mean(held, axis=0).min() > 0.85
    assert np.mean(held) > 0.93
