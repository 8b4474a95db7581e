# SPDX-License-Identifier: Apache-2.0
"""Which `KVSpec` a transformers model has, and what identifies its weights.

The cache of one model must never be served to another, so identity comes from what the weights
*are*: the user's `model_id`, else the hub's repository and commit, else a hash of config.json and
every weight file.
"""

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlib.errors import ConfigError
from kvlib.keys import Namespace, digest
from kvlib.spec import DTYPES, KVSpec, LayerKind, LayerSpec, RopeSpec, RopeState

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = [
    "CACHE_FOLDER",
    "files_identity",
    "layer_specs",
    "model_id_text",
    "model_identity",
    "one_sequence",
    "origin_identity",
    "spec_for_config",
    "spec_for_model",
]

CACHE_FOLDER = Path("~/.cache/kvlib")
"""Where kvlib keeps what it can make again: hashes of weight files, converted demo models."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_INTERLEAVED = {"cohere", "cohere2", "ernie4_5", "glm", "glm4", "gptj", "helium"}
"""transformers' model types that rotate neighbouring channels instead of the halves of a head."""


def spec_for_model(
    model: "PreTrainedModel", *, model_id: str | None = None, adapter: str = ""
) -> KVSpec:
    """The spec of the KV that `model` caches (post-RoPE, in the model's dtype).

    Args:
        model: a transformers decoder.
        model_id: identity of the weights; needed when they came from no hub and no folder.
        adapter: identity of an active adapter (name and content), needed when one is active.

    Raises:
        ConfigError: no identity can be found, an adapter without `adapter`, or a dtype without a
            code.
    """
    config = model.config.get_text_config(decoder=True)
    adapted = getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config")
    if adapted and not adapter:
        raise ConfigError(
            "the model has an adapter loaded: pass adapter='...' (its name and a digest of its "
            "weights), since its cache must not be shared with the base model"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"the model computes in {dtype}; kvlib stores {', '.join(DTYPES)}")
    identity = model_id_text(model_id) if model_id else model_identity(model)
    return spec_for_config(config, identity=identity, dtype=dtype, adapter=adapter)


def spec_for_config(config: Any, *, identity: str, dtype: str, adapter: str = "") -> KVSpec:
    """The spec of the KV that a decoder with this (text) config caches, post-RoPE.

    Args:
        config: of transformers.
        identity: of the weights; see `model_id_text`, `origin_identity`.
        dtype: what keys and values are computed in.
        adapter: identity of an active adapter.
    """
    layers = layer_specs(config)
    has_rope = any(layer.rope is not None for layer in layers)
    return KVSpec(
        model_id=identity,
        layers=layers,
        dtype=dtype,
        adapter=adapter,
        weight_quantization=_quantization(config),
        rope_state=RopeState.POST if has_rope else RopeState.NONE,
    )


def model_id_text(model_id: str) -> str:
    """A user's own identity, marked so that it cannot pose as a hub commit or a hash."""
    return f"user:{model_id}"


def model_identity(model: "PreTrainedModel") -> str:
    """``hub:<repository>@<commit>`` or ``blake2b:<hash of the folder>``.

    The weights in memory are taken to be the ones that were loaded: after changing them, pass
    `model_id`.

    Raises:
        ConfigError: the model was built in memory or its origin is gone.
    """
    config = model.config
    origin = str(getattr(config, "_name_or_path", "") or "")
    return origin_identity(
        origin, getattr(config, "_commit_hash", None), f"this {type(model).__name__}"
    )


def origin_identity(origin: str, commit: str | None, what: str) -> str:
    """See `model_identity`.

    Args:
        origin: a folder, or a hub repository.
        commit: of the hub.
        what: has these weights; for the error.

    Raises:
        ConfigError: neither a folder nor a repository with a commit.
    """
    if origin and Path(origin).expanduser().is_dir():
        return f"blake2b:{files_identity(Path(origin).expanduser()).hex()}"
    if origin and commit:
        return f"hub:{origin}@{commit}"
    seen = (
        f"its origin {origin!r} is neither a folder nor a hub repository with a commit"
        if origin
        else "it has no origin"
    )
    raise ConfigError(
        f"cannot tell which weights {what} has: {seen}. Pass model_id='...' (any text that is "
        "different for different weights); without one, its cache could be served to another model"
    )


def files_identity(folder: Path) -> bytes:
    """32 bytes that name the content of a model folder: config.json and all weight files.

    File hashes are cached under `CACHE_FOLDER` by path, size and modification time.

    Raises:
        ConfigError: the folder holds no config.json or no weights.
    """
    files = sorted(
        (p for p in folder.iterdir() if p.name == "config.json" or p.suffix in _WEIGHT_SUFFIXES),
        key=lambda p: p.name,  # paths themselves sort differently on Windows
    )
    names = [p.name for p in files]
    if "config.json" not in names or len(files) < 2:
        raise ConfigError(
            f"{folder} is no model folder: expected config.json and weights, found "
            f"{names or 'neither'}"
        )
    cache_file = CACHE_FOLDER.expanduser() / "file-hashes.json"
    known = _read_cache(cache_file)
    changed = False
    fields: list[tuple[str, int, bytes]] = []
    for path in files:
        stat = path.stat()
        place = str(path.resolve())
        entry = known.get(place)
        if entry is None or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            entry = known[place] = [stat.st_size, stat.st_mtime_ns, _hash_file(path).hex()]
            changed = True
        fields.append((path.name, stat.st_size, bytes.fromhex(entry[2])))
    if changed:
        _write_cache(cache_file, known)
    return digest(Namespace.MODEL, tuple(fields))


def _hash_file(path: Path) -> bytes:
    state = blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.digest()


def _read_cache(path: Path) -> dict[str, list[Any]]:
    """Known hashes; anything unreadable or malformed is as good as nothing."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {
            place: entry
            for place, entry in data.items()
            if isinstance(entry, list) and len(entry) == 3 and len(bytes.fromhex(entry[2])) == 32
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write_cache(path: Path, known: Mapping[str, list[Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(dict(known), indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass  # the hash is then computed again next time


def _quantization(config: Any) -> str:
    found = getattr(config, "quantization_config", None)
    if not found:
        return ""
    settings = found if isinstance(found, dict) else found.to_dict()
    text = json.dumps(settings, sort_keys=True, default=str)
    content = blake2b(text.encode(), digest_size=16).hexdigest()
    return f"{settings.get('quant_method', 'unknown')}:{content}"


def layer_specs(config: Any) -> tuple[LayerSpec, ...]:
    """What each layer of a decoder with this (text) config caches."""
    # transformers itself decides here which layers keep what; asking it avoids a second copy of its
    # rules.
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cached = DynamicCache(config=config).layers
    if not cached:
        raise ConfigError(
            f"transformers makes no cache layers for model type {config.model_type!r}"
        )
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(cached)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    mla = getattr(config, "kv_lora_rank", None)
    layers = []
    for layer, layer_type in zip(cached, types, strict=True):
        if type(layer) is DynamicLayer and mla:
            rotated = int(getattr(config, "qk_rope_head_dim", 0))
            rope = _rope(config, layer_type, rotated, first_channel=mla) if rotated else None
            layers.append(
                LayerSpec(
                    kind=LayerKind.MLA,
                    num_kv_heads=1,
                    k_head_dim=mla + rotated,
                    v_head_dim=0,
                    rope=rope,
                )
            )
            continue
        if type(layer) is DynamicLayer:
            kind, window = LayerKind.FULL, 0
        elif type(layer) is DynamicSlidingWindowLayer:
            kind, window = LayerKind.SLIDING, int(layer.sliding_window)
        else:
            layers.append(
                LayerSpec(kind=LayerKind.RECURRENT, num_kv_heads=0, k_head_dim=0, v_head_dim=0)
            )
            continue
        layers.append(
            LayerSpec(
                kind=kind,
                num_kv_heads=heads,
                k_head_dim=dim,
                v_head_dim=dim,
                window=window,
                rope=_rope(config, layer_type, dim),
            )
        )
    return tuple(layers)


def _rope(config: Any, layer_type: str, head_dim: int, first_channel: int = 0) -> RopeSpec | None:
    """RoPE of one layer from `rope_parameters`, which some models give per layer type."""
    given = getattr(config, "rope_parameters", None)
    if given and layer_type in given:
        given = given[layer_type]
    if not given or "rope_theta" not in given:
        return None
    params: list[tuple[str, float]] = []
    for name, value in given.items():
        if name in ("rope_theta", "rope_type", "type", "partial_rotary_factor") or value is None:
            continue
        if isinstance(value, list | tuple):
            params += [(f"{name}.{i}", float(x)) for i, x in enumerate(value)]
        elif isinstance(value, int | float):
            params.append((name, float(value)))
    return RopeSpec(
        kind=str(given.get("rope_type", "default")),
        theta=float(given["rope_theta"]),
        rotary_dim=int(head_dim * float(given.get("partial_rotary_factor", 1.0))),
        params=tuple(params),
        interleaved=config.model_type in _INTERLEAVED,
        first_channel=first_channel,
    )


def one_sequence(input_ids: "Tensor | Sequence[int]") -> "Tensor":
    """The token ids of one sequence, int [T] or [1, T], as [T].

    Raises:
        ConfigError: several sequences, or something else.
    """
    import torch

    ids = torch.as_tensor(input_ids)
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.dtype.is_floating_point:
        raise ConfigError(
            f"expected the token ids of one sequence, int [T] or [1, T]; got {ids.dtype} "
            f"{tuple(ids.shape)}"
        )
    return ids
