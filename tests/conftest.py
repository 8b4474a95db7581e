# SPDX-License-Identifier: Apache-2.0
import os
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Set before torch is imported, and inherited by children: the threads of busy processes stall each
# other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

IN_CI = os.environ.get("CI") == "true"

# A busy machine must not turn a slow example into a failure.
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "long", settings.get_profile("default"), derandomize=False, max_examples=2000
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


HARDWARE = ("gpu", "avx512")
"""Markers of tests that are skipped where the machine lacks what they are about."""


class SkipsFail:
    """In CI, a skipped test fails the run, unless the hardware it is about is not there."""

    def __init__(self):
        self.skips = []

    def pytest_collectreport(self, report):
        self.pytest_runtest_logreport(report)

    def pytest_runtest_logreport(self, report):
        # Keywords, since tests may run in other processes, whose items are not here.
        keywords = getattr(report, "keywords", {})
        expected = hasattr(report, "wasxfail") or any(name in keywords for name in HARDWARE)
        if report.skipped and not expected:
            where = report.longrepr
            reason = where[2] if isinstance(where, tuple) else str(where)
            self.skips.append(f"{report.nodeid}: {reason}")

    def pytest_sessionfinish(self, session):
        if self.skips and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.skips:
            terminalreporter.section(
                f"CI: skipped without a marker of {HARDWARE}, so the run fails", red=True
            )
            for line in self.skips:
                terminalreporter.line(line)


def pytest_addoption(parser):
    parser.addoption(
        "--regen-golden", action="store_true", help="write the golden files instead of checking"
    )


def pytest_configure(config):
    if IN_CI:
        if config.getoption("--regen-golden"):
            raise pytest.UsageError("--regen-golden is for a developer's machine, not for CI")
        config.pluginmanager.register(SkipsFail(), "kvlib-skips-fail")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    marked = [item for item in items if item.get_closest_marker("avx512")]
    if marked:
        from kvlib.codecs.rans_vector import SUPPORTED

        if not SUPPORTED:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no AVX-512"))


def pytest_collection_finish():
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if os.environ.get("KVLIB_EXPECT_INSTALLED") == "1":
        import kvlib

        site = Path(sysconfig.get_path("purelib")).resolve()
        if not Path(kvlib.__file__).resolve().is_relative_to(site):
            raise pytest.UsageError(f"expected kvlib in {site}, the tests import {kvlib.__file__}")


@pytest.fixture
def regen_golden(request) -> bool:
    """Whether to write golden files instead of checking them."""
    return request.config.getoption("--regen-golden")


@pytest.fixture(scope="session")
def text_model_folder(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer whose tokens are bytes: all of a model but the real weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from kvlib.testing.models import tiny_model

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tiny_model(vocab_size=256, eos_token_id=None, bos_token_id=None).save_pretrained(folder)
    return folder
