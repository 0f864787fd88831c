"""MoSLoRA in diffusion models: what this package or diffusers saves of an adapter draws the same pictures."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")

import diffusers

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, export_adapter, load_adapter, merge, save_adapter
from mm_moslora.utils.errors import AdapterError
from tests.builders.tiny_pipelines import SIDE, tiny_pipeline


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl"])
def test_what_the_savers_of_diffusers_write_draws_the_same_picture(name: str, tmp_path: Path) -> None:
    """The official scripts' way: the state of PEFT, converted, through the pipeline's own saver."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    pipeline = tiny_pipeline(name)
    config = MoSLoRAConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipeline.unet.add_adapter(config)
    text = MoSLoRAConfig(r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    add_moslora(pipeline.text_encoder, text, targets=["q_proj", "k_proj", "v_proj", "out_proj"])
    with torch.no_grad():
        for model in (pipeline.unet, pipeline.text_encoder):
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.2)
    own = _drawn(pipeline)
    assert (own - _drawn(tiny_pipeline(name))).abs().max() > 0.01
    state = {
        "unet_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet)),
        "text_encoder_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.text_encoder)),
    }
    type(pipeline).save_lora_weights(tmp_path / "plain", **state)
    type(pipeline).save_lora_weights(
        tmp_path / "told", unet_lora_adapter_metadata=config.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(), **state,
    )  # fmt: skip
    for folder in ("plain", "told"):
        read = tiny_pipeline(name)
        read.load_lora_weights(str(tmp_path / folder))
        torch.testing.assert_close(_drawn(read), own, atol=1e-5, rtol=0)
    with pytest.raises(AdapterError, match="save_lora_adapter would write mixers"):
        pipeline.unet.save_lora_adapter(tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_a_mixer_without_its_factor_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("tiny-sd")
    add_moslora(pipeline.unet, MoSLoRAConfig(r=2, lora_alpha=2), targets=["to_q"])
    with pytest.raises(AdapterError, match="has no B beside it"):
        type(pipeline).save_lora_weights(tmp_path, unet_lora_layers={"a.to_q.lora_mixer.weight": torch.eye(2)})


def test_plain_lora_is_saved_by_diffusers_as_before(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("tiny-sd")
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]))
    pipeline.unet.save_lora_adapter(tmp_path / "alone")
    assert (tmp_path / "alone" / "pytorch_lora_weights.safetensors").is_file()


def _drawn(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": 2}
    return torch.from_numpy(pipeline("a cat", generator=noise, output_type="np", **size).images)


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
