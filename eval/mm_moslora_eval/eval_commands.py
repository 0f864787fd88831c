"""The commands of `mm-moslora eval` as plain functions; the command line only parses and prints.

This module imports nothing heavy at module level, so that `--help`, listing and describing are fast.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.reporting.verdicts import amount_text, between, resting_on, score_text
from mm_moslora.utils.errors import DataError, EvalError, ExitStatus, MoSLoRAError
from mm_moslora.utils.run_paths import file_and_folder
from mm_moslora.utils.text_format import aligned

if TYPE_CHECKING:
    from mm_moslora_eval.backends.openai_endpoint import ServiceSettings
    from mm_moslora_eval.protocol.task import Task
    from mm_moslora_eval.run.baselines import TrainingAnswer
    from mm_moslora_eval.run.judging.llm_judge import Judge
    from mm_moslora_eval.run.paired_comparison import PairedComparison
    from mm_moslora_eval.scoring.task_result import TaskResult
    from mm_moslora_eval.sources.document import Document
    from mm_moslora_eval.sources.source_images import ImageMode


def training_answers(*names: str) -> Sequence[TrainingAnswer]:
    """Training answers for the baselines from files, each FILE or FILE@IMAGE_FOLDER; empty names are left out."""
    from mm_moslora_eval.run.baselines import read_training_answers

    answers: list[TrainingAnswer] = []
    for path, folder in (file_and_folder(name) for name in names if name):
        answers += read_training_answers(Path(path), image_folder=Path(folder) if folder else None)
    return answers


def dry_run(tasks: Sequence[str], *, documents: int = 1, changes: Sequence[str] = ()) -> str:
    """The first prompts of tasks with the pictures in them, without a model."""
    from mm_moslora_eval.protocol.task_registry import get_task, with_changes

    blocks = []
    for task in (with_changes(get_task(name), changes) for name in tasks):
        data = task.load()
        blocks += [_prompt_of(task, document) for document in data.documents[:documents]]
    return "\n".join(blocks)


def _prompt_of(task: Task, document: Document) -> str:
    head = f"--- {task.id}, document {document.id} (answers: {', '.join(document.answers)})"
    try:
        lines = [f"[{message.role}] {message.text}" for message in task.prompt.messages(document)]
    except EvalError as error:
        lines = [f"cannot be asked: {error}"]
    problem = [f"cannot be asked: {document.problem}"] if document.problem else []
    return "\n".join([head, *lines, _pictures_of(document), *problem])


def _pictures_of(document: Document) -> str:
    """A description of each picture: its file, or a note that the data contain it."""
    if not document.images:
        return "pictures: none"
    shown = []
    for image in document.images:
        missing = isinstance(image, Path) and not image.is_file()
        shown.append(f"{image}{' (missing)' if missing else ''}" if isinstance(image, Path) else "in the data")
    return f"pictures: {', '.join(shown)}"


def score(
    path: Path, *, protocol: str | None = None, judge: Judge | None = None, partial: bool = False,
    failures: list[Exception] | None = None,
) -> list[TaskResult]:  # fmt: skip
    """Score stored answers again, without a model, and rewrite `samples.jsonl` and `results.json`.

    If a view cannot be scored, the others are scored all the same.
    """
    from mm_moslora_eval.protocol.task_registry import get_task
    from mm_moslora_eval.run.result_file import score_folder, write_results
    from mm_moslora_eval.run.scored_subsets import run_of, views_below

    start = path.parent if path.is_file() else path
    views = views_below(start)
    if not views:
        raise EvalError(f"{path} holds no answers; expected a run folder or a folder TASK@PROTOCOL/MODE in it.")
    rules = get_task(protocol) if protocol else None
    if rules is not None:
        views = _views_of(rules.name, views, path)
    results: list[TaskResult] = []
    raised: list[Exception] = []
    for view in views:
        try:
            result = score_folder(view, rules=rules, judge=judge, partial=partial)
            write_results(run_of(view), [result])
            results.append(result)
        except Exception as error:  # of any kind: raised once the others are scored
            raised.append(error)
    if failures is not None:
        failures += raised
    elif raised:
        raise raised[0]
    return results


def _views_of(name: str, views: Sequence[Path], path: Path) -> list[Path]:
    """The views of a task as it was asked, without views by another protocol's rules."""
    from mm_moslora_eval.run.scored_subsets import RESCORED, read_view

    tasks = {}
    for view in views:
        with suppress(MoSLoRAError):  # its own task cannot be read
            tasks[view] = read_view(view)["task"]["name"]
    chosen = [view for view, task in tasks.items() if task == name and RESCORED not in view.name]
    if not chosen:
        raise EvalError(
            f"{path} holds no answers to {name}, but to {', '.join(sorted(set(tasks.values())))}. "
            "Answers can be scored by another protocol of their own task."
        )
    return chosen


def run_folder(path: Path) -> Path:
    """The run that a folder or answer file belongs to."""
    start = path.parent if path.is_file() else path
    run = next((folder for folder in (start, *start.resolve().parents[:3]) if (folder / "run.json").is_file()), None)
    if run is None:
        raise EvalError(f"{path} is not part of an evaluation run: there is no run.json in it or above it.")
    return run


def make_judge(
    name: str | None, run: Path, *, budget: int | None = None, service: ServiceSettings | None = None, **options: Any
) -> Judge | None:
    """The judge that `--judge` names, its replies cached in the run folder."""
    if name is None or name == "none":
        return None
    from mm_moslora_eval.backends.open_model import check_name, open_model
    from mm_moslora_eval.backends.openai_endpoint import ServiceSettings
    from mm_moslora_eval.run.judging.llm_judge import WORKERS, ChatService, Judge

    chosen = service or ServiceSettings()
    asked: ChatService
    if name.startswith(("http://", "https://", "openai:")):
        asked = chosen.endpoint(name)
    else:
        from mm_moslora_eval.backends.endpoints.local_chat import LocalChat

        check_name(name)
        batch_size = options.get("workers", WORKERS)
        asked = LocalChat(partial(open_model, name, service=chosen), name=name, batch_size=batch_size)
    return Judge(asked, cache=run / "judge", budget_tokens=budget, **options)


class Bars:
    """Progress of the passes of an evaluation one after the other, with the time left."""

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._begun: list[tuple[str, str]] = []
        self._bar: Any = None

    def untuned(self, task: str, mode: ImageMode, done: int, total: int) -> None:
        """Report progress of the untuned model, with its own pictures."""
        self(task, mode, done, total, shown="untuned")

    def __call__(self, task: str, mode: ImageMode, done: int, total: int, *, shown: str = "") -> None:
        """Report that `done` of `total` documents are answered."""
        from mm_moslora.utils.progress_bar import Progress as Bar

        name = task, shown or {"own": "own pictures", "wrong": "wrong pictures", "blind": "blind"}[mode]
        new = name not in self._begun
        if new or done < self._bar.done or total != self._bar.total:
            if self._bar is not None:
                self._bar.__exit__(None, None, None)
            self._begun += [name] * new
            title = f"pass {len(self._begun)} of {self._passes} ({', '.join(name)})"
            self._bar = Bar(title, total, unit="document", initial=done)
        elif done > self._bar.done:
            self._bar.update(done)


def list_tasks(words: Sequence[str] = ()) -> str:
    """The registered tasks and groups; with words, only the lines with all of them, also of names for task files."""
    from mm_moslora_eval.protocol.task_groups import SIGN, shipped_groups
    from mm_moslora_eval.protocol.task_registry import all_tasks
    from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, JUDGED, METRICS
    from mm_moslora_eval.scoring.named_parts import name_of
    from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS, OVER_SAMPLES

    rows = []
    for task in all_tasks().values():
        count, tags = str(task.expected_count or "?"), ", ".join(task.tags)
        rows.append((task.name, task.protocol, count, name_of(task.metric), tags, task.title))
    named = [(f"{SIGN}{name}", ", ".join(items)) for name, items in shipped_groups().items()]
    for parts in (EXTRACTORS, METRICS, JUDGED, AGGREGATIONS, OVER_SAMPLES) if words else ():
        named += [(f"{parts.kind} {name}", parts.meaning(name)) for name in parts]

    def kept(lines: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
        return [line for line in lines if all(word.lower() in " ".join(line).lower() for word in words)]

    shown = []
    if found := kept(rows):
        shown.append("\n".join(aligned(("task", "protocol", "documents", "metric", "tags", "title"), found)))
    shown += [textwrap.fill(f"{name}: {text}", 110, subsequent_indent="  ") for name, text in kept(named)]
    return "\n\n".join(shown) or f"No task, group or name has all of these words: {', '.join(words)}."


def describe(name: str) -> str:
    """Description of a task: source, prompt of the first document if the data is there, metric, published numbers.

    Nothing is fetched.
    """
    from mm_moslora_eval.protocol.task_registry import get_task

    task = get_task(name)
    decoding = task.decoding
    search = f"{decoding.beams} beams" if decoding.beams > 1 else "greedy"
    if decoding.temperature:
        drawn = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k or "all"}
        search = ", ".join(f"{name} {value}" for name, value in drawn.items())
        search += f", {decoding.samples} answers each ({task.over_samples})" if decoding.samples > 1 else ""
    lines = [
        f"{task.id} (version {task.version}): {task.title}",
        f"data:        {task.source.kind} {task.source.path} (licence: {task.licence})",
        f"documents:   {task.expected_count or 'not fixed'}",
        f"decoding:    {task.decoding.kind}, {search}, at most {task.decoding.max_new_tokens} new tokens",
        f"extraction:  {task.extraction}",
        f"metric:      {task.metric}, aggregated by {task.aggregation}",
    ]
    if (grading := task.grading) is not None:
        replies = ", ".join(grading.replies) or f"a number from {' to '.join(map(str, grading.scale))}"
        lines += [f"judge:       replies {replies}", *(f"  | {line}" for line in grading.prompt.splitlines())]
        lines += [f"             without it the rule {grading.rule}"] if grading.rule else []
    lines += [
        f"code:        the {kind} is of {about['file']} (SHA-256 {about['sha256'][:12]})"
        for kind, about in task.code.items()
    ]
    lines += [f"tags:        {', '.join(task.tags)}"] if task.tags else []
    lines += [f"note:        {task.notes}"] if task.notes else []
    lines += [f"differs:     {difference}" for difference in task.differences]
    lines += [f"unverified:  {', '.join(task.unverified)}"] if task.unverified else []
    lines += [f"published:   {row.score} {row.model} ({row.source})" for row in task.published]
    try:
        data = task.load_cached()
        lines += ["", _prompt_of(task, data.documents[0])]
    except EvalError as error:
        lines += ["", f"The data cannot be read: {error}"]
    return "\n".join(lines)


def check(name: str) -> str:
    """Read a task's data and report all faults."""
    from mm_moslora_eval.protocol.task_registry import get_task
    from mm_moslora_eval.run.request_preparation import Preparation
    from mm_moslora_eval.sources.source_images import Hasher, open_image

    task = get_task(name)
    data = task.load()
    work = Preparation(task, data.documents, mode="own", seed=0, fingerprint="", hasher=Hasher())
    items = [first for first, *_ in work.documents]
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
        raise EvalError(f"{len(faults)} of {len(items)} documents of {data.path} have faults:\n{shown}")
    count = f"{len(items)} documents, {len(seen)} pictures, {data.dropped} rows left out"
    expected = task.expected_count
    odd = f"; the full set has {expected}" if expected not in (None, len(items)) else ""
    return f"{task.id}: {data.path} has no faults: {count}{odd}"


def compare_runs(a: str, b: str) -> list[tuple[PairedComparison, str]]:
    """Compare runs or task folders; several seeds of one system are separated by commas."""
    from mm_moslora_eval.run.paired_comparison import compare as compare_samples
    from mm_moslora_eval.run.paired_comparison import paired_folders

    pairs = paired_folders([Path(name) for name in a.split(",")], [Path(name) for name in b.split(",")])
    results = [compare_samples(left, right) for left, right in pairs]
    return [(result, comparison_text(result)) for result in results]


def exit_code(results: Sequence[TaskResult], *, max_failed_share: float = 0.0) -> int:
    """0 if at most this share of the samples failed, and no judge and no aggregation failed, else 3."""
    if any(result.about.get("judge_failed") or result.about.get("rules_failed") for result in results):
        return ExitStatus.UNSCORED
    total = sum(result.counts.total for result in results)
    failed = sum(result.counts.incomplete for result in results)
    return ExitStatus.UNSCORED if failed > max_failed_share * total else 0


def comparison_text(result: PairedComparison) -> str:
    """A comparison as readable text."""
    score, estimate = result.score, result.score.estimate
    lines = [
        f"{result.task}: A {score_text(score.a, score.unit)}, B {score_text(score.b, score.unit)}. "
        f"{between(score.as_difference)}: {score.as_difference.points}, p {estimate.p_value:.3g}.",
        f"A wins {score.wins}, B wins {score.losses}, equal {score.ties} of {score.questions}; sign test p "
        f"{score.sign_p:.3g}.",
        resting_on(estimate.n, estimate.clusters, estimate.groups)
        + (
            f" A true difference of {amount_text(estimate.detectable, score.unit)} is detected with 80 % power."
            if estimate.stderr > 0
            else " They all differ by the same amount; the interval bounds the share of other differences."
            if estimate.clusters > 1
            else ""
        ),
    ]
    lines += [result.caution] if result.caution else []
    lines += result.remarks
    lines += [result.nats.text] if result.nats is not None else []
    if max(len(score.seeds_a), len(score.seeds_b)) > 1:
        a, b = (", ".join(score_text(value, score.unit) for value in seeds) for seeds in (score.seeds_a, score.seeds_b))
        lines.append(
            f"Seeds: A {a}; B {b}. Every sample counts with its mean over the seeds; the spread between seeds is "
            f"{amount_text(result.seed_spread, score.unit)}."
        )
    return "\n".join(lines)


def table(results: Sequence[TaskResult]) -> str:
    """The results as an aligned table, followed by remarks on the numbers."""
    from mm_moslora_eval.report.evaluation_page import names_of
    from mm_moslora_eval.scoring.score_remarks import beside

    rows = []
    names = names_of(results)
    nats = any("nats" in result.likelihood for result in results)
    for name, result in zip(names, results, strict=True):
        counts, likelihood = result.counts, result.likelihood
        cells = ["unscored", "-", "-"]
        if not math.isnan(result.score):
            cells = [f"{result.score:.4f}", f"{result.stderr:.4f}", f"{result.low:.4f} to {result.high:.4f}"]
        if nats:
            stderr = likelihood.get("stderr")
            error = " ± -" if stderr is None or math.isnan(stderr) else f" ± {stderr:.4f}"
            cells.append(f"{likelihood['nats']:.4f}{error}" if "nats" in likelihood else "-")
        numbers = (result.n, counts.failed, counts.not_inferable, counts.truncated)
        rows.append((name, result.mode, *cells, *map(str, numbers)))
    measures = ["score", "stderr", "95 %", *(["nats"] if nats else [])]
    head = ("task", "images", *measures, "n", "failed", "not inferable", "truncated")
    notes = []
    for name, result in zip(names, results, strict=True):
        unscored, odd = result.about.get("unscored"), _odd_count(result)
        learned = result.about.get("learned_from")
        source = f"learned from {learned}." if learned else ""
        silent = f"no likelihood: {result.likelihood['none']}." if "none" in result.likelihood else ""
        rests = _basis(result) if result.folder else ""
        texts = (*result.remarks, unscored, odd, source, silent, rests, *beside(result.about))
        notes += [f"{name}, {result.mode}: {text}" for text in texts if text]
    return "\n".join([*aligned(head, rows), *notes])


def _odd_count(result: TaskResult) -> str:
    """A note if the data is not the whole benchmark, independent of --limit."""
    rows, expected = result.about.get("data", {}).get("rows"), result.about.get("expected_count")
    if expected is None or rows in (None, expected):
        return ""
    doubt = " (an unverified number)" if "expected_count" in result.about.get("unverified", ()) else ""
    return f"the data holds {rows} documents, the full set has {expected}{doubt}."


def _basis(result: TaskResult) -> str:
    """A note where the interval rests on fewer pictures than documents."""
    if not result.scored or result.clusters is None or result.groups is None or result.clusters == result.n:
        return ""
    return resting_on(result.n, result.clusters, result.groups)
