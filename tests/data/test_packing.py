"""Packing fills rows and changes nothing else; LLaVA's own order; examples in the Hugging Face trainer."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_language, make_records, make_vision

from mm_moslora.batch import Batch
from mm_moslora.config import DataConfig, ModelConfig, SourceConfig, VisionConfig
from mm_moslora.data.batch_loader import BatchLoader, largest_batch
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.collator import Collator
from mm_moslora.data.epoch_order import plan_llava
from mm_moslora.data.packing import fill_rate, pack
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.utils.errors import ConfigError, DataError
from tests.data.sets import make_set

GOLDEN = Path(__file__).parent / "golden" / "llava_order.json"


class TestRows:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 100), min_size=1, max_size=120), st.integers(1, 40))
    def test_every_example_once_and_no_row_overflows(self, lengths, waiting) -> None:
        rows = pack(range(len(lengths)), lengths, tokens=100, waiting=waiting)
        assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
        assert all(0 < sum(lengths[number] for number in row) <= 100 for row in rows)

    def test_an_example_seen_twice_is_packed_twice(self) -> None:
        rows = pack([0, 1, 0], [5, 6], tokens=8)
        assert Counter(number for row in rows for number in row) == {0: 2, 1: 1}

    def test_lengths_like_those_of_instruction_data_fill_the_rows(self) -> None:
        rng = random.Random(0)
        lengths = [min(2048, int(rng.lognormvariate(5, 0.75)) + 40 + 576 * (rng.random() < 0.94)) for _ in range(4000)]
        rows = pack(range(4000), lengths, tokens=4096)
        assert fill_rate(rows, lengths, tokens=4096) >= 0.97

    def test_nobody_waits_long(self) -> None:
        lengths = [90] + [10] * 500
        rows = pack([1, 0, *range(2, 501)], lengths, tokens=95, waiting=20)
        assert any(0 in row for row in rows[:20])


class TestPackedLoader:
    def loader(self, data, *, rank=0, world_size=1, start_step=0, micro_batch=1) -> BatchLoader:
        return BatchLoader(
            data, rank=rank, world_size=world_size, config=data.config, global_batch=4, micro_batch=micro_batch,
            seed=3, start_step=start_step,
        )  # fmt: skip

    def data(self, tmp_path: Path, **options):
        return make_set(make_records(tmp_path, 60), max_length=128, pack_tokens=256, **options)

    def steps(self, loader: BatchLoader, count: int) -> list[list[tuple[str, ...]]]:
        with loader:
            batches = iter(loader)
            return [[batch.ids for batch in next(batches)] for _ in range(count)]

    def test_a_micro_batch_is_a_row_and_an_epoch_holds_every_record_once(self, tmp_path: Path) -> None:
        data = self.data(tmp_path)
        loader = self.loader(data)
        epoch = self.steps(loader, loader.steps_per_epoch)
        assert Counter(name for step in epoch for ids in step for name in ids) == Counter(f"r{n}" for n in range(60))
        assert max(len(ids) for step in epoch for ids in step) > 3
        lengths = {f"r{n}": data.lengths[n] for n in range(60)}
        assert all(sum(lengths[name] for name in ids) <= 256 for step in epoch for ids in step)

    @pytest.mark.parametrize("world_size", [2, 4])
    def test_the_world_does_not_change_what_a_step_holds(self, tmp_path: Path, world_size: int) -> None:
        data = self.data(tmp_path)
        count = self.loader(data).steps_per_epoch + 2
        alone = self.steps(self.loader(data), count)
        ranks = [self.steps(self.loader(data, rank=rank, world_size=world_size), count) for rank in range(world_size)]
        assert len(alone) == count
        for number, step in enumerate(alone):
            shared = [name for rank in ranks for ids in rank[number] for name in ids if name]
            assert Counter(shared) == Counter(name for ids in step for name in ids if name)

    def test_a_resumed_run_goes_on_exactly_also_in_later_epochs(self, tmp_path: Path) -> None:
        data = self.data(tmp_path)
        per_epoch = self.loader(data).steps_per_epoch
        whole = self.steps(self.loader(data), 3 * per_epoch)
        for start in (1, per_epoch, 2 * per_epoch + 1):
            assert self.steps(self.loader(data, start_step=start), 2) == whole[start : start + 2]

    def test_the_rehearsal_tries_a_full_row(self, tmp_path: Path) -> None:
        batch = largest_batch(self.data(tmp_path), 2)
        assert 480 < batch.tokens <= 512
        assert batch.images

    def test_settings_that_cannot_work_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"at least data\.max_length"):
            DataConfig(pack_tokens=100, max_length=200)
        with pytest.raises(DataError, match=r"needs exact lengths.*Set data.cache"):
            self.data(tmp_path, exact_limit=5)
        assert self.data(tmp_path, exact_limit=5, cache=str(tmp_path / "cache")).lengths[0] > 0


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory):
    """A tiny assembled model and a training set with its own encoder and eyes."""
    from mm_moslora.models.assembly import load_parts

    folder = tmp_path_factory.mktemp("vlm")
    config = ModelConfig(
        language=str(make_language(folder / "language")),
        vision=VisionConfig(name=str(make_vision(folder / "vision", "clip")), feature_layer=-2),
    )
    assembly = load_parts(config, dtype=torch.float32)
    path = make_records(folder, 12)
    encoder = ConversationEncoder(
        assembly.tokenizer, image_token_id=assembly.image_token_id, tokens_per_image=assembly.tokens_per_image
    )
    source = SourceConfig(path=str(path), image_folder=str(folder / "images"))
    return assembly, TrainingSet([source], encoder, assembly.image_processing, config=DataConfig())


def test_a_named_template_reaches_model_and_processor(tmp_path: Path) -> None:
    from mm_moslora.config.llava_chat_templates import notes_of
    from mm_moslora.models.assembly import load_parts

    folder = make_language(tmp_path / "language")
    assembly = load_parts(ModelConfig(language=str(folder), chat_template="v1", faithful=True), dtype=torch.float32)
    assert notes_of(assembly.tokenizer.chat_template).name == "v1"
    assert assembly.tokenizer.eos_token_id in assembly.model.generation_config.eos_token_id


def test_a_packed_row_gives_each_sample_its_own_loss_and_gradients(tiny_vlm) -> None:
    from mm_moslora.kernels.attention.segment_attention import set_attention, training_attention
    from mm_moslora.training.engine import LossModule

    assembly, data = tiny_vlm
    model = assembly.model.train()
    set_attention(model, training_attention(model))
    module = LossModule(model, None)
    examples = [data.load(number) for number in (0, 3, 5, 6)]  # with and without pictures
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(batch: Batch) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss = module(batch, False)
        loss.backward()
        return loss.item(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    together, packed = gradients(Batch.from_examples(examples))
    alone = [gradients(Batch.from_examples([example])) for example in examples]
    assert together == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
    for place, gradient in enumerate(packed):
        summed = sum(gradients[place] for _, gradients in alone)
        torch.testing.assert_close(gradient, summed, rtol=1e-5, atol=1e-5)
    for first in examples:  # whatever shares its row, a sample's own part of the loss stays
        with_others = gradients(Batch.from_examples([first, examples[1]]))[0]
        apart = sum(gradients(Batch.from_examples([item]))[0] for item in (first, examples[1]))
        assert with_others == pytest.approx(apart, rel=1e-5)


@pytest.mark.slow
def test_the_hugging_face_trainer_takes_our_examples(tiny_vlm, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from mm_moslora.kernels.attention.segment_attention import set_attention, training_attention
    from mm_moslora.training.engine import LossModule

    assembly, data = tiny_vlm
    model = assembly.model.eval()
    collator = Collator(pad_token_id=assembly.tokenizer.pad_token_id)
    examples = [data.load(number) for number in (0, 3, 5)]
    batch = collator([*examples, None])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    set_attention(model, training_attention(model))
    own = LossModule(model, None)(Batch.from_examples(examples), False).item()
    set_attention(model, "sdpa")
    count = int((batch["labels"] != -100).sum())
    assert model(**batch).loss.item() == pytest.approx(own / count, rel=1e-4)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=5e-3, report_to="none",
        remove_unused_columns=False, use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(torch.isfinite(torch.tensor(losses)))


def test_a_collated_row_restarts_positions_and_labels(tiny_vlm) -> None:
    _, data = tiny_vlm
    examples = [data.load(number) for number in (3, 7)]
    row = Collator(pad_token_id=0, packed=True)(examples)
    assert row["position_ids"].tolist()[0] == [*range(examples[0].length), *range(examples[1].length)]
    assert row["labels"][0, examples[0].length] == -100
    padded = Collator(pad_token_id=0, pad_to_multiple_of=16)(examples)
    assert padded["input_ids"].shape[1] % 16 == 0
    with pytest.raises(DataError, match="None of the examples"):
        Collator(pad_token_id=0)([None])


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: f"seed {case['seed']}")
def test_the_llava_order_holds_the_records_of_llavas_steps(case) -> None:
    """Values of LLaVA's own grouping under `torch.manual_seed`."""
    steps = plan_llava(
        [abs(length) for length in case["lengths"]], [length > 0 for length in case["lengths"]],
        seed=case["seed"], epoch=0, global_batch=case["global_batch"],
    )  # fmt: skip
    assert [sorted(step) for step in steps] == case["steps"]


def test_the_llava_order_is_a_recipe_key(tmp_path: Path) -> None:
    data = make_set(make_records(tmp_path, 30), order="llava")
    loader = BatchLoader(data, rank=0, world_size=1, config=data.config, global_batch=4, micro_batch=4)
    assert sorted(number for step in loader.plan(0) for number in step) == list(range(30))
    assert data.words[0] == len(["<image>", "what", "is", "the", "color?", "red", "is", "it", "red?", "yes"])
