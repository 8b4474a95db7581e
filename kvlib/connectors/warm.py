# SPDX-License-Identifier: Apache-2.0
"""What is slow the first time is done before the first request."""

import logging
import time

import torch

from kvlib.blocks import KVBlock
from kvlib.keys import BLOCK_TOKENS, block_keys
from kvlib.spec import KVSpec
from kvlib.store.heads import local_spec
from kvlib.store.records import BLOCKS_PER_RECORD, allocate
from kvlib.store.store import KVStore

__all__ = ["warm_up"]

_LOG = logging.getLogger(__name__)
_SLOW_S = 3.0


def warm_up(store: KVStore, spec: KVSpec) -> None:
    """Encode and decode one record with a store's codecs, in memory, and forget it.

    The first time a codec runs in an environment its kernels are compiled (and kept beside the
    package, where that can be written to): longer than a request should wait for its prefix.

    Args:
        store: whose codecs they are; nothing is put there.
        spec: what the numbers mean; of the whole model, whichever heads the store keeps.
    """
    begun = time.monotonic()
    tokens = BLOCKS_PER_RECORD * BLOCK_TOKENS
    local = local_spec(spec, store.head_range)
    layers = allocate(local, tokens)
    generator = torch.Generator().manual_seed(0)
    for keys, values in layers:
        keys.copy_(torch.randn(keys.shape, generator=generator))
        values.copy_(torch.randn(values.shape, generator=generator))
    names = block_keys(spec.fingerprint(), range(tokens))
    block = KVBlock.dense(spec, layers)
    room = 4 * tokens * local.bytes_per_token() + (1 << 20)
    same = store.memory_codec is store.codec
    for codec in (store.codec,) if same else (store.codec, store.memory_codec):
        with KVStore(
            None, memory=room, codec=codec, threads=1, head_range=store.head_range
        ) as trial:
            trial.put(spec, names, block)
            trial.load(spec, names)
    taken = time.monotonic() - begun
    if taken > _SLOW_S:
        _LOG.info("kvlib: compiled the codec %s in %.0f s", store.codec_text, taken)
