# SPDX-License-Identifier: Apache-2.0
"""Why a prompt's prefix was not found in a store."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvlib.codecs.container import MAX_HEADER_BYTES, parse_header
from kvlib.codecs.header import Header
from kvlib.connectors.identity import rank_heads, request_salt
from kvlib.errors import CodecError, StoreError
from kvlib.keys import BLOCK_TOKENS, BlockKey, StoreKey, block_keys
from kvlib.spec import EXACT, KVSpec
from kvlib.store.heads import HeadRange
from kvlib.store.kept import Kept
from kvlib.store.upkeep import problem

__all__ = ["Account", "explain", "take_stock"]


@dataclass(slots=True)
class Account:
    """What a store holds, by block.

    Attributes:
        blocks: names and headers of the records that hold a block.
        models: records by fingerprint of the spec.
        unreadable: records whose headers cannot be read.
    """

    blocks: dict[BlockKey, list[tuple[StoreKey, Header]]] = field(default_factory=dict)
    models: dict[bytes, int] = field(default_factory=dict)
    unreadable: int = 0


def take_stock(store: Kept, mac_key: bytes | None = None) -> Account:
    """Read the headers of all records."""
    stock = Account()
    front = np.empty(MAX_HEADER_BYTES, np.uint8).data
    for key in store.keys():
        try:
            if store.peek(key, front, ()) is None:
                continue
            header = parse_header(front, mac_key=mac_key)
        except (CodecError, OSError, StoreError):
            stock.unreadable += 1
            continue
        stock.models[header.spec_fingerprint] = stock.models.get(header.spec_fingerprint, 0) + 1
        for block in header.keys:
            stock.blocks.setdefault(BlockKey(block), []).append((key, header))
    return stock


def explain(
    store: Kept,
    spec: KVSpec,
    tokens: Sequence[int],
    *,
    codec: str,
    lossless: bool,
    salt: str = "",
    cache_salt: str | None = None,
    mac_key: bytes | None = None,
    ranks: int = 1,
) -> tuple[int, list[str]]:
    """How much of a prompt a store would serve, and why not more.

    Args:
        store: opened to be looked at.
        spec: of the model that asks.
        tokens: the prompt's.
        codec: canonical string of the codec that the engine is configured with.
        lossless: whether it is.
        salt: the engine's.
        cache_salt: the request's.
        mac_key: of the records.
        ranks: the engine's tensor-parallel size: a block is served if all of them have theirs.

    Returns:
        Leading blocks that would be served, and sentences.

    Raises:
        ConfigError: the model's KV heads cannot be dealt out to so many ranks.
    """
    wanted = list(dict.fromkeys(rank_heads(spec, rank, ranks)[0] for rank in range(ranks)))
    said: list[str] = []
    whole = max(len(tokens) - 1, 0) // BLOCK_TOKENS
    if not whole:
        return 0, [
            f"The prompt has {len(tokens)} tokens: a hit needs at least one whole block of "
            f"{BLOCK_TOKENS} tokens and one token more."
        ]
    stock = take_stock(store, mac_key)
    keys = block_keys(spec.fingerprint(), tokens, salt=request_salt(salt, cache_salt))[:whole]
    accepted = {(codec, EXACT)} | (set() if lossless else {(codec, codec)})
    found = 0
    for key in keys:
        held = stock.blocks.get(key, ())
        fit = {h.head_range: name for name, h in held if (h.codec, h.fidelity) in accepted}
        if not fit.keys() >= set(wanted):
            break
        problems = (problem(store, fit[heads]) for heads in wanted)
        broken = next((wrong for wrong in problems if wrong is not None), None)
        if broken is not None:
            said.append(
                f"Block {found} is stored but its record is damaged ({broken}): it is a miss, and "
                "is dropped when it is read next. Run `kvlib store verify --repair`."
            )
            return found, said
        found += 1
    if found == whole:
        said.append(
            f"All {whole} whole blocks ({whole * BLOCK_TOKENS} of {len(tokens)} tokens) are stored "
            "and whole: the prompt hits. At least the last token is always computed."
        )
        return found, said
    said.append(
        f"{found} of {whole} whole blocks are stored: the first that is missing holds tokens "
        f"{found * BLOCK_TOKENS} to {(found + 1) * BLOCK_TOKENS - 1}."
    )
    held = stock.blocks.get(keys[found], ())
    if held:
        said += _other_forms([header for _, header in held], spec, wanted, accepted, codec)
    else:
        said += _reasons(stock, spec, tokens, keys, found, salt, cache_salt)
    return found, said


def _other_forms(
    held: Sequence[Header],
    spec: KVSpec,
    wanted: Sequence[HeadRange],
    accepted: Collection[tuple[str, str]],
    codec: str,
) -> list[str]:
    """Why a block that is stored is not what the engine asks for: other heads, or another form."""
    said = []
    fit = {h.head_range for h in held if (h.codec, h.fidelity) in accepted}
    missing = [heads for heads in wanted if heads not in fit]
    most = max(layer.num_kv_heads for layer in spec.layers)
    if fit:
        said.append(
            f"That block is stored for the KV heads {_text(fit, most)} of {most} only, not for "
            f"{_text(missing, most)}. Each tensor-parallel rank has records of its own, and a hit "
            "is what all ranks have: say with --ranks how many the engine has. Engines of another "
            "number share nothing with it."
        )
    apart = [
        h
        for h in held
        if (h.codec, h.fidelity) not in accepted and (not fit or h.head_range in missing)
    ]
    if apart:
        ours = {h.head_range for h in apart} & set(missing)
        forms = sorted(
            {
                f"codec {h.codec!r}, fidelity {h.fidelity!r}"
                + ("" if ours else f", KV heads {_text([h.head_range], most)} of {most}")
                for h in apart
                if not ours or h.head_range in ours
            }
        )
        what = f"Its KV heads {_text(ours, most)} are" if fit else "That block is"
        said.append(
            f"{what} stored in another form ({', '.join(forms)}); the engine asks for {codec!r}. "
            "Give both the same codec."
        )
    return said


def _text(ranges: Iterable[HeadRange], most: int) -> str:
    """Ranges of KV heads as people write them."""
    ends = sorted(heads or (0, most) for heads in ranges)
    texts = [f"{first}-{last - 1}" if last - first > 1 else f"{first}" for first, last in ends]
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _reasons(
    stock: Account,
    spec: KVSpec,
    tokens: Sequence[int],
    keys: Sequence[BlockKey],
    found: int,
    salt: str,
    cache_salt: str | None,
) -> list[str]:
    """Why a block is not stored at all."""
    said = []
    later = sum(key in stock.blocks for key in keys[found + 1 :])
    if later:
        said.append(
            f"{later} blocks after it are stored, so it was stored once: it was evicted, or "
            "dropped because it was damaged."
        )
    if stock.unreadable:
        said.append(
            f"{stock.unreadable} records of the store cannot be read (damaged, or under another "
            "MAC key); the block may have been in one of them."
        )
    if found == 0 and not later:
        first = tokens[:BLOCK_TOKENS]
        mine = spec.fingerprint()
        if mine not in stock.models:
            said.append(
                f"The store has no record of this model (fingerprint {mine.hex()[:16]}); it has "
                + (
                    ", ".join(f"{n} of {m.hex()[:16]}" for m, n in stock.models.items())
                    or "no records at all"
                )
                + ". The fingerprint changes with the weights, the adapter, the dtype and RoPE."
            )
        said += [
            f"These very tokens are stored for the model {model.hex()[:16]}: same tokens and salt, "
            "other weights, dtype or RoPE."
            for model in stock.models
            if model != mine and _holds(stock, model, first, request_salt(salt, cache_salt))
        ]
        for given, name in (
            ((salt, None), "without the request's cache_salt"),
            (("", cache_salt), "without the store's salt"),
            (("", None), "without any salt"),
        ):
            if given != (salt, cache_salt) and _holds(stock, mine, first, request_salt(*given)):
                said.append(f"These very tokens are stored {name}: another salt is another world.")
                break
    if not said:
        said.append(
            "It was never stored, or it was evicted together with what follows it: the prompts "
            "differ from here on, or the capacity is too small (`kvlib store stat` tells)."
        )
    return said


def _holds(stock: Account, model: bytes, tokens: Sequence[int], salt: str | bytes) -> bool:
    return block_keys(model, tokens, salt=salt)[0] in stock.blocks
