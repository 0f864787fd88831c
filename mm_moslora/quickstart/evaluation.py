"""Measuring the quickstart: tuned, untuned (as asked and leniently), wrong picture, blind, majority, best answer."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm_moslora_eval.baselines import BASELINES, TrainingAnswer, read_training_answers
from mm_moslora_eval.evidence import Told, before_tuning, row_of
from mm_moslora_eval.images import MODES, ImageMode
from mm_moslora_eval.local import LocalModel
from mm_moslora_eval.registry import get_task
from mm_moslora_eval.results import TaskResult, read_scored
from mm_moslora_eval.runner import Settings
from mm_moslora_eval.scored import difference_between
from mm_moslora_eval.suite import evaluate, read_samples
from mm_moslora_eval.task import Decoding, Task

from mm_moslora import distributed
from mm_moslora.config import Precision
from mm_moslora.files import read_json, replace_json
from mm_moslora.models.load import load
from mm_moslora.quickstart.datasets import DatasetFiles
from mm_moslora.training.precision import dtype_of, resolve_precision
from mm_moslora.training.progress import Progress
from mm_moslora.verdicts import difference_of, judge_tuning

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
SHOWN_SAMPLES = 24

MAX_NEW_TOKENS = 8
"""Answers are a word."""
UNTUNED_NEW_TOKENS = 24
"""Room for a sentence that holds the right word, which the model before tuning tends to answer with."""
# image mode or baseline of the tuned model -> (name in evaluation.json, label)
_ROWS = {
    "own": ("tuned", "Tuned with MoSLoRA"),
    "wrong": ("wrong_image", "Tuned, wrong picture"),
    "blind": ("blind", "Tuned, blind (mean colour)"),
    "question_majority": ("best_answer", "Best answer per question, unseen"),
    "majority": ("majority", "Most frequent answer"),
}
_BEFORE = "Before tuning (projector aligned)"


def evaluate_all(folder: Path, data: DatasetFiles, *, name: str, precision: Precision = "auto") -> list[dict[str, Any]]:
    """Measure both stages with all controls; what is done already is not done again.

    Args:
        folder: the quickstart's run folder, with `align` and `tune` trained.
        data: its data files.
        name: of the task.
        precision: that the models compute in.

    Returns:
        The rows of `evaluation.json`, tuned first.
    """
    written = folder / "evaluation.json"
    if rows := _measured(written):
        return rows
    task = _task(data, name)
    training = read_training_answers(data.train, image_folder=data.images)
    ask = partial(_evaluate, folder, training=training, precision=precision)
    (before,) = ask("align", "untuned", _asked_at_length(task), ("own",))
    after = {result.mode: result for result in ask("tune", "tuned", task, MODES)}
    rows = _rows(folder, before, after)
    replace_json(folder / "samples.json", _samples(folder, task, data))
    replace_json(written, rows)
    return rows


def _measured(path: Path) -> list[dict[str, Any]] | None:
    """The rows that an earlier call wrote; None where there are none, or where they are damaged and scored again."""
    try:
        return list(read_json(path, list))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is damaged (%s); the stored answers are scored again.", path, error)
        return None


def _task(data: DatasetFiles, name: str) -> Task:
    task = get_task(f"llava:{data.test}@{data.images}")
    return dataclasses.replace(task, name=name, decoding=Decoding(max_new_tokens=MAX_NEW_TOKENS))


def _asked_at_length(task: Task) -> Task:
    return dataclasses.replace(task, decoding=Decoding(max_new_tokens=UNTUNED_NEW_TOKENS))


def _evaluate(
    folder: Path,
    run: str,
    system: str,
    task: Task,
    modes: Sequence[ImageMode],
    *,
    training: list[TrainingAnswer],
    precision: Precision,
) -> list[TaskResult]:
    dtype = dtype_of(resolve_precision(precision))
    assembly = load(folder / run, dtype=dtype)
    assembly.model.to(distributed.device())  # type: ignore[arg-type]
    model = LocalModel(assembly, name=system)
    count = Path(task.source.path).read_bytes().count(b"\n")
    found = []
    for mode in modes:
        label = f"{system}, {mode}"
        with Progress(label, count, unit="question") as progress:
            found += evaluate(
                model,
                task,
                folder / "eval" / system / mode,
                modes=(mode,),
                baselines=BASELINES if system == "tuned" and mode == "own" else (),
                training=training,
                settings=Settings(batch_size=BATCH_SIZE, rank=0, world_size=1),
                progress=progress.of,
            )
    model.close()
    return found


def _rows(folder: Path, before: TaskResult, after: Mapping[str, TaskResult]) -> list[dict[str, Any]]:
    """Tuned first, then the model before tuning, then the controls, each with what the tuned model is ahead by."""
    places = {mode: folder / "eval" / "tuned" / mode / result.folder for mode, result in after.items() if result.folder}
    own = read_scored(places["own"])
    told = []
    for mode, (name, label) in _ROWS.items():
        result = after[mode]
        less = difference_of(result.about.get("own_less_this"))
        if mode in places and mode != "own":
            less = difference_between(own, read_scored(places[mode]))
        told.append(Told(name=name, label=label, result=result, less=less))
    place = folder / "eval" / "untuned" / "own" / before.folder
    told[1:1] = before_tuning(before, place, own=own, label=_BEFORE)
    return [row_of(item) for item in told]


def _samples(folder: Path, task: Task, data: DatasetFiles) -> list[dict[str, Any]]:
    """Some held-out questions, spread over the set, with the answers of both stages."""
    place = f"{task.name}@{task.protocol}/own"
    before = read_samples(folder / "eval" / "untuned" / "own" / place)
    after = read_samples(folder / "eval" / "tuned" / "own" / place)
    images = {}
    for line in data.test.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        images[record["question_id"]] = record["image"]
    step = max(1, len(after) // SHOWN_SAMPLES)
    rows: list[dict[str, Any]] = []
    for old, new in list(zip(before, after, strict=True))[::step][:SHOWN_SAMPLES]:
        picture = data.images / images[new["id"]]
        copy = folder / "pictures" / f"{len(rows):02d}{picture.suffix}"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(picture.read_bytes())
        rows.append(
            {
                "image": copy.relative_to(folder).as_posix(),
                "question": new["question"],
                "options": new["options"],
                "answer": new["answers"][0],
                "before": old["text"],
                "after": new["text"],
                "before_correct": old["score"] == 1.0,
                "after_correct": new["score"] == 1.0,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The result for the terminal: a score in percent with its 95 % interval, over all questions and by category."""
    names = sorted({category for row in rows for category in row["categories"]})
    width = max(len(row["label"]) for row in rows)
    head = f"{'':<{width}}  {'all questions':>20}" + "".join(f"  {name:>20}" for name in names)
    lines = [head, "-" * len(head)]
    for row in rows:
        cells = [row, *(row["categories"].get(name) for name in names)]
        lines.append(f"{row['label']:<{width}}" + "".join(f"  {_cell(cell):>20}" for cell in cells))
    lines.append(f"{rows[0]['n']} held-out questions; percent right, 95 % interval in brackets.")
    return "\n".join([*lines, "", *_conclusion(rows)])


def _conclusion(rows: list[dict[str, Any]]) -> list[str]:
    """Whether tuning helped, where the rows say how far it is ahead, and what must be known beside the score."""
    ahead = {row["name"]: less for row in rows if (less := difference_of(row.get("less"))) is not None}
    return [*judge_tuning(ahead).sentences[: 1 if ahead else 0], *rows[0].get("remarks", [])]


def _cell(part: dict[str, Any] | None) -> str:
    if part is None or part["mean"] is None:
        return "-"
    return f"{100 * part['mean']:.1f} [{100 * part['low']:.1f}, {100 * part['high']:.1f}]"
