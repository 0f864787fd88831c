"""Diffusion runs that two ranks, or one of them alone, train in one process."""

from __future__ import annotations

from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe, load_diffusion_recipe

PICTURES_PER_STEP = 2


def make_recipe(folder: str, zero: str, *, ranks: int) -> DiffusionRecipe:
    """Three steps of the same pictures on any number of ranks."""
    changes = [
        f"train.output={folder}/{zero}-{ranks}", "train.steps=3", "train.save_every=0", "train.precision=fp32",
        "track.trackers=[]", "optim.lr=0.02", "validate.prompts=[]", "data.crop=random", "data.flip=true",
        f"train.accumulation={PICTURES_PER_STEP // ranks}", f"train.zero={zero}",
    ]  # fmt: skip
    return load_diffusion_recipe("tiny_subject", changes)


def main(folder: str) -> None:
    """Train plainly and sharded; the sharded run stops on the way and goes on."""
    from mm_moslora.diffusion.diffusion_training import train_diffusion

    train_diffusion(make_recipe(folder, "none", ranks=2))
    sharded = make_recipe(folder, "zero2", ranks=2)
    assert train_diffusion(sharded, stop_at=2).step == 2
    assert train_diffusion(sharded, resume="required").step == 3
