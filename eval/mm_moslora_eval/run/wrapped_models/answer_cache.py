"""Answers that several run folders share, found by everything that decides them.

    FOLDER/MODEL/            by weights, processing, precision, attention, device and versions
        model.json           the model, for people
        answers-*.jsonl      one per process, as in a run; put together by the last one that leaves

The key of an answer is the request itself: messages with the places of pictures, the pictures' content, decoding,
options. Tasks and protocols that ask the same of a model share it. Processes on several machines write at the same
time, each into a file of its own. A damaged entry is asked again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import DataError, EvalError
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import make_subfolder, replace_json
from mm_moslora.utils.untrusted_data import parse_object
from mm_moslora_eval.protocol.model_interface import Answer, Model, OptionRequest, OptionScore, Request
from mm_moslora_eval.run import provenance
from mm_moslora_eval.run.answer_log import AnswerLog, Row, merge, read_folder
from mm_moslora_eval.run.wrapped_models.wrapped_model import WrappedModel
from mm_moslora_eval.sources.document import digest
from mm_moslora_eval.sources.image_controls import Hasher

logger = logging.getLogger(__name__)

FORMAT = 1
_NOT_ASKED = ("id", "aliases", "images")
"""Parts of a request that are names; pictures count by their content."""
_VERSIONS = ("mm-moslora", "torch", "transformers", "pillow")
_MANY_FILES = 16
_FLUSHED_ROWS = 32
_TRIES = 50


class CachedModel(WrappedModel):
    """A model whose answers are looked up before it is asked, and kept.

    Args:
        model: the model.
        folder: the cache; it may be shared.
    """

    def __init__(self, model: Model, folder: Path) -> None:
        self._model = model
        identity = {"format": FORMAT, "fingerprint": model.fingerprint, **_computation(model)}
        self.folder = folder / digest(identity)[:32]
        make_subfolder(self.folder)
        if not (self.folder / "model.json").exists():
            replace_json(self.folder / "model.json", {"name": model.name, **identity})
        self._rows = read_folder(self.folder)
        self._hash, self._open = Hasher(), ExitStack()
        self._log: AnswerLog | None = None
        self.found = self.asked = 0

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """See `Model.generate`."""
        ask = partial(self._model.generate, batch_size=batch_size)
        return self._answered(requests, ask, _answer_row, _answer_of)

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """See `Model.loglikelihood`."""
        ask = partial(self._model.loglikelihood, batch_size=batch_size)
        return self._answered(requests, ask, _options_row, _options_of)

    def _answered(
        self, requests: Sequence[Any], ask: Callable[[Sequence[Any]], Iterator[tuple[int, Any]]],
        row_of: Callable[[Any], Row], result_of: Callable[[Row], Any],
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        keys = [self._key(request) for request in requests]
        missing = []
        for index, key in enumerate(keys):
            result = self._stored(key, result_of)
            if result is None:
                missing.append(index)
            else:
                self.found += 1
                yield index, result
        if not missing:
            return
        for number, result in ask([requests[index] for index in missing]):
            index = missing[number]
            self.asked += 1
            if (key := keys[index]) is not None:
                self._store(row_of(result) | {"key": key})
            yield index, result
        if self._log is not None:
            self._log.flush()

    def _key(self, request: Request | OptionRequest) -> str | None:
        """Hash of all that is asked; None if it cannot be told, such as for a picture that cannot be read."""
        asked = request.request if isinstance(request, OptionRequest) else request
        with suppress(DataError, OSError, TypeError):
            pictures = [self._hash(image) for image in asked.images]
            return digest([type(request).__name__, _plain(request), pictures])
        return None

    def _stored(self, key: str | None, result_of: Callable[[Row], Any]) -> Any:
        row = self._rows.get(key) if key is not None else None
        if row is None:
            return None
        with suppress(KeyError, TypeError, ValueError):
            if row["sum"] == _checksum(row):
                return result_of(row)
        logger.warning("%s: a damaged entry is asked again.", self.folder)
        return None

    def _store(self, row: Row) -> None:
        if self._log is None:
            self._log = self._opened_log()
        parts: Row = {"text": None, "tokens": 0, "finish_reason": None, "options": None, "error": None}
        row = parts | row
        row["sum"] = _checksum(row)
        self._log.add(row)
        self._rows[row["key"]] = row

    def _opened_log(self) -> AnswerLog:
        """A file of this process. One that another process puts together with ended ones meanwhile is left to it."""
        for _ in range(_TRIES):
            with suppress(BlockingIOError):
                return self._open.enter_context(AnswerLog(self.folder, rank=0, batch_size=_FLUSHED_ROWS))
        raise EvalError(f"{self.folder} takes no file: other processes lock each new one. Give another --answer-cache.")

    def close(self) -> None:
        """Close the cache, and free the model."""
        self._open.close()
        self._log = None
        if self.found or self.asked:
            logger.info(
                "Answer cache %s: %d of %d answers were there.", self.folder, self.found, self.found + self.asked
            )
        if len([*self.folder.glob("answers-*.jsonl")]) >= _MANY_FILES:
            with suppress(BlockingIOError), lock_file(self.folder / ".merge.lock", wait=False):
                merge(self.folder, ())
        self._model.close()


def _computation(model: Model) -> dict[str, Any]:
    """What may change the choice between near-equal tokens: precision, attention, device and versions."""
    details = dict(getattr(model, "details", {}))
    details.pop("threads", None)
    if "device" in details:
        details["device"] = details["device"].partition(":")[0] + details["device"].partition(" ")[2]
    versions = provenance.environment()
    return {"details": details, "versions": {name: versions[name] for name in _VERSIONS if name in versions}}


def _plain(value: Any) -> Any:
    """Plain data of a request, with the places of pictures apart from any text.

    Raises:
        TypeError: a part is none of what JSON holds, so it cannot be a key.
    """
    if is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in fields(value) if part.name not in _NOT_ASKED}
        return {type(value).__name__: {name: _plain(part) for name, part in parts.items()}}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} is no part of a key")


def _checksum(row: Row) -> str:
    rest = {name: value for name, value in row.items() if name != "sum"}
    return digest(parse_object(json.dumps(rest), constants=True))[:16]  # as it is read again


def _answer_row(answer: Answer) -> Row:
    return asdict(answer)


def _answer_of(row: Row) -> Answer:
    kept = {part.name: row[part.name] for part in fields(Answer) if part.name in row}
    if kept.get("reference") is not None:
        kept["reference"] = OptionScore(**kept["reference"])
    if kept.get("boxes") is not None:
        kept["boxes"] = tuple(tuple(box) for box in kept["boxes"])
    return Answer(**kept)


def _options_row(scores: Sequence[OptionScore]) -> Row:
    return {"options": {"scores": [asdict(score) for score in scores]}}


def _options_of(row: Row) -> tuple[OptionScore, ...]:
    return tuple(OptionScore(**score) for score in row["options"]["scores"])
