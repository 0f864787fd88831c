"""Rules by name, with options, of other packages and of a user's own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.paired_comparison import compare
from mm_moslora_eval.run.result_file import TaskResult
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, METRICS, score_answer
from mm_moslora_eval.scoring.measured_scores import aggregate
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document

from mm_moslora.launch.imported_code import import_file
from mm_moslora.utils.errors import EvalError, MoSLoRAError
from tests.eval.eval_fake import FakeModel

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)
OWN = """
from mm_moslora_eval.scoring.answer_scoring import METRICS


@METRICS.add
def within_one(parsed, document, *, margin: float = 1.0):
    if document.id in ("q3", "q5"):
        raise RuntimeError("a question without a number")
    return abs(len(parsed) - len(document.answers[0])) <= margin
"""


def add(folder: Path, code: str) -> None:
    """Import a file that adds rules."""
    (folder / "own_rules.py").write_text(code, encoding="utf-8")
    import_file(folder / "own_rules.py")


def task_file(questions: Path, rules: str) -> str:
    path = questions.parent / "own.yaml"
    path.write_text(f"name: own\nsource: {{kind: llava, path: {questions.name}}}\n{rules}\n", encoding="utf-8")
    return str(path)


def own_result(file: str, output: Path) -> TaskResult:
    (result,) = evaluate(FakeModel(), get_task(file), output, modes=("own",), baselines=(), settings=ONE)
    return result


def rows_of(output: Path) -> list[dict[str, Any]]:
    (path,) = output.rglob("samples.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("metric: witin", "metric 'witin' is not known. Did you mean 'within'"),
        ("metric: {name: within, relativ: 0.05}", "has no option 'relativ'. Did you mean 'relative'"),
        ("metric: {name: within, relative: [1]}", r"relative is \[1\] \(list\), expected a number"),
        ("metric: {name: exact, relative: 1}", "has no option 'relative'.* It has none"),
        ("metric: {relative: 1}", "expected a mapping with `name`"),
        ("aggregation: all_within", r"needs the option 'columns': \{name: all_within, columns: ...\}"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused_where_the_task_is_read(
    question_file: Path, rules: str, message: str
) -> None:
    with pytest.raises(MoSLoRAError, match=message):
        get_task(task_file(question_file, rules))


def test_a_column_that_the_data_have_no_more_is_refused_before_a_model_is_asked(question_file: Path) -> None:
    task = get_task(task_file(question_file, "aggregation: {name: all_within, columns: [pair]}"))
    with pytest.raises(EvalError, match=r"nothing in the column 'pair' \(first: '.*'\). Columns: id, category"):
        task.load()


def test_a_metric_of_an_imported_file_that_raises_leaves_out_its_documents(question_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "my_metric.py"
    own.write_text(OWN, encoding="utf-8")
    file = task_file(question_file, "metric: {name: within_one, margin: 100}")
    with pytest.raises(EvalError, match=r"metric 'within_one' is not known.*named .*: --import FILE.py"):
        get_task(file)
    import_file(own)
    assert f"{own} (SHA-256" in eval_commands.describe(file)
    result = own_result(file, tmp_path / "run")
    assert (result.score, result.n, result.counts.faults, result.counts.scored) == (1.0, 12, 2, 10)
    assert any("2 of 12 answers have no score" in text and "without a number" in text for text in result.remarks)
    assert eval_commands.exit_code([result]) == 3
    failed = [row for row in rows_of(tmp_path / "run") if row["score"] is None]
    assert [row["error"] for row in failed] == ["RuntimeError: a question without a number"] * 2
    assert result.about["code"]["metric"]["file"] == str(own)

    own.write_text(OWN.replace('"q3", "q5"', '"none"'), encoding="utf-8")
    import_file(own)
    (mended,) = eval_commands.score(tmp_path / "run", protocol=file)  # the stored answers, with the file as it is now
    assert (mended.counts.faults, mended.counts.scored, mended.score) == (0, 12, 1.0)
    assert mended.about["code"] != result.about["code"]


def test_a_metric_that_fails_on_everything_gives_no_score(question_file: Path, tmp_path: Path) -> None:
    head = "from mm_moslora_eval.scoring.answer_scoring import METRICS\n@METRICS.add\n"
    add(tmp_path, f"{head}def two(parsed, document):\n    return 2\n")
    results = evaluate(
        FakeModel(), get_task(task_file(question_file, "metric: two")), tmp_path / "run", modes=("own",), settings=ONE
    )
    assert not any(result.scored for result in results)
    assert "failed on every answer" in results[0].about["unscored"]
    assert "expected a number from 0 to 1" in results[0].remarks[0]


def test_a_name_of_this_package_is_not_replaced() -> None:
    def exact(parsed: str, document: Document) -> float:
        return 1.0

    with pytest.raises(EvalError, match="metric 'exact' is one of this package"):
        METRICS.add(exact)


def scored(score: float, *, cluster: str, **extra: str) -> Scored:
    number = f"{cluster}{sorted(extra.items())}"
    document = Document(id=number, question="?", answers=("a",), category=extra.get("category"), extra=extra)
    return Scored(document=document, text="a", parsed="a", score=score, cluster=cluster)


def test_pairs_count_where_both_are_right_and_are_one_cluster_whatever_their_pictures() -> None:
    pairs = [(1.0, 1.0)] * 6 + [(1.0, 0.0)] * 3 + [(0.0, 0.0)] * 3
    samples = [
        scored(score, cluster=f"{number}-{side}", pair=str(number), side=str(side))
        for number, pair in enumerate(pairs)
        for side, score in enumerate(pair)
    ]
    spec = 'all_within {"columns": ["pair"], "further": {"side": ["side"]}}'
    found = aggregate(spec, samples)
    assert (found.value, found.n, found.clusters) == (0.5, 24, 12)
    assert found.metrics == {"vanilla": 15 / 24, "groups": 12.0, "side": 0.0}
    halves = aggregate("mean", [scored(float(pair == (1.0, 1.0)), cluster=str(n)) for n, pair in enumerate(pairs)])
    assert found.stderr == pytest.approx(halves.stderr)
    assert (found.low, found.high) == pytest.approx((halves.low, halves.high))


def test_a_tree_of_categories_counts_branches_alike_or_by_their_weights() -> None:
    leaves = {("a", "x"): [1.0], ("a", "y"): [0.0, 0.0, 0.0], ("b", "z"): [1.0, 0.0]}
    samples = [
        scored(score, cluster=f"{top}{low}{number}", top=top, low=low)
        for (top, low), scores in leaves.items()
        for number, score in enumerate(scores)
    ]
    plain = aggregate('tree {"levels": ["top", "low"]}', samples)
    assert plain.value == pytest.approx(0.5 * 0.5 + 0.5 * 0.5)
    assert plain.metrics == {"a": 0.5, "b": 0.5, "a / x": 1.0, "a / y": 0.0, "b / z": 0.5}
    heavy = aggregate('tree {"levels": ["top", "low"], "weights": {"x": 3, "y": 1}}', samples)
    assert heavy.value == pytest.approx(0.5 * 0.75 + 0.5 * 0.5)
    with pytest.raises(EvalError, match="weights has 'x', and nothing for 'y' beside it"):
        aggregate('tree {"levels": ["top", "low"], "weights": {"x": 3}}', samples)


def test_two_runs_are_compared_by_groups(question_file: Path, tmp_path: Path) -> None:
    rules = "aggregation: {name: all_within, columns: [category]}\nmetric: {name: exact}"
    file = task_file(question_file, rules)
    for name in ("a", "b"):
        model = FakeModel(fingerprint=name, fail_on=("1",) if name == "b" else ())
        evaluate(model, get_task(file), tmp_path / name, modes=("own",), baselines=(), settings=ONE)
    place = "own@own/own"
    result = compare(tmp_path / "a" / place, tmp_path / "b" / place)
    assert result.score.questions == len({row["category"] for row in rows_of(tmp_path / "a")})
    assert len(result.samples) == len(result.score.changed)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("There are twenty-one birds.", "21"), ("I count a hundred and five", "105"), ("12 of 13", "12"),
        ("1,234.5 kg", "1234.5"), ("someone", ""), ("-3.0", "-3"), ("none", ""), ("9" * 400, ""),
    ],
)  # fmt: skip
def test_the_first_number_of_an_answer_is_read_in_digits_or_words(answer: str, number: str) -> None:
    assert EXTRACTORS["first_number"](answer, Document(id="1", question="?")) == number


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("two thousand", 2000), ("3 million", 3e6), ("one hundred and five thousand", 105_000), ("a dozen", 12),
        ("one million two hundred thousand and five", 1_200_005), ("two dozen", 24), ("3 hundred", 300),
        ("minus 5", -5), ("negative twenty-one", -21), ("10 minus 5", 5), ("10 - 5", 5), ("10-15", 15), ("x=-3", -3),
        ("zero point five", 0.5), ("2/3", 2 / 3), ("3 1/2", 3.5), ("1/2.5", 0.4), ("1.5x10^3", 1500),
        (r"$1.5 \times 10^{-3}$", 0.0015), ("1 000", 1000), ("12\u202f345", 12345), ("12 345", 345), ("3,5", 5),
        ("one two three", 3), ("2^5 = 32", 32), ("it is 3/4/2020", None), ("10^{-3}", None), ("4/0", None),
        ("3½", None), ("three and a half", None), (r"$\frac{2}{3}$", None), (r"\boxed{7}", 7),
        ("two thirds", None), ("2/3 million", None), ("1x10^999", None),
    ],
)  # fmt: skip
def test_a_number_is_read_whole_or_not_at_all(answer: str, number: float | None) -> None:
    """Never a part of it, which would be another number."""
    found = EXTRACTORS["last_number"](answer, Document(id="1", question="?"))
    assert (float(found) if found else None) == (number if number is None else pytest.approx(number))


def test_numbers_are_right_within_a_tolerance() -> None:
    document = Document(id="1", question="?", answers=("200",))
    spec = 'within {"relative": 0.05}'
    scores = [score_answer(document, text, extraction="last_number", metric=spec).score for text in ("210", "189", "x")]
    assert scores == [1.0, 0.0, 0.0]


ENDS = """
import sys
from dataclasses import replace
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, METRICS
from mm_moslora_eval.scoring.score_aggregation import OVER_SAMPLES
from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS, mean

class Panic(BaseException):
    pass

def at(document, error, then):
    if document.id == "q3":
        raise error
    return then

def extract_exit(text, document): return at(document, SystemExit(0), text.strip())
def metric_exit(parsed, document): return at(document, SystemExit(0), 1.0)
def metric_panic(parsed, document): return at(document, Panic("of another language"), 1.0)
def metric_stopped(parsed, document): return at(document, KeyboardInterrupt(), 1.0)
def sums_exit(samples): sys.exit(0)
def sums_none(samples): return None
def sums_right(samples):
    right = sum(one.score for one in samples)
    return replace(mean(samples), metrics={"each": len(samples) / right})
def sums_whole(samples):
    assert len(samples) == 12
    return mean(samples)
def over_exit(answers): return at(answers[0].document, SystemExit(0), answers[0])
def over_none(answers): return at(answers[0].document, SystemExit(0), None)

EXTRACTORS.add(extract_exit)
for function in (metric_exit, metric_panic, metric_stopped):
    METRICS.add(function)
for function in (sums_exit, sums_none, sums_right, sums_whole):
    AGGREGATIONS.add(function)
for function in (over_exit, over_none):
    OVER_SAMPLES.add(function)
"""


@pytest.mark.parametrize(
    ("part", "name", "error"),
    [
        ("extraction", "extract_exit", "SystemExit"),
        ("metric", "metric_exit", "SystemExit"),
        ("metric", "metric_panic", "Panic"),
    ],
)
def test_a_rule_that_would_end_the_program_fails_on_its_answer_alone(
    question_file: Path, tmp_path: Path, part: str, name: str, error: str
) -> None:
    add(tmp_path, ENDS)
    file = task_file(question_file, f"{part}: {name}")
    result = own_result(file, tmp_path / "run")
    assert result.scored
    assert (result.counts.scored, result.counts.faults) == (11, 1)
    assert f"it raised {error}" in " ".join(result.remarks)


def test_ctrl_c_within_a_rule_still_ends_the_run(question_file: Path, tmp_path: Path) -> None:
    add(tmp_path, ENDS)
    file = task_file(question_file, "metric: metric_stopped")
    with pytest.raises(KeyboardInterrupt):
        own_result(file, tmp_path / "run")


@pytest.mark.parametrize(("name", "error"), [("sums_exit", "it raised SystemExit: 0"), ("sums_none", "it gave None")])
def test_an_aggregation_that_fails_leaves_its_task_without_a_score(
    question_file: Path, tmp_path: Path, name: str, error: str
) -> None:
    add(tmp_path, ENDS)
    rules = f"aggregation: {name}"
    result = own_result(task_file(question_file, rules), tmp_path / "run")
    assert not result.scored
    assert f"The aggregation '{name}' failed on 12 samples" in result.about["unscored"]
    assert error in result.about["unscored"]
    assert eval_commands.exit_code([result], max_failed_share=1.0) == 3
