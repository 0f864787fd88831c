"""Whose weights a run is used with: names on the hub, paths, moved and exchanged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from mm_moslora_eval.backends.open_model import open_model
from safetensors.torch import load_file, save_file
from trials import with_train

from mm_moslora.cli import run as mm_moslora
from mm_moslora.config import Recipe
from mm_moslora.models.load_model import load
from mm_moslora.models.model_paths import resolve_model_paths
from mm_moslora.serve.served_models import _differing_keys
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import EvalError, ModelError
from mm_moslora.utils.identity import fingerprint

OLD, NEW = "a" * 40, "b" * 40


def _change(folder: Path, name: str = "", by: float = 1.0) -> Path:
    """Change one tensor of a model, its shape stays."""
    file = (folder / "model.safetensors").resolve()
    tensors = load_file(file)
    name = name or next(key for key in tensors if "embed" in key)
    tensors[name] = tensors[name] + by
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _commit(cache: Path, name: str, source: Path, commit: str = OLD, *, newest: bool = True) -> Path:
    """Lay a model into the hub's cache as one commit: blobs, and links to them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        blob = repository / "blobs" / f"{commit[0]}-{file.name}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(blob)
    if newest:
        (repository / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    place = tmp_path / "elsewhere" / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(place), raising=False)
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves its run for the others."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def hub_run(recipe: Recipe, cache: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A run on a language model and a tower of the hub, trained two of four steps, and a folder to work in."""
    _commit(cache, "acme/tiny", Path(recipe.model.language))
    _commit(cache, "acme/tower", Path(recipe.model.vision.name))
    work = tmp_path / "home" / "project"
    (work / "runs").mkdir(parents=True)
    monkeypatch.chdir(work)
    model = replace(recipe.model, language="acme/tiny", vision=replace(recipe.model.vision, name="acme/tower"))
    hub = with_train(replace(recipe, model=model), output=str(work / "runs" / "a"), steps=4, save_every=2)
    if not (trained / "a").exists():
        train(hub, stop_at=2)
        shutil.copytree(hub.train.output, trained / "a")
    else:
        shutil.copytree(trained / "a", hub.train.output)
    return hub


def _embedding(run: Path) -> torch.Tensor:
    return load(run).model.get_input_embeddings().weight.detach()


def _manifest(run: Path) -> tuple[Path, dict[str, Any]]:
    file = run / "checkpoint-000002" / "manifest.json"
    return file, json.loads(file.read_text())


def _rewrite(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a manifest with another `base`."""
    from mm_moslora.training.checkpointing import checkpoint_folder

    file, content = _manifest(run)
    change(content["base"])
    file.write_text(json.dumps(content | {"checksum": checkpoint_folder._checksum(content)}))


def test_a_checkpoint_keeps_commit_and_fingerprint(hub_run: Recipe, cache: Path) -> None:
    _, content = _manifest(Path(hub_run.train.output))
    base = content["base"]
    assert base["commits"] == {"model.language": OLD, "model.vision.name": OLD}
    assert base["contents"]["model.language"] == fingerprint(cache / "models--acme--tiny" / "snapshots" / OLD)
    assert train(hub_run).finished


def test_no_folder_is_taken_for_a_name_on_the_hub(
    hub_run: Recipe, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mm_moslora")
    run = Path(hub_run.train.output)
    before = _embedding(run)
    assert f"model.language is acme/tiny of the hub (commit {OLD})" in caplog.text
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    source = cache / "models--acme--tiny" / "snapshots" / OLD
    for parent in (run / "checkpoint-000002", run, Path.cwd(), tmp_path / "home", tmp_path):
        shutil.copytree(source, parent / "acme" / "tiny", symlinks=False)
        _change(parent / "acme" / "tiny")
        assert torch.equal(_embedding(run), before), parent
    shutil.rmtree(Path.cwd() / "acme")
    (tmp_path / "acme" / "tiny").rename(tmp_path / "other")
    (Path.cwd() / "acme").mkdir()
    (Path.cwd() / "acme" / "tiny").symlink_to(tmp_path / "other")
    assert torch.equal(_embedding(run), before)
    assert open_model(str(run), untuned=True)
    assert train(hub_run).finished  # which resumes, and does not take the folder either
    assert torch.equal(_embedding(run), before)
    monkeypatch.setenv("MM_MOSLORA_MODELS", str(tmp_path / "home"))  # which has another one
    assert torch.equal(_embedding(run), before)


def test_a_folder_that_the_user_names_counts_where_it_has_the_weights(
    hub_run: Recipe, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(hub_run.train.output)
    before = _embedding(run)
    shutil.copytree(cache / "models--acme--tiny" / "snapshots" / OLD, tmp_path / "mirror" / "acme" / "tiny")
    shutil.rmtree(cache / "models--acme--tiny")
    monkeypatch.setenv("MM_MOSLORA_MODELS", str(tmp_path / "mirror"))
    assert torch.equal(_embedding(run), before)
    _change(tmp_path / "mirror" / "acme" / "tiny")
    with pytest.raises(ModelError, match=r"model.language is 'acme/tiny'"):
        load(run)


def test_a_newer_commit_in_the_cache_is_not_taken(hub_run: Recipe, cache: Path, tmp_path: Path) -> None:
    run = Path(hub_run.train.output)
    before = _embedding(run)
    old = cache / "models--acme--tiny" / "snapshots" / OLD
    shutil.copytree(old, tmp_path / "next")
    _commit(cache, "acme/tiny", _change(tmp_path / "next"), NEW)
    assert torch.equal(_embedding(run), before)
    assert train(hub_run).finished
    shutil.rmtree(old)
    with pytest.raises(ModelError, match=rf"other weights \(commit {NEW[:10]}.* trained on \(commit {OLD[:10]}"):
        load(run)


WAYS: dict[str, Callable[[str, Recipe], Any]] = {
    "load": lambda run, _: load(run),
    "eval": lambda run, _: open_model(run),
    "eval --untuned": lambda run, _: open_model(run, untuned=True),
    "train": lambda _, recipe: train(recipe),
}
VERBS = {
    "export": ["export", "RUN", "OUT", "--to", "hf"], "lora": ["export", "RUN", "OUT", "--to", "lora"],
    "chat": ["chat", "RUN", "--question", "x"],
}  # fmt: skip


@pytest.mark.parametrize("key", ["language", "vision"])
def test_exchanged_weights_in_the_cache_are_one_error_everywhere(
    hub_run: Recipe, cache: Path, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = hub_run.train.output
    name = {"language": "tiny", "vision": "tower"}[key]
    snapshot = cache / f"models--acme--{name}" / "snapshots" / OLD
    tensors = load_file(snapshot / "model.safetensors")
    _change(snapshot, sorted(tensors)[-1], 1e-3)  # one small tensor
    for way in WAYS.values():
        with pytest.raises(ModelError, match=rf"model\.{key}.*other weights.*{OLD[:10]}.* trained on .*Delete"):
            way(run, hub_run)
    for verb in VERBS.values():
        words = [{"RUN": run, "OUT": str(tmp_path / "out")}.get(word, word) for word in verb]
        assert mm_moslora(words) == 1
        assert "other weights" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_path_is_not_looked_up_on_the_hub(
    recipe: Recipe, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recipe.model.language, tmp_path / "parts" / "llm")
    recipe = with_train(replace(recipe, model=replace(recipe.model, language="parts/llm")), steps=2)
    train(recipe)
    _commit(cache, "parts/llm", Path("parts/llm"))
    (tmp_path / "parts").rename(tmp_path / "gone")
    with pytest.raises(ModelError, match="nothing is there"):
        load(recipe.train.output)


def _sharded(folder: Path) -> Path:
    """Lay a model's weights into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in halves.items():
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, chosen in halves.items() for name in chosen}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _lead_elsewhere(base: Path, place: str) -> None:
    """Other weights in shards of the same names in another folder, and an index that leads there."""
    (base / place).mkdir()
    for file in base.glob("model-*.safetensors"):
        other = {name: torch.full_like(value, 0.01) for name, value in load_file(file).items()}
        save_file(other, base / place / file.name, metadata={"format": "pt"})
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: f"{place}/{file}" for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(base: Path) -> None:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)

    return write


def _exchange_two_words(base: Path) -> None:
    file = base / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base: _lead_elsewhere(base, "sub"), "other weights"),
        (lambda base: _lead_elsewhere(base, "../beside"), "other weights"),
        (_write("chat_template.jinja", "EVIL {{ messages[0].content }}"), "chat template"),
        (_write("additional_chat_templates/more.jinja", "EVIL"), "chat template"),
        (_write("generation_config.json", '{"max_new_tokens": 1}'), "other files"),
        (_exchange_two_words, "other files of its tokenizer"),
    ],
)
def test_all_that_is_read_of_a_base_is_looked_at(
    recipe: Recipe, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(recipe.model.language, tmp_path / "base" / "llm")
    base = _sharded(tmp_path / "base" / "llm")
    recipe = with_train(replace(recipe, model=replace(recipe.model, language=str(base))), steps=4, save_every=2)
    train(recipe, stop_at=2)
    run = Path(recipe.train.output)
    assert load(run)
    change(base)
    for use in (load, lambda _: train(recipe), lambda _: open_model(str(run), untuned=True)):
        with pytest.raises((ModelError, EvalError), match=message):
            use(run)


def test_pictures_are_prepared_as_in_training(recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree(recipe.model.vision.name, tmp_path / "tower")
    vision = replace(recipe.model.vision, name=str(tmp_path / "tower"))
    recipe = with_train(replace(recipe, model=replace(recipe.model, vision=vision)), steps=2)
    train(recipe)
    assert load(recipe.train.output)
    settings = json.dumps({"image_mean": [9.0] * 3, "image_std": [0.1] * 3})
    (tmp_path / "tower" / "preprocessor_config.json").write_text(settings)
    with pytest.raises(ModelError, match=r"model\.vision\.name .*pictures"):
        load(recipe.train.output)


def test_a_projector_that_trained_on_is_not_taken_for_the_start(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run folder of an align stage, which goes on after the next stage began with its newest checkpoint."""
    align = with_train(recipe, output=str(tmp_path / "align"), steps=4, save_every=2)
    train(align, stop_at=2)
    projector = replace(recipe.model.projector, weights=str(tmp_path / "align"))
    tune = with_train(replace(recipe, model=replace(recipe.model, projector=projector)), steps=4, save_every=2)
    train(tune, stop_at=2)
    assert resolve_model_paths(tune.model, Path(tune.train.output) / "checkpoint-000002").projector.weights
    assert open_model(tune.train.output, untuned=True)
    train(align)
    assert load(tune.train.output)
    with pytest.raises(EvalError, match="no longer what"):
        open_model(tune.train.output, untuned=True)
    assert train(tune).finished
    assert "It is left out" in caplog.text


def test_adapters_of_runs_on_equal_weights_go_together_wherever_those_lie(hub_run: Recipe, tmp_path: Path) -> None:
    served, added = Path(hub_run.train.output) / "checkpoint-000002", tmp_path / "added"
    shutil.copytree(served, added)
    text = (added / "config.yaml").read_text()
    assert "language: acme/tiny" in text
    (added / "config.yaml").write_text(text.replace("language: acme/tiny", "language: /models/tiny"))
    assert _differing_keys(served, added) == []
    content = json.loads((added / "manifest.json").read_text())
    content["base"]["contents"]["model.language"] = "2-" + "0" * 64
    (added / "manifest.json").write_text(json.dumps(content))
    assert [line.split()[0] for line in _differing_keys(served, added)] == ["model.language"]


def test_a_run_goes_on_with_the_commit_of_its_data(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []
    rows = [{"question": f"What is {number}?", "answer": f"Number {number}."} for number in range(8)]

    def loaded(path: str, **options: Any) -> Any:
        asked.append((path, options["revision"]))
        table = datasets.Dataset.from_list(rows)
        table.info.download_checksums = {f"hf://datasets/{path}@{options['revision'] or newest}/a.parquet": {}}
        return table

    monkeypatch.setattr("mm_moslora.data.sources.hf_tables.load_checked", loaded)
    newest, source = OLD, replace(recipe.data.train[0], path="hf:acme/rows", image_folder=None)
    data = replace(recipe.data, train=[source, replace(source, split="other", limit=4)])
    run = with_train(replace(recipe, data=data), output=str(tmp_path / "run"), steps=4, save_every=2)
    train(run, stop_at=2)
    kept = json.loads((tmp_path / "run" / "checkpoint-000002" / "manifest.json").read_text())["base"]["commits"]
    assert {key: commit for key, commit in kept.items() if key.startswith("data.")} == {
        "data.train.0": OLD, "data.train.1": OLD
    }  # fmt: skip
    newest = NEW
    asked.clear()
    train(run)
    assert asked == [("acme/rows", OLD)] * 2
    last = json.loads((tmp_path / "run" / "checkpoint-000004" / "manifest.json").read_text())
    assert last["base"]["commits"] == kept
    assert last["recipe"]["data"]["train"][0]["revision"] is None
