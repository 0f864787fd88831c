"""Records with boxes through the training set, its cache, the check, the page, the export and the evaluation."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from mm_moslora_eval.backends.transformers_model import TransformersModel
from mm_moslora_eval.protocol.model_interface import Request
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.run.task_runner import run_task
from mm_moslora_eval.sources import Source
from PIL import Image, ImageDraw
from vlms import FAMILIES, make_vlm

from mm_moslora.cli import run
from mm_moslora.config import DataConfig, ModelConfig, SourceConfig, VisionConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.preprocessing_print import preprocessing_of, write_preprocessing
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.export_huggingface import export_model
from mm_moslora.models.load_model import load
from mm_moslora.utils.errors import ConfigError, EvalError

SIZE, BOX = (80, 40), [8, 10, 40, 30]
PADDED = "[100, 375, 500, 625]"
"""The box in the square around the picture."""


def line(name: str, box: list[float], *, image: str = "a.png", answer: str = "<bbox>") -> dict:
    talk = [{"from": "human", "value": "<image>\nwhere is the <ref-object>?"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": talk, "objects": {"ref": ["square"], "bbox": [box]}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).rectangle((8, 10, 39, 29), fill="blue")
    image.save(tmp_path / "a.png")
    Image.new("RGB", (30, 90), "white").save(tmp_path / "tall.png")
    lines = [line("good", BOX), line("tall", [0, 0, 30, 30], image="tall.png"), line("outside", [8, 10, 90, 30])]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in lines))
    return path


@pytest.fixture(scope="module")
def assembled(language_folder: Path, vision_folder: Path):
    """Makes the parts of an assembled model, once per aspect."""
    made = {}

    def parts(aspect: str = "pad"):
        if aspect not in made:
            vision = VisionConfig(name=str(vision_folder))
            config = ModelConfig(language=str(language_folder), vision=vision, image_aspect=aspect)
            made[aspect] = load_parts(config, weights="none")
        return made[aspect]

    return parts


def set_of(path: Path, parts, **config) -> TrainingSet:
    config = DataConfig(**{"max_bad_share": 0.5, "max_length": 256} | config)
    sources = [SourceConfig(path=str(path))]
    return TrainingSet(sources, ConversationEncoder.of(parts), parts.image_processing, config=config)


def learned(data: TrainingSet, index: int) -> str:
    example = data[index]
    return str(data.encoder.tokenizer.decode(example.input_ids[example.supervised], skip_special_tokens=True))


def test_the_same_record_is_written_for_what_each_model_sees(data: Path, assembled) -> None:
    assert learned(set_of(data, assembled()), 0) == PADDED
    assert learned(set_of(data, assembled("resize")), 0) == "[100, 250, 500, 750]"
    whole = set_of(data, assembled())
    assert [index for index in range(3) if index not in whole.quarantine] == [0, 1]
    assert whole.quarantine.codes == {"BAD_BOX": 1}
    cropped = set_of(data, assembled("crop"), max_bad_share=0.9)
    assert cropped.quarantine.codes == {"BAD_BOX": 1, "BOX_CROPPED": 1}  # the upper third of a tall picture
    assert learned(cropped, 0) == "[0, 250, 500, 750]"


def test_the_cache_knows_the_form_and_a_changed_picture_is_left_out(data: Path, assembled, tmp_path: Path) -> None:
    kept = {"cache": str(tmp_path / "cache"), "max_bad_share": 0.9}
    for aspect, text in (("pad", PADDED), ("resize", "[100, 250, 500, 750]"), ("pad", PADDED)):
        assert learned(set_of(data, assembled(aspect), **kept), 0) == text
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2
    cached = set_of(data, assembled(), **kept)
    Image.new("RGB", (160, 40)).save(data.parent / "a.png")  # after its text was cached
    assert cached[0] is None
    assert cached.quarantine.codes == {"BAD_BOX": 2}


def test_special_tokens_of_a_form_are_tokens_and_typed_ones_are_text(data: Path, tmp_path: Path) -> None:
    folder = make_vlm(tmp_path / "vlm", "qwen2_vl")
    parts = load_parts(ModelConfig(vlm=str(folder)), weights="none")
    parts.tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|box_start|>", "<|box_end|>"]}, replace_extra_special_tokens=False
    )
    data.write_text(json.dumps(line("a", BOX, answer="<bbox>, not <|box_start|>")) + "\n")
    made = set_of(data, parts)
    ids = made[0].input_ids[made[0].supervised].tolist()
    start, end = (parts.tokenizer.convert_tokens_to_ids(name) for name in ("<|box_start|>", "<|box_end|>"))
    assert (ids.count(start), ids.count(end)) == (1, 1)
    inside = ids[ids.index(start) + 1 : ids.index(end)]
    assert parts.tokenizer.decode(inside) == "(100,250),(500,750)"
    assert "not <|box_start|>" in parts.tokenizer.decode(ids)


def test_a_ready_made_model_without_a_form_asks_for_the_key(data: Path, tmp_path: Path) -> None:
    folder = make_vlm(tmp_path / "vlm", "smolvlm")
    with pytest.raises(ConfigError, match=r"Set model\.boxes to one of"):
        set_of(data, load_parts(ModelConfig(vlm=str(folder)), weights="none"))
    named = load_parts(ModelConfig(vlm=str(folder), boxes="internvl"), weights="none")
    assert "[[100, 250, 500, 750]]" in learned(set_of(data, named, max_length=2048), 0)


@pytest.fixture
def recipe(data: Path, language_folder: Path, vision_folder: Path, tmp_path: Path) -> str:
    content = {
        "name": "t",
        "model": {"language": str(language_folder), "vision": {"name": str(vision_folder)}},
        "data": {"train": [{"path": str(data)}], "max_bad_share": 0.5},
        "train": {"output": str(tmp_path / "run")},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "recipe.yaml")


def test_the_check_counts_boxes_and_the_page_draws_them(recipe: str, tmp_path: Path, capsys) -> None:
    assert run(["data", "check", recipe, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["train"]
    assert (counts["boxes"], counts["bad"]) == (2, {"BAD_BOX": 1})
    page = tmp_path / "page.html"
    assert run(["data", "view", recipe, "--html", str(page), "--count", "3"]) == 0
    text = page.read_text()
    assert "BAD_BOX" in text
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("RGB"), dtype=int)
    pink = (shown[..., 0] > 180) & (shown[..., 1] < 140) & (shown[..., 2] > 80)
    (rows, _), (_, columns) = np.nonzero(pink), np.nonzero(pink[24:])  # below the label
    assert (rows.min(), rows.max()) == pytest.approx((10, 30), abs=1)
    assert (columns.min(), columns.max()) == pytest.approx((8, 40), abs=1)


def task(tmp_path: Path, metric: str) -> str:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(line("q", BOX)) + "\n" + json.dumps(line("bad", [40, 10, 8, 30])) + "\n")
    path = tmp_path / f"{metric}.yaml"
    source = {"kind": "llava", "path": str(held_out), "image_folder": str(tmp_path)}
    path.write_text(yaml.safe_dump({"name": metric, "source": source, "extraction": "boxes", "metric": metric}))
    return str(path)


def test_an_export_reads_its_boxes_back_and_evaluation_scores_them(
    recipe: str, data: Path, language_folder: Path, vision_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    config = ModelConfig(
        language=str(language_folder), vision=VisionConfig(name=str(vision_folder)), boxes="qwen2_5_vl"
    )
    parts = load_parts(config)
    exported = tmp_path / "export"
    export_model(parts, exported)
    write_preprocessing(preprocessing_of(parts), exported)
    assert load(exported).box_form == "qwen2_5_vl"
    side = parts.image.size
    said = f"the square is at {[round(value / 80 * side) for value in (8, 30, 40, 50)]}."
    monkeypatch.setattr(ConversationEncoder, "decode_answer", lambda *_: f"{said} or [0, 0, 1, 1]")
    tasks = [task(tmp_path, metric) for metric in ("iou", "iou_50")]
    command = ["eval", "run", *tasks, "--model", str(exported), "--output", str(tmp_path / "scores")]
    assert run([*command, "--max-failed-share", "0.6"]) == 0
    results = {item["task"]: item for item in json.loads((tmp_path / "scores" / "results.json").read_text())["results"]}
    assert results["iou_50"]["score"] == 0.5  # the other document has a bad box: it is counted, and wrong
    assert 0.4 < results["iou"]["score"] <= 0.5
    assert results["iou"]["counts"]["failed"] == 1
    capsys.readouterr()
    boxes = Task(name="t", source=Source(kind="llava", path=str(data)), extraction="boxes", metric="iou")
    with pytest.raises(EvalError, match="t@own scores boxes, and an endpoint gives texts alone"):
        run_task(SimpleNamespace(name="an endpoint"), boxes, tmp_path / "asked")


def test_a_ready_made_model_gives_its_boxes_in_pixels_of_the_file() -> None:
    model, processor = FAMILIES["qwen2_5_vl"]()
    backend = TransformersModel(model, processor, name="hf:tiny")
    request = Request(id="q", messages=(), images=(Image.new("RGB", (640, 480)),), boxes=(640, 480))
    tokens = processor.tokenizer.encode('[{"bbox_2d": [21, 14, 63, 42], "label": "dog"}]')  # of 84 x 56
    assert backend._answer(request, tokens, None).boxes == ((160, 120, 480, 360),)
    assert backend._answer(replace(request, boxes=False), tokens, None).boxes is None
