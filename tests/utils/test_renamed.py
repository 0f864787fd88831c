"""Names of earlier versions are answered with those of today."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = [
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    for root in (ROOT, ROOT / "eval")
    for path in sorted((root / ("mm_moslora" if root == ROOT else "mm_moslora_eval")).rglob("*.py"))
    if "__getattr__ = renamed(" in path.read_text()
]


def renames() -> list[tuple[str, str, str]]:
    rows = []
    for module in MODULES:
        tree = ast.parse(Path(importlib.import_module(module).__file__ or "").read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "renamed"]
        rows += [(module, old, new) for call in calls for old, new in ast.literal_eval(call.args[0]).items()]
    return rows


def test_an_old_name_is_answered_with_one_that_exists() -> None:
    assert len(renames()) >= 7
    for module, old, new in renames():
        with pytest.raises(ImportError, match=rf"{old} has another name: import {new}\."):
            exec(f"from {module} import {old}")
        owner, _, name = new.rpartition(".")
        assert hasattr(importlib.import_module(owner or module), name), new


def test_any_other_name_is_missing_as_ever() -> None:
    module = importlib.import_module(MODULES[0])
    assert not hasattr(module, "nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {MODULES[0]} import nothing")
