"""What is held out of the training data is of whole pictures, whatever their form and name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from mm_moslora.compare import holdout
from mm_moslora.config import DataConfig, SourceConfig
from tests.compare.comparisons import RECIPE

FORMS = {
    "image": lambda name: {"image": name},
    "list": lambda name: {"images": [name]},
    "other spelling": lambda name: {"image": f"./{name}"},
    "copy": lambda name: {"image": f"copy-{name}"},
    "parts": lambda name: {"content": [{"type": "image", "image": name}, {"type": "text", "text": "?"}]},
    "with another": lambda name: {"images": [name, "unlike.png"]},
}


def _asked(number: int, form: str, folder: Path) -> dict[str, object]:
    """Question `number` about picture `number % 10`."""
    name = f"{number % 10}.png"
    for path, shade in (
        (folder / name, number % 10),
        (folder / f"copy-{name}", number % 10),
        (folder / "unlike.png", 99),
    ):
        if not path.is_file():
            Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)
    record = FORMS[form](name)
    marks = "<image>\n" * len(record.get("images", ["one"]))
    question = record.pop("content", f"{marks}?")
    return record | {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": str(number)}]}


def _held_out(tmp_path: Path, lines: list[dict[str, object]], share: float) -> tuple[list[str], list[str]]:
    """The answers that are kept and held out."""
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = dataclasses.replace(RECIPE, data=DataConfig(train=[SourceConfig(path=str(file))]))
    split = holdout.with_holdout(shared, tmp_path / "split", share=share, reuse=False).data
    kept, held = (
        [json.loads(line)["messages"][1]["content"] for line in Path(source.path).read_text().splitlines()]
        for source in (*split.train, *split.validation)
    )
    return kept, held


@pytest.mark.parametrize(("most", "expected"), [(1000, 40), (25, 20), (5, 10)], ids=["all", "fewer", "one picture"])
def test_the_most_that_is_held_out_is_of_whole_pictures(tmp_path: Path, monkeypatch, most: int, expected: int):
    """Ten pictures with ten questions each, four of them in the share; the records of a picture are not together."""
    monkeypatch.setattr(holdout, "MOST", most)
    lines = [_asked(i, "image", tmp_path) for i in range(100)]
    share = sorted(holdout._number(holdout._identity_of_file(tmp_path / f"{i}.png")) for i in range(10))[4]
    kept, held = _held_out(tmp_path, lines, share)
    assert len(held) == expected
    assert len(kept) + len(held) == 100
    assert not {int(answer) % 10 for answer in kept} & {int(answer) % 10 for answer in held}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "image"])
def test_a_picture_is_one_in_every_form_and_under_every_name(tmp_path: Path, form: str):
    lines = [_asked(i, "image" if i % 3 else form, tmp_path) for i in range(60)]
    if form == "with another":  # one record links its two pictures, and with them all records about either
        lines = [_asked(i, form if i in (0, 1) else "image", tmp_path) for i in range(60)]
    kept, held = _held_out(tmp_path, lines, 0.5)
    groups = {int(answer) % 10 for answer in held}
    assert not groups & {int(answer) % 10 for answer in kept}
    assert form != "with another" or (0 in groups) == (1 in groups)
