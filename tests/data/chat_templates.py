"""Tokenizers and chat templates of the kinds that exist: byte-level and SentencePiece, with and without BOS."""

from __future__ import annotations

import functools

from tiny import CHATML, make_tokenizer

from tests.data.real_tokenizers import tokenizer_copy

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
