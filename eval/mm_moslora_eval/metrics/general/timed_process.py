"""The process of `timed_calls`: one JSON line in, one out."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

from mm_moslora.utils.untrusted_data import parse_object
from mm_moslora_eval.metrics.benchmarks import ccocr_fields, ocrbench_v2
from mm_moslora_eval.metrics.general import math_answers
from mm_moslora_eval.metrics.general.table_similarity import teds
from mm_moslora_eval.metrics.general.timed_calls import name_of

MOST_BYTES = 4 * 2**30
"""Memory of the process."""
_FIRST: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (math_answers.equal, {"answer": "$1$", "references": ["1"]}),
    (teds, {"answer": "<table></table>", "reference": "<table></table>"}),
    (ccocr_fields.tree_similarity, {"answer": "{}", "reference": '{"a": "b"}'}),
    (
        ocrbench_v2.score,
        {"answer": "\u4e00", "kind": "full-page OCR cn", "text": "", "reference": "['\u4e00']", "columns": {}},
    ),
]
"""The comparisons, with the arguments of a first call, which imports what it needs."""
COMPARISONS = {name_of(compare): (compare, first) for compare, first in _FIRST}


def compared(question: dict[str, Any]) -> dict[str, Any]:
    """The reply to one line; without arguments those of the first call are taken."""
    compare, first = COMPARISONS[question.pop("comparison")]
    try:
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
