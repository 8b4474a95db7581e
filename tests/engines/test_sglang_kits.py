# SPDX-License-Identifier: Apache-2.0
"""The test kits of SGLang's own wheel, against a server with `KvlibLinker`.

Their sizes are cut to what a CPU does in a minute; what they check is as it was. docs/sglang.md
lists which kits run here and which do not, and why.
"""

import os
import random
import socket
import subprocess
import sys
import time
import unittest

import pytest
import requests
from sglang.test.kits import radix_cache_server_kit, unified_radix_cache_kit
from sglang.test.kits.unified_radix_cache_kit import AccuracyTwoPassMixin, UnifiedRadixTreeTestMixin

LINKER = (
    '{"linker": "KvlibLinker", "linker_module_path": "kvlib.connectors.sglang",'
    ' "linker_extra_config": {"path": "%s", "memory": 0, "disk": "2GiB", "deadline": 60}}'
)


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "--model-path": model_folder, "--device": "cpu", "--attention-backend": "torch_native",
        "--sampling-backend": "pytorch", "--dtype": "float32", "--max-total-tokens": "16384",
        "--page-size": "64", "--host": "127.0.0.1", "--port": port, "--log-level": "warning",
        "--unified-cache-external-linker-backend": "dynamic",
        "--unified-cache-external-linker-config": LINKER % (folder / "store"),
    }  # fmt: skip
    flags = ["--disable-overlap-schedule", "--disable-cuda-graph", "--skip-server-warmup",
             "--enable-unified-cache-external-linker"]  # fmt: skip
    command = [sys.executable, "-m", "sglang.launch_server", *flags]
    for name, value in options.items():
        command += [name, str(value)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=dict(os.environ), stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(url, process, folder / "log")
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _wait(url, process, log):
    until = time.monotonic() + 600
    while time.monotonic() < until and process.poll() is None:
        try:
            if requests.get(url + "/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(1)
    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")


def test_a_whole_prefix_hit_after_a_flush(server):
    """`AccuracyTwoPassMixin.test_l3_prefetch_full_prefix_hit_after_flush`."""

    class Kit(AccuracyTwoPassMixin, unittest.TestCase):
        base_url = server

    Kit().test_l3_prefetch_full_prefix_hit_after_flush()


def test_log_probabilities_over_turns(server, model_folder, monkeypatch):
    """`UnifiedRadixTreeTestMixin.test_multiturn_logprobs_match`: the same with hits and without."""
    suffixes = unified_radix_cache_kit._random_suffixes
    monkeypatch.setattr(
        unified_radix_cache_kit,
        "_random_suffixes",
        lambda n, size, **k: suffixes(n, size // 4, **k),
    )

    class Kit(UnifiedRadixTreeTestMixin, unittest.TestCase):
        base_url = server
        model = str(model_folder)
        max_new_tokens = 16

    kit = Kit()
    kit.input_ids = [random.Random(i).choices(range(300, 30000), k=160) for i in range(4)]
    kit.test_multiturn_logprobs_match()


def test_a_tree_of_prompts(server, monkeypatch):
    """`run_radix_attention_test`."""
    nodes = radix_cache_server_kit.gen_radix_tree
    random.seed(5)
    small = [
        {"input_ids": node["input_ids"][:200], "decode_len": 1 + node["decode_len"] // 8}
        for node in nodes(num_nodes=24, chunk_len=64)
    ]
    monkeypatch.setattr(radix_cache_server_kit, "gen_radix_tree", lambda: small)
    radix_cache_server_kit.run_radix_attention_test(server)
