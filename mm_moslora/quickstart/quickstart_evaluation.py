"""Evaluation of the quickstart: tuned model, untuned model (strict and lenient), wrong picture, blind, baselines."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm_moslora_eval.backends.local_model import LocalModel
from mm_moslora_eval.protocol.model_interface import Model
from mm_moslora_eval.protocol.task import Decoding, Task
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.report.run_evidence import NamedResult, ahead_by, before_tuning, row_of
from mm_moslora_eval.run.answer_views import read_scored
from mm_moslora_eval.run.baselines import BASELINES, TrainingAnswer, read_training_answers
from mm_moslora_eval.run.evaluate_suite import evaluate, read_samples
from mm_moslora_eval.run.run_claim import RUN, claim_run
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.task_result import TaskResult
from mm_moslora_eval.sources.image_controls import MODES, ImageMode

from mm_moslora.config import Precision
from mm_moslora.data.preprocessing_print import check_preprocessing
from mm_moslora.models.load_model import load
from mm_moslora.models.precision import dtype_of, resolve_precision
from mm_moslora.quickstart.instruction_data import DatasetFiles
from mm_moslora.quickstart.quickstart_notes import read_earlier
from mm_moslora.reporting.verdicts import difference_of, judge_tuning
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.files import make_subfolder, replace_json, replacing, set_aside, sha256_of
from mm_moslora.utils.progress_bar import Progress
from mm_moslora.utils.run_paths import find_checkpoint
from mm_moslora.utils.untrusted_data import parse_lines
from mm_moslora.utils.untrusted_files import MOST_BYTES, read_bytes, read_text

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
SHOWN_SAMPLES = 24

MAX_NEW_TOKENS = 8
"""Answer length in tokens; answers are one word."""
UNTUNED_NEW_TOKENS = 16
"""Answer length for sentences with the right word, which the untuned model tends to give."""
# image mode or baseline of the tuned model -> (name in evaluation.json, label)
_ROWS = {
    "own": ("tuned", "Tuned with MoSLoRA"),
    "wrong": ("wrong_image", "Tuned, wrong picture"),
    "blind": ("blind", "Tuned, blind (mean colour)"),
    "question_majority": ("best_answer", "Best answer per question, unseen"),
    "majority": ("majority", "Most frequent answer"),
}
_BEFORE = "Before tuning (projector aligned)"


def subject_of(folder: Path, data: DatasetFiles) -> dict[str, str]:
    """Digests of the inputs of an evaluation; every row of `evaluation.json` holds them.

    Args:
        folder: the quickstart's run folder, with `align` and `tune` trained.

    Returns:
        Digests: `model` of the tuned weights, `before` of the aligned ones, `data` of the questions and the training
        answers.
    """
    return {
        "model": _weights(folder / "tune"),
        "before": _weights(folder / "align"),
        "data": _digest([data.train, data.test]),
    }


def _weights(run: Path) -> str:
    checkpoint = find_checkpoint(run)
    return _digest(sorted([*checkpoint.glob("*.safetensors"), *checkpoint.glob("adapter/*.safetensors")]))


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()


def measured(folder: Path, subject: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """The scores of an earlier call.

    Returns:
        The rows of `evaluation.json`; None where they are missing, damaged, or of another model or other data.
    """
    rows = read_earlier(folder / "evaluation.json", list, fits=table)
    if rows is None or any(row.get(key) != value for row in rows for key, value in subject.items()):
        return None
    return list(rows)


def evaluate_all(
    folder: Path, data: DatasetFiles, *, name: str, subject: Mapping[str, str], precision: Precision = "auto"
) -> list[dict[str, Any]]:
    """Evaluate both stages with all controls; existing answers of a model are reused.

    Returns:
        The rows of `evaluation.json`, tuned first.
    """
    task = dataclasses.replace(
        get_task(f"llava:{data.test}@{data.images}"), name=name, decoding=Decoding(max_new_tokens=MAX_NEW_TOKENS)
    )
    training = read_training_answers(data.train, image_folder=data.images)
    ask = partial(_evaluate, folder, training=training, precision=precision)
    at_length = dataclasses.replace(task, decoding=Decoding(max_new_tokens=UNTUNED_NEW_TOKENS))
    (before,) = ask("align", "untuned", at_length, ("own",))
    after = {result.mode: result for result in ask("tune", "tuned", task, MODES)}
    rows = [{**row, **subject} for row in _rows(folder, before, after)]
    replace_json(folder / "samples.json", _samples(folder, before, after["own"], data))
    replace_json(folder / "evaluation.json", rows)
    return rows


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
    assembly = load(folder / run, dtype=dtype_of(resolve_precision(precision)))
    check_preprocessing(folder / run, assembly)
    assembly.model.to(distributed.device())  # type: ignore[arg-type]
    model = LocalModel(assembly, name=system)
    count = read_text(Path(task.source.path)).count("\n")
    results = []
    for mode in modes:
        label, answers = f"{system}, {mode}", folder / "eval" / system / mode
        _set_aside_other(answers, model)
        with Progress(label, count, unit="question") as progress:
            results += evaluate(
                model,
                task,
                answers,
                modes=(mode,),
                baselines=BASELINES if system == "tuned" and mode == "own" else (),
                training=training,
                settings=EvaluationSettings(batch_size=BATCH_SIZE, rank=0, world_size=1),
                progress=lambda _, *counts: progress.of(*counts),
            )
    model.close()
    return results


def _set_aside_other(answers: Path, model: Model) -> None:
    """Rename a folder with the answers of another model."""
    if not (answers / RUN).is_file():
        return
    try:
        claim_run(answers, model)
    except EvalError:
        aside = set_aside(answers, "other")
        logger.warning("%s held answers of another model, now in %s. All questions are asked again.", answers, aside)


def _rows(folder: Path, before: TaskResult, after: Mapping[str, TaskResult]) -> list[dict[str, Any]]:
    """The tuned model first, then the untuned one, then the controls, each with the tuned model's lead over it."""
    folders = {
        mode: folder / "eval" / "tuned" / mode / result.folder for mode, result in after.items() if result.folder
    }
    own = read_scored(folders["own"])
    rows = []
    for mode, (name, label) in _ROWS.items():
        result = after[mode]
        less = difference_of(result.about.get("own_less_this"))
        if mode in folders and mode != "own":
            less = ahead_by(result, own, read_scored(folders[mode]))
        rows.append(NamedResult(name=name, label=label, result=result, less=less))
    rows[1:1] = before_tuning(before, folder / "eval" / "untuned" / "own" / before.folder, own=own, label=_BEFORE)
    return [row_of(item) for item in rows]


def _samples(folder: Path, untuned: TaskResult, tuned: TaskResult, data: DatasetFiles) -> list[dict[str, Any]]:
    """Held-out questions, evenly spread over the set, with the answers of both stages."""
    before = read_samples(folder / "eval" / "untuned" / "own" / untuned.folder)
    after = read_samples(folder / "eval" / "tuned" / "own" / tuned.folder)
    images = {}
    for record in parse_lines(read_text(data.test)):
        images[record["question_id"]] = record["image"]
    step = max(1, len(after) // SHOWN_SAMPLES)
    rows: list[dict[str, Any]] = []
    for old, new in list(zip(before, after, strict=True))[::step][:SHOWN_SAMPLES]:
        picture = data.images / images[new["id"]]
        copy = folder / "pictures" / f"{len(rows):02d}{picture.suffix}"
        make_subfolder(copy.parent)
        with replacing(copy) as part:
            part.write_bytes(read_bytes(picture, most=MOST_BYTES))
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
    """A table for the terminal: scores in percent with 95 % intervals, over all questions and by category."""
    names = sorted({category for row in rows for category in row["categories"]})
    width = max(len(row["label"]) for row in rows)
    head = f"{'':<{width}}  {'all questions':>20}" + "".join(f"  {name:>20}" for name in names)
    lines = [head, "-" * len(head)]
    for row in rows:
        cells = [row, *(row["categories"].get(name) for name in names)]
        lines.append(f"{row['label']:<{width}}" + "".join(f"  {_cell(cell):>20}" for cell in cells))
    lines.append(f"{rows[0]['n']} held-out questions; percent right, 95 % interval in brackets.")
    ahead = {row["name"]: less for row in rows if (less := difference_of(row.get("less"))) is not None}
    return "\n".join([*lines, "", *judge_tuning(ahead).sentences[: 1 if ahead else 0], *rows[0].get("remarks", [])])


def _cell(part: dict[str, Any] | None) -> str:
    if part is None or part["mean"] is None:
        return "-"
    return f"{100 * part['mean']:.1f} [{100 * part['low']:.1f}, {100 * part['high']:.1f}]"
