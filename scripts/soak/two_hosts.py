"""Two hosts on one machine: network namespaces with a virtual cable that can be cut. Needs root and iproute2.

Trains a tiny run on both through `scripts/train.sh --nnodes 2`, one rank each, cuts the cable in the middle, restores
it, restarts, and compares the losses, bit for bit, with an undisturbed run.

    sudo python scripts/soak/two_hosts.py
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from parts import hexed, make_parts, make_recipe, weights, write

ROOT = Path(__file__).resolve().parents[2]
ETC = Path("/etc/netns")
STEPS = 30


@dataclass(frozen=True)
class Host:
    """One end of the cable."""

    name: str
    """Name of the network namespace."""
    address: str
    interface: str

    def cable(self, state: str) -> None:
        """Cut (`down`) or restore (`up`) the cable at this end."""
        _ip("-n", self.name, "link", "set", self.interface, state)

    @property
    def namespace(self) -> str:
        """The file of the namespace."""
        return f"/var/run/netns/{self.name}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def impossible() -> str | None:
    """Why namespaces cannot be created here; None where they can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    name = f"mm-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"network namespaces cannot be made here ({done.stderr.strip()})"
    _ip("netns", "delete", name)
    return None


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two namespaces with a cable between them."""
    names = [f"mm-{side}-{os.getpid()}" for side in "ab"]
    links = [f"mmv{side}{os.getpid() % 100000}" for side in "ab"]
    hosts = [Host(name, f"10.77.0.{n + 1}", link) for n, (name, link) in enumerate(zip(names, links, strict=True))]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for host in hosts:
            _ip("link", "set", host.interface, "netns", host.name)
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.cable("up")
            # `ip netns exec` mounts this over /etc/hosts, since torchrun looks up its own host's name.
            (ETC / host.name).mkdir(parents=True)
            names_of = "".join(f"{other.address} {other.name}\n" for other in hosts)
            (ETC / host.name / "hosts").write_text(f"127.0.0.1 localhost\n{names_of}")
        yield hosts[0], hosts[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(ETC / name, ignore_errors=True)


def start(host: Host, first: Host, recipe: str, log: Path) -> subprocess.Popen[bytes]:
    """The command of one host."""
    environment = os.environ | {
        "NPROC": "1", "GLOO_SOCKET_IFNAME": host.interface, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = ["--nnodes", "2", "--rdzv", f"{first.address}:29400", "--local-addr", host.address]
    inside = f"hostname {host.name}; exec bash {ROOT / 'scripts' / 'train.sh'} {' '.join(words)} {recipe}"
    return subprocess.Popen(
        ["ip", "netns", "exec", host.name, "unshare", "--uts", "bash", "-c", inside],
        env=environment, cwd=ROOT, stdout=log.open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(root: Path) -> dict[str, object]:
    """Train, cut, restore, restart; returns the outcome."""
    parts = make_parts(root)
    changes = {"zero": "zero2", "steps": STEPS, "save_every": 1, "dropout": 0.1, "step_timeout_minutes": 0.3}
    cut, whole = (make_recipe(parts, root / name, **changes) for name in ("cut", "whole"))
    codes: dict[str, list[int]] = {}
    with two_hosts() as hosts:
        for name, recipe in (("cut", cut), ("mended", cut), ("whole", whole)):
            logs = [root / f"{name}-{host.interface}.log" for host in hosts]
            path = write(recipe)
            running = [start(host, hosts[0], path, log) for host, log in zip(hosts, logs, strict=True)]
            try:
                if name == "cut":
                    _wait_for_step(root / "cut", 3, running, logs)
                    hosts[1].cable("down")
                codes[name] = [process.wait(timeout=900) for process in running]
            finally:
                for process in running:
                    process.terminate()
            if name == "cut":
                output = "".join(log.read_text(errors="replace") for log in logs)
                named = [
                    line for line in output.splitlines() if "No progress for" in line or "cannot be reached" in line
                ]
                hosts[1].cable("up")
            elif any(codes[name]):
                raise SystemExit(f"{name}: exit codes {codes[name]}\n" + logs[0].read_text(errors="replace")[-3000:])
    steps_before = len(list((root / "cut").glob("checkpoint-*")))
    return {
        "codes": codes, "said": named[:2], "checkpoints": steps_before,
        "equal": hexed(root / "cut") == hexed(root / "whole")
        and weights(root / "cut", STEPS) == weights(root / "whole", STEPS),
    }  # fmt: skip


def _wait_for_step(folder: Path, step: int, running: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    deadline = time.monotonic() + 600
    while not list(folder.glob(f"checkpoint-{step:06d}")):
        if time.monotonic() > deadline or any(process.poll() is not None for process in running):
            output = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
            raise SystemExit(f"step {step} was not reached\n{output}")
        time.sleep(0.02)


def main() -> int:
    """Run and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    reason = impossible()
    if reason is not None:
        print(f"two_hosts: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces are deleted
    with tempfile.TemporaryDirectory() as scratch:
        result = run(Path(scratch))
    good = bool(result["equal"]) and all(result["codes"]["cut"])  # type: ignore[index]
    print("\n".join(f"{key}: {value}" for key, value in result.items()))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
