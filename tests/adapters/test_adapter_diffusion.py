"""MoSLoRA in diffusion models: the DreamBooth example trains, and stock diffusers reads what it writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from preloaded import Preloaded

pytest.importorskip("diffusers", reason="diffusers is not installed")

import diffusers

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, export_adapter, load_adapter, merge, save_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def dreambooth() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dreambooth", EXAMPLES / "dreambooth.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["dreambooth"] = module
    spec.loader.exec_module(module)
    return module


# Runs without mm_moslora: builds the same base, loads the weights as any user of diffusers, and of PEFT, would.
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
import peft
tuned = peft.PeftModel.from_pretrained(space["tiny_" + kind](), Path({folder!r}, "adapter"))
with torch.no_grad():
    results = {{"diffusers": base.eval()(**given).sample, "peft": tuned.eval()(**given).sample}}
assert not any(name.startswith("mm_moslora") for name in sys.modules)
torch.save(results, Path({folder!r}, "stock.pt"))
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
def test_dreambooth_learns_and_stock_diffusers_and_stock_peft_read_it(
    dreambooth: ModuleType, kind: str, tmp_path: Path, python: Preloaded
) -> None:
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
    done = subprocess.run([python.stock, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for output in torch.load(tmp_path / "stock.pt").values():
        torch.testing.assert_close(output, live, atol=1e-5, rtol=0)


def test_the_sdxl_recipe_is_the_papers(dreambooth: ModuleType) -> None:
    recipe = dreambooth.read_recipe(EXAMPLES / "recipes" / "sdxl_dreambooth_moslora.yaml")
    assert recipe == dreambooth.Recipe()
    assert (recipe.rank, recipe.lr, recipe.steps, recipe.mixer_init) == (4, 1e-4, 500, "orthogonal")


def test_an_unknown_recipe_key_is_an_error(dreambooth: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("rnak: 4\n")
    with pytest.raises(SystemExit, match="rnak"):
        dreambooth.read_recipe(tmp_path / "r.yaml")


def _tiny_sdxl(folder: Path) -> Path:
    """An SDXL pipeline of a few thousand parameters, in the files of the real one."""
    import transformers

    torch.manual_seed(0)
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, transformer_layers_per_block=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=64,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=unet, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=diffusers.EulerDiscreteScheduler(),
        text_encoder=transformers.CLIPTextModel(text),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_the_sdxl_script_trains_a_tiny_sdxl_and_the_stock_pipeline_draws_the_same(
    dreambooth: ModuleType, tmp_path: Path
) -> None:
    from PIL import Image

    model = _tiny_sdxl(tmp_path / "sdxl")
    for name, colours in {"subject": ("red", "darkred"), "class": ("blue", "green")}.items():
        (tmp_path / name).mkdir()
        for colour in colours:
            Image.new("RGB", (80, 64), colour).save(tmp_path / name / f"{colour}.png")
    spec = importlib.util.spec_from_file_location("sdxl", EXAMPLES / "sdxl.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    recipe = dreambooth.read_recipe(EXAMPLES / "recipes" / "sdxl_dreambooth_moslora.yaml")
    recipe = dataclasses.replace(recipe, resolution=64, steps=2, lr=0.05)
    losses = script.run(str(model), recipe, tmp_path / "subject", tmp_path / "class", tmp_path / "out")
    assert len(losses) == 2

    def draw(pipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        result = pipeline(
            "a photo of sks subject", height=64, width=64, num_inference_steps=2, generator=generator, output_type="pt"
        )
        return result.images

    load = diffusers.StableDiffusionXLPipeline.from_pretrained
    plain, stock, ours = (load(model) for _ in range(3))
    stock.load_lora_weights(str(tmp_path / "out"))
    ours.unet = load_adapter(ours.unet, tmp_path / "out" / "adapter").get_base_model()
    before, by_diffusers, by_us = (draw(pipeline) for pipeline in (plain, stock, ours))
    assert (by_us - before).abs().max() > 1e-3
    torch.testing.assert_close(by_diffusers, by_us, atol=1e-5, rtol=0)


def _sd3() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    ).eval()  # fmt: skip


def _pixart() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=16, use_additional_conditions=False,
    ).eval()  # fmt: skip


def _call(model: torch.nn.Module, *, pooled: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator), "timestep": torch.tensor([10.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
    }  # fmt: skip
    if pooled:
        return model(**given, pooled_projections=torch.randn(2, 16, generator=generator)).sample
    return model(**given, added_cond_kwargs={"resolution": None, "aspect_ratio": None}).sample


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj"]


@pytest.mark.parametrize(("make", "targets"), [(_sd3, JOINT), (_pixart, ATTENTION)])
def test_transformers_of_sd3_and_pixart_train_and_stock_libraries_give_the_same(make, targets, tmp_path: Path) -> None:
    pooled = make is _sd3
    config = MoSLoRAConfig(r=4, lora_alpha=8, rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 3})
    model = add_moslora(make(), config, targets=targets)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=3e-2)
    for _ in range(2):
        (_call(model.train(), pooled=pooled) - 1).square().mean().backward()
        assert all(item.grad is not None for item in model.parameters() if item.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model.eval(), tmp_path / "adapter")
    with torch.no_grad():
        live = _call(model, pooled=pooled)
        assert (live - _call(make(), pooled=pooled)).abs().max() > 1e-2
        read = {
            "ours": load_adapter(make(), tmp_path / "adapter"),
            "folded": merge(load_adapter(make(), tmp_path / "adapter")),
            "PEFT": peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval(),
        }  # fmt: skip
        if pooled:  # diffusers' PixArt loads no LoRA; PEFT does
            export_adapter(tmp_path / "adapter", tmp_path / "out", layout="diffusers", component="transformer")
            read["diffusers"] = base = make()
            others = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3")
            diffusers.StableDiffusion3Pipeline(
                transformer=base, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), tokenizer_3=None,
                **dict.fromkeys(others),
            ).load_lora_weights(tmp_path / "out")  # fmt: skip
        for name, other in read.items():
            torch.testing.assert_close(_call(other, pooled=pooled), live, atol=1e-5, rtol=0, msg=name)
