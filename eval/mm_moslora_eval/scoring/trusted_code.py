"""Python files of a user's own: executed only after the user's word, and from the bytes whose hash is recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from mm_moslora.utils.errors import ConfigError, EvalError
from mm_moslora.utils.untrusted_files import MOST_TEXT_BYTES, FileError, read_bytes

_trusted = False


class ForeignExitError(RuntimeError):
    """Code of others asked to end the program."""


@contextmanager
def foreign_code() -> Iterator[None]:
    """Run code of others: what it raises to end the program becomes an error like any other, except Ctrl-C.

    Raises:
        ForeignExitError: SystemExit, or another exception that is no `Exception`.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ForeignExitError(f"it raised {type(error).__name__}: {error}, which ends a program") from error


def trust_task_code(yes: bool = True) -> None:
    """Let this process execute the Python files that task files name (`--trust-task-code`)."""
    global _trusted
    _trusted = yes


def code_hash(file: Path, *, named: str) -> str:
    """The SHA-256 of a Python file, which is not executed.

    Raises:
        EvalError: it cannot be read.
    """
    return hashlib.sha256(_source(file, named=named)).hexdigest()


def _source(file: Path, *, named: str) -> bytes:
    try:
        return read_bytes(file, most=MOST_TEXT_BYTES)
    except FileError as error:
        raise EvalError(f"{named}: {error}") from error


@lru_cache(maxsize=64)
def trusted_module(file: str, sha256: str) -> ModuleType:
    """Execute a file that a task names.

    Raises:
        EvalError: nobody has allowed it, it has changed, or it raises.
    """
    if not _trusted:
        raise EvalError(
            f"The task's rules are in {file}, which would be executed on this machine. Read it, and give "
            "--trust-task-code if you trust it."
        )
    source = _source(Path(file), named=file)
    found = hashlib.sha256(source).hexdigest()
    if found != sha256:
        raise EvalError(
            f"{file} has changed since the task was read (SHA-256 {found[:12]}, expected {sha256[:12]}). Restore it, "
            "or score the answers by the task file as it is now (--protocol)."
        )
    try:
        return _executed(source, Path(file), named=file)
    except ConfigError as error:
        raise EvalError(str(error)) from error


def python_module(file: Path, *, named: str) -> ModuleType:
    """Execute a file; the caller has the user's word.

    Raises:
        ConfigError: it is no Python file, or it raises; the message begins with `named`.
    """
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"{named} is no Python file. Name one that ends in .py.")
    return _executed(_source(file, named=named), file, named=named)


def _executed(source: bytes, file: Path, *, named: str) -> ModuleType:
    module = ModuleType(f"mm_moslora_own_{file.stem}")
    module.__file__ = str(file)
    try:
        with foreign_code():
            exec(compile(source, str(file), "exec"), vars(module))  # noqa: S102  (what the user asked for)
    except Exception as error:  # whatever the file raises
        raise ConfigError(f"{named} cannot be executed: {type(error).__name__}: {error}") from error
    return module
