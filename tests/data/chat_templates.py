"""Tokenizers and chat templates of the kinds that exist, with and without BOS, and real ones that packages carry.

`MM_MOSLORA_TEST_TOKENIZERS` may name a folder with further tokenizers, one folder each, such as GPT-2's.
"""

from __future__ import annotations

import base64
import copy
import functools
import importlib.resources
import json
import os
import tempfile
from pathlib import Path

import pytest
from tiny import CHATML, make_tokenizer
from tokenizers import AddedToken

VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set rest = messages[1:] %}"
    "{% else %}A chat between a curious user and an assistant.{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
VICUNA_WITHOUT_BOS = VICUNA.replace("{{ bos_token }}", "", 1)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% set content = system + message['content'] if loop.index0 == 0 else message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<s>' + role + '\n' + message['content'] | trim + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>model\n' }}{% endif %}"
)
QWEN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_PROMPT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Question: {{ message['content'] }}\n"
    "{% else %}Answer: {{ message['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
)
WITHOUT_END = "{% for message in messages %}\n### {{ message['role'] }}:\n{{ message['content'] }}{% endfor %}" + (
    "{% if add_generation_prompt %}\n### assistant:\n{% endif %}"
)


def shipped(name: str) -> str:
    """The chat template that TRL carries under this name; without TRL the test is skipped."""
    pytest.importorskip("trl", reason="trl is not installed")
    return importlib.resources.files("trl").joinpath("chat_templates", f"{name}.jinja").read_text()


TEMPLATES = {
    "bytes-chatml": ("bytes", CHATML),
    "bytes-qwen": ("bytes", QWEN),
    "bytes-plain": ("bytes", None),
    "bytes-without-prompt": ("bytes", WITHOUT_PROMPT),
    **{
        f"{kind}-{name}": (kind, template)
        for kind in ("sp-legacy", "sp")
        for name, template in {
            "vicuna": VICUNA, "llama2": LLAMA_2, "gemma": GEMMA, "plain": None,
            "chatml": CHATML.replace("<|im_end|>", "</s>"),
        }.items()
    },
}  # fmt: skip


def build_tokenizer(kind: str, template: str | None, *, image: bool = True, add_bos: bool = False):
    """A tokenizer of a kind (bytes, sp, sp-legacy) with a template."""
    if kind == "bytes":
        tokenizer = make_tokenizer()
    else:
        tokenizer = tokenizer_copy(kind.replace("sp", "llama") + "-without-bos" * (not add_bos))
    tokenizer.chat_template = template
    if image:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    return tokenizer


@functools.cache
def shared_tokenizer(name: str):
    """One of `TEMPLATES`, made once; do not change it."""
    return build_tokenizer(*TEMPLATES[name])


def tokenizer_of(name: str):
    """One of `TEMPLATES`, or a new one with the tokens of thinking and a template that TRL carries."""
    if name in TEMPLATES:
        return shared_tokenizer(name)
    made = make_tokenizer()
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    made.chat_template = shipped(name)
    return made


NAMES = ("llama-legacy", "llama", "mistral-v3", "tekken", "open_clip", "smollm2", "gpt2", "stories260k")


@functools.cache
def real_tokenizer(name: str):
    """One of `NAMES`, made once; change a `tokenizer_copy`. Skips the test where its files are missing."""
    if name.startswith("llama"):
        return _sentencepiece("tokenizer.model.v1", legacy="legacy" in name, add_bos_token="without-bos" not in name)
    if name == "mistral-v3":
        return _sentencepiece("mistral_instruct_tokenizer_240323.model.v3", legacy=False, add_bos_token=True)
    if name == "tekken":
        return _tekken()
    if name == "open_clip":
        return _open_clip()
    return _from_folder(name)


def tokenizer_copy(name: str):
    """A copy of `real_tokenizer(name)` to change; its vocabulary is shared, since copying that takes half a second."""
    tokenizer = real_tokenizer(name)
    values = [*vars(tokenizer).values(), *tokenizer.init_kwargs.values()]
    vocabularies = [value for value in values if isinstance(value, dict | list) and len(value) > 1000]
    return copy.deepcopy(tokenizer, {id(value): value for value in vocabularies})


def _data(package: str, *parts: str) -> bytes:
    return importlib.resources.files(package).joinpath(*parts).read_bytes()


def _sentencepiece(file: str, **options: bool):
    from transformers import LlamaTokenizer

    folder = Path(tempfile.mkdtemp())
    (folder / "tokenizer.model").write_bytes(_data("mistral_common", "data", file))
    return LlamaTokenizer.from_pretrained(folder, **options)


def _tekken():
    """The first 16,000 ranks of Mistral's tiktoken vocabulary, which are a BPE vocabulary of their own."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    stored = json.loads(_data("mistral_common", "data", "tekken_240911.json"))
    path = Path(tempfile.mkdtemp()) / "vocabulary.tiktoken"
    ranks = [(base64.b64decode(item["token_bytes"]), item["rank"]) for item in stored["vocab"][:16_000]]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks))
    converter = TikTokenConverter(str(path), pattern=stored["config"]["pattern"])
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), bos_token="<s>", eos_token="</s>")


def _open_clip():
    """OpenAI CLIP's byte-pair vocabulary, which knows lower case only."""
    import gzip

    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = gzip.decompress(_data("open_clip", "bpe_simple_vocab_16e6.txt.gz")).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 1]
    symbols = list(bytes_to_unicode().values())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(line.split()) for line in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder = Path(tempfile.mkdtemp())
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def _from_folder(name: str):
    from transformers import AutoTokenizer

    more = os.environ.get("MM_MOSLORA_TEST_TOKENIZERS")
    places = [Path(more) / name] if more else []
    if name == "smollm2":
        from mm_moslora.utils.run_paths import cache_folder

        places.append(cache_folder("quickstart") / "smollm2-135m-instruct")
    for place in places:
        if place.is_dir():
            return AutoTokenizer.from_pretrained(place)
    pytest.skip(f"the tokenizer {name} is in none of {[str(place) for place in places]}")
