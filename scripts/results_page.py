#!/usr/bin/env python
"""Write a comparison's `results.json` as a page of `docs/results/`: table, sentences, command, machine, date, picture.

    python scripts/results_page.py runs/compare docs/results/NAME.md

The picture is written as PNG beside the page. In an existing page, only the text between the markers is replaced, so
the description of the experiment and the paper's numbers are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def page(results: dict[str, Any], picture: str) -> str:
    """The measured part as Markdown.

    Args:
        results: the comparison's results.
        picture: file name of the plot.
    """
    tasks = list(dict.fromkeys(name for arm in results["arms"] for name in arm["tasks"]))
    head = [
        "arm",
        "rate",
        "seeds",
        *tasks,
        f"less {results['settings']['reference']}",
        "p (Holm)",
        "parameters",
        "s/step",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_row(arm, tasks, results)) + " |" for arm in results["arms"]]
    for name in ("majority", "best_answer"):
        cells = [results["floors"].get(task, {}).get(name) for task in tasks]
        if any(cell is not None for cell in cells):
            shown = ["" if cell is None else f"{100 * cell:.1f}" for cell in cells]
            lines.append("| " + " | ".join([f"*{name.replace('_', ' ')}*", "", "", *shown, "", "", "", ""]) + " |")
    runs, minutes = results["runs"], results["seconds"] / 60
    lines += ["", "Percent, mean ± standard error over documents and seeds.", ""]
    lines += [f"- {sentence}" for sentence in results["says"]]
    lines += ["", f"![Scores, differences and learning rates]({picture})", ""]
    skip = "<!-- docs: skip it is the command as measured, on real parts -->"
    lines += [skip, "```bash", _without_places(results["command"]), "```", ""]
    lines.append(
        f"Measured on {results['date']}: {results['hardware']}, beside other work; {runs['over']} of {runs['planned']} "
        f"runs, {minutes:.0f} minutes in all."
    )
    return "\n".join(lines)


def _row(arm: dict[str, Any], tasks: list[str], results: dict[str, Any]) -> list[str]:
    row = next((r for r in results["comparisons"] if r["arm"] == arm["name"] and r["task"] == tasks[-1]), None)
    good = sum(seed["status"] == "ok" for seed in arm["seeds"])
    cost = arm["cost"]
    difference = (
        "" if row is None else f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    )
    p = (
        ""
        if row is None
        else row["verdict"]
        if row["verdict"] in ("one seed", "nothing follows")
        else f"{row['p_corrected']:.2g}"
    )
    scores = [arm["tasks"].get(task) for task in tasks]
    return [
        f"`{arm['name']}`", "-" if arm["rate"] is None else f"{arm['rate']:g}", str(good),
        *("-" if m is None else f"{100 * m['mean']:.1f} ± {100 * m['stderr']:.1f}" for m in scores),
        difference, p, "-" if cost is None else f"{cost['trainable']:,}",
        "-" if cost is None else f"{cost['step_seconds']:.2f}",
    ]  # fmt: skip


def _without_places(command: str) -> str:
    """The command without folders of the machine."""
    return re.sub(r"/\S*?/(?=runs/|examples/)", "", command.replace(str(Path.home()), "$HOME"))


def draw(results: dict[str, Any], out: Path) -> None:
    """Seeds and means, differences, and learning rates as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in results["arms"] if arm["tasks"]]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    for index, arm in enumerate(arms):
        measure, colour = list(arm["tasks"].values())[-1], f"C{index}"
        left.errorbar(
            100 * measure["mean"], index, fmt="s", color=colour, capsize=3,
            xerr=[[100 * (measure["mean"] - measure["low"])], [100 * (measure["high"] - measure["mean"])]],
        )  # fmt: skip
        left.plot(
            [100 * s for s in measure["seeds"]], [index - 0.2] * len(measure["seeds"]), "o", color=colour, alpha=0.6
        )
        points = [point for point in arm["curve"] if point["value"] is not None]
        right.plot([p["rate"] for p in points], [p["value"] for p in points], "o-", color=colour, label=arm["name"])
    last = results["comparisons"][-1]["task"] if results["comparisons"] else None
    names = [arm["name"] for arm in arms]
    for row in (row for row in results["comparisons"] if row["task"] == last):
        index = names.index(row["arm"])
        value, low, high = (100 * row[key] for key in ("difference", "low", "high"))
        middle.errorbar(value, index, xerr=[[value - low], [high - value]], fmt="s", color=f"C{index}", capsize=3)
    middle.axvline(0, color="black", linewidth=1)
    for axes, label in (
        (left, "percent; points: seeds"),
        (middle, f"points against {results['settings']['reference']}"),
    ):
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(label)
    right.set_xscale("log")
    right.set_xlabel("learning rate")
    right.set_ylabel(", ".join(results["settings"]["validation"]) + " (validation)")
    if right.lines:
        right.legend(frameon=False)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main() -> int:
    """Write or update a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the comparison")
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    results = json.loads((options.run / "results.json").read_text(encoding="utf-8"))
    picture = options.page.with_suffix(".png")
    draw(results, picture)
    measured = f"{BEGIN}\n{page(results, picture.name)}\n{END}"
    old = (
        options.page.read_text(encoding="utf-8") if options.page.is_file() else f"# {results['name']}\n\n{BEGIN}{END}\n"
    )
    start, end = old.index(BEGIN), old.index(END) + len(END)
    options.page.write_text(old[:start] + measured + old[end:], encoding="utf-8")
    print(options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
