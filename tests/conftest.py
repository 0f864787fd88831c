"""Fixtures for all tests: hub switched off, one thread, tiny models."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import gc
import logging
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if (
    "PYTEST_XDIST_WORKER" not in os.environ
):  # workers and processes of the tests have it from here; it goes with this one
    PREPARED = tempfile.TemporaryDirectory(prefix="prepared-")
    os.environ["HF_DATASETS_CACHE"] = PREPARED.name

import pytest
from preloaded import Preloaded
from tiny import make_language, make_records, make_vision

if TYPE_CHECKING:
    from mm_moslora.config import Recipe

with contextlib.suppress(ModuleNotFoundError):  # a GPU machine may lack it
    import hypothesis

    # Tests share the machine: an example may take any time.
    hypothesis.settings.register_profile(
        "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("suite")
gc.disable()  # until the tests are imported: what is imported stays

LONGEST = (
    "distributed", "launch/test_child_processes.py", "preferences", "planning/test_recipes.py", "diffusion",
    "docs/test_docs.py", "scripts/test_soak.py", "packaging/test_wheel.py", "compare", "training", "eval/report",
    "models/memory_efficient", "models", "serve", "eval", "reporting", "scripts", "planning", "adapters",
)  # fmt: skip
"""Folders and files of tests that begin first, by the time of their longest file, so that the workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: index for index, name in reversed([*enumerate(LONGEST)])}
    root = Path(__file__).parent

    def begins(item: pytest.Item) -> int:
        path = item.path.relative_to(root) if item.path.is_relative_to(root) else item.path
        return min((order[name] for part in (path, *path.parents) if (name := part.as_posix()) in order), default=99)

    items.sort(key=begins)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    """With REQUIRE_TOOLS, a test that is skipped for want of a Debian package fails."""
    report = yield
    if report.skipped and os.environ.get("REQUIRE_TOOLS") and "apt-get install" in str(report.longrepr):
        report.outcome = "failed"
    return report


def pytest_collection_finish() -> None:
    """Leave the half a million objects that the tests import out of every search for garbage, and search less often."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`: a file is one worker's, and so are all files with tests that start groups of ranks.

    Files with jobs and hosts that mostly wait are left to the other workers.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            waits = file.endswith(("test_slurm.py", "test_two_hosts.py", "test_compare_on_clusters.py"))
            return "distributed" if "distributed/" in file and not waits else file

    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """What the command line sets up in a test ends with it: its stream is closed by then."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


_SHARED = pytest.StashKey[Preloaded]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Workers share the process that has imported everything."""
    config = node.config
    if _SHARED not in config.stash:
        folder = tempfile.TemporaryDirectory(prefix="preloaded-")
        config.add_cleanup(folder.cleanup)
        config.stash[_SHARED] = Preloaded(Path(folder.name)).__enter__()
        config.add_cleanup(config.stash[_SHARED].__exit__)
    node.workerinput["preloaded"] = str(config.stash[_SHARED].folder)


@pytest.fixture(scope="session")
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preloaded]:
    """Pythons that have imported everything: `python.ours` and `python.stock`."""
    shared = getattr(request.config, "workerinput", {}).get("preloaded")
    if shared:
        yield Preloaded(Path(shared))
        return
    with Preloaded(tmp_path_factory.mktemp("python")) as started:
        yield started


@pytest.fixture(scope="module")
def start_at_once(python: Preloaded) -> Iterator[None]:
    """Processes that the product, or a test, starts by `sys.executable` have imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(python.ours))
        yield


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model."""
    return make_language(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2."""
    return make_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training records with pictures; the images lie in `images` beside the file."""
    return make_records(tmp_path_factory.mktemp("records"))


@pytest.fixture
def recipe(language_folder: Path, vision_folder: Path, records: Path, tmp_path: Path) -> Recipe:
    """A tiny recipe for the tests of one process."""
    from trials import make_recipe

    made = make_recipe(
        {"language": language_folder, "vision": vision_folder, "records": records}, tmp_path / "run", "none",
        dropout=0.1, steps=6, micro_batch=4, rehearsal=True,
    )  # fmt: skip
    return replace(made, name="tiny", optim=replace(made.optim, lr=2e-3, projector_lr=1e-2))
