"""Reads offline `.wandb` files: LevelDB log framing around wandb's own protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waiting import wait_until
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
        if position + HEADER + length > len(data):
            return  # it is being written
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (1, 4):  # the whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def read_file(path: Path) -> dict[str, Any]:
    """History rows, config, artifacts, exit code and id of one file."""
    run: dict[str, Any] = {
        "history": [],
        "config": {},
        "artifacts": [],
        "files": [],
        "alerts": [],
        "summary": {},
        "exit": None,
        "preempting": False,
        "folder": path.parent,
    }
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            run["history"].append(row)
        elif kind == "run":
            run["id"], run["project"], run["name"] = record.run.run_id, record.run.project, record.run.display_name
            run["group"], run["job_type"] = record.run.run_group, record.run.job_type
            run["notes"], run["tags"] = record.run.notes, list(record.run.tags)
            run["config"] |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "artifact":
            run["artifacts"].append((record.artifact.type, record.artifact.name, list(record.artifact.aliases)))
            run["files"] += [(entry.path, Path(entry.local_path)) for entry in record.artifact.manifest.contents]
        elif kind == "alert":
            run["alerts"].append((record.alert.title, record.alert.text))
        elif kind == "summary":
            run["summary"] |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
        elif kind == "preempting":
            run["preempting"] = True
        elif kind == "exit":
            run["exit"] = record.exit.exit_code
    return run


def read_finished(path: Path) -> dict[str, Any]:
    """The same once its end is written: wandb's service writes the last block a moment after finish() has returned."""
    wait_until(lambda: read_file(path)["exit"] is not None, pause=0.1)
    return read_file(path)
