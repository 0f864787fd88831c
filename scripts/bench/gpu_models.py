"""Models and steps of the contenders of the GPU benchmark (`gpu.py`), made from configurations on the device.

Weights are random, drawn on the device from one seed, so all contenders on a card have equal ones. B is not zero and
the mixers start as the identity: MoSLoRA and LoRA then compute the same losses and gradients.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, get_args, get_type_hints

import peft
import torch
from gpu_batches import Shape, padded
from gpu_contenders import Contender
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedModel

from mm_moslora import adapters
from mm_moslora.batch import Batch, Example
from mm_moslora.config import ModelConfig, OptimConfig, TrainConfig
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.models.memory_efficient.kernel_selection import (
    Kernels,
    choose_kernels,
    compile_layers,
    use_kernels,
    use_lean_layers,
    use_loss_head,
)
from mm_moslora.models.precision import run_arithmetic
from mm_moslora.models.trainable_parts import checkpoint_layers
from mm_moslora.models.vlm import supervised_hidden
from mm_moslora.training.engine import LossModule, OptimizerSettings, build_engine
from mm_moslora.training.metrics.model_cost import FlopCounter, StepShape
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError

LANGUAGE = "model.language_model"


class LeftOutError(Exception):
    """A contender cannot run here; the message is the reason."""


def base(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
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
    model.get_submodule("model.multi_modal_projector").requires_grad_(True)
    return model.train()


def needed_flops(shape: Shape, rank: int, batches: Sequence[Sequence[Example]]) -> list[float]:
    """FLOPs that a step on each batch needs, for all contenders alike.

    Needed FLOPs exclude padding, recomputation, unsupervised positions in the head and after the last attention,
    gradients of frozen weights, and mixers; a multiply-add counts as two.
    """
    model = base(shape, torch.device("meta"))
    config = adapters.MoSLoRAConfig(r=rank, mixer_init="identity", mixer_trainable=False, task_type="CAUSAL_LM")
    adapters.add_moslora(model, config, component=LANGUAGE, autocast_adapter_dtype=False)
    model.get_submodule("model.multi_modal_projector").requires_grad_(True)
    use_lean_layers(model)
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


@dataclass(kw_only=True)
class Runner:
    """A contender with its model in memory."""

    model: PreTrainedModel
    loss: Callable[[Any], Tensor]
    """Mean loss per supervised token of a prepared micro-batch."""
    prepare: Callable[[Sequence[Example]], Any]
    """A micro-batch on the device."""
    step: Callable[[Sequence[Any]], Tensor | float]
    """One optimiser step on micro-batches; returns the loss."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Around `loss` and its backward pass outside of `step`."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Facts for the row."""

    def gradients(self, items: Sequence[Example]) -> dict[str, Tensor]:
        """Gradients by parameter name, under the same names for all contenders."""
        self.model.zero_grad(set_to_none=True)
        with self.around():
            self.loss(self.prepare(items)).backward()
        found = {plain(name): p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found


def plain(name: str) -> str:
    """One name for the mixer of `reference`, ``lora_B.default.0.weight``, and ``lora_mixer.default.weight``."""
    name = name.removeprefix("base_model.model.")
    return name.replace("lora_B.default.0.", "lora_mixer.default.").replace("lora_B.default.1.", "lora_B.default.")


@torch.no_grad()
def set_factors(model: nn.Module) -> None:
    """Give every adapted layer A and B that all contenders share, rounded to bf16, and the identity for a mixer."""
    generator: torch.Generator | None = None
    for path, module in model.named_modules():
        layer: Any = module
        if not path.startswith(LANGUAGE) or not hasattr(module, "lora_A"):
            continue
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        generator = generator or torch.Generator(A.device).manual_seed(2)
        for factor, scale in ((A, A.shape[1] ** -0.5), (B, 0.02)):
            drawn = torch.randn(factor.shape, generator=generator, device=factor.device) * scale
            factor.copy_(drawn.to(torch.bfloat16))


def with_peft(
    shape: Shape, contender: Contender, device: torch.device, *, wide_adapters: bool
) -> tuple[PreTrainedModel, peft.PeftModel]:
    """The base with PEFT's LoRA in it, and PEFT's wrapper around it.

    Args:
        shape: of the model.
        contender: its rank and dropout apply.
        device: of all weights.
        wide_adapters: PEFT's default, adapters in fp32; otherwise in the base's dtype.
    """
    model = base(shape, device)
    paths = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.startswith(LANGUAGE)]
    rank = contender.rank_of(shape.rank)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=contender.dropout, target_modules=paths)
    with device:
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=wide_adapters)
    model.get_submodule("model.multi_modal_projector").requires_grad_(True)
    set_factors(model)
    return model, wrapped


def plain_step(model: nn.Module, loss: Callable[[Any], Tensor]) -> Callable[[Sequence[Any]], Tensor]:
    """An optimiser step as transformers' Trainer does it: backward passes, clipping, fused AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=trained[0].is_cuda)

    def step(micro_batches: Sequence[Any]) -> Tensor:
        total = torch.zeros((), device=trained[0].device)
        for batch in micro_batches:
            part = loss(batch) / len(micro_batches)
            part.backward()
            total += part.detach()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def hf(shape: Shape, contender: Contender, device: torch.device) -> Runner:
    """Transformers and PEFT as documented: padded rows, all logits, fp32 adapters under autocast, checkpointing."""
    model, wrapped = with_peft(shape, contender, device, wide_adapters=True)
    if contender.checkpointing:
        checkpoint_layers(model.get_decoder())

    def loss(given: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return wrapped(**given, use_cache=False).loss  # type: ignore[no-any-return]

    def prepare(items: Sequence[Example]) -> dict[str, Tensor]:
        return padded(items, device, torch.bfloat16)

    return Runner(model=model, loss=loss, prepare=prepare, step=plain_step(model, loss))


def hf_best(shape: Shape, contender: Contender, device: torch.device) -> Runner:
    """The fastest that transformers, PEFT and Liger give together, on this project's padding-free rows and attention.

    Adapters are in bf16, Liger's kernels replace rotation, norms and the gated product where it is installed, and its
    fused loss reads supervised positions only.
    """
    model, _ = with_peft(shape, contender, device, wide_adapters=False)
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
            return fused(head.weight, hidden, targets)  # type: ignore[no-any-return]

    if contender.checkpointing:
        checkpoint_layers(model.get_decoder())

    def loss(batch: Batch) -> Tensor:
        return entropy(supervised_hidden(model, batch), batch.targets)

    return Runner(
        model=model, loss=loss, step=plain_step(model, loss),
        prepare=lambda items: Batch.from_examples(items).to(device),
        notes={
            "passes": f"Liger's {version('liger-kernel')}" if liger else "PyTorch's (no liger-kernel)",
            "attention": attention.words,
        },
    )  # fmt: skip


def has_liger(device: torch.device) -> bool:
    """Whether Liger's kernels run on a device; in Triton's interpreter on any."""
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and importlib.util.find_spec("liger_kernel") is not None


def kernels_of(contender: Contender, device: torch.device) -> Kernels:
    """The kernels that a contender asks for.

    Raises:
        LeftOutError: they cannot run here, or are those of `auto`.
    """
    wanted = "torch" if contender.kernels == "inductor" else contender.kernels
    if wanted not in get_args(get_type_hints(ModelConfig)["kernels"]):
        raise LeftOutError(f"model.kernels knows no {wanted!r}")
    try:
        found = choose_kernels(wanted, device, lean=contender.kernels != "inductor")
    except ConfigError as error:
        raise LeftOutError(str(error)) from error
    usual = choose_kernels("auto", device)
    if contender.kernels not in ("auto", "inductor") and found.passes is usual.passes:
        raise LeftOutError("the kernels are those of `ours`")
    return found


def ours(shape: Shape, contender: Contender, device: torch.device) -> Runner:
    """The step of `mm-moslora train`."""
    kernels, compiles = kernels_of(contender, device), contender.kernels == "inductor"
    model = base(shape, device)
    rank = contender.rank_of(shape.rank)
    config = adapters.MoSLoRAConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=contender.dropout, task_type="CAUSAL_LM", mixer_init="identity",
        mixer_trainable=contender.mixer,
    )  # fmt: skip
    with device:
        adapters.add_moslora(model, config, component=LANGUAGE, autocast_adapter_dtype=False)
    model.get_submodule("model.multi_modal_projector").requires_grad_(True)
    set_factors(model)
    attention = choose_attention(model, device=device)
    set_attention(model, attention.name)
    use_loss_head(model)
    use_lean_layers(model)
    if contender.checkpointing:
        checkpoint_layers(model.get_decoder())
    if compiles:
        compile_layers(model, "inductor")
    words = use_kernels(model, kernels, lean=not compiles)
    module = LossModule(model, None)
    engine = build_engine(
        module, parameter_groups(module, OptimConfig()), TrainConfig(zero=contender.zero), precision="bf16",
        optimizer=OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0),
    )  # fmt: skip

    def step(micro_batches: Sequence[Batch]) -> float:
        with run_arithmetic(deterministic=False):
            result = engine.step(micro_batches, 1.0)
        assert result.applied, "the step was skipped: a loss or gradient is not finite"
        return result.loss

    return Runner(
        model=model, step=step, around=lambda: run_arithmetic(deterministic=False),
        prepare=lambda items: Batch.from_examples(items).to(device),
        loss=lambda batch: module(batch, True) / max(1, batch.supervised_tokens),
        notes={"passes": "compiled by inductor" if compiles else words, "attention": attention.words},
    )  # fmt: skip


BUILDERS: dict[str, Callable[[Shape, Contender, torch.device], Runner]] = {
    "hf": hf, "hf-best": hf_best, "ours": ours,
}  # fmt: skip


def build(shape: Shape, contender: Contender, device: torch.device) -> Runner:
    """A contender's model, its loss and its step."""
    if contender.kind == "ours":
        distributed.join()
    return BUILDERS[contender.kind](shape, contender, device)


def reference(shape: Shape, device: torch.device, items: Sequence[Example]) -> dict[str, Tensor]:
    """Gradients in fp64: transformers' layers, PEFT's LoRA with a mixer as one more layer, one conversation at a time.

    RMS norms, the rotation's angles and the softmax of the loss are in fp32, as transformers has them.
    """
    model, wrapped = with_peft(shape, Contender(name="reference", kind="hf"), device, wide_adapters=False)
    for module in model.modules():
        if isinstance(module, lora.Linear):
            factor: Any = module.lora_B["default"]
            mixer = nn.Linear(factor.in_features, factor.in_features, bias=False, device=device)
            nn.init.eye_(mixer.weight)
            module.lora_B["default"] = nn.Sequential(mixer, factor)
    model.double()
    whole = sum(int(item.supervised[1:].sum()) for item in items)
    for item in items:
        share = int(item.supervised[1:].sum()) / whole
        (wrapped(**padded([item], device, torch.float64), use_cache=False).loss * share).backward()
    return {plain(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Relative differences ``|g - e| / |e|`` of the gradients of factors: median, worst, and the worst one's name.

    Raises:
        RuntimeError: a factor has no gradient.
    """
    wanted = [name for name in expected if "lora_A" in name or "lora_B" in name]
    if missing := [name for name in wanted if name not in found]:
        raise RuntimeError(f"{len(missing)} factors have no gradient, {missing[0]} among them.")
    errors = {
        name: float((gradient.double() - expected[name]).norm() / expected[name].norm())
        for name, gradient in found.items()
        if "lora_" in name
    }
    if bad := [name for name, error in errors.items() if not math.isfinite(error)]:
        raise RuntimeError(f"{len(bad)} gradients are not finite, {bad[0]} among them.")
    ordered, worst = sorted(errors.values()), max(errors, key=errors.__getitem__)
    return {"median": ordered[len(ordered) // 2], "worst": errors[worst], "worst_of": worst, "factors": len(errors)}
