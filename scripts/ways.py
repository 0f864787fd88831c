#!/usr/bin/env python
"""Trace three ways through the code with tiny models, and write their tables into docs/architecture.md.

    python scripts/ways.py            # print files and lines of each way
    python scripts/ways.py --write    # and write the tables

A way is traced at its second pass, so that imports and what is made once are over. A file belongs to a way when one of
its functions runs; `utils/` does not count. tests/docs/test_ways.py compares the tables with a new trace.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from marked_text import replaced

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME), str(HOME / "tests/builders")]
DOCUMENT = HOME / "docs/architecture.md"

Way = dict[Path, list[str]]
"""Executed files with their executed functions, in the order of the first call."""


@contextmanager
def traced() -> Iterator[Way]:
    """The files of this project whose functions run inside the block."""
    way: Way = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(HOME)) or code.co_name == "<module>":
            return
        path = Path(code.co_filename).relative_to(HOME)
        if path.parts[0] in ("mm_moslora", "eval") and "utils" not in path.parts:
            names = way.setdefault(path, [])
            if code.co_qualname not in names:
                names.append(code.co_qualname)

    sys.setprofile(note)
    try:
        yield way
    finally:
        sys.setprofile(None)


def lines_of(way: Way) -> int:
    """Lines of all files of a way."""
    return sum(len((HOME / path).read_text("utf-8").splitlines()) for path in way)


def table(way: Way) -> str:
    """Markdown: file, its first executed functions for other files, and the beginning of its docstring."""
    rows = ["| | file | begins at | what it is |", "|---|---|---|---|"]
    for number, (path, names) in enumerate(way.items(), start=1):
        sentence = (ast.get_docstring(ast.parse((HOME / path).read_text("utf-8"))) or "").split("\n\n")[0]
        sentence = re.split(r"\.(?:\s|$)|[:;(]|, ", " ".join(sentence.split()))[0].strip()
        known = [name for name in names if not re.search(r"(^|\.)_[^_]|<|__(?!call|iter|getitem)", name)] or names
        rows.append(f"| {number} | `{path.as_posix()}` | `{known[0]}` | {sentence} |")
    return "\n".join([*rows, "", f"{len(way)} files of {lines_of(way):,} lines together."]) + "\n"


def ways(folder: Path) -> dict[str, Way]:
    """The three ways, by the names of their marks in the document.

    Args:
        folder: an empty folder for tiny models, records and runs.
    """
    from mm_moslora_eval.backends.local_model import LocalModel
    from mm_moslora_eval.run.evaluate_suite import evaluate_tasks
    from trials import make_parts, make_recipe, write_questions

    from mm_moslora.adapters import save_adapter
    from mm_moslora.batch import Batch
    from mm_moslora.models.assembly import load_parts
    from mm_moslora.models.trainable_parts import attach_adapters
    from mm_moslora.training.run_setup import prepare

    made = make_parts(folder / "parts")
    recipe = make_recipe(made, folder / "run", "none", micro_batch=1, global_batch=1, steps=1)
    run = prepare(recipe)
    names = [made["records"].parent / "images" / f"{number}.jsonl" for number in (0, 1)]
    write_questions(made["records"], *names, count=2)
    again = [load_parts(recipe.model) for _ in range(3)]
    attach_adapters(again[2], recipe.model, recipe.adapter)
    model = LocalModel(again[2], name="tiny")

    def loss(number: int) -> None:
        batch = Batch.from_examples([run.training_set.load(number)])
        run.engine.module(batch, bool(batch.images)).backward()

    def score(number: int) -> None:
        evaluate_tasks(model, [f"llava:{names[number]}"], folder / f"eval{number}")

    def save(number: int) -> None:
        attach_adapters(again[number], recipe.model, recipe.adapter)
        save_adapter(again[number].model, folder / f"adapter{number}", base=again[number].base)

    return {"record-to-loss": _second(loss), "question-to-score": _second(score), "mixer-to-folder": _second(save)}


def _second(step: Callable[[int], object]) -> Way:
    step(0)
    with traced() as way:
        step(1)
    return way


def main() -> None:
    """Print the ways, or write their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the tables into {DOCUMENT.name}")
    parser.add_argument("--files", action="store_true", help="print the files of each way with their functions")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = ways(Path(folder))
    text = DOCUMENT.read_text("utf-8")
    for name, way in found.items():
        print(f"{name}: {len(way)} files, {lines_of(way):,} lines")
        if given.files:
            for path, functions in way.items():
                print(f"  {path.as_posix()}: {', '.join(functions)}")
        text = replaced(text, name, table(way))
    if given.write:
        DOCUMENT.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
