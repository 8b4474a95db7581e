# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers models, built from a config in milliseconds, and random blocks."""

from typing import TYPE_CHECKING, Any, cast

import torch

from kvlib.blocks import KVBlock
from kvlib.spec import KVSpec, LayerSpec, RopeSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["random_block", "tiny_model", "tiny_spec"]

_TINY: dict[str, int] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def tiny_model(
    config_class: str = "LlamaConfig", *, seed: int = 0, **changes: Any
) -> "PreTrainedModel":
    """A random decoder of a few thousand weights, in eval mode.

    Args:
        config_class: name of a transformers config class.
        seed: of the weights.
        **changes: fields of the config to set besides the tiny sizes (head_dim 8, 6 query and 2 KV
            heads).
    """
    import transformers

    settings = {**_TINY, "head_dim": 8, **changes}
    config = getattr(transformers, config_class)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.train(False)
    return cast("PreTrainedModel", model)


def tiny_spec(*, model_id: str = "test", dtype: str = "float32", layers: int = 2) -> KVSpec:
    """Spec of a model with 2 KV heads of 8 channels."""
    rope = RopeSpec(theta=1e4, rotary_dim=8)
    layer = LayerSpec(num_kv_heads=2, k_head_dim=8, v_head_dim=8, rope=rope)
    return KVSpec(model_id=model_id, layers=(layer,) * layers, dtype=dtype)


def random_block(spec: KVSpec, num_tokens: int, *, start: int = 0, seed: int = 0) -> KVBlock:
    """A dense block of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype)

    def draw(heads: int, width: int) -> torch.Tensor:
        return torch.randn((heads, num_tokens, width), generator=generator).to(dtype)

    pairs = [
        (draw(x.num_kv_heads, x.k_head_dim), draw(x.num_kv_heads, x.v_head_dim))
        for x in spec.layers
    ]
    return KVBlock.dense(spec, pairs, start=start)
