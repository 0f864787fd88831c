"""Groups of tasks: `@NAME` of the shipped groups, `@TAG` of the tasks' tags, `@FILE.yaml:NAME` of a user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mm_moslora.config.recipe_paths import rewritten_task
from mm_moslora.utils.errors import EvalError, suggestion
from mm_moslora.utils.untrusted_data import parse_yaml, read_value
from mm_moslora.utils.untrusted_files import read_text
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.protocol.task_registry import all_tasks, get_task, is_task_file, name_and_protocol, task_folder

SIGN = "@"
"""First character of a group's name."""
Groups = Mapping[str, tuple[str, ...]]


def shipped_groups() -> Groups:
    """The groups of this package."""
    return read_groups(task_folder() / "groups" / "groups.yaml")


def read_groups(path: Path) -> Groups:
    """The groups of a YAML file, which maps names to lists of tasks and further groups.

    Raises:
        ConfigError: it is no such file.
    """
    data = parse_yaml(read_text(path), source=str(path))
    return {str(name): read_value(tuple[str, ...], items, source=str(path), where=name) for name, items in data.items()}


def expanded(names: Sequence[str]) -> list[str]:
    """Names of tasks, in the place of groups and tags the tasks in them, each once.

    Raises:
        EvalError: there is no such group, or it holds itself.
    """
    return list(dict.fromkeys(task for name in names for task in _members(name, ())))


def _members(name: str, within: tuple[str, ...]) -> Iterator[str]:
    if not name.startswith(SIGN):
        yield name
        return
    if name in within:
        raise EvalError(f"The group {name} holds itself: {' > '.join((*within, name))}.")
    file, separator, group = name.removeprefix(SIGN).rpartition(":")
    groups = read_groups(_file(file, name)) if separator else shipped_groups()
    folder = Path(file).parent
    for item in groups.get(group) or _tagged(name, group, groups, tags=not separator):
        if separator and item.startswith(SIGN) and item.removeprefix(SIGN) in groups:
            item = f"{SIGN}{file}:{item.removeprefix(SIGN)}"
        elif separator:
            item = rewritten_task(item, folder, lambda path: str(folder / path))
        yield from _members(item, (*within, name))


def _file(file: str, name: str) -> Path:
    if not Path(file).is_file():
        raise EvalError(f"{name}: there is no file {file!r}. A group of your own is @FILE.yaml:NAME.")
    return Path(file)


def _tagged(name: str, tag: str, groups: Groups, *, tags: bool) -> list[str]:
    """The tasks with a tag, each in its first protocol that has it."""
    found: dict[str, str] = {}
    known = {*groups}
    for task in all_tasks().values() if tags else ():
        known |= {*task.tags}
        if tag in task.tags:
            found.setdefault(task.name, task.id)
    if not found:
        raise EvalError(
            f"There is no group {name}.{suggestion(tag, known)} Groups{' and tags' if tags else ''}: "
            f"{', '.join(sorted(known))}."
        )
    return list(found.values())


def with_protocol(names: Sequence[str], protocol: str | None) -> list[str]:
    """The tasks of names and groups; the protocol is added to those without one.

    Raises:
        EvalError: no task at all; see `expanded`.
    """
    if not names:
        raise EvalError("No task was given. Name one or more; `mm-moslora eval list` shows them.")
    own_data = ("llava:", "tsv:")
    return [
        f"{task}@{protocol}" if protocol and not task.startswith(own_data) and not name_and_protocol(task)[1] else task
        for task in expanded(names)
    ]


def tasks_of(names: Sequence[str]) -> list[Task]:
    """The tasks of `validate.tasks`, those of groups included.

    Raises:
        EvalError: no such task or group, or two tasks with the same metric names.
    """
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
