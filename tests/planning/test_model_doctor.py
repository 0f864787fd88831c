"""`doctor --model` finds what would train wrongly, by probes of the model itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_families import small_family
from tiny import make_language
from vlms import make_vlm

from mm_moslora.cli.doctor_verb import doctor
from mm_moslora.models.batching import packed_batch
from mm_moslora.planning import model_probes
from mm_moslora.planning.model_probes import diagnose_model, probe_model
from mm_moslora.utils.errors import AdapterError, ConfigError, ModelError
from mm_moslora.utils.files import read_json


def by_name(findings):
    return {item.name: item for item in findings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vlm(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with a copy of its configuration."""
    made = make_language(tmp_path_factory.mktemp("hostile"))
    shutil.copy(made / "config.json", made / "original.json")
    return made


def test_a_model_that_trains_right_gets_no_bad_finding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(model=str(folder)) == 0
    shown = capsys.readouterr().out
    for text in (
        "padding-free", "does not move the other", "[[A red square.<|im_end|>]]", "of the largest", "MoSLoRA",
        "model.visual.patch_embed.proj runs as a linear layer",
    ):  # fmt: skip
        assert text in " ".join(shown.split())


def test_a_language_model_is_probed_without_pictures(tmp_path: Path) -> None:
    found = by_name(diagnose_model(str(make_language(tmp_path))))
    assert {item.status for item in found.values()} == {"ok"}
    assert "[[Two, as you wish.<|im_end|>]]" in found["labels"].detail


def test_a_model_that_sees_without_a_chat_template_is_bad(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "chat_template.jinja").unlink()
    found = by_name(diagnose_model(str(copy)))
    assert found["chat template"].status == "bad"
    assert "Qwen2_5_VLProcessor has no chat template" in found["chat template"].detail
    assert not {"labels", "logits"} & found.keys()


def test_templates_of_language_models_may_be_missing_and_end_no_answer(tmp_path: Path) -> None:
    own = make_language(tmp_path) / "chat_template.jinja"
    text = own.read_text()
    own.write_text(text.replace("<|im_end|>", ""))
    found = by_name(diagnose_model(str(tmp_path)))
    assert {item.status for item in found.values()} == {"ok"}
    assert "[[Two, as you wish.<|im_end|>]]" in found["labels"].detail
    own.write_text(text.replace("<|im_start|>assistant", "<|im_start|>robot"))
    found = by_name(diagnose_model(str(tmp_path)))
    assert [item.name for item in found.values() if item.status != "ok"] == ["generation prompt"]
    assert r"robot\n', and answers are learned behind" in found["generation prompt"].detail
    own.unlink()
    found = by_name(diagnose_model(str(tmp_path)))
    assert {item.status for item in found.values()} == {"ok"}
    assert r"user:\nAnd two?\nassistant:\n[[Two, as you wish.<|im_end|>]]" in found["labels"].detail
    assert "14 layers" in found["a training step"].detail


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_hidden_layers": 10**9},
            r"num_hidden_layers of its config.json is 1,000,000,000, expected at most 4,096",
        ),
        ({"vocab_size": 10**12}, r"vocab_size of its config.json is 1,000,000,000,000"),
        ({"hidden_size": "64"}, r"configuration cannot be read .*hidden_size.* expected int"),
        ({"num_attention_heads": 0}, r"configuration cannot be read .integer modulo by zero"),
        ({"hidden_size": -64}, r"model.*(RuntimeError|ModelError|ValueError)"),
        ({"dtype": "os.system"}, r"configuration cannot be read .*os.system"),
    ],
)
def test_hostile_configurations_are_one_error_with_the_name_of_the_model(
    hostile: Path, values: dict[str, Any], message: str
) -> None:
    own = read_json(hostile / "original.json")
    (hostile / "config.json").write_text(json.dumps(own | values))
    with pytest.raises(ModelError, match=message) as caught:
        diagnose_model(str(hostile))
    assert str(hostile) in str(caught.value)


def test_wrong_positions_are_found_by_the_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = packed_batch._positions
    monkeypatch.setattr(packed_batch, "_positions", lambda *given: real(*given).flip(-1))
    found = by_name(diagnose_model(str(folder)))
    assert found["logits"].status == "bad"


def test_a_supervised_question_is_found_by_the_labels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_probes.example_of

    def supervise_all(*given):
        example = real(*given)
        example.supervised[1:] = True
        return example

    monkeypatch.setattr(model_probes, "example_of", supervise_all)
    found = by_name(diagnose_model(str(folder)))
    assert found["labels"].status == "bad"
    assert "is learned, expected ['A red square.']" in found["labels"].detail


def test_a_family_whose_pictures_are_peculiar_trains_right() -> None:
    """Gemma 3 marks them by types of tokens, and its line breaks around them join those of the template."""
    found = by_name(probe_model(small_family("gemma3")))
    assert {found[name].status for name in ("labels", "logits", "a training step")} == {"ok"}


def test_a_refused_adapter_is_one_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given, **more):
        raise AdapterError("no place for it")

    monkeypatch.setattr(model_probes, "attach_adapters", refuse)
    found = by_name(diagnose_model(str(folder)))
    assert found["logits"].detail == "the probe failed, so training may too: AdapterError: no place for it"
    assert found["a training step"].detail == "not tried: there is no adapter to train"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "llava_665k", "model": "a"}, "Give one of them"),
        ({"revision": "main"}, "--model, which is missing"),
    ],
)
def test_options_that_contradict_each_other_are_refused(given, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        doctor(**given)
