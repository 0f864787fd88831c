"""Tokenised records on disk: each text is tokenised once for all runs, in parallel, and then read by number.

A cache is an Arrow file in a folder that is named by a hash of its inputs: the source's content, tokenizer, template,
length limit. The first process builds it while the others wait; it appears complete or not at all. An image is stored
as one id, however many tokens it expands to. A checksum finds damage; the cache is then built again.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, Encoded
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.data.sources.record_file import RecordSource
from mm_moslora.data.worker_processes import in_processes, usable_processes
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import building, read_json, set_aside, sync
from mm_moslora.utils.folder_marks import is_built
from mm_moslora.utils.identity import sha256_of, sha256_of_text
from mm_moslora.utils.untrusted_data import parse_json

logger = logging.getLogger(__name__)

VERSION = 6
"""Version of the format and of what is read and written, part of a cache's name; no other one is read."""
_ROWS = 512
"""Records that a process tokenises at a time, and of a batch of the file."""
_RECORDS, _SUM = "records.arrow", "sum.json"

Encode = Callable[[Record], Encoded]


class TokenCache:
    """The tokenised records of one source; an image has `tokens_per_image`, or its own where these differ (1)."""

    def __init__(
        self, folder: Path, source: RecordSource, *, image_token_id: int | None, tokens_per_image: int
    ) -> None:
        import pyarrow

        if read_json(folder / _SUM, str) != sha256_of(folder / _RECORDS):
            raise ValueError("its checksum differs")
        self.source, self.image_token_id, self.tokens_per_image = source, image_token_id, tokens_per_image
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / _RECORDS)))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        table = pyarrow.Table.from_batches(self._batches)
        self.lengths: NDArray[np.int32] = table["length"].to_numpy()
        """Tokens of every record, visual tokens included; 0 for a bad one."""
        self.has_image: NDArray[np.bool_] = table["named"].to_numpy() > 0
        self.dropped: NDArray[np.int32] = table["dropped"].to_numpy()
        """Turns that did not fit."""
        bad = np.flatnonzero(table["fault"].is_valid().to_numpy())
        self.faults: dict[int, str] = {int(row): table["fault"][int(row)].as_py() for row in bad}
        """Row of a bad record -> its fault, as `_row` writes it."""

    def fault(self, row: int) -> RecordError:
        """The error of a row in `faults`."""
        name, code, field, what, remedy, path = parse_json(self.faults[row], surrogates=True)
        where = self.source.where(row)
        where = where.named(name) if name is not None else where
        return where.error(Code(code), field, what, remedy, path=path)

    def encoded(self, row: int) -> Encoded:
        """A tokenised record."""
        if row in self.faults:
            raise self.fault(row)
        rows = self._batches[0].num_rows
        batch, place = self._batches[row // rows], row % rows
        ids = batch["ids"][place].values.to_numpy().astype(np.int64)
        supervised, weights = batch["supervised"][place].values.to_numpy(zero_copy_only=False), None
        if batch["weights"][place].is_valid:
            weights = batch["weights"][place].values.to_numpy().copy()
        images = batch["images"][place].as_py()
        if images and self.tokens_per_image > 1:
            times = np.where(ids == self.image_token_id, self.tokens_per_image, 1)
            ids, supervised = np.repeat(ids, times), np.repeat(supervised, times)
            weights = None if weights is None else np.repeat(weights, times)
        return Encoded(
            input_ids=torch.from_numpy(ids), supervised=torch.from_numpy(supervised), images=images,
            weights=None if weights is None else torch.from_numpy(weights), dropped_turns=int(self.dropped[row]),
        )  # fmt: skip


class SourceCache:
    """The cache of a source, built or not."""

    def __init__(
        self,
        root: Path,
        source: RecordSource,
        encoder: ConversationEncoder,
        *,
        encode: Encode,
        settings: str,
        tokens_per_image: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        name = f"{source.fingerprint()} {encoder.fingerprint()} {settings} {len(source)} {VERSION}"
        self.folder = root / sha256_of_text(name)[:32]
        self.source, self._encode, self._on_progress = source, encode, on_progress
        self._image_token_id, self._tokens_per_image = encoder.image_token_id, tokens_per_image

    def load(self) -> TokenCache:
        """The cache; build it first if it does not exist or is damaged."""
        if is_built(self.folder):
            with suppress(OSError, ValueError):
                return self._read()
        with self._locked(self.folder):
            if is_built(self.folder):
                try:
                    return self._read()
                except (OSError, ValueError) as error:
                    aside = set_aside(self.folder, "corrupt")
                    logger.warning("%s is damaged (%s), now %s; it is built again.", self.folder, error, aside.name)
            _write(self.folder, self._tokenised())
        return self._read()

    def _read(self) -> TokenCache:
        return TokenCache(
            self.folder, self.source, image_token_id=self._image_token_id, tokens_per_image=self._tokens_per_image
        )

    @staticmethod
    def _locked(folder: Path) -> AbstractContextManager[int]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return lock_file(folder.with_name(f"{folder.name}.lock"), wait=True)

    def _tokenised(self) -> Iterator[Any]:
        numbers = range(len(self.source))
        parts = [numbers[start : start + _ROWS] for start in range(0, len(numbers), _ROWS)]
        fold = functools.partial(
            _first_of_images, image_token_id=self._image_token_id, tokens_per_image=self._tokens_per_image
        )
        work = functools.partial(_tokenise, self.source, encode=self._encode, fold=fold)
        done = 0
        for batch in in_processes(work, parts, processes=usable_processes() if len(parts) > 4 else 1):
            yield batch
            done += batch.num_rows
            if self._on_progress is not None:
                self._on_progress(done, len(numbers))


def _write(folder: Path, batches: Iterable[Any]) -> None:
    """Write a cache of some `_tokenise`; the caller holds the lock."""
    import pyarrow

    with building(folder) as part:
        with pyarrow.ipc.new_file(str(part / _RECORDS), _schema()) as writer:
            for batch in batches:
                writer.write_batch(batch)
        (part / _SUM).write_text(json.dumps(sha256_of(part / _RECORDS)), encoding="utf-8")
        for path in part.iterdir():
            sync(path)


def _schema() -> Any:
    """The columns: ids, one of each image; flags, and weights where there are other ones than 0 and 1, of every id;
    expanded length, images, images named, turns dropped; the fault of a bad record, which has nothing else."""
    import pyarrow

    lists = {"ids": pyarrow.int32(), "supervised": pyarrow.bool_(), "weights": pyarrow.float32()}
    counts = dict.fromkeys(("length", "images", "named", "dropped"), pyarrow.int32())
    streams = {name: pyarrow.list_(kind) for name, kind in lists.items()}
    return pyarrow.schema(streams | counts | {"fault": pyarrow.string()})


def _tokenise(
    source: RecordSource, rows: Sequence[int], encode: Encode, fold: Callable[[NDArray[np.int32]], NDArray[np.bool_]]
) -> Any:
    """Some records as a batch of Arrow."""
    import pyarrow

    return pyarrow.RecordBatch.from_pylist([_row(source, row, encode, fold) for row in rows], schema=_schema())


def _row(
    source: RecordSource, row: int, encode: Encode, fold: Callable[[NDArray[np.int32]], NDArray[np.bool_]]
) -> dict[str, Any]:
    try:
        record = source[row]
        encoded = encode(record)
    except RecordError as error:
        fault = [error.where.id, error.code.value, error.field, error.what, error.remedy, error.path]
        return {"length": 0, "images": 0, "named": 0, "dropped": 0, "fault": json.dumps(fault)}
    tokens = encoded.input_ids.numpy().astype(np.int32)
    keep = fold(tokens)
    return {
        "ids": tokens[keep], "supervised": encoded.supervised.numpy()[keep],
        "weights": None if encoded.weights is None else encoded.weights.numpy()[keep],
        "length": len(tokens), "images": encoded.images, "named": len(record.images),
        "dropped": encoded.dropped_turns, "fault": None,
    }  # fmt: skip


def _first_of_images(
    tokens: NDArray[np.int32], *, image_token_id: int | None, tokens_per_image: int
) -> NDArray[np.bool_]:
    """All ids except the second and further ids of each image."""
    keep = np.ones(len(tokens), dtype=np.bool_)
    if image_token_id is not None and tokens_per_image > 1:
        positions = np.flatnonzero(tokens == image_token_id)
        keep[positions[np.arange(len(positions)) % tokens_per_image > 0]] = False
    return keep
