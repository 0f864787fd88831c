"""Python files of a user's own: `--import FILE.py` of a command line executes them, and nothing else does.

`cli.run` executes them before anything is looked up by name. Each command line of this project that it starts, a rank,
a job or a cell, gets the same option (`import_words`). No recipe, task file or data folder names such a file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.identity import sha256_of_bytes, sha256_of_text
from mm_moslora.utils.untrusted_files import MOST_TEXT_BYTES, FileError, read_bytes

OPTION = "--import"
_current: dict[str, str] = {}
"""Absolute path -> SHA-256 of the files that the present command line names."""
_executed: dict[str, tuple[str, str]] = {}
"""Name of a module -> path and SHA-256 of the file that it was executed from."""


class ForeignExitError(RuntimeError):
    """Code of others asked to end the program."""


@contextmanager
def foreign_code() -> Iterator[None]:
    """Run code of others: what it raises to end the program becomes a `ForeignExitError`, except Ctrl-C."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ForeignExitError(f"it raised {type(error).__name__}: {error}, which ends a program") from error


def without_imports(arguments: Sequence[str]) -> tuple[list[str], list[Path]]:
    """A command line without `--import FILE.py`, wherever it stands, and the files."""
    rest: list[str] = []
    files: list[Path] = []
    words = iter(arguments)
    for word in words:
        if word == OPTION:
            file = next(words, None)
            if file is None:
                raise ConfigError(f"{OPTION} needs a file: {OPTION} FILE.py.")
            files.append(Path(file))
        elif word.startswith(f"{OPTION}="):
            files.append(Path(word.removeprefix(f"{OPTION}=")))
        else:
            rest.append(word)
    return rest, files


@contextmanager
def imported(files: Sequence[Path]) -> Iterator[None]:
    """Execute files (see `import_file`), and hand them to command lines that are started within."""
    before = dict(_current)
    try:
        for file in files:
            path, sha256 = _executed[import_file(file).__name__]
            _current[path] = sha256
        yield
    finally:
        _current.clear()
        _current.update(before)


def import_file(file: Path) -> ModuleType:
    """Execute a file that the user has named; one that was executed as it is now is not executed again."""
    path = file.expanduser().absolute()
    if file.suffix != ".py" or not path.is_file():
        found = "is no Python file" if path.exists() else "does not exist"
        raise ConfigError(f"{OPTION} {file} {found}. Name a file that ends in .py.")
    try:
        source = read_bytes(path, most=MOST_TEXT_BYTES)
    except FileError as error:
        raise ConfigError(f"{OPTION} {file}: {error}") from error
    sha256 = sha256_of_bytes(source)
    name = f"mm_moslora_own_{path.stem}_{sha256_of_text(str(path))[:8]}"
    if _executed.get(name) != (str(path), sha256):
        module = ModuleType(name)
        module.__file__ = str(path)
        sys.modules[name] = module  # for dataclasses and pickles of its classes
        _executed[name] = (str(path), sha256)
        try:
            with foreign_code():
                exec(compile(source, str(path), "exec"), vars(module))  # noqa: S102  (what the user asked for)
        except Exception as error:  # whatever the file raises
            del sys.modules[name], _executed[name]
            raise ConfigError(f"{OPTION} {file} cannot be executed: {type(error).__name__}: {error}") from error
    return sys.modules[name]


def import_words() -> list[str]:
    """The option for a command line that this process starts."""
    return [f"{OPTION}={path}" for path in _current]


def import_marks() -> dict[str, str]:
    """What a run keeps of its imports: `--import NAME.py` -> SHA-256."""
    return {f"{OPTION} {Path(path).name}": sha256 for path, sha256 in _current.items()}


def origin_of(function: Any) -> dict[str, str]:
    """File and SHA-256 of a function that an imported file defines; empty for any other."""
    path, sha256 = _executed.get(getattr(function, "__module__", ""), ("", ""))
    return {"file": path, "sha256": sha256} if path else {}
