"""Several adapters of one base by model name: each answers as it does when it is loaded alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serve.serve_tools import asking, data_url

from mm_moslora.errors import AdapterError, ConfigError, ModelError


def _recipe(folder: Path, language: Path, vision: Path, records: Path, **model: Any) -> Any:
    from mm_moslora import config

    return config.Recipe(
        name=folder.name,
        model=config.ModelConfig(language=str(language), vision=config.VisionConfig(name=str(vision)), **model),
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
    from mm_moslora.training.loop import train

    root = tmp_path_factory.mktemp("runs")
    folders = root / "one", root / "another"
    for folder in folders:
        train(_recipe(folder, language_folder, vision_folder, records))
    return folders


def test_each_model_answers_as_when_loaded_alone_and_all_at_once(runs: tuple[Path, Path], serve_with: Any) -> None:
    from mm_moslora.serve.chat import Chat
    from mm_moslora.serve.engine import Engine
    from mm_moslora.serve.limits import Limits
    from mm_moslora.serve.models import load_models

    picture = Image.new("RGB", (24, 24), (200, 60, 30))
    expected = {}
    for name, folder in zip(("tuned", "other"), runs, strict=True):
        chat = Chat.from_folder(folder, max_new_tokens=8)
        chat.look(picture)
        expected[name] = chat.ask("what is the color?")
    together = load_models(runs[0], name="tuned", further={"other": runs[1]}, with_base=True)
    assert list(together.variants) == ["tuned", "other", "tuned-base"]
    limits = Limits(context=512)
    with serve_with(engine=Engine(together, limits)) as server:
        client = server.client()
        assert [model.id for model in client.models.list()] == ["tuned", "other", "tuned-base"]

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
    from mm_moslora.serve.models import load_models

    assert load_models(runs[0]).assembly.peft_model is None
    assert load_models(runs[0]).default == "one"


def test_an_adapter_folder_without_a_run_is_enough(runs: tuple[Path, Path]) -> None:
    from mm_moslora.serve.models import load_models

    (adapter,) = runs[1].glob("checkpoint-000006/adapter")
    models = load_models(runs[0], further={"plain": adapter})
    assert models.variants["plain"].projector is models.variants["one"].projector


def test_names_and_folders_that_do_not_fit_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    from mm_moslora.serve.models import load_models
    from mm_moslora.serve.run import parse_adapters

    with pytest.raises(ConfigError, match="same name"):
        load_models(runs[0], name="one", further={"one": runs[1]})
    with pytest.raises(ModelError, match="no checkpoint"):
        load_models(runs[0], further={"two": tmp_path})
    with pytest.raises(ConfigError, match="NAME=FOLDER"):
        parse_adapters(["just-a-folder"])


def test_an_adapter_of_another_base_is_refused(
    runs: tuple[Path, Path], tmp_path: Path, vision_folder: Path, records: Path
) -> None:
    from tiny import make_language

    from mm_moslora.serve.models import load_models
    from mm_moslora.training.loop import train

    other = make_language(tmp_path / "language", layers=3)
    train(_recipe(tmp_path / "run", other, vision_folder, records))
    with pytest.raises(AdapterError, match="another base"):
        load_models(runs[0], further={"other": tmp_path / "run"})
