#!/usr/bin/env python
"""Write the API reference from the docstrings: a Markdown page per public module, and an index.

    python scripts/api_reference.py docs/api

The script reads the source files and imports nothing, so no library needs to be installed. A module is public when no
part of its name starts with an underscore. The same holds for classes, functions, methods, fields and constants with a
docstring.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"mm_moslora": ROOT / "mm_moslora", "mm_moslora_eval": ROOT / "eval" / "mm_moslora_eval"}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every public module."""
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            if not any(part.startswith("_") for part in parts):
                yield ".".join(parts), file


def page(name: str, source: str) -> str:
    """The Markdown page of a module.

    Args:
        name: dotted name.
        source: source code of the module.
    """
    tree = ast.parse(source)
    lines = [f"# `{name}`", "", ast.get_docstring(tree) or "", ""]
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            lines += _class(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            lines += _function(node, level=2)
        elif (constant := _constant(node)) and (text := _string(after)):
            lines += [f"## `{constant}`", "", text, ""]
    return "\n".join(lines).rstrip() + "\n"


def _class(node: ast.ClassDef) -> list[str]:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    lines = [f"## class `{node.name}{f'({bases})' if bases else ''}`", "", ast.get_docstring(node) or "", ""]
    fields = []
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_"):
            default = f" = {ast.unparse(item.value)}" if item.value is not None else ""
            text = " ".join((_string(after) or "").split())
            fields.append(f"- `{item.target.id}: {ast.unparse(item.annotation)}{default}` {text}".rstrip())
    lines += [*fields, ""] if fields else []
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_"):
            lines += _function(item, level=3)
    return lines


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, *, level: int) -> list[str]:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    text = ast.get_docstring(node)
    if not text:
        return []
    signature = f"{node.name}({ast.unparse(node.args)}){returns}"
    return [f"{'#' * level} `{node.name}`", "", "```text", signature, "```", "", *_sections(text), ""]


def _sections(docstring: str) -> list[str]:
    """Google-style sections as bold headings and lists."""
    lines = []
    for line in inspect.cleandoc(docstring).splitlines():
        if line in ("Args:", "Returns:", "Raises:", "Yields:"):
            lines += [f"**{line[:-1]}**", ""]
        elif line.startswith("    ") and not line.startswith("     "):
            lines.append(f"- {line.strip()}")
        elif line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return lines


def _constant(node: ast.stmt) -> str | None:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        name = node.target.id
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id
    else:
        return None
    return None if name.startswith("_") else name


def _string(node: ast.stmt | None) -> str | None:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return inspect.cleandoc(node.value.value)
    return None


def write(out: Path) -> list[Path]:
    """Write all pages and the index; pages of removed modules are deleted.

    Raises:
        SystemExit: the folder has a README that this script did not write.
    """
    title = ["# API reference", "", "Written by `scripts/api_reference.py` from the docstrings.", ""]
    readme = out / "README.md"
    if readme.exists() and not readme.read_text(encoding="utf-8").startswith("\n".join(title)):
        raise SystemExit(f"{readme} was not written by this script. Choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        for old in (*out.glob(f"{package}.md"), *out.glob(f"{package}.*.md")):
            old.unlink()
    written, index = [], title
    for name, file in modules():
        source = file.read_text(encoding="utf-8")
        target = out / f"{name}.md"
        target.write_text(page(name, source), encoding="utf-8")
        first = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
        index.append(f"- [`{name}`]({target.name}): {first}")
        written.append(target)
    readme.write_text("\n".join(index) + "\n", encoding="utf-8")
    return written


def main() -> int:
    """Write the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "docs" / "api")
    out = parser.parse_args().out
    print(f"{len(write(out))} pages in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
