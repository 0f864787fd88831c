"""Examples in stock models: a packed row, the Hugging Face trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_language, make_records, make_vision

from mm_moslora.batch import Batch, Example
from mm_moslora.config import DataConfig, ModelConfig, SourceConfig, VisionConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.models.batching.padded_batch import PaddedCollator
from mm_moslora.utils.errors import DataError


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory):
    """A tiny assembled model and a training set with its own encoder and image processing."""
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
    from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
    from mm_moslora.training.engine import LossModule

    assembly, data = tiny_vlm
    model = assembly.model.train()
    set_attention(model, choose_attention(model).name)
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

    from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
    from mm_moslora.training.engine import LossModule

    assembly, data = tiny_vlm
    model = assembly.model.eval()
    collator = PaddedCollator(model=model)
    examples = [data.load(number) for number in (0, 3, 5)]
    batch = collator([*examples, None])
    with pytest.raises(DataError, match="None of the examples"):
        collator([None])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    set_attention(model, choose_attention(model).name)
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


def test_a_batch_on_a_device_knows_the_host_it_came_from():
    example = Example(id="a", input_ids=torch.arange(4), supervised=torch.ones(4, dtype=torch.bool))
    batch = Batch.from_examples([example])
    moved = batch.to("meta")
    assert moved.on_host is batch
    assert moved.to("cpu") is batch
    assert batch.to("cpu").host is None
