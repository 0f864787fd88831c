"""Peak FLOP/s, memory and bandwidth of GPUs by name, and a parser for lists such as 8xA100-80G."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mm_moslora.utils.errors import ConfigError, suggestion

CARDS = {
    "A100-40G": ("A100", 312, 19.5, 230, 1555), "A100-80G": ("A100", 312, 19.5, 230, 2039),
    "A800-80G": ("A800", 312, 19.5, 160, 2039), "H100-80G": ("H100", 989, 67, 370, 3350),
    "H800-80G": ("H800", 989, 67, 160, 3350), "H200-141G": ("H200", 989, 67, 370, 4800),
    "H20-96G": ("H20", 148, 44, 370, 4000), "B200-180G": ("B200", 2250, 75, 700, 8000),
    "L40S-48G": ("L40S", 362, 91.6, 20, 864), "L4-24G": ("L4", 121, 30.3, 20, 300),
    "A10-24G": ("A10", 125, 31.2, 20, 600), "A6000-48G": ("A6000", 155, 38.7, 20, 768),
    "RTX3090-24G": ("RTX 3090", 71, 35.6, 10, 936), "RTX4090-24G": ("RTX 4090", 165, 82.6, 10, 1008),
    "RTX5090-32G": ("RTX 5090", 209, 104.8, 20, 1792), "V100-32G": ("V100", 125, 15.7, 120, 900),
    "T4-16G": ("T4", 65, 8.1, 8, 320), "MI300X-192G": ("MI300X", 1307, 163.4, 300, 5300),
}  # fmt: skip
"""Name with the memory in GB: a part of the device's name, dense half-precision peak (fp32 accumulation; fp16 on V100
and T4) and peak in fp32 without TF32, in which PyTorch does not multiply unless it is asked to, TFLOP/s; bandwidth
between GPUs of one machine (usual wiring) and of the memory, GB/s. From vendors' data sheets."""
DENSE_TFLOPS = {part: peak for part, peak, *_ in CARDS.values()} | {
    "H100 PCIE": 756, "GH200": 989, "A10G": 125, "RTX 6000 ADA": 364, "MI250X": 383
}  # fmt: skip
"""Dense half-precision peak by a part of the device's name; the longest matching name counts."""
WITHOUT_BF16 = ("V100", "T4")
"""Cards on which `train.precision: auto` is fp32."""

PER_HOST = 8
"""GPUs of a host, unless it is known."""
NETWORK_GB, FAST_NETWORK_GB, FAST_LINK_GB = 12.5, 200.0, 150
"""Assumed network of a host with eight GPUs, GB/s: 100 Gb/s, and an adapter of 200 Gb/s (25 GB/s) for every GPU where
the links between GPUs carry 150 GB/s (A100 and later)."""


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The GPUs of a run."""

    name: str
    count: int
    memory: float
    """Memory of one GPU, bytes."""
    peak: float
    """Dense half-precision peak of one GPU, FLOP/s."""
    peak_fp32: float
    """Peak of one GPU in fp32, FLOP/s."""
    has_bf16: bool
    """Whether it multiplies bf16 fast."""
    bandwidth: float
    """Bandwidth between GPUs of one host, bytes per second."""
    memory_bandwidth: float
    """Bandwidth of a GPU's memory, bytes per second."""
    network: float
    """Bandwidth between hosts, bytes per second: what all adapters of a host carry together."""

    @property
    def across(self) -> float:
        """Bandwidth that a collective of all GPUs reaches; every byte comes into a host once."""
        return self.bandwidth if self.count <= PER_HOST else min(self.bandwidth, self.network)


def _parts_in(name: str, parts: Iterable[str]) -> list[str]:
    """Those of the parts that are words of a driver's name of a device."""
    words = f" {name.upper().replace('-', ' ')} ".replace(" NVIDIA ", " ")
    return [part for part in parts if f" {part} " in words]


def device_peak(name: str) -> float | None:
    """Dense half-precision peak of a device, FLOP/s, by the name from its driver; None where it is unknown."""
    keys = _parts_in(name, DENSE_TFLOPS)
    return DENSE_TFLOPS[max(keys, key=len)] * 1e12 if keys else None


def card_of(name: str, memory: float) -> Gpus:
    """One card by the name from its driver and its memory in bytes; an unknown one counts as the slowest known."""
    parts = _parts_in(name, DENSE_TFLOPS)
    known = [parse_gpus(key) for key, (part, *_) in CARDS.items() if part in parts]
    card = min(known or [parse_gpus("T4")], key=lambda card: abs(card.memory - memory))
    return replace(
        card, name=name, memory=memory, peak=device_peak(name) or card.peak, has_bf16=card.has_bf16 or not known
    )


def parse_gpus(text: str) -> Gpus:
    """Parse `8xA100-80G`, or `8xH100` where a card has one size; ConfigError for what is unknown."""
    match = re.fullmatch(r"(?:([0-9]+)x)?([A-Za-z0-9]+)(?:-([0-9]+)G?B?)?", text.strip())
    if match is None or not re.fullmatch("[1-9][0-9]{0,5}", match[1] or "1"):
        raise ConfigError(f"{text!r} is not a list of GPUs, expected COUNTxNAME-MEMORY such as 8xA100-80G.")
    name = match[2].upper() + (f"-{match[3]}G" if match[3] else "")
    keys = [key for key in CARDS if key == name or (not match[3] and key.startswith(f"{name}-"))]
    if len(keys) != 1:
        raise ConfigError(f"{text!r} names no known GPU.{suggestion(name, CARDS)} Known: {', '.join(CARDS)}.")
    part, peak, peak_fp32, bandwidth, own = CARDS[keys[0]]
    return Gpus(
        name=keys[0], count=int(match[1] or 1), memory=float(keys[0].rpartition("-")[2][:-1]) * 1e9, peak=peak * 1e12,
        peak_fp32=peak_fp32 * 1e12, has_bf16=part not in WITHOUT_BF16, bandwidth=bandwidth * 1e9,
        memory_bandwidth=own * 1e9, network=1e9 * (FAST_NETWORK_GB if bandwidth >= FAST_LINK_GB else NETWORK_GB),
    )  # fmt: skip
