"""Several adapters of one base by model name: each answers as if it were loaded alone."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.backends.openai_endpoint import ServiceSettings
from PIL import Image

from mm_moslora.cli.serve_verbs import parse_adapters
from mm_moslora.data.preprocessing_print import preprocessing_digest, stored_preprocessing
from mm_moslora.serve.continuous_batching import GenerationEngine
from mm_moslora.serve.request_limits import Limits
from mm_moslora.serve.served_models import load_models, why_no_base
from mm_moslora.serve.terminal_chat import Chat
from mm_moslora.utils.errors import AdapterError, ConfigError, EvalError, ModelError
from mm_moslora.utils.run_paths import PREPROCESSING
from tests.serve.serve_tools import asking, data_url


def _recipe(
    folder: Path, language: Path, vision: Path, records: Path, *, seeing: dict[str, Any] | None = None, **model: Any
) -> Any:
    """A recipe; `seeing` are keys of `model.vision`, further ones of `model`."""
    from mm_moslora import config

    seen_by = config.VisionConfig(name=str(vision), **(seeing or {}))
    return config.Recipe(
        name=folder.name,
        model=config.ModelConfig(language=str(language), vision=seen_by, **model),
        adapter=config.AdapterConfig(rank=4, alpha=64, mixer_init="kaiming"),
        data=config.DataConfig(
            train=[config.SourceConfig(path=str(records), image_folder=str(records.parent / "images"))],
            max_length=256,
        ),
        optim=config.OptimConfig(lr=3e-2, projector_lr=5e-2, warmup=1),
        train=config.TrainConfig(
            output=str(folder), steps=6, global_batch=8, micro_batch=4, zero="none", precision="fp32",
            seed=len(folder.name),
        ),
        track=config.TrackConfig(trackers=[]),
    )  # fmt: skip


@pytest.fixture(scope="session")
def runs(
    language_folder: Path, vision_folder: Path, records: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two runs on one base with different seeds: different adapters and different projectors."""
    from mm_moslora.training.training_loop import train

    root = tmp_path_factory.mktemp("runs")
    folders = root / "one", root / "another"
    for folder in folders:
        train(_recipe(folder, language_folder, vision_folder, records))
    return folders


def open_expecting(name: str, folder: Path) -> None:
    """Open a model with the preprocessing of a folder."""
    open_model(name, service=ServiceSettings(expect_preprocessing=folder))


def test_the_preprocessing_of_a_folder_is_expected_of_servers_alone(runs: tuple[Path, Path]) -> None:
    with pytest.raises(EvalError, match="--expect-preprocessing is for openai:URL#MODEL"):
        open_expecting(str(runs[0]), runs[0])


def test_each_model_answers_as_when_loaded_alone_and_all_at_once(
    runs: tuple[Path, Path], serve_with: Any, tmp_path: Path
) -> None:
    picture = Image.new("RGB", (24, 24), (200, 60, 30))
    expected = {}
    for name, folder in zip(("tuned", "other"), runs, strict=True):
        chat = Chat.from_folder(folder, max_new_tokens=8)
        chat.look(picture)
        expected[name] = chat.ask("what is the color?")
    together = load_models(runs[0], name="tuned", further={"other": runs[1]}, with_base=True)
    assert list(together.variants) == ["tuned", "other", "tuned-base"]
    limits = Limits(context=512)
    with serve_with(engine=GenerationEngine(together, limits)) as server:
        client = server.client()
        assert [model.id for model in client.models.list()] == ["tuned", "other", "tuned-base"]
        for name in ("tuned", "other"):
            open_expecting(f"openai:{server.url}/v1#{name}", runs[0])
        stored = stored_preprocessing(runs[0])
        (tmp_path / PREPROCESSING).write_text(json.dumps(stored | {"versions": {}, "settings": {"a": 1}}))
        open_expecting(f"openai:{server.url}/v1#tuned", tmp_path)  # names only explain
        (tmp_path / PREPROCESSING).write_text(json.dumps(stored | {"stop_ids": [77]}))
        own, other = preprocessing_digest(runs[0]), preprocessing_digest(tmp_path)
        with pytest.raises(EvalError, match=f"its digest is {own}, expected {other}"):
            open_expecting(f"openai:{server.url}/v1#tuned", tmp_path)
        together.preprocessing = ""  # as of a server that was started with --other-preprocessing
        with pytest.raises(EvalError, match="publishes no digest of its preprocessing, expected"):
            open_expecting(f"openai:{server.url}/v1#tuned", runs[0])

        def ask(index: int) -> tuple[str, str]:
            name = list(together.variants)[index % 3]
            body = asking("what is the color?", data_url(picture), max_tokens=8) | {"model": name}
            return name, client.chat.completions.create(**body).choices[0].message.content

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(12)))
    by_name = {name: {text for other, text in answers if other == name} for name in together.variants}
    assert by_name["tuned"] == {expected["tuned"]}
    assert by_name["other"] == {expected["other"]}
    assert len(by_name["tuned-base"]) == 1
    assert len({expected["tuned"], expected["other"], *by_name["tuned-base"]}) > 1


def test_a_model_alone_is_merged_and_answers_the_same(runs: tuple[Path, Path]) -> None:
    assert load_models(runs[0]).assembly.peft_model is None
    assert load_models(runs[0]).default == "one"


def test_an_adapter_folder_without_a_run_is_served_with_a_warning(
    runs: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (adapter,) = runs[1].glob("checkpoint-000006/adapter")
    models = load_models(runs[0], further={"plain": shutil.copytree(adapter, tmp_path / "adapter")})
    assert models.variants["plain"].projector is models.variants["one"].projector
    assert "is not part of a run, so plain gets the projector of" in caplog.text


@pytest.mark.parametrize("link", [False, True])
def test_the_adapter_folder_of_a_run_brings_the_runs_projector(
    runs: tuple[Path, Path], tmp_path: Path, link: bool
) -> None:
    from safetensors.torch import load_file

    (adapter,) = runs[1].glob("checkpoint-000006/adapter")
    named = tmp_path / "linked" if link else adapter
    if link:
        named.symlink_to(adapter)
    projector = load_models(runs[0], further={"plain": named}).variants["plain"].projector
    assert projector is not None
    trained = load_file(adapter.parent / "projector.safetensors")
    assert len(trained) == len(projector.state_dict()) > 0
    for name, weight in projector.state_dict().items():
        assert torch.equal(weight, next(value for key, value in trained.items() if key.endswith(name)))


def test_names_and_folders_that_do_not_fit_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same name"):
        load_models(runs[0], name="one", further={"one": runs[1]})
    with pytest.raises(ModelError, match="not a checkpoint"):
        load_models(runs[0], further={"two": tmp_path})
    with pytest.raises(ConfigError, match="NAME=FOLDER"):
        parse_adapters(["just-a-folder"])


def test_an_adapter_of_another_base_is_refused(
    runs: tuple[Path, Path], tmp_path: Path, vision_folder: Path, records: Path
) -> None:
    from tiny import make_language

    from mm_moslora.training.training_loop import train

    other = make_language(tmp_path / "language", layers=3)
    train(_recipe(tmp_path / "run", other, vision_folder, records))
    with pytest.raises(ModelError, match=r"model\.language is "):
        load_models(runs[0], further={"other": tmp_path / "run"})
    (adapter,) = (tmp_path / "run").glob("checkpoint-000006/adapter")
    adapter.rename(tmp_path / "alone")
    with pytest.raises(AdapterError, match="another base"):
        load_models(runs[0], further={"other": tmp_path / "alone"})


PICTURE = Image.new("RGB", (24, 24), (200, 60, 30))


@pytest.fixture(scope="session")
def looking(
    language_folder: Path, vision_folder: Path, records: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with adapters in the vision tower, too."""
    from mm_moslora.training.training_loop import train

    folder = tmp_path_factory.mktemp("looking") / "eyes"
    train(_recipe(folder, language_folder, vision_folder, records, seeing={"mode": "adapter"}))
    return folder


def _tokens(models: Any, name: str) -> Any:
    """Visual tokens of the picture in the server, possibly from its cache."""
    images = models.assembly.image_processing.process([PICTURE])
    with models.use(name):
        return models.image_tokens(name, images)


def _tokens_alone(folder: Path, *, tuned: bool) -> Any:
    """Visual tokens of the picture in a model without other variants."""
    import torch

    from mm_moslora.models.decoding.generation import encode_images
    from mm_moslora.models.load_model import load

    assembly = load(folder, merge=False)
    pixels = assembly.image_processing.process([PICTURE])[0].tensors["pixel_values"]
    with torch.inference_mode():
        if tuned:
            return encode_images(assembly.model, pixels)[0]
        with assembly.peft_model.disable_adapter():
            return encode_images(assembly.model, pixels)[0]


@pytest.mark.parametrize("order", [("eyes", "eyes-base", "plain"), ("plain", "eyes-base", "eyes")])
def test_adapters_in_the_tower_do_not_share_visual_tokens(
    looking: Path, runs: tuple[Path, Path], order: tuple[str, ...]
) -> None:
    """Adapters in the tower change the visual tokens, whatever variant was asked first."""
    import torch

    models = load_models(looking, further={"plain": runs[0]}, with_base=True)
    found = {name: _tokens(models, name) for name in order}
    assert all(torch.equal(found[name], _tokens(models, name)) for name in order)
    expected = {
        "eyes": _tokens_alone(looking, tuned=True), "eyes-base": _tokens_alone(looking, tuned=False),
        "plain": _tokens_alone(runs[0], tuned=True),
    }  # fmt: skip
    for name in order:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["eyes"], found["eyes-base"], atol=1e-3)


def test_variants_with_the_same_tower_share_visual_tokens(runs: tuple[Path, Path]) -> None:
    """Adapters in the language model alone: the tower runs once for the tuned model and the one before tuning."""
    models = load_models(runs[0], with_base=True)
    _tokens(models, "one")
    _tokens(models, "one-base")
    assert (models.features.misses, models.features.hits) == (1, 1)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"seeing": {"image_size": 42}}, ["model.vision.image_size"]),
        ({"seeing": {"feature_layer": -1}}, ["model.vision.feature_layer"]),
        ({"image_aspect": "resize"}, ["model.image_aspect"]),
        ({"system_prompt": "Answer in one word."}, ["model.system_prompt"]),
        (
            {"chat_template": "v1", "image_aspect": "crop", "seeing": {"feature_layer": -1}},
            ["model.chat_template", "model.image_aspect", "model.vision.feature_layer"],
        ),
    ],
)
def test_a_run_with_other_prompt_or_picture_settings_is_refused_with_the_keys(
    runs: tuple[Path, Path], tmp_path: Path, language_folder: Path, vision_folder: Path, records: Path,
    change: dict[str, Any], keys: list[str],
) -> None:  # fmt: skip
    """The second run's folder with another recipe: only the recipe is compared."""
    import shutil

    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    recipe = _recipe(other, language_folder, vision_folder, records, **change)
    for checkpoint in other.glob("checkpoint-*"):
        (checkpoint / "config.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        load_models(runs[0], further={"other": other})
    for key in keys:
        assert f"{key} is " in str(caught.value)
    assert "Serve it on its own" in str(caught.value)
    with pytest.raises(ModelError, match=keys[0]):
        load_models(runs[0], further={"other": next(iter(other.glob("checkpoint-*"))) / "adapter"})


def test_keys_that_change_neither_prompt_nor_picture_are_no_difference(runs: tuple[Path, Path], looking: Path) -> None:
    """`vision.mode` only chooses what trains."""
    assert list(load_models(runs[0], further={"eyes": looking}).variants) == ["one", "eyes"]


@pytest.mark.parametrize("layer", [-2, -1])
def test_an_export_takes_adapters_of_runs_with_its_settings_only(
    runs: tuple[Path, Path], tmp_path: Path, language_folder: Path, vision_folder: Path, records: Path, layer: int
) -> None:
    import shutil

    from mm_moslora.models.export.export_huggingface import export_model
    from mm_moslora.models.load_model import load

    export_model(load(runs[0]), tmp_path / "export")
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    recipe = _recipe(other, language_folder, vision_folder, records, seeing={"feature_layer": layer})
    for checkpoint in other.glob("checkpoint-*"):
        (checkpoint / "config.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    if layer == -2:
        load_models(tmp_path / "export", further={"other": other})
        return
    with pytest.raises(ModelError, match=r"model.vision.feature_layer is -2 in the served model, -1 here"):
        load_models(tmp_path / "export", further={"other": other})


def test_the_model_before_tuning_is_refused_without_its_weights(
    language_folder: Path, vision_folder: Path, records: Path, tmp_path: Path
) -> None:
    from mm_moslora.training.training_loop import train

    folder = tmp_path / "full"
    train(_recipe(folder, language_folder, vision_folder, records, seeing={"mode": "full"}))
    assert "vision weights" in str(why_no_base(folder))
    with pytest.raises(ModelError, match="trained its vision weights"):
        load_models(folder, with_base=True)


def test_the_model_before_tuning_has_the_projector_that_tuning_started_from(
    runs: tuple[Path, Path], language_folder: Path, vision_folder: Path, records: Path, tmp_path: Path, caplog: Any
) -> None:
    """If that file is missing, it has the tuned projector, and the log names this."""
    import shutil

    import torch

    from mm_moslora.config import ProjectorConfig
    from mm_moslora.training.training_loop import train

    (first,) = runs[0].glob("checkpoint-000006/projector.safetensors")
    start = shutil.copy(first, tmp_path / "start.safetensors")
    folder = tmp_path / "tuned"
    projector = ProjectorConfig(weights=str(start))
    train(_recipe(folder, language_folder, vision_folder, records, projector=projector))
    models = load_models(folder, with_base=True)
    plain = load_models(runs[0])
    assert torch.equal(_tokens(models, "tuned-base"), _tokens(plain, "one"))
    assert not torch.equal(_tokens(models, "tuned"), _tokens(models, "tuned-base"))
    Path(start).unlink()
    with caplog.at_level("WARNING"):
        models = load_models(folder, with_base=True)
    assert "gets the tuned one" in caplog.text
    assert torch.equal(_tokens(models, "tuned"), _tokens(models, "tuned-base"))
