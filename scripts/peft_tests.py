#!/usr/bin/env python3
"""Run PEFT's own LoRA tests with `MoSLoRAConfig` in the place of `LoraConfig`: passed, refused, failed.

    pip download --no-deps --no-binary peft "peft==$(python -c 'import peft; print(peft.__version__)')"
    tar xf peft-*.tar.gz && python scripts/peft_tests.py peft-*/

`refused` are tests that end with an `AdapterError` whose message matches one of `DOCUMENTED`, which docs/adapters.md
lists. With another message the test fails. Nothing is downloaded: tests that want a model of the hub are
skipped. What follows the folder goes to pytest: `-k conv2d`, `tests/test_config.py`.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

OFFLINE = re.compile("offline|couldn't connect|LocalEntryNotFound", re.IGNORECASE)
DOCUMENTED = (
    r"\S+ cannot carry MoSLoRA: it is (torch\.nn\.modules\.(conv\.Conv[13]d|rnn\.LSTM)|tests\.\S+\.MyModule),",
    r"\S+ cannot carry MoSLoRA: it has \d+ groups,",
    r"(target_parameters|use_bdlora|(velora|kasa|monteclora)_config) is set, and adapters with it are more than A",
    r"init_lora_weights is 'mica', which gives the product B A a meaning",
    r"Adapter '\w+' has mixers, and PEFT would add up A and B alone",
    r"adapter_model\.bin is a pickle: stock PEFT would load it and drop the mixers",
    r"The adapter: \S+ holds NaN or infinity; it is broken",
    r"These values are not those of adapter '\w+': \S+ is \[\d+, \d+\] there and",
)
"""Beginnings of the messages of refusals that tests of PEFT meet; docs/adapters.md lists each."""


class Exchange:
    """A plugin of pytest: tests of LoRA alone, and what they end with."""

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out the tests of other adapters."""
        chosen = [item for item in items if _of_lora(item)]
        config.hook.pytest_deselected(items=[item for item in items if not _of_lora(item)])
        items[:] = chosen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Any:
        """Count refusals, and skip what would have to be downloaded."""
        from mm_moslora.utils.errors import AdapterError

        try:
            return (yield)
        except AdapterError as error:
            message = re.sub(r"/\S*/", "", str(error))
            if not any(re.match(pattern, message) for pattern in DOCUMENTED):
                raise
            self.refused[message] += 1
            pytest.skip(f"refused: {error}")
        except OSError as error:
            if OFFLINE.search(f"{type(error).__name__} {error}"):
                pytest.skip("needs a model of the hub")
            raise

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say what was refused, and how often."""
        terminalreporter.section(f"{self.refused.total()} refused")
        for message, count in self.refused.most_common():
            terminalreporter.line(f"{count:4d}  {message}")


def _of_lora(item: Any) -> bool:
    from peft.config import PeftConfigMixin

    from mm_moslora.adapters import MoSLoRAConfig

    callspec = getattr(item, "callspec", None)
    values = list(callspec.params.values()) if callspec else []
    kinds = {value if inspect.isclass(value) else type(value) for value in values}
    configurations = {kind for kind in kinds if issubclass(kind, PeftConfigMixin)}
    if configurations:
        return configurations == {MoSLoRAConfig}
    return re.search(r"\bLoraConfig\(", inspect.getsource(item.function)) is not None


def main(arguments: list[str]) -> int:
    """Exchange the configuration in PEFT's namespace, then run the tests of its folder."""
    if not arguments or not (Path(arguments[0]) / "tests" / "testing_common.py").is_file():
        print(__doc__)
        return 2
    os.environ["HF_HUB_OFFLINE"] = "1"
    import peft

    from mm_moslora.adapters import MoSLoRAConfig

    peft.LoraConfig = MoSLoRAConfig  # type: ignore[misc]
    os.chdir(arguments[0])
    tests = arguments[1:]
    if not any(word.startswith("tests/") for word in tests):
        tests.append("tests/test_custom_models.py")
    options = ["-c", os.devnull, "--rootdir=.", "--import-mode=importlib", "-q", "-p", "no:cacheprovider"]
    return int(pytest.main([*options, *tests], plugins=[Exchange()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
