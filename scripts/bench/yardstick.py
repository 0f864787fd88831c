"""The yardstick of the training benchmark: one small LLaVA, four conversations, and the contenders on them.

Shapes: ``G`` conversations, ``T`` longest of them, ``S`` tokens of all, ``K`` supervised positions, ``C`` vocabulary.

Every contender gets the same weights and samples. The adapters' B is not zero, so that the adapters have an effect.
`Setting` has the sizes of the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from mm_moslora import adapters
from mm_moslora.batch import Batch, Example, ProcessedImage
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.models.memory_efficient.kernel_selection import (
    choose_kernels,
    compile_layers,
    use_kernels,
    use_lean_layers,
    use_loss_head,
)
from mm_moslora.training.engine import LossModule

RANK, ALPHA = 16, 32
LENGTHS = (304, 352, 416, 512)
"""Tokens per conversation, 256 visual ones included: 1,584 in total, 2,048 when padded."""
SUPERVISED = (20, 40, 63, 100)
"""Supervised tokens at the end of each conversation: 223 in total."""
IMAGE_TOKENS = 256
LANGUAGE = "model.language_model"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Step = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of the language model."""

    width: int = 512
    """Width of the language model, in heads of 64."""
    layers: int = 6
    """Layers of the language model."""

    @property
    def inner(self) -> int:
        """Width of the gated MLP."""
        return self.width * 11 // 4


YARDSTICK = Setting()


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to run a training step."""

    model: PreTrainedModel
    forward: Callable[[], Tensor]
    """The loss, mean per supervised token."""

    def step(self) -> Tensor:
        """Forward and backward pass; gradients are dropped."""
        loss = self.forward()
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of A, M, B and of the projector, under the same names for all contenders, fp32."""
        self.model.zero_grad(set_to_none=True)
        self.forward().backward()
        gradients = {_plain(name): p.grad.float() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return gradients


def check_equal(contenders: Mapping[str, Contender], against: str, dtype: str) -> dict[str, float]:
    """Largest relative differences from one of the contenders: of the loss, and in fp32 of any gradient.

    Raises:
        SystemExit: a difference is too large, or gradients are of other parameters.
    """
    losses = {name: float(contender.forward().detach()) for name, contender in contenders.items()}
    differences = {"loss_difference": max(abs(loss / losses[against] - 1) for loss in losses.values())}
    if dtype == "fp32":
        expected, differences["gradient_difference"] = contenders[against].gradients(), 0.0
        for name in contenders.keys() - {against}:
            gradients = contenders[name].gradients()
            if odd := sorted(expected.keys() ^ gradients.keys()):
                raise SystemExit(f"{name}: gradients of other parameters than {against}: {odd[:4]}")
            worst = max(float((gradients[key] - grad).norm() / grad.norm()) for key, grad in expected.items())
            differences["gradient_difference"] = max(differences["gradient_difference"], worst)
    limit = 1e-5 if dtype == "fp32" else 5e-3
    if max(differences.values()) > limit:
        raise SystemExit(f"Differs from {against} ({dtype}): {differences}, expected at most {limit}")
    return differences


def _plain(name: str) -> str:
    """One name for `...lora_B.default.0.weight` (the peer's mixer) and `...lora_mixer.default.weight` (this mixer)."""
    name = name.removeprefix("base_model.model.")
    return name.replace("lora_B.default.0.", "lora_mixer.default.").replace("lora_B.default.1.", "lora_B.default.")


def base(vocabulary: int, dtype: torch.dtype, setting: Setting = YARDSTICK) -> LlavaForConditionalGeneration:
    """CLIP 6 x 256 at 224 pixels, Llama `layers` x `width`; equal weights at every call."""
    torch.manual_seed(0)
    width = setting.width
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=224,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=setting.inner, num_hidden_layers=setting.layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary - 1, image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).to(dtype)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model.train()


def examples(vocabulary: int) -> list[Example]:
    """One picture and one answer each."""
    torch.manual_seed(1)
    made = []
    for number, (length, count) in enumerate(zip(LENGTHS, SUPERVISED, strict=True)):
        ids = torch.randint(3, vocabulary - 1, (length,))
        ids[4 : 4 + IMAGE_TOKENS] = vocabulary - 1
        supervised = torch.zeros(length, dtype=torch.bool)
        supervised[-count:] = True
        pixels = torch.randn(1, 3, 224, 224)
        made.append(
            Example(
                id=str(number),
                input_ids=ids,
                supervised=supervised,
                pictures=[ProcessedImage(tensors={"pixel_values": pixels})],
            )
        )
    return made


def factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A, M and B of every adapted layer by path, fp32; equal at every call."""
    generator = torch.Generator().manual_seed(2)
    by_path = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.startswith(LANGUAGE):
            A = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
            M = torch.linalg.qr(torch.randn(RANK, RANK, generator=generator)).Q
            B = torch.randn(module.out_features, RANK, generator=generator) * 0.02
            by_path[path] = (A, M, B)
    return by_path


def padded(items: list[Example]) -> dict[str, Tensor]:
    """A Hugging Face collator's batch: ``[G, T]`` ids, labels and mask, padded on the right."""
    length = max(item.length for item in items)
    ids, labels, mask = (torch.zeros(len(items), length, dtype=torch.long) for _ in range(3))
    labels.fill_(-100)
    for row, item in enumerate(items):
        ids[row, : item.length] = item.input_ids
        labels[row, : item.length] = torch.where(item.supervised, item.input_ids, -100)
        mask[row, : item.length] = 1
    pixels = torch.cat([picture.tensors["pixel_values"] for item in items for picture in item.pictures])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}


def _adapted_by_peft(
    vocabulary: int, dtype: torch.dtype, setting: Setting, *, wide_adapters: bool, dropout: float = 0.0
) -> tuple[LlavaForConditionalGeneration, peft.PeftModel]:
    """The base with PEFT's LoRA and the authors' mixer ``B(M(A x))`` in it, and PEFT's wrapper around it."""
    model = base(vocabulary, dtype, setting)
    by_path = factors(model)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(by_path), init_lora_weights=True
    )
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=wide_adapters)
    model.model.multi_modal_projector.requires_grad_(True)
    with torch.no_grad():
        for path, (A, M, B) in by_path.items():
            layer: Any = model.get_submodule(path)
            assert isinstance(layer, lora.Linear)
            mixer = nn.Linear(RANK, RANK, bias=False).to(layer.lora_A["default"].weight.dtype)
            layer.lora_A["default"].weight.copy_(A)
            mixer.weight.copy_(M)
            layer.lora_B["default"].weight.copy_(B)
            layer.lora_B["default"] = nn.Sequential(mixer, layer.lora_B["default"])
    return model, wrapped


def _padded_inputs(vocabulary: int, dtype: torch.dtype, setting: Setting) -> dict[str, Tensor]:
    inputs = padded(examples(vocabulary))
    return inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}


def peer(
    vocabulary: int,
    dtype: torch.dtype,
    setting: Setting = YARDSTICK,
    *,
    supervised_only: bool = False,
    wide_adapters: bool = True,
    dropout: float = 0.0,
) -> Contender:
    """Hugging Face's Llava with PEFT's LoRA and the authors' mixer, padded.

    Args:
        vocabulary: C.
        dtype: dtype of the base.
        setting: sizes.
        supervised_only: compute logits at supervised positions only.
        wide_adapters: PEFT's default, adapters in fp32 under a base in bf16; otherwise in the base's dtype.
        dropout: dropout of the adapters.
    """
    model, wrapped = _adapted_by_peft(vocabulary, dtype, setting, wide_adapters=wide_adapters, dropout=dropout)
    batch = _padded_inputs(vocabulary, dtype, setting)

    def all_positions() -> Tensor:
        return wrapped(**batch, use_cache=False).loss

    def supervised() -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        chosen = labels != -100
        return F.cross_entropy(model.lm_head(hidden[chosen]).float(), labels[chosen])

    return Contender(model=model, forward=supervised if supervised_only else all_positions)


def trl(vocabulary: int, dtype: torch.dtype, setting: Setting = YARDSTICK) -> Contender:
    """TRL's SFTTrainer on the same data, adapters in the base's dtype, without its default checkpointing.

    Rows are padded, since it refuses packing and padding-free rows with pictures. Its head computes logits at
    supervised positions only on a GPU with Triton, and at all positions elsewhere.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model, wrapped = _adapted_by_peft(vocabulary, dtype, setting, wide_adapters=False)
    batch = _padded_inputs(vocabulary, dtype, setting)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=wrapped,
            args=SFTConfig(
                output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False,
                report_to="none", max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_list([{"input_ids": [0, 1]}]),  # it is never read
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
        )  # fmt: skip
    count = sum(SUPERVISED)
    return Contender(model=model, forward=lambda: trainer.compute_loss(wrapped, dict(batch), num_items_in_batch=count))


def ours(
    vocabulary: int,
    dtype: torch.dtype,
    setting: Setting = YARDSTICK,
    *,
    lean: bool = True,
    dropout: float = 0.0,
    compiler: str | None = None,
) -> Contender:
    """The step of `mm-moslora train`; with a backend of torch.compile, that of `train.compile`."""
    model = base(vocabulary, dtype, setting)
    by_path = factors(model)
    config = adapters.MoSLoRAConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, task_type="CAUSAL_LM")
    adapters.add_moslora(model, config, component=LANGUAGE, autocast_adapter_dtype=False)
    model.model.multi_modal_projector.requires_grad_(True)
    with torch.no_grad():
        for path, values in by_path.items():
            layer: Any = model.get_submodule(path)
            for part, value in zip((layer.lora_A, layer.lora_mixer, layer.lora_B), values, strict=True):
                part["default"].weight.copy_(value)
    kernels_too = lean and compiler is None
    kernels = choose_kernels("auto", model.device, lean=kernels_too)
    set_attention(model, choose_attention(model).name)
    if lean:
        use_lean_layers(model)
    use_kernels(model, kernels, lean=kernels_too)
    use_loss_head(model)
    if compiler is not None:
        compile_layers(model, compiler)
    module = LossModule(model, None)
    batch = Batch.from_examples(examples(vocabulary))
    return Contender(model=model, forward=lambda: module(batch, True) / batch.supervised_tokens)


def saved_bytes(contender: Contender) -> int:
    """Bytes saved for the backward pass, each storage once, without weights."""
    return saved_by(contender.model, contender.forward)


def saved_by(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass saves for the backward pass; see `saved_bytes`."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del result
    return total
