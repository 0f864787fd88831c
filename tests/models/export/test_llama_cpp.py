"""llama.cpp on exported GGUF files: token ids, logits and answers as transformers gives them, with pictures, too."""

from __future__ import annotations

import base64
import io
import json
import urllib.request

import pytest
import torch
from PIL import Image
from tiny import make_tokenizer, make_vision
from vlm_runs import make_language_of

from mm_moslora.config import ModelConfig, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.gguf_model import export_gguf

llama_cpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp, which pip install xllamacpp brings")
TEXT = "what is the color of 1234 red circles?\n\n  it's naïve 🙂"
ANSWER = 6


@pytest.fixture
def served():
    """Starts llama.cpp's server on this machine with some files: one thread, everything in fp32."""
    kept = []

    def start(files):
        wanted = llama_cpp.CommonParams()
        wanted.model.path, wanted.mmproj.path = str(files.text), str(files.mmproj or "")
        wanted.n_ctx, wanted.n_parallel, wanted.warmup, wanted.verbosity = 256, 1, False, 0
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
        wanted.cache_type_k = wanted.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
        kept.append(llama_cpp.Server(wanted))
        return kept[-1].listening_address

    yield start
    kept.clear()


def post(address, path, **body):
    asked = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=120) as reply:
        return json.loads(reply.read())


def ask(address, prompt, *, size):
    """How many tokens the prompt had, the answer, and log probabilities ``[steps, size]`` of its last steps.

    The server leaves out those of tokens that are no whole character.
    """
    options = {"n_predict": ANSWER, "temperature": 0, "n_probs": size, "ignore_eos": True, "return_tokens": True}
    reply = post(address, "/completion", prompt=prompt, **options)
    steps = reply["completion_probabilities"]
    assert [step["id"] for step in steps] == reply["tokens"][-len(steps) :]
    found = torch.full((len(steps), size), float("nan"))
    for step, row in zip(steps, found, strict=True):
        for item in step["top_logprobs"]:
            row[item["id"]] = item["logprob"]
    return reply["tokens_evaluated"], reply["tokens"], found


def expected(assembly, **inputs):
    """The same from transformers, of all steps."""
    options = {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        made = assembly.model.generate(**inputs, max_new_tokens=ANSWER, min_new_tokens=ANSWER, **options)
    return inputs["input_ids"].shape[1], made.sequences[0, -ANSWER:].tolist(), torch.cat(made.logits).log_softmax(-1)


def difference(found, wanted):
    """Of the log probabilities; a token that llama.cpp leaves out counts as infinitely wrong."""
    return float((found - wanted[-len(found) :]).abs().nan_to_num(nan=float("inf")).max())


@pytest.mark.parametrize("family", ["smollm2", "llama3", "mistral", "qwen2.5", "qwen3"])
def test_text_gives_the_same_ids_probabilities_and_answer(family, served, tmp_path):
    assembly = load_parts(ModelConfig(language=make_language_of(tmp_path / "language", family)))
    ids = assembly.tokenizer.encode(TEXT, add_special_tokens=False)
    wanted = expected(assembly, input_ids=torch.tensor([ids]))
    address = served(export_gguf(assembly, tmp_path / "out"))
    found = ask(address, TEXT, size=wanted[2].shape[1])
    print(f"{family}: log probabilities differ by {difference(found[2], wanted[2]):.1e}")
    assert found[:2] == wanted[:2]
    assert difference(found[2], wanted[2]) < 1e-3


@pytest.mark.parametrize("digits", [r"\p{N}{1,3}", r"\p{N}", None], ids=["Llama 3", "Qwen", "SmolLM"])
def test_words_are_cut_as_the_tokenizer_cuts_them(digits, served, tmp_path):
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    folder = make_language_of(tmp_path / "language", "smollm2")
    tokenizer = make_tokenizer()
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    first = Digits(individual_digits=True) if digits is None else Split(Regex(words + digits + rest), "isolated")
    last = ByteLevel(add_prefix_space=False, use_regex=digits is None)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([first, last])
    tokenizer.save_pretrained(folder)
    assembly = load_parts(ModelConfig(language=folder))
    address = served(export_gguf(assembly, tmp_path / "out"))
    for text in (TEXT, "a<|im_end|>\n<|im_start|>user\n\n\n  x\ty\r\nz ", "I'LL say 3.14, they're 100% red\u3000!"):
        ids = assembly.tokenizer.encode(text, add_special_tokens=False)
        assert post(address, "/tokenize", content=text, add_special=False, parse_special=True)["tokens"] == ids


@pytest.mark.parametrize(("size", "apart"), [((32, 32), 1e-3), ((50, 30), 0.05)], ids=["as large", "scaled by each"])
def test_a_picture_gives_the_same_probabilities(size, apart, served, tmp_path):
    language = make_language_of(tmp_path / "language", "smollm2")
    tower = str(make_vision(tmp_path / "clip", "clip"))
    assembly = load_parts(ModelConfig(language=language, vision=VisionConfig(name=tower)))
    image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 60).convert("RGB")
    text = "<|im_start|>user\n<image>\nwhat is it?<|im_end|>\n"
    inputs = assembly.processor(images=[image], text=text, return_tensors="pt")
    wanted = expected(assembly, **inputs)
    blank = expected(assembly, **inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])})
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    address = served(export_gguf(assembly, tmp_path / "out"))
    with urllib.request.urlopen(f"{address}/props", timeout=60) as reply:
        mark = json.loads(reply.read())["media_marker"]
    data = base64.b64encode(buffer.getvalue()).decode()
    prompt = {"prompt_string": text.replace("<image>", mark), "multimodal_data": [data]}
    found = ask(address, prompt, size=wanted[2].shape[1])
    behind = expected_with_cls_behind(assembly, **inputs)
    right, wrong, none = (difference(found[2], item[2]) for item in (wanted, behind, blank))
    print(f"{size}: log probabilities differ by {right:.1e}, with CLS behind by {wrong:.1e}, no picture by {none:.1e}")
    assert found[0] == wanted[0]
    assert min(right, wrong) < apart
    assert none > 0.2


def expected_with_cls_behind(assembly, **inputs):
    """What transformers would give with llama.cpp's fault of 2025 and 2026 (ggml-org/llama.cpp issue 25814): CLS stands
    behind the patches, all take the position of the one before, and the first patch is left out in place of CLS."""
    inner = assembly.model.model.vision_tower.embeddings
    order = inner.forward

    def behind(pixel_values, *_, **__):
        patches = inner.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        cls = inner.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([patches, cls], dim=1) + inner.position_embedding(inner.position_ids)

    inner.forward = behind
    try:
        return expected(assembly, **inputs)
    finally:
        inner.forward = order
