"""What the quickstart prints to go on with can be pasted, whatever its folder is called and its parts are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from mm_moslora_eval.protocol.model_interface import Answer, Request
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.baselines import BASELINES
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.sources.image_controls import MODES, Hasher

from mm_moslora.quickstart import quickstart_evaluation, quickstart_run
from mm_moslora.quickstart.instruction_data import DatasetFiles
from mm_moslora.quickstart.quickstart_run import QuickstartOptions, _commands
from mm_moslora.utils.errors import ConfigError
from tests.eval.eval_data import picture
from tests.eval.eval_fake import FakeModel


@pytest.mark.parametrize("stock", [True, False])
def test_commands_survive_blanks_and_ask_for_a_layout_that_holds_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = {what: shlex.split(text)[1:] for what, text in _commands(tmp_path / "my run", Path("/a b"), stock=stock)}
    assert commands["Chat with it"] == ["chat", "my run/tune", "--image", "PICTURE"]
    assert commands["Export it"] == ["export", "my run/tune", "my run/handed-on", *([] if stock else ["--to", "hf"])]
    assert commands["Measure it again"][:3] == ["eval", "run", "llava:my run/data/test.jsonl@/a b"]


def test_the_report_is_written_when_the_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    monkeypatch.setattr(quickstart_run, "_quickstart", lambda *_: "Look at it.")
    monkeypatch.setattr(
        "mm_moslora.reporting.build_report",
        lambda folder, _: states.append(json.loads((folder / "state.json").read_text())["state"]),
    )
    for _ in range(2):
        assert quickstart_run.quickstart(QuickstartOptions(), output=tmp_path) == 0
    assert states == ["finished", "finished"]


@pytest.mark.parametrize("name", ["export/model.safetensors", "data/train.jsonl", "tune/notes.txt", "summary.json"])
def test_a_folder_of_the_user_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(ConfigError, match=f"already holds {name.partition('/')[0]}, and nothing shows"):
        quickstart_run.quickstart(QuickstartOptions(), output=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


def test_an_export_that_no_quickstart_made_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "export" / "model.safetensors"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="export is in the way and is not deleted"):
        quickstart_run._export(tmp_path, model="")
    assert mine.read_text() == "mine"


def test_a_run_folder_is_named_by_what_was_chosen() -> None:
    assert QuickstartOptions().name == "quickstart"
    assert QuickstartOptions(images="stamps", smoke=True).name == "quickstart-stamps-smoke"
    assert QuickstartOptions(encoder="open_clip", precision="fp32", seed=2).name == "quickstart-open_clip-fp32-seed2"


def test_seed_and_precision_reach_both_stages(tmp_path: Path) -> None:
    files = DatasetFiles(
        images=tmp_path, align=tmp_path / "a", train=tmp_path / "b", test=tmp_path / "c", train_pictures=1, questions=1
    )
    choice = QuickstartOptions(precision="fp32", seed=3)
    made = quickstart_run.recipes(tmp_path, "v", files, tmp_path, choice)
    assert [(recipe.train.seed, recipe.train.precision) for recipe in made] == [(3, "fp32")] * 2


WORDS = ("red", "blue")


class _Scripted(FakeModel):
    """Says what a function of the question's number and of whether its own picture is shown says."""

    def __init__(self, says: Callable[[int, bool], str], pictures: Path, name: str) -> None:
        super().__init__(fingerprint=name)
        self._says, self._own = says, {Hasher()(path): int(path.stem) for path in pictures.glob("*.png")}

    def _answer(self, request: Request) -> Answer:
        number = int(request.messages[-1].text.split()[-1])
        shown = self._own.get(Hasher()(request.images[0])) == number
        return Answer(text=self._says(number, shown), tokens=2, finish_reason="stop")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (lambda n, own: "I see it.", lambda n, own: WORDS[n % 2] if own else "blue", "Tuning helped, and the model"),
        (lambda n, own: f"I see it: it is {WORDS[n % 2]}.", lambda n, own: WORDS[n % 2] if own else "blue",
         "The model looks at the picture, but it is not shown to do better than before tuning."),
        (lambda n, own: "I see it.", lambda n, own: "blue", "It is not shown that the model looks at the picture"),
    ],
)  # fmt: skip
def test_the_table_shows_the_model_before_tuning_leniently_and_ends_with_what_follows(
    tmp_path: Path, before: Callable[[int, bool], str], after: Callable[[int, bool], str], said: str
) -> None:
    pictures = tmp_path / "data"
    pictures.mkdir()
    rows = []
    for number in range(40):
        (pictures / f"{number}.png").write_bytes(picture(number))
        answer = WORDS[number % 2]
        question = {"question_id": f"{number}", "text": f"what is {number}"}
        rows.append(question | {"image": f"{number}.png", "answer": answer})
    (pictures / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task(f"llava:{pictures / 'test.jsonl'}")
    found = {}
    for mode in MODES:
        baselines = BASELINES if mode == "own" else ()
        model = _Scripted(after, pictures, "after")
        results = evaluate(model, task, tmp_path / "eval" / "tuned" / mode, modes=(mode,), baselines=baselines)
        found |= {result.mode: result for result in results}
    model = _Scripted(before, pictures, "before")
    (untuned,) = evaluate(model, task, tmp_path / "eval" / "untuned" / "own", modes=("own",), baselines=())
    told = quickstart_evaluation._rows(tmp_path, untuned, found)
    names = ["tuned", "untuned", "untuned_lenient", "wrong_image", "blind", "best_answer", "majority"]
    assert [row["name"] for row in told] == names
    assert all(row["less"]["groups"] == 40 for row in told[1:])
    shown = quickstart_evaluation.table(told)
    assert "Before tuning (projector aligned), right word anywhere" in shown
    assert said in shown
    samples = quickstart_evaluation._samples(tmp_path, untuned, found["own"], DatasetFiles.below(pictures, pictures))
    assert len(samples) == quickstart_evaluation.SHOWN_SAMPLES
    for row in samples:
        number = int(row["question"].split()[-1])
        assert (row["before"], row["after"]) == (before(number, True), after(number, True))
