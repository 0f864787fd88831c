"""Groups of tasks: `@NAME` of the shipped groups, `@TAG` of the tasks' tags, `@FILE.yaml:NAME` of a user's own, where
NAME is a group of the file, or a tag of the task files in its groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mm_moslora.config.recipe_paths import rewritten_task
from mm_moslora.utils.errors import EvalError, MoSLoRAError, suggestion
from mm_moslora.utils.untrusted_data import parse_yaml, read_value
from mm_moslora.utils.untrusted_files import read_text
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.protocol.task_registry import (
    all_tasks,
    get_task,
    is_task_file,
    load_file,
    name_and_protocol,
)
from mm_moslora_eval.task_files import TASKS

SIGN = "@"
"""First character of a group's name."""


def shipped_groups() -> dict[str, tuple[str, ...]]:
    """The groups of this package."""
    path = _shipped()
    groups = _read(path)
    return {name: _items(groups, name, path) for name in groups}


def _shipped() -> Path:
    return TASKS / "groups.yaml"


def _read(path: Path) -> dict[str, object]:
    """The groups of a YAML file, which maps names to lists of tasks and groups; each is read when it is used."""
    return {str(name): items for name, items in parse_yaml(read_text(path), source=str(path)).items()}


def _items(groups: Mapping[str, object], name: str, path: Path) -> tuple[str, ...]:
    if items := read_value(tuple[str, ...], groups[name], source=str(path), where=name):
        return items
    raise EvalError(f"The group {name!r} of {path} holds no tasks. Name some in it, or leave it out.")


def expanded(names: Sequence[str], protocol: str | None = None) -> list[str]:
    """Names of tasks, in the place of groups and tags the tasks in them, each once."""
    return list(dict.fromkeys(task for name in names for task in _members(name, (), protocol)))


def _members(name: str, within: tuple[str, ...], protocol: str | None) -> Iterator[str]:
    if not name.startswith(SIGN):
        yield name
        return
    if name in within:
        raise EvalError(f"The group {name} holds itself: {' > '.join((*within, name))}.")
    file, separator, group = name.removeprefix(SIGN).rpartition(":")
    path = _file(file, name) if separator else _shipped()
    groups = _read(path)
    if group in groups:
        items = _items(groups, group, path)
    else:
        tasks = _tasks_in(groups, path.parent) if separator else all_tasks()
        items = _tagged(name, group, tasks, groups=groups, protocol=protocol)
    for item in items:
        if separator and item.startswith(SIGN) and item.removeprefix(SIGN) in groups:
            item = f"{SIGN}{file}:{item.removeprefix(SIGN)}"
        elif separator and group in groups:
            item = _from(path.parent, item)
        yield from _members(item, (*within, name), protocol)


def _file(file: str, name: str) -> Path:
    if not Path(file).is_file():
        raise EvalError(f"{name}: there is no file {file!r}. A group of your own is @FILE.yaml:NAME.")
    return Path(file)


def _from(folder: Path, item: str) -> str:
    """A task or group of a file of groups, whose paths start at the file."""
    return rewritten_task(item, folder, lambda path: str(folder / path))


def _tasks_in(groups: Mapping[str, object], folder: Path) -> dict[str, Task]:
    """The tasks of the task files in groups of a user's own, by `FILE.yaml@PROTOCOL`; unreadable ones have no tags."""
    tasks: dict[str, Task] = {}
    for items in groups.values():
        for item in items if isinstance(items, list) else ():
            name = _from(folder, str(item))
            stem, protocol = name_and_protocol(name)
            if is_task_file(name):
                with suppress(MoSLoRAError):
                    found = {f"{stem}@{task.protocol}": task for task in load_file(Path(stem))}
                    tasks |= {name: task for name, task in found.items() if protocol in ("", task.protocol)}
    return tasks


def _tagged(
    name: str, tag: str, tasks: Mapping[str, Task], *, groups: Mapping[str, object], protocol: str | None
) -> tuple[str, ...]:
    """The tasks with a tag, each in the given protocol, or in its first one that has the tag."""
    found: dict[str, str] = {}
    for full, task in tasks.items():
        if tag in task.tags:
            stem = name_and_protocol(full)[0]
            found.setdefault(stem, f"{stem}@{protocol}" if protocol else full)
    if not found:
        known = {*groups}.union(*(task.tags for task in tasks.values()))
        raise EvalError(
            f"There is no group {name}.{suggestion(tag, known)} Groups and tags: {', '.join(sorted(known))}."
        )
    return tuple(found.values())


def with_protocol(names: Sequence[str], protocol: str | None) -> list[str]:
    """The tasks of names and groups; the protocol is added to those without one."""
    if not names:
        raise EvalError("No task was given. Name one or more; `mm-moslora eval list` shows them.")
    own_data = ("llava:", "tsv:")
    return _once(
        f"{task}@{protocol}" if protocol and not task.startswith(own_data) and not name_and_protocol(task)[1] else task
        for task in expanded(names, protocol)
    )


def _once(names: Iterable[str]) -> list[str]:
    """Each task once, also where it is named with its first protocol and without."""
    kept: dict[str, str] = {}
    for name in dict.fromkeys(names):
        stem, protocol = name_and_protocol(name)
        same = [one for one in kept if kept[one] == stem and not (protocol and name_and_protocol(one)[1])]
        if not any(get_task(one) == get_task(name) for one in same):
            kept[name] = stem
    return [*kept]


def tasks_of(names: Sequence[str]) -> list[Task]:
    """The tasks of `validate.tasks`, those of groups included."""
    every = expanded(names)
    tasks = [get_task(name) for name in every]
    for number, task in enumerate(tasks):
        first = [other.name for other in tasks].index(task.name)
        if first < number:
            raise EvalError(
                f"validate.tasks: {every[first]!r} and {every[number]!r} would both be measured as "
                f"eval/{task.name}/... Keep one of them, or give its file another name."
            )
    return tasks


def names_own_file(name: str) -> bool:
    """Whether a name of a task or group is that of a user's own task file or file of groups."""
    return ":" in name if name.startswith(SIGN) else is_task_file(name)
