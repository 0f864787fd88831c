"""`--import FILE.py`: code of a user's own in this process, in ranks, in shards, in cells, and on resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from mm_moslora_eval.run.result_file import read_results
from mm_moslora_eval.scoring.answer_scoring import METRICS

from mm_moslora.cli import run
from mm_moslora.config import Recipe, SourceConfig
from mm_moslora.data.sources import open_sources
from mm_moslora.launch.imported_code import import_words, imported, without_imports
from mm_moslora.launch.topology import Topology, command
from mm_moslora.models.projectors import projector
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import read_json
from tests.eval.eval_data import write_questions

PROJECTOR = """
from torch import nn
from mm_moslora.models.projectors.projector import PROJECTORS, LinearProjector

class Plain(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.linear = nn.Linear(shape.vision_width, shape.language_width)

    def forward(self, features):
        return self.linear(features)

    tokens = staticmethod(LinearProjector.tokens)

PROJECTORS["plain_linear"] = Plain
"""
METRIC = """
from mm_moslora_eval.scoring.answer_scoring import METRICS

@METRICS.add
def always(parsed, document):
    return 1.0
"""


READER = """
import csv
from mm_moslora.data.sources.open_sources import READERS
from mm_moslora.data.sources.record_file import RecordSource

class CsvRecords(RecordSource):
    def __init__(self, path, rules):
        super().__init__(path, rules)
        with path.open(newline="") as stream:
            self.rows = list(csv.DictReader(stream))

    def __len__(self):
        return len(self.rows)

    def value(self, row):
        said = self.rows[row]
        turns = [{"from": "human", "value": said["question"]}, {"from": "gpt", "value": said["answer"]}]
        return {"id": str(row), "conversations": turns}

    def fingerprint(self):
        return sha256_of(self.path)

    content = fingerprint

READERS[".csv"] = CsvRecords
"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist. Name a file that ends in .py."),
        ("raise ValueError('odd')", "cannot be executed: ValueError: odd"),
        ("raise SystemExit(0)", "cannot be executed: ForeignExitError: it raised SystemExit: 0"),
        ("def", "cannot be executed: SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(content: str | None, message: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "own.py"
    if content is not None:
        file.write_text(content)
    assert run(["train", "recipe.yaml", "--import", str(file)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --import {file} ")
    assert message in line
    (text := tmp_path / "own.txt").touch()
    assert run(["--import", str(text), "eval", "list"]) == 1
    assert "own.txt is no Python file" in capsys.readouterr().err


def test_the_option_stands_anywhere_and_is_handed_to_ranks(tmp_path: Path) -> None:
    (file := tmp_path / "own.py").touch()
    assert without_imports(["--import", "a.py", "train", "--import=b.py", "x"]) == (
        ["train", "x"], [Path("a.py"), Path("b.py")],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="needs a file"):
        without_imports(["train", "--import"])
    with imported([file]):
        assert import_words() == [f"--import={file}"]
        for place in (Topology(), Topology(deepspeed=True, nproc=2), Topology(max_restarts=1)):
            assert f"mm_moslora --import={file} train r.yaml" in " ".join(command(place, ["train", "r.yaml"]))
    assert import_words() == []


def test_shards_of_an_evaluation_have_the_imported_metric(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "data", count=4)
    (own := tmp_path / "metric.py").write_text(METRIC)
    (task := tmp_path / "own.yaml").write_text(
        f"name: own\nsource: {{kind: llava, path: {questions}}}\nmetric: always\n"
    )
    (answers := tmp_path / "answers.json").write_text(json.dumps({f"q{number}": "?" for number in range(4)}))
    words = ["eval", "run", str(task), "--model", f"replay:{answers}", "--output", str(tmp_path / "run"), "--no-report"]
    try:
        assert run([*words, "--shards", "2", "--import", str(own)]) == 0
    finally:
        METRICS._added.clear()
    (result,) = read_results(tmp_path / "run")
    assert (result.score, result.n) == (1.0, 4)
    assert result.about["code"]["metric"]["file"] == str(own)


def test_two_ranks_have_the_imported_projector_and_resume_asks_for_it(
    recipe: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (own := tmp_path / "own_projector.py").write_text(PROJECTOR)
    plain = recipe.to_dict()
    plain["model"]["projector"] |= {"kind": "plain_linear"}
    plain["train"] |= {
        "zero": "zero2",
        "steps": 1,
        "global_batch": 2,
        "micro_batch": 1,
        "output": str(tmp_path / "run"),
    }
    (file := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    assert run(["train", str(file)]) == 1
    assert "'plain_linear'" in capfd.readouterr().err
    try:
        assert run(["launch", str(file), "--nproc", "2", "--import", str(own)]) == 0
    finally:
        projector.PROJECTORS.pop("plain_linear", None)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert list(read_json(checkpoint / "manifest.json")["base"]["imports"]) == ["--import own_projector.py"]
    capfd.readouterr()
    assert run(["train", str(file)]) == 1
    assert "is of a run with --import own_projector.py, which this command lacks" in capfd.readouterr().err
    own.write_text(PROJECTOR + "\n")
    try:
        assert run(["train", str(file), "--import", str(own)]) == 1
    finally:
        projector.PROJECTORS.pop("plain_linear", None)
    assert "The file of --import own_projector.py was changed since" in capfd.readouterr().err


def test_a_reader_of_an_imported_file_reads_records(tmp_path: Path) -> None:
    (own := tmp_path / "reader.py").write_text(READER)
    (tmp_path / "asked.csv").write_text("question,answer\nWhat?,That.\nWho?,She.\n")
    try:
        with imported([own]):
            source = open_sources.open_source(SourceConfig(path=str(tmp_path / "asked.csv")))
            assert len(source) == 2
            assert source.value(1)["conversations"][1] == {"from": "gpt", "value": "She."}
    finally:
        open_sources.READERS.clear()
