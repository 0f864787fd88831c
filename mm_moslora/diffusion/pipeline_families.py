"""Families of diffusion pipelines: loading one, and what differs between them when they train.

Shapes: latents ``[N, C, H, W]``, prompt embeddings ``[N, L, D]``, sizes ``[N, 6]`` (original height and width, top and
left of the crop, target height and width, in pixels).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe, PipelineConfig
from mm_moslora.diffusion.tiny_pipelines import TINY_PIPELINES, tiny_pipeline
from mm_moslora.models.model_paths import COMMITS, CONTENTS, cached_snapshot
from mm_moslora.models.weights_fingerprint import fingerprint
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, DataError, ModelError, reason_of, suggestion
from mm_moslora.utils.network.hub_access import hub_or_cache
from mm_moslora.utils.package_requirements import install_extra, is_installed

logger = logging.getLogger(__name__)

Conditioning = dict[str, Tensor]
"""Conditioning of the denoiser by name, batch first."""
_JOINT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")


def need_diffusers() -> None:
    """Refuse to go on without the packages of the extra.

    Raises:
        ConfigError: diffusers is not installed; names the command that installs it.
    """
    if not is_installed("diffusers"):
        raise ConfigError(f"Diffusion models need diffusers, which is missing. Run: {install_extra('diffusion')}")


class PipelineFamily:
    """A loaded pipeline of diffusers, and how its denoiser is trained by the run's recipe."""

    classes: tuple[str, ...] = ()
    """Names of diffusers' classes."""
    denoiser_name = "unet"
    text_encoder_names: tuple[str, ...] = ("text_encoder",)
    """All of them."""
    clip_names: tuple[str, ...] = ("text_encoder",)
    """Those that may carry adapters."""
    flow = False
    """Whether the denoiser matches flows; otherwise it predicts noise or v."""
    attention: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers meant by `adapter.targets: attention`."""
    t5_window = 0
    """Most tokens of T5, 0 without one."""
    prompt_options: Mapping[str, Any] = MappingProxyType(
        {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    )
    """Arguments of the pipeline's `encode_prompt`; the first of its outputs is the text."""
    pooled_output: int | None = None
    """Index of the pooled text among its outputs; None: there is none."""
    packed = 1
    """Side of the squares of latents that the pipeline joins before the denoiser."""

    def __init__(self, pipeline: Any, recipe: DiffusionRecipe) -> None:
        self.pipeline, self.recipe = pipeline, recipe
        scheduler = pipeline.scheduler.config
        self.prediction = scheduler.get("prediction_type", "epsilon")
        prediction = recipe.model.prediction
        if self.flow:
            if prediction != "auto" or recipe.loss.min_snr_gamma is not None:
                raise ConfigError(
                    f"model.prediction or loss.min_snr_gamma is set, but {type(pipeline).__name__} matches flows, "
                    "which have no such choice. Leave both out."
                )
            return
        if "beta_schedule" not in scheduler or self.prediction not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"The scheduler of {recipe.model.base} is {type(pipeline.scheduler).__name__} with prediction_type "
                f"{self.prediction!r}; expected one with a beta schedule that predicts epsilon or v_prediction."
            )
        if prediction not in ("auto", self.prediction):
            raise ConfigError(
                f"model.prediction is {prediction}, but the scheduler of {recipe.model.base} says {self.prediction}, "
                "and it draws the pictures. Leave model.prediction out, or correct scheduler/scheduler_config.json."
            )

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer, a module with a `config`."""
        return getattr(self.pipeline, self.denoiser_name)

    def adapted_names(self) -> list[str]:
        """The components that carry an adapter."""
        more = self.clip_names if self.recipe.model.text_encoders == "adapter" else ()
        return [self.denoiser_name, *more]

    def gather(self) -> None:
        """Bring all parts to this process's device, to draw or encode."""
        self.pipeline.to(distributed.device())

    def rest(self) -> None:
        """On a GPU: take the parts to main memory that do not run in a step."""
        if distributed.device().type == "cpu":
            return
        encoders = self.text_encoder_names if self.recipe.model.text_encoders == "frozen" else ()
        for name in [*encoders, *(["vae"] if self.recipe.data.cache_latents else [])]:
            part = getattr(self.pipeline, name, None)
            if part is not None:
                part.to("cpu")
        torch.cuda.empty_cache()

    @property
    def resolution(self) -> int:
        """Side of the pictures, pixels."""
        own = getattr(self.pipeline, "default_sample_size", None) or self.denoiser.config.sample_size
        side: int = self.recipe.data.resolution or int(own) * self.pipeline.vae_scale_factor
        return side

    def check_resolution(self) -> None:
        """Refuse sides that the VAE and the denoiser cannot divide.

        Raises:
            ConfigError: names the nearest good side.
        """
        side, config = self.resolution, self.denoiser.config
        token = self.pipeline.vae_scale_factor * config.get("patch_size", 1) * self.packed
        unit = math.lcm(8, token)  # 8: diffusers' own rule
        positions = config.get("pos_embed_max_size")
        most = max(unit, positions * token // unit * unit) if positions else max(unit, side)
        if side % unit or side > most:
            limit = f" up to {most}" if positions else ""
            good = min(max(unit, round(side / unit) * unit), most)
            raise ConfigError(
                f"data.resolution is {side}, but {type(self.pipeline).__name__} of {self.recipe.model.base} takes "
                f"multiples of {unit}{limit}. Choose {good}."
            )

    def encode(self, prompts: list[str]) -> Conditioning:
        """The conditioning of prompts; gradients flow into text encoders."""
        encoder = next(getattr(self.pipeline, n) for n in self.text_encoder_names if getattr(self.pipeline, n, None))
        device = next(encoder.parameters()).device
        outputs = self.pipeline.encode_prompt(prompts, device=device, **self.prompt_options)
        return {"text": outputs[0]} | ({} if self.pooled_output is None else {"pooled": outputs[self.pooled_output]})

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
        """The denoiser's prediction, of the shape of the latents."""
        return self.denoiser(noisy, timesteps, encoder_hidden_states=conditioning["text"]).sample

    def to_latents(self, means_or_samples: Tensor) -> Tensor:
        """The VAE's numbers on the scale that the denoiser knows."""
        mean, deviation = self._vae_scale()
        return (means_or_samples - mean) * self.pipeline.vae.config.scaling_factor / deviation

    def _vae_scale(self) -> tuple[Tensor | float, Tensor | float]:
        """Mean and deviation of the VAE's numbers, before `scaling_factor`."""
        return self.pipeline.vae.config.get("shift_factor") or 0.0, 1.0

    def decode(self, latents: Tensor, side: int) -> Any:
        """Pictures of drawn latents, in the VAE's own precision."""
        vae, (mean, deviation) = self.pipeline.vae, self._vae_scale()
        values = latents.to(vae.device, vae.dtype)
        if isinstance(mean, Tensor) and isinstance(deviation, Tensor):
            mean, deviation = mean.to(values), deviation.to(values)
        values = values * deviation / vae.config.scaling_factor + mean
        return self.pipeline.image_processor.postprocess(vae.decode(values, return_dict=False)[0], output_type="pil")

    def windows(self) -> list[tuple[Any, int]]:
        """Tokenizers with the most tokens that their encoders read; T5's alone where there is one, as it reads more."""
        windows = []
        for name in self.text_encoder_names:
            tokenizer = getattr(self.pipeline, name.replace("text_encoder", "tokenizer"), None)
            if tokenizer is not None and getattr(self.pipeline, name, None) is not None:
                if name not in self.clip_names:
                    return [(tokenizer, self.t5_window)]
                windows.append((tokenizer, int(tokenizer.model_max_length)))
        return windows

    def check_prompts(self, prompts: list[str]) -> None:
        """Refuse prompts beyond an encoder's window, or count them; see `data.long_prompts`.

        Raises:
            DataError: one is too long, and the recipe does not say that it may be cut.
        """
        long: dict[str, str] = {}
        for tokenizer, window in self.windows():
            for prompt, ids in zip(prompts, tokenizer(prompts, truncation=False).input_ids, strict=True):
                if len(ids) > window:
                    long.setdefault(prompt, f"{len(ids)} tokens, and the text encoder reads {window}")
        if not long:
            return
        prompt, why = next(iter(long.items()))
        example = f"{prompt[:80]!r} has {why}"
        if self.recipe.data.long_prompts == "refuse":
            raise DataError(
                f"{len(long)} of {len(set(prompts))} prompts are too long: {example}. Shorten them, or cut them with "
                "data.long_prompts: truncate."
            )
        logger.warning("%d of %d prompts are cut: %s.", len(long), len(set(prompts)), example)


class StableDiffusionFamily(PipelineFamily):
    """Stable Diffusion 1 and 2."""

    classes = ("StableDiffusionPipeline",)


class SdxlFamily(PipelineFamily):
    """SDXL; its UNet takes the sizes of a picture, too."""

    classes = ("StableDiffusionXLPipeline",)
    text_encoder_names = clip_names = ("text_encoder", "text_encoder_2")
    pooled_output = 2

    def _vae_scale(self) -> tuple[Tensor | float, Tensor | float]:
        """Of each channel where the VAE has both, as diffusers' SDXL does."""
        config = self.pipeline.vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return super()._vae_scale()
        return torch.tensor(mean).view(-1, 1, 1), torch.tensor(deviation).view(-1, 1, 1)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: Tensor) -> Tensor:
        """See `PipelineFamily`."""
        added = {"text_embeds": conditioning["pooled"], "time_ids": sizes.to(conditioning["pooled"])}
        text = conditioning["text"]
        return self.denoiser(noisy, timesteps, encoder_hidden_states=text, added_cond_kwargs=added).sample


class Sd3Family(PipelineFamily):
    """Stable Diffusion 3."""

    classes = ("StableDiffusion3Pipeline",)
    denoiser_name, flow, t5_window = "transformer", True, 256
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    clip_names = ("text_encoder", "text_encoder_2")
    attention = (*PipelineFamily.attention, *_JOINT)
    prompt_options = MappingProxyType(
        {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False, "max_sequence_length": t5_window}
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

    classes = ("FluxPipeline",)
    denoiser_name, flow, t5_window, packed = "transformer", True, 512, 2
    text_encoder_names = ("text_encoder", "text_encoder_2")
    attention = (*PipelineFamily.attention, *_JOINT)
    prompt_options = MappingProxyType({"prompt_2": None, "max_sequence_length": t5_window})
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

    def decode(self, latents: Tensor, side: int) -> Any:
        """See `PipelineFamily`."""
        return super().decode(self.pipeline._unpack_latents(latents, side, side, self.pipeline.vae_scale_factor), side)


FAMILIES: tuple[type[PipelineFamily], ...] = (StableDiffusionFamily, SdxlFamily, Sd3Family, FluxFamily)


def pipeline_source(config: PipelineConfig, commits: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What a manifest keeps of a pipeline: fingerprints of its files, and commits of what is the hub's.

    Args:
        config: a recipe's `model`.
        commits: by recipe key, of the checkpoint that a run continues from.
    """
    contents, commits_used = dict[str, str](), dict[str, str]()
    for key, name, revision in (("model.base", config.base, config.revision), ("model.vae", config.vae, None)):
        if name is None or name in TINY_PIPELINES:
            continue
        folder = Path(name)
        if not folder.is_dir():
            if (snapshot := cached_snapshot(name, commits.get(key, revision))) is None:
                continue
            folder, commits_used[key] = snapshot, snapshot.name
        contents |= {
            f"{key}/{path.relative_to(folder)}": fingerprint(path)
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".json", ".txt", ".model", ".safetensors") and path.is_file()
        }
    return {CONTENTS: contents, COMMITS: commits_used}


def load_family(
    recipe: DiffusionRecipe, *, dtype: torch.dtype, commits: Mapping[str, str] = MappingProxyType({})
) -> PipelineFamily:
    """Load the pipeline of a recipe, all of it frozen.

    Args:
        recipe: resolved.
        dtype: of the weights; the VAE's is float32 unless the recipe names another VAE.
        commits: see `pipeline_source`.

    Raises:
        ConfigError: diffusers is not installed, `model.prediction` contradicts the scheduler, or the pipeline does not
            take `data.resolution`.
        ModelError: there is no such pipeline, or it is of no known family.
    """
    need_diffusers()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # its notices are of its own options
    diffusers.utils.logging.disable_progress_bar()
    with hub_or_cache(None if recipe.model.base in TINY_PIPELINES else recipe.model.base, recipe.model.vae):
        pipeline = _loaded(recipe.model, dtype, commits)
    name = type(pipeline).__name__
    kind = next((kind for kind in FAMILIES if name in kind.classes), None)
    assert kind is not None, "_loaded refuses others"
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    family = kind(pipeline, recipe)
    family.check_resolution()
    return family


def _loaded(config: PipelineConfig, dtype: torch.dtype, commits: Mapping[str, str]) -> Any:
    import diffusers

    if config.base in TINY_PIPELINES:
        pipeline = tiny_pipeline(config.base)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and name != "vae":
                part.to(dtype)
        return pipeline
    names = [name for kind in FAMILIES for name in kind.classes]
    base, more = config.base, dict[str, Any](revision=commits.get("model.base", config.revision))
    try:
        index = diffusers.DiffusionPipeline.load_config(base, **more)
        name = str(dict(index).get("_class_name"))
        if name not in names:
            raise ModelError(f"{base} is a {name}, expected one of {', '.join(names)}.{suggestion(name, names)}")
        if config.vae is not None:
            more["vae"] = diffusers.AutoencoderKL.from_pretrained(
                config.vae, revision=commits.get("model.vae"), torch_dtype=dtype, use_safetensors=True,
                trust_remote_code=False,
            )  # fmt: skip
        if "safety_checker" in index:
            more |= {"safety_checker": None, "requires_safety_checker": False}
        dtypes = {"default": dtype, "vae": dtype if config.vae else torch.float32}
        return getattr(diffusers, name).from_pretrained(
            base, torch_dtype=dtypes, variant=config.variant, use_safetensors=True, trust_remote_code=False, **more
        )
    except ModelError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"model.base {base!r} (with model.vae {config.vae!r}) cannot be loaded: {reason_of(error)}. Expected a "
            f"folder or hub id of a diffusers pipeline with safetensors weights, or one of {', '.join(TINY_PIPELINES)}."
        ) from error
