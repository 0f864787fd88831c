"""Every reader of adapter folders takes what every writer made, with every target that PEFT treats specially."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from mm_moslora.adapters import MoSLoRAConfig, export_adapter, load_adapter, save_adapter
from mm_moslora.adapters.adapter_inspection import inspect_adapter
from tests.adapters.adapter_models import gpt2, llama, logits, train_a_bit

Model = Callable[[], nn.Module]


def _grown(base: Model) -> Model:
    """A model with two more tokens, seeded."""

    def make() -> nn.Module:
        model = base()
        torch.manual_seed(1)
        model.resize_token_embeddings(66)
        return model

    return make


def _tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


BASES: dict[str, Model] = {
    "llama": llama,
    "tied": _tied,
    "grown": _grown(llama),
    "gpt2": gpt2,
    "grown gpt2": _grown(gpt2),
}
WRITERS: dict[str, Callable[[peft.PeftModel, Path], object]] = {
    "save_adapter": save_adapter,
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "with embeddings": lambda model, folder: model.save_pretrained(folder, save_embedding_layers=True),
    "without embeddings": lambda model, folder: model.save_pretrained(folder, save_embedding_layers=False),
    "export": lambda model, folder: (
        save_adapter(model, folder.with_name("own")),
        export_adapter(folder.with_name("own"), folder, layout="peft"),
    ),
}
READERS: dict[str, Callable[[nn.Module, Path], peft.PeftModel]] = {
    "load_adapter": load_adapter,
    "from_pretrained": peft.PeftModel.from_pretrained,
    "plain LoRA": lambda base, folder: peft.PeftModel.from_pretrained(
        base, folder, config=peft.LoraConfig.from_pretrained(str(folder))
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "writer"),
    [(MoSLoRAConfig, writer) for writer in WRITERS]
    + [(peft.LoraConfig, writer) for writer in WRITERS if "save_pretrained" in writer or "embeddings" in writer],
)
@pytest.mark.parametrize(
    ("base", "targets"),
    [
        ("llama", ["q_proj", "lm_head"]),
        ("llama", ["embed_tokens", "lm_head"]),
        ("llama", ["embed_tokens", "q_proj"]),
        ("tied", ["q_proj", "lm_head"]),
        ("tied", ["embed_tokens"]),
        ("grown", ["q_proj", "lm_head"]),
        ("grown", ["q_proj"]),
        ("gpt2", ["c_attn", "lm_head"]),
        ("gpt2", ["wte", "c_attn"]),
        ("grown gpt2", ["c_attn"]),
    ],
)
def test_every_reader_takes_what_every_writer_made(
    base: str, targets: list[str], kind: type[peft.LoraConfig], writer: str, tmp_path: Path
) -> None:
    make = BASES[base]
    model = peft.get_peft_model(make(), kind(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    train_a_bit(model)
    WRITERS[writer](model, tmp_path / "a")
    live = logits(model.eval())
    for name, read in READERS.items():
        torch.testing.assert_close(logits(read(make(), tmp_path / "a").eval()), live, atol=1e-5, rtol=0, msg=name)
    assert inspect_adapter(tmp_path / "a")
    export_adapter(tmp_path / "a", tmp_path / "exported", layout="peft")
