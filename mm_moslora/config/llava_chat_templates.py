"""LLaVA's conversation templates and Alpaca's by name, as chat templates that are saved with the tokenizer.

Each begins with a Jinja comment, which renderers ignore. The comment records the template's name and whether LLaVA's
own token ids are wanted (`faithful`). A comment at the end of any template records that its model is asked to think.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from mm_moslora.utils.errors import ConfigError, suggestion

logger = logging.getLogger(__name__)

_HEADER = re.compile(r"\{#- mm_moslora: (\w+)( faithful)? -#\}")
_THINKS = "{# mm_moslora: asked to think #}"
_ASSISTANT = "message['role'] == 'assistant'"
_SYSTEM = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set system = DEFAULT -%}{%- set rest = messages -%}{%- endif -%}"
)
_FOLDED = "{%- set content = system + JOINT + message['content'] if loop.first and system else message['content'] -%}"


def _turns(user: str, assistant: str, *, head: str = "", prompt: str = "", content: str = "") -> str:
    """A template from its pieces; `C` stands for the content."""
    before = content or "{%- set content = message['content'] -%}"
    return (
        head + "{%- for message in rest -%}" + before + "{%- if " + _ASSISTANT + " -%}" + assistant + "{%- else -%}"
        + user + "{%- endif -%}{%- endfor -%}"
        + ("{%- if add_generation_prompt -%}" + prompt + "{%- endif -%}" if prompt else "")
    )  # fmt: skip


_INST = "{{ '[INST] ' + content + ' [/INST]' }}"
_INST_ANSWER = "{{ ' ' + message['content'] + ' ' + eos_token }}"
_HEADERS = "{{ '<|start_header_id|>' + NAME + '<|end_header_id|>\n\n' + CONTENT | trim + '<|eot_id|>' }}"
_ALPACA_BLANKS = " " * 16
"""Indentation that LLM-Adapters' source puts into every line of the prompt but the first."""
_LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True, kw_only=True)
class NamedTemplate:
    """One of `CHAT_TEMPLATES`."""

    source: str
    """Jinja, without the beginning of the sequence."""
    system: str = ""
    """The system prompt where the conversation has none."""
    controls: tuple[str, ...] = ()
    """Texts that should be tokens of the tokenizer; the last one ends an answer."""


CHAT_TEMPLATES: dict[str, NamedTemplate] = {
    "plain": NamedTemplate(
        source="{%- for message in messages -%}{{ message['content'] }}"
        "{%- if message['role'] == 'assistant' -%}{{ '\n' }}{%- endif -%}{%- endfor -%}",
    ),
    "v1": NamedTemplate(
        source=_turns(
            "{{ 'USER: ' + content + ' ' }}", "{{ 'ASSISTANT: ' + content + eos_token }}",
            head="{%- if system -%}{{ system + ' ' }}{%- endif -%}", prompt="{{ 'ASSISTANT:' }}",
        ),
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "llama_2": NamedTemplate(
        source=_turns(
            "{%- if not loop.first -%}{{ bos_token }}{%- endif -%}" + _INST, _INST_ANSWER,
            content="{%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] "
            "if loop.first and system else message['content'] -%}",
        ),
        system=_LANGUAGE_AND_VISION,
    ),
    "mistral": NamedTemplate(source=_turns(_INST, _INST_ANSWER, content=_FOLDED.replace("JOINT", "'\n\n'"))),
    "llama_3": NamedTemplate(
        source=_turns(
            _HEADERS.replace("NAME", "'user'").replace("CONTENT", "content"),
            _HEADERS.replace("NAME", "'assistant'").replace("CONTENT", "content"),
            head="{%- if system -%}" + _HEADERS.replace("NAME", "'system'").replace("CONTENT", "system")
            + "{%- endif -%}",
            prompt="{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
        ),
        system=_LANGUAGE_AND_VISION,
        controls=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "chatml": NamedTemplate(
        source=_turns(
            "{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}",
            "{{ '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}",
            head="{%- if system -%}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{%- endif -%}",
            prompt="{{ '<|im_start|>assistant\n' }}",
        ),
        system="You are a helpful assistant.",
        controls=("<|im_start|>", "<|im_end|>"),
    ),
    "gemma": NamedTemplate(
        source=_turns(
            "{{ '<start_of_turn>user\n' + content + '<end_of_turn>\n' }}",
            "{{ '<start_of_turn>model\n' + content + '<end_of_turn>\n' }}",
            prompt="{{ '<start_of_turn>model\n' }}", content=_FOLDED.replace("JOINT", "'\n\n'"),
        ),
        controls=("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi3": NamedTemplate(
        source=_turns(
            "{{ '<|user|>\n' + content + '<|end|>\n' }}", "{{ '<|assistant|>\n' + content + '<|end|>\n' }}",
            head="{%- if system -%}{{ '<|system|>\n' + system + '<|end|>\n' }}{%- endif -%}",
            prompt="{{ '<|assistant|>\n' }}",
        ),
        system="You are a helpful AI assistant.",
        controls=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "alpaca": NamedTemplate(
        source=_turns(
            "{%- if not loop.first -%}{{ '\n\n' + BLANKS }}{%- endif -%}"
            "{{ '### Instruction:\n' + BLANKS + message['content'] + '\n' + BLANKS + '\n' + BLANKS }}",
            "{{ '### Response:\n' + BLANKS + message['content'] + eos_token }}",
            head="{%- if system -%}{{ system + '  \n\n' + BLANKS }}{%- endif -%}", prompt="{{ '### Response:\n' }}",
        ).replace("BLANKS", f"'{_ALPACA_BLANKS}'"),
        system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    ),
}  # fmt: skip
"""LLaVA's templates: `plain` (alignment: captions without questions) and those for conversations. `alpaca` is the text
on which LLM-Adapters (2304.01933) and the MoSLoRA paper tuned; the model writes the blanks before the response."""


@dataclass(frozen=True, kw_only=True)
class TemplateNotes:
    """The name and mode that a chat template's header comment records."""

    name: str | None = None
    """Its name in `CHAT_TEMPLATES`, if it is one of them."""
    faithful: bool = False
    """Whether LLaVA's own token ids are wanted."""


def note_thinking(source: str) -> str:
    """A chat template that records that its model is asked to think before it answers; it renders as before."""
    text = without_note(source)
    body = text.removesuffix("\n")  # Jinja drops one line break at the end
    return body + _THINKS + text[len(body) :]


def without_note(source: str) -> str:
    """A chat template without the record of `note_thinking`."""
    return source.replace(_THINKS, "")


def notes_thinking(source: Any) -> bool:
    """Whether `note_thinking` has marked a chat template."""
    return isinstance(source, str) and _THINKS in source


def notes_of(source: str) -> TemplateNotes:
    """Read the header comment of a chat template."""
    header = _HEADER.search(source)
    return TemplateNotes() if header is None else TemplateNotes(name=header[1], faithful=header[2] is not None)


def require_template(name: str | None) -> None:
    """Refuse a name that is not in `CHAT_TEMPLATES`; None means the tokenizer's own template."""
    if name is not None and name not in CHAT_TEMPLATES:
        hint = suggestion(name, CHAT_TEMPLATES)
        raise ConfigError(f"model.chat_template is {name!r}, expected one of {', '.join(CHAT_TEMPLATES)}.{hint}")


def set_chat_template(tokenizer: Any, name: str | None, *, faithful: bool = False) -> None:
    """Give a tokenizer one of the named templates.

    Args:
        tokenizer: changed in place.
        name: one of `CHAT_TEMPLATES`; None leaves the tokenizer's own.
        faithful: give the token ids of LLaVA's own code where those are sound: the text after an image is tokenised as
            a text of its own, and `plain` has no end-of-sequence token.

    Raises:
        ConfigError: no such name, or the tokenizer has no end-of-sequence token.
    """
    require_template(name)
    if name is None:
        return
    if tokenizer.eos_token is None:
        raise ConfigError(f"model.chat_template is {name!r}, but the tokenizer has no end-of-sequence token.")
    template = CHAT_TEMPLATES[name]
    vocabulary = tokenizer.get_vocab()
    missing = [text for text in template.controls if text not in vocabulary]
    if missing:
        logger.warning(
            "The chat template %s writes %s, which this tokenizer has no tokens for. These are written as ordinary "
            "text, and answers end with %s.", name, ", ".join(missing), tokenizer.eos_token,
        )  # fmt: skip
    if template.controls and template.controls[-1] in vocabulary:  # generation stops at the token that ends answers
        tokenizer.eos_token = template.controls[-1]
    adds_bos = tokenizer.bos_token is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    header = "{#- mm_moslora: " + name + (" faithful" if faithful else "") + " -#}"
    source = template.source
    if name == "llama_2" and not adds_bos:  # later rounds have no token to begin with
        source = source.replace("{{ bos_token }}", "")
    if name != "plain":
        source = _SYSTEM.replace("DEFAULT", "'" + template.system.replace("'", "\\'") + "'") + source
    # LLaVA's tokenizer adds BOS itself; BOS within the text would change the tokens that follow it.
    tokenizer.chat_template = header + ("{{- bos_token -}}" if adds_bos and not faithful else "") + source
