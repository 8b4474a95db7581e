# SPDX-License-Identifier: Apache-2.0
"""Which vLLM, and which configurations of it, `KvlibConnector` serves.

Imports vLLM only when called.
"""

from typing import Any

from kvlib.codecs import build_codec
from kvlib.connectors.config import ConnectorConfig
from kvlib.connectors.guard import Versions
from kvlib.connectors.identity import engine_spec, rank_heads
from kvlib.errors import ConfigError
from kvlib.spec import KVSpec
from kvlib.store.heads import check_model

__all__ = ["VERSIONS", "check_config", "check_version", "spec_of"]

VERSIONS = Versions("vLLM", (0, 32), (0, 33))
"""vLLM from the first, up to but not including the second."""


def check_version() -> None:
    """Refuse another vLLM than was tested.

    Raises:
        EngineVersionError: naming both.
    """
    import vllm

    VERSIONS.check(vllm.__version__)


def check_config(vllm_config: Any, kv_cache_config: Any, config: ConnectorConfig) -> None:
    """Refuse what this connector does not serve.

    Raises:
        ConfigError: saying what was seen and what to do.
    """
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    if transfer.kv_load_failure_policy != "recompute":
        raise ConfigError(
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}: with it a failed load "
            'would end a request. Add "kv_load_failure_policy": "recompute" to '
            "--kv-transfer-config"
        )
    tier = "use KvlibTier under vLLM's OffloadingConnector, see docs/vllm.md"
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise ConfigError(f"{name}={size} is not served by KvlibConnector: {tier}")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ConfigError(
            f"this model has {len(groups)} groups of cache layers (a hybrid model); "
            f"KvlibConnector serves one: {tier}"
        )
    cache = vllm_config.cache_config.cache_dtype
    if cache not in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch.")):
        raise ConfigError(
            f"kv_cache_dtype={cache!r}: the scales of quantized caches do not travel with blocks. "
            f"Use kv_cache_dtype=auto and let kvlib's codec make blocks small, or {tier}"
        )
    ranks = parallel.tensor_parallel_size
    if ranks > 1:
        spec = spec_of(vllm_config, config)
        check_model(spec, [build_codec(config.codec)], rank_heads(spec, 0, ranks)[0])


def spec_of(vllm_config: Any, config: ConnectorConfig) -> KVSpec:
    """What the numbers in vLLM's pages mean: the same as in transformers' cache of that model.

    Raises:
        ConfigError: the weights cannot be identified, or the model has other layers than full
            attention or MLA.
    """
    model = vllm_config.model_config
    return engine_spec(model, model.model, config.model_id, "KvlibConnector")
