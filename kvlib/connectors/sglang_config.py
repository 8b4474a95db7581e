# SPDX-License-Identifier: Apache-2.0
"""Which SGLang, and which configurations of it, `KvlibLinker` serves.

Imports SGLang only when called.
"""

from collections.abc import Iterable
from typing import Any

from kvlib.connectors.config import ConnectorConfig
from kvlib.connectors.guard import Versions
from kvlib.connectors.identity import engine_spec
from kvlib.errors import ConfigError
from kvlib.spec import KVSpec

__all__ = ["VERSIONS", "check_config", "check_pool", "check_version", "spec_of"]

VERSIONS = Versions("SGLang", (0, 5, 23), (0, 5, 24))
"""SGLang from the first, up to but not including the second: what a linker is changed often."""

_INSTEAD = "use KvlibHiCacheStorage, see docs/sglang.md"


def check_version() -> None:
    """Refuse another SGLang than was tested.

    Raises:
        EngineVersionError: naming both.
    """
    import sglang

    VERSIONS.check(sglang.__version__)


def check_config(server_args: Any, params: Any, components: Iterable[Any]) -> None:
    """Refuse what `KvlibLinker` does not serve.

    Args:
        server_args: SGLang's.
        params: SGLang's `CacheInitParams`.
        components: of SGLang's tree.

    Raises:
        ConfigError: saying what was seen and what to do.
    """
    for name in ("tp_size", "pp_size", "attn_cp_size", "dcp_size"):
        size = getattr(server_args, name, None) or 1
        if size > 1:
            raise ConfigError(f"{name}={size} is not served by KvlibLinker: {_INSTEAD}")
    others = sorted(str(x.name) for x in components if x.name != "FULL")
    if others:
        raise ConfigError(
            f"this model's cache has parts of other kinds ({', '.join(others)}); KvlibLinker "
            f"serves full attention and MLA: {_INSTEAD}"
        )
    speculative = getattr(server_args, "speculative_algorithm", None)
    if speculative or params.is_eagle:
        raise ConfigError(
            f"speculative_algorithm={speculative!r}: KvlibLinker does not store what a draft model "
            f"caches: {_INSTEAD}"
        )


def spec_of(server_args: Any, config: ConnectorConfig) -> KVSpec:
    """What the numbers in SGLang's pools mean: the same as in transformers' cache of that model.

    Raises:
        ConfigError: the weights cannot be identified, or the model has other layers than full
            attention or MLA.
    """
    from sglang.srt.configs.model_config import ModelConfig

    model = ModelConfig.from_server_args(server_args)
    return engine_spec(model, model.model_path, config.model_id, "KvlibLinker")


def check_pool(spec: KVSpec, pool: Any, layers: list[tuple[int, int]]) -> None:
    """Refuse a pool that holds something else than the model's keys and values.

    Args:
        spec: of the model.
        pool: SGLang's.
        layers: KV heads and channels of the keys of each of its layers.

    Raises:
        ConfigError: naming both.
    """
    dtype = str(pool.dtype).removeprefix("torch.")
    wanted = [(layer.num_kv_heads, layer.k_head_dim) for layer in spec.layers]
    if dtype != spec.dtype or layers != wanted:
        raise ConfigError(
            f"SGLang's cache has {len(layers)} layers of (KV heads, channels) "
            f"{sorted(set(layers))} in {dtype}, the model {len(wanted)} of {sorted(set(wanted))} "
            f"in {spec.dtype}: draft models, shared layers and caches of another dtype are not "
            f"served by KvlibLinker: {_INSTEAD}"
        )
