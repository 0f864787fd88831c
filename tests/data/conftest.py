"""Tokenizers with chat templates of different kinds, and helpers to write data files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tiny import make_tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Turn

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set lead = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (lead if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{{ messages[0]['content'] + ' ' }}{% else %}{% set rest = messages %}{{ 'A chat with an assistant. ' }}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def turns(*texts: str) -> list[Turn]:
    """Questions and answers in turn."""
    return [Turn(role="assistant" if index % 2 else "user", text=text) for index, text in enumerate(texts)]


def with_image(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    return tokenizer


@dataclass
class Setup:
    """A tokenizer with a template, and what its supervised text must look like."""

    tokenizer: PreTrainedTokenizerBase
    answer: Callable[[str], str]
    made: dict[str, ConversationEncoder] = field(default_factory=dict)

    def encoder(self, **options: object) -> ConversationEncoder:
        """Made once per set of options."""
        key = str(options)
        if key not in self.made:
            self.made[key] = self._make(**options)
        return self.made[key]

    def _make(self, **options: object) -> ConversationEncoder:
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        return ConversationEncoder(self.tokenizer, image_token_id=image, tokens_per_image=3, **options)

    def stock(self, conversation: list[Turn], *, prompt: bool = False) -> list[int]:
        """What the tokenizer itself makes of the whole rendered text."""
        messages = [
            {"role": turn.role, "content": turn.text.replace("<image>", "<image>" * 3)} for turn in conversation
        ]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=prompt
        )

    def decode(self, ids: list[int]) -> str:
        """Text of ids in the middle of a sequence; SentencePiece drops a space at the start of one."""
        first = self.tokenizer.encode("x", add_special_tokens=False)
        return self.tokenizer.decode(first + ids, clean_up_tokenization_spaces=False)[1:]


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 32k Llama-style SentencePiece model that the mistral-common wheel carries."""
    import mistral_common

    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def chatml() -> Setup:
    return Setup(with_image(make_tokenizer()), lambda text: text + "<|im_end|>")


@pytest.fixture(scope="session")
def llama2(sentencepiece_folder: Path) -> Setup:
    tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_folder, add_bos_token=True, legacy=True)
    tokenizer.chat_template = LLAMA2
    return Setup(with_image(tokenizer), lambda text: f" {text.strip()} </s>")


@pytest.fixture(scope="session")
def vicuna(sentencepiece_folder: Path) -> Setup:
    tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_folder, add_bos_token=True, legacy=False)
    tokenizer.chat_template = VICUNA
    return Setup(with_image(tokenizer), lambda text: f" {text}</s>")


@pytest.fixture(scope="session", params=["chatml", "llama2", "vicuna"])
def setup(request: pytest.FixtureRequest) -> Setup:
    """Each of the three."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write records as JSONL and give the path."""

    def write_records(*records: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write_records
