#!/usr/bin/env python
"""Score the answers that benchmarks publish, and write docs/scores_reproduced.md with its two tables.

    python scripts/scores_reproduced.py ANSWERS [--only MATH-V] [--write]

ANSWERS holds checkouts of the benchmarks' repositories, as `published_answers.READERS` names their folders; those that
are missing are left out. Every file of answers goes through `mm-moslora eval run TASK --model replay:FILE`, and through
the rules of the other protocols of its task. Without `--write` the tables are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from marked_text import replaced
from mm_moslora_eval.protocol.task_registry import get_task, name_and_protocol, task_file
from mm_moslora_eval.run.result_file import TaskResult, read_results, score_folder
from mm_moslora_eval.run.scored_subsets import find_view
from published_answers import READERS, PublishedRun

from mm_moslora import cli

PAGE = Path(__file__).parents[1] / "docs" / "scores_reproduced.md"
DATA = PAGE.parent / "results" / "data"
Table = list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """A file of answers and what this package makes of it."""

    run: PublishedRun
    score: float
    """In percent."""
    unread: int
    """Answers in which nothing could be read."""
    differ: int | None
    """Answers with another verdict than the published one; None where verdicts are not published."""
    others: dict[str, float]
    """Protocol -> the score by its rules."""

    @property
    def name(self) -> str:
        """Name of the task."""
        return name_and_protocol(self.run.task)[0]


def reproduce(run: PublishedRun, folder: Path) -> Reproduced:
    """Put the answers in place of a model's, and score them."""
    task, answers, output = _task_file(run, folder), folder / "answers.json", folder / "run"
    answers.write_text(json.dumps(dict(run.answers)), encoding="utf-8")
    command = ["eval", "run", str(task), "--model", f"replay:{answers}", "--output", str(output), "--no-report"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = cli.run([*command, "--max-failed-share", "0.1"])
    if code:
        raise SystemExit(f"{run.task}, {run.model}: exit code {code}\n{said.getvalue()[-2000:]}")
    (result,) = read_results(output)
    place = output / run.task / "own"
    samples = [json.loads(line) for line in (find_view(place) / "samples.jsonl").read_text("utf-8").splitlines()]
    differ = sum(run.verdicts[sample["id"]] != (sample["score"] == 1.0) for sample in samples if run.verdicts)
    others = {name: _percent(score_folder(place, rules=_rules(run, name))) for name in run.rescore}
    return Reproduced(
        run=run, score=_percent(result), unread=result.counts.not_inferable, others=others,
        differ=differ if run.verdicts else None,
    )  # fmt: skip


def _rules(run: PublishedRun, protocol: str) -> Any:
    return get_task(f"{name_and_protocol(run.task)[0]}@{protocol}")


def _percent(result: TaskResult) -> float:
    return 100 * result.score


def _task_file(run: PublishedRun, folder: Path) -> Path:
    """The shipped task with the documents of the answers in place of its data set, without pictures."""
    name, protocol = name_and_protocol(run.task)
    data = yaml.safe_load(task_file(name).read_text(encoding="utf-8"))
    changes = data.pop("protocols")[protocol] or {}
    source = {**data["source"], **changes.pop("source", {})}
    columns = {key: value for key, value in source["columns"].items() if key != "image"}
    documents = folder / "documents.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in run.documents), encoding="utf-8")
    prompt = {**data.get("prompt", {}), **changes.pop("prompt", {}), "image_tags": "none"}
    kept = {key: source[key] for key in source.keys() & {"answer_is", "unanswerable"}}
    source = {"kind": "hf", "path": str(documents), "columns": columns, **kept}
    data |= {**changes, "protocol": protocol, "source": source, "prompt": prompt, "expected_count": len(run.documents)}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    return path


def found_in(folder: Path, only: Sequence[str]) -> Iterator[PublishedRun]:
    """The published runs below a folder."""
    for name, (_, reader) in READERS.items():
        if (folder / name).is_dir() and (not only or name in only):
            yield from reader(folder / name)


def reproduced_table(rows: Sequence[Reproduced]) -> Table:
    """Published score, score here, and why they differ."""
    table = [["benchmark", "model", "answers", "published", "here", "other verdicts", "why"]]
    for row in rows:
        published = row.run.published
        same = published is not None and abs(published - row.score) < 1e-9
        why = "" if same and not row.differ else row.run.why
        if row.unread and why:
            why += f" Read as nothing: {row.unread}."
        scores, verdicts = [_shown(published), _shown(row.score)], "-" if row.differ is None else str(row.differ)
        table.append([row.run.task, row.run.model, row.run.source, *scores, verdicts, why])
    return table


def _shown(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def other_rules_table(rows: Sequence[Reproduced]) -> Table:
    """What the rules of other protocols make of the same answers, in points."""
    table = [["benchmark", "model", "protocol", "score", "by the rules of", "score by those rules", "points"]]
    for row in rows:
        name, own = name_and_protocol(row.run.task)
        table += [
            [name, row.run.model, own, _shown(row.score), other, _shown(score), f"{score - row.score:+.2f}"]
            for other, score in row.others.items()
        ]
    return table


def summary(reproduced: Table, other_rules: Table) -> str:
    """Both tables by benchmark, as Markdown."""
    lines = ["| benchmark, answers | files | equal in every digit | here less published, points |", "|---|---|---|---|"]
    files = [(task.partition("@")[0], *rest) for task, *rest in reproduced[1:]]
    for group, rows in _grouped(files, 0, 2):
        spread = _spread(float(row[4]) - float(row[3]) for row in rows)
        lines.append(f"| {group} | {len(rows)} | {sum(not row[6] for row in rows)} | {spread} |")
    lines += ["", "| benchmark | read by the rules of | files | points |", "|---|---|---|---|"]
    for group, rows in _grouped(other_rules[1:], 0, 4):
        lines.append(f"| {group.replace(', ', ' | ')} | {len(rows)} | {_spread(float(row[6]) for row in rows)} |")
    return "\n".join(lines)


def _grouped(rows: Iterable[Sequence[str]], *columns: int) -> Iterator[tuple[str, list[Sequence[str]]]]:
    groups: dict[str, list[Sequence[str]]] = {}
    for row in rows:
        groups.setdefault(", ".join(row[column] for column in columns), []).append(row)
    yield from groups.items()


def _spread(points: Iterable[float]) -> str:
    found = list(points)
    return f"{min(found):+.2f} to {max(found):+.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--only", action="append", default=[], choices=[*READERS])
    parser.add_argument("--write", action="store_true", help="write the tables into the pages")
    chosen = parser.parse_args(arguments)
    rows = []
    for run in found_in(chosen.answers, chosen.only):
        with tempfile.TemporaryDirectory() as place:
            rows.append(reproduce(run, Path(place)))
        print(f"{run.task} {run.model} ({run.source}): {rows[-1].score:.2f}", file=sys.stderr)
    if not rows:
        raise SystemExit(f"{chosen.answers} holds none of {', '.join(READERS)}.")
    tables = {"scores_reproduced": reproduced_table(rows), "other_rules": other_rules_table(rows)}
    for name, table in tables.items():
        with (
            (DATA / f"{name}.csv").open("w", newline="") if chosen.write else contextlib.nullcontext(sys.stdout) as file
        ):
            csv.writer(file, lineterminator="\n").writerows(table)
    if chosen.write:
        PAGE.write_text(replaced(PAGE.read_text("utf-8"), "summary", summary(*tables.values())), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
