"""The markers of reasoning that a model's own chat template writes are those that scoring removes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.backends.reasoning_markers import ReasoningMarkers
from mm_moslora_eval.protocol.model_interface import Message, Request
from mm_moslora_eval.protocol.task import AnswerReasoning
from mm_moslora_eval.scoring.visible_text import without_thinking
from tokenizers import AddedToken
from transformers import AutoTokenizer

from mm_moslora.data.chat.chat_template import Template

TURNS = (
    "{%% for m in messages %%}{{ '<' + m['role'] + '>' }}{%% if m.get('%s') %%}{{ '%s' + m['%s'] + '%s' }}{%% endif %%}"
    "{{ m['content'] + '\n' }}{%% endfor %%}{%% if add_generation_prompt %%}{{ '<assistant>%s' }}{%% endif %%}"
)
MARKED = ("[THINK]", "[/THINK]")


def written(key: str, opening: str, closing: str, *, prompt: str = "") -> str:
    return TURNS % (key, opening, key, closing, prompt)


@pytest.fixture(scope="module")
def tokenizer_of(language_folder: Path):
    def make(template: str | None, *, special: bool = True):
        made = AutoTokenizer.from_pretrained(language_folder)
        made.add_tokens([AddedToken(text, special=special) for text in MARKED], special_tokens=special)
        made.chat_template = template
        return made

    return make


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (written("reasoning_content", "[THINK]", "[/THINK]"), [MARKED]),
        (written("thinking", "\n[THINK]\n", "\n[/THINK]\n\n", prompt="\n[THINK]\n"), [MARKED]),  # the prompt opens it
        (written("reasoning", "|analysis|", "|end|<assistant>|final|"), [("|analysis|", "|end|<assistant>|final|")]),
        (written("reasoning", "", "\n"), []),
        (written("other", "[THINK]", "[/THINK]"), []),
        ("{{ raise_exception('no') }}", []),
        (None, []),
    ],
)
def test_markers_are_what_the_template_writes(template, expected, tokenizer_of) -> None:
    assert list(ReasoningMarkers.of_processor(tokenizer_of(template)).pairs) == expected


@pytest.mark.parametrize("special", [True, False])
def test_markers_stay_in_answers_that_scoring_reads_behind_them(special, tokenizer_of) -> None:
    tokenizer = tokenizer_of(written("thinking", *MARKED), special=special)
    markers = ReasoningMarkers(Template(tokenizer), tokenizer)
    said = tokenizer.encode("[THINK]red or blue?[/THINK]blue", add_special_tokens=False)
    text = markers.text([*said, tokenizer.eos_token_id], lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    assert text.startswith("[THINK]")
    assert "[/THINK]" in text
    assert tokenizer.eos_token not in text
    assert without_thinking(text, AnswerReasoning().all_markers(markers.pairs)).text == "blue"
    assert (markers.fingerprint("a") == "a") is not special


def test_local_models_and_those_of_transformers_name_their_markers(
    language_folder: Path, tmp_path: Path, tokenizer_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "thinks"
    shutil.copytree(language_folder, folder)
    tokenizer_of(written("reasoning_content", *MARKED)).save_pretrained(folder)
    model = open_model(f"hf:{folder}", precision="fp32")
    assert model.thinking_markers == (MARKED,)
    said = model._tokenizer.encode("[THINK]no[/THINK]yes", add_special_tokens=False)
    asked = Request(id="a", messages=(Message(role="user", content=("is it?",)),))
    assert without_thinking(model._answer(asked, said, None).text, model.thinking_markers).text == "yes"
