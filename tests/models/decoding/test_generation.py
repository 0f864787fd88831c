"""Decoding in batches with shared beginnings gives each prompt the answer that it gives alone."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from mm_moslora.config import ModelConfig, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.decoding.generation import (
    Prompt,
    encode_images,
    generate,
    generate_beams,
    score_options,
    stream,
)
from mm_moslora.utils.errors import ModelError


@pytest.fixture(scope="module")
def assembly(language_folder, vision_folder):
    built = load_parts(ModelConfig(language=str(language_folder), vision=VisionConfig(name=str(vision_folder))))
    built.model.eval()
    return built


def prompts(assembly, *, seed=0):
    """Three pictures with 1, 2 and 4 questions of different lengths, and a text prompt without a group."""
    generator = torch.Generator().manual_seed(seed)
    size = assembly.image.size
    features = encode_images(assembly.model, torch.randn(3, 3, size, size, generator=generator))
    image = [assembly.image_token_id] * assembly.tokens_per_image
    made = []
    for picture, questions in enumerate((1, 2, 4)):
        for _ in range(questions):
            length = int(torch.randint(2, 9, (1,), generator=generator))
            text = torch.randint(5, 250, (length,), generator=generator).tolist()
            ids = torch.tensor([1, 7, *image, 9, *text])
            made.append(Prompt(input_ids=ids, features=features[picture], group=f"picture {picture}"))
    made.insert(3, Prompt(input_ids=torch.tensor([4, 5, 6, 7, 8])))
    return made


def alone(model, given, limit, stops):
    return [generate(model, [prompt], max_new_tokens=limit, stop_ids=stops)[0] for prompt in given]


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_with_shared_pictures_answers_as_each_prompt_alone(assembly, seed):
    given = prompts(assembly, seed=seed)
    expected = alone(assembly.model, given, 8, [])
    assert generate(assembly.model, given, max_new_tokens=8, stop_ids=[]) == expected
    assert len({tuple(answer) for answer in expected}) > 3  # the prompts do differ
    # Stop where some answers have ended and others have not: rows leave the batch.
    stops = {expected[0][2], expected[4][1]}
    assert generate(assembly.model, given, max_new_tokens=8, stop_ids=stops) == alone(assembly.model, given, 8, stops)


def test_the_answers_are_those_of_transformers_generate(assembly):
    given = prompts(assembly)
    ours = generate(assembly.model, given, max_new_tokens=6, stop_ids=[])
    table = assembly.model.get_input_embeddings()
    for prompt, answer in zip(given, ours, strict=True):
        embeddings = table(prompt.input_ids)
        if prompt.features is not None:
            places = prompt.input_ids == assembly.image_token_id
            embeddings = embeddings.masked_scatter(places[:, None], prompt.features)
        theirs = assembly.model.generate(
            inputs_embeds=embeddings[None], attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.long),
            max_new_tokens=6, min_new_tokens=6, do_sample=False,
        )[0]  # fmt: skip
        assert theirs.tolist()[: len(answer)] == answer or assembly.tokenizer.eos_token_id in answer


def _likeliest(model, prompt, *, beams, steps, stop):
    """Beam search anew: the likeliest per token among the answers that the kept beams end with."""
    kept, ended = [(0.0, [])], []
    for step in range(steps):
        grown = []
        for score, answer in kept:
            given = Prompt(input_ids=torch.cat([prompt.input_ids, torch.tensor(answer, dtype=torch.long)]),
                           features=prompt.features)  # fmt: skip
            options = [[[token] for token in range(model.config.get_text_config().vocab_size)]]
            found = score_options(model, [given], options)[0]
            grown += [(score + one.logprob, [*answer, token]) for token, one in enumerate(found)]
        grown.sort(key=lambda item: -item[0])
        ended += [(score / (step + 1), answer[:-1]) for score, answer in grown[:beams] if answer[-1] == stop]
        kept = [item for item in grown[: 2 * beams] if item[1][-1] != stop][:beams]
    return max([*ended, *((score / steps, answer) for score, answer in kept)], key=lambda item: item[0])[1]


def test_beams_find_the_likeliest_answer_in_a_batch_as_alone(assembly):
    given = prompts(assembly)
    expected = [_likeliest(assembly.model, prompt, beams=3, steps=3, stop=9) for prompt in given]
    assert generate_beams(assembly.model, given, beams=3, max_new_tokens=3, stop_ids=[9]) == expected
    assert expected != generate(assembly.model, given, max_new_tokens=3, stop_ids=[9])
    one = generate_beams(assembly.model, given, beams=1, max_new_tokens=3, stop_ids=[])
    assert one == generate(assembly.model, given, max_new_tokens=3, stop_ids=[])


def test_beams_ignore_the_generation_settings_of_the_folder(assembly, monkeypatch):
    given, asked = prompts(assembly), {"beams": 3, "max_new_tokens": 4, "stop_ids": [9]}
    expected = generate_beams(assembly.model, given, **asked)
    own = GenerationConfig(
        repetition_penalty=1.8, no_repeat_ngram_size=1, min_new_tokens=4, forced_eos_token_id=7, length_penalty=-5.0,
        suppress_tokens=list(range(20, 250)), max_time=1e-4, num_beams=2, num_return_sequences=2,
        return_dict_in_generate=True,
    )  # fmt: skip
    monkeypatch.setattr(assembly.model, "generation_config", own)
    assert generate_beams(assembly.model, given, **asked) == expected
    assert assembly.model.generation_config is own


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_of_a_damaged_model_are_refused_as_greedy_answers_are(assembly, monkeypatch, beams):
    head = assembly.model.get_output_embeddings().weight
    monkeypatch.setattr(head, "data", torch.full_like(head, float("nan")))
    given = [Prompt(input_ids=torch.tensor([1, 7, 9]))]
    with pytest.raises(ModelError, match="logits is nan"):
        generate(assembly.model, given, max_new_tokens=2, stop_ids=[9])
    own = assembly.model.generation_config
    with pytest.raises(ModelError, match="logits is nan"):
        generate_beams(assembly.model, given, beams=beams, max_new_tokens=2, stop_ids=[9])
    assert assembly.model.generation_config is own


@pytest.mark.parametrize("options", [[[5], [9], [200], [201]], [[5, 6], [9], [200, 4, 77, 5], [12, 13, 14]]])
def test_option_scores_in_a_batch_equal_the_full_forward_pass(assembly, options):
    given = prompts(assembly)
    scores = score_options(assembly.model, given, [options] * len(given))
    for prompt, found in zip(given, scores, strict=True):
        for option, score in zip(options, found, strict=True):
            ids = torch.cat([prompt.input_ids, torch.tensor(option)])
            embeddings = assembly.model.get_input_embeddings()(ids)
            if prompt.features is not None:
                embeddings = embeddings.masked_scatter((ids == assembly.image_token_id)[:, None], prompt.features)
            with torch.no_grad():
                logits = assembly.model(inputs_embeds=embeddings[None]).logits[0].float().log_softmax(-1)
            places = range(len(prompt.input_ids) - 1, len(ids) - 1)
            expected = sum(float(logits[place, token]) for place, token in zip(places, option, strict=True))
            assert score.logprob == pytest.approx(expected, abs=1e-4)
            assert score.tokens == len(option)
            assert score.greedy == all(int(logits[p].argmax()) == t for p, t in zip(places, option, strict=True))
        (single,) = score_options(assembly.model, [prompt], [options])
        assert [s.logprob for s in single] == pytest.approx([s.logprob for s in found], abs=1e-4)


def test_a_sliding_window_model_shares_nothing_and_stays_right(language_folder):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(5)
    config = MistralConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8, max_position_embeddings=128,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    head = list(range(10, 40))
    given = [Prompt(input_ids=torch.tensor([*head, *tail]), group="g") for tail in ([3], [4, 5, 6], [7, 8])]
    assert generate(model, given, max_new_tokens=6, stop_ids=[]) == alone(model, given, 6, [])


def test_logits_that_are_no_numbers_are_an_error_and_no_answer(assembly, monkeypatch):
    """The largest of them would be the first NaN, and its token the answer."""
    given = prompts(assembly)
    head = assembly.model.get_output_embeddings()
    options = [[[5], [6, 7]]] * len(given)

    def damaged(module, inputs, logits):
        return torch.where(torch.arange(logits.shape[-1]) == 9, float("nan"), logits)

    hook = head.register_forward_hook(damaged)
    try:
        with pytest.raises(ModelError, match="logits is nan, so no token can be chosen"):
            generate(assembly.model, given, max_new_tokens=2, stop_ids=[])
        with pytest.raises(ModelError, match="no option can be chosen"):
            score_options(assembly.model, given, options)
    finally:
        hook.remove()
    assert len(generate(assembly.model, given, max_new_tokens=2, stop_ids=[])) == len(given)


def test_stream_tells_which_prompt_has_ended(assembly):
    given = prompts(assembly)
    first = next(stream(assembly.model, given, max_new_tokens=1, stop_ids=[]))
    steps = list(stream(assembly.model, given, max_new_tokens=4, stop_ids=[first[0]]))
    assert steps
    assert all(tokens[0] is None for tokens in steps)
    assert all(len(tokens) == len(given) for tokens in steps)


def test_images_and_placeholders_must_agree(assembly):
    prompt = prompts(assembly)[0]
    broken = Prompt(input_ids=prompt.input_ids[:-12], features=prompt.features)
    with pytest.raises(ModelError, match=r"image placeholders.*give 16 visual tokens"):
        generate(assembly.model, [broken], max_new_tokens=1, stop_ids=[])
