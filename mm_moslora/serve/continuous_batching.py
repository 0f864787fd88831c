"""Continuous batching: answers join and leave the batch between decoding steps.

One thread owns the model. Each iteration of its loop removes cancelled answers, admits waiting ones and decodes one
token for every answer; answers of one variant form one batch. Padding is on the left and masked, and positions count
real tokens (`mm_moslora.models.decoding.prefix_cache`), so that in fp32 an answer does not depend on its batch.

An error ends only the answer that caused it. Where a batch fails without naming a row, each row is run again by itself:
rows that fail alone end, and the others continue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mm_moslora.batch import ProcessedImage
from mm_moslora.models.decoding.prefix_cache import Decoder
from mm_moslora.models.decoding.token_sampling import Draw, choose
from mm_moslora.serve.api_errors import busy, stopping
from mm_moslora.serve.request_limits import Limits
from mm_moslora.serve.served_models import Models
from mm_moslora.serve.text_stream import TextStream
from mm_moslora.utils.errors import ModelError
from mm_moslora.utils.redaction import redacted_traceback

logger = logging.getLogger(__name__)

_ADMITTED_AT_ONCE = 4
"""Prompts that are read between two decoding steps; more would delay the running answers noticeably."""

Ending = Literal["stop", "length", "failed", "late", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class AnswerPart:
    """An event of an answer."""

    text: str = ""
    ending: Ending | None = None
    """None while it continues; late: its deadline passed before it started."""
    tokens: int = 0
    """Tokens generated so far."""


@dataclass(kw_only=True, eq=False)
class GenerationJob(Draw):
    """One answer to generate."""

    model: str
    """Name of a variant."""
    input_ids: Tensor
    """int64 ``[T]``, placeholders expanded."""
    images: Sequence[ProcessedImage]
    """Its pictures, in order."""
    stop: tuple[str, ...] = ()
    thinking: bool | None = None
    """The form of the prompt; see `ConversationEncoder.encode_prompt`."""
    deliver: Callable[[AnswerPart], object]
    """Callback, called from the engine's thread, which may use the model meanwhile."""
    deadline: float
    """Deadline on the monotonic clock, seconds."""
    cancelled: bool = False
    """Set by the owner of the job to cancel it before the next token."""
    tokens: list[int] = field(default_factory=list)
    """The answer so far."""
    text: TextStream = field(init=False)
    """Its text, made when it is submitted."""

    @property
    def room(self) -> int:
        """Tokens that it may take in the key-value cache."""
        return len(self.input_ids) + self.sampling.max_tokens


@dataclass(eq=False)
class _Group:
    """Answers of one variant that are decoded together: a row of the decoder per job."""

    decoder: Decoder | None
    jobs: list[GenerationJob]

    def keep(self, numbers: Sequence[int]) -> None:
        """Drop all other rows."""
        if len(numbers) == len(self.jobs):
            return
        self.jobs = [self.jobs[number] for number in numbers]
        if numbers and self.decoder is not None:
            self.decoder.select(numbers)
        else:
            self.decoder = None


class GenerationEngine:
    """Generates answers in its own thread; no other thread may use the models while it runs."""

    def __init__(self, models: Models, limits: Limits) -> None:
        self.models, self.limits = models, limits
        self._groups: dict[str, list[_Group]] = {name: [] for name in models.variants}
        self._waiting: deque[GenerationJob] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mm-moslora-engine", daemon=True)
        self.running = self.steps = 0

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop at once; running answers are cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        """Whether the engine can answer."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Answers in the queue."""
        return len(self._waiting)

    def submit(self, jobs: Sequence[GenerationJob]) -> None:
        """Queue the answers of one request, all or none."""
        for job in jobs:
            job.text = TextStream(self.models.encoder, job.stop, thinking=job.thinking)
        with self._changed:
            if self._stopping:
                raise stopping()
            if len(self._waiting) + len(jobs) > self.limits.queue:
                raise busy(f"{len(self._waiting)} answers are waiting")
            self._waiting.extend(jobs)
            self._changed.notify()

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    while not (self._stopping or self._waiting or self.running):
                        self._changed.wait()
                    if self._stopping:
                        break
                try:
                    self._turn()
                except Exception as error:  # the thread must survive, since it alone can answer
                    self._give_up(error)
        for job in [*self._waiting, *self._decoded()]:
            self._deliver(job, ending="cancelled")

    def _turn(self) -> None:
        """The loop: remove, admit, decode."""
        self._drop()
        for name, jobs in self._admissible().items():
            for batch in [[job] for job in jobs] if self.models.reads_alone else [jobs]:
                self._admit(name, batch)
        for name, groups in self._groups.items():
            for group in list(groups):
                if group.jobs:
                    self._advance(name, group)
            self._groups[name] = [group for group in self._groups[name] if group.jobs]
        self.running = len(self._decoded())

    def _admit(self, name: str, jobs: list[GenerationJob], *, resumed: bool = False) -> None:
        """Read prompts in one batch; after an error, one by one."""
        if len(jobs) == 1 and jobs[0].cancelled:  # cancelled while others were read
            self._deliver(jobs[0], ending="cancelled")
            return
        try:
            self._read(name, jobs, resumed)
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            _log("Reading prompts in one batch failed; each is read by itself", error)
            for job in jobs:
                self._admit(name, [job])

    def _advance(self, name: str, group: _Group) -> None:
        """Run a step of one batch; after an error, read its rows again and continue with one batch per row."""
        try:
            self._step(name, group)
        except Exception as error:
            jobs = group.jobs
            group.keep([])
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            _log("A decoding step failed; each row is read again by itself", error)
            for job in jobs:
                self._admit(name, [job], resumed=True)

    def _fail(self, job: GenerationJob, error: Exception) -> None:
        """End one answer after an error."""
        _log("An answer failed", error)
        self._deliver(job, ending="failed")

    def _give_up(self, error: Exception) -> None:
        """End all answers after an error outside any answer."""
        jobs = self._decoded()
        self._groups = {name: [] for name in self._groups}
        with self._changed:
            jobs += self._waiting
            self._waiting.clear()
        self.running = 0
        for job in jobs:
            self._fail(job, error)

    def _decoded(self) -> list[GenerationJob]:
        return [job for groups in self._groups.values() for group in groups for job in group.jobs]

    def _drop(self) -> None:
        """Remove jobs that are cancelled or past their deadline."""
        now = time.monotonic()
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled or now > job.deadline]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            self._deliver(job, ending="cancelled" if job.cancelled else "late")
        for group in [group for groups in self._groups.values() for group in groups]:
            rows = []
            for number, job in enumerate(group.jobs):
                if job.cancelled:
                    self._deliver(job, ending="cancelled")
                elif now > job.deadline:
                    self._deliver(job, job.text.finish(), "length")
                else:
                    rows.append(number)
            group.keep(rows)

    def _admissible(self) -> dict[str, list[GenerationJob]]:
        """The next jobs in order of arrival, as many as fit, by variant."""
        running = self._decoded()
        rows, tokens = len(running), sum(job.room for job in running)
        most = min(self.limits.batch, rows + _ADMITTED_AT_ONCE)
        chosen: dict[str, list[GenerationJob]] = {}
        with self._changed:
            while self._waiting and rows < most:
                job = self._waiting[0]
                if rows and tokens + job.room > self.limits.cached_tokens:
                    break
                self._waiting.popleft()
                chosen.setdefault(job.model, []).append(job)
                rows, tokens = rows + 1, tokens + job.room
        return chosen

    def _read(self, name: str, jobs: list[GenerationJob], resumed: bool) -> None:
        """Run prompts and add their rows to the batch, or a prompt and its answer so far in a batch of its own."""
        with self.models.use(name):
            decoder = self.models.read(name, [(job.input_ids, job.images) for job in jobs])
            if resumed and jobs[0].tokens:
                self._run_tokens(decoder, torch.tensor([jobs[0].tokens]))
        groups = self._groups[name]
        if resumed:
            groups.insert(0, _Group(decoder, jobs))  # new jobs join the last group
            return
        if groups and groups[-1].decoder is not None and self.models.joins:
            groups[-1].decoder.join(decoder)
            groups[-1].jobs += jobs
        else:
            groups.append(_Group(decoder, jobs))

    def _step(self, name: str, group: _Group) -> None:
        """Sample one token per row, then run it for the rows that continue."""
        decoder = group.decoder
        assert decoder is not None
        going, tokens = [], []
        for number, (job, token) in enumerate(zip(group.jobs, choose(decoder.logits, group.jobs), strict=True)):
            try:
                if isinstance(token, ModelError):
                    raise token
                goes_on = self._deliver_token(job, token)
            except Exception as error:
                self._fail(job, error)
                continue
            if goes_on:
                going.append(number)
                tokens.append(token)
        group.keep(going)
        self.steps += 1
        if going:
            with self.models.use(name):
                self._run_tokens(decoder, torch.tensor(tokens)[:, None])

    def _run_tokens(self, decoder: Decoder, tokens: Tensor) -> None:
        """Run further tokens of every row, int64 ``[B, t]``."""
        table: Any = self.models.assembly.model.get_input_embeddings()
        ids = tokens.to(decoder.logits.device)
        decoder.extend(table(ids), torch.ones_like(ids))

    def _deliver_token(self, job: GenerationJob, token: int) -> bool:
        """Deliver one token; returns whether the answer continues."""
        if token in self.models.stops:
            self._deliver(job, job.text.finish(), "stop")
            return False
        job.tokens.append(token)
        job.occurrences[token] += 1
        text = job.text.add(token)
        if job.text.stopped:
            self._deliver(job, text, "stop")
        elif len(job.tokens) >= job.sampling.max_tokens:
            self._deliver(job, text + job.text.finish(), "length")
        else:
            if text:
                self._deliver(job, text)
            return True
        return False

    @staticmethod
    def _deliver(job: GenerationJob, text: str = "", ending: Ending | None = None) -> None:
        try:
            job.deliver(AnswerPart(text=text, ending=ending, tokens=len(job.tokens)))
        except RuntimeError:  # the client's event loop is closed
            job.cancelled = True


def _log(what: str, error: Exception) -> None:
    logger.error("%s: %s", what, redacted_traceback(error))
