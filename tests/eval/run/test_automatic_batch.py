"""`--batch-size auto`: grows while it pays, shrinks where memory ends, answers alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_moslora_eval.backends.automatic_batch import AutomaticBatch, is_out_of_memory
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.protocol.model_interface import Answer, Message, OptionRequest, Request
from mm_moslora_eval.run.result_file import read_results

from mm_moslora import cli
from tests.eval.eval_data import write_questions
from tests.eval.eval_fake import FakeModel
from tests.eval.eval_models import export_tiny


class TimedModel(FakeModel):
    """Answers in a time that depends on the batch, and with memory for `fits` at once."""

    def __init__(
        self, seconds: Callable[[int], float], *, fits: int = 10**6, error: Any = torch.OutOfMemoryError
    ) -> None:
        super().__init__()
        self.now, self._seconds, self._fits, self._error = 0.0, seconds, fits, error
        self.sizes: list[int] = []

    def clock(self) -> float:
        return self.now

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            self.sizes.append(len(batch))
            for index, request in enumerate(batch):
                if index == self._fits:
                    raise self._error("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
                yield start + index, self._answer(request)
            self.now += self._seconds(len(batch))


def questions(count: int) -> list[Request]:
    return [Request(id=str(n), messages=(Message(role="user", content=("what?",)),)) for n in range(count)]


def sizes_of(model: TimedModel, *, count: int = 2000, room: Callable[[], bool] = lambda: True) -> list[int]:
    """The sizes of the batches; every request has one answer."""
    batched = AutomaticBatch(model, clock=model.clock, room=room)
    seen = [index for index, _ in batched.generate(questions(count), batch_size=1)]
    assert sorted(seen) == list(range(count))
    return model.sizes


def test_batches_grow_to_the_largest_while_it_pays() -> None:
    sizes = sizes_of(TimedModel(lambda n: 1.0 + 0.001 * n))
    assert sizes[:10] == [4, 4, 8, 8, 16, 16, 32, 32, 64, 64]
    assert set(sizes[10:-1]) == {128}


def test_a_size_that_is_not_faster_is_given_up_for_good() -> None:
    sizes = sizes_of(TimedModel(lambda n: max(1.0, n / 16)), count=400)
    assert sizes[:8] == [4, 4, 8, 8, 16, 16, 32, 32]
    assert set(sizes[8:-1]) == {16}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_asked_twice(error: type[Exception]) -> None:
    model = TimedModel(lambda n: 1.0, fits=10, error=error)
    sizes = sizes_of(model, count=200)
    assert sizes[:6] == [4, 4, 8, 8, 16, 8]
    assert max(sizes[5:]) == 8
    assert len(model.asked) == len(set(model.asked)) == 200


def test_without_free_memory_batches_stay() -> None:
    assert set(sizes_of(TimedModel(lambda n: 1.0), count=40, room=lambda: False)) == {4}


def test_other_errors_and_a_single_question_that_does_not_fit_are_raised() -> None:
    with pytest.raises(ValueError, match="not enough memory"):
        sizes_of(TimedModel(lambda n: 1.0, fits=2, error=ValueError))
    with pytest.raises(torch.OutOfMemoryError):
        sizes_of(TimedModel(lambda n: 1.0, fits=0))
    assert not is_out_of_memory(RuntimeError("shapes"))


def test_options_are_scored_in_batches_too() -> None:
    model = FakeModel()
    batched = AutomaticBatch(model, room=lambda: True)
    options = [OptionRequest(request=request, options=("A", "B")) for request in questions(30)]
    assert len(dict(batched.loglikelihood(options, batch_size=1))) == 30


@pytest.mark.parametrize("value", ["0", "none"])
def test_other_words_are_no_batch_size(value: str, question_file: Path, tmp_path: Path, capsys: Any) -> None:
    line = ["eval", "run", f"llava:{question_file}", "--model", "replay:x", "--output", str(tmp_path / "run")]
    assert cli.run([*line, "--batch-size", value]) != 0
    assert "batch" in capsys.readouterr().err


def test_an_fp32_model_answers_as_in_batches_of_one(tmp_path: Path, language_folder: Path, vision_folder: Path) -> None:
    folder = export_tiny(tmp_path / "model", language_folder, vision_folder)
    task = f"llava:{write_questions(tmp_path / 'data', count=20)}"
    answers = []
    for size in ("1", "auto"):
        output = tmp_path / size
        line = ["eval", "run", task, "--model", str(folder), "--output", str(output), "--max-new-tokens", "4"]
        assert cli.run([*line, "--precision", "fp32", "--batch-size", size, "--no-report"]) == 0
        (result,) = read_results(output)
        rows = (output / result.folder / "samples.jsonl").read_text().splitlines()
        answers.append([row.partition('"text": ')[2].partition('"parsed"')[0] for row in rows])
    assert answers[0] == answers[1]
    model = AutomaticBatch(open_model(str(folder), precision="fp32"))
    assert model.reads_boxes
    assert model.fingerprint
    model.close()
