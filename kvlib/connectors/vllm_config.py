# SPDX-License-Identifier: Apache-2.0
"""Which vLLM, and which configurations of it, `KvlibConnector` serves.

Imports vLLM only when called.
"""

from typing import Any

from kvlib.codecs import build_codec
from kvlib.connectors.config import ConnectorConfig
from kvlib.connectors.guard import Versions
from kvlib.connectors.identity import rank_heads
from kvlib.errors import ConfigError
from kvlib.model_spec import model_id_text, origin_identity, spec_for_config
from kvlib.spec import DTYPES, KVSpec, LayerKind
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
    if cache not in ("auto", _dtype(vllm_config)):
        raise ConfigError(
            f"kv_cache_dtype={cache!r}: the scales of quantized caches do not travel with blocks. "
            f"Use kv_cache_dtype=auto and let kvlib's codec make blocks small, or {tier}"
        )
    ranks = parallel.tensor_parallel_size
    if ranks > 1:
        spec = spec_of(vllm_config, config)
        check_model(spec, [build_codec(config.codec)], rank_heads(spec, 0, ranks)[0])


def _dtype(vllm_config: Any) -> str:
    return str(vllm_config.model_config.dtype).removeprefix("torch.")


def spec_of(vllm_config: Any, config: ConnectorConfig) -> KVSpec:
    """What the numbers in vLLM's pages mean: the same as in transformers' cache of that model.

    Raises:
        ConfigError: the weights cannot be identified, or the model has other layers than full
            attention or MLA.
    """
    model = vllm_config.model_config
    dtype = _dtype(vllm_config)
    if dtype not in DTYPES:
        raise ConfigError(f"the model computes in {dtype}; kvlib stores {', '.join(DTYPES)}")
    text = model.hf_text_config
    if config.model_id:
        identity = model_id_text(config.model_id)
    else:
        commit = getattr(model.hf_config, "_commit_hash", None)
        identity = origin_identity(str(model.model), commit, f"the model {model.model!r}")
    quantization = getattr(model, "quantization", None)
    if quantization and not getattr(text, "quantization_config", None):
        identity += f"#quantized:{quantization}"
    spec = spec_for_config(text, identity=identity, dtype=dtype)
    spec.require((LayerKind.FULL, LayerKind.MLA), "KvlibConnector")
    return spec
