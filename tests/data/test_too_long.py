"""Records that do not fit: refused, cut or left out; and the loss on the whole text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mm_moslora.config import DataConfig, load_recipe
from mm_moslora.data.chat.conversation_encoder import TooLong
from mm_moslora.data.quarantine import Quarantine
from mm_moslora.data.record_faults import Code, RecordError, Where
from mm_moslora.utils.errors import ConfigError, DataError
from tests.data.conftest import Setup, turns


def test_a_text_is_cut_within_the_answer_where_the_recipe_says_so(setup: Setup) -> None:
    encoder, talk = setup.encoder(), turns("red a cat", "red red red red red red red red")
    whole = encoder.encode(talk)
    length = len(whole.input_ids) - 3
    with pytest.raises(TooLong):
        encoder.encode(talk, max_length=length)
    cut = encoder.encode(talk, max_length=length, truncate=True)
    assert cut.input_ids.tolist() == whole.input_ids.tolist()[:length]
    assert cut.supervised.tolist() == whole.supervised.tolist()[:length]
    assert cut.dropped_turns == 2
    fits = encoder.encode(talk, max_length=len(whole.input_ids), truncate=True)
    assert fits.dropped_turns == 0
    assert fits.input_ids.tolist() == whole.input_ids.tolist()


def test_a_record_that_would_keep_nothing_to_learn_is_still_refused(setup: Setup) -> None:
    encoder, talk = setup.encoder(), turns("red a cat", "red")
    before = encoder.encode(talk).supervised.tolist().index(True)
    with pytest.raises(TooLong):
        encoder.encode(talk, max_length=before, truncate=True)
    assert len(encoder.encode(talk, max_length=before, truncate=True, whole=True).input_ids) == before


def test_the_loss_is_on_every_token_but_the_first(setup: Setup) -> None:
    talk = turns("red a cat", "red")
    answers, whole = setup.encoder().encode(talk), setup.encoder().encode(talk, whole=True)
    assert whole.input_ids.tolist() == answers.input_ids.tolist()
    assert whole.supervised.tolist() == [False] + [True] * (len(whole.input_ids) - 1)


def _fault(code: Code) -> RecordError:
    return Where(file=Path("a.json"), line=1, row=0, id="1").error(code, "conversations", "too long", "shorten it")


@pytest.mark.parametrize("on_bad", ["quarantine", "error"])
def test_records_that_are_dropped_do_not_stop_a_run_and_are_counted(on_bad: str) -> None:
    config = DataConfig(too_long="drop", max_bad_share=0.1, on_bad=on_bad)
    kept = Quarantine(None, 10, config)
    for index in range(5):
        kept.add(index, _fault(Code.TOO_LONG))
    kept.close()
    assert kept.codes == {"TOO_LONG": 5}
    assert 3 in kept
    refused = Quarantine(None, 10, replace(config, too_long="refuse", on_bad="quarantine"))
    for index in range(5):
        refused.add(index, _fault(Code.TOO_LONG))
    with pytest.raises(DataError, match=r"more than data\.max_bad_share.*data\.too_long"):
        refused.close()


def test_the_whole_text_needs_a_language_model_alone() -> None:
    with pytest.raises(ConfigError, match=r"data\.train_on.*model\.vision"):
        load_recipe("llama3_8b_clip_moslora", ["data.train_on=all"])
    with pytest.raises(ConfigError, match=r"data\.train_on.*model\.vlm"):
        load_recipe("commonsense_170k", ["model.language=null", "model.chat_template=null", "model.vlm=some/vlm"])
    data = load_recipe("commonsense_170k").data
    assert (data.too_long, data.train_on, data.order, data.max_length) == ("truncate", "all", "random", 256)
