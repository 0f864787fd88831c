"""The harness of the benchmarks keeps finished rows, goes on after a stop, and never mixes rows of different runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
import adapters
import harness


def benchmark(measure, *, passed: bool = True) -> harness.Benchmark:
    """One with three rows, each measured by `measure`."""
    return harness.Benchmark(
        name="numbers", about="Numbers.", passed=lambda summary: passed, targets={"sum": ">= 3"},
        cases=lambda options: [
            harness.Case(names={"number": number}, measure=lambda number=number: measure(number, options.rounds))
            for number in range(3)
        ],
        lines=lambda row: [{"number": str(row["number"]), "twice": str(row["twice"])}],
        summarise=lambda rows: {"sum": sum(row["twice"] for row in rows)},
    )  # fmt: skip


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path: Path, capfd) -> None:
    path, asked = tmp_path / "kept" / "rows.jsonl", []

    def measure(number: int, rounds: int) -> harness.Row:
        if number == 2 and len(asked) == 2:
            raise KeyboardInterrupt
        asked.append((number, rounds))
        return {"twice": 2 * number}

    arguments = ["--rows", str(path), "--rounds", "2"]
    with pytest.raises(KeyboardInterrupt):
        benchmark(measure).main(arguments)
    with path.open("a") as file:
        file.write('{"number": 2, "tw')  # a row that was being written
    asked.append("again")
    assert benchmark(measure).main(arguments) == 0
    assert asked == [(0, 2), (1, 2), "again", (2, 2)]
    assert "| 2 | 4 |" in (shown := capfd.readouterr().out)
    assert "| sum | 6 | >= 3 |" in shown
    assert benchmark(measure, passed=False).main([*arguments[:2], "--rounds", "5", "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert [row["twice"] for row in found["rows"]] == [0, 2, 4]
    assert asked[-3:] == [(0, 5), (1, 5), (2, 5)]  # rows of other settings do not count
    assert len(path.read_text().splitlines()) == 6
    path.write_text("text\n")
    with pytest.raises(SystemExit, match="Name another file"):
        benchmark(measure).main(arguments)


def test_contenders_take_turns_and_a_ratio_is_that_of_each_round() -> None:
    order = []
    times = harness.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 2)
    assert "".join(order) == "cab" + "abc" + "bca"  # the first round warms up
    assert [len(spent) for spent in times.values()] == [2, 2, 2]
    assert harness.ratio({"a": [1.0, 4.0, 6.0], "b": [1.0, 2.0, 2.0]}, "a", "b") == 2.0


def test_less_is_kept_for_the_backward_pass_than_by_peft() -> None:
    assert adapters.saved_row()["saved_ratio"] <= 0.5
