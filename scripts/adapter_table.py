#!/usr/bin/env python
"""Write the table of docs/adapter_behaviours.md from tests/adapters/test_adapter_behaviours.py.

    python scripts/adapter_table.py           rewrite the table
    python scripts/adapter_table.py --check   exit with 1 when it is out of date

The docstring of a test is the name of the behaviour, and its parameters are the columns (layer types). The script reads
the tests without running them: a mark in the table means that the suite checks the behaviour.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "adapters" / "test_adapter_behaviours.py"
PAGE = ROOT / "docs" / "adapter_behaviours.md"
BEGIN, END = "<!-- behaviours: begin -->", "<!-- behaviours: end -->"


def layer_types() -> dict[str, object]:
    """Description of every layer type in the tests, by name."""
    path = TESTS.parent / "behaviour_models.py"
    spec = importlib.util.spec_from_file_location("behaviour_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return dict(module.LAYERS)


def rows(layers: dict[str, object]) -> list[tuple[str, list[bool]]]:
    """Behaviours, each with the layer types that a test covers."""
    attributes = {"where_linear": "all_linear", "where_own": "own_factors"}
    behaviours = []
    for node in ast.parse(TESTS.read_text(encoding="utf-8")).body:
        described = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_") or not described:
            continue
        marks = {mark.id for mark in node.decorator_list if isinstance(mark, ast.Name)}
        chosen = next((attributes[mark] for mark in marks if mark in attributes), None)
        everywhere = "every_layer" in marks
        covered = [everywhere or (chosen is not None and bool(getattr(kind, chosen))) for kind in layers.values()]
        behaviours.append((described.splitlines()[0], covered))
    return behaviours


def table() -> str:
    """The table as Markdown."""
    layers = layer_types()
    lines = [f"| behaviour | {' | '.join(layers)} |", f"|---|{'---|' * len(layers)}"]
    for described, covered in rows(layers):
        if not any(covered):
            lines.append(f"| {described} |{' model level |' + ' |' * (len(layers) - 1)}")
            continue
        lines.append(f"| {described} | {' | '.join('tested' if mark else 'n/a' for mark in covered)} |")
    return "\n".join(lines)


def main() -> int:
    """Rewrite or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if check:
        if page != wanted:
            print(f"{PAGE} is out of date. Run: python scripts/adapter_table.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
