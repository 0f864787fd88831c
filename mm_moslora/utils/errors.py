"""Exit statuses, and exceptions: one base class, and subclasses that also derive from the matching builtin exception.

Every message states what was found, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitStatus(IntEnum):
    """How a command ends, besides 0 and 128 plus the number of a signal; docs/errors.md says what to do."""

    ERROR = 1
    USAGE = 2
    UNSCORED = 3
    HANG = 70
    STOPPED = 75
    INTERRUPTED = 130
    NO_READER = 141


class MoSLoRAError(Exception):
    """Base class of the errors that mm_moslora raises deliberately."""


class ConfigError(MoSLoRAError, ValueError):
    """A recipe, an option or an argument is not acceptable."""


class AdapterError(MoSLoRAError, ValueError):
    """An adapter cannot be built, merged, saved or loaded as asked."""


class ModelError(MoSLoRAError, ValueError):
    """A model cannot be assembled, exported or loaded as asked."""


class DataError(MoSLoRAError, ValueError):
    """A record, an image or a data set is not acceptable."""


class AssetError(MoSLoRAError, RuntimeError):
    """A file that is downloaded on first use is missing, damaged or differs from the pinned one."""


class CheckpointError(MoSLoRAError, RuntimeError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


class TrainingError(MoSLoRAError, RuntimeError):
    """Training cannot start or continue."""


class DivergedError(TrainingError):
    """Training reached numbers that are not finite."""


class DistributedError(MoSLoRAError, RuntimeError):
    """The processes of a run disagree or cannot reach each other; `ranks` are those to blame, as far as known."""

    def __init__(self, message: str, *, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class EvalError(MoSLoRAError, ValueError):
    """A task, an answer file or a results folder is not acceptable."""


class MissingRequirementError(EvalError):
    """A rule of a task needs a package or data that are not on this machine."""


def suggestion(name: str, names: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` with the closest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def reason_of(error: BaseException) -> str:
    """Why a library could not load something, on one line and without its advice to run remote code."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it comes with Python code of its own, which is never run; choose one that transformers itself knows"
    first, *more = [line.strip() for line in text.splitlines()] or [type(error).__name__]
    if first.endswith(":"):  # a list follows, up to its full stop
        last = next((index for index, line in enumerate(more, start=1) if line.endswith(".")), len(more))
        first = " ".join([first, *more[:last]])[:500]
    return first.rstrip(".")
