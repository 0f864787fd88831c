"""Whose a run folder is, and what it records of its calls.

One process of each rank works in it; its answers are those of one model, asked in one way. The environment (precision,
device, versions, commit) is stored with the answers of every view and in `results.json`; `invocations.jsonl` also has
the commands.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from mm_moslora.tracking.run_environment import CHECKOUT, git_state
from mm_moslora.utils.errors import ConfigError, EvalError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import make_subfolder, read_json, replace_text, writing_in_place
from mm_moslora.utils.folder_marks import refuse_strangers
from mm_moslora.utils.package_requirements import installed_version
from mm_moslora.utils.redaction import redact, redacted_command
from mm_moslora.utils.untrusted_data import build_known, parse_json, parse_lines
from mm_moslora.utils.untrusted_files import read_text_below
from mm_moslora_eval.protocol.model_interface import Model
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.answer_log import line
from mm_moslora_eval.run.request_preparation import FORMAT
from mm_moslora_eval.run.scored_subsets import TASK, read_view
from mm_moslora_eval.run.stored_types import Call

CALLS = "invocations.jsonl"
RUN = "run.json"
"""File in a run folder that identifies the model of its answers."""
_FILES = ("results.json", "report.html", CALLS)
_LOCK_ATTEMPTS = 10


@contextmanager
def hold_run(folder: Path, *, rank: int = 0, wait: bool = False, below: Path | None = None) -> Iterator[None]:
    """Lock a run folder for this rank; `wait` until another process leaves it; `below` as for `make_subfolder`."""
    refuse_strangers(folder, _FILES, kind="evaluation", also=(RUN,))
    try:
        make_subfolder(folder, below=below or folder)  # a user's folder may be a link
    except OSError as error:
        raise EvalError(f"The run folder {folder} cannot be made ({error.strerror}). Choose another one.") from error
    for attempt in range(_LOCK_ATTEMPTS):
        try:
            lock = lock_file(folder / f".rank-{rank}.lock", wait=wait)
            break
        except BlockingIOError as error:
            if attempt == _LOCK_ATTEMPTS - 1:
                raise EvalError(
                    f"{folder} is in use: another process works there as rank {rank}. "
                    "Wait for it or choose another folder."
                ) from error
            time.sleep(0.05)  # rank 0 may be probing the lock to see whether this rank is there
    with lock:
        yield


def claim_run(folder: Path, model: Model) -> None:
    """Record the model of a run folder's answers."""
    identity = {"format": FORMAT, "model": {"name": model.name, "fingerprint": model.fingerprint}}
    claim_folder(folder / RUN, identity, what=str(folder))


@contextmanager
def open_run(folder: Path, model: Model, *, rank: int = 0) -> Iterator[None]:
    """Lock a run folder for this rank and this model."""
    with hold_run(folder, rank=rank):
        claim_run(folder, model)
        yield


def claim_folder(
    path: Path, identity: dict[str, Any], *, what: str, differs: Callable[[], Sequence[str]] = tuple
) -> None:
    """Write the owner of a folder, or refuse a folder with another owner; `differs` tells more than two hashes do."""
    try:
        stored = read_json(path)
    except FileNotFoundError:
        replace_text(path, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
        return
    except ValueError as error:
        raise EvalError(f"{path} is damaged ({error}). Restore it, or choose another folder.") from error
    for key, value in identity.items():
        if _compared(stored.get(key)) != _compared(value):
            told = "; ".join(differs()) if key == "asked" else ""
            told = told or f"its {key} is {stored.get(key)!r}, this one's is {value!r}"
            raise EvalError(f"{what} holds another run: {told}. Choose another output folder.")


def protocol_differences(folder: Path, task: Task) -> list[str]:
    """In what the prompt and the decoding of a folder's answers differ from those of a task."""
    before: dict[str, Any] = {}
    for path in folder.glob(f"*/{TASK}"):
        with suppress(EvalError, KeyError):
            before = _decisive(read_view(path.parent)["task"])
    now = _decisive(parse_json(json.dumps(task.to_dict())))
    return [
        f"its {key} is {_short(before.get(key))}, this one's is {_short(now.get(key))}"
        for key in dict.fromkeys([*before, *now]) if before and before.get(key) != now.get(key)
    ]  # fmt: skip


def _decisive(task: dict[str, Any]) -> dict[str, Any]:
    parts = {f"{part}.{key}": value for part in ("prompt", "decoding") for key, value in task[part].items()}
    return {key: value for key, value in parts.items() if key != "decoding.samples"} | {"version": task["version"]}


def _short(value: Any) -> str:
    return "the default" if value is None else repr(value)[:80]


def _compared(value: Any) -> Any:
    """Only the fingerprint identifies a model, because its folder may be renamed or spelled differently."""
    return value.get("fingerprint") if isinstance(value, dict) else value


def environment() -> dict[str, str]:
    """Versions of the software that can change an answer or a score."""
    versions = {"python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine()}
    packages = ("mm-moslora", "torch", "transformers", "peft", "pillow", "numpy")
    return versions | {name: version for name in packages if (version := installed_version(name)) is not None}


def circumstances(model: Model) -> dict[str, Any]:
    """The current environment: details of the model (precision, device, attention), versions, commit."""
    details: Mapping[str, Any] = getattr(model, "details", {})
    return {"model": dict(details), "environment": environment(), "code": commit()}


def record(folder: Path, model: Model, settings: Mapping[str, Any]) -> None:
    """Append a record of this call: command, settings, hardware and precision, versions, commit."""
    now = circumstances(model)
    row = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": redacted_command([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": redact(dict(settings)),
        **now,
        "model": redact({"name": model.name, **now["model"]}) | {"fingerprint": model.fingerprint},
    }
    with writing_in_place(folder / CALLS, append=True) as stream:
        stream.write(line(row))


def read_calls(folder: Path) -> list[Call]:
    """The recorded calls; an incomplete or damaged line is left out."""
    calls = []
    for row in parse_lines(read_text_below(folder, CALLS) or "", skip_damaged=True):
        with suppress(ConfigError):
            calls.append(build_known(Call, row, source=CALLS))
    return calls


@lru_cache(maxsize=1)
def commit() -> dict[str, Any] | None:
    """The commit of the checkout from which this code runs and whether it has changes; None outside a checkout."""
    state = git_state(CHECKOUT) if (CHECKOUT / ".git").exists() else {}
    return {"commit": state["git_commit"], "dirty": state["git_changed"]} if state else None
