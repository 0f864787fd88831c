"""Pipelines of random weights from a config, and drawn pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

SIDE = 64
"""Side of the pictures of these pipelines, pixels."""
WIDTH = 16
"""Width of the text encoders."""


def tiny_pipeline(kind: str) -> Any:
    """A pipeline (of `TINY_PIPELINES`) of a few ten thousand parameters, the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = TINY_PIPELINES[kind]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as from files; T5 has dropout
    return pipeline


def _tokenizer() -> Any:
    """CLIP's tokenizer with single characters as tokens."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77)


def _clip(*, projected: bool) -> Any:
    import transformers

    size = len(_tokenizer())
    config = transformers.CLIPTextConfig(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=WIDTH, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config) if projected else transformers.CLIPTextModel(config)


def _t5(width: int) -> tuple[Any, Any]:
    """T5's encoder and a tokenizer with single characters as tokens."""
    import transformers

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")] + [("▁", -2.0), *((one, -2.0) for one in letters)]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config), tokenizer


def _vae(*, shift: float | None = None) -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        **({} if shift is None else {"shift_factor": shift, "scaling_factor": 1.5}),
    )  # fmt: skip


def _unet(**more: Any) -> Any:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, **more,
    )  # fmt: skip


def _sd(prediction: str = "epsilon") -> Any:
    import diffusers

    return diffusers.StableDiffusionPipeline(
        vae=_vae(), unet=_unet(cross_attention_dim=WIDTH), text_encoder=_clip(projected=False),
        tokenizer=_tokenizer(), safety_checker=None,
        scheduler=diffusers.DDIMScheduler(prediction_type=prediction, steps_offset=1, clip_sample=False),
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> Any:
    import diffusers

    unet = _unet(
        cross_attention_dim=2 * WIDTH, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(), unet=unet, text_encoder=_clip(projected=False), tokenizer=_tokenizer(),
        text_encoder_2=_clip(projected=True), tokenizer_2=_tokenizer(), scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip


def _sd3() -> Any:
    import diffusers

    t5, tokenizer = _t5(2 * WIDTH)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 4, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pos_embed_max_size=16,
        pooled_projection_dim=2 * WIDTH,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(shift=0.1),
        text_encoder=_clip(projected=True), tokenizer=_tokenizer(), text_encoder_2=_clip(projected=True),
        tokenizer_2=_tokenizer(), text_encoder_3=t5, tokenizer_3=tokenizer,
    )  # fmt: skip


def _flux() -> Any:
    import diffusers

    t5, tokenizer = _t5(WIDTH)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipeline: Any = diffusers.FluxPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(shift=0.1), text_encoder=_clip(projected=False), tokenizer=_tokenizer(), text_encoder_2=t5,
        tokenizer_2=tokenizer,
    )  # fmt: skip
    pipeline.default_sample_size = SIDE // 4  # diffusers has Flux's own, 128
    return pipeline


TINY_PIPELINES: dict[str, Callable[[], Any]] = {
    "tiny-sd": _sd,
    "tiny-sd-v": lambda: _sd("v_prediction"),
    "tiny-sdxl": _sdxl,
    "tiny-sd3": _sd3,
    "tiny-flux": _flux,
}
"""Kind to maker."""


def save_pictures(folder: Path) -> Path:
    """A new folder with four drawings of one subject, a patterned cat, on different grounds."""
    folder.mkdir(parents=True)
    for number in range(4):
        _drawn(number).save(folder / f"{number}.png")
    return folder


def _drawn(number: int) -> Image.Image:
    width, height = 96 + 16 * (number % 2), 80
    picture = Image.new("RGB", (width, height), [(214, 226, 238), (240, 226, 205), (205, 232, 210)][number % 3])
    draw = ImageDraw.Draw(picture)
    x, y = width // 2 + round(8 * math.sin(number)), height // 2 + 6
    for side in (-1, 1):
        draw.polygon([(x + side * 22, y - 10), (x + side * 18, y - 34), (x + side * 4, y - 20)], fill=(150, 60, 40))
    draw.ellipse((x - 24, y - 24, x + 24, y + 24), outline=(90, 30, 20), fill=(190, 90, 60), width=2)
    for row in range(-2, 3):  # the stripes of ikat
        draw.line([(x - 16, y + 6 * row + 6), (x, y + 6 * row), (x + 16, y + 6 * row + 6)], fill=(245, 215, 150))
    for side in (-1, 1):
        draw.ellipse((x + side * 9 - 3, y - 8, x + side * 9 + 3, y - 1), fill=(20, 20, 20))
    return picture
