"""Frozen encoders: each picture once per step, and once for all runs with a feature cache."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import make_vision

from mm_moslora.batch import Batch, Example
from mm_moslora.config import ModelConfig, OptimConfig, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.memory_efficient.kernel_selection import use_loss_head
from mm_moslora.models.vision.feature_cache import FeatureCache, StepFeatureCache
from mm_moslora.models.vision.feature_store import FeatureStore, tensor_hash, tower_hash
from mm_moslora.models.vlm import image_features
from mm_moslora.training.engine import LossModule, OptimizerSettings, TorchEngine
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.utils.errors import ConfigError

RED, GREEN, BLUE = (210, 40, 40), (40, 180, 60), (40, 60, 210)


@pytest.fixture
def assembly(language_folder, vision_folder):
    made = load_parts(ModelConfig(language=str(language_folder), vision=VisionConfig(name=str(vision_folder))))
    made.model.requires_grad_(False)
    made.model.model.multi_modal_projector.requires_grad_(True)
    return made


def batch(assembly, *colours):
    examples = []
    for number, colour in enumerate(colours):
        seen = assembly.image_processing.process([Image.new("RGB", (20, 24), colour)])
        ids = torch.tensor([1, *seen[0].placeholders, 5 + number, 6, 7])
        supervised = torch.arange(len(ids)) >= len(ids) - 2
        examples.append(Example(id=str(number), input_ids=ids, supervised=supervised, pictures=seen))
    return Batch.from_examples(examples)


def encoded(tower):
    """Counts the pictures that a tower is given."""
    counts = []
    tower.register_forward_pre_hook(lambda _, args, kwargs: counts.append(len(args[0])), with_kwargs=True)
    return counts


def engine(assembly, store=None):
    use_loss_head(assembly.model)
    module = LossModule(assembly.model.train(), None, memory=StepFeatureCache(store))
    settings = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    return TorchEngine(module, parameter_groups(module, OptimConfig(projector_lr=1e-3)), settings)


def store(assembly, folder, **options):
    model = assembly.model
    return FeatureStore(folder, tower_hash(model.model.vision_tower, model.config.vision_feature_layer), **options)


def test_a_step_encodes_each_picture_once_with_the_same_loss_and_gradient(assembly, language_folder, vision_folder):
    batches = [batch(assembly, RED, GREEN, RED), batch(assembly, GREEN, BLUE), batch(assembly, RED)]
    assert batches[0].image_keys[0] == batches[0].image_keys[2] != batches[0].image_keys[1]
    results = []
    for keys in (True, False):
        twin = load_parts(ModelConfig(language=str(language_folder), vision=VisionConfig(name=str(vision_folder))))
        twin.model.load_state_dict(assembly.model.state_dict())
        twin.model.requires_grad_(False)
        twin.model.model.multi_modal_projector.requires_grad_(True)
        counts = encoded(twin.model.model.vision_tower)
        given = batches if keys else [replace(item, image_keys=()) for item in batches]
        results.append(engine(twin).step(given, 1.0))
        assert sum(counts) == (3 if keys else 6)
        assert not twin.model.model.vision_tower.training
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)


def test_nothing_is_remembered_beyond_what_the_step_shows_again(assembly):
    run = engine(assembly)
    run.step([batch(assembly, RED, GREEN), batch(assembly, RED)], 1.0)
    assert not run.module.pictures.cache._features


def test_a_second_run_reads_what_the_first_encoded(assembly, tmp_path):
    step = [batch(assembly, RED, GREEN), batch(assembly, BLUE, RED)]
    counts, results = encoded(assembly.model.model.vision_tower), []
    for number in range(2):
        kept = store(assembly, tmp_path)
        results.append(engine(assembly, kept).step(step, 0.0))
        assert (kept.counts.encoded, kept.counts.read) == ((3, 0) if number == 0 else (0, 3))
    assert sum(counts) == 3
    assert results[0] == results[1], "bit for bit"


def test_a_damaged_entry_is_encoded_again_and_logged(assembly, tmp_path, caplog):
    pixels = torch.stack([torch.full((3, 28, 28), value) for value in (0.1, 0.2, 0.3)])
    keys = [tensor_hash(row) for row in pixels]
    memory = StepFeatureCache(store(assembly, tmp_path))
    expected = image_features(assembly.model, pixels, keys=keys, cache=memory)
    first, second, _ = sorted(tmp_path.glob("*/*/*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-3] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:40])
    memory = StepFeatureCache(store(assembly, tmp_path))
    found = image_features(assembly.model, pixels, keys=keys, cache=memory)
    torch.testing.assert_close(found, expected)
    assert (memory.store.counts.read, memory.store.counts.written) == (1, 2)
    assert caplog.text.count("are damaged") == 2
    again = StepFeatureCache(store(assembly, tmp_path))
    image_features(assembly.model, pixels, keys=keys, cache=again)
    assert (again.store.counts.read, again.store.counts.encoded) == (3, 0)


def test_other_weights_layers_and_pictures_have_other_names(assembly):
    tower = assembly.model.model.vision_tower
    names = {tower_hash(tower, -2), tower_hash(tower, -1), tower_hash(tower, [-2, -1])}
    with torch.no_grad():
        next(tower.parameters()).view(-1)[0] += 1e-3
    names.add(tower_hash(tower, -2))
    names.add(tower_hash(tower.to(torch.bfloat16), -2))
    assert len(names) == 5
    rgb = Image.new("RGB", (20, 20), RED)
    assert assembly.image_processing.process([rgb])[0].key == assembly.image_processing.process([rgb.copy()])[0].key
    assert (
        assembly.image_processing.process([rgb])[0].key
        != assembly.image_processing.process([Image.new("RGB", (20, 20), (210, 40, 41))])[0].key
    )


def test_beyond_the_limit_nothing_is_added_and_it_is_logged(assembly, tmp_path, caplog):
    pixels = torch.stack([torch.full((3, 28, 28), value) for value in (0.1, 0.2, 0.3)])
    keys = [tensor_hash(row) for row in pixels]
    one = 17 * 32 * 4 / 2**30  # tokens with CLS, width, bytes
    memory = StepFeatureCache(store(assembly, tmp_path, limit_gib=2.5 * one))
    expected = image_features(assembly.model, pixels)
    torch.testing.assert_close(image_features(assembly.model, pixels, keys=keys, cache=memory), expected)
    assert (memory.store.counts.encoded, memory.store.counts.written) == (3, 2)
    assert "reached its limit" in caplog.text


def _fill(folder, key, value, repeats):
    made, expected = FeatureStore(folder, "tower"), torch.full((64, 64), value)
    made._damaged = lambda path, why: pytest.fail(why)
    for number in range(repeats):
        cache = FeatureCache(memory_bytes=0, store=made)
        (found,) = cache.get_many([key], lambda numbers: [expected for _ in numbers])
        assert torch.equal(found, expected)
        made.write(key, expected)  # beside processes that read it
        if number % 2:
            made._path(key).unlink(missing_ok=True)


def test_processes_that_write_the_same_entry_never_read_half_of_it(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(tmp_path, "ab", 0.5, 60)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list(tmp_path.glob("*/*/.*")), "nothing is left aside"


def test_a_full_disk_stops_the_cache_and_not_the_run(assembly, tmp_path, monkeypatch, caplog):
    memory = StepFeatureCache(store(assembly, tmp_path))

    def no_room(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mm_moslora.models.vision.feature_store.save_file", no_room)
    pixels = torch.zeros(1, 3, 28, 28)
    found = image_features(assembly.model, pixels, keys=[tensor_hash(pixels[0])], cache=memory)
    assert torch.isfinite(found).all()
    assert (memory.store.counts.encoded, memory.store.counts.written) == (1, 0)
    assert "No space left" in caplog.text


def test_encoders_that_train_ready_made_models_and_tiles_are_refused():
    for mode in ("adapter", "full"):
        with pytest.raises(ConfigError, match="an encoder that trains"):
            VisionConfig(name="x", mode=mode, feature_cache="f")
    for model in ({"vlm": "x"}, {"language": "x", "image_aspect": "anyres"}):
        with pytest.raises(ConfigError, match="feature_cache"):
            ModelConfig(**model, vision=VisionConfig(name="y" if "language" in model else "", feature_cache="f"))


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov3"])
def test_features_are_those_of_the_models_own_path(kind, language_folder, tmp_path):
    """Generation of stock code goes by get_image_features."""
    config = ModelConfig(language=str(language_folder), vision=VisionConfig(name=str(make_vision(tmp_path, kind))))
    model = load_parts(config).model
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = torch.stack(list(model.model.get_image_features(pixel_values=pixels).pooler_output))
        torch.testing.assert_close(image_features(model, pixels), theirs)


def test_the_features_that_were_used_longest_ago_are_forgotten_first():
    asked, cache = [], FeatureCache(memory_bytes=2 * torch.zeros(4).nbytes)

    def encode(places):
        asked.append(list(places))
        return [torch.full((4,), float(place)) for place in places]

    assert [int(row[0]) for row in cache.get_many(["a", "a", "b"], encode)] == [0, 0, 2]
    cache.get_many(["a"], encode)
    cache.get_many(["c"], encode)
    assert asked == [[0, 2], [], [0]]
    assert [name for name in "abc" if name in cache] == ["a", "c"]
    assert (cache.hits, cache.misses) == (2, 3)
    cache.forget()
    assert "a" not in cache
