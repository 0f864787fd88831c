"""What `mm-moslora eval` does, as plain functions; the command line only parses and prints.

Nothing heavy is imported here at module level, so that `--help`, listing and describing are quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.errors import DataError, EvalError

if TYPE_CHECKING:
    from .baselines import TrainingAnswer
    from .images import ImageMode
    from .judge import Judge
    from .model import Model
    from .results import TaskResult
    from .runner import Progress, Settings
    from .suite import Comparison


def run(
    model: Model | Callable[[], Model],
    tasks: Sequence[str],
    output: Path,
    *,
    modes: Sequence[ImageMode] = ("own",),
    baselines: Sequence[str] = (),
    training: Sequence[TrainingAnswer] = (),
    settings: Settings | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    judge: Judge | None = None,
) -> list[TaskResult]:
    """Evaluate a model on tasks, one after the other; results are written after each.

    Args:
        model: or a function that loads it, called once every task was found and its data could be read.
        tasks: names as in `registry.get_task`.
        output: run folder.
        modes: own, blind, wrong.
        baselines: majority, question_majority.
        training: answers for the baselines to learn from.
        settings: batch size, limit, seed, ranks.
        progress: called with (task, answered, all).
        judge: grades free answers; without one such tasks stay unscored.

    Raises:
        EvalError: an unknown task, data that cannot be read, a folder of another run.
    """
    from .provenance import record
    from .registry import get_task
    from .runner import Settings, open_run
    from .suite import evaluate

    found = [get_task(name) for name in tasks]
    for task in found:
        task.load()  # fail before the model is loaded
    loaded = model() if callable(model) and not hasattr(model, "generate") else model
    results: list[TaskResult] = []
    chosen = settings or Settings()
    try:
        if chosen.rank == 0:
            with open_run(output, loaded):  # type: ignore[arg-type]
                record(output, loaded, chosen)  # type: ignore[arg-type]
        for task in found:
            results += evaluate(
                loaded,  # type: ignore[arg-type]
                task,
                output,
                modes=modes,
                baselines=baselines,
                training=training,
                settings=chosen,
                progress=_named(task.id, progress),
                judge=judge,
            )
    finally:
        if loaded is not model:
            loaded.close()  # type: ignore[union-attr]
    return results


def _named(name: str, progress: Callable[[str, int, int], None] | None) -> Progress | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def dry_run(tasks: Sequence[str], *, documents: int = 1) -> str:
    """The first prompts of tasks, without a model."""
    from .registry import get_task

    blocks = []
    for name in tasks:
        task = get_task(name)
        for document in task.load().documents[:documents]:
            text = "\n".join(f"[{message.role}] {message.text}" for message in task.prompt.messages(document))
            blocks.append(f"--- {task.id}, document {document.id} (answers: {', '.join(document.answers)})\n{text}")
    return "\n".join(blocks)


def score(path: Path, *, protocol: str | None = None, judge: Judge | None = None) -> list[TaskResult]:
    """Score stored answers again, without a model, and rewrite `samples.jsonl` and `results.json`.

    Args:
        path: a run folder, a task folder within it, or its `answers.jsonl`.
        protocol: score with the extraction and metric of this task (`NAME@PROTOCOL`) instead.
        judge: grades free answers.

    Raises:
        EvalError: nothing to score there, or documents without an answer.
    """
    from .registry import get_task
    from .results import score_folder, write_results

    start = path.parent if path.is_file() else path
    places = sorted(item.parent for item in start.glob("**/task.json"))
    if not places:
        raise EvalError(f"{path} holds no answers; expected a run folder or a folder TASK@PROTOCOL/MODE in it.")
    task = get_task(protocol) if protocol else None
    results = [score_folder(place, task=task, judge=judge) for place in places]
    write_results(places[0].parents[1], results)
    return results


def run_folder(path: Path) -> Path:
    """The run that a folder or answer file belongs to.

    Raises:
        EvalError: no run is there.
    """
    start = path.parent if path.is_file() else path
    found = next((folder for folder in (start, *start.resolve().parents[:3]) if (folder / "run.json").is_file()), None)
    if found is None:
        raise EvalError(f"{path} lies in no evaluation run: there is no run.json in it or above it.")
    return found


def with_protocol(tasks: Sequence[str], protocol: str | None) -> list[str]:
    """Task names, the protocol added to those that name none.

    Raises:
        EvalError: no task at all.
    """
    if not tasks:
        raise EvalError("No task was given. Name one or more; `mm-moslora eval list` shows them.")
    own_data = ("llava:", "tsv:")
    return [
        f"{task}@{protocol}" if protocol and "@" not in task and not task.startswith(own_data) else task
        for task in tasks
    ]


def make_judge(name: str | None, run: Path, *, budget: int | None) -> Judge | None:
    """The judge that `--judge` names, its replies cached in the run folder."""
    if name is None or name == "none":
        return None
    from .endpoint import Endpoint
    from .judge import Judge

    return Judge(Endpoint.parse(name.removeprefix("openai:")), cache=run / "judge", budget_tokens=budget)


class Bars:
    """Progress of tasks one after the other, with the time left."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._bar: Any = None

    def __call__(self, name: str, done: int, total: int) -> None:
        """Say that `done` of `total` documents are answered."""
        from mm_moslora.training.progress import Progress as Bar

        if name != self._name or self._bar is None or done < self._bar.done or total != self._bar.total:
            if self._bar is not None:
                self._bar.__exit__(None, None, None)
            self._name, self._bar = name, Bar(name, total, unit="document", initial=done)
        elif done > self._bar.done:
            self._bar.update(done)


def list_tasks(words: Sequence[str] = ()) -> str:
    """A table of the registered tasks; with words, of those whose line holds them all."""
    from .registry import all_tasks

    rows = [
        (task.name, task.protocol, str(task.expected_count or "?"), task.metric, task.title)
        for task in all_tasks().values()
    ]
    rows = [row for row in rows if all(word.lower() in " ".join(row).lower() for word in words)]
    return _table(("task", "protocol", "documents", "metric", "title"), rows)


def describe(name: str) -> str:
    """A task in words: source, prompt of the first document if the data is there, metric, published numbers."""
    from .registry import get_task

    task = get_task(name)
    lines = [
        f"{task.id} (version {task.version}): {task.title}",
        f"data:        {task.source.kind} {task.source.path} (licence: {task.licence})",
        f"documents:   {task.expected_count or 'not fixed'}",
        f"decoding:    {task.decoding.kind}, greedy, at most {task.decoding.max_new_tokens} new tokens",
        f"extraction:  {task.extraction}",
        f"metric:      {task.metric}, aggregated by {task.aggregation}",
    ]
    lines += [f"note:        {task.notes}"] if task.notes else []
    lines += [f"unverified:  {', '.join(task.unverified)}"] if task.unverified else []
    lines += [f"published:   {row.score} {row.model} ({row.source})" for row in task.published]
    try:
        lines += ["", dry_run([name])]
    except EvalError as error:
        lines += ["", f"The data is not here: {error}"]
    return "\n".join(lines)


def check(name: str) -> str:
    """Read a task's data and say what is wrong with it.

    Raises:
        EvalError: the data cannot be read, or some documents cannot be asked.
    """
    from .images import Hasher, open_image
    from .registry import get_task
    from .requests import Preparation

    task = get_task(name)
    data = task.load()
    items = Preparation(task, data.documents, mode="own", seed=0, fingerprint="", hasher=Hasher()).items
    faults = [f"{item.document.id}: {item.problem}" for item in items if item.problem is not None]
    seen: set[str] = set()
    for item in items:
        for identity, image in zip(item.own_ids, item.document.images, strict=False):
            if identity not in seen:
                seen.add(identity)
                try:
                    open_image(image)
                except DataError as error:
                    faults.append(f"{item.document.id}: image cannot be decoded: {error}")
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:10])
        raise EvalError(f"{len(faults)} of {len(items)} documents of {data.path} are unsound:\n{shown}")
    count = f"{len(items)} documents, {len(seen)} pictures, {data.dropped} rows left out"
    expected = task.expected_count
    odd = f"; the full set has {expected}" if expected not in (None, len(items)) else ""
    return f"{task.id}: {data.path} is sound: {count}{odd}"


def compare(run_a: Path, run_b: Path) -> tuple[Comparison, str]:
    """Compare two task folders sample by sample; returns the numbers and a text for people."""
    from .suite import compare as compare_samples

    result = compare_samples([run_a], [run_b])
    return result, comparison_text(result)


def compare_runs(a: str, b: str) -> list[tuple[Comparison, str]]:
    """Compare runs or task folders; several seeds of one system are separated by commas.

    Raises:
        EvalError: nothing comparable, or different documents.
    """
    from .suite import compare as compare_samples
    from .suite import paired_folders

    pairs = paired_folders([Path(name) for name in a.split(",")], [Path(name) for name in b.split(",")])
    results = [compare_samples(left, right) for left, right in pairs]
    return [(result, comparison_text(result)) for result in results]


def comparison_text(result: Comparison) -> str:
    """A comparison for people."""
    pair = result.paired
    verdict = "differs" if pair.p_value < 0.05 else "does not differ"
    lines = [
        f"{result.task}: A {result.score_a:.4f}, B {result.score_b:.4f}, A - B {pair.difference:+.4f} "
        f"(95 % {pair.low:+.4f} to {pair.high:+.4f}, p {pair.p_value:.3g}, sign test p {pair.mcnemar_p:.3g})",
        f"A wins {pair.wins}, B wins {pair.losses}, equal {pair.ties} of {pair.n}; "
        f"A {verdict} from B at the 5 % level.",
        f"With {pair.n} documents a true difference of {result.detectable:.4f} is seen four times out of five."
        if result.detectable
        else f"Every one of {pair.n} documents scores the same in both, so how far they may differ is unknown.",
    ]
    lines += [result.caution] if result.caution else []
    if result.headline is not None:
        own = result.headline
        lines.append(
            f"Headline ({own.name}): A {own.a:.4f}, B {own.b:.4f}, A - B {own.a - own.b:+.4f} "
            f"(95 % {own.low:+.4f} to {own.high:+.4f}, bootstrap over both at once)"
        )
    if max(len(result.seeds_a), len(result.seeds_b)) > 1:
        shown = [", ".join(f"{score:.4f}" for score in seeds) for seeds in (result.seeds_a, result.seeds_b)]
        lines.append(
            f"Seeds: A {shown[0]}; B {shown[1]}. Every sample counts with its mean over the seeds; the spread between "
            f"seeds is {result.seed_spread:.4f}."
        )
    return "\n".join(lines)


def table(results: Sequence[TaskResult]) -> str:
    """The results as an aligned table."""
    rows = []
    for result in results:
        counts = result.counts
        rows.append(
            (
                f"{result.task}@{result.protocol}",
                result.mode,
                *_score_cells(result),
                str(result.n),
                str(counts.failed),
                str(counts.not_inferable),
                str(counts.truncated),
            )
        )
    head = ("task", "images", "score", "stderr", "95 %", "n", "failed", "not inferable", "truncated")
    notes = [f"{result.id}: {result.about['unscored']}" for result in results if result.about.get("unscored")]
    notes += [f"{result.id}: {odd}" for result in results if (odd := _odd_count(result))]
    return "\n".join([_table(head, rows), *notes])


def _odd_count(result: TaskResult) -> str:
    """Says so when the data is not the whole benchmark, whatever --limit took of it."""
    rows, expected = result.about.get("data", {}).get("rows"), result.about.get("expected_count")
    if expected is None or rows in (None, expected):
        return ""
    doubt = ", a number that nobody has checked" if "expected_count" in result.about.get("unverified", ()) else ""
    return f"the data holds {rows} documents, the full set has {expected}{doubt}."


def _score_cells(result: TaskResult) -> tuple[str, str, str]:
    if result.score != result.score:
        return "unscored", "-", "-"
    return f"{result.score:.4f}", f"{result.stderr:.4f}", f"{result.low:.4f} to {result.high:.4f}"


def exit_code(results: Sequence[TaskResult], *, max_failed_share: float = 0.0) -> int:
    """0 when no more than this share of the samples failed, else 3."""
    total = sum(result.counts.total for result in results)
    failed = sum(result.counts.failed for result in results)
    return 3 if failed > max_failed_share * total else 0


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
