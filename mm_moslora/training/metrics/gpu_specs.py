"""Peak FLOP/s, memory and bandwidth of GPUs by name, and a parser for lists such as 8xA100-80G."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mm_moslora.utils.errors import ConfigError, suggestion

DENSE_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIE": 756.0, "H100": 989.0, "H800": 989.0, "H20": 148.0, "GH200": 989.0,
    "A100": 312.0, "A800": 312.0, "L40S": 362.0, "L4": 121.0, "A10G": 125.0, "A10": 125.0, "A6000": 155.0,
    "RTX 6000 ADA": 364.0, "RTX 5090": 209.0, "RTX 4090": 165.0, "RTX 3090": 71.0, "V100": 125.0, "T4": 65.0,
    "MI300X": 1307.0, "MI250X": 383.0,
}  # fmt: skip
"""Dense half-precision peak by a part of the device's name, TFLOP/s (vendors' data sheets; fp32 accumulation). The
longest matching name counts. V100 and T4: fp16, they have no bf16."""

FP32_TFLOPS = {
    "B200": 75.0, "H200": 67.0, "H100": 67.0, "H800": 67.0, "H20": 44.0, "A100": 19.5, "A800": 19.5, "L40S": 91.6,
    "L4": 30.3, "A10": 31.2, "A6000": 38.7, "RTX 5090": 104.8, "RTX 4090": 82.6, "RTX 3090": 35.6, "V100": 15.7,
    "T4": 8.1, "MI300X": 163.4,
}  # fmt: skip
"""Peak in fp32 of the cards in `MEMORY_GB`, TFLOP/s (data sheets), without TF32, in which PyTorch does not multiply
unless it is asked to."""
WITHOUT_BF16 = ("V100", "T4")
"""Cards on which `train.precision: auto` is fp32."""

MEMORY_GB = {
    "A100-40G": ("A100", 40, 230, 1555), "A100-80G": ("A100", 80, 230, 2039), "A800-80G": ("A800", 80, 160, 2039),
    "H100-80G": ("H100", 80, 370, 3350), "H800-80G": ("H800", 80, 160, 3350), "H200-141G": ("H200", 141, 370, 4800),
    "H20-96G": ("H20", 96, 370, 4000), "B200-180G": ("B200", 180, 700, 8000), "L40S-48G": ("L40S", 48, 20, 864),
    "L4-24G": ("L4", 24, 20, 300), "A10-24G": ("A10", 24, 20, 600), "A6000-48G": ("A6000", 48, 20, 768),
    "RTX3090-24G": ("RTX 3090", 24, 10, 936), "RTX4090-24G": ("RTX 4090", 24, 10, 1008),
    "RTX5090-32G": ("RTX 5090", 32, 20, 1792), "V100-32G": ("V100", 32, 120, 900), "T4-16G": ("T4", 16, 8, 320),
    "MI300X-192G": ("MI300X", 192, 300, 5300),
}  # fmt: skip
"""Name: peak's name in `DENSE_TFLOPS`, memory in GB, bandwidth between GPUs of one machine in GB/s (usual wiring), and
bandwidth of the memory in GB/s (data sheets)."""

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


def device_peak(name: str) -> float | None:
    """Dense half-precision peak of a device, FLOP/s, by the name from its driver; None where it is unknown."""
    words = name.upper().replace("-", " ")
    keys = [key for key in DENSE_TFLOPS if f" {key} " in f" {words} ".replace(" NVIDIA ", " ")]
    return DENSE_TFLOPS[max(keys, key=len)] * 1e12 if keys else None


def card_of(name: str, memory: float) -> Gpus:
    """One card by the name from its driver and its memory in bytes; an unknown one counts as the slowest known."""
    words = f" {name.upper().replace('-', ' ')} "
    known = [key for key, (part, *_) in MEMORY_GB.items() if f" {part} " in words]
    likeliest = min(known or ["T4-16G"], key=lambda key: abs(MEMORY_GB[key][1] * 1e9 - memory))
    card = parse_gpus(likeliest)
    return replace(
        card, name=name, memory=memory, peak=device_peak(name) or card.peak, has_bf16=card.has_bf16 or not known
    )


def parse_gpus(text: str) -> Gpus:
    """Parse `8xA100-80G`, or `8xH100` where a card has one size; ConfigError for what is unknown."""
    match = re.fullmatch(r"(?:([0-9]+)x)?([A-Za-z0-9]+)(?:-([0-9]+)G?B?)?", text.strip())
    if match is None or not re.fullmatch("[1-9][0-9]{0,5}", match[1] or "1"):
        raise ConfigError(f"{text!r} is not a list of GPUs, expected COUNTxNAME-MEMORY such as 8xA100-80G.")
    name = match[2].upper() + (f"-{match[3]}G" if match[3] else "")
    keys = [key for key in MEMORY_GB if key == name or (not match[3] and key.startswith(f"{name}-"))]
    if len(keys) != 1:
        raise ConfigError(f"{text!r} names no known GPU.{suggestion(name, MEMORY_GB)} Known: {', '.join(MEMORY_GB)}.")
    peak, memory, bandwidth, own = MEMORY_GB[keys[0]]
    return Gpus(
        name=keys[0], count=int(match[1] or 1), memory=memory * 1e9, peak=DENSE_TFLOPS[peak] * 1e12,
        peak_fp32=FP32_TFLOPS[peak] * 1e12, has_bf16=peak not in WITHOUT_BF16, bandwidth=bandwidth * 1e9,
        memory_bandwidth=own * 1e9, network=1e9 * (FAST_NETWORK_GB if bandwidth >= FAST_LINK_GB else NETWORK_GB),
    )  # fmt: skip
