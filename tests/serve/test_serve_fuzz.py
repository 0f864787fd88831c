"""The soak of scripts/soak/fuzz_server.py, shortened."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from mm_moslora.serve.api.api_routes import create_app
from mm_moslora.serve.api.request_limits import Limits
from mm_moslora.serve.inference.continuous_batching import GenerationEngine

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak" / "fuzz_server.py"


@pytest.fixture(scope="module")
def soak() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz_server", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_server"] = module
    spec.loader.exec_module(module)
    return module


def test_a_thousand_broken_requests_get_no_5xx_and_no_text_of_a_library(soak: Any, models: Any) -> None:
    engine = GenerationEngine(models, Limits(context=512, max_tokens=8, image_pixels=4_000_000, body_bytes=2**20))

    async def run() -> dict[str, Any]:
        app = create_app(engine, engine.limits)
        return await soak.fuzz(app, bodies=1000, seed=11, every=0)

    engine.start()
    try:
        result = asyncio.run(run())
    finally:
        engine.stop()
    assert result["first_faults"] == []
    assert sum(result["statuses"].values()) == 1000
    assert result["statuses"]["200"] > 50  # some stay valid, and the model is asked
    assert len(result["codes"]) > 8


@pytest.mark.parametrize(
    ("status", "reply", "fault"),
    [
        (500, b"{}", "status 500"), (400, b"plain", "no error object"),
        (400, b'{"error": {"message": "at 0x7f1234", "type": "t", "param": null, "code": "c"}}', "text of a library"),
        (400, b'{"error": {"message": "m", "type": "t", "code": "c"}}', "odd error object"),
        (400, b'{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}', None), (200, b"", None),
    ],
)  # fmt: skip
def test_the_soak_reports_faults(soak: Any, status: int, reply: bytes, fault: str | None) -> None:
    assert soak.fault_of(status, "POST", reply) == fault
