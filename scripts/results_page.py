#!/usr/bin/env python
"""Write the `results.json` of comparisons into a page of `docs/results/`: a table, a picture, the command, the machine.

    python scripts/results_page.py runs/compare docs/results/NAME.md
    python scripts/results_page.py "Rank 16=runs/arms" "Other ranks=runs/ranks" docs/results/NAME.md

Several comparisons share the table and the picture, each with a heading and its own reference. The picture is the
forest plot of the comparison's page, as PNG beside this page. The command stands below a single comparison. Only the
text between the markers `results` is replaced.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marked_text import replaced

from mm_moslora.reporting.comparison.comparison_charts import Measure, columns, differences_of, means_of
from mm_moslora.reporting.comparison.comparison_page import draw, read_results
from mm_moslora.utils.errors import ConfigError

Results = Mapping[str, Any]
HEAD = ("arm", "rate", "parameters", "score", "points less the reference")


def summary(parts: Sequence[tuple[str, Results]], drawn: str) -> str:
    """The table of all arms, the picture, and how each comparison was made, as Markdown.

    Args:
        parts: comparisons with the heading of their rows or "".
        drawn: file name of the picture.
    """
    rows, tasks, made = [HEAD, ["---"] * len(HEAD)], set(), []
    for heading, results in parts:
        task = next(iter(columns(results)), "nothing")
        tasks.add(task)
        rows += [[f"**{_plain(heading)}: {task}**", *[""] * (len(HEAD) - 1)]] if heading else []
        rows += [_arm(arm, task, results) for arm in results["arms"]]
        made.append(_made(heading, results))
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    explained = (
        f"Percent on {' and '.join(sorted(tasks))}, mean ± standard error over documents and seeds. Differences have "
        "95 % intervals; one that is shown (p by Holm below 0.05) has a verdict."
    )
    picture = f"![Every arm against the reference in points and in log-likelihood, with 95 % intervals]({drawn})"
    return "\n\n".join(["\n".join(table), explained, picture, *made])


def _arm(arm: Results, task: str, results: Results) -> list[str]:
    cost, rate = arm["cost"], f"{arm['rate']:g}" if arm["rate"] is not None else "–"
    points, _ = differences_of(results, arm, task)
    parameters = "–" if cost is None else f"{cost['trainable']:,}"
    return [_code(arm.get("chosen") or arm["name"]), rate, parameters, means_of(arm, task)[0].text, _difference(points)]


def _difference(measure: Measure) -> str:
    """The difference, with its verdict where it is shown."""
    shown = measure.low is not None and not measure.note.startswith("not shown")
    return f"{measure.text}, {measure.note}" if shown else measure.text


def _made(heading: str, results: Results) -> str:
    runs, minutes = results["runs"], results["seconds"] / 60
    line = (
        f"{runs['over']} of {runs['planned']} runs, {minutes:.0f} minutes beside other work, on {results['date']} "
        f"({results['hardware']})"
    )
    if heading:
        return f"{_plain(heading)}: {line}."
    skip = "<!-- docs: skip it is the command as measured, on real parts -->"
    return f"{line}:\n\n{skip}\n```bash\n{_without_places(results['command'])}\n```"


def _without_places(command: str) -> str:
    """The command that made the runs, without folders of the machine."""
    plain = command.replace(str(Path.home()), "$HOME").removesuffix(" --only-report")
    return re.sub(r"/[^\s,:@]*?/(?=runs/|examples/)", "", plain)


def _code(name: str) -> str:
    plain = " ".join(name.split()).replace("`", "'")
    return f"`{plain}`"


def _plain(sentence: str) -> str:
    """A sentence without line breaks and without HTML."""
    return " ".join(sentence.split()).replace("<", "&lt;")


def _part(text: str, *, several: bool) -> tuple[str, Results]:
    """Heading and results of an argument; the folder's name is the heading of one among several."""
    heading, _, run = text.rpartition("=")
    return heading or (Path(run).name if several else ""), read_results(Path(run) / "results.json")


def main() -> int:
    """Write or update a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[HEADING=]RUN", help="folder of a comparison")
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    try:
        parts = [_part(run, several=len(options.runs) > 1) for run in options.runs]
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    page, drawn = options.page, options.page.with_suffix(".png")
    old = page.read_text(encoding="utf-8") if page.is_file() else (
        f"# {parts[0][1]['name']}\n\n<!-- results:begin -->\n<!-- results:end -->\n"
    )  # fmt: skip
    new = replaced(old, "results", summary(parts, drawn.name))
    draw(parts, drawn)
    page.write_text(new, encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
