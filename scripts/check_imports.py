"""Check what import-linter does not: import circles between files, full folders, duplicate names.

Of `mm_moslora` and `mm_moslora_eval`: imports, the number of modules in a folder, and the names of modules and of
public classes, which are the `class` statements at the top of modules (aliases and classes inside others do not
count). Of `scripts/`: imports only.

    python scripts/check_imports.py           # exit code 1 and one line per fault
    python scripts/check_imports.py --draw    # also update the package graph in docs/architecture.md

Imports inside functions and under TYPE_CHECKING count. `tests/packaging/test_imports.py` runs it.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
from marked_text import replaced

CHECKOUT = Path(__file__).parents[1]
PACKAGES = {"mm_moslora": CHECKOUT / "mm_moslora", "mm_moslora_eval": CHECKOUT / "eval" / "mm_moslora_eval"}
SCRIPTS = CHECKOUT / "scripts"
PICTURE = CHECKOUT / "docs" / "architecture.md"
LIMIT = 14
"""Maximum number of modules in a folder."""
COMMON = ("__init__.py", "__main__.py")
"""File names that may occur in several folders."""

Graph = Mapping[str, set[str]]


def file_graph(packages: Iterable[str] = PACKAGES) -> dict[str, set[str]]:
    """Modules that each module imports."""
    graph = grimp.build_graph(*packages, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def script_graph(folder: Path) -> dict[str, set[str]]:
    """Scripts of a folder, by the names of their files, that each script imports."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}
    graph: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & trees.keys()
            elif isinstance(node, ast.ImportFrom) and node.module in trees:
                graph[name].add(node.module)
    return graph


def circle(graph: Graph) -> list[str]:
    """A circle of modules, with the first one repeated at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def modules_below(folder: Path) -> list[Path]:
    """Python files that need a unique name."""
    return [path for path in sorted(folder.rglob("*.py")) if path.name not in COMMON]


def full_folders(folders: Iterable[Path]) -> Iterator[str]:
    """Folders with more than `LIMIT` modules."""
    counts: dict[Path, int] = defaultdict(int)
    for path in (path for folder in folders for path in modules_below(folder)):
        counts[path.parent] += 1
    for folder, count in counts.items():
        if count > LIMIT:
            yield f"{folder.name}/ holds {count} modules, expected at most {LIMIT}. Make packages by subject."


def names_used_twice(folders: Iterable[Path]) -> Iterator[str]:
    """Names of modules and of public top-level classes that occur in several files."""
    files: dict[str, list[str]] = defaultdict(list)
    for folder in folders:
        for path in modules_below(folder):
            shown = path.relative_to(folder.parent).as_posix()
            files[path.name].append(shown)
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    files[f"class {node.name}"].append(shown)
    for name, others in files.items():
        if len(others) > 1:
            yield f"{name} occurs {len(others)} times ({', '.join(others)}). Rename all but one."


def faults(packages: Mapping[str, Path] = PACKAGES, scripts: Path = SCRIPTS) -> list[str]:
    """One line per fault.

    Args:
        packages: name, importable, to folder.
        scripts: folder of programs that import each other by the names of their files.
    """
    rings = filter(None, (circle(file_graph(packages)), circle(script_graph(scripts))))
    return [
        *full_folders(packages.values()),
        *names_used_twice(packages.values()),
        *(f"Circle of imports: {' -> '.join(ring)}. Move what both need into a module below." for ring in rings),
    ]


def package_of(module: str) -> str:
    """`mm_moslora.data.chat.records` -> `data`; the evaluation harness is one package."""
    parts = module.split(".")
    return parts[0] if parts[0] == "mm_moslora_eval" or len(parts) == 1 else parts[1]


def package_graph(graph: Graph) -> dict[str, set[str]]:
    """Imports between packages, without transitive ones."""
    edges: dict[str, set[str]] = defaultdict(set)
    for module, imported in graph.items():
        edges[package_of(module)] |= {package_of(other) for other in imported}
    edges.pop("mm_moslora", None)
    direct = {package: others - {package, "mm_moslora"} for package, others in edges.items()}

    def below(package: str) -> set[str]:
        return direct[package].union(*(below(other) for other in direct[package]))

    return {
        package: {other for other in others if not any(other in below(third) for third in others - {other})}
        for package, others in direct.items()
    }


def mermaid(graph: Graph) -> str:
    """The graph as Mermaid text, which code hosts render."""
    lines = [f"  {package} --> {other}" for package in sorted(graph) for other in sorted(graph[package])]
    return "\n".join(["```mermaid", "graph TD", *lines, "```"])


def drawn(text: str) -> str:
    """A document with the current graph between its markers."""
    return replaced(text, "imports", mermaid(package_graph(file_graph())))


def main() -> int:
    """Check the imports, and update the graph with --draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="rewrite the picture in docs/architecture.md")
    if parser.parse_args().draw:
        PICTURE.write_text(drawn(PICTURE.read_text()))
    lines = faults()
    print("\n".join(lines) or "No circles, no full folder, no name twice.")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
