"""Scores, their intervals and differences, and the log-likelihood of references beside them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.protocol.model_interface import Answer, OptionScore, Request
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.paired_comparison import compare
from mm_moslora_eval.run.result_file import TaskResult, read_results
from mm_moslora_eval.run.scored_subsets import read_samples
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.estimates import Ratio, ScoreEstimate, estimate, mean_of
from mm_moslora_eval.scoring.measured_scores import aggregate, by_category, mean_likelihood
from mm_moslora_eval.scoring.score_differences import difference_of_scores, likelihood_difference
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document

from mm_moslora.utils.errors import EvalError
from tests.eval.eval_data import write_questions
from tests.eval.eval_fake import FakeModel
from tests.eval.scored_samples import PARTS, fitting, samples
from tests.support.paired_scores import paired

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", PARTS)
def test_no_interval_is_a_point(name: str, score: float) -> None:
    """All answers alike show that others are rare, not that there are none: 20 answers on 10 pictures."""
    found = aggregate(name, fitting(name, samples([score] * 20, pictures=10)))
    assert (found.clusters, found.stderr) == (10, 0.0)
    assert found.groups == (5 if "pope" in name and score else 10)  # F1 rests on the pictures that show something
    assert found.low <= found.value <= found.high
    whole = {"mme": 200.0, "caption": 10.0, "caption_plain": 10.0, "llavabench": 10.0}.get(name, 1.0)
    assert found.high - found.low > 0.2 * whole


@pytest.mark.parametrize("name", PARTS)
def test_an_interval_stays_within_the_bounds_of_the_score(name: str) -> None:
    scores = [float(index != 3) for index in range(40)]
    found = aggregate(name, fitting(name, samples(scores, pictures=20, categories=4)))
    assert 0 <= found.low < found.value < found.high <= (800 if name == "mme" else 10)
    right, wrong = (
        fitting(name, samples(of, pictures=4, categories=4)) for of in ([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0])
    )
    less = difference_of_scores(name, [right], [wrong]).estimate
    widest = {"mme": 800.0, "caption": 10.0, "caption_plain": 10.0, "llavabench": 10.0}.get(name, 1.0)
    assert -widest <= less.low <= less.high <= widest


def test_few_pictures_give_a_wide_interval_and_are_named() -> None:
    many, few = (aggregate("mean", samples([1.0] * 90 + [0.0] * 30, pictures=pictures)) for pictures in (120, 12))
    assert (many.clusters, few.clusters) == (120, 12)
    assert few.stderr_kind == "clustered"
    lone = aggregate("mean", samples([1.0, 0.0] * 30, pictures=1))
    assert math.isnan(lone.stderr)
    assert (lone.low, lone.high) == pytest.approx((0.025, 0.975), abs=0.01)


def test_categories_with_one_picture_each_show_no_error_and_widen_the_interval() -> None:
    found = aggregate("mmstar_macro", samples([1.0, 1.0, 1.0, 0.0], pictures=4, categories=4))
    alike = aggregate("mean", samples([1.0, 1.0, 1.0, 0.0], pictures=4))
    assert found.value == alike.value
    assert found.stderr >= 0.25
    assert found.high - found.low > 0.6


@pytest.mark.parametrize("sizes", [[2] * 11 + [60], [10] * 12, [1] * 20, [1, 2, 3, 4, 5, 6]])
def test_degrees_of_freedom_are_those_of_bell_and_mccaffrey(sizes: list[int]) -> None:
    """Of the quadratic form that the variance is, for independent samples."""
    clusters, count = np.repeat(range(len(sizes)), sizes), sum(sizes)
    form = np.zeros((count, count))
    for cluster, size in enumerate(sizes):
        row = ((clusters == cluster) - size / count) / count / math.sqrt(1 - size / count)
        form += np.outer(row, row)
    scores = np.random.default_rng(0).random(count)
    found = estimate([mean_of(scores)], clusters)
    assert found.degrees == pytest.approx(max(1.0, np.trace(form) ** 2 / np.trace(form @ form)))
    assert found.stderr == pytest.approx(math.sqrt(scores @ form @ scores))


def test_degrees_of_freedom_are_few_where_a_small_category_weighs_much() -> None:
    inside = np.array([1.0] * 4 + [0.0] * 200)
    scores = np.random.default_rng(0).random(204)
    halves = [Ratio(top=scores * part, bottom=part) * 0.5 for part in (inside, 1 - inside)]
    assert 3 <= estimate(halves, range(204)).degrees < 4


@pytest.mark.parametrize("pictures", [5, 12, 30, 1001])
def test_power_is_that_of_the_t_test(pictures: int) -> None:
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed (extra dev)")
    generator = np.random.default_rng(pictures)
    found = paired(list(generator.random(pictures)), list(generator.random(pictures)))
    shift, bound = found.detectable / found.stderr, scipy.t.ppf(0.975, pictures - 1)
    assert scipy.nct.sf(bound, pictures - 1, shift) == pytest.approx(0.8, abs=0.001)


def test_a_difference_of_several_seeds_is_of_their_mean_scores() -> None:
    best = samples([1.0] * 40, pictures=20, categories=4)
    runs = [samples([float(index % 5 != seed) for index in range(40)], pictures=20, categories=4) for seed in (0, 1)]
    found = difference_of_scores("mme", [best], runs)
    scores = [aggregate("mme", run).value for run in runs]
    assert found.seeds_b == pytest.approx(scores)
    assert found.estimate.value == pytest.approx(800 - sum(scores) / 2)
    assert found.estimate.low < found.estimate.value < found.estimate.high
    turned = difference_of_scores("mme", runs, [best])
    one, other = turned.estimate, found.estimate
    assert (one.value, one.p_value) == pytest.approx((-other.value, other.p_value))


def parts_of(name: str, scores: Sequence[float]) -> dict[str, ScoreEstimate]:
    return by_category(name, samples(scores, pictures=20, categories=4))


def test_categories_have_the_score_of_the_task() -> None:
    scores = [float(index % 8 != 0) for index in range(40)]  # of the sub-task `existence`, pictures 0, 8 and 16 once
    parts, whole = parts_of("mme", scores), aggregate("mme", samples(scores, pictures=20, categories=4))
    assert sum(part.value for part in parts.values()) == pytest.approx(whole.value)
    assert parts["count"].value == 200.0
    assert parts["count"].low < 160
    assert all(0 <= part.value <= 1 for part in parts_of("pope", scores).values())


def test_captions_of_a_category_are_weighed_by_the_words_of_the_set() -> None:
    """`land` alone would give its common word no weight."""
    texts = {"a": ("a cat runs far", "a cat runs"), "b": ("a cat sleeps now", "a cat eats"), "c": ("rain at sea",) * 2}
    made = [
        Scored(
            document=Document(id=name, question="?", answers=(text,), category="water" if name == "c" else "land"),
            text=said, parsed=said, score=0.0, cluster=name,
        )
        for name, (text, said) in texts.items()
    ]  # fmt: skip
    parts, whole = by_category("caption_plain", made), aggregate("caption_plain", made)
    alone = aggregate("caption_plain", made[:2])
    assert parts["land"].value > alone.value
    assert (2 * parts["land"].value + parts["water"].value) / 3 == pytest.approx(whole.value)


def test_circular_needs_numbered_documents_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "q1", "question": "?", "answer": "A"}) + "\n")
    task = tmp_path / "t.yaml"
    task.write_text("name: t\nsource: {kind: llava, path: q.jsonl}\naggregation: circular\n")
    model = FakeModel()
    with pytest.raises(EvalError, match=r"1 of 1 ids are no integers \(first: 'q1'\).*rotation k of question n"):
        evaluate(model, get_task(str(task)), tmp_path / "run", settings=ONE)
    assert model.asked == []


@pytest.mark.parametrize(("aggregation", "unit"), [("mean", None), ("pope", "F1"), ("mmstar_macro", "macro average")])
def test_a_result_names_a_score_that_is_no_share_of_right_answers(
    tmp_path: Path, aggregation: str, unit: str | None
) -> None:
    rows = [{"id": f"q{number}", "question": "?", "answer": ("yes", "no")[number % 2]} for number in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "t.yaml"
    task.write_text(f"name: t\nsource: {{kind: llava, path: q.jsonl}}\naggregation: {aggregation}\n")
    (found, *_) = evaluate(FakeModel(), get_task(str(task)), tmp_path / "run", settings=ONE, modes=("own",))
    assert found.about.get("unit") == unit


class Likely(FakeModel):
    """Gives the reference of question qN the log-likelihood -N - more; that of q3 is not finite."""

    def __init__(self, more: float) -> None:
        super().__init__(fingerprint=f"likely{more}", fail_on=["q5"])
        self.more = more

    def _answer(self, request: Request) -> Answer:
        number = int(request.id.removeprefix("q"))
        value = math.nan if number == 3 else -number - self.more
        answer = super()._answer(request)
        assert request.reference
        return dataclasses.replace(answer, reference=OptionScore(logprob=value, tokens=2))


def test_it_is_stored_per_document_and_compared_in_pairs(tmp_path: Path) -> None:
    task = get_task(f"llava:{write_questions(tmp_path / 'data', count=12)}")
    runs = {more: tmp_path / f"run{more}" for more in (0.0, 0.5)}
    for more, run in runs.items():
        found = evaluate(Likely(more), task, run, settings=ONE)
        assert ["nats" in result.likelihood for result in found] == [True] * 3 + [False] * 2
        numbers = [-n - more for n in range(12) if n not in (3, 5)]
        own = found[0].likelihood
        assert (own["n"], own["missing"]) == (10, 2)
        assert own["nats"] == pytest.approx(sum(numbers) / 10)
        assert own["per_token"] == pytest.approx(own["nats"] / 2)
        assert own["low"] < own["nats"] - own["stderr"] < own["nats"] < own["high"] <= 0
        assert read_results(run)[0].likelihood == own
    row = read_samples(runs[0.0] / "questions@own" / "own")[7]
    assert row["reference"] == {"text": row["answers"][0], "logprob": -7.0, "tokens": 2}
    both = compare(*(run / "questions@own" / "own" for run in runs.values()))
    assert both.nats is not None
    assert (both.nats.left_out, both.nats.estimate.n) == (2, 10)
    assert "nats: A - B +0.5000 on every document; 2 documents without one are left out." in both.nats.text
    assert both.nats.text in eval_commands.comparison_text(both)
    shown = eval_commands.table(read_results(runs[0.0]))
    assert "nats" in shown.splitlines()[0]
    few = dataclasses.replace(ONE, limit=1)
    single = eval_commands.table(
        evaluate(Likely(0.5), task, tmp_path / "one", settings=few, modes=("own",), baselines=())
    )
    assert "-0.5000 ± - " in single


def reason(result: TaskResult) -> str:
    shown = eval_commands.table([result])
    assert "nats" not in shown.splitlines()[0]
    assert f"no likelihood: {result.likelihood['none']}." in shown
    return str(result.likelihood["none"])


def test_a_missing_likelihood_has_a_reason(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "data", count=4)
    task = get_task(f"llava:{questions}")
    own, *_ = evaluate(FakeModel(), task, tmp_path / "fake", settings=ONE, modes=("own",))
    assert reason(own) == "the backend gives no log-likelihoods of given texts"
    (thinker := FakeModel()).thinking_tokens = 64  # type: ignore[attr-defined]
    (own,) = evaluate(thinker, task, tmp_path / "thinks", settings=ONE, modes=("own",), baselines=())
    assert "asked to think" in reason(own)
    judged = dataclasses.replace(task, metric="mmvet_judge")
    (own,) = evaluate(FakeModel(), judged, tmp_path / "judged", settings=ONE, modes=("own",))
    assert reason(own) == "a judge compares the answers with the references"
    assert judged.reference_of(Document(id="a", question="?", answers=("x",))) == ""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    questions.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "answer"}) + "\n" for row in rows))
    (own,) = evaluate(FakeModel(), task, tmp_path / "none", settings=ONE, modes=("own",))
    assert reason(own) == "the task has no references"


def test_the_reference_is_the_most_frequent_answer_in_the_tasks_own_words() -> None:
    document = Document(id="a", question="?", answers=("blue", "red", "red", "blue", "green"))
    assert document.reference == "blue", "of equally frequent ones the first"
    task = get_task("commonsense_boolq@official")
    assert task.reference_of(Document(id="a", question="?", answers=("true",))) == "the correct answer is true"
    with pytest.raises(EvalError, match=r"expected a text with \{answer\}"):
        dataclasses.replace(task, reference="true")


def test_one_document_and_none() -> None:
    assert mean_likelihood([{"reference": None}, {}], ["a", "b"]) == {}
    one = mean_likelihood([{"reference": {"logprob": -2.0, "tokens": 0}}], ["a"])
    assert (one["nats"], one["n"]) == (-2.0, 1)
    assert math.isnan(one["stderr"])
    assert math.isnan(one["per_token"])
    single = likelihood_difference([[-1.0, math.nan]], [[-2.0, -1.0]], ["a", "b"])
    assert single is not None
    assert single.text == (
        "Log-likelihood of the reference, nats: A -1.0000, B -2.0000, A - B +1.0000; 1 documents without one are "
        "left out."
    )
    assert likelihood_difference([[math.nan]], [[-2.0]], ["a"]) is None
