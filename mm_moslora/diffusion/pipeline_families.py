"""Families of diffusion pipelines: loading one, what differs between them when they train, and their loss.

Shapes: latents, noise ``[N, C, H, W]``, prompt embeddings ``[N, L, D]``; weights, timesteps ``[N]``; sizes ``[N, 6]``
(original height and width, top and left of the crop, target height and width, in pixels).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe, PipelineConfig
from mm_moslora.models.model_paths import COMMITS, CONTENTS, cached_snapshot
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, ModelError, reason_of
from mm_moslora.utils.identity import fingerprint
from mm_moslora.utils.network.hub_access import hub_or_cache

Conditioning = dict[str, Tensor]  # of the denoiser by name, batch first
_JOINT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")


class PipelineFamily:
    """A loaded pipeline of diffusers, and how its denoiser is trained; of Stable Diffusion 1 and 2."""

    pipeline_class = "StableDiffusionPipeline"
    denoiser_name = "unet"
    text_encoder_names: tuple[str, ...] = ("text_encoder",)
    flow = False  # whether the denoiser matches flows; otherwise it predicts noise or v
    attention: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers meant by `adapter.targets: attention`."""
    options: Mapping[str, Any] = MappingProxyType({"num_images_per_prompt": 1, "do_classifier_free_guidance": False})
    """Arguments of the pipeline's `encode_prompt`; the first of its outputs is the text."""
    pooled_output: int | None = None
    """Index of the pooled text among its outputs; None: there is none."""
    packed = 1
    """Side of the squares of latents that the pipeline joins before the denoiser."""

    def __init__(self, pipeline: Any, recipe: DiffusionRecipe) -> None:
        self.pipeline, self.recipe = pipeline, recipe
        scheduler = pipeline.scheduler.config
        self.prediction = scheduler.get("prediction_type", "epsilon")
        if self.flow and recipe.loss.min_snr_gamma is not None:
            raise ConfigError("loss.min_snr_gamma is set, but this pipeline matches flows, which have no such weights.")
        if not self.flow and ("beta_schedule" not in scheduler or self.prediction not in ("epsilon", "v_prediction")):
            raise ModelError(
                f"The scheduler of {recipe.model.base} is {type(pipeline.scheduler).__name__} with prediction_type "
                f"{self.prediction!r}; expected one with a beta schedule that predicts epsilon or v_prediction."
            )
        own = getattr(pipeline, "default_sample_size", None) or self.denoiser.config.sample_size
        self.resolution: int = recipe.data.resolution or int(own) * pipeline.vae_scale_factor
        unit = pipeline.vae_scale_factor * self.denoiser.config.get("patch_size", 1) * self.packed
        if self.resolution % unit:
            raise ConfigError(
                f"data.resolution is {self.resolution}, but {type(pipeline).__name__} of {recipe.model.base} takes "
                f"multiples of {unit}. Choose {max(1, round(self.resolution / unit)) * unit}."
            )

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer, a module with a `config`."""
        return getattr(self.pipeline, self.denoiser_name)

    def rest(self) -> None:
        """On a GPU: take the parts to main memory that do not run in a step."""
        for name in [*self.text_encoder_names, *(["vae"] if self.recipe.data.cache_latents else [])]:
            if (part := getattr(self.pipeline, name, None)) is not None:
                part.to("cpu")

    def encode(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt."""
        outputs = self.pipeline.encode_prompt([prompt], device=distributed.device(), **self.options)
        return {"text": outputs[0]} | ({} if self.pooled_output is None else {"pooled": outputs[self.pooled_output]})

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
        """The denoiser's prediction, of the shape of the latents."""
        return self.denoiser(noisy, timesteps, encoder_hidden_states=conditioning["text"]).sample

    def to_latents(self, values: Tensor) -> Tensor:
        """The VAE's numbers on the scale that the denoiser knows."""
        config = self.pipeline.vae.config
        return (values - (config.get("shift_factor") or 0.0)) * config.scaling_factor


class SdxlFamily(PipelineFamily):
    """SDXL; its UNet takes the sizes of a picture, too."""

    pipeline_class = "StableDiffusionXLPipeline"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    pooled_output = 2

    def to_latents(self, values: Tensor) -> Tensor:
        """See `PipelineFamily`; of each channel where the VAE has statistics, as diffusers' SDXL does."""
        config = self.pipeline.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return super().to_latents(values)
        mean, deviation = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (values - mean) * config.scaling_factor / deviation

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
        """See `PipelineFamily`."""
        added = {"text_embeds": conditioning["pooled"], "time_ids": sizes.to(conditioning["pooled"])}
        text = conditioning["text"]
        return self.denoiser(noisy, timesteps, encoder_hidden_states=text, added_cond_kwargs=added).sample


class Sd3Family(PipelineFamily):
    """Stable Diffusion 3."""

    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_name, flow = "transformer", True
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    attention = (*PipelineFamily.attention, *_JOINT)
    options = MappingProxyType(
        {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False, "max_sequence_length": 256}
    )
    pooled_output = 2

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
        """See `PipelineFamily`."""
        return self.denoiser(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=conditioning["text"],
            pooled_projections=conditioning["pooled"],
        ).sample  # fmt: skip


class FluxFamily(PipelineFamily):
    """Flux.1, dev and schnell."""

    pipeline_class = "FluxPipeline"
    denoiser_name, flow, packed = "transformer", True, 2
    text_encoder_names = ("text_encoder", "text_encoder_2")
    attention = (*PipelineFamily.attention, *_JOINT)
    options = MappingProxyType({"prompt_2": None, "max_sequence_length": 512})
    pooled_output = 1

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
        """See `PipelineFamily`."""
        pipeline, (count, channels, height, width) = self.pipeline, noisy.shape
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((count,), self.recipe.loss.flux_guidance, device=noisy.device)
        text = conditioning["text"]
        packed = self.denoiser(
            hidden_states=pipeline._pack_latents(noisy, count, channels, height, width),
            timestep=timesteps / 1000, guidance=guidance, pooled_projections=conditioning["pooled"],
            encoder_hidden_states=text, txt_ids=torch.zeros(text.shape[1], 3).to(text),
            img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype),
        ).sample  # fmt: skip
        scale = pipeline.vae_scale_factor
        return pipeline._unpack_latents(packed, height * scale, width * scale, scale)


FAMILIES = {kind.pipeline_class: kind for kind in (PipelineFamily, SdxlFamily, Sd3Family, FluxFamily)}


@dataclass(frozen=True, kw_only=True)
class LatentBatch:
    """What one forward pass takes; `draws` from 0 to 1 choose the timesteps, and `subjects` pictures are no prior."""

    latents: Tensor
    noise: Tensor
    draws: Tensor
    sizes: Tensor
    weights: Tensor
    subjects: int
    conditioning: Conditioning


class DenoisingLoss:
    """The loss of a family's denoiser, of what the pipeline's scheduler says: noise, v or a flow."""

    def __init__(self, family: PipelineFamily) -> None:
        from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

        self.family, self.config = family, family.recipe.loss
        kind = FlowMatchEulerDiscreteScheduler if family.flow else DDPMScheduler
        self.scheduler: Any = kind.from_config(family.pipeline.scheduler.config)

    def __call__(self, batch: LatentBatch) -> Tensor:
        """The weighted sum over examples, divided by the number of the subject's pictures."""
        noisy, timesteps, target, weights = (self._flow if self.family.flow else self._noise)(batch)
        dtype = next(self.family.denoiser.parameters()).dtype
        conditioning = {name: value.to(dtype) for name, value in batch.conditioning.items()}
        predicted = self.family.predict(noisy.to(dtype), timesteps, conditioning, batch.sizes)
        errors = (predicted.float() - target.float()).square().flatten(1).mean(1)
        # As in DreamBooth's scripts, prior preservation adds to the loss: it does not dilute that of the subject.
        return (errors * weights * batch.weights).sum() / batch.subjects

    def _noise(self, batch: LatentBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scheduler, gamma = self.scheduler, self.config.min_snr_gamma
        steps = (batch.draws * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(batch.latents, batch.noise, steps)
        velocity = self.family.prediction == "v_prediction"
        target = scheduler.get_velocity(batch.latents, batch.noise, steps) if velocity else batch.noise
        if gamma is None:
            return noisy, steps, target, torch.ones_like(batch.weights)
        from diffusers.training_utils import compute_snr

        snr = compute_snr(scheduler, steps)
        weights = snr.clamp(max=gamma) / (snr + 1) if velocity else (gamma / snr).clamp(max=1.0)  # also where SNR is 0
        return noisy, steps, target, weights

    def _flow(self, batch: LatentBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        scheduler, latents = self.scheduler, batch.latents
        indices = (batch.draws * scheduler.config.num_train_timesteps).long()
        sigmas = scheduler.sigmas.to(latents)[indices]
        share = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - share) * latents + share * batch.noise
        weights = compute_loss_weighting_for_sd3(self.config.flow_weighting, sigmas=sigmas)
        return noisy, scheduler.timesteps.to(latents)[indices], batch.noise - latents, weights


def draw_timesteps(family: PipelineFamily, count: int, draws: torch.Generator) -> Tensor:
    """Numbers from 0 to 1 that choose timesteps: uniform, for flows by the recipe's density."""
    if not family.flow:
        return torch.rand(count, generator=draws)
    from diffusers.training_utils import compute_density_for_timestep_sampling

    timesteps: Tensor = compute_density_for_timestep_sampling(
        family.recipe.loss.flow_weighting, count, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=draws
    )
    return timesteps.clamp(0, 1 - 1e-6)  # 1 would be the index behind the last timestep


def pipeline_source(config: PipelineConfig, before: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Fingerprints of a pipeline's files, and its commits of the hub; files that differ from `before` are an error."""
    contents, commits = dict[str, str](), dict[str, str]()
    for key, name, revision in (("model.base", config.base, config.revision), ("model.vae", config.vae, None)):
        if name is None:
            continue
        folder = Path(name)
        if not folder.is_dir():
            snapshot = cached_snapshot(name, before.get(COMMITS, {}).get(key, revision))
            assert snapshot is not None, "it was loaded from there"
            folder, commits[key] = snapshot, snapshot.name
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".json", ".txt", ".model", ".safetensors"):
                contents[f"{key}/{path.relative_to(folder)}"] = fingerprint(path)
    old = before.get(CONTENTS, contents)  # files may come and go, but for an index, which decides what is read
    indices = dict.fromkeys((key for key in contents if key.endswith(".index.json")), "")
    if changed := [key for key, mark in contents.items() if {**indices, **old}.get(key, mark) != mark]:
        raise ModelError(
            f"{', '.join(changed[:3])}: the files of the pipeline are not those of the checkpoint. Put "
            "the old files there, or choose another train.output."
        )
    return {CONTENTS: contents, COMMITS: commits}


def load_family(recipe: DiffusionRecipe, *, dtype: torch.dtype, commits: Mapping[str, str]) -> PipelineFamily:
    """Load the pipeline of a recipe, all of it frozen; `commits` of the hub, by recipe key, go before its revisions."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    config, more = recipe.model, dict[str, Any](revision=commits.get("model.base", recipe.model.revision))
    try:
        with hub_or_cache(config.base, config.vae):
            index = dict(diffusers.DiffusionPipeline.load_config(config.base, **more))
            name = str(index.get("_class_name"))
            if name not in FAMILIES:
                raise ValueError(f"it is a {name}, expected one of {', '.join(FAMILIES)}")
            if config.vae is not None:
                more["vae"] = diffusers.AutoencoderKL.from_pretrained(
                    config.vae, revision=commits.get("model.vae"), torch_dtype=dtype, use_safetensors=True,
                    trust_remote_code=False,
                )  # fmt: skip
            if "safety_checker" in index:
                more |= {"safety_checker": None, "requires_safety_checker": False}
            pipeline = getattr(diffusers, name).from_pretrained(
                config.base, torch_dtype={"default": dtype, "vae": dtype if config.vae else torch.float32},
                variant=config.variant, use_safetensors=True, trust_remote_code=False, **more,
            )  # fmt: skip
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"model.base {config.base!r} (with model.vae {config.vae!r}) cannot be loaded: {reason_of(error)}. Give a "
            "folder or hub id of a diffusers pipeline with safetensors weights."
        ) from error
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    return FAMILIES[name](pipeline.to(distributed.device()), recipe)
