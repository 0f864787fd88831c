"""The process of `timed_calls`: one JSON line in, one out."""

from __future__ import annotations

import importlib
import json
import resource
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from mm_moslora.utils.untrusted_data import parse_object

MOST_BYTES = 4 * 2**30
"""Memory of the process."""


@cache
def comparison(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A comparison of this package, `module:function`, with the arguments of its first call."""
    module, _, function = name.partition(":")
    if not module.startswith("mm_moslora_eval."):
        raise ValueError(f"{module} is no module of this package")
    found = importlib.import_module(module)
    return getattr(found, function), found.FIRST_CALLS[function]


def compared(question: dict[str, Any]) -> dict[str, Any]:
    """The reply to one line; without arguments those of the first call are taken."""
    try:
        compare, first = comparison(question.pop("comparison"))
        return {"value": compare(**(question or first))}
    except Exception as error:  # whatever an answer makes a library raise
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    out = sys.stdout
    sys.stdout = sys.stderr  # nothing else may write into the replies
    for line in sys.stdin.buffer:
        out.write(json.dumps(compared(parse_object(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
