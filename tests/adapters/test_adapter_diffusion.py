"""MoSLoRA in diffusion models: the DreamBooth example trains, and stock diffusers reads what it writes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers")

from mm_moslora.adapters import load_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def dreambooth() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dreambooth", EXAMPLES / "dreambooth.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["dreambooth"] = module
    spec.loader.exec_module(module)
    return module


# Runs without mm_moslora: builds the same base, loads the weights as any user of diffusers would, prints the output.
_STOCK = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {examples!r})
source = Path({examples!r}, "dreambooth.py").read_text()
start = source.index("def tiny_unet"); stop = source.index("def tiny_pairs")
space = {{"torch": torch, "nn": torch.nn}}
exec("from __future__ import annotations\\n" + source[start:stop], space)
import diffusers
kind = {kind!r}
if kind == "unet":
    base = space["tiny_unet"]()
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), text_encoder=None, tokenizer=None,
        unet=base, scheduler=diffusers.DDPMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
else:
    base = space["tiny_transformer"]()
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=base, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None)
pipe.load_lora_weights({folder!r})
given = torch.load(Path({folder!r}, "given.pt"))
with torch.no_grad():
    result = base.eval()(**given).sample
assert "mm_moslora" not in sys.modules
torch.save(result, Path({folder!r}, "stock.pt"))
"""


def _given(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    given = {
        "timestep": torch.tensor([10.0, 600.0]),
        "encoder_hidden_states": torch.randn(2, 4, 16, generator=generator),
    }
    if kind == "unet":
        return given | {"sample": x}
    return given | {"hidden_states": x, "pooled_projections": torch.randn(2, 8, generator=generator)}


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_dreambooth_learns_and_stock_diffusers_reads_it(dreambooth: ModuleType, kind: str, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    is_unet = kind == "unet"
    make = dreambooth.tiny_unet if is_unet else dreambooth.tiny_transformer
    objective = dreambooth.noise_objective(DDPMScheduler()) if is_unet else dreambooth.flow_objective
    recipe = dreambooth.Recipe(lr=1e-2, steps=40, accumulation=2)
    denoiser = dreambooth.adapt(make(), recipe)
    names = {name.rpartition(".lora_mixer")[0].rpartition(".attn")[2] for name, _ in denoiser.named_parameters()}
    assert any(name.endswith("to_out.0") for name in names)
    losses = dreambooth.train(denoiser, recipe, objective, dreambooth.tiny_pairs(pooled=not is_unet))
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])
    dreambooth.write(denoiser, tmp_path, component=kind)

    given = _given(kind)
    with torch.no_grad():
        live = denoiser.eval()(**given).sample
        base = make().eval()(**given).sample
        ours = load_adapter(make(), tmp_path / "adapter").eval()(**given).sample
    assert (live - base).abs().max() > 1e-2
    torch.testing.assert_close(ours, live, atol=1e-6, rtol=0)
    torch.save(given, tmp_path / "given.pt")
    code = _STOCK.format(examples=str(EXAMPLES), kind=kind, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "stock.pt"), live, atol=1e-5, rtol=0)


def test_the_sdxl_recipe_is_the_papers(dreambooth: ModuleType) -> None:
    recipe = dreambooth.read_recipe(EXAMPLES / "recipes" / "sdxl_dreambooth_moslora.yaml")
    assert recipe == dreambooth.Recipe()
    assert (recipe.rank, recipe.lr, recipe.steps, recipe.mixer_init) == (4, 1e-4, 500, "orthogonal")


def test_an_unknown_recipe_key_is_an_error(dreambooth: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("rnak: 4\n")
    with pytest.raises(SystemExit, match="rnak"):
        dreambooth.read_recipe(tmp_path / "r.yaml")
