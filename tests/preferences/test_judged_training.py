"""Runs with `objective: kto` on tiny real models: what they learn, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pairs import logged, make_judged, make_recipe, plain_recipe

from mm_moslora.cli.cli_app import run as command
from mm_moslora.models.load_model import load
from mm_moslora.preferences.preference_setup import JudgedCollator, prepare
from mm_moslora.preferences.preference_training import train_preferences
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.identity import sha256_of

pytest.importorskip("trl", reason="trl is not installed")
WHOLE = {"steps": 16, "global_batch": 24, "micro_batch": 24}


def test_good_answers_gain_on_bad_ones_and_a_stopped_run_goes_on(
    vlm: Path, picture_pairs: Path, tmp_path: Path
) -> None:
    model, judged = {"vlm": str(vlm)}, make_judged(picture_pairs)
    straight = make_recipe(tmp_path / "straight", judged, model, objective="kto", train=WHOLE)
    result = train_preferences(straight)
    losses, margins = logged(tmp_path / "straight"), logged(tmp_path / "straight", "rewards/margins")
    assert losses[0] == pytest.approx(0.5, abs=1e-6)  # as for an answer of which the model thinks as the reference does
    assert margins[0] == pytest.approx(0, abs=1e-6)
    assert max(margins) > 0.05
    assert min(losses) < 0.495
    summary = read_json(tmp_path / "straight" / "summary.json")
    assert (summary["data"]["good"], summary["data"]["bad"]) == (12, 12)

    file = tmp_path / "run.yaml"  # the same from pairs, through the command line, in two sessions
    plain = plain_recipe(tmp_path / "run", picture_pairs, model, objective="kto", train=WHOLE)
    file.write_text(yaml.safe_dump(plain))
    assert command(["data", "check", str(file)]) == 0
    assert command(["train", str(file), "--stop-at", "5"]) == 0
    assert command(["train", str(file)]) == 0
    assert logged(tmp_path / "run") == losses
    adapter = Path("adapter", "moslora.safetensors")
    assert sha256_of(tmp_path / "run" / result.checkpoint.name / adapter) == sha256_of(result.checkpoint / adapter)
    assert command(["export", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    assert load(tmp_path / "model").processor is not None


def test_batches_are_those_of_trl(vlm: Path, picture_pairs: Path, tmp_path: Path) -> None:
    """TRL's own collator renders the processor's template: the same ids, masks, pixels and other answers."""
    from transformers import AutoProcessor
    from trl.trainer.kto_trainer import DataCollatorForVisionUnpairedPreference

    run = prepare(make_recipe(tmp_path / "run", make_judged(picture_pairs), {"vlm": str(vlm)}, objective="kto"))
    ours = JudgedCollator(run=run)([{"item": number, "held_out": 0} for number in (0, 1, 4)])
    rows = []
    for index in (0, 1, 4):
        (answer,) = run.records.answers(index)  # type: ignore[attr-defined]
        record = answer.record
        content = [{"type": "image"}, {"type": "text", "text": record.turns[0].parts()[-1].lstrip("\n")}]
        rows.append(
            {
                "images": [record.images[0].rgb()], "prompt": [{"role": "user", "content": content}],
                "completion": [{"role": "assistant", "content": record.turns[-1].text}], "label": answer.good,
            }
        )  # fmt: skip
    theirs = DataCollatorForVisionUnpairedPreference(AutoProcessor.from_pretrained(vlm))(rows)
    assert ours["label"].tolist() == theirs["label"].tolist() == [True, False, True]
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
    for name in ("", "KL_"):
        # TRL's completion holds the line break after the end of turn, too, which nobody generates.
        width = ours[f"{name}input_ids"].shape[1]
        kept = theirs[f"{name}attention_mask"][:, :width].bool() & ours[f"{name}attention_mask"].bool()
        assert torch.equal(ours[f"{name}input_ids"][kept], theirs[f"{name}input_ids"][:, :width][kept])
        extra = theirs[f"{name}completion_mask"][:, :width] - ours[f"{name}completion_mask"]
        assert int(extra.abs().sum(1).max()) <= 1
        shown = theirs[f"{name}mm_token_type_ids"][:, :width]
        assert torch.equal(ours[f"{name}mm_token_type_ids"][kept], shown[kept])
    assert not {"KL_pixel_values"} & ours.keys()


def test_answers_of_one_kind_and_answers_without_labels_are_named(
    text_pairs: Path, language_folder: Path, tmp_path: Path
) -> None:
    lines = make_judged(text_pairs).read_text().splitlines()
    model: dict[str, Any] = {"language": str(language_folder)}
    file = tmp_path / "good.jsonl"
    file.write_text("\n".join(lines[::2]))
    with pytest.raises(DataError, match="All 12 answers are good, and objective: kto learns from good and bad ones"):
        prepare(make_recipe(tmp_path / "a", file, model, objective="kto"))
    bare = {key: value for key, value in json.loads(lines[0]).items() if key != "label"}
    file.write_text("\n".join([json.dumps(bare), *lines]))
    run = prepare(make_recipe(tmp_path / "b", file, model, objective="kto", data={"max_bad_share": 0.1}))
    assert (run.records.quarantine.codes, len(run.records.usable)) == ({"NO_LABEL": 1}, 24)
    batch = JudgedCollator(run=run)([{"item": 22, "held_out": 0}])  # an answer alone is compared with the next one
    assert not torch.equal(batch["KL_input_ids"], batch["input_ids"])
