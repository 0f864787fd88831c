"""Finds tasks by name: shipped YAML files, and data files as tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import EvalError, suggestion
from mm_moslora.utils.run_paths import file_and_folder
from mm_moslora.utils.untrusted_data import build_strictly, parse_yaml, parse_yaml_value
from mm_moslora.utils.untrusted_files import read_text
from mm_moslora_eval.protocol.task import Decoding, Task
from mm_moslora_eval.protocol.task_prompt import TaskPrompt
from mm_moslora_eval.scoring.named_parts import KINDS, part_text
from mm_moslora_eval.sources.source import Source
from mm_moslora_eval.task_files import TASKS
from mm_moslora_eval.task_files.task_rules import folder_of

_TASK_FILES = (".yaml", ".yml")


def task_file(name: str) -> Path:
    """The file of a shipped task, which may not exist: that of its name, or the only one of its benchmark."""
    folder = TASKS / folder_of(name)
    own = folder / f"{name}.yaml"
    return own if own.is_file() else folder / "task.yaml"


def load_file(path: Path) -> list[Task]:
    """Read a task file: one task, or several under `protocols` that share the rest."""
    data = parse_yaml(read_text(path), source=str(path))
    protocols = data.pop("protocols", None)
    if protocols is None:
        return [_build(data, path, "")]
    named = protocols if isinstance(protocols, dict) else {}
    if not named or not all(isinstance(changes, dict | None) for changes in named.values()):
        raise EvalError(f"{path}: `protocols` must map names to the keys in which they differ.")
    return [
        _build(_merged(data, {"protocol": name, **(changes or {})}), path, f", protocol {name}")
        for name, changes in named.items()
    ]


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _build(data: dict[str, Any], path: Path, where: str) -> Task:
    data = {"folder": str(path.parent.absolute()), **_with_part_texts(data)}
    return build_strictly(Task, data, source=f"{path}{where}")


def _with_part_texts(data: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a task with its rules as texts."""
    return {key: part_text(key, value) if key in KINDS else value for key, value in data.items()}


def all_tasks() -> dict[str, Task]:
    """Every shipped task by `name@protocol`."""
    tasks: dict[str, Task] = {}
    for path in sorted(TASKS.glob("*/*.yaml")):
        tasks |= {task.id: task for task in load_file(path)}
    return tasks


def get_task(name: str) -> Task:
    """Find a task.

    Args:
        name: `NAME` (its first protocol), `NAME@PROTOCOL`, the path of a task file (`FILE.yaml`, `FILE.yaml@PROTOCOL`),
            `llava:FILE`, `llava:FILE@IMAGE_FOLDER` or `tsv:FILE`.
    """
    kind, separator, rest = name.partition(":")
    if separator and (kind == "llava" or kind == "tsv"):
        return _from_data(kind, rest)
    stem, protocol = name_and_protocol(name)
    if stem.endswith(_TASK_FILES):
        if not Path(stem).is_file():
            raise EvalError(f"Task file {stem!r} does not exist.")
        tasks = {task.id: task for task in load_file(Path(stem))}
        stem = next(iter(tasks.values())).name
    else:
        shipped = task_file(stem)
        tasks = {task.id: task for task in load_file(shipped)} if shipped.is_file() else {}
        if stem not in (task.name for task in tasks.values()):
            tasks = all_tasks()
    wanted = f"{stem}@{protocol}"
    if protocol and wanted in tasks:
        return tasks[wanted]
    matching = [task for task in tasks.values() if task.name == stem]
    if matching and not protocol:
        return matching[0]
    if matching:
        protocols = ", ".join(task.protocol for task in matching)
        raise EvalError(f"Task {stem!r} has no protocol {protocol!r}; it has {protocols}.")
    names = sorted({task.name for task in tasks.values()})
    raise EvalError(
        f"No task {name!r}.{suggestion(stem, names)} See `mm-moslora eval list`, "
        "or give a data file as llava:FILE or tsv:FILE."
    )


CHANGEABLE = ("prompt", "decoding", "over_samples", "thinking")
"""Keys of a task that a run may change, with what is below them."""


def with_changes(task: Task, changes: Sequence[str]) -> Task:
    """A task with other values of some keys, which its results name."""
    if not changes:
        return task
    data = task.to_dict() | {"folder": task.folder, "changed": list(changes)}
    for change in changes:
        key, separator, value = change.partition("=")
        path = key.split(".")
        if not separator or path[0] not in CHANGEABLE:
            raise EvalError(
                f"--change {change!r} is none; expected KEY=VALUE with a key below {', '.join(CHANGEABLE)}."
            )
        new: Any = parse_yaml_value(value)
        for name in reversed(path):
            new = {name: new}
        data = _merged(data, _with_part_texts(new))
    return build_strictly(Task, data, source="--change")


def is_task_file(name: str) -> bool:
    """Whether a name of `get_task` is the path of a task file."""
    return name_and_protocol(name)[0].endswith(_TASK_FILES)


def name_and_protocol(name: str) -> tuple[str, str]:
    """Split `NAME@PROTOCOL` or `FILE.yaml@PROTOCOL`; folders may contain an `@`. Without a protocol it is empty."""
    stem, separator, protocol = name.rpartition("@")
    return (stem, protocol) if separator and not name.endswith(_TASK_FILES) else (name, "")


def _from_data(kind: str, rest: str) -> Task:
    path, folder = file_and_folder(rest) if kind == "llava" else (rest, "")
    if not path:
        raise EvalError(f"{kind}: needs a file, such as {kind}:questions.{'jsonl' if kind == 'llava' else 'tsv'}.")
    name = "".join(character if character.isalnum() or character in "-_." else "_" for character in Path(path).stem)
    name = name.lstrip("-.") or "questions"
    llava = kind == "llava"
    prompt = TaskPrompt(
        template="{hint_line}{question}{option_lines}{instruction}", fragments=_LINES,
        instruction="\nAnswer with the option's letter from the given choices directly.",
        # LLaVA's question files contain their own instruction.
        open_instruction="" if llava else "\nAnswer the question using a single word or phrase.",
        chinese_instruction=None if llava else "\n请直接回答选项字母。",
    )  # fmt: skip
    return Task(
        name=name, title=f"{'questions' if llava else 'rows'} of {os.path.basename(path)}",
        folder=str(Path.cwd()),  # paths on a command line start there
        source=Source(kind="llava" if llava else "tsv", path=path, image_folder=folder or None),
        prompt=prompt, decoding=Decoding() if llava else Decoding(max_new_tokens=32),
        extraction="letter_or_text", metric="letter_or_exact" if llava else "letter_or_vqa",
    )  # fmt: skip


_LINES = {"hint_line": "{hint}\n", "option_lines": "\n{options}"}
