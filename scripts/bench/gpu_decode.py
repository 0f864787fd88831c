"""Greedy decoding of the GPU benchmark (`gpu.py`): this project's, transformers' and vLLM's, 1, 8 and 32 prompts.

A prompt is an image and 64 words, the same number for all, so no row is padded. The model has no adapters, as after a
merge. Times include the images and the prompts. vLLM gets as many words in place of the image, since it would want
a processor for it, and its own random weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from contenders import Contender
from gpu_batches import Clock, GpuShape, conversations_of
from llava_models import base, padded, without_end
from torch import Tensor

from mm_moslora.models.decoding.generation import Prompt, encode_images, generate

BATCHES = (1, 8, 32)
WORDS = 64

Decode = Callable[[dict[str, Tensor], int], list[list[int]]]
"""New tokens of each row of a padded batch, for a number of new tokens."""


def by_ours(shape: GpuShape, device: torch.device) -> Decode:
    """`mm_moslora.models.decoding.generation`, as evaluation and serving use it."""
    model = without_end(base(shape, device, torch.bfloat16))

    def decode(batch: dict[str, Tensor], count: int) -> list[list[int]]:
        features = encode_images(model, batch["pixel_values"])
        rows = zip(batch["input_ids"].cpu(), features, strict=True)
        prompts = [Prompt(input_ids=ids, features=tokens) for ids, tokens in rows]
        return generate(model, prompts, max_new_tokens=count, stop_ids=[])

    return decode


def by_transformers(shape: GpuShape, device: torch.device) -> Decode:
    """`generate` of transformers with its default cache and attention."""
    model: Any = without_end(base(shape, device, torch.bfloat16))

    @torch.inference_mode()
    def decode(batch: dict[str, Tensor], count: int) -> list[list[int]]:
        given = {name: tensor for name, tensor in batch.items() if name != "labels"}
        output = model.generate(**given, max_new_tokens=count, do_sample=False)
        return output[:, given["input_ids"].shape[1] :].tolist()

    return decode


def by_vllm(shape: GpuShape, device: torch.device) -> Decode:
    """vLLM's offline engine on the language model alone."""
    from vllm import LLM, SamplingParams

    config = base(shape, torch.device("meta"), torch.bfloat16).config.get_text_config()
    config.architectures = ["LlamaForCausalLM"]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        engine = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048,
            enable_prefix_caching=False, seed=0,
        )  # fmt: skip

    def decode(batch: dict[str, Tensor], count: int) -> list[list[int]]:
        settings = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in batch["input_ids"].tolist()]
        outputs = engine.generate(prompts, settings, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return decode


MAKERS: dict[str, Callable[[GpuShape, torch.device], Decode]] = {
    "decode-ours": by_ours, "decode-transformers": by_transformers, "decode-vllm": by_vllm,
}  # fmt: skip


def decoding_row(contender: Contender, shape: GpuShape, clock: Clock) -> dict[str, Any]:
    """Tokens per second and seconds to the first token for every batch that there is time for."""
    decode = MAKERS[contender.kind](shape, clock.device)
    layout = base(shape, torch.device("meta"))
    words = max(8, round(WORDS * shape.text_scale))
    found: dict[str, Any] = {}
    for size in BATCHES:
        if clock.is_over:
            found[str(size)] = {"error": "no time left"}
            continue
        items = conversations_of(shape, [shape.image_tokens + words] * size, seed=4)
        batch = padded(layout, items, clock.device, torch.bfloat16)
        first = clock.median(lambda batch=batch: decode(batch, 1), warm_up=1, steps=3)
        times, answers = [], [[0]]
        while len(times) < 3 and not (times and clock.is_over):
            seconds, answers = clock.timed(lambda batch=batch: decode(batch, shape.new_tokens))
            times.append(seconds)
        short = min(map(len, answers))
        if short != shape.new_tokens:
            raise RuntimeError(f"{short} tokens were decoded, expected {shape.new_tokens}.")
        best = min(times)  # the first one may include warm-up
        found[str(size)] = {
            "seconds": best, "tokens_per_second": size * shape.new_tokens / best, "first_token_seconds": first,
        }  # fmt: skip
    return {"decoding": found, "new_tokens": shape.new_tokens, "prompt_tokens": shape.image_tokens + words}
