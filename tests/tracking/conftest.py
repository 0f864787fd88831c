"""The `read_run` fixture reads an offline `.wandb` file: LevelDB log framing around wandb's own protobuf records."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def _records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    assert data[:4] == b":W&B", "not a wandb file"
    position, parts = HEADER, []
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (1, 4):  # the whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def _read_run(folder: Path) -> dict[str, Any]:
    """History rows, config, exit code and id of the only run under `folder`."""
    (path,) = folder.rglob("*.wandb")
    run: dict[str, Any] = {
        "history": [],
        "config": {},
        "artifacts": [],
        "files": [],
        "exit": None,
        "folder": path.parent,
    }
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            run["history"].append(row)
        elif kind == "run":
            run["id"], run["project"] = record.run.run_id, record.run.project
            run["config"] |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "artifact":
            run["artifacts"].append((record.artifact.type, record.artifact.name, list(record.artifact.aliases)))
            run["files"] += [(entry.path, Path(entry.local_path)) for entry in record.artifact.manifest.contents]
        elif kind == "exit":
            run["exit"] = record.exit.exit_code
    return run


@pytest.fixture
def read_run() -> Callable[[Path], dict[str, Any]]:
    def read(folder: Path) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while True:  # wandb's service writes the last block a moment after finish() has returned
            run = _read_run(folder)
            if run["exit"] is not None or time.monotonic() > deadline:
                return run
            time.sleep(0.1)

    return read
