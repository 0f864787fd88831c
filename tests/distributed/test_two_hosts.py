"""Two hosts, as network namespaces with a cable: training and resuming across them, and one cut off in the middle.

Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from trials import hexed, make_recipe, weights, write
from waiting import wait_until

pytestmark = pytest.mark.slow
ETC = Path("/etc/netns")


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


def test_training_survives_a_host_that_is_cut_off(parts, ranks, tmp_path):
    reason = impossible()
    if reason:
        pytest.skip(reason)
    steps = 24
    recipe = make_recipe(
        parts, tmp_path / "run", "zero2", steps=steps, save_every=1, dropout=0.1, step_timeout_minutes=0.1,
        timeout_minutes=0.3,  # the cut may come while one waits for the other's disk
    )  # fmt: skip
    straight = make_recipe(parts, tmp_path / "straight", "zero2", steps=steps, dropout=0.1)
    run = tmp_path / "run"
    with two_hosts() as hosts:
        group = ranks.start([write(recipe)], hosts=list(hosts))
        wait_until((run / "checkpoint-000002").exists, lambda: group.outputs)
        hosts[1].cable("down")
        ranks.finish(group)
        assert all(code > 0 for code in group.codes), (group.codes, group.outputs)  # and none crashed
        said = group.output(0)
        assert "suspect the network between their hosts" in said or "cannot be reached" in said, group.outputs
        assert not (run / f"checkpoint-{steps:06d}").exists()
        hosts[1].cable("up")
        again = ranks.finish(ranks.start([write(recipe)], hosts=list(hosts)))
        assert again.codes == [0, 0], again.outputs
    ranks.run([write(straight)])
    assert hexed(run) == hexed(tmp_path / "straight")
    assert weights(run, steps) == weights(tmp_path / "straight", steps)
