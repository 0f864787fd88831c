#!/usr/bin/env python3
"""Write the results of quickstart runs into the README, between its markers: `readme_results.py RUN [RUN ...]`.

Runs of the same task and model are seeds: one table holds their means, with the lowest and the highest run.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


@dataclass(frozen=True)
class Run:
    """A finished quickstart run."""

    rows: list[dict[str, Any]]
    """Rows of evaluation.json, the tuned model first."""
    summary: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Run:
        """Read a run folder."""
        texts = [(folder / name).read_text(encoding="utf-8") for name in ("evaluation.json", "summary.json")]
        return cls(*map(json.loads, texts))

    @property
    def key(self) -> tuple[str, int, str]:
        """Equal for runs that may be averaged."""
        return self.rows[0]["task"], self.rows[0]["n"], self.summary["description"]

    @property
    def machine(self) -> str:
        """Hardware and precision of the run."""
        return f"{self.summary['precision']}, {self.summary['hardware']}"

    def score(self, row: int, category: str | None) -> dict[str, Any] | None:
        """Mean, low and high of a row, over all questions or for a category."""
        scores = self.rows[row]
        return scores if category is None else scores["categories"].get(category)


def section(runs: Sequence[Run]) -> str:
    """One table of runs that differ only in seed, precision or machine, with the conditions of the measurement."""
    first = runs[0]
    names = sorted(first.rows[0]["categories"])
    columns = [None, *names]
    lines = _head(f"{first.rows[0]['task']}: {first.rows[0]['n']} held-out questions", ["all", *names])
    for number, row in enumerate(first.rows):
        label = f"**{row['label']}**" if row["name"] == "tuned" else row["label"]
        lines.append(_line(label, [_cell(runs, number, column) for column in columns]))
    summary = first.summary
    if len(runs) == 1:
        return "\n".join(
            [
                *lines,
                "",
                f"Percent right with 95 % intervals. {summary['description']} Measured on {summary['date'][:10]}: "
                f"{first.machine}, {_minutes(runs)} minutes in all, {summary['memory_gib']:.1f} GiB at most; DeepSpeed "
                f"{summary['zero']}, one process, one seed.",
            ]
        )
    dates = sorted({run.summary["date"][:10] for run in runs})
    measured = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    lines += [
        "",
        f"Percent right, mean of {len(runs)} runs, lowest and highest run in brackets. {summary['description']} "
        f"Measured on {measured}; DeepSpeed {summary['zero']}, one process.",
        "",
        *_head("tuned, by precision and machine", ["seeds", *map(str, names), "minutes in all", "GiB at most"]),
    ]
    machines = defaultdict(list)
    for run in runs:
        machines[run.machine].append(run)
    for machine, runs_of_machine in machines.items():
        seeds = ", ".join(str(seed) for seed in sorted(run.summary.get("seed", 0) for run in runs_of_machine))
        memory = max(run.summary["memory_gib"] for run in runs_of_machine)
        lines.append(
            _line(
                machine,
                [
                    seeds,
                    *(_cell(runs_of_machine, 0, name) for name in names),
                    _minutes(runs_of_machine),
                    f"{memory:.1f}",
                ],
            )
        )
    return "\n".join(lines)


def _head(title: str, columns: Sequence[str]) -> list[str]:
    return [_line(title, columns), f"|{'---|' * (len(columns) + 1)}"]


def _line(title: str, cells: Sequence[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def _minutes(runs: Sequence[Run]) -> str:
    minutes = sorted(run.summary["seconds"] / 60 for run in runs)
    return " to ".join(dict.fromkeys(f"{value:.1f}" for value in (minutes[0], minutes[-1])))


def _cell(runs: Sequence[Run], row: int, category: str | None) -> str:
    """One run: its score with the interval. Several: their mean with the lowest and the highest."""
    parts = [part for run in runs if (part := run.score(row, category)) is not None]
    if not parts:
        return "-"
    means = [part["mean"] for part in parts]
    low, high = (parts[0]["low"], parts[0]["high"]) if len(parts) == 1 else (min(means), max(means))
    return f"{100 * sum(means) / len(means):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def sections(runs: Sequence[Run]) -> str:
    """A table for every task and model."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.key].append(run)
    return "\n\n".join(section(group) for group in groups.values())


def main() -> None:
    """Replace the text between the markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished quickstart run")
    runs = [Run.of(folder) for folder in parser.parse_args().runs]
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{sections(runs)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
