"""What a run forgets: the log-likelihood of general text, and harness tasks, before the first step and at the end."""

# `validate.forgetting: auto` measures what takes less than a tenth of the run's forward passes, by the times of a batch
# of each.

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mm_moslora
from mm_moslora.batch import Batch, Example
from mm_moslora.config import SourceConfig
from mm_moslora.data.batch_loader import largest_batch
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, TooLong
from mm_moslora.data.chat.guarded_tokens import SpecialTextError
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.open_sources import open_source
from mm_moslora.data.sources.record_file import RecordSource
from mm_moslora.reporting.verdicts import difference_of, forgetting_sentence
from mm_moslora.training.run_setup import Run
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.training.validation import Measure, moment_of, tasks_folder, undisturbed, whole_model
from mm_moslora.utils import distributed, files
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.identity import sha256_of_text
from mm_moslora.utils.untrusted_files import read_text

logger = logging.getLogger(__name__)

Forgotten = Callable[[Sequence[float], Sequence[float], "tuple[Path, Path] | None"], "list[dict[str, Any]]"]
"""Maps log-likelihoods before and after, and the folders of both tasks, to the rows of `forgetting.json`."""
FORGETTING, START = "forgetting.json", "forgetting_start.json"
"""Files in the run folder: the comparison, and the log-likelihoods of the start."""
SHARE = 0.1
"""Largest part of the run that `auto` spends on the model before the first step."""
GENERAL_TEXT = Path(mm_moslora.__file__).with_name("data") / "general_text.txt"
_DOCUMENTS, _TOKENS = 64, 512
"""Most documents of the general text, and most tokens of each."""


class Forgetting:
    """Measures a run at its two ends; nothing where `forgotten`, which compares them, is None."""

    def __init__(self, run: Run, measure: Measure | None, forgotten: Forgotten | None, stop: StopRequest) -> None:
        self.run, self.measure, self.stop = run, measure, stop
        self.forgotten = None if run.recipe.validate.forgetting == "never" else forgotten
        self.always = run.recipe.validate.forgetting == "always"

    def measure_start(self, *, tokens: float) -> None:
        """Measure the model before the first step, where it is worth its time in a run of so many tokens."""
        if self.forgotten is None:
            return
        with undisturbed(self.run.engine):
            texts = general_texts(self.run)
            most = math.inf if self.always else SHARE * self._least_seconds(tokens)
            seconds = self._seconds_of(texts[0]) * len(texts)
            if seconds > most:
                self._say("general text", seconds, most)
                return
            likelihoods = self._likelihoods(texts)
            with_tasks = self.measure is not None and self._measure_tasks(most - seconds)
        if distributed.is_main():
            start = {"text": likelihoods, "tasks": with_tasks, "content": _digest(texts)}
            files.replace_json(self.run.folder / START, start)

    def measure_end(self, *, validated: bool) -> dict[str, float]:
        """Measure the end if the start was measured, and write the comparison; returns metrics by name."""
        start = distributed.from_main(self._start() if self.forgotten and distributed.is_main() else None)
        if start is None or self.forgotten is None:
            return {}
        texts = general_texts(self.run)
        same = start["content"] == _digest(texts)
        if not same and distributed.is_main():
            logger.warning(
                "validate.general_text was changed since the start of the run, so its likelihood is not compared."
            )
        with undisturbed(self.run.engine):
            after = self._likelihoods(texts) if same else []
        folders = [tasks_folder(self.run.folder, step) for step in (0, self.run.step)]
        metrics: dict[str, float] = {}
        with distributed.failing_together("Comparing the model with its start"):
            if distributed.is_main():
                both = (folders[0], folders[1]) if start["tasks"] and validated else None
                rows = self.forgotten(start["text"] if same else [], after, both)
                files.replace_json(self.run.folder / FORGETTING, rows)
                for row in rows:
                    metrics[f"forgetting/{row['what'].replace(' ', '_')}"] = row["after"] - row["before"]
                    if (difference := difference_of(row["difference"])) is not None:
                        logger.info("Forgetting, %s", forgetting_sentence(row["what"], difference))
        return distributed.from_main(metrics)

    def _start(self) -> dict[str, Any] | None:
        try:
            start = files.read_json(self.run.folder / START)
            text = [float(value) for value in start["text"]]
            return {"text": text, "tasks": start["tasks"] is True, "content": start["content"]}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("%s is damaged (%s), so forgetting is not reported.", self.run.folder / START, error)
            return None

    def _least_seconds(self, tokens: float) -> float:
        """The time of the run's forward passes, from one micro-batch on this machine."""
        batch = largest_batch(self.run.training_set.at_hand, self.run.limit)
        shares = distributed.world_size() // self.run.engine.copies
        return self._seconds_of(batch) * tokens / shares / batch.tokens

    def _seconds_of(self, batch: Batch) -> float:
        """Time of a batch on rank 0; a first pass compiles and tries kernels."""
        self.run.engine.evaluate([batch])
        began = time.monotonic()
        self.run.engine.evaluate([batch])
        return distributed.from_main(time.monotonic() - began)

    def _likelihoods(self, texts: Sequence[Batch]) -> list[float]:
        """Log-likelihood per token of every text; every rank computes all, so that each value is one document's."""
        sums = (self.run.engine.evaluate([text]).tolist() for text in texts)
        return [-loss / (weight or 1.0) for loss, _, weight, _ in sums]

    def _measure_tasks(self, most_seconds: float) -> bool:
        """Run the tasks; False where they take too long, or a signal has arrived."""
        assert self.measure is not None
        with whole_model(self.run.engine, self.run.assembly.model):
            scores = self.measure(moment_of(self.run, self.stop, most_seconds=most_seconds))
        (given_up,) = distributed.max_over_ranks([float(scores is None)])
        if given_up:
            self._say("validate.tasks", math.nan, most_seconds)
        return not given_up

    def _say(self, what: str, seconds: float, most: float) -> None:
        if distributed.is_main():
            about = "" if math.isnan(seconds) else f" ({seconds:.1f} s)"
            logger.info(
                "Forgetting is not measured on %s: it takes%s more than a tenth of the run (%.1f s). "
                "validate.forgetting: always measures it.", what, about, most,
            )  # fmt: skip


def _digest(texts: Sequence[Batch]) -> str:
    """A hash of the tokens of texts."""
    return sha256_of_text(repr([text.input_ids.tolist() for text in texts]))


def general_texts(run: Run) -> list[Batch]:
    """The documents of the general text as batches of one, evenly spaced if many; DataError where none can be used."""
    encoder = ConversationEncoder.of(run.assembly)
    limit = min(_TOKENS, run.recipe.data.max_length)
    batches: list[Batch] = []
    documents = _documents(run.recipe.validate.general_text)
    for number in range(min(_DOCUMENTS, len(documents))):
        try:
            turns = documents[number * len(documents) // min(_DOCUMENTS, len(documents))]()
            encoded = encoder.encode(turns, max_length=limit, truncate=True)
        except (RecordError, TooLong, SpecialTextError) as error:
            logger.warning("Left out of the general text: %s", error)
            continue
        example = Example(id=str(number), input_ids=encoded.input_ids, supervised=encoded.supervised)
        batches.append(Batch.from_examples([example]))
    if not batches:
        raise DataError(
            f"No document of validate.general_text ({run.recipe.validate.general_text}) can be used. Write documents "
            "without pictures, with empty lines between them."
        )
    return batches


def _documents(path: str | None) -> list[Callable[[], Sequence[Turn]]]:
    """What gives the turns of every document."""
    if path is None or path.endswith(".txt"):
        try:
            text = read_text(GENERAL_TEXT if path is None else Path(path))
        except UnicodeDecodeError as error:
            raise DataError(f"validate.general_text {path} is not UTF-8 text ({error}). Convert it.") from error
        return [partial(_document, part.strip()) for part in text.split("\n\n") if part.strip()]
    source = open_source(SourceConfig(path=path))
    return [partial(_turns, source, row) for row in range(len(source))]


def _document(text: str) -> Sequence[Turn]:
    return [Turn(role="document", text=text)]


def _turns(source: RecordSource, row: int) -> Sequence[Turn]:
    turns = source[row].turns
    if any(turn.images for turn in turns):
        raise TooLong("a record with pictures is no general text")
    return turns
