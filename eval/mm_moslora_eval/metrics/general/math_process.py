"""The process of `math_answers`: one JSON line in, one out."""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from mm_moslora.utils.untrusted_data import parse_object

MOST_BYTES = 4 * 2**30
"""Memory of the process."""


def compared(question: dict[str, Any]) -> dict[str, Any]:
    """The reply to one line."""
    from math_verify import parse, verify

    try:
        # The time limit is that of the other process: signals do not end a computation within one long number.
        found = parse(question["answer"], parsing_timeout=None)
        for reference in question["references"]:
            text = reference if "$" in reference or "\\boxed" in reference else f"${reference}$"
            if verify(parse(text, parsing_timeout=None), found, timeout_seconds=None):
                return {"equal": True}
    except Exception as error:  # whatever a formula makes sympy raise
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"equal": False}


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
