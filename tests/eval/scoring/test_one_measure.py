"""Scores are measured in one place: nothing else computes an interval, a p-value, a power or a difference of scores."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parents[3]
EVAL, COMPARE = "eval/mm_moslora_eval", "mm_moslora/compare"
LOW_LEVEL = {
    f"{EVAL}/scoring/estimates.py", f"{EVAL}/scoring/measured_scores.py",
    f"{EVAL}/scoring/score_differences.py",
    f"{COMPARE}/seed_statistics.py", f"{COMPARE}/run_variance.py",
}  # fmt: skip
"""One place for scores of samples, one for arms with several seeds."""
ESTIMATING = LOW_LEVEL | {f"{EVAL}/scoring/score_aggregation.py"}
DIFFERENCES = {
    "mm_moslora/reporting/verdicts.py", f"{EVAL}/scoring/estimates.py", f"{COMPARE}/comparison_controls.py",
}  # fmt: skip
DESCRIBING = {"Ratio", "mean_of"}
"""What an aggregation gives, from which a score is measured."""
PLAIN = {"mean", "sample_stddev"}
QUANTILES = (1.2816, 1.6449, 1.9600, 2.3263, 2.5758)


def _shortcuts(tree: ast.AST, place: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module, names = node.module or "", {item.name for item in node.names}
            if module.endswith(".estimates") and names - DESCRIBING - PLAIN and place not in ESTIMATING:
                yield f"imports {names} of estimates"
            if module == "statistics" and "NormalDist" in names and place not in LOW_LEVEL:
                yield "imports NormalDist"
            if module.startswith("scipy") and place not in LOW_LEVEL and names != {"linear_sum_assignment"}:
                yield "imports scipy"
        elif isinstance(node, ast.Import) and any(item.name.startswith("scipy") for item in node.names):
            yield "imports scipy"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr == "NormalDist" and place not in LOW_LEVEL:
                yield "NormalDist"
        elif isinstance(node, ast.Constant) and isinstance(node.value, float):
            if any(abs(abs(node.value) - quantile) < 0.0011 for quantile in QUANTILES):
                yield f"the number {node.value}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "Difference" and place not in DIFFERENCES:
                yield "builds a Difference"
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub) and place not in LOW_LEVEL:
            if any(_called(part) == "stderr" for part in ast.walk(node)) and not _is_text(node):
                yield "adds to a standard error"
            both = {_called(node.left), _called(node.right)}
            if isinstance(node.op, ast.Sub) and both & {"score", "mean"} and both <= {"score", "mean"}:
                yield "subtracts scores"


def _called(node: ast.AST) -> str:
    """The name of an attribute, or the key of an entry."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    return ""


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(part, ast.JoinedStr) for part in ast.walk(node))


def test_scores_are_measured_in_one_place() -> None:
    paths = [path for folder in (EVAL, "mm_moslora") for path in (CHECKOUT / folder).rglob("*.py")]
    assert len(paths) > 100
    found = []
    for path in paths:
        place = path.relative_to(CHECKOUT).as_posix()
        found += [f"{place}: {text}" for text in _shortcuts(ast.parse(path.read_text("utf-8")), place)]
    assert found == []
