"""Published answers through task and protocol, from folders in the layouts of the benchmarks' repositories."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    sys.modules.pop("published_answers", None)
    return importlib.import_module("scores_reproduced")


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def math_v(folder: Path) -> None:
    options = ["A", "B", "C", "D", "E"]
    common = {"question": "q <image1>", "level": 1, "subject": "algebra", "solution": None, "image": "images/1.jpg"}
    lines(
        folder / "MATH-V" / "data" / "test.jsonl",
        [
            {"id": "1", "options": [], "answer": "4.5", **common},
            {"id": "2", "options": options, "answer": "B", **common},
            {"id": "3", "options": options, "answer": "C", **common},
        ],
    )
    said = (("\\boxed{\\frac{9}{2}}", True), ("The answer is B", True), ("A", True))  # the last verdict is wrong
    rows = [{"id": str(n), "response": text, "correct": right} for n, (text, right) in enumerate(said, start=1)]
    lines(folder / "MATH-V" / "outputs" / "open" / "Some-CoT.jsonl", rows)


def mmmu(folder: Path) -> None:
    rows = [
        {"id": f"test_Art_{n}", "question": "<image 1>?", "options": "['y', 'A']", "answer": "A", "response": text,
         "if_right": right}
        for n, (text, right) in enumerate([("Answer: A", True), ("So (B) it is. Answer: A", True), ("no idea", True)])
    ]  # fmt: skip
    lines(folder / "MMMU" / "mmmu-pro" / "output" / "m_vision_direct.jsonl", rows)


def test_every_file_goes_through_its_task_and_the_rules_of_others(script: ModuleType, tmp_path: Path) -> None:
    math_v(tmp_path)
    mmmu(tmp_path)
    rows = []
    for number, run in enumerate(script.found_in(tmp_path, [])):
        place = tmp_path / str(number)
        place.mkdir()
        rows.append(script.reproduce(run, place))
    first, second = rows
    assert first.run.task == "mathvision_test@official_cot"
    assert (first.run.published, round(first.score, 2), first.differ) == (100.0, 66.67, 1)
    assert second.run.task == "mmmu_pro_vision@official"
    assert (round(second.score, 2), second.unread, second.differ) == (66.67, 1, 1)
    assert second.others == {"lmms_eval": 0.0, "vlmevalkit": pytest.approx(100 / 3)}
    table = script.reproduced_table(rows)
    assert "| mmmu_pro_vision@official | m | mmmu-pro/output | 100.00 | 66.67 | 1 |" in table
    assert "Read as nothing: 1." in table
    assert "| mmmu_pro_vision | m | official | 66.67 | lmms_eval | 0.00 | -66.67 |" in script.conformance_table(rows)


def test_a_folder_without_answers_is_an_error_that_names_the_repositories(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds none of MATH-V, MMMU"):
        script.main([str(tmp_path)])
