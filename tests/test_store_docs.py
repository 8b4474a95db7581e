# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/store.md and docs/tiered.md work as written."""

import re
import subprocess
import sys
from pathlib import Path

import torch

DOCS = Path(__file__).parent.parent / "docs"
STORE = """
from kvlib.testing.models import random_block, tiny_spec
spec = tiny_spec()
keys = store.block_keys(spec, list(range(640)))
store.put(spec, keys, random_block(spec, 640))
"""
MODEL = """
import torch
import kvlib
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
input_ids = torch.arange(3, 403)[None] % model.config.vocab_size
"""


def blocks(name: str) -> list[str]:
    text = (DOCS / name).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run(*code: str, folder: Path) -> list[str]:
    text = "\n".join(code).replace("~/kv", str(folder))
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_store(tmp_path):
    opening, loading, abstracts, device, policies, *_ = blocks("store.md")
    seen = "print(blocks, loaded.num_blocks, keys_.shape[1])"
    told = "print(found.num_tokens)\nstore.close()"
    code = ("import time\nimport kvlib", opening, STORE, loading, seen, abstracts, told, policies)
    assert run(*code, folder=tmp_path) == ["10", "10", "640", "640"]
    here = "cuda:0" if torch.cuda.is_available() else "cpu"
    records = "4"  # of the 10 blocks: two chunks of four, and two by themselves
    filled = f"store = kvlib.KVStore('~/kv')\n{STORE}store.close()\ntoken_ids = range(640)"
    code = ("import torch\nimport kvlib", filled, device)
    assert run(*code, folder=tmp_path) == [here, records]


def test_decoding_out_of_it(tmp_path, text_model_folder):
    (code,) = blocks("tiered.md")
    model = MODEL.format(folder=str(text_model_folder))
    lines = run(model, code, "print('tokens', output.shape[1])", folder=tmp_path)
    assert lines[-2:] == ["tokens", "464"]
