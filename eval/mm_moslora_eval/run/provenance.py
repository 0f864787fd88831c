"""Provenance of answers: precision, device, versions and commit; and one line per call of a run.

The environment is stored with the answers of every view and in `results.json`. `invocations.jsonl` also has the
commands.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from mm_moslora.tracking.run_environment import CHECKOUT, git_state
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import writing_in_place
from mm_moslora.utils.package_requirements import installed_version
from mm_moslora.utils.redaction import redact, redacted_command
from mm_moslora.utils.untrusted_data import build_known, parse_lines
from mm_moslora.utils.untrusted_files import read_text_below
from mm_moslora_eval.protocol.model_interface import Model
from mm_moslora_eval.run.answer_log import line
from mm_moslora_eval.run.stored_types import Call

FILE = "invocations.jsonl"


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
    with writing_in_place(folder / FILE, append=True) as stream:
        stream.write(line(row))


def read(folder: Path) -> list[Call]:
    """The recorded calls; an incomplete or damaged line is left out."""
    calls = []
    for row in parse_lines(read_text_below(folder, FILE) or "", skip_damaged=True):
        with suppress(ConfigError):
            calls.append(build_known(Call, row, source=FILE))
    return calls


@lru_cache(maxsize=1)
def commit() -> dict[str, Any] | None:
    """The commit of the checkout from which this code runs and whether it has changes; None outside a checkout."""
    state = git_state(CHECKOUT) if (CHECKOUT / ".git").exists() else {}
    return {"commit": state["git_commit"], "dirty": state["git_changed"]} if state else None
