"""Solved questions before a question: which ones, with which pictures, and in whose identity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.protocol.few_shots import shots_for
from mm_moslora_eval.protocol.model_interface import Request
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.protocol.task_prompt import TaskPrompt
from mm_moslora_eval.protocol.task_registry import get_task, with_changes
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.result_file import TaskResult
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.image_controls import ImageMode

from mm_moslora.utils.errors import EvalError, MoSLoRAError
from tests.eval.eval_data import picture, write_questions
from tests.eval.eval_fake import FakeModel

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


def shot(file: Path, *changes: str) -> Task:
    return with_changes(get_task(f"llava:{file}"), changes)


def asked(task: Task, output: Path, *, mode: ImageMode = "own", limit: int | None = None) -> dict[str, Request]:
    model = FakeModel()
    settings = EvaluationSettings(batch_size=4, rank=0, world_size=1, limit=limit)
    (result,) = evaluate(model, task, output, modes=(mode,), baselines=(), settings=settings)
    assert result.counts.failed == 0
    return {request.id: request for request in model.requests}


def texts(request: Request) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in request.messages]


def test_shots_stand_before_the_question_with_their_pictures_and_never_hold_it(
    question_file: Path, tmp_path: Path
) -> None:
    task = shot(question_file, "prompt.shots=2", "prompt.system=Be brief.")
    requests = asked(task, tmp_path / "run")
    assert texts(requests["q5"]) == [
        ("system", "Be brief."),
        ("user", "<image>\nWhat colour is it? (0)"), ("assistant", "yes"),
        ("user", "<image>\nIs it red? (0)"), ("assistant", "no"),
        ("user", "<image>\nIs it red? (1)"),
    ]  # fmt: skip
    assert [Path(str(image)).name for image in requests["q5"].images] == ["0.png", "1.png", "1.png"]
    assert texts(requests["q0"])[1][1] == "<image>\nIs it red? (0)"
    for request in requests.values():
        *before, own = zip([text for role, text in texts(request) if role == "user"], request.images, strict=True)
        assert own not in before


def test_a_question_is_never_its_own_shot_under_other_options(tmp_path: Path) -> None:
    """Its options in another order, as MMBench asks it again, and its picture with other options."""
    image = picture(1)

    def asks(name: str, options: str, answer: str, *, image: bytes, question: str = "Which colour?") -> Document:
        letters = dict(zip("ABCD", options.split(), strict=False))
        return Document(id=name, question=question, options=letters, answers=(answer,), images=(image,))

    asked_first = asks("0", "red green blue", "A", image=image)
    pool = [
        asked_first, asks("1000000", "green blue red", "C", image=picture(1)), asks("7", "red grey", "A", image=image),
        asks("8", "red green blue", "A", image=image, question="Which  colour?"),
        asks("2", "green blue red", "A", image=picture(2)), asks("3", "red grey", "B", image=picture(3)),
    ]  # fmt: skip
    for order in ("first", "seeded"):
        prompt = TaskPrompt(shots=2, shot_order=order)  # type: ignore[arg-type]
        assert {shot.id for shot in shots_for(prompt, asked_first, pool)} == {"2", "3"}


def test_seeded_shots_differ_between_questions_and_not_between_selections(question_file: Path, tmp_path: Path) -> None:
    task = shot(question_file, "prompt.shots=3", "prompt.shot_order=seeded")
    whole = {name: texts(request) for name, request in asked(task, tmp_path / "run").items()}
    some = {name: texts(request) for name, request in asked(task, tmp_path / "some", limit=3).items()}
    assert len({str(said[:-1]) for said in whole.values()}) > 6
    assert some == {name: whole[name] for name in some}
    other = asked(
        shot(question_file, "prompt.shots=3", "prompt.shot_order=seeded", "prompt.shot_seed=1"), tmp_path / "o"
    )
    assert sum(texts(other[name]) != whole[name] for name in whole) > 6


def test_shots_come_from_other_rows_or_another_file(question_file: Path, tmp_path: Path) -> None:
    more = write_questions(tmp_path / "more", count=4)
    more.write_text(more.read_text().replace("(0)", "(more)"))
    requests = asked(shot(question_file, "prompt.shots=3", f"prompt.shots_from={{path: {more}}}"), tmp_path / "run")
    assert all("(more)" in text for role, text in texts(requests["q7"])[:-1] if role == "user")
    rows = asked(
        shot(question_file, "prompt.shots=1", "prompt.shots_from={where: {category: yes/no}}"), tmp_path / "rows"
    )
    assert {texts(request)[0][1] for request in rows.values()} <= {f"<image>\nIs it red? ({n})" for n in range(3)}


def test_controls_change_the_picture_of_the_question_alone(question_file: Path, tmp_path: Path) -> None:
    task = shot(question_file, "prompt.shots=1")
    own = asked(task, tmp_path / "run")["q5"].images
    wrong = asked(task, tmp_path / "run", mode="wrong")["q5"].images
    blind = asked(task, tmp_path / "run", mode="blind")["q5"].images
    assert own[0] == wrong[0] == blind[0]
    assert len({str(images[1]) for images in (own, wrong, blind)}) == 3


def test_a_changed_picture_or_answer_of_a_shot_is_another_answer(question_file: Path, tmp_path: Path) -> None:
    task = shot(question_file, "prompt.shots=1")
    asked(task, tmp_path / "run")
    (question_file.parent / "0.png").write_bytes(picture(77))
    assert len(asked(task, tmp_path / "run")) == 12  # q0 is a shot of the eleven others
    asked(shot(question_file), tmp_path / "plain")
    with pytest.raises(EvalError, match=r"holds another run: its prompt\.shots is 0, this one's is 1\. Choose"):
        asked(task, tmp_path / "plain")


def test_results_and_descriptions_name_the_shots(question_file: Path, tmp_path: Path) -> None:
    task = shot(question_file, "prompt.shots=1", "prompt.shots_from={where: {category: colour}}")
    (result,) = evaluate(FakeModel(), task, tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
    assert isinstance(result, TaskResult)
    assert result.about["prompt"]["shots"] == 1
    assert result.about["data"]["shots"]["rows"] == 6
    assert [message["role"] for message in result.about["first_prompt"]] == ["user", "assistant", "user"]
    shown = eval_commands.dry_run([f"llava:{question_file}"], changes=["prompt.shots=1"])
    assert "[assistant] no" in shown
    (row, *_) = map(json.loads, next((tmp_path / "run").rglob("documents.jsonl")).read_text().splitlines())
    assert len(row["images"]) == 1  # its own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["prompt.shots=12"], "there are only 11 other questions with an answer for 'q0'"),
        (["prompt.shots=65"], "prompt.shots is 65, expected 0 to 64"),
        (["prompt.shots=1", "prompt.shots_from={pth: x}"], "prompt.shots_from: unknown key 'pth'. Did you mean 'path'"),
        (["prompt.shots=1", "decoding.kind=continuation"], "prompt.shots need a conversation"),
    ],
)
def test_shots_that_cannot_be_shown_are_refused_before_a_model_is_asked(
    question_file: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(MoSLoRAError, match=message):
        shot(question_file, *changes).load()
