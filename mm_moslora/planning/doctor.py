"""`mm-moslora doctor`: finds problems of this machine before a run, each with a remedy.

No check starts a process group or builds anything. A library that does not import is a finding, not a failure.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from mm_moslora.config import Recipe, needs
from mm_moslora.kernels.fused_ops.liger_availability import LIGER_RANGE, fits, installed_liger
from mm_moslora.kernels.native import find_compiler
from mm_moslora.kernels.triton_availability import why_not_triton
from mm_moslora.utils.errors import MoSLoRAError
from mm_moslora.utils.hardware import available_memory, extensions_folder, stale_locks
from mm_moslora.utils.package_requirements import (
    declared,
    declared_anywhere,
    install_command,
    installed_version,
    range_of,
)

Status = Literal["ok", "warn", "bad"]

USES = {
    "deepspeed": "train.zero zero0 to zero3; one process trains with train.zero none",
    "datasets": "data of the hub, parquet and arrow files",
    "pyarrow": "data of the hub, parquet and arrow files",
    "open-clip-torch": "open_clip: vision towers",
    "timm": "timm's vision towers, and quickstart --images stamps",
    "matplotlib": "adapters inspect --picture",
    "wandb": "track.trackers: [wandb]",
    "tensorboard": "track.trackers: [tensorboard], the default",
    "gguf": "the quickstart, and export --to gguf",
    "onnx": "the quickstart",
    "zstandard": "the quickstart's stamps, where Debian's dpkg is not installed",
    "rich": "doctor, plan and eval show",
    "psutil": "launch on a host file",
}
"""Use of every dependency that an ordinary run does not need."""


ROOM_GIB = 10.0
"""Free disk below which a run may fail at its first checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The result of one check."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    """The remedy; empty when nothing is wrong."""


def diagnose(folder: Path | None = None, recipe: Recipe | None = None) -> list[Diagnosis]:
    """Check versions, hardware, compiler, caches, disk, threads and trackers.

    Args:
        folder: folder for runs; None: the current folder.
        recipe: the recipe to be trained; only packages that it needs count as needed. None: a missing package is bad
            only if every run needs it.
    """
    checks: list[Callable[[], list[Diagnosis]]] = [
        _python,
        partial(_libraries, recipe),
        _accelerator,
        partial(_engine, recipe),
        _precision,
        _kernels,
        _compiler,
        _extension_locks,
        partial(_disk, folder or Path.cwd()),
        _memory,
        _threads,
        _wandb,
    ]
    findings: list[Diagnosis] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # one broken library must not hide the other findings
            name = getattr(check, "func", check).__name__.strip("_")
            findings.append(
                Diagnosis(
                    name=name,
                    status="bad",
                    detail=f"the check failed: {type(error).__name__}: {error}",
                    remedy="Reinstall the library that the error names.",
                )
            )
    return findings


def check_version(package: str, version: str | None, *, use: str = "", needed: bool | None = None) -> Diagnosis:
    """Judge one library's version.

    Args:
        package: name of the distribution.
        version: None when it is not installed.
        use: its purpose; empty for a package that every run needs.
        needed: whether the recipe needs it; None: no recipe, so it is needed exactly if `use` is empty.
    """
    wanted = next((range_of(item) for item in declared_anywhere() if item.name == package), "")
    vital = needed if needed is not None else not use
    for_what = f" (for {use})" if use else ""
    remedy = install_command(package)
    if version is None:
        if needed is False:
            return Diagnosis(name=package, status="ok", detail=f"not installed; not needed here{for_what}")
        return Diagnosis(
            name=package, status="bad" if vital else "warn", detail=f"not installed{for_what}", remedy=remedy
        )
    try:
        parsed = Version(version)
    except InvalidVersion:
        return Diagnosis(name=package, status="warn", detail=f"{version}, which is not a version number", remedy=remedy)
    plain = Version(parsed.public)  # 2.13.0+cpu is 2.13.0
    supported = SpecifierSet(wanted, prereleases=True)
    if plain not in supported:
        # A floor excludes releases with wrong results or known vulnerabilities; what is newer is only not tested.
        old = any(part.operator == ">=" and not part.contains(plain, prereleases=True) for part in supported)
        what = "below the lowest supported release" if old else "outside the tested range"
        return Diagnosis(
            name=package, status="bad" if old and vital else "warn", detail=f"{version}, {what} ({wanted}){for_what}",
            remedy=remedy,
        )  # fmt: skip
    return Diagnosis(name=package, status="ok", detail=version)


def _python() -> list[Diagnosis]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return [Diagnosis(name="python", status="ok", detail=f"{version}, {sys.executable}")]


def _libraries(recipe: Recipe | None) -> list[Diagnosis]:
    """Every dependency, and the optional packages that the recipe needs."""
    wanted = {need.package: need.setting for need in needs(recipe)} if recipe is not None else {}
    names = [item.name for item in declared()]
    if not names:
        return [
            Diagnosis(
                name="packages", status="warn", detail="mm-moslora is not installed, so its ranges are unknown",
                remedy="pip install . in the checkout",
            )
        ]  # fmt: skip
    findings = []
    for package in [*names, *(name for name in wanted if name not in names)]:
        use, needed = USES.get(package, ""), None
        if recipe is not None:
            needed = package in wanted or package not in USES
            use = wanted.get(package, use)
        findings.append(check_version(package, installed_version(package), use=use, needed=needed))
    return findings


def _accelerator() -> list[Diagnosis]:
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
        built = torch.cuda.get_arch_list()
        too_old = sorted({device.name for device in devices if not _runs(built, (device.major, device.minor))})
        if too_old:
            return [
                Diagnosis(
                    name="accelerator", status="bad",
                    detail=f"{names}: torch {torch.__version__} holds no kernels for {', '.join(too_old)} (it has "
                    f"{', '.join(built)})",
                    remedy="Take other cards (CUDA_VISIBLE_DEVICES), or a torch build for these.",
                )
            ]  # fmt: skip
        return [mixed_cards([device.name for device in devices], names)]
    if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        built = torch.version.cuda or "no CUDA"
        return [
            Diagnosis(
                name="accelerator", status="warn",
                detail=f"an NVIDIA driver is installed, but torch finds no GPU (torch is built for {built})",
                remedy="Install a torch build for this driver, and look at CUDA_VISIBLE_DEVICES and nvidia-smi.",
            )
        ]  # fmt: skip
    return [Diagnosis(name="accelerator", status="ok", detail="none; the CPU is used")]


def _runs(built: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether kernels for these architectures (sm_90, compute_120) run on a card of this compute capability."""
    for name in built:
        kind, _, digits = name.partition("_")
        major, minor = divmod(int(re.sub(r"\D", "", digits) or 0), 10)
        binary = kind == "sm" and major == capability[0] and minor <= capability[1]
        if binary or (kind == "compute" and (major, minor) <= capability):
            return True
    return not built


def mixed_cards(names: Sequence[str], detail: str) -> Diagnosis:
    """The finding on the cards of one machine or of all ranks.

    Args:
        names: of the cards.
        detail: the text.
    """
    if len(set(names)) < 2:
        return Diagnosis(name="accelerator", status="ok", detail=detail)
    return Diagnosis(
        name="accelerator", status="warn", detail=f"different cards: {detail}",
        remedy="Every step waits for the slowest card, and a micro-batch must fit the smallest. Choose equal cards "
        "(CUDA_VISIBLE_DEVICES, or a SLURM constraint).",
    )  # fmt: skip


def _engine(recipe: Recipe | None) -> list[Diagnosis]:
    """Whether DeepSpeed, PEFT and the other libraries here take the recipe's settings."""
    if recipe is None:
        return []
    from mm_moslora.training.preflight import check_libraries
    from mm_moslora.utils import distributed

    try:
        check_libraries(recipe.for_ranks(distributed.world_size()), fresh=False)
    except MoSLoRAError as error:
        return [
            Diagnosis(name="settings", status="bad", detail=str(error), remedy="Change the recipe, or the machine.")
        ]
    return [Diagnosis(name="settings", status="ok", detail="the libraries here take the recipe's settings")]


def _precision() -> list[Diagnosis]:
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        detail = "the GPU supports bf16" if fast else "the GPU does not support bf16; precision auto is fp32"
        return [Diagnosis(name="bf16", status="ok" if fast else "warn", detail=detail)]
    text = _read(Path("/proc/cpuinfo"))
    fast_flags = [flag for flag in ("amx_bf16", "avx512_bf16") if re.search(rf"\b{flag}\b", text)]
    if fast_flags:
        return [Diagnosis(name="bf16", status="ok", detail=f"this CPU multiplies bf16 fast ({', '.join(fast_flags)})")]
    none = "this CPU has neither amx_bf16 nor avx512_bf16: precision auto is fp32, and bf16 would be slower"
    return [Diagnosis(name="bf16", status="ok", detail=none)]


def _kernels() -> list[Diagnosis]:
    from mm_moslora.models.precision import dtype_of, resolve_precision

    torch = importlib.import_module("torch")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    reason = why_not_triton(device, dtype_of(resolve_precision("auto")))
    if reason is None:
        detail = "Triton's run between the matrix products of lean decoder layers, and for adapter dropout"
    elif not on_gpu and (compiler := find_compiler()) is not None:
        detail = f"attention runs on a C++ kernel (compiled by {compiler} at the first run): {reason}"
    else:
        detail = f"PyTorch's own run between the matrix products of lean decoder layers: {reason}"
    liger = installed_liger()
    if liger is not None and not fits(liger):
        detail += f"; model.kernels liger needs liger-kernel{LIGER_RANGE}, and {liger} is installed"
    return [Diagnosis(name="kernels", status="warn" if on_gpu and reason is not None else "ok", detail=detail)]


def _compiler() -> list[Diagnosis]:
    compiler = find_compiler()
    ninja = shutil.which("ninja") or (importlib.util.find_spec("ninja") and "ninja")
    present = [name for name, path in (("a C++ compiler", compiler), ("ninja", ninja)) if path]
    detail = f"{' and '.join(present) or 'neither compiler nor ninja'} here; none is needed (AdamW is torch's own)"
    return [Diagnosis(name="compiler", status="ok", detail=detail)]


def _extension_locks() -> list[Diagnosis]:
    root = extensions_folder(os.environ)
    locks = stale_locks(root) if root.is_dir() else []
    if not locks:
        return [Diagnosis(name="build locks", status="ok", detail=f"no stale lock below {root}")]
    return [
        Diagnosis(
            name="build locks",
            status="warn",
            detail=f"a killed build left {', '.join(str(path) for path in locks)}",
            remedy=f"If nothing is being built now: rm {' '.join(str(path) for path in locks)}",
        )
    ]


def _disk(folder: Path) -> list[Diagnosis]:
    findings = []
    for name, path in (
        ("disk for runs", folder),
        ("disk for temporary files", Path(tempfile.gettempdir())),
    ):
        while not path.exists() and path != path.parent:
            path = path.parent
        free = shutil.disk_usage(path).free / 2**30
        enough = free >= (ROOM_GIB if name == "disk for runs" else 1.0)
        findings.append(
            Diagnosis(
                name=name,
                status="ok" if enough else "warn",
                detail=f"{free:.1f} GiB free at {path.resolve()}",
                remedy="" if enough else "Free some space, or set train.output (TMPDIR) to a larger disk.",
            )
        )
    return findings


def _memory() -> list[Diagnosis]:
    available = available_memory() / 2**30
    if not available:
        return [Diagnosis(name="memory", status="ok", detail="unknown on this system")]
    enough = available >= 6
    return [
        Diagnosis(
            name="memory",
            status="ok" if enough else "warn",
            detail=f"{available:.1f} GiB available",
            remedy="" if enough else "The quickstart needs 6 GiB; close other programs or use --smoke.",
        )
    ]


def _threads() -> list[Diagnosis]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    detail = f"{cores} cores, OMP_NUM_THREADS {threads or 'not set'}, OMP_WAIT_POLICY {policy or 'not set'}"
    remedies = []
    if threads and threads.isdigit() and int(threads) > cores:
        remedies.append(f"export OMP_NUM_THREADS={cores}")
    if policy.lower() != "passive":
        remedies.append("export OMP_WAIT_POLICY=passive  # waiting threads then leave the cores to others")
    return [
        Diagnosis(name="threads", status="warn" if remedies else "ok", detail=detail, remedy="\n".join(remedies)),
    ]


def _wandb() -> list[Diagnosis]:
    from mm_moslora.tracking.wandb_tracker import has_credentials

    mode = os.environ.get("WANDB_MODE")
    if mode:
        return [Diagnosis(name="wandb login", status="ok", detail=f"WANDB_MODE is {mode}")]
    if has_credentials():
        return [
            Diagnosis(name="wandb login", status="ok", detail="a key is present: runs that ask for wandb go online")
        ]
    return [Diagnosis(name="wandb login", status="ok", detail="no key: runs that ask for wandb are kept offline")]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
