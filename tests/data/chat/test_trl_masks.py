"""Labels against TRL's assistant masks: `{% generation %}` in its training templates, by the tokenizer itself.

Both render the same template. TRL learns more in two places, and nothing else differs: what a prompt already holds
before the answer (`<think></think>`, a header), and what follows the token that ends the turn (a line break, Phi-3's
second end), which a model is never asked to write.
"""

from __future__ import annotations

import pytest

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, UnrenderedTools
from tests.data.chat.test_tool_records import MESSAGES, SHIPPED, WEATHER, parsed, tokenizer

TEMPLATES = [
    "cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "diffusion_gemma", "gemma", "gemma3", "glm4moe", "gptoss",
    "lfm2", "lfm2_v2", "muse_glimmer", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super",
    "nemotron_3_ultra", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_5_nothink", "qwen3_5_think",
    "qwen3_6", "qwen3_8", "qwen3_instruct_2507", "qwen3_vl",
]  # fmt: skip
"""Of TRL 1.16; not those whose contents must have parts, for processors with pictures."""
NO_TOOLS = {
    "cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "lfm2", "phi3", "phi3_5", "qwen2_5_vl",
}  # fmt: skip
"""TRL learns an empty answer in the place of the call, or leaves out the tools; here the record is a fault."""
THINKING = [
    "deepseek_r1_distill", "deepseekv3", "glm4moe", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super",
    "nemotron_3_ultra", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8",
]  # fmt: skip
"""Those with `<think>`. Others leave out thinking, which is learned as plain text here; channels are not written."""
OTHERWISE = {
    ("gptoss", "turns"): "the last answer has an end of its own; here every answer ends with the tokenizer's token",
    (
        "diffusion_gemma",
        "tools",
    ): "<|tool_response> behind a call is what its generation stops at, so it is learned here",
}
"""What differs on purpose."""
ASKED = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "It is 1."}]
CONVERSATIONS = {
    "turns": [*ASKED, {"role": "user", "content": "two?"}, {"role": "assistant", "content": "It is 2."}],
    "thinking": [ASKED[0], ASKED[1] | {"reasoning_content": "Count."}],
    "tools": [MESSAGES[0], MESSAGES[1] | {"content": ""}, *MESSAGES[2:]],
}
CASES = [(name, kind) for kind in ("turns", "tools") for name in TEMPLATES] + [(name, "thinking") for name in THINKING]


@pytest.mark.parametrize(("name", "kind"), [
    pytest.param(*case, marks=[pytest.mark.xfail(strict=True, reason=OTHERWISE[case])] if case in OTHERWISE else [])
    for case in CASES
])  # fmt: skip
def test_labels_are_those_of_trl(name, kind) -> None:
    made, messages = tokenizer(name), CONVERSATIONS[kind]
    if kind == "thinking" and name == "deepseek_r1_distill":  # TRL's template has it in the text alone
        messages = [ASKED[0], {"role": "assistant", "content": "<think>\nCount.\n</think>\n\nIt is 1."}]
    made.chat_template = SHIPPED.joinpath(f"{name}_training.jinja").read_text()
    tools = {"tools": [WEATHER]} if kind == "tools" else {}
    turns = parsed({"messages": messages} | tools).turns
    encoder = ConversationEncoder(made, thinking="always" if kind == "thinking" else "auto")
    if kind == "tools" and name in NO_TOOLS:
        with pytest.raises(UnrenderedTools):
            encoder.encode(turns)
        return
    theirs = made.apply_chat_template(
        messages, **tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )  # fmt: skip
    encoded = encoder.encode(turns)
    ids, ours = encoded.input_ids.tolist(), encoded.supervised.tolist()
    assert ids == theirs["input_ids"][: len(ids)]
    assert len(theirs["input_ids"]) - len(ids) <= 2  # what follows the last end
    prompts = [
        encoder.encode_prompt(turns[:end]).tolist() for end, turn in enumerate(turns) if turn.role == "assistant"
    ]
    for place, (learned, masked) in enumerate(zip(ours, theirs["assistant_masks"], strict=False)):
        if learned == bool(masked):
            continue
        assert masked, made.decode(ids[place])
        behind_the_end = place and ours[place - 1]
        in_a_prompt = any(len(prompt) > place and ids[: place + 1] == prompt[: place + 1] for prompt in prompts)
        assert behind_the_end or in_a_prompt, made.decode(ids[place:])
