"""Whether a model is asked to think before it answers: `model.thinking: auto` follows the records it is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol

from mm_moslora.data.chat.answer_thinking import begins_with_block, thinks
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Record, Turn
from mm_moslora.data.record_faults import RecordError

SAMPLED = 1000
"""Largest number of records that are sampled, evenly spaced; a share of one half is then known to 3 points."""

MIXED_THINKING = (
    "the answers that think are learned behind another prompt; set model.thinking to always, so that the model writes "
    "the block itself, or to never, which leaves thinking out"
)
"""What to do about records of both forms."""
EARLIER_ANSWERS = (
    "the chat template writes only the last answer of a conversation so; write records that end with each answer to be "
    "learned, or name a template without thinking, for example model.chat_template: chatml"
)
"""What to do about conversations of several turns."""
FEW_ASIDE = 0.01
"""Up to this share of answers behind another prompt needs no warning."""
Ending = tuple[str, int]
"""The last answer of a record with a letter for every text, empty where it is not learned, and the number of those
before its question that are."""


class Records(Protocol):
    """Records by number: a source, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Record: ...


@dataclass(frozen=True, kw_only=True)
class ThinkingForm:
    """How often answers think and stand behind the prompt that is asked, and the form in which the model is asked."""

    thinking: int
    """Records whose last answer begins with thinking that is learned."""
    records: int
    """Usable records of the sample."""
    asks: bool
    """Whether the model is asked to think."""
    answers: int
    """All learned answers of these records."""
    aside: int
    """Answers that are learned behind another prompt than the one that is asked, or without the block it asks for."""
    earlier: int
    """Those of them that another question follows."""
    prompt: str
    """The text that is asked between a question and its answer."""

    @property
    def mixed(self) -> bool:
        """Whether more than a few answers are learned in another form than the one that is asked."""
        return self.aside > FEW_ASIDE * self.answers

    @property
    def remedy(self) -> str:
        """What to do where the forms are mixed."""
        return MIXED_THINKING if 2 * self.earlier < self.aside else EARLIER_ANSWERS

    @property
    def words(self) -> str:
        """The form in one sentence, without its full stop."""
        form = "to think before it answers" if self.asks else "to answer at once"
        words = f"{self.thinking} of {self.records} records end with an answer that thinks; the model is asked {form}"
        if not self.mixed:
            return words
        return f"{words}, by {self.prompt!r}, but {self.aside} of {self.answers} answers are learned in another form"


def settled(
    encoder: ConversationEncoder,
    files: Sequence[Records],
    supervise: Literal["all", "last"] = "all",
) -> tuple[ConversationEncoder, ThinkingForm]:
    """An encoder whose `auto` is `always` where most answers of the records think, and what the records showed."""
    total = sum(len(file) for file in files)
    numbers = [total * sample // SAMPLED for sample in range(SAMPLED)] if total > SAMPLED else range(total)
    endings: Counter[Ending] = Counter()
    start, wanted = 0, iter(numbers)
    number = next(wanted, None)
    for file in files:
        while number is not None and number < start + len(file):
            with suppress(RecordError):  # the training set counts it
                if not (record := file[number - start]).is_document and (turns := record.learned(supervise)):
                    endings[ending(turns)] += 1
            number = next(wanted, None)
        start += len(file)
    form = form_of(encoder, endings)
    if encoder.thinking == "auto" and 2 * form.thinking > form.records:
        encoder = encoder.asking("always")
        form = form_of(encoder, endings)
    return encoder, form


def ending(turns: Sequence[Turn]) -> Ending:
    """What decides the form of a conversation's answers that are learned."""
    text = turns[-1].text
    block = "<think>a</think>" if thinks(text) else "<think></think>" if begins_with_block(text) else ""
    last = f"{block}a" if turns[-1].weight else ""
    question = max((index for index, turn in enumerate(turns) if turn.role == "user"), default=0)
    return last, sum(turn.role == "assistant" and turn.weight > 0 for turn in turns[:question])


def form_of(encoder: ConversationEncoder, endings: Counter[Ending]) -> ThinkingForm:
    """The form of records with these endings."""
    learned = encoder.learns_thinking and encoder.thinking != "never"
    aside, before = 0, 0
    for (last, count), records in endings.items():
        *earlier, end = _aside(encoder, ["a"] * (count > 0) + [last or "a"])
        before += records * count * sum(earlier)
        aside += records * end * bool(last)
    return ThinkingForm(
        thinking=sum(records for (last, _), records in endings.items() if learned and thinks(last)),
        records=endings.total(), asks=encoder.asks_to_think, aside=aside + before, earlier=before,
        answers=sum((count + bool(last)) * records for (last, count), records in endings.items()),
        prompt=encoder.answer_prompt,
    )  # fmt: skip


def _aside(encoder: ConversationEncoder, answers: Sequence[str]) -> list[bool]:
    """Whether each answer of a conversation is learned in another form than the one that is asked there."""
    turns = [turn for text in answers for turn in (Turn.asking("a"), Turn(role="assistant", text=text))]
    encoded = encoder.encode(turns)
    ids = encoded.input_ids.tolist()
    result = []
    for number, text in enumerate(answers):
        prompt = encoder.encode_prompt(turns[: 2 * number + 1]).tolist()
        start = len(prompt)
        if encoder.asks_to_think and (encoder.knows_thinking or encoder.thinking == "mask"):
            prompt += encoder.encode_answer(text)  # its block, empty or not
            start = len(prompt) - 1 if encoder.thinking == "mask" else start
        learned = start < len(ids) and bool(encoded.supervised[start])
        result.append(not learned or ids[: len(prompt)] != prompt)
    return result
