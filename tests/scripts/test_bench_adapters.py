"""The adapter benchmark keeps finished rows, goes on after a stop, and never mixes rows of different runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HEADER = {"benchmark": "adapters", "rounds": 2}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "bench" / "adapters.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("bench_adapters", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_adapters"] = module
    spec.loader.exec_module(module)
    return module


def test_a_stopped_run_goes_on_with_what_is_missing(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [bench.Case("16->32", dtype, 4, 8, dropout) for dtype in bench.DTYPES for dropout in (0.0, 0.05)]
    path, asked, measure = tmp_path / "kept" / "rows.jsonl", [], bench.measure

    def counted(case, rounds):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(case)
        return measure(case, rounds)

    monkeypatch.setattr(bench, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        bench.run(wanted, 2, bench.Rows(path, HEADER))
    with path.open("a") as file:
        file.write('{"case": "16->3')  # a row that was being written
    first = bench.Rows(path, HEADER).rows
    assert [(row["dtype"], row["dropout"]) for row in first] == [(case.dtype, case.dropout) for case in wanted[:2]]
    monkeypatch.setattr(bench, "measure", measure)
    rows = bench.run(wanted, 2, bench.Rows(path, HEADER))
    assert [row["dropout"] for row in rows] == [0.0, 0.05, 0.0, 0.05]
    assert rows[:2] == first
    assert all(row["vs_peft"] > 0 for row in rows)
    assert bench.Rows(path, HEADER).rows == rows
    with pytest.raises(SystemExit, match="Name another file"):
        bench.Rows(path, HEADER | {"rounds": 5})


def test_less_is_kept_for_the_backward_pass_than_by_peft(bench: ModuleType) -> None:
    row = bench.measure(bench.Case(bench.BYTES, "bf16", 16, 512), 1)
    assert row["saved_ratio"] <= bench.TARGETS["saved_bytes_ratio_vs_peft_bf16"]
