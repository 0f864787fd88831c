"""Whether a model is asked to think before it answers: `model.thinking: auto` follows the records it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, thinks
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.record_source import RecordSource

LOOKED_AT = 1000
"""Records that are looked at, evenly spaced; a share of one half is then known to 3 points."""

MIXED_THINKING = (
    "the answers that think are learned behind another prompt; set model.thinking to always, so that the model writes "
    "the block itself, or to never, which leaves thinking out"
)
"""What to do about records of both forms."""


@dataclass(frozen=True, kw_only=True)
class ThinkingForm:
    """How often the last answer of a record thinks, and the form in which the model is asked."""

    thinking: int
    """Records whose last answer begins with thinking that is learned."""
    records: int
    """Usable records that were looked at."""
    asked: bool
    """Whether the model is asked to think."""
    switch: bool
    """Whether prompts to think and prompts to answer at once differ."""

    @property
    def mixed(self) -> bool:
        """Whether some answers are learned behind another prompt than the one that is asked."""
        return self.switch and 0 < self.thinking < self.records and not self.asked

    @property
    def words(self) -> str:
        """The form in one sentence, without its full stop."""
        asked = "to think before it answers" if self.asked else "to answer at once"
        return f"{self.thinking} of {self.records} records end with an answer that thinks; the model is asked {asked}"


def settled(encoder: ConversationEncoder, files: Sequence[RecordSource]) -> tuple[ConversationEncoder, ThinkingForm]:
    """An encoder whose form of thinking follows the records where it is `auto`, and what was found.

    Where most answers think, `auto` becomes `always`: every answer is learned behind the prompt that is asked.

    Args:
        encoder: of the model.
        files: the sources of the training data.
    """
    total = sum(len(file) for file in files)
    numbers = [total * place // LOOKED_AT for place in range(LOOKED_AT)] if total > LOOKED_AT else range(total)
    found: list[bool] = []
    start, wanted = 0, iter(numbers)
    number = next(wanted, None)
    for file in files:
        while number is not None and number < start + len(file):
            with suppress(RecordError):  # the training set counts it
                found.append(thinks(file[number - start].turns[-1].text))
            number = next(wanted, None)
        start += len(file)
    learned = encoder.learns_thinking and encoder.thinking != "never"
    thinking = sum(found) if learned else 0
    if encoder.thinking == "auto" and 2 * thinking > len(found):
        encoder = encoder.asking("always")
    form = ThinkingForm(
        thinking=thinking, records=len(found), asked=encoder.asks_to_think, switch=encoder.has_switch
    )  # fmt: skip
    return encoder, form
