#!/usr/bin/env python
"""Write the `results.json` of comparisons into a page of `docs/results/`: a table, a picture and the details.

    python scripts/results_page.py runs/compare docs/results/NAME.md
    python scripts/results_page.py "Rank 16=runs/arms" "Other ranks=runs/ranks" docs/results/NAME.md

Several comparisons share the table and the picture, each with a heading and its own reference. The picture is the
forest plot of the comparison's page, as PNG beside this page. In an existing page, only the text between the markers
`results` (table and picture) and `details` (scores by seed, sentences, command, machine, date) is replaced. Details
without markers follow the results.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.reporting.comparison.comparison_charts import Measure, columns, differences_of, means_of
from mm_moslora.reporting.comparison.comparison_page import draw, read_results
from mm_moslora.utils.errors import ConfigError

Results = Mapping[str, Any]


def summary(parts: Sequence[tuple[str, Results]], drawn: str) -> str:
    """The table of all arms and the picture, as Markdown.

    Args:
        parts: comparisons with the heading of their rows or "".
        drawn: file name of the picture.
    """
    head = ["arm", "score", "points less the reference", "half-width", "", "nats less the reference", "half-width", ""]
    lines = []
    for heading, results in parts:
        task = next(iter(columns(results)), "")
        if heading:
            lines.append([f"**{heading}: {task}**", *[""] * (len(head) - 1)])
        lines += [_arm(arm, task, results) for arm in results["arms"]]
    tasks = {next(iter(columns(results)), "nothing") for _, results in parts}
    return "\n".join(
        [
            *_table(head, lines),
            "",
            f"Percent on {' and '.join(sorted(tasks))}, mean ± standard error over documents and seeds; differences "
            f"with 95 % intervals; p by Holm. Nats: log-likelihood of the reference answer.",
            "",
            f"![Every arm against the reference, with 95 % intervals, in points and in nats]({drawn})",
        ]
    )


def details(parts: Sequence[tuple[str, Results]]) -> str:
    """Scores by task and seed, costs, sentences, command and machine of every comparison, as Markdown."""
    return "\n\n".join(_details(heading, results) for heading, results in parts)


def _details(heading: str, results: Results) -> str:
    tasks = columns(results)
    head = ["arm", "rate", *tasks, f"{tasks[0] if tasks else 'score'} by seed", "parameters", "s/step", "minutes a run"]
    rows = [_runs(arm, tasks) for arm in results["arms"]]
    for name in ("majority", "best_answer"):
        cells = [results["floors"].get(task, {}).get(name) for task in tasks]
        if any(cell is not None for cell in cells):
            shown = ["" if cell is None else f"{100 * cell:.1f}" for cell in cells]
            rows.append([f"*{name.replace('_', ' ')}*", "", *shown, "", "", "", ""])
    runs, minutes = results["runs"], results["seconds"] / 60
    return "\n".join(
        [
            *([f"### {_plain(heading)}", ""] if heading else []),
            *_table(head, rows),
            "",
            "<details><summary>Every sentence of the comparison</summary>",
            "",
            *(f"- {_plain(sentence)}" for sentence in results["says"]),
            "",
            "</details>",
            "",
            "<!-- docs: skip it is the command as measured, on real parts -->",
            "```bash",
            _without_places(results["command"]),
            "```",
            "",
            f"Measured on {results['date']}: {results['hardware']}, beside other work; {runs['over']} of "
            f"{runs['planned']} runs, {minutes:.0f} minutes in all.",
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = (head, ["---"] * len(head), *rows)
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]


def _arm(arm: Results, task: str, results: Results) -> list[str]:
    points, nats = differences_of(results, arm, task)
    return [_code(arm["name"]), means_of(arm, task)[0].text, *_difference(points, 1), *_difference(nats, 3)]


def _difference(measure: Measure, digits: int) -> list[str]:
    """Difference with its interval, half-width and verdict."""
    if measure.low is None or measure.high is None:
        return [measure.text, "", measure.note]
    return [measure.text, f"{(measure.high - measure.low) / 2:.{digits}f}", measure.note]


def _runs(arm: Results, tasks: Sequence[str]) -> list[str]:
    scores = [means_of(arm, task)[0] for task in tasks]
    cost, chosen = arm["cost"], arm.get("chosen") or arm["name"]
    return [
        _code(chosen), "–" if arm["rate"] is None else f"{arm['rate']:g}{' (edge)' if arm['edge'] else ''}",
        *(score.text for score in scores),
        ", ".join(f"{seed:.1f}" for score in scores[:1] for seed in score.seeds),
        *(["–"] * 3 if cost is None else
          [f"{cost['trainable']:,}", f"{cost['step_seconds']:.2f}", f"{cost['train_seconds'] / 60:.1f}"]),
    ]  # fmt: skip


def _code(name: str) -> str:
    plain = " ".join(name.split()).replace("`", "'")
    return f"`{plain}`"


def _plain(sentence: str) -> str:
    """A sentence without line breaks and without HTML."""
    return " ".join(sentence.split()).replace("<", "&lt;")


def _without_places(command: str) -> str:
    """The command without folders of the machine."""
    return re.sub(r"/[^\s,:@]*?/(?=runs/|examples/)", "", command.replace(str(Path.home()), "$HOME"))


def replaced(text: str, name: str, body: str) -> str:
    """A page with the text between its markers replaced; details without markers follow the results.

    Args:
        text: the page.
        name: of the markers.
        body: the new text.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text:
        text = text.replace("<!-- results:end -->", f"<!-- results:end -->\n\n{begin}{end}", 1)
    before, _, rest = text.partition(begin)
    _, closing, after = rest.partition(end)
    if not closing:
        raise SystemExit(f"The page has no {begin} with {end} after it. Add them where the results shall stand.")
    return f"{before}{begin}\n{body}\n{end}{after}"


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
        f"# {parts[0][1]['name']}\n\n<!-- results:begin --><!-- results:end -->\n\n## Runs\n\n"
        "<!-- details:begin --><!-- details:end -->\n"
    )  # fmt: skip
    new = replaced(replaced(old, "results", summary(parts, drawn.name)), "details", details(parts))
    draw(parts, drawn)
    page.write_text(new, encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
