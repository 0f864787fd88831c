"""Models of the training benchmarks: LLaVAs made from configurations, conversations, and the ways to train them.

Shapes: ``G`` conversations of a batch, ``T`` tokens of the longest.

Every contender gets the same weights and conversations. B is not zero, so that the adapters have an effect.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import peft
import torch
from contenders import Way
from harness import version_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedModel

from mm_moslora import adapters
from mm_moslora.batch import IGNORED, Batch, Example, ProcessedImage
from mm_moslora.config import Recipe
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.models.batching.padded_batch import PaddedCollator
from mm_moslora.models.memory_efficient.kernel_selection import choose_kernels, use_lean_layers
from mm_moslora.models.trainable_parts import checkpoint_layers
from mm_moslora.models.vlm import supervised_hidden
from mm_moslora.training.engine import LossModule
from mm_moslora.training.engine.model_execution import kernels_of, prepare_execution
from mm_moslora.training.metrics.model_cost import FlopCounter, StepShape
from mm_moslora.utils.errors import ConfigError

LANGUAGE = "model.language_model"
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LeftOutError(Exception):
    """A contender cannot run here; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision: tuple[int, int, int, int] = (1024, 4096, 24, 16)
    """Width, MLP width, layers and heads of the CLIP encoder; the default is CLIP-L."""
    pixels: int = 336
    rank: int = 128

    @property
    def image_tokens(self) -> int:
        """Visual tokens of an image."""
        return (self.pixels // 14) ** 2


def small(width: int = 512, layers: int = 6, vocabulary: int = 32_000) -> Shape:
    """The model of the benchmarks on a CPU: CLIP 6 x 256 at 224 pixels, and a Llama with heads of 64."""
    return Shape(
        width=width, inner=width * 11 // 4, layers=layers, heads=width // 64, kv_heads=width // 64,
        vocabulary=vocabulary, vision=(256, 1024, 6, 4), pixels=224, rank=16,
    )  # fmt: skip


def base(shape: Shape, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The frozen model with a projector that trains; equal weights at every call on a device."""
    width, inner, layers, heads = shape.vision
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=shape.pixels, patch_size=14, projection_dim=width,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.width // shape.heads, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=shape.vocabulary - 1,
        image_seq_length=shape.image_tokens, vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)
    model.requires_grad_(False)
    return _with_projector(model).train()


def _with_projector(model: PreTrainedModel) -> PreTrainedModel:
    model.get_submodule("model.multi_modal_projector").requires_grad_(True)
    return model


def without_end(model: PreTrainedModel) -> PreTrainedModel:
    """The model for decoding; no token ends an answer."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def examples(shape: Shape, lengths: Sequence[int], supervised: Sequence[int], *, seed: int) -> list[Example]:
    """Conversations with one image each, where it has room, and random text, of which the end is supervised."""
    generator = torch.Generator().manual_seed(seed)
    conversations = []
    for number, (length, count) in enumerate(zip(lengths, supervised, strict=True)):
        ids = torch.randint(3, shape.vocabulary - 1, (length,), generator=generator)
        visual = visual_tokens(shape, length)
        ids[4 : 4 + visual] = shape.vocabulary - 1
        pixels = torch.randn(1, 3, shape.pixels, shape.pixels, generator=generator)
        pictures = [ProcessedImage(tensors={"pixel_values": pixels})] if visual else []
        conversations.append(
            Example(id=str(number), input_ids=ids, supervised=torch.arange(length) >= length - count, pictures=pictures)
        )
    return conversations


def visual_tokens(shape: Shape, length: int) -> int:
    """Visual tokens of a conversation of this length."""
    return shape.image_tokens if length >= shape.image_tokens + 8 else 0


def padded(
    model: PreTrainedModel, items: Sequence[Example], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A Hugging Face collator's batch: ``[G, T]`` ids, labels and mask, padded on the right, and all images."""
    batch = PaddedCollator(model=model)(items)
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in batch.items()}


@dataclass(kw_only=True)
class Runner:
    """One way to train, with its model in memory."""

    model: PreTrainedModel
    loss: Callable[[Any], Tensor]
    """Mean loss per supervised token of a prepared batch."""
    prepare: Callable[[Sequence[Example]], Any]
    """A batch on the device."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Around `loss` and its backward pass."""
    module: LossModule | None = None
    """This project's loss, for its engine."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Facts for the row."""

    def backward(self, batch: Any) -> Tensor:
        """Forward and backward pass; the loss."""
        with self.around():
            loss = self.loss(batch)
            loss.backward()
        return loss.detach()

    def step_on(self, items: Sequence[Example]) -> Callable[[], Tensor]:
        """A step on one batch, after which gradients are dropped."""
        batch = self.prepare(items)

        def step() -> Tensor:
            loss = self.backward(batch)
            self.model.zero_grad(set_to_none=True)
            return loss

        return step

    def gradients(self, items: Sequence[Example]) -> dict[str, Tensor]:
        """Gradients by parameter name, under the same names for all contenders."""
        self.model.zero_grad(set_to_none=True)
        self.backward(self.prepare(items))
        found = gradients_of(self.model)
        self.model.zero_grad(set_to_none=True)
        return found


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model, with one name for ``lora_B.default.0`` (mixer of a peer) and ``lora_mixer.default``."""
    return {
        name.removeprefix("base_model.model.")
        .replace("lora_B.default.0.", "lora_mixer.default.")
        .replace("lora_B.default.1.", "lora_B.default."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def check_equal(
    contenders: Mapping[str, Runner], items: Sequence[Example], against: str, dtype: str
) -> dict[str, float]:
    """Largest relative differences from one of the contenders, of the loss and in fp32 of any gradient, if small."""
    losses = {name: float(contender.step_on(items)()) for name, contender in contenders.items()}
    differences = {"loss_difference": max(abs(loss / losses[against] - 1) for loss in losses.values())}
    if dtype == "fp32":
        expected, differences["gradient_difference"] = contenders[against].gradients(items), 0.0
        for name in contenders.keys() - {against}:
            gradients = contenders[name].gradients(items)
            if odd := sorted(expected.keys() ^ gradients.keys()):
                raise SystemExit(f"{name}: gradients of other parameters than {against}: {odd[:4]}")
            worst = max(float((gradients[key] - grad).norm() / grad.norm()) for key, grad in expected.items())
            differences["gradient_difference"] = max(differences["gradient_difference"], worst)
    limit = 1e-5 if dtype == "fp32" else 5e-3
    if max(differences.values()) > limit:
        raise SystemExit(f"Differs from {against} ({dtype}): {differences}, expected at most {limit}")
    return differences


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers with adapters, in the order of the model."""
    return [m for path, m in model.named_modules() if path.startswith(LANGUAGE) and hasattr(m, "lora_A")]


@torch.no_grad()
def set_factors(model: nn.Module, *, mixed: bool) -> None:
    """Give every adapted layer A and B, and where mixed an orthogonal M, that all contenders share; A, B in bf16."""
    generator: torch.Generator | None = None
    for layer in adapted_layers(model):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        generator = generator or torch.Generator(A.device).manual_seed(2)
        for factor, scale in ((A, A.shape[1] ** -0.5), (B, 0.02)):
            drawn = torch.randn(factor.shape, generator=generator, device=factor.device) * scale
            factor.copy_(drawn.to(torch.bfloat16))
        if mixed:
            drawn = torch.randn(len(A), len(A), generator=generator, device=A.device)
            mixer_of(layer).weight.copy_(torch.linalg.qr(drawn).Q)


def mixer_of(layer: Any) -> nn.Linear:
    """The mixer of an adapted layer; a layer of PEFT gets one, the identity, before B."""
    if hasattr(layer, "lora_mixer"):
        return layer.lora_mixer["default"]
    factor = layer.lora_B["default"]
    rank = factor.in_features
    mixer = nn.Linear(rank, rank, bias=False, device=factor.weight.device, dtype=factor.weight.dtype)
    nn.init.eye_(mixer.weight)
    layer.lora_B["default"] = nn.Sequential(mixer, factor)
    return mixer


def with_peft(shape: Shape, way: Way, device: torch.device) -> tuple[PreTrainedModel, peft.PeftModel]:
    """The base with PEFT's LoRA in it, and PEFT's wrapper around it."""
    model = base(shape, device, DTYPES[way.dtype])
    paths = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.startswith(LANGUAGE)]
    config = peft.LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, lora_dropout=way.dropout, target_modules=paths)
    with device:
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=way.wide_adapters)
    set_factors(model, mixed=way.mixed)
    if way.checkpointing:
        checkpoint_layers(model.get_decoder())
    return _with_projector(model), wrapped


def hf(shape: Shape, way: Way, device: torch.device = CPU) -> Runner:
    """Hugging Face's Llava with PEFT's LoRA and, where it is mixed, the authors' mixer ``B(M(A x))``, padded."""
    model, wrapped = with_peft(shape, way, device)
    dtype = DTYPES[way.dtype]

    def all_positions(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=way.autocast):
            return wrapped(**batch, use_cache=False).loss

    def supervised(batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        labels = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
        chosen = labels != IGNORED
        return F.cross_entropy(model.lm_head(hidden[chosen]).float(), labels[chosen])

    return Runner(
        model=model,
        loss=supervised if way.supervised_only else all_positions,
        prepare=lambda items: padded(model, items, device, dtype),
    )


def trl(shape: Shape, way: Way) -> Runner:
    """TRL's SFTTrainer without its default checkpointing, padded: it refuses other rows with images."""
    import tempfile

    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model, wrapped = with_peft(shape, way, CPU)
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

    def loss(batch: dict[str, Tensor]) -> Tensor:
        count = int((batch["labels"] != IGNORED).sum())
        return trainer.compute_loss(wrapped, dict(batch), num_items_in_batch=count)

    return Runner(model=model, loss=loss, prepare=lambda items: padded(model, items, CPU, DTYPES[way.dtype]))


def hf_best(shape: Shape, way: Way, device: torch.device) -> Runner:
    """The fastest that transformers, PEFT and Liger give together, on this project's padding-free rows and attention.

    Liger's kernels replace rotation, norms and the gated product, and its fused loss reads supervised positions only.
    """
    model, _ = with_peft(shape, way, device)
    attention = choose_attention(model, device=device)
    set_attention(model, attention.name)
    head: Any = model.get_output_embeddings()

    def entropy(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets)

    if liger := has_liger(device):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, apply_liger_kernel_to_llama

        fused = LigerFusedLinearCrossEntropyLoss()
        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False, model=model.get_decoder())

        def entropy(hidden: Tensor, targets: Tensor) -> Tensor:
            return fused(head.weight, hidden, targets)

    return Runner(
        model=model, loss=lambda batch: entropy(supervised_hidden(model, batch), batch.targets),
        prepare=lambda items: Batch.from_examples(items).to(device),
        notes={
            "passes": f"Liger's {version_of('liger-kernel')}" if liger else "PyTorch's (no liger-kernel)",
            "attention": attention.words,
        },
    )  # fmt: skip


def has_liger(device: torch.device) -> bool:
    """Whether Liger's kernels run on a device; in Triton's interpreter on any."""
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and importlib.util.find_spec("liger_kernel") is not None


def ours(shape: Shape, way: Way, device: torch.device = CPU) -> Runner:
    """The step of `mm-moslora train`, where its kernels can run and, if they are named, are not those of `auto`."""
    compiler = "inductor" if way.kernels == "inductor" else None
    recipe = Recipe.from_dict(
        {
            "model": {"vlm": "llava", "kernels": "auto" if compiler else way.kernels, "lean_layers": way.lean},
            "data": {"train": [{"path": "none"}]},
            "train": {"output": "none", "compile": compiler, "gradient_checkpointing": way.checkpointing},
        }
    )
    try:
        kernels = kernels_of(recipe, way.dtype)
    except ConfigError as error:
        raise LeftOutError(str(error)) from error
    if recipe.model.kernels != "auto" and kernels.passes is choose_kernels("auto", device).passes:
        raise LeftOutError("the kernels are those of `ours`")
    model = base(shape, device, DTYPES[way.dtype])
    config = adapters.MoSLoRAConfig(
        r=shape.rank, lora_alpha=2 * shape.rank, lora_dropout=way.dropout, task_type="CAUSAL_LM",
        mixer_init="identity", mixer_trainable=way.mixer,
    )  # fmt: skip
    with device:
        adapters.add_moslora(model, config, component=LANGUAGE, autocast_adapter_dtype=False)
    _with_projector(model)
    set_factors(model, mixed=way.mixed)
    prepare_execution(model, recipe, kernels, way.dtype)
    module = LossModule(model, None)
    return Runner(
        model=model, module=module, prepare=lambda items: Batch.from_examples(items).to(device),
        loss=lambda batch: module(batch, True) / max(1, batch.supervised_tokens),
        notes={
            "passes": f"compiled by {compiler}" if compiler else kernels.words,
            "attention": choose_attention(model, device=device).words,
        },
    )  # fmt: skip


def needed_flops(shape: Shape, batches: Sequence[Sequence[Example]]) -> list[float]:
    """FLOPs that a step on each batch needs, for all contenders alike.

    Needed FLOPs exclude padding, recomputation, unsupervised positions in the head and after the last attention,
    gradients of frozen weights, and mixers; a multiply-add counts as two.
    """
    model = base(shape, torch.device("meta"))
    config = adapters.MoSLoRAConfig(r=shape.rank, mixer_init="identity", mixer_trainable=False, task_type="CAUSAL_LM")
    adapters.add_moslora(model, config, component=LANGUAGE, autocast_adapter_dtype=False)
    use_lean_layers(_with_projector(model))
    counter = FlopCounter(model)
    return [
        counter.count(
            replace(
                StepShape.of(
                    [item.length for item in batch],
                    supervised=sum(int(item.supervised[1:].sum()) for item in batch),
                    images=sum(len(item.pictures) for item in batch),
                ),
                micro_batches=0,  # leaves out the products B M
            )
        ).total
        for batch in batches
    ]
