"""Answers that are stored already, behind the runner's `Model` protocol: score what another program has produced."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moslora.errors import EvalError

from .model import Answer, OptionRequest, OptionScore, Request

_IDS = ("id", "question_id", "index")
_TEXTS = ("text", "prediction")


class ReplayModel:
    """Answers by document id.

    Args:
        path: JSONL of ours (`answers.jsonl`, `samples.jsonl`) or LLaVA's (`question_id`, `text`), a JSON list or
            mapping, or a TSV with VLMEvalKit's `index` and `prediction`.

    Raises:
        EvalError: not such a file, or an id that occurs twice with different answers.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise EvalError(f"{path} is missing; replay needs a file with stored answers.")
        data = path.read_bytes()
        self._path = path
        self._fingerprint = hashlib.sha256(data).hexdigest()
        self._rows: dict[str, Mapping[str, Any]] = {}
        for number, row in enumerate(_rows(path, data), start=1):
            name = next((str(row[key]) for key in _IDS if row.get(key) is not None), None)
            if name is None:
                raise EvalError(f"{path}, row {number} has none of the columns {', '.join(_IDS)}.")
            if "question_id" in row and "image" in row:
                raise EvalError(f"{path}, row {number} is a question; replay needs a file with answers.")
            if not any(key in row for key in (*_TEXTS, "options", "logprobs")):
                raise EvalError(f"{path}, row {number} has no answer; expected a column {' or '.join(_TEXTS)}.")
            if name in self._rows and _text(self._rows[name]) != _text(row):
                raise EvalError(f"{path} holds two different answers to {name!r}; keep one.")
            self._rows[name] = row

    @property
    def name(self) -> str:
        """For people."""
        return f"replay of {self._path}"

    @property
    def fingerprint(self) -> str:
        """Hash of the file."""
        return self._fingerprint

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """Look the answers up; the first one that is not there ends the generator with an error."""
        for index, request in enumerate(requests):
            row = self._row(request.id)
            text = _text(row)
            if text is None:
                raise RuntimeError(f"the stored answer to {request.id!r} is a failure: {row.get('error')}")
            cut = row.get("finish_reason") == "length"
            yield (
                index,
                Answer(text=text, tokens=int(row.get("tokens") or 0), finish_reason="length" if cut else "stop"),
            )

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """Look the option scores up."""
        for index, item in enumerate(requests):
            row = self._row(item.request.id)
            known: Any = row.get("options") if isinstance(row.get("options"), dict) else row.get("logprobs")
            try:
                scores = tuple(OptionScore(logprob=float(known[option]), tokens=1) for option in item.options)
            except (KeyError, TypeError, ValueError) as error:
                raise RuntimeError(f"no stored log-likelihood for every option of {item.request.id!r}") from error
            yield index, scores

    def close(self) -> None:
        """Nothing to free."""

    def _row(self, name: str) -> Mapping[str, Any]:
        if name not in self._rows:
            raise RuntimeError(f"{self._path} holds no answer to {name!r}")
        return self._rows[name]


def _text(row: Mapping[str, Any]) -> str | None:
    value = next((row[key] for key in _TEXTS if row.get(key) is not None), None)
    return None if value is None else str(value)


def _rows(path: Path, data: bytes) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".tsv":
        from .sources.tsv import read_columns

        yield from read_columns(path)
        return
    try:
        text = data.decode("utf-8-sig")
        if path.suffix == ".json":
            loaded = json.loads(text)
            if isinstance(loaded, dict):
                loaded = [{"id": name, "text": answer} for name, answer in loaded.items()]
        else:
            loaded = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EvalError(f"{path} is not UTF-8 JSON ({error}).") from error
    if not isinstance(loaded, list) or not all(isinstance(row, dict) for row in loaded):
        raise EvalError(f"{path} must hold objects, one per answer.")
    yield from loaded
