"""Asks a model every document of a task; answers are appended as they arrive and found again after a restart.

Folder of a run:

    run.json                    model and format; another model or format is refused
    results.json                one entry per task, protocol, image mode and selection of the data
    TASK@PROTOCOL/MODE/
        answers-*.jsonl         one per process while it runs; answers.jsonl when complete; append-only
        SELECTION-CHECKSUM/     a view of the answers, see `scored_subsets`
            task.json           the protocol, the data, the first prompt, the environment
            documents.jsonl     the documents, so that scoring needs neither data nor model
            samples.jsonl       extracted and scored answers
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mm_moslora.launch.shard import Shard
from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import make_subfolder, replace_text
from mm_moslora.utils.text_format import whole_number
from mm_moslora_eval.protocol.model_interface import Model
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.answer_log import AnswerLog, Row, answer_row, line, merge, read_folder
from mm_moslora_eval.run.judging.judged_scores import GRADED, graded_text
from mm_moslora_eval.run.request_preparation import FORMAT, Item, Preparation, deal, windows
from mm_moslora_eval.run.run_records import circumstances, claim_folder, protocol_differences
from mm_moslora_eval.run.scored_subsets import DOCUMENTS, TASK, DocumentSelection, read_view, selection_of
from mm_moslora_eval.scoring.answer_scoring import PLACES
from mm_moslora_eval.scoring.document_selection import selected
from mm_moslora_eval.scoring.task_result import variant_of
from mm_moslora_eval.sources.document import DataSet, Document
from mm_moslora_eval.sources.source_images import Hasher, ImageMode

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (documents answered, all documents)."""

_WINDOW_BATCHES = 8
_HOPELESS = 16
"""The run stops after this many failures without a single answer."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of a run; `max_new_tokens` changes answers, and `seed`, because it chooses the wrong pictures."""

    batch_size: int = 8
    limit: int | None = None
    """Ask only this many documents, from the first one on; those that count together are asked together."""
    stratify: str | None = None
    """With a limit: a sample with the shares that the values of this column have in the data, drawn by `seed`."""
    samples: tuple[str, ...] = ()
    """Ask only documents with these ids, and those that count together with them."""
    seed: int = 0
    max_new_tokens: int | None = None
    """Longest answer; None: the task's, and at least `THINKING_TOKENS` where the model is asked to think."""
    retry_failed: bool = True
    """Ask failed samples of an earlier run again."""
    grace_seconds: float = 30.0
    """Seconds that rank 0 waits, after its own work, for ranks that have not started yet."""
    shard: Shard | None = None
    """Ask only this share of every task; see `answer_shards`."""
    rank: int = field(default_factory=lambda: whole_number(os.environ, "RANK", 0))
    world_size: int = field(default_factory=lambda: whole_number(os.environ, "WORLD_SIZE", 1, least=1))

    def select(self, data: DataSet, *, aggregation: str = "mean") -> tuple[Document, ...]:
        """The documents that are asked, with all that the aggregation counts together with one of them.

        A limit is at most so many documents, and at least those of one question; a stratified sample has about so many.

        Raises:
            EvalError: the data have no document with one of the ids.
        """
        if not self.samples and self.limit is None:
            return data.documents
        return selected(
            data, aggregation=aggregation, samples=self.samples, limit=self.limit, stratify=self.stratify,
            seed=self.seed,
        )  # fmt: skip

    def share(self, items: Sequence[Item], rank: int, *, name: str) -> list[list[Item]]:
        """The windows of a rank; `name`, of the task and its mode, decides which shard has the first one."""
        dealt = windows(deal(items, rank=rank, world_size=self.world_size), self.batch_size * _WINDOW_BATCHES)
        return dealt if self.shard is None else [*self.shard.every_nth(dealt, offset=zlib.crc32(name.encode()))]

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise EvalError(f"{name} is {value}, expected 1 or more.")
        if self.stratify is not None and self.limit is None:
            raise EvalError("stratify draws a sample, and limit says of how many documents: set both.")


Settings = EvaluationSettings
"""The same class under the shorter name that scripts of users import."""


def run_task(
    model: Model,
    task: Task,
    folder: Path,
    *,
    mode: ImageMode = "own",
    settings: EvaluationSettings | None = None,
    data: DataSet | None = None,
    progress: Progress | None = None,
    hasher: Hasher | None = None,
) -> Path:
    """Ask every document of a task; call it within `open_run(folder, ...)`.

    Answered documents are not asked again. Rank 0 returns when all answers are there, any other rank when its share is
    done.

    Args:
        data: the documents, if they are loaded already.
        progress: called after every answer.
        hasher: shared between tasks, so that a picture is read once.

    Returns:
        The folder of the view, for `result_file.score_folder`.

    Raises:
        EvalError: the folder belongs to another protocol, every sample fails, or boxes are scored and not read.
        ConfigError: a link is at the place of a folder of the run.
    """
    settings = settings or EvaluationSettings()
    if task.extraction in PLACES and not getattr(model, "reads_boxes", False):
        raise EvalError(
            f"{task.id} scores boxes, and {model.name} gives texts alone: their form and pixels are not known. "
            "Evaluate a run, an export or hf:ID."
        )
    task = task.within(settings.max_new_tokens, thinking_tokens=_thinking_tokens(model))
    data = data or task.load()
    documents = settings.select(data, aggregation=task.aggregation)
    work = Preparation(
        task, documents, mode=mode, seed=settings.seed, fingerprint=model.fingerprint, hasher=hasher or Hasher(),
        pool=data.documents, videos=getattr(model, "videos", None),
    )  # fmt: skip
    mode_folder = _own_folder(folder, task, mode)
    share = partial(settings.share, work.items, name=f"{task.id}/{mode}")
    items = work.items
    if settings.shard is not None:
        items = tuple(chain(*chain(*map(share, range(settings.world_size)))))
    job = _AnswerJob(model, task, work, items, mode_folder, settings, progress)
    asked = [first for first, *_ in work.documents]
    selection = selection_of(asked, data, stratify=settings.stratify, aggregation=task.aggregation)
    view = mode_folder / f"{selection.folder}{variant_of(task.to_dict())}"
    if settings.rank == 0:
        make_subfolder(view)
        more = bool(job.missing(items, retry=settings.retry_failed))
        _describe(view, model, task, data, work, selection, mode, settings, asks=more)
    job.answer(share(settings.rank), retry=settings.retry_failed)
    if settings.rank == 0:
        if settings.world_size > 1:
            _wait_for_others(folder, job, settings)
        job.answer(window for rank in range(settings.world_size) for window in share(rank))  # what died ranks left
        merge(mode_folder, [item.key for item in items])
    return view


def _own_folder(run: Path, task: Task, mode: ImageMode) -> Path:
    """The folder of the answers to a task in an image mode; refused if they were asked in another way."""
    folder = run / task.id / mode
    make_subfolder(folder, below=run)
    identity = {"format": FORMAT, "task": task.id, "asked": task.request_hash}
    differs = partial(protocol_differences, folder, task)
    claim_folder(folder / "asked.json", identity, what=str(folder), differs=differs)
    return folder


def _thinking_tokens(model: Model) -> int:
    return int(getattr(model, "thinking_tokens", 0))


def _describe(
    view: Path, model: Model, task: Task, data: DataSet, work: Preparation, selection: DocumentSelection,
    mode: ImageMode, settings: EvaluationSettings, *, asks: bool,
) -> None:  # fmt: skip
    """Write the description of a view; `asks` means that this call has something to ask."""
    rows = [
        item.document.to_dict()
        | {
            "key": item.key,
            **({"more_keys": [other.key for other in others]} if others else {}),
            "prompt": "\n".join(message.text for message in item.messages),
            "images": list(item.image_ids),
            "paths": work.paths(item),
            "cluster": item.cluster,
            "first_id": item.document.first_id,
        }
        for item, *others in work.documents
    ]
    replace_text(view / DOCUMENTS, "".join(line(row) for row in rows))
    if task.grading is not None and (graded := graded_text(task)):
        replace_text(view / GRADED, graded)
    first = next((item for item in work.items if item.problem is None), None)
    described = {
        "format": FORMAT,
        "task": task.to_dict(),
        "mode": mode,
        "seed": settings.seed,
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "data": data.to_dict(),
        "selection": asdict(selection),
        "first_prompt": [{"role": m.role, "text": m.text} for m in first.messages] if first else [],
        "computed_by": _computed_by(view, model, asks=asks),
        "asked_to_think": _thinking_tokens(model) > 0,
        **work.videos,
    }
    if markers := getattr(model, "thinking_markers", ()):
        described["thinking_markers"] = [list(pair) for pair in markers]
    if (prices := getattr(model, "prices", None)) is not None:
        described["prices"] = prices
    replace_text(view / TASK, json.dumps(described, indent=2, ensure_ascii=False) + "\n")


def _computed_by(view: Path, model: Model, *, asks: bool) -> list[dict[str, Any]]:
    """All environments in which answers of a view were computed."""
    try:
        before = list(read_view(view)["computed_by"])
    except (EvalError, KeyError):
        before = []
    now = getattr(model, "computed_by", None) or [circumstances(model)]
    return before + [item for item in now if item not in before] if asks or not before else before


def _wait_for_others(folder: Path, job: _AnswerJob, settings: EvaluationSettings) -> None:
    """Wait until all documents are answered, or until the ranks with missing answers have ended.

    A rank that has not been seen may still be starting, so its share is taken over only after `grace_seconds`.
    """
    others = [folder / f".rank-{rank}.lock" for rank in range(1, settings.world_size)]
    seen: set[Path] = set()
    started = time.monotonic()
    while job.missing(job.items):
        alive = {path for path in others if _is_locked(path)}
        seen |= alive
        starting = len(seen) < len(others) and time.monotonic() - started < settings.grace_seconds
        if not alive and not starting:
            break
        time.sleep(_POLL_SECONDS)


def _is_locked(path: Path) -> bool:
    try:
        with lock_file(path, wait=False):
            return False
    except OSError:
        return True


@dataclass
class _AnswerJob:
    """One rank's work on the answers of one task folder."""

    model: Model
    task: Task
    work: Preparation
    items: Sequence[Item]
    folder: Path
    settings: EvaluationSettings
    progress: Progress | None

    def __post_init__(self) -> None:
        self._answered = self._failed = self._done = 0
        self._asked_by_this_rank: set[str] = set()
        self._stored: set[str] = set()
        self._failed_before: set[str] = set()

    def missing(self, items: Sequence[Item], *, retry: bool = False) -> list[Item]:
        """Items without an answer; with `retry` also failed items of an earlier run."""
        rows = read_folder(self.folder)
        failed = {key for key, row in rows.items() if row.get("error") is not None}
        again = failed - self._asked_by_this_rank if retry else set()
        if rows.keys() - failed:  # the model has answered, so these may fail again for reasons of their own
            self._failed_before |= again
        self._stored = rows.keys() - again
        self._done = sum(item.key in self._stored for item in self.items)
        return [item for item in items if item.key not in self._stored]

    def answer(self, share: Iterable[Sequence[Item]], *, retry: bool = False) -> None:
        """Ask the items of windows that have no answer."""
        missing = {item.key for item in self.missing(self.items, retry=retry)}
        self._report()
        pending = [[item for item in window if item.key in missing] for window in share] if missing else []
        if not any(pending):
            return
        with AnswerLog(self.folder, rank=self.settings.rank, batch_size=self.settings.batch_size) as log:
            for window in filter(None, pending):
                self._window(window, log)

    def _window(self, items: Sequence[Item], log: AnswerLog) -> None:
        left: dict[str, Item] = {}
        for item in items:
            if item.problem is None:
                left[item.key] = item
            else:
                self._store(item, log, error=item.problem)
        try:
            for item, row in self._ask(list(left.values()), self.settings.batch_size):
                self._store(item, log, **row)
                del left[item.key]
        except EvalError:
            raise
        except Exception as error:  # one bad sample must not lose the answers of the others
            logger.warning("%s: a batch failed (%s: %s); asking one by one", self.task.id, type(error).__name__, error)
        for item in left.values():
            self._single(item, log)

    def _single(self, item: Item, log: AnswerLog) -> None:
        try:
            rows = list(self._ask([item], 1))
            if not rows:
                raise RuntimeError("the model gave no answer")
        except EvalError:
            raise
        except Exception:  # recorded and counted
            self._store(item, log, error=traceback.format_exc())
        else:
            self._store(item, log, **rows[0][1])

    def _ask(self, items: Sequence[Item], batch_size: int) -> Iterator[tuple[Item, Row]]:
        if not items:
            return
        started = time.monotonic()
        produced: Iterable[tuple[int, Any]]
        if self.task.decoding.kind != "generate":
            produced = self.model.loglikelihood(
                [self.work.option_request(item) for item in items], batch_size=batch_size
            )
        else:
            produced = self.model.generate([self.work.request(item) for item in items], batch_size=batch_size)
        seen: set[int] = set()
        for index, result in produced:
            if index in seen or not 0 <= index < len(items):
                raise EvalError(
                    f"Model {self.model.name!r} answered request {index} of {len(items)} twice or never had it."
                )
            seen.add(index)
            seconds = time.monotonic() - started
            row = answer_row(items[index], result, self.task)
            yield items[index], row | {"seconds": round(seconds / len(seen), 4)}

    def _store(self, item: Item, log: AnswerLog, *, error: str | None = None, **answer: Any) -> None:
        row: Row = {"key": item.key, "task": self.task.id, "version": self.task.version, "id": item.document.id}
        row |= {"text": None, "tokens": 0, "finish_reason": None, "options": None, "reference": None}
        row |= {"error": error, "seconds": None}
        row |= answer
        row["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        log.add(row)
        self._asked_by_this_rank.add(item.key)
        self._done += item.key not in self._stored
        self._stored.add(item.key)
        self._answered += error is None
        self._failed += error is not None and item.problem is None and item.key not in self._failed_before
        self._report()
        if self._failed >= _HOPELESS and not self._answered:
            raise EvalError(
                f"The first {self._failed} samples of {self.task.id} all failed, so the fault is not in one sample. "
                f"The last one: {(error or '').strip().splitlines()[-1]}"
            )

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self._done, len(self.items))
