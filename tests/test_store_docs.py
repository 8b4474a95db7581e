# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/store.md and docs/tiered.md work as written."""

import re
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import kvlib
from kvlib.store.memory import MemoryTier
from kvlib.testing.models import random_block, tiny_spec

DOCS = Path(__file__).parent.parent / "docs"


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)


def test_the_store(tmp_path):
    opening, loading, tier, *_ = blocks("store.md")
    place = {"kvlib": kvlib, "time": time, "MemoryTier": MemoryTier, "spec": tiny_spec()}
    exec(opening.replace("~/kv", str(tmp_path)), place)
    store, spec = place["store"], place["spec"]
    keys = place["keys"] = store.block_keys(spec, list(range(640)))
    store.put(spec, keys, random_block(spec, 640))
    exec(loading, place)
    assert place["blocks"] == place["loaded"].num_blocks == 10
    assert place["keys_"].shape[1] == 640
    store.close()
    exec(tier, place)


def test_decoding_out_of_it(tmp_path, text_model_folder):
    (code,) = blocks("tiered.md")
    model = AutoModelForCausalLM.from_pretrained(text_model_folder)
    ids = torch.arange(3, 403)[None] % model.config.vocab_size
    place = {"kvlib": kvlib, "model": model, "input_ids": ids}
    exec(code.replace("~/kv", str(tmp_path)), place)
    assert place["output"].shape == (1, 464)
