#!/usr/bin/env python3
"""Write the results of quickstart runs into the README, between its markers: `readme_results.py RUN [RUN ...]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def section(run: Path) -> str:
    """One run's table, with what it was measured on."""
    rows = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    names = sorted(rows[0]["categories"])
    lines = [
        f"| {rows[0]['task']}: {rows[0]['n']} held-out questions | all | {' | '.join(names)} |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    for row in rows:
        cells = [row, *(row["categories"].get(name) for name in names)]
        label = f"**{row['label']}**" if row["name"] == "tuned" else row["label"]
        lines.append(f"| {label} | {' | '.join(_cell(cell) for cell in cells)} |")
    minutes = summary["seconds"] / 60
    lines += [
        "",
        f"Percent right with 95 % intervals. {summary['description']} Measured on {summary['date'][:10]}: "
        f"{summary['hardware']}, {summary['precision']}, {minutes:.1f} minutes in all, "
        f"{summary['memory_gib']:.1f} GiB at most; DeepSpeed {summary['zero']}, one process, one seed.",
    ]
    return "\n".join(lines)


def _cell(part: dict | None) -> str:
    if part is None:
        return "-"
    return f"{100 * part['mean']:.1f} [{100 * part['low']:.1f}, {100 * part['high']:.1f}]"


def main() -> None:
    """Replace what stands between the markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished quickstart run")
    runs = parser.parse_args().runs
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    body = "\n\n".join(section(run) for run in runs)
    README.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
