"""TRL's GRPOTrainer on a run; it imports TRL, so it is imported where the run is known to need it."""

# Shapes: ``B`` answers, ``P`` prompt tokens padded on the left, ``C`` answer tokens padded on the right, ``T`` tokens.

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from mm_moslora.batch import join_images
from mm_moslora.data.preference_set import Question
from mm_moslora.models.batching.padded_batch import padded_inputs
from mm_moslora.models.decoding.generation import stop_token_ids
from mm_moslora.preferences.preference_setup import PreferenceRun
from mm_moslora.preferences.rewards import Scorer, box_reader, document_of, scores_together
from mm_moslora.preferences.trl_trainers import PreferenceSaves, RunTrainer, arguments_of
from mm_moslora.utils import distributed
from mm_moslora.utils.identity import number_of

logger = logging.getLogger(__name__)

# `Scorer` names the first answer that no reward judges; TRL would print one of every batch, with all that it knows.
logging.getLogger(GRPOTrainer.__module__).addFilter(
    lambda record: "All reward functions returned" not in str(record.msg)
)


class RewardTrainer(RunTrainer, GRPOTrainer):
    """TRL's GRPOTrainer for one run; TRL sees token ids only, pictures are found by the number of the question."""

    def __init__(self, run: PreferenceRun, saves: PreferenceSaves) -> None:
        grpo = run.recipe.grpo
        args = GRPOConfig(
            **arguments_of(run),
            beta=grpo.beta,
            loss_type=grpo.loss_type,
            scale_rewards=grpo.scale_rewards,
            reward_weights=grpo.reward_weights,
            num_generations=grpo.generations,
            num_generations_eval=1,
            max_completion_length=grpo.max_new_tokens,
            temperature=grpo.temperature,
            shuffle_dataset=False,  # `rows_of` has drawn the questions
        )
        self.questions: dict[int, Question] = {}
        """The questions of the rows in memory, by number."""
        self.shown: list[int] = []
        """The questions of the rows that TRL computes with now."""
        self.scorers = [Scorer(name, reward) for name, reward in run.rewards.items()]
        self.scores: list[list[float]] = []
        """Of the answers at hand, by reward."""
        super().__init__(
            run, saves, args=args, rollout_func=self._roll_out,
            reward_funcs=[self._reward_function(number) for number in range(len(self.scorers))],
        )  # fmt: skip
        self.stops = stop_token_ids(run.assembly.model, run.assembly.tokenizer.eos_token_id)
        self.eos_token_ids = self.stops
        config = run.assembly.model.config
        media = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
        self.placeholders = [token for token in media if token is not None]
        """Tokens that no answer may hold: each would ask the model for a picture."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Whatever is drawn depends on the step and the questions alone, so that a resumed run draws the same."""
        asked = generation_batch[0]["item"] if isinstance(generation_batch, list) else None
        with _seeded(self.run.recipe.train.seed, self.state.global_step, distributed.rank(), asked):
            return super()._prepare_inputs(generation_batch)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.shown = [row["item"] for row in inputs]
        self.questions = {}
        for row in inputs:
            if row["item"] not in self.questions:
                records, number = self.run.of(row)
                self.questions[row["item"]] = records.item(number)
        generated: dict[str, Any] = super()._generate_and_score_completions([{**row, "prompt": ""} for row in inputs])
        if self.run.assembly.model.training and self._metrics["train"]["frac_reward_zero_std"][-1] == 1:
            self._count_equal_rewards()
        return generated | {"item": torch.tensor(self.shown)}

    def _count_equal_rewards(self) -> None:
        """Count a step from whose rewards nothing is learned, and say so at each power of two."""
        counters = self.run.counters
        counters["equal_rewards"] = count = counters.get("equal_rewards", 0.0) + 1
        if distributed.is_main() and not int(count) & (int(count) - 1):
            logger.warning(
                "Step %d: all answers to each question have the same reward, so that it teaches nothing; %d steps "
                "so far. Choose questions that are neither too easy nor too hard, a finer reward, more "
                "grpo.generations, or a higher grpo.temperature.",
                self.run.step + 1, count,
            )  # fmt: skip

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.shown = inputs["item"].tolist()
        self.ids += [self.questions[number].prompt.id for number in self.shown] if model.training else []
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    @torch.no_grad()
    def _roll_out(self, prompts: Sequence[Any], _: Any) -> dict[str, Any]:
        """Answers to the questions that are shown, as TRL takes them: ids up to their end of turn."""
        config = self.run.recipe.grpo
        model: Any = self.run.assembly.model
        asked = [self.questions[number].prompt.input_ids for number in self.shown]
        inputs = padded_inputs(
            model, asked, *self._pictures(self.shown), answers=None, left=True, device=self.accelerator.device
        )
        training = model.training
        model.eval()
        with self.whole_weights(), self.accelerator.autocast():
            ids: Any = model.generate(
                **inputs,
                synced_gpus=False,  # ranks need each other for nothing
                generation_config=GenerationConfig(
                    do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0, min_p=0.0,
                    repetition_penalty=1.0, max_new_tokens=config.max_new_tokens, num_beams=1,
                    suppress_tokens=self.placeholders or None,
                    eos_token_id=self.stops, use_cache=True,
                ),
            )  # fmt: skip
        model.train(training)
        answers = [self._to_end(row) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
        return {"prompt_ids": [row.tolist() for row in asked], "completion_ids": answers, "logprobs": None}

    def _to_end(self, ids: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(ids) if token in self.stops), len(ids) - 1)
        return ids[: end + 1]

    def _reward_function(self, number: int) -> Any:
        """A reward as TRL asks for it, in order, with the name by which TRL logs it."""

        def rewards(*, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
            if number == 0:
                self._score(completion_ids)
            return self.scores[number]

        rewards.__name__ = self.scorers[number].name
        return rewards

    def _score(self, completion_ids: Sequence[Sequence[int]]) -> None:
        decode, counters = self.run.records.encoder.decode_answer, self.run.counters
        before = sum(scorer.failed for scorer in self.scorers)
        texts = [decode([token for token in ids if token not in self.stops]) for ids in completion_ids]
        questions, processing = [self.questions[number] for number in self.shown], self.run.assembly.image_processing
        documents = [document_of(question) for question in questions]
        boxes = [box_reader(question, processing) for question in questions]
        with distributed.failing_together(f"The rewards {', '.join(scorer.name for scorer in self.scorers)}"):
            self.scores = scores_together(self.scorers, texts, documents, boxes)
        if failed := sum(scorer.failed for scorer in self.scorers) - before:
            counters["failed_rewards"] = counters.get("failed_rewards", 0.0) + failed

    def _pictures(self, numbers: Sequence[int]) -> tuple[Tensor | None, dict[str, Tensor]]:
        pictures = [picture for number in numbers for picture in self.questions[number].prompt.pictures]
        tensors = join_images([picture.tensors for picture in pictures])
        return tensors.pop("pixel_values", None), tensors

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Log-probabilities and entropies ``[B, C]`` from rows as in training; `input_ids` ``[B, P + C]``."""
        size = batch_size or len(input_ids)
        lengths = attention_mask[:, -logits_to_keep:].sum(1)
        logps, entropies = [], []
        for start in range(0, len(input_ids), size):
            part = slice(start, start + size)
            mask, answers = attention_mask[part].bool(), lengths[part]
            rows = [ids[real].cpu() for ids, real in zip(input_ids[part], mask, strict=True)]
            begins = mask.sum(1) - answers
            arguments = padded_inputs(
                self.run.assembly.model, rows, *self._pictures(self.shown[part]), answers=begins.tolist(),
                device=self.accelerator.device,
            )  # fmt: skip
            labels = arguments["input_ids"].masked_fill(arguments["attention_mask"] == 0, -100)
            labels[torch.arange(labels.shape[1], device=labels.device)[None] < begins[:, None]] = -100
            with self.accelerator.autocast():
                output = model(**arguments, labels=labels, use_cache=False, fused_lm_head=True)
            # Position t of an output predicts token t + 1.
            columns = torch.arange(logits_to_keep, device=labels.device)
            positions = (begins[:, None] - 1 + columns).clamp(max=output.log_probs.shape[1] - 1)
            real = columns[None] < answers[:, None]
            logps.append(output.log_probs.gather(1, positions) * real)
            if compute_entropy:
                entropies.append(output.entropy.gather(1, positions) * real)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None


@contextmanager
def _seeded(*state: object) -> Iterator[None]:
    """Random numbers within that depend on these values alone; those outside go on as they were."""
    device = distributed.device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(number_of(repr(state)))
        yield
