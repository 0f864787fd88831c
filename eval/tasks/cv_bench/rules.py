"""CV-Bench: VLMEvalKit's form of its prompt."""

from __future__ import annotations

import re
from collections.abc import Callable

from mm_moslora_eval.sources.document import Document


def _cv_bench_vlmevalkit(document: Document) -> str:
    """The data set's own prompt with options as VLMEvalKit's files write them: `A red` in place of `(A) red`."""
    return re.sub(r"(?m)^\((\w)\)", r"\1", document.extra.get("prompt", ""))


PROMPTS: dict[str, Callable[[Document], str]] = {"cv_bench_vlmevalkit": _cv_bench_vlmevalkit}
