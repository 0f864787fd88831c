"""The log-probabilities that preferences learn from are those of the model's class, whatever its configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from pairs import make_judged, make_questions, make_recipe
from torch import nn
from vlms import make_vlm

from mm_moslora.config import Recipe
from mm_moslora.models.batching.padded_batch import PaddedCollator
from mm_moslora.preferences.preference_setup import prepare
from mm_moslora.utils.errors import ModelError

pytest.importorskip("trl", reason="trl is not installed")
CLASS = t.Qwen2_5_VLForConditionalGeneration
FORWARD = CLASS.forward


def capped(self: Any, *args: Any, **inputs: Any) -> Any:
    """A scale and a cap that no configuration names."""
    output = FORWARD(self, *args, **inputs)
    if output.logits is not None:
        output.logits = 2 * torch.tanh(output.logits * 3 / 2)
    return output


@pytest.fixture(params=["a scale that the class does not apply", "a cap that the configuration does not name"])
def model(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    folder = make_vlm(tmp_path / "model", "qwen2_5_vl")
    made = CLASS.from_pretrained(folder)
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(20)  # so that a cap bites
    if "scale" in request.param:
        made.config.get_text_config().logit_scale = 0.25
        made.config.get_text_config().final_logit_softcapping = 0.5
    else:
        monkeypatch.setattr(CLASS, "forward", capped)
    made.save_pretrained(folder)
    return {"vlm": str(folder)}


def recipe_of(folder: Path, pairs: Path, model: dict[str, Any], **sections: Any) -> Recipe:
    return make_recipe(
        folder / "run", pairs, model, train={"steps": 1, "global_batch": 12, "micro_batch": 12}, **sections
    )


@torch.no_grad()
def mean_of_class(model: dict[str, Any], examples: list[Any]) -> float:
    """The mean log-probability of the answers; adapters have no effect at the start."""
    found, plain = [], CLASS.from_pretrained(model["vlm"]).eval()
    for example in examples:
        inputs = PaddedCollator(model=plain)([example])
        labels = inputs.pop("labels")[0, 1:]
        logps = plain(**inputs).logits[0, :-1].float().log_softmax(-1)
        found.append(-nn.functional.nll_loss(logps, labels, reduction="sum").item())
    return sum(found) / len(found)


@pytest.mark.parametrize("objective", ["dpo", "dpo in rows", "kto"])
def test_log_probabilities_of_answers(objective: str, model: Any, picture_pairs: Path, tmp_path: Path) -> None:
    from mm_moslora.preferences.trl_trainers import JudgedTrainer, PairTrainer

    pairs = make_judged(picture_pairs) if objective == "kto" else picture_pairs
    data = {"pack_tokens": 4096} if "rows" in objective else {}
    run = prepare(recipe_of(tmp_path, pairs, model, objective=objective[:3], data=data))
    config = dict(vars(run.assembly.model.config.get_text_config()))
    if objective == "kto":
        trainer: Any = JudgedTrainer(run, None)  # type: ignore[arg-type]
    else:
        trainer = PairTrainer(run, None)  # type: ignore[arg-type]
        trainer.mean_sizes = torch.ones(2)
    assert dict(vars(run.assembly.model.config.get_text_config())) == config
    items = [run.records.item(number) for number in range(6)]
    trainer.compute_loss(
        run.peft_model, trainer.data_collator([{"item": number, "held_out": 0} for number in range(6)])
    )
    for side, name in enumerate(("chosen", "rejected")):
        if objective == "kto":
            examples = [example for example, good in items if good is (name == "chosen")]
        else:
            examples = [pair[side] for pair in items]
        (found,) = trainer._metrics["train"][f"logps/{name}"]
        assert found == pytest.approx(mean_of_class(model, examples), rel=1e-5)


def test_log_probabilities_of_drawn_answers(model: Any, picture_pairs: Path, tmp_path: Path) -> None:
    from mm_moslora.preferences.reward_trainer import RewardTrainer

    grpo = {"generations": 4, "max_new_tokens": 4, "temperature": 0.5}
    run = prepare(recipe_of(tmp_path, make_questions(picture_pairs), model, objective="grpo", grpo=grpo))
    config = dict(vars(run.assembly.model.config.get_text_config()))
    trainer = RewardTrainer(run, None)  # type: ignore[arg-type]
    assert dict(vars(run.assembly.model.config.get_text_config())) == config
    question = run.records.item(0)
    trainer.shown, trainer.questions = [0], {0: question}
    prompt, answer = question.prompt.input_ids, torch.tensor([5, 9, 7])
    ids = torch.cat([prompt, answer])[None]
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 3)
        pictures, more = trainer._pictures([0])
        logits = run.assembly.model.eval()(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pictures, **more
        ).logits[0, len(prompt) - 1 : -1]
    expected = (logits / 0.5).log_softmax(-1).gather(1, answer[:, None])[:, 0]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


class Scaled(nn.Linear):
    """Has a scale of its own in its forward pass."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input)


@pytest.mark.parametrize("kind", ["head", "words"])
def test_what_the_losses_of_preferences_cannot_compute_is_refused_before_training(
    kind: str, vlm: Path, picture_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "head":
        monkeypatch.setattr(CLASS, "get_output_embeddings", lambda self: scaled(self.lm_head))
    else:
        monkeypatch.setattr(CLASS, "forward", first_words)
    fault = "its head is Scaled, which is no plain" if kind == "head" else r"only the first 50 of its head's \d+ rows"
    with pytest.raises(ModelError, match=rf"Qwen2_5_VLForConditionalGeneration: {fault}.* set objective to sft"):
        prepare(make_recipe(tmp_path / "run", picture_pairs, {"vlm": str(vlm)}))


def scaled(head: Any) -> Any:
    if type(head) is nn.Linear:
        head.__class__ = Scaled
    return head


def first_words(self: Any, *args: Any, **inputs: Any) -> Any:
    output = FORWARD(self, *args, **inputs)
    output.logits = output.logits[..., :50]
    return output
