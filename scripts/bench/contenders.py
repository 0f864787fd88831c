"""Ways to train, and the contenders of the GPU benchmark (`gpu.py`) by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

PACKAGES = {
    "hf": ("torch", "transformers", "peft"),
    "hf-best": ("torch", "triton", "transformers", "peft", "liger-kernel"),
    "ours": ("torch", "triton", "transformers", "peft", "liger-kernel"),
    "decode-ours": ("torch", "transformers"),
    "decode-transformers": ("torch", "transformers"),
    "decode-vllm": ("torch",),
}
"""Packages whose versions a kind of contender depends on."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train."""

    dtype: str = "bf16"
    """Of the base, and of adapters that are not wide."""
    dropout: float = 0.0
    """Of the adapters."""
    checkpointing: bool = False
    """Whether the decoder's layers are computed again for the backward pass."""
    mixed: bool = False
    """Whether orthogonal mixers are in the adapters, of peers, too. Otherwise MoSLoRA's are the identity, and it
    computes the loss of LoRA."""
    wide_adapters: bool = False
    """For peers: PEFT's default, adapters in fp32."""
    autocast: bool = False
    """For peers: run under autocast."""
    supervised_only: bool = False
    """For peers: compute logits at supervised positions only."""
    mixer: bool = True
    """For `ours`: whether the mixers train; otherwise plain LoRA."""
    lean: bool = True
    """For `ours`: `model.lean_layers`."""
    kernels: str = "auto"
    """For `ours`: `model.kernels`, or `inductor` for `train.compile`."""


@dataclass(frozen=True, kw_only=True)
class Contender(Way):
    """One way to train or to decode on a GPU, measured in a process of its own."""

    name: str
    kind: str
    """Key of `PACKAGES`."""
    half_rank: bool = False
    zero: str = "none"
    """For `ours`: `train.zero`."""
    needs: str = ""
    """A package without which it is left out."""
    gradients: bool = False
    """Whether its gradients are compared with fp64."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages whose versions it depends on."""
        return tuple(dict.fromkeys((*PACKAGES[self.kind], *([self.needs] if self.needs else []))))

    @property
    def runs_sources(self) -> bool:
        """Whether it runs this project's code: its own step and decoding, and the attention of `hf-best`."""
        return self.kind in ("ours", "hf-best", "decode-ours")


CONTENDERS = (
    Contender(name="ours", kind="ours", gradients=True),
    Contender(name="hf-best", kind="hf-best", gradients=True),
    Contender(name="hf", kind="hf", checkpointing=True, wide_adapters=True, autocast=True, gradients=True),
    Contender(name="ours-zero2", kind="ours", zero="zero2", needs="deepspeed"),
    Contender(name="ours-torch", kind="ours", kernels="torch", gradients=True),
    Contender(name="ours-lora", kind="ours", mixer=False),
    Contender(name="ours-dropout", kind="ours", dropout=0.05),
    Contender(name="hf-best-checkpointing", kind="hf-best", checkpointing=True),
    Contender(name="hf-best-dropout", kind="hf-best", checkpointing=True, dropout=0.05),
    Contender(name="ours-half-rank", kind="ours", half_rank=True),
    Contender(name="ours-lora-half-rank", kind="ours", half_rank=True, mixer=False),
    Contender(name="ours-triton", kind="ours", kernels="triton", needs="triton", gradients=True),
    Contender(name="ours-liger", kind="ours", kernels="liger", needs="liger-kernel", gradients=True),
    Contender(name="ours-inductor", kind="ours", kernels="inductor", gradients=True),
    Contender(name="ours-zero1", kind="ours", zero="zero1", needs="deepspeed"),
    Contender(name="ours-checkpointing", kind="ours", checkpointing=True),
    Contender(name="decode-ours", kind="decode-ours"),
    Contender(name="decode-transformers", kind="decode-transformers"),
    Contender(name="decode-vllm", kind="decode-vllm", needs="vllm"),
)
"""In the order of measurement: what the targets compare comes first."""
BY_NAME = {contender.name: contender for contender in CONTENDERS}
