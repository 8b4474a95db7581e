# SPDX-License-Identifier: Apache-2.0
"""Under which identity a request's blocks live, and a rank's share: the same on every engine."""

from typing import Any

from kvlib.errors import ConfigError
from kvlib.keys import Namespace, digest
from kvlib.model_spec import model_id_text, origin_identity, spec_for_config
from kvlib.spec import DTYPES, KVSpec, LayerKind

__all__ = ["engine_spec", "rank_heads", "request_salt"]


def engine_spec(model: Any, name: object, model_id: str | None, connector: str) -> KVSpec:
    """What the numbers in an engine's pages mean: the same as in transformers' cache of that model.

    Args:
        model: the engine's `ModelConfig`; vLLM's and SGLang's name what is read here alike.
        name: where the engine took the model from.
        model_id: what the operator calls its weights, if anything.
        connector: for messages.

    Raises:
        ConfigError: the weights cannot be identified, or the model has other layers than full
            attention or MLA.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"the model computes in {dtype}; kvlib stores {', '.join(DTYPES)}")
    text = model.hf_text_config
    if model_id:
        identity = model_id_text(model_id)
    else:
        commit = getattr(model.hf_config, "_commit_hash", None)
        identity = origin_identity(str(name), commit, f"the model {name!r}")
    quantization = getattr(model, "quantization", None)
    if quantization and not getattr(text, "quantization_config", None):
        identity += f"#quantized:{quantization}"
    spec = spec_for_config(text, identity=identity, dtype=dtype)
    spec.require((LayerKind.FULL, LayerKind.MLA), connector)
    return spec


def request_salt(salt: str, cache_salt: str | None) -> str | bytes:
    """The salt of a request's keys.

    Args:
        salt: the store's.
        cache_salt: what a client sent with the request, to share nothing with others.

    Returns:
        The store's salt where the request has none of its own, so that such requests share their
        blocks with everything else that uses this salt; else one that no store's salt can be.
    """
    if not cache_salt:
        return salt
    return digest(Namespace.PREFIX, "request salt", salt, cache_salt)


def rank_heads(spec: KVSpec, rank: int, ranks: int) -> tuple[tuple[int, int] | None, bool]:
    """What a tensor-parallel rank holds of each token, and whether it is the one to store that.

    Engines deal the KV heads out in order. Where there are fewer heads than ranks (MLA has one),
    neighbours hold the same one: they share its records, and the first of them writes.

    Args:
        spec: of the whole model.
        rank: which one, from 0 on.
        ranks: tensor-parallel size.

    Returns:
        KV heads [first, last), None for all; whether this rank writes them.

    Raises:
        ConfigError: the heads cannot be dealt out.
    """
    heads = max(layer.num_kv_heads for layer in spec.layers)
    if heads % ranks and ranks % heads:
        raise ConfigError(
            f"{heads} KV heads cannot be dealt out to {ranks} tensor-parallel ranks: one number "
            "must divide the other"
        )
    first = rank * heads // ranks
    last = first + max(heads // ranks, 1)
    writes = heads >= ranks or rank % (ranks // heads) == 0
    return (None if last - first == heads else (first, last)), writes
