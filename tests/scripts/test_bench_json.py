"""With --json a benchmark's standard output is one object."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
WITH_JSON = [path for path in sorted(BENCH.glob("*.py")) if '"--json"' in path.read_text()]
CHATTY = """
import json, os
from json_output import results_alone

print("a line before it")
output = results_alone()
print("a line of a library")
os.system("echo a line of a child")
os.write(1, b"a line past Python\\n")
print(json.dumps({"rows": []}), file=output)
"""


def test_what_libraries_and_children_print_goes_to_standard_error() -> None:
    done = subprocess.run([sys.executable, "-c", CHATTY], capture_output=True, text=True, check=True, cwd=BENCH)
    assert done.stdout == 'a line before it\n{"rows": []}\n'
    assert set(done.stderr.splitlines()) == {"a line of a library", "a line of a child", "a line past Python"}


@pytest.mark.parametrize("path", WITH_JSON, ids=lambda path: path.stem)
def test_every_benchmark_with_json_keeps_standard_output_for_it(path: Path) -> None:
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call for call in calls if ast.unparse(call) == "results_alone()"]
    printed = [call for call in calls if ast.unparse(call.func) == "print" and "json.dumps(" in ast.unparse(call)]
    assert printed
    assert all("output" in [ast.unparse(word.value) for word in call.keywords] for call in printed)


def test_there_are_benchmarks_with_json() -> None:
    assert {"train", "adapters", "data"} <= {path.stem for path in WITH_JSON}
