"""`doctor --model` and `--families` find what would train wrongly, by probes of the model itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from tiny import make_language, make_tokenizer
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from vlms import make_vlm

from mm_moslora.adapters.experts.small_models import SIZES, small_config
from mm_moslora.cli.doctor_verb import doctor
from mm_moslora.models.batching import packed_batch
from mm_moslora.planning import family_table, model_probes
from mm_moslora.planning.family_table import family_row
from mm_moslora.planning.model_doctor import diagnose_model
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
    assert doctor(model=str(folder), gpus="1xA100-80G") == 0
    shown = capsys.readouterr().out
    for text in ("padding-free", "does not move the other", "[[A red square.<|im_end|>]]", "no <think>", "GiB per GPU"):
        assert text in " ".join(shown.split())


def test_small_random_models_need_no_weights(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    found = by_name(diagnose_model(str(tmp_path), small=True))
    assert {item.status for item in found.values()} == {"ok"}
    assert "of the largest" in found["logits"].detail
    assert "as qwen2_5_vl writes them; of a picture of 1000 x 750 pixels it counts 84 x" in found["boxes"].detail


def test_a_language_model_is_probed_without_pictures(tmp_path: Path) -> None:
    found = by_name(diagnose_model(str(make_language(tmp_path))))
    assert {item.status for item in found.values()} == {"ok"}
    assert "[[Two, as you wish.<|im_end|>]]" in found["labels"].detail
    (tmp_path / "model.safetensors").unlink()
    found = by_name(diagnose_model(str(tmp_path), small=True))
    assert {item.status for item in found.values()} == {"ok"}
    assert "of the largest" in found["logits"].detail


def test_a_small_looped_decoder_loops_and_trains_right(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    config = AutoConfig.for_model("dory")
    config.save_pretrained(tmp_path)
    small = small_config(config, SIZES[0])
    assert (small.n_input_layers, small.n_recurrent_layers, small.n_output_layers, small.num_hidden_layers) == (
        1,
        2,
        1,
        4,
    )
    found = by_name(diagnose_model(str(tmp_path), small=True))
    assert {item.status for item in found.values()} == {"ok"}


@pytest.mark.parametrize("small", [True, False])
def test_a_model_that_sees_without_a_chat_template_is_bad(folder: Path, tmp_path: Path, small: bool) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "chat_template.jinja").unlink()
    found = by_name(diagnose_model(str(copy), small=small))
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


@pytest.mark.parametrize("small", [True, False])
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
    hostile: Path, values: dict[str, Any], message: str, small: bool
) -> None:
    own = read_json(hostile / "original.json")
    (hostile / "config.json").write_text(json.dumps(own | values))
    with pytest.raises(ModelError, match=message) as caught:
        diagnose_model(str(hostile), small=small)
    assert str(hostile) in str(caught.value)


def test_a_deep_configuration_and_a_huge_tower_are_one_error_too(hostile: Path, folder: Path, tmp_path: Path) -> None:
    (hostile / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ModelError, match="configuration cannot be read"):
        diagnose_model(str(hostile))
    copy = shutil.copytree(folder, tmp_path / "model")
    own = read_json(copy / "config.json")
    for wrong, message in ({"depth": 10**8}, "vision_config.depth of its"), ([], "cannot be read .*vision_config"):
        tower = own["vision_config"] | wrong if isinstance(wrong, dict) else wrong
        (copy / "config.json").write_text(json.dumps(own | {"vision_config": tower}))
        with pytest.raises(ModelError, match=message):
            diagnose_model(str(copy), small=True)


def test_a_row_probe_without_numbers_is_no_answer(tmp_path: Path) -> None:
    from mm_moslora.models.batching import row_probe

    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        rms_norm_eps=float("nan"),
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    finding = row_probe._probed(model.get_decoder(), "auto", row_probe._moved)
    assert (finding.moved, finding.fault, finding.apart) == (None, "its hidden states are not finite", False)


def test_wrong_positions_are_found_by_the_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = packed_batch._positions
    monkeypatch.setattr(packed_batch, "_positions", lambda *given: real(*given).flip(-1))
    found = by_name(diagnose_model(str(folder), small=True))
    assert found["logits"].status == "bad"


def test_a_supervised_question_is_found_by_the_labels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_probes.example_of

    def supervise_all(*given):
        example = real(*given)
        example.supervised[1:] = True
        return example

    monkeypatch.setattr(model_probes, "example_of", supervise_all)
    found = by_name(diagnose_model(str(folder), small=True))
    assert found["labels"].status == "bad"
    assert "is learned, expected ['A red square.']" in found["labels"].detail


def test_the_table_has_a_row_for_every_family_and_the_reason_why_one_is_not_tried(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    assert doctor("qwen2_vl", families=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| `qwen2_vl` | padding-free, lean layers | apart | right | equal |")
    assert doctor("udop", families=True) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("| `udop` | not tried: ")
    with pytest.raises(ConfigError, match=r"no image-text-to-text family 'qwen2_vk'\. Did you mean"):
        doctor("qwen2_vk", families=True)


@pytest.mark.parametrize("kind", ["gemma3", "minicpmv4_6"])
def test_families_whose_pictures_are_peculiar_train_right(kind: str) -> None:
    """Gemma 3 marks them by types of tokens, and its line breaks around them join those of the template; MiniCPM-V
    takes several in a call for as large as the first."""
    row = family_row(kind)
    assert not row.wrong
    assert [cell.strip() for cell in row.text.split("|")][4:6] == ["right", "equal"]


def test_a_table_of_several_families_outlives_one_that_hangs_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def child(words: list[str], *, seconds: float) -> CompletedProcess[str]:
        asked.append(words[-1])
        if words[-1] == "gemma3":
            raise TimeoutError("too slow")
        if words[-1] == "llava":
            return CompletedProcess(words, -9, "", "first\nKilled\n")
        return CompletedProcess(words, 1, f"| family |\n|---|\n| `{words[-1]}` | padded | wrong: token 3 |\n", "")

    monkeypatch.setattr(family_table, "output_of", child)
    kinds, kept = ["gemma3", "llava", "qwen2_vl"], tmp_path / "rows.json"
    assert doctor(*kinds[:2], families=True, progress=kept, limit=9) == 0
    capsys.readouterr()
    assert doctor(*kinds, families=True, progress=kept, limit=9) == 1
    assert asked == [*kinds[:2], "llava", "qwen2_vl"]  # a process that was killed may have had bad luck
    shown = capsys.readouterr()
    assert shown.out.splitlines()[2:] == [
        "| `gemma3` | not tried: it took more than 9 s (--limit) | | | | |",
        "| `llava` | not tried: its process ended with -9: Killed | | | | |",
        "| `qwen2_vl` | padded | wrong: token 3 |",
    ]
    assert "2 of 3 families, about" in shown.err
    asked.clear()
    assert doctor("qwen2_vl", families=True, progress=kept) == 1  # also of a row that is kept
    assert doctor("gemma3", families=True, progress=kept) == 0
    assert asked == ["gemma3"]  # more seconds may be enough
    assert "more than 600 s" in capsys.readouterr().out
    known = kept.read_text()
    for name in ("transformers", "mm_moslora"):
        current = read_json(kept)["versions"][name]
        kept.write_text(known.replace(f'"{name}": "{current}"', f'"{name}": "0.0.1"'))
        asked.clear()
        assert doctor("qwen2_vl", families=True, progress=kept) == 1
        assert asked == ["qwen2_vl"]
    for damaged in ('{"rows": [{}]}', known.replace('"wrong": true', '"wrong": "no"')):
        kept.write_text(damaged)
        with pytest.raises(ConfigError, match=r"--progress is .*rows\.json', which does not hold rows of this table"):
            doctor(*kinds, families=True, progress=kept)


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -5.0, 0.0])
def test_a_time_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match=r"--limit is (nan|inf|-5|0), expected seconds: a number above 0"):
        doctor("llava", "gemma3", families=True, limit=limit)


def test_a_refused_adapter_is_one_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given, **more):
        raise AdapterError("no place for it")

    monkeypatch.setattr(model_probes, "attach_adapters", refuse)
    assert family_row("qwen2_vl").text.endswith(
        "| fails: AdapterError: no place for it | not tried: there is no adapter to train |"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "a", "families": True}, "Give one of them"),
        ({"recipe": "llava_665k", "model": "a"}, "Give one of them"),
        ({"random": True}, "--model, which is missing"),
        ({"model": "no/such", "gpus": "3xPotato"}, "no known GPU"),
    ],
)
def test_options_that_contradict_each_other_are_refused(given, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        doctor(**given)
