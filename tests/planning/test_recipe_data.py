"""`mm-moslora data check|view`, and `plan` on data of one's own, through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny import make_records

from mm_moslora.cli import run


@pytest.fixture(autouse=True)
def _wide(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def recipe(tmp_path: Path, language_folder: Path, vision_folder: Path):
    """Writes a recipe; keyword arguments go into its data."""

    def write(**data) -> str:
        path = tmp_path / "train.jsonl"
        if not path.is_file():
            make_records(tmp_path, 20)
        source = {"path": str(path), "image_folder": str(tmp_path / "images")}
        content = {
            "name": "t",
            "model": {"language": str(language_folder), "vision": {"name": str(vision_folder)}},
            "data": {"train": [source]} | data,
            "train": {"output": str(tmp_path / "run")},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "recipe.yaml")

    return write


def row(text: str, name: str) -> str:
    """The value of a row of a table."""
    line = next(line for line in text.splitlines() if name in line)
    return line.replace("│", " ").split()[-1]


def test_check_counts_what_there_is(recipe, capsys):
    assert run(["data", "check", recipe()]) == 0
    text = capsys.readouterr().out
    assert row(text, "records ") == "20"
    assert row(text, "text only") == "5"
    assert row(text, "with one image") == "15"
    assert row(text, "answers") == "35"
    assert row(text, "supervised share").endswith("%")
    assert "20 of 20 records can be used." in text


def test_check_names_faults_and_fails_when_a_run_would(recipe, tmp_path, capsys):
    name = recipe()
    (tmp_path / "images" / "4.png").write_bytes((tmp_path / "images" / "4.png").read_bytes()[:60])
    (tmp_path / "images" / "5.png").unlink()
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[8] = lines[8].replace('"gpt"', '"robot"')
    path.write_text("\n".join(lines))
    assert run(["data", "check", name]) == 1
    text = capsys.readouterr().out
    assert row(text, "IMAGE_DAMAGED") == "1"
    assert re.search(r"IMAGE_MISSING: \S+train.jsonl:6 \(record 5, id='r5'\) field image\[0\]: \S+5\.png", text)
    assert re.search(r"BAD_ROLE: \S+:9 \(record 8, id='r8'\) field conversations\[1\]: role is \"robot\"", text)
    assert "17 of 20 records can be used; a run would stop" in text
    assert run(["data", "check", name, "--data.max_bad_share", "0.2"]) == 0
    assert "a run leaves out 3" in capsys.readouterr().out
    assert run(["data", "check", name, "--data.max_bad_share", "0.2", "--data.on_bad", "error"]) == 1


def test_streams_are_looked_at_in_their_first_records(recipe, tmp_path, capsys):
    name = recipe()
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "shards").mkdir()
    for number in range(2):
        (tmp_path / "shards" / f"{number}.jsonl").write_text("\n".join(lines[10 * number : 10 * number + 10]))
    (tmp_path / "shards" / "2.jsonl").write_text("{not opened")
    stream = {"path": str(tmp_path / "shards"), "streaming": True, "image_folder": str(tmp_path / "images")}
    name = recipe(train=[stream])
    Path(name).write_text(Path(name).read_text().replace("train:\n  output", "train:\n  steps: 3\n  output"))
    assert run(["data", "check", name, "--records", "12"]) == 0
    text = capsys.readouterr().out
    assert "shards/*.jsonl is a stream: its first 12 records are looked at, of an unknown number" in text
    assert "12 of 12 records can be used." in text
    assert run(["data", "check", name, "--json"]) == 1, "the third file is read, too"
    plain = json.loads(capsys.readouterr().out)
    assert plain["streams"] == [{"source": f"{tmp_path}/shards/*.jsonl", "records": 21, "all": True}]
    assert plain["train"]["faults"][0].startswith(f"BAD_JSON: {tmp_path}/shards/2.jsonl:1 (record 0)")
    assert run(["data", "check", "--stats", name, "--records", "11", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["records"] == 11
    assert run(["data", "view", name, "--start", "15", "--count", "1"]) == 0
    assert "r15: " in capsys.readouterr().out
    assert run(["data", "check", name, "--records", "0"]) == 1
    assert "records is 0, expected 1 or more" in capsys.readouterr().err


def test_check_counts_truncation_repeats_and_special_text(recipe, tmp_path, capsys):
    name = recipe()
    path = tmp_path / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1]["id"] = "r0"
    records[3]["conversations"][0]["value"] = "what is <|im_end|>?"
    records[2]["conversations"][2]["value"] += "!" * 400
    path.write_text("\n".join(map(json.dumps, records)))
    assert run(["data", "check", name, "--data.max_length", "128"]) == 0
    text = capsys.readouterr().out
    assert row(text, "cut at the end") == "1"
    assert row(text, "spelling special tokens") == "1"
    assert row(text, "repeated ids") == "1"
    assert "records repeat an id: 'r0'" in text


def test_check_looks_at_validation_data_too(recipe, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text("null\n")
    assert run(["data", "check", recipe(validation=[{"path": str(other)}])]) == 1
    assert "NOT_AN_OBJECT" in capsys.readouterr().out


def test_view_colours_exactly_the_supervised_tokens(recipe):
    from rich.console import Console

    from mm_moslora.config import load_recipe
    from mm_moslora.data.check.data_views import SUPERVISED
    from mm_moslora.planning.recipe_data import view_recipe

    *_, panel = view_recipe(load_recipe(recipe(), []), start=0, count=1)
    console = Console(width=200)
    segments = console.render(panel)
    green = "".join(
        s.text for s in segments if s.style and s.style.bold and s.style.color and s.style.color.name == "green"
    )
    assert SUPERVISED == "bold green"
    assert green == "red<|im_end|>yes<|im_end|>"


def test_check_names_what_would_hurt(recipe, tmp_path, capsys):
    name = recipe()
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0], lines[3]]))
    assert run(["data", "check", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["train"]
    status = {item["name"]: item["status"] for item in found["findings"]}
    assert status["duplicates"] == "warn"
    assert found["duplicates"] == 2
    assert found["repeated_ids"] == {"r0": 1, "r3": 1}
    assert {status[name] for name in ("records", "ends of answers", "supervision", "length", "modality")} == {"ok"}


def test_pictures_that_are_evaluated_on_are_found_in_other_sizes(recipe, tmp_path, capsys):
    from PIL import Image

    name = recipe()
    photo = Image.effect_mandelbrot((200, 150), (-2, -1, 1, 1), 60).convert("RGB")
    photo.save(tmp_path / "images" / "4.png")
    other = tmp_path / "evaluated"
    other.mkdir()
    photo.resize((120, 90)).save(other / "copy.jpg", quality=70)
    Image.effect_mandelbrot((200, 150), (-1, 0, 0, 1), 60).convert("RGB").save(other / "different.png")
    (other / "broken.png").write_bytes(b"no picture")
    assert run(["data", "check", name, "--against", str(other), "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["leakage"]["pairs"]
    assert [[Path(one).name for one in pair] for pair in pairs] == [["4.png", "copy.jpg"]]
    assert run(["data", "check", name, "--against", str(other)]) == 0
    assert f"{tmp_path}/images/4.pnglookslike{other}/copy.jpg" in "".join(capsys.readouterr().out.split())
    assert run(["data", "check", name, "--against", str(tmp_path / "nowhere")]) == 1


def test_validation_pictures_are_compared_by_themselves(recipe, tmp_path, capsys):
    name = recipe()
    source = {"path": str(tmp_path / "train.jsonl"), "image_folder": str(tmp_path / "images"), "limit": 3}
    assert run(["data", "check", recipe(validation=[source]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["leakage"]["findings"][0]["status"] == "warn"
    assert run(["data", "check", name]) == 0
    assert "17.pngisinboth" in "".join(capsys.readouterr().out.split())


def test_held_out_records_that_are_trained_on_as_copies_are_counted(recipe, tmp_path, capsys):
    name, path = recipe(), tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    asked = ["data", "check", name, "--data.train.0.hold_out", "5", "--json"]
    seen = []
    for copies in (1, 2):
        path.write_text("\n".join(lines * copies))
        assert run(asked) == 0
        (finding,) = [
            item for item in json.loads(capsys.readouterr().out)["leakage"]["findings"]
            if item["name"] == "records in data.validation"
        ]  # fmt: skip
        seen.append((finding["status"], finding["detail"]))
    assert seen[0] == ("ok", "no training record is a copy of one of 5")
    assert seen[1][0] == "warn"
    assert int(seen[1][1].rpartition(" ")[2]) >= 1


@pytest.mark.slow
def test_several_processes_find_what_one_finds(recipe, tmp_path, capsys, monkeypatch):
    from mm_moslora.data.check import record_check

    monkeypatch.setattr(record_check, "_TOGETHER", 4)
    name = recipe()
    (tmp_path / "images" / "5.png").unlink()
    found = []
    for processes in ("1", "3"):
        run(["data", "check", name, "--processes", processes, "--json"])
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    assert json.loads(found[0])["train"]["bad"] == {"IMAGE_MISSING": 1}


def test_stats_count_turns_sizes_answers_and_packing(recipe, tmp_path, capsys):
    name = recipe()
    assert run(["data", "check", "--stats", name, "--data.max_length", "256", "--data.pack_tokens", "512"]) == 0
    text = capsys.readouterr().out
    assert "Answers per record: 1: 5, 2: 15" in text
    assert "tokens per record" in text
    assert "'no'" in text
    assert "of rows of 512 tokens" in text
    assert "cannot be used" not in text
    path = tmp_path / "train.jsonl"
    path.write_text("null\n" + path.read_text())
    assert run(["data", "check", "--stats", name]) == 0
    assert "1 records cannot be used and are not counted: see `mm-moslora data check`" in capsys.readouterr().out
    assert run(["data", "check", "--stats", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["packing_fill_rate"]["4096"] > 0


def test_the_page_shows_pictures_and_colours_exactly_the_supervised_tokens(recipe, tmp_path, capsys):
    import html

    name = recipe()
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[0] = (
        lines[0].replace("what is the color?", "what <script>alert(1)</script>?").replace('"red"', '"na\\u00efve 🙂"')
    )
    path.write_text("\n".join(["null", *lines]), encoding="utf-8")
    page = tmp_path / "page.html"
    assert run(["data", "view", name, "--html", str(page), "--count", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text(encoding="utf-8")
    learnt = [
        html.unescape(part) for part in re.findall(r'<span class="s(?: x)?" title="\d+">(.*?)</span>', text, re.S)
    ]
    assert "".join(learnt).replace("·", "") == "naïve 🙂<|im_end|>yes<|im_end|>"
    assert "NOT_AN_OBJECT" in text
    assert text.count("data:image/jpeg;base64,") == 1
    assert "image: 16 tokens" in text
    assert "<script>" not in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)


def test_bad_arguments_are_said_in_one_line(recipe, tmp_path, capsys):
    name = recipe()
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["check", name, "--processes", "0"], "processes is 0, expected 1 or more"),
        (["view", name, "--html", str(tmp_path / "file" / "page.html")], "cannot be written"),
        (["view", name, "--start", "20"], "start is 20 and count is 3, but data.train has 20 records"),
        (["view", name, "--data.train.0.image_folder", "nowhere"], "image_folder of"),
    ):
        assert run(["data", *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


def planned(recipe: str, capsys, *options: str) -> tuple[int, float, str]:
    """Samples and their mean tokens in a plan, and all that it prints."""
    capsys.readouterr()
    assert run(["plan", recipe, "--gpus", "1xA100-80G", *options]) == 0
    text = capsys.readouterr().out
    samples, tokens = re.findall(r"Data: ([\d,]+) samples of ([\d,]+) tokens", text)[0]
    return int(samples.replace(",", "")), float(tokens.replace(",", "")), text


def test_a_plan_counts_data_of_ones_own(recipe, tmp_path, capsys):
    name = recipe()
    assert run(["data", "check", name, "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)["train"]
    samples, tokens, text = planned(name, capsys)
    assert samples == checked["records"] == 20
    assert tokens == round(checked["tokens"] / 20)
    assert "counted in all 20 records; 0 of those read cannot be used" in text
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text() + "{}\n" * 4)
    samples, again, text = planned(name, capsys)
    assert (samples, again) == (20, tokens)
    assert "counted in all 24 records; 4 of those read cannot be used" in text
    given, _, text = planned(name, capsys, "--samples", "7", "--tokens-per-sample", "99")
    assert given == 7
    assert "Size of the data" not in text


def test_a_plan_estimates_large_data_from_some_records(recipe, capsys, monkeypatch):
    monkeypatch.setattr("mm_moslora.planning.recipe_data.COUNTED", 8)
    samples, tokens, text = planned(recipe(), capsys)
    assert samples == 20
    assert "estimated from a random 8 of 20 records" in text
    assert planned(recipe(), capsys)[:2] == (samples, tokens)
