"""Generated data files and models; nothing is downloaded."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.scoring import named_parts
from mm_moslora_eval.scoring.answer_scoring import EXTRACTORS, JUDGED, METRICS
from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS, OVER_SAMPLES

from tests.eval.eval_data import picture, write_questions
from tests.eval.eval_fake import FakeModel


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture(autouse=True)
def own_rules() -> Iterator[None]:
    """Rules that a test's own files add are gone after it."""
    yield
    for table in (EXTRACTORS, METRICS, AGGREGATIONS, OVER_SAMPLES, JUDGED):
        if table._added:
            table._added.clear()
            named_parts._prepared.cache_clear()


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    """Twelve yes/no and colour questions on four pictures, LLaVA question format."""
    return write_questions(tmp_path / "data", count=12)


@pytest.fixture
def write_tsv(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    def write(rows: list[dict[str, Any]], name: str = "bench.tsv") -> Path:
        path = tmp_path / name
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, columns, delimiter="\t", restval="")
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


@pytest.fixture
def encoded() -> str:
    return base64.b64encode(picture(99)).decode()
