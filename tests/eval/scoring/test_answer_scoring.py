"""Defaults where reference implementations have bugs, statistics against textbook values, baselines, corpus metrics."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mm_moslora_eval.metrics import exact_match, multiple_choice, vqa_accuracy
from mm_moslora_eval.metrics.general import table_similarity
from mm_moslora_eval.protocol.task import Decoding, Source, Task
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.baselines import TrainingAnswer, baseline
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.request_preparation import Preparation, deal
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring import estimates
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, METRICS, score_answer
from mm_moslora_eval.scoring.estimates import estimate, mean_of
from mm_moslora_eval.scoring.measured_scores import aggregate
from mm_moslora_eval.scoring.score_differences import difference_of_scores
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import DataSet, Document
from mm_moslora_eval.sources.source_images import Hasher, derangement, mean_image
from mm_moslora_eval.task_files.mmvet import rules as mmvet
from mm_moslora_eval.task_files.pope import rules as pope

from tests.eval.eval_data import picture
from tests.eval.eval_fake import FakeModel
from tests.support.paired_scores import paired

OPTIONS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}


def task(**changes: Any) -> Task:
    return Task(**{"name": "t", "source": Source(kind="tsv", path="t.tsv"), **changes})


def test_defaults_do_not_have_the_faults_of_the_reference_implementations() -> None:
    assert multiple_choice.extract_letter("Sorry, I can't help with images of people yet.", OPTIONS) == ""
    assert multiple_choice.extract_letter("a rabbit", {"A": "", "B": "rabbit"}) == "B"
    assert vqa_accuracy.normalize("a." * 40) == "a" * 40
    assert vqa_accuracy.normalize_evalai("b." * 40) != "b" * 40
    assert vqa_accuracy.soft_accuracy("yes", ["Yes"]) == 1.0
    assert vqa_accuracy.soft_accuracy("yes", ["yes", "yes", "no"]) == pytest.approx(2 / 3 * 0.5 + 1 / 3)
    assert exact_match.extract_yes_no("") == ""
    assert exact_match.extract_yes_no("eyes") == ""
    assert mmvet.mmvet_grade("nan") is None
    assert mmvet.mmvet_scores([("rec", 1.0), ("rec,ocr", 0.0)])["by_capability"]["rec"] == 50.0
    assert exact_match.exact_match(" Yes. ", "yes") == 1.0
    right = pope.rates([("yes", "yes"), ("no", "yes"), ("", "yes"), ("no", "no")])
    assert (right["recall"], right["yes_ratio"], right["accuracy"]) == (pytest.approx(1 / 3), 0.25, 0.5)


@given(st.text(max_size=200))
def test_every_extractor_and_metric_survives_any_answer(text: str) -> None:
    extra = {"dataset": "boolq", "question_type": "multi_choice"}
    document = Document(id="1", question="q", options=OPTIONS, answers=("A",), category="x", extra=extra)
    for name in EXTRACTORS:
        assert isinstance(EXTRACTORS[name](text, document), str), name
    references = {"point_inside": "[0, 0, 9, 9]", "within": "3", "ccocr_fields_f1": '{"a": "b"}'}
    elsewhere = {"mathematics", "teds", "ocrbench_v2", "ccocr_fields_tree", "ccocr_document"}
    assert 0.0 <= table_similarity.teds(text, "<table><tr><td>a</td></tr></table>") <= 1.0
    for name in {*METRICS} - elsewhere:  # in a process of their own, with tests of their own
        asked = replace(document, answers=(references[name],)) if name in references else document
        assert 0.0 <= METRICS[name](text, asked) <= 1.0, name


def test_input_03_an_answer_that_cannot_be_read_is_wrong_and_counted() -> None:
    document = Document(id="1", question="q", answers=("",), category=None)
    scored = score_answer(document, "   ", extraction="text", metric="exact", cluster="1")
    assert scored.score == 0.0
    assert not scored.failed


def test_intervals() -> None:
    assert estimates.binomial_interval(0, 20) == (0.0, pytest.approx(0.16843, abs=1e-5))
    assert estimates.binomial_interval(3, 20) == pytest.approx((0.03207, 0.37893), abs=1e-5)
    assert estimates.t_quantile(0.95, 10) == pytest.approx(2.228138852, abs=1e-8)
    assert estimates.t_two_sided(2.228138852, 10) == pytest.approx(0.05, abs=1e-9)
    assert estimates.t_two_sided(1.0, 1) == pytest.approx(0.5, abs=1e-12)
    assert estimates.sign_test(9, 1) == pytest.approx(2 * 11 / 1024)
    assert estimates.sign_test(0, 0) == 1.0


def test_the_interval_covers_the_true_value_at_its_level() -> None:
    generator = random.Random(0)
    hits = 0
    for _ in range(1000):
        successes = sum(generator.random() < 0.9 for _ in range(60))
        low, high = estimates.binomial_interval(successes, 60)
        hits += low <= 0.9 <= high
    assert 0.94 <= hits / 1000 <= 0.99


def test_clusters_widen_the_error_of_correlated_samples() -> None:
    values = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    scores = [mean_of(values)]
    assert estimate(scores, range(8)).stderr == pytest.approx(estimates.sample_stddev(values) / math.sqrt(8))
    assert estimate(scores, list("aaaabbbb")).stderr > 1.5 * estimate(scores, range(8)).stderr


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_equal_scores_have_the_interval_of_their_number_of_pictures(right: float) -> None:
    samples = [
        Scored(document=Document(id=str(i), question="?"), text="", parsed="", score=right, cluster=i % 10)
        for i in range(40)
    ]
    found = aggregate("mean", samples)
    assert (found.stderr_kind, found.value, found.clusters) == ("clustered", right, 10)
    assert (found.low, found.high) == estimates.binomial_interval(10 * right, 10)


def test_a_paired_comparison_shows_more_than_two_intervals() -> None:
    generator = random.Random(1)
    hard = [float(generator.random() < 0.5) for _ in range(400)]
    better = [max(value, float(generator.random() < 0.05)) for value in hard]
    result = paired(better, hard)
    assert result.low > 0
    assert result.p_value < 0.01
    assert math.isnan(paired([1.0], [0.0]).p_value)


def test_the_detectable_difference_is_near_that_of_millers_worked_example() -> None:
    """Half of right answers, correlation one half: 2,181 samples for a difference of three points."""
    a = [float(n % 2) for n in range(2180)]
    b = [float((n + n // 2 % 2 * (n // 4 % 2 == 0)) % 2) for n in range(2180)]
    found = paired(a, b)
    assert found.stderr == pytest.approx(0.5 * math.sqrt(2 - 2 * 0.5) / math.sqrt(2181), rel=0.01)
    assert found.detectable == pytest.approx(0.03, rel=0.01)


@given(st.sets(st.text(max_size=5), min_size=2, max_size=30), st.integers(0, 100))
def test_derangement_has_no_fixed_point(names: set[str], seed: int) -> None:
    other = derangement(names, seed=seed)
    assert other.keys() == set(other.values()) == names
    assert all(name != shown for name, shown in other.items())
    assert other == derangement(sorted(names), seed=seed)


def test_mean_image_keeps_size_and_mean() -> None:
    from PIL import Image, ImageStat

    original = Image.open(__import__("io").BytesIO(picture(3))).convert("RGB")
    blind = mean_image(picture(3))
    assert blind.size == original.size
    assert [round(value) for value in ImageStat.Stat(original).mean] == list(blind.getpixel((0, 0)))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=40), st.integers(1, 5))
def test_ranks_share_everything_once_and_evenly(rows: list[tuple[int, int]], world: int) -> None:
    rows_documents = [
        Document(id=str(n), images=(picture(image),), question="q" * length, answers=("a",))
        for n, (image, length) in enumerate(rows)
    ]
    items = Preparation(task(), rows_documents, mode="own", seed=0, fingerprint="f", hasher=Hasher()).items
    shares = [deal(items, rank=rank, world_size=world) for rank in range(world)]
    assert sorted(item.index for share in shares for item in share) == list(range(len(rows)))
    pictures = [{item.image_ids for item in share} for share in shares]
    assert sum(map(len, pictures)) == len({item.image_ids for item in items})


def scored(rows: list[tuple[str, str, str, float]], **extra: str) -> list[Scored]:
    return [
        Scored(
            document=Document(id=name, question="q", answers=("yes",), category=category, extra=extra),
            text="yes",
            parsed="yes",
            score=score,
            cluster=cluster,
        )
        for name, category, cluster, score in rows
    ]


def test_a_sum_is_compared_sample_by_sample() -> None:
    a = scored([(str(n), "OCR", f"i{n // 2}", 1.0) for n in range(40)])
    b = [replace(one, score=float(n % 4 != 0)) for n, one in enumerate(a)]
    same = difference_of_scores("mme", [b], [b])
    assert (same.a, same.estimate.value, same.estimate.stderr) == (same.b, 0.0, 0.0)
    better = difference_of_scores("mme", [a], [list(reversed(b))])
    assert (better.a, better.b, better.estimate.value) == (200.0, 75.0 + 50.0, 75.0)
    assert 0 < better.estimate.low < 75.0 < better.estimate.high <= 200
    assert (better.wins, better.losses, better.ties) == (10, 0, 30)
    found = better.as_difference
    assert (found.value, found.low, found.unit, found.groups) == (75.0, better.estimate.low, "perception", 20)


def baseline_documents() -> tuple[tuple[Document, ...], DataSet]:
    rows = [
        ("is it red?", "yes"),
        ("is it red?", "yes"),
        ("is it red?", "no"),
        ("colour?", "blue"),
        ("colour?", "blue"),
    ]
    made = tuple(Document(id=str(n), question=q, answers=(a,)) for n, (q, a) in enumerate([*rows, ("once?", "never")]))
    return made, DataSet(documents=made, path="x", sha256="0")


def test_baselines_learn_from_the_set_or_from_training() -> None:
    made, data = baseline_documents()
    majority = baseline("majority", task(), made, data=data)
    assert majority.about["majority_answer"] == "blue"  # a tie with `yes`: the alphabetically first
    assert majority.score == pytest.approx(2 / 6)
    by_question = baseline("question_majority", task(), made, data=data)
    assert by_question.score == pytest.approx(4 / 6)  # the question that occurs once is not given away
    assert by_question.about["learned_from"] == "the evaluated set"
    training = [TrainingAnswer("Is it  RED?", "no"), TrainingAnswer("once?", "never")]
    trained = baseline("question_majority", task(), made, data=data, training=training)
    assert trained.about["learned_from"] == "training answers"
    assert trained.score == pytest.approx(2 / 6)


def test_option_scoring_needs_no_parsing(tmp_path: Path, write_tsv: Any, encoded: str) -> None:
    rows = [
        {"index": n, "image": encoded, "question": f"q{n}", "A": "x", "B": "y", "answer": "AB"[n % 2]} for n in range(6)
    ]
    chosen = get_task(f"tsv:{write_tsv(rows)}")
    by_likelihood = task(
        name="ll", source=chosen.source, decoding=Decoding(kind="loglikelihood"), extraction="letter", metric="equal"
    )
    one = EvaluationSettings(batch_size=2, rank=0, world_size=1)
    (result,) = evaluate(FakeModel(), by_likelihood, tmp_path / "run", modes=("own",), baselines=(), settings=one)
    assert result.score == 0.5  # the fake always prefers B
    assert result.counts.not_inferable == 0
