"""The verbs `diffusion train`, `diffusion config` and `diffusion export`. Parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App

from mm_moslora.cli.launch_verbs import refuse_early, run_training, show_recipe
from mm_moslora.cli.shared_options import Overrides, quiet_libraries
from mm_moslora.config import override_items

if TYPE_CHECKING:
    from mm_moslora.training.run_driver import TrainResult
    from mm_moslora.training.supervision.stop_signals import StopRequest

diffusion_app = App(name="diffusion", help="Tune diffusion models: SD 1 and 2, SDXL, SD3, Flux.")


@diffusion_app.command
def train(recipe: str, *overrides: Overrides, resume: str = "auto", stop_at: int | None = None) -> int:
    """Train a diffusion recipe; the same command again continues it.

    Parameters
    ----------
    recipe
        YAML file, or the name of a shipped preset (see `mm-moslora diffusion config`).
    resume
        auto, required, never, or a checkpoint folder.
    stop_at
        Save and stop after this optimiser step.
    """
    from mm_moslora.diffusion.diffusion_recipe import load_diffusion_recipe

    resolved = load_diffusion_recipe(recipe, override_items(overrides))
    refuse_early(resolved)
    folder = Path(resolved.train.output)

    def session(*, stop: StopRequest) -> TrainResult:
        quiet_libraries()
        from mm_moslora.diffusion.diffusion_training import train_diffusion

        return train_diffusion(resolved, resume=resume, stop_at=stop_at, stop=stop)

    def advice(checkpoint: Path) -> str:
        return f'Draw with it: pipeline.load_lora_weights("{checkpoint}")\nReport: mm-moslora report {folder}'

    return run_training(folder, session, advice=advice)


@diffusion_app.command
def config(recipe: str | None = None, *overrides: Overrides) -> int:
    """Print the resolved recipe, every default filled in; without a recipe, list the shipped presets.

    Parameters
    ----------
    recipe
        YAML file, or the name of a shipped preset; or a key or a group of keys, such as train, which is explained.
    """
    from mm_moslora.diffusion.diffusion_recipe import DIFFUSION_RECIPES, DiffusionRecipe, load_diffusion_recipe

    return show_recipe(recipe, overrides, load=load_diffusion_recipe, presets=DIFFUSION_RECIPES, kind=DiffusionRecipe)


@diffusion_app.command
def export(run: Path, output: Path, *, to: Literal["diffusers", "kohya"] = "diffusers") -> int:
    """Write the adapter of a run as a file that other programs read; mixers are folded into B.

    Parameters
    ----------
    run
        A run, or one of its checkpoints.
    output
        diffusers: folder for `pytorch_lora_weights.safetensors`. kohya: the .safetensors file.
    to
        diffusers: `pipeline.load_lora_weights`. kohya: AUTOMATIC1111, ComfyUI.
    """
    from mm_moslora.adapters import export_adapter
    from mm_moslora.diffusion.diffusion_training import denoiser_adapter

    print(export_adapter(denoiser_adapter(run), output, layout=to))
    return 0
