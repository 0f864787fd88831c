"""A server around a tiny model for tests that do not change it, and servers for single tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serve.serve_tools import Running, serving


@pytest.fixture(scope="session")
def assembly(language_folder: Path, vision_folder: Path) -> Any:
    import torch

    from mm_moslora.config import ModelConfig, VisionConfig
    from mm_moslora.models.assembly import load_parts

    built = load_parts(ModelConfig(language=str(language_folder), vision=VisionConfig(name=str(vision_folder))))
    built.model.requires_grad_(False).eval()
    # Fresh weights say the same to everybody. Larger ones and a head of its own make answers depend on every token.
    torch.manual_seed(3)
    for weight in [*built.model.get_decoder().layers.parameters(), built.model.get_input_embeddings().weight]:
        if weight.ndim == 2:
            weight.mul_(8)
    for weight in built.model.model.multi_modal_projector.parameters():
        weight.mul_(20)
    head = torch.randn_like(built.model.lm_head.weight)
    built.model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    return built


@pytest.fixture(scope="session")
def models(assembly: Any) -> Any:
    from mm_moslora.serve.served_models import Models, Variant

    projector = assembly.model.model.multi_modal_projector
    return Models(assembly, {"tiny": Variant(adapter=None, projector=projector, source="tiny")})


@pytest.fixture(scope="session")
def server(models: Any) -> Iterator[Running]:
    """One server with ordinary limits, for all tests that do not change it."""
    from mm_moslora.serve.continuous_batching import GenerationEngine
    from mm_moslora.serve.request_limits import Limits

    limits = Limits(context=512, max_tokens=64, default_tokens=8, drain_seconds=1)
    with serving(GenerationEngine(models, limits), limits) as running:
        yield running


@pytest.fixture
def serve_with(models: Any) -> Callable[..., Any]:
    """A server for one test: `with serve_with(queue=2, key="...") as running:`."""
    from mm_moslora.serve.continuous_batching import GenerationEngine
    from mm_moslora.serve.request_limits import Limits

    @contextmanager
    def start(engine: Any = None, key: str | None = None, local: bool = True, **limits: Any) -> Iterator[Running]:
        chosen = Limits(**{"context": 512, "max_tokens": 64, "default_tokens": 8, "drain_seconds": 5} | limits)
        with serving(engine or GenerationEngine(models, chosen), chosen, key=key, local=local) as running:
            yield running

    return start
