"""Divided evaluations: a shard answers its share of every task into a folder of its own; a merge scores all of them.

A shard is the folder `OUTPUT/shards/I-of-N`, a run without scores. Its `shard.json` appears when it is done, and holds
what the shares and the answers depend on. The merge copies the answers into `OUTPUT` and goes on as a run that finds
every answer stored, without a model. A share consists of whole windows (`request_preparation.windows`), so batches are
those of the undivided run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mm_moslora.launch.shard import Shard, finished, refuse_others
from mm_moslora.utils.errors import ConfigError, EvalError
from mm_moslora.utils.files import discard, make_subfolder, replace_text
from mm_moslora.utils.untrusted_data import build_strictly, parse_object
from mm_moslora_eval.protocol.model_interface import Model
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.answer_log import line, read_folder
from mm_moslora_eval.run.request_preparation import FORMAT
from mm_moslora_eval.run.scored_subsets import SHARDS, TASK, read_json
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.sources.source_images import ImageMode

DONE = "shard.json"
_DIVIDING = ("batch_size", "limit", "stratify", "samples", "seed", "max_new_tokens", "world_size")
"""Settings on which shares or answers depend."""


def folder_of_shard(output: Path, shard: Shard) -> Path:
    """The run folder of a shard."""
    return output / SHARDS / shard.name


def work_of(
    tasks: Sequence[tuple[Task, str]], modes: Sequence[ImageMode], settings: EvaluationSettings, *, model: str
) -> dict[str, Any]:
    """The settings that all shards of an evaluation, and its merge, must share."""
    names = {task.id: task.to_dict() | {"sha256 of the data": data} for task, data in tasks}
    work = {"format": FORMAT, "--model": model, "--modes": modes, "tasks": list(names)}
    work |= {name: getattr(settings, name) for name in _DIVIDING} | names
    return parse_object(json.dumps(work))


def finish(folder: Path, model: Model, work: dict[str, Any]) -> None:
    """Note in the folder of a shard that all its answers are there."""
    views = [view for mode_folder in _mode_folders(work) for view in sorted((folder / mode_folder).glob(f"*/{TASK}"))]
    done = _Done(
        work=work,
        answers={mode_folder: len(read_folder(folder / mode_folder)) for mode_folder in _mode_folders(work)},
        model=StoredModel(
            name=model.name, fingerprint=model.fingerprint, thinking_tokens=int(getattr(model, "thinking_tokens", 0)),
            computed_by=_once(item for view in views for item in read_json(view)["computed_by"]),
            trained_frames=getattr(model, "trained_frames", None),
            trained_fps=getattr(model, "trained_fps", None),
        ),
    )  # fmt: skip
    replace_text(folder / DONE, json.dumps(asdict(done), indent=1) + "\n")


def is_finished(folder: Path, work: dict[str, Any]) -> bool:
    """Whether a shard has an answer to everything, and no failed sample that could be asked again."""
    try:
        done = build_strictly(_Done, read_json(folder / DONE), source=DONE)
    except (ConfigError, EvalError):
        return False
    rows = {mode_folder: read_folder(folder / mode_folder).values() for mode_folder in _mode_folders(work)}
    whole = all(len(rows[mode_folder]) >= done.answers.get(mode_folder, 1) for mode_folder in rows)
    return done.work == work and whole and all(row.get("error") is None for answers in rows.values() for row in answers)


def _mode_folders(work: dict[str, Any]) -> list[str]:
    return [f"{task}/{mode}" for task in work["tasks"] for mode in work["--modes"]]


def _once(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    distinct: list[dict[str, Any]] = []
    for item in items:
        distinct += [item] if item not in distinct else []
    return distinct


@dataclass(kw_only=True)
class StoredModel:
    """Stands for a model whose answers are all stored."""

    name: str
    fingerprint: str
    thinking_tokens: int
    computed_by: list[dict[str, Any]]
    trained_frames: int | None = None
    trained_fps: float | None = None

    def generate(self, requests: Sequence[Any], *, batch_size: int) -> Iterator[Any]:
        """Refuse: nothing is asked here."""
        request = getattr(requests[0], "request", requests[0])
        raise EvalError(
            f"The shards have no answer to some documents (first: {request.id!r}): the data have changed since they "
            "were asked. Run the shards again, then merge."
        )

    loglikelihood = generate

    def close(self) -> None:
        """Nothing is open."""


@dataclass(kw_only=True)
class _Done:
    """Content of a `shard.json`."""

    work: dict[str, Any]
    answers: dict[str, int]
    """Stored answers by task and mode."""
    model: StoredModel


def gather(output: Path, work: dict[str, Any]) -> StoredModel:
    """Copy the answers of all shards into the run folder that they divide."""
    lines: dict[str, list[str]] = {mode_folder: [] for mode_folder in _mode_folders(work)}
    model: StoredModel | None = None
    for shard, path in finished(output / SHARDS, f"/{DONE}").items():
        what = f"Shard {shard} ({path.parent})"
        try:
            done = build_strictly(_Done, read_json(path), source=str(path))
        except (ConfigError, EvalError) as error:
            discard(path)  # it counts as missing, here and for the jobs of --shards
            raise EvalError(f"{what} is damaged ({error}). Run it again with --shard {shard}; then merge.") from error
        refuse_others(done.work, work, what=what)
        model = model or done.model
        own, others = ({"model": {**asdict(one), "computed_by": 0}} for one in (done.model, model))
        refuse_others(own, others, what=what)
        model.computed_by = _once([*model.computed_by, *done.model.computed_by])
        for mode_folder in lines:
            rows = read_folder(path.parent / mode_folder)
            if len(rows) < (count := done.answers.get(mode_folder, 0)):
                discard(path)
                raise EvalError(
                    f"{what} is damaged: {len(rows)} of {count} answers of {mode_folder} can be read. Run it again "
                    f"with --shard {shard}, which asks only what is missing; then merge."
                )
            lines[mode_folder] += map(line, rows.values())
    assert model is not None, "there is a shard, or `finished` raises"
    for mode_folder, texts in lines.items():
        make_subfolder(output / mode_folder, below=output)
        replace_text(output / mode_folder / "answers-shards.jsonl", "".join(texts))
    return model
