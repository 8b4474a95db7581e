# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: specs, and layers and blocks of every form the types allow.

The numbers come from a seed that hypothesis draws, so examples shrink in shape and stay cheap.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from kvlib.blocks import SYNTHETIC, KVBlock, LayerKV, Row
from kvlib.spec import DTYPES, KVSpec, LayerKind, LayerSpec, RopeSpec

__all__ = ["CONTENTS", "Content", "Form", "draw_numbers", "kv_blocks", "layer_kvs", "specs"]

Form: TypeAlias = Literal["dense", "evicted", "ragged"]
"""dense: a range of positions; evicted: rows of equal length with gaps; ragged: they differ."""

Content: TypeAlias = Literal["normal", "bits", "zeros", "constant", "wide", "tiny"]
"""How the numbers are drawn: see `draw_numbers`."""

CONTENTS: tuple[Content, ...] = ("normal", "bits", "zeros", "constant", "wide", "tiny")
FORMS: tuple[Form, ...] = ("dense", "evicted", "ragged")


def draw_numbers(
    rng: np.random.Generator, shape: Sequence[int], dtype: str, content: Content = "normal"
) -> Tensor:
    """A tensor of `shape` and `dtype` (a name in `DTYPES`).

    Args:
        rng: source of the numbers.
        shape: its last size is the head dim.
        dtype: a name in `kvlib.spec.DTYPES`.
        content: normal; bits (any bit pattern: NaN payloads, infinities, subnormals); zeros of
            both signs; one constant; wide (beyond float16's range where the dtype allows); tiny
            (spans below float16's smallest step around a large value).
    """
    kind = getattr(torch, dtype)
    if content == "bits":
        width = shape[-1] * DTYPES[dtype].itemsize
        raw = rng.integers(0, 256, (*shape[:-1], width), dtype=np.uint8)
        if not raw.size:
            return torch.empty(tuple(shape), dtype=kind)
        return torch.from_numpy(raw).view(kind)
    x = rng.standard_normal(tuple(shape), dtype=np.float32)
    if content == "zeros":
        x = np.copysign(np.zeros_like(x), x)
    elif content == "constant":
        x = np.full_like(x, rng.standard_normal())
    elif content == "wide":
        x *= np.float32(1e5)
    elif content == "tiny":
        x = np.float32(3.0) + x * np.float32(1e-7)
    return torch.from_numpy(x).to(kind)


@st.composite
def specs(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    kinds: Sequence[LayerKind] = (LayerKind.FULL, LayerKind.SLIDING, LayerKind.MLA),
    max_layers: int = 3,
) -> KVSpec:
    """Specs of small models, hybrid ones, odd head dims and differing value widths included."""

    def layer() -> LayerSpec:
        kind = draw(st.sampled_from(list(kinds)))
        if kind is LayerKind.RECURRENT:
            return LayerSpec(kind=kind, num_kv_heads=0, k_head_dim=0, v_head_dim=0)
        width = draw(st.sampled_from([1, 2, 3, 5, 8, 16, 33]))
        rope = None
        if width > 1 and draw(st.booleans()):
            first = draw(st.integers(0, (width - 2) // 2))
            rotary = 2 * draw(st.integers(1, (width - first) // 2))
            rope = RopeSpec(
                theta=draw(st.sampled_from([1e4, 5e5])),
                rotary_dim=rotary,
                first_channel=first,
                interleaved=draw(st.booleans()),
            )
        if kind is LayerKind.MLA:
            return LayerSpec(kind=kind, num_kv_heads=1, k_head_dim=width, v_head_dim=0, rope=rope)
        return LayerSpec(
            kind=kind,
            num_kv_heads=draw(st.integers(1, 3)),
            k_head_dim=width,
            v_head_dim=draw(st.sampled_from([0, 1, 4, 7, width])),
            window=draw(st.integers(1, 9)) if kind is LayerKind.SLIDING else 0,
            rope=rope,
        )

    return KVSpec(
        model_id=draw(st.sampled_from(["m", "org/model@1"])),
        layers=tuple(layer() for _ in range(draw(st.integers(1, max_layers)))),
        dtype=draw(st.sampled_from(list(dtypes))),
    )


@st.composite
def layer_kvs(
    draw: st.DrawFn,
    spec: KVSpec,
    layer_idx: int,
    *,
    start: int = 0,
    num_tokens: int = 8,
    forms: Sequence[Form] = FORMS,
    contents: Sequence[Content] = CONTENTS,
    synthetic: bool = True,
    weights: bool = True,
    channels: bool = True,
) -> LayerKV:
    """One layer of a block [start, start + num_tokens), possibly empty or evicted.

    Args:
        draw: given by hypothesis.
        spec: the model.
        layer_idx: which layer of it; not a recurrent one.
        start: position of the first token.
        num_tokens: tokens that the block stands for.
        forms: forms to choose from, see `Form`.
        contents: contents to choose from, see `draw_numbers`.
        synthetic: whether rows may end in a synthetic entry.
        weights: whether there may be log weights.
        channels: whether key channels may be pruned.
    """
    want = spec.layers[layer_idx]
    heads = want.num_kv_heads
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    form = draw(st.sampled_from(list(forms)))
    content = draw(st.sampled_from(list(contents)))
    kept: Tensor | None = None
    width = want.k_head_dim
    if channels and draw(st.booleans()):
        width = draw(st.integers(1, want.k_head_dim))
        lists = [sorted(rng.permutation(want.k_head_dim)[:width]) for _ in range(heads)]
        kept = torch.tensor(np.array(lists, np.int64)).reshape(heads, width)
    weighted = weights and draw(st.booleans())
    if form == "dense":
        shape = (heads, num_tokens)
        log_weight = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        return LayerKV(
            layer_idx=layer_idx,
            keys=draw_numbers(rng, (*shape, width), spec.dtype, content),
            values=draw_numbers(rng, (*shape, want.v_head_dim), spec.dtype, content),
            positions=range(start, start + num_tokens),
            log_weight=log_weight if weighted else None,
            channels=kept,
        )
    if form == "evicted":
        sizes = [draw(st.integers(0, num_tokens))] * heads
        extras = [int(synthetic and draw(st.booleans()))] * heads
    else:
        sizes = [draw(st.integers(0, num_tokens)) for _ in range(heads)]
        extras = [int(synthetic and draw(st.booleans())) for _ in range(heads)]
    rows = []
    for size, extra in zip(sizes, extras, strict=True):
        n = size + extra
        places = np.sort(rng.permutation(num_tokens)[:size]) + start
        positions = np.concatenate([places, np.full(extra, SYNTHETIC)]).astype(np.int32)
        weight = torch.from_numpy(rng.standard_normal(n, dtype=np.float32))
        rows.append(
            Row(
                draw_numbers(rng, (n, width), spec.dtype, content),
                draw_numbers(rng, (n, want.v_head_dim), spec.dtype, content),
                torch.from_numpy(positions),
                weight if weighted else None,
            )
        )
    return LayerKV.from_rows(layer_idx, rows, channels=kept)


@st.composite
def kv_blocks(
    draw: st.DrawFn,
    /,
    spec: KVSpec | None = None,
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    max_tokens: int = 20,
    **layer: Any,
) -> KVBlock:
    """Blocks over some of the layers of `spec` (drawn when None).

    Args:
        draw: given by hypothesis.
        spec: the model, or None.
        dtypes: of the drawn spec.
        max_tokens: most tokens of a block; 0 tokens are possible.
        **layer: passed to `layer_kvs`.
    """
    if spec is None:
        spec = draw(specs(dtypes=dtypes))
    start = draw(st.sampled_from([0, 64, 1000, (1 << 31) - max_tokens]))
    num_tokens = draw(st.integers(0, max_tokens))
    chosen = [
        i
        for i, x in enumerate(spec.layers)
        if x.kind is not LayerKind.RECURRENT and draw(st.integers(0, 4))
    ]
    layers = [draw(layer_kvs(spec, i, start=start, num_tokens=num_tokens, **layer)) for i in chosen]
    return KVBlock(spec=spec, start=start, num_tokens=num_tokens, layers=tuple(layers))
