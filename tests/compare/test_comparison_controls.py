"""Arms against their controls, end to end from stored answers, and the conclusions that follow."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comparison_results import comparison_results
from mm_moslora_eval.protocol.model_interface import Answer, OptionScore, Request
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.sources.source_images import MODES, Hasher

from mm_moslora.compare.arms import parse_arms
from mm_moslora.compare.comparison_analysis import analyse
from mm_moslora.compare.comparison_plan import (
    ComparisonSettings,
    Outcome,
    choose_rates,
    reported_cells,
)
from mm_moslora.compare.comparison_text import says as sentences
from mm_moslora.compare.comparison_text import table
from mm_moslora.config import ModelConfig, Recipe
from mm_moslora.reporting.comparison.comparison_page import write_page
from mm_moslora.utils.errors import DataError
from tests.eval.eval_data import picture
from tests.eval.eval_fake import FakeModel

RECIPE = Recipe(model=ModelConfig(language="none"))
PICTURES = 40
Says = Callable[[str, str], str]


class Arm(FakeModel):
    """Answers by question and number of the shown picture; an empty text for a picture outside the set."""

    def __init__(self, says: Says, folder: Path, *, seed: int) -> None:
        super().__init__(fingerprint=f"{says.__name__}{seed}")
        self._says, self._seed, self._likely = says, seed, says is not no_to_all
        self._known = {Hasher()(folder / f"{number}.png"): str(number) for number in range(PICTURES)}

    def _answer(self, request: Request) -> Answer:
        shown = self._known.get(Hasher()(request.images[0]), "") if request.images else ""
        text = self._says(request.messages[-1].text, shown)
        nats = -0.1 - 2.0 * (text != request.reference) - 0.01 * self._seed - 0.001 * int(shown or 0)
        reference = OptionScore(logprob=nats, tokens=1)
        return Answer(text=text, tokens=2, finish_reason="stop", reference=reference if self._likely else None)


def truth(number: str) -> str:
    return ("yes", "no", "no")[int(number) % 3]


def sees(question: str, shown: str) -> str:
    return truth(shown) if shown else "no"


def sees_badly(question: str, shown: str) -> str:
    return "no" if not shown or int(shown) % 5 == 0 else truth(shown)


def no_to_all(question: str, shown: str) -> str:
    return "no"


def knows_the_questions(question: str, shown: str) -> str:
    """Right without the picture, like a model that has learned the test questions."""
    return truth(question.split()[-1])


def analysed(
    folder: Path, says: Sequence[Says], *, pictures: bool = True, second: bool = True, aggregation: str = "mean",
    **changes: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The results of two arms with two seeds each, and the comparison."""
    data = folder / "data"
    data.mkdir()
    rows = []
    for number in range(PICTURES):
        (data / f"{number}.png").write_bytes(picture(number))
        row = {"question_id": f"q{number}", "text": f"is it {number}", "answer": truth(str(number))}
        rows.append(row | ({"image": f"{number}.png"} if pictures else {}))
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"llava:{data / 'test.jsonl'}"
    settings = ComparisonSettings(
        arms=parse_arms("lora,moslora:kaiming", RECIPE), rates=[1e-4], seeds=2, tasks=[task], **changes
    )  # fmt: skip
    outcomes = {}
    modes = MODES if pictures and second and settings.controls else ("own",)
    for cell in reported_cells(settings, choose_rates(settings, {})):
        model = Arm(says[[arm.name for arm in settings.arms].index(cell.arm.name)], data, seed=cell.seed)
        place = folder / "runs" / cell.name / "eval"
        rules = dataclasses.replace(get_task(task), aggregation=aggregation)
        found = evaluate(model, rules, place, modes=modes, baselines=())
        places = {result.mode: (place / result.folder).relative_to(folder).as_posix() for result in found}
        outcomes[cell.name] = Outcome(status="ok", test={task: found[0].score}, places={task: places})
    comparison = SimpleNamespace(settings=settings, outcomes=outcomes, folder=folder, recipe=RECIPE)
    return analyse(comparison), comparison


NOTHING = (
    "No arm is shown to be above answering without the right picture and always giving the most frequent answer, so no "
    "arm can be called better."
)


@pytest.mark.parametrize("says", [(no_to_all, no_to_all), (knows_the_questions, no_to_all)])
def test_no_arm_above_its_controls_allows_no_conclusion(tmp_path: Path, says: tuple[Says, Says]) -> None:
    """Arms that answer no to everything have constant scores, from which no resolution is computed."""
    results, _ = analysed(tmp_path, says)
    assert results["says"][0] == NOTHING
    assert [row["verdict"] for row in results["comparisons"]] == ["nothing follows"]
    assert not any("four times out of five" in line for line in results["says"])
    assert not any(word in line for word in ("better,", "worse,") for line in results["says"])
    constant = [arm["remarks"] for arm in results["arms"] if arm["remarks"]]
    assert len(constant) == says.count(no_to_all)
    assert constant[0] == [
        "test, seeds 0, 1: All 40 answers are 'no', the reference answer of 26: the score is that of one answer to "
        "every question."
    ]
    shown = table(results)
    assert NOTHING in shown
    assert "rates chosen by" not in shown
    assert "The learning rate was not tuned" in shown


def test_arms_that_look_at_pictures_are_compared(tmp_path: Path) -> None:
    results, _ = analysed(tmp_path, (sees, sees_badly))
    lora, kaiming = (arm["controls"]["test"] for arm in results["arms"])
    assert lora["above"]
    assert [row["name"] for row in lora["rows"]] == ["wrong_image", "blind", "majority"]
    blind = next(row for row in lora["rows"] if row["name"] == "blind")
    assert blind["value"] == pytest.approx(14 / 40)
    assert 0 < blind["low"] < blind["value"] < blind["high"]
    assert kaiming["above"]
    (row,) = results["comparisons"]
    assert row["difference"] < 0
    assert row["verdict"] in ("worse", "not shown")
    assert results["verdicts"][0]["text"].startswith("Every arm is above answering without the right picture")


def test_log_likelihoods_stand_beside_the_scores(tmp_path: Path) -> None:
    results, _ = analysed(tmp_path, (sees, sees_badly))
    lora, kaiming = (arm["nats"]["test"] for arm in results["arms"])
    assert lora["own"]["mean"] == pytest.approx(-0.1 - 0.005 - 0.001 * 19.5)
    behind = results["arms"][1]["tasks"]["test"]["mean"] - results["arms"][0]["tasks"]["test"]["mean"]
    assert kaiming["own"]["mean"] - lora["own"]["mean"] == pytest.approx(2.0 * behind)
    assert lora["wrong_image"]["mean"] < lora["own"]["mean"]
    (row,) = results["comparisons"]
    found = row["nats"]["own"]
    assert set(row["nats"]) == {"own", "wrong_image", "blind"}
    assert found["low"] < found["difference"] < found["high"]
    assert (found["documents"], found["left_out"]) == (PICTURES, 0)
    assert any(
        "log-likelihood of the reference answer on test: not shown to differ, -0" in line for line in results["says"]
    )
    assert "Log-likelihood of the reference answer, nats:" in table(results)
    page = write_page(tmp_path / "results.json", tmp_path / "report.html").read_text()
    assert f"{kaiming['own']['mean']:.3f} ± " in page
    assert f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] nats" in page
    assert "nats against lora" in page


def test_runs_on_different_documents_are_refused(tmp_path: Path) -> None:
    _, comparison = analysed(tmp_path, (sees, sees_badly))
    for file in tmp_path.glob("runs/lora_*_seed1/eval/*/*/*/*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match="hold different documents"):
        analyse(comparison)


def _row(**changes: Any) -> Callable[[str], str]:
    """Changes the first row of a file; None removes a key."""

    def change(text: str) -> str:
        first, *others = text.splitlines()
        row = {key: value for key, value in (json.loads(first) | changes).items() if changes.get(key, 0) is not None}
        return "\n".join([json.dumps(row), *others, ""])

    return change


DAMAGE: tuple[tuple[str, Any], ...] = (
    ("places", {}), ("places", {"own": "../../etc"}), ("samples.jsonl", _row(id=None)),
    ("samples.jsonl", _row(score=1e300)), ("samples.jsonl", lambda text: text[:-30]), ("samples.jsonl", None),
    ("task.json", lambda _: "{"), ("documents.jsonl", None),
)  # fmt: skip


def test_a_damaged_run_counts_as_failed_and_hides_no_other(tmp_path: Path) -> None:
    whole, comparison = analysed(tmp_path, (sees, sees_badly))
    name = next(name for name in comparison.outcomes if name.startswith("lora_") and name.endswith("_seed1"))
    good = comparison.outcomes[name]
    ((task, places),) = good.places.items()
    for file, change in DAMAGE:
        path = tmp_path / places["own"] / file
        text = "" if file == "places" else path.read_text()
        if file == "places":
            comparison.outcomes[name] = dataclasses.replace(good, places={task: change} if change else {})
        elif change is None:
            path.unlink()
        else:
            path.write_text(change(text))
        results = analyse(comparison)
        ((failed),) = results["failures"]
        assert (failed["arm"], failed["seed"], failed["status"]) == ("lora", 1, "failed"), (file, text)
        assert failed["reason"]
        assert [len(arm["tasks"]["test"]["seeds"]) for arm in results["arms"]] == [1, 2]
        assert results["arms"][1] == whole["arms"][1]
        write_page(tmp_path / "results.json", tmp_path / "report.html")
        comparison.outcomes[name] = good
        if file != "places":
            path.write_text(text)
    assert analyse(comparison)["arms"] == whole["arms"]


def test_arms_are_compared_by_the_score_of_the_task(tmp_path: Path) -> None:
    """F1 of yes: 14 of 40 pictures are a yes, of which the second arm misses those of every fifth picture."""
    results, comparison = analysed(tmp_path, (sees, sees_badly), aggregation="pope")
    f1 = next(o for name, o in comparison.outcomes.items() if "kaiming" in name).test
    lora, kaiming = (arm["tasks"]["test"] for arm in results["arms"])
    assert lora["mean"] == 1.0
    assert kaiming["mean"] == pytest.approx(next(iter(f1.values())))
    found = sum(truth(str(n)) == "yes" for n in range(PICTURES) if n % 5)
    assert kaiming["mean"] == pytest.approx(2 * found / (2 * found + 14 - found))
    assert results["comparisons"][0]["difference"] == pytest.approx(kaiming["mean"] - 1.0)
    assert [row["name"] for row in results["arms"][0]["controls"]["test"]["rows"]] == [
        "wrong_image", "blind", "majority",
    ]  # fmt: skip
    assert "test is F1." in table(results)
    write_page(comparison.folder / "results.json", tmp_path / "report.html")
    assert "test is F1." in (tmp_path / "report.html").read_text()


def test_missing_controls_are_named(tmp_path: Path) -> None:
    results, _ = analysed(tmp_path, (sees, sees_badly), controls=False)
    assert [row["name"] for row in results["arms"][0]["controls"]["test"]["rows"]] == ["majority"]
    assert any("(--no-controls was given), so it is not known" in line for line in results["says"])


@pytest.mark.parametrize("left_out", [{"controls": False}, {"second": False}], ids=["not asked", "one picture"])
def test_an_arm_above_a_baseline_only_is_better_in_answers_only(tmp_path: Path, left_out: dict[str, bool]) -> None:
    results, _ = analysed(tmp_path, (no_to_all, knows_the_questions), **left_out)
    assert [row["verdict"] for row in results["comparisons"]] == ["better"]
    assert results["verdicts"][-1]["mood"] == "mixed"
    text = results["verdicts"][-1]["text"]
    assert "better in answers only" in text
    assert "It is not known whether either looks at the picture." in text
    assert any("--no-controls" in line for line in results["says"]) == ("controls" in left_out)
    assert any("fewer than two different pictures" in line for line in results["says"]) == ("second" in left_out)


def graded(folder: Path, score: Callable[[int, int], float]) -> dict[str, Any]:
    """The results of runs that scored eight samples without a task; `score`: of a run's number and a sample's."""
    settings = ComparisonSettings(
        arms=parse_arms("lora,moslora:kaiming", RECIPE), rates=[1e-4], seeds=2, tasks=["likeness"]
    )
    outcomes = {}
    for number, cell in enumerate(reported_cells(settings, choose_rates(settings, {}))):
        place = folder / "runs" / cell.name / "samples"
        place.mkdir(parents=True)
        rows = [{"id": str(n), "cluster": str(n), "score": score(number, n)} for n in range(8)]
        (place / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        places = {"likeness": {"own": place.relative_to(folder).as_posix()}}
        outcomes[cell.name] = Outcome(status="ok", test={"likeness": 0.4}, places=places)
    return analyse(SimpleNamespace(settings=settings, outcomes=outcomes, folder=folder, recipe=RECIPE))


def test_graded_samples_that_answer_no_task_are_compared_without_controls(tmp_path: Path) -> None:
    """An example is the similarity of generated pictures of eight subjects."""
    results = graded(tmp_path, lambda run, n: 0.3 + 0.01 * n + 0.2 * (run % 2))
    assert [arm["controls"] for arm in results["arms"]] == [{}, {}]
    assert [(row["verdict"], row["groups"]) for row in results["comparisons"]] == [("better", None)]
    write_page(tmp_path / "results.json", tmp_path / "report.html")


@pytest.mark.parametrize(("most", "widest"), [(1.0, 1.0), (2.0, math.inf)], ids=["shares", "other scores"])
def test_an_interval_of_shares_holds_differences_of_shares_alone(tmp_path: Path, most: float, widest: float) -> None:
    """Arms that are right in one of their two seeds alone leave a t-interval of several hundred points."""
    results = graded(tmp_path, lambda run, n: most * (run in (0, 3)) * (n != run))
    (row,) = results["comparisons"]
    assert -widest <= row["low"] <= -1.0 < 1.0 <= row["high"] <= widest


@pytest.mark.parametrize(
    ("gap", "seeds", "told"), [(0.01, 1, True), (0.2, 1, False), (0.06, 1, True), (0.04, 3, True), (0.05, 3, False)]
)
def test_a_choice_that_runs_could_have_made_otherwise_is_named(gap: float, seeds: int, told: bool) -> None:
    results = comparison_results(["lora", "moslora:orthogonal"])
    results["settings"]["tuning_seeds"] = seeds
    arm = results["arms"][1]
    first, second = arm["grid"][:2]
    arm |= {"rate": first, "spread": 0.05}
    arm["curve"] = [
        {"rate": rate, "seed": 0, "value": value, "status": "ok"} for rate, value in ((first, 0.5), (second, 0.5 + gap))
    ]
    lines = [line for line in sentences(results)["remarks"] if "The intervals take the choice as known" in line]
    assert len(lines) == told
    assert not lines or lines[0].startswith(f"moslora:orthogonal: the rates {first:g} and {second:g} differ by {gap:g}")
    best, other = (f"moslora:orthogonal@optim.mixer_factor={value}" for value in (6, 24))
    arm |= {"curve": [], "chosen": best, "last_value": ""}
    arm["alternatives"] = [
        {"name": name, "over": True, "rate": first, "value": value} for name, value in ((best, 0.5), (other, 0.5 + gap))
    ]
    lines = [line for line in sentences(results)["remarks"] if "The intervals take the choice as known" in line]
    assert len(lines) == told
    assert not lines or lines[0].startswith(f"moslora:orthogonal: the values {best} and {other} differ by {gap:g}")
