"""The loss of a denoiser: noise or v-prediction on a beta schedule, or flow matching.

Shapes: latents, noise ``[N, C, H, W]``; weights, timesteps ``[N]``; sizes ``[N, 6]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.diffusion.pipeline_families import Conditioning, PipelineFamily


@dataclass(frozen=True, kw_only=True)
class LatentBatch:
    """What one forward pass takes, drawn on the CPU and moved to the device."""

    latents: Tensor
    noise: Tensor
    draws: Tensor
    """Uniform numbers ``[N]`` (flows: from the recipe's density) that choose the timesteps."""
    sizes: Tensor
    weights: Tensor
    """Of the examples: 1 for the subject's pictures, which come first."""
    subjects: int
    """Number of the subject's pictures."""
    prompts: list[str]
    conditioning: Conditioning | None = None
    """Conditioning that was computed before; None: the text encoders compute it."""


class DenoisingLoss(nn.Module):
    """A family's denoiser and trained text encoders, adapters in place, as one module whose forward is the loss."""

    def __init__(self, family: PipelineFamily) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: getattr(family.pipeline, name) for name in family.adapted_names()})
        self.family, self.config = family, family.recipe.loss
        self.scheduler = training_scheduler(family)

    def forward(self, batch: LatentBatch) -> Tensor:
        """The loss: the weighted sum over examples, divided by the number of the subject's pictures."""
        conditioning = self.family.encode(batch.prompts) if batch.conditioning is None else batch.conditioning
        noisy, timesteps, target, weights = (self._flow if self.family.flow else self._noise)(batch)
        dtype = next(self.family.denoiser.parameters()).dtype
        conditioning = {name: value.to(dtype) for name, value in conditioning.items()}
        predicted = self.family.predict(noisy.to(dtype), timesteps, conditioning, batch.sizes)
        errors = (predicted.float() - target.float()).square().flatten(1).mean(1)
        # As in DreamBooth's scripts, prior preservation adds to the loss: it does not dilute that of the subject.
        return (errors * weights * batch.weights).sum() / batch.subjects

    def _noise(self, batch: LatentBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scheduler = self.scheduler
        steps = (batch.draws * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(batch.latents, batch.noise, steps)
        velocity = self.family.prediction == "v_prediction"
        target = scheduler.get_velocity(batch.latents, batch.noise, steps) if velocity else batch.noise
        return noisy, steps, target, self._snr_weights(steps, velocity=velocity)

    def _snr_weights(self, steps: Tensor, *, velocity: bool) -> Tensor:
        if self.config.min_snr_gamma is None:
            return torch.ones(len(steps), device=steps.device)
        from diffusers.training_utils import compute_snr

        snr = compute_snr(self.scheduler, steps)
        if velocity:
            return snr.clamp(max=self.config.min_snr_gamma) / (snr + 1)
        return (self.config.min_snr_gamma / snr).clamp(max=1.0)  # min(SNR, gamma) / SNR, also where SNR is 0

    def _flow(self, batch: LatentBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        scheduler, latents = self.scheduler, batch.latents
        indices = (batch.draws * scheduler.config.num_train_timesteps).long()
        sigmas = scheduler.sigmas.to(latents)[indices]
        share = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - share) * latents + share * batch.noise
        weights = compute_loss_weighting_for_sd3(self.config.flow_weighting, sigmas=sigmas)
        return noisy, scheduler.timesteps.to(latents)[indices], batch.noise - latents, weights


def training_scheduler(family: PipelineFamily) -> Any:
    """The scheduler that adds the noise: on the betas or sigmas of the one that draws."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    kind = FlowMatchEulerDiscreteScheduler if family.flow else DDPMScheduler
    return kind.from_config(family.pipeline.scheduler.config)


def draw_timesteps(family: PipelineFamily, count: int, draws: torch.Generator) -> Tensor:
    """Numbers from 0 to 1 that choose timesteps, by the recipe's density."""
    if not family.flow:
        return torch.rand(count, generator=draws)
    from diffusers.training_utils import compute_density_for_timestep_sampling

    loss = family.recipe.loss
    timesteps: Tensor = compute_density_for_timestep_sampling(
        loss.flow_weighting, count, loss.logit_mean, loss.logit_std, loss.mode_scale, generator=draws
    )
    return timesteps.clamp(0, 1 - 1e-6)  # 1 would be the index behind the last timestep
