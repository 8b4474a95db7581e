# SPDX-License-Identifier: Apache-2.0
"""Tests inside real engines: each runs in its engine's own environment.

``KVLIB_ENGINE=vllm`` collects test_vllm*.py, ``KVLIB_ENGINE=sglang`` test_sglang*.py; otherwise
nothing here is collected, since the default environment holds no engine.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENGINE = os.environ.get("KVLIB_ENGINE", "")
FOLDER_VARIABLE = "KVLIB_ENGINE_MODEL"

collect_ignore_glob = [
    pattern for engine, pattern in (("vllm", "test_vllm*"), ("sglang", "test_sglang*"))
    if engine != ENGINE
]  # fmt: skip


def pytest_configure(config):
    """Engines warn a lot, also when they are imported."""
    if ENGINE:
        config.addinivalue_line("filterwarnings", "ignore")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if ENGINE == "sglang":
        _bridge(HERE / "sglang_site")


def _bridge(site: Path) -> None:
    """Let SGLang be imported on a CPU, here and in the processes that it starts."""
    # The checkout, unless it is the installed package that is tested.
    checkout = "" if os.environ.get("KVLIB_EXPECT_INSTALLED") else str(HERE.parents[1])
    paths = [str(site), checkout, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if not any(type(x).__name__ == "_BeforeTorchvision" for x in sys.meta_path):
        file = site / "sitecustomize.py"
        spec = importlib.util.spec_from_file_location("kvlib_sglang_site", file)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """One folder of SmolLM2-135M-Instruct for all engines: the one named, or the newest cached."""
    from kvlib.model_spec import CACHE_FOLDER
    from kvlib.smollm2 import smollm2_folder

    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    cached = sorted((CACHE_FOLDER.expanduser() / "models").glob("smollm2-135m-instruct-*"))
    return cached[-1] if cached else smollm2_folder()
