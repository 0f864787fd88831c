"""Extractions, metrics and aggregations by subject; `named_parts` describes how a task names them.

A module defines `EXTRACTORS`, `METRICS` and `AGGREGATIONS`, as far as it has any, and is listed in `MODULES`. The
beginning of a function's docstring is its meaning in `eval list`.
"""

from __future__ import annotations

from typing import Any

from mm_moslora_eval.scoring.parts import comparison_parts, grouped_scores

MODULES = (comparison_parts, grouped_scores)


def parts_named(table: str) -> dict[str, Any]:
    """The functions of all modules in their tables of this name."""
    return {name: function for module in MODULES for name, function in getattr(module, table, {}).items()}
