# SPDX-License-Identifier: Apache-2.0
"""Attention over `LayerKV`, and the statistics that eviction policies ask for.

Everything here is for one sequence and one layer: `query` is [Hq, T, D] and the layer's rows end in
the T entries of the queries' own tokens. Old entries are visible to every query, new entry j to
query i >= j (eviction.md 0.1), so the mask belongs to the layer and not to the model. Query head h
reads KV head h // G, G = Hq / Hkv.

No T x S matrix is ever held: queries are taken in blocks of at most `BLOCK_ELEMENTS` probabilities.
Statistics are computed from a softmax over each block's whole rows, in float32. That needs no
log-sum-exp from the attention kernel (which PyTorch does not return portably), costs one more
Q K^T, and holds for soft-capped logits and sink logits as well.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvlib.blocks import SYNTHETIC, LayerKV
from kvlib.errors import ShapeError
from kvlib.layer_kv import keys_only
from kvlib.plans import other_channels

__all__ = [
    "BLOCK_ELEMENTS",
    "Attended",
    "Logits",
    "attend",
    "attend_batch",
    "attention_at",
    "column_maxima",
    "column_sums",
    "keys_only",
]

BLOCK_ELEMENTS = 1 << 19
"""Probabilities computed at a time: 2 MiB of float32, which stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class Logits:
    """How a layer makes logits out of q . k.

    Attributes:
        scale: factor of q . k; None means 1 / sqrt(k_head_dim), pruned channels included.
        softcap: c: logits become c * tanh(logits / c) before masks and weights (Gemma-2).
        sinks: [Hq] logits of an extra column without a value, which takes its share of the softmax
            (GPT-OSS).
        window: a query at position p sees positions > p - window only; None sees all.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    window: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether `scaled_dot_product_attention` can compute it."""
        return self.softcap is None and self.sinks is None


PLAIN = Logits()


class Attended(NamedTuple):
    """Output [Hq, T, Dv] in the queries' dtype, and column sums if they were asked for."""

    output: Tensor
    column_sums: Tensor | None


def attend(
    query: Tensor, layer: LayerKV, logits: Logits = PLAIN, *, with_column_sums: bool = False
) -> Attended:
    """Attention of the last T tokens of a sequence over everything the layer holds.

    Args:
        query: [Hq, T, D], post-RoPE; D is the model's head size also when the layer's keys are
            narrower.
        layer: rows of the cache; the last T real entries of every row are the queries' own.
        logits: scale, soft cap, sink logits, sliding window.
        with_column_sums: see `column_sums`. For one query the probabilities are at hand and cost
            nothing; for more, a second Q K^T is needed.

    Raises:
        ShapeError: heads, widths or lengths do not fit.
    """
    view = _View(query, layer, logits)
    if query.shape[1] == 1 and with_column_sums:
        return _one_query(view) if view.simple else _explicit(view, with_column_sums=True)
    # For values of another width than the keys, PyTorch has no kernel that holds no matrix.
    fused = query.shape[1] == 1 or layer.keys.shape[-1] == layer.values.shape[-1]
    # A mask has the queries' dtype: half precision would round log N.
    masked = query.shape[1] == 1 and query.dtype in (torch.float32, torch.float64)
    fused = fused and logits.is_plain and layer.rest is None
    if not fused or (view.bias is not None and not (masked and logits.window is None)):
        return _explicit(view, with_column_sums=with_column_sums)
    output = _fused(view) if view.dense else _fused_rows(view)
    return Attended(output, column_sums(query, layer, logits) if with_column_sums else None)


def attend_batch(
    query: Tensor,
    layers: Sequence[LayerKV],
    logits: Logits = PLAIN,
    *,
    valid: Tensor | None = None,
    with_column_sums: bool = False,
) -> tuple[Tensor, list[Tensor | None]]:
    """`attend` for a padded batch whose sequences hold what they like.

    Args:
        query: [B, Hq, T, D].
        layers: one for each sequence, without padding.
        logits: see `attend`.
        valid: bool [B, T], which queries are tokens; None for all. A sequence may have none.
        with_column_sums: see `attend`.

    Returns:
        Output [B, T, Hq, Dv], zero at padding, as transformers wants it; column sums by sequence,
        None where there are none.
    """
    batch, heads, num = query.shape[:3]
    if batch == 1 and valid is None and num:  # nothing to put together
        only = attend(query[0], layers[0], logits, with_column_sums=with_column_sums)
        return only.output.transpose(0, 1)[None], [only.column_sums]
    output = query.new_zeros(batch, num, heads, layers[0].row(0).values.shape[-1])
    sums: list[Tensor | None] = [None] * batch
    for row, layer in enumerate(layers):
        where = slice(None) if valid is None else valid[row].to(query.device)
        mine = query[row][:, where]
        if mine.shape[1]:
            done = attend(mine, layer, logits, with_column_sums=with_column_sums)
            output[row, where] = done.output.transpose(0, 1)
            sums[row] = done.column_sums
    return output, sums


def column_sums(query: Tensor, layer: LayerKV, logits: Logits = PLAIN) -> Tensor:
    """The attention that every entry receives from the T queries, summed over the queries.

    Summed over entries this is T for every query head (less the sinks' share). With the last w
    queries of a prompt it is the score of an observation window (SnapKV before pooling), with one
    query the decode row.

    Returns:
        float32 [Hkv, G, S]; entries beyond a shorter row are 0. `[h, :, :layer.lengths[h]]` belongs
        to KV head h.
    """
    view = _View(query, layer, logits)
    if view.simple:
        return _joined(view, list(_probabilities(view)))
    out = query.new_zeros(view.heads, view.group, view.longest, dtype=torch.float32)
    for block in view.blocks():
        out[block.head, :, : block.stop] += block.weights.sum(-2)
    return out


def column_maxima(
    query: Tensor,
    layer: LayerKV,
    logits: Logits = PLAIN,
    *,
    own: bool = True,
    votes: Tensor | None = None,
) -> Tensor:
    """The most attention that any of the T queries pays to every entry.

    Args:
        query: see `attend`.
        layer: see `attend`.
        logits: see `attend`.
        own: whether the rows end in the entries of the queries' own tokens. If not, every query
            sees all entries and its softmax is over those alone.
        votes: float32 [T], what each query's attention is multiplied by; None for 1.

    Returns:
        float32 [Hkv, G, S], like `column_sums`, which it equals for a single query.

    Raises:
        ShapeError: as `attend`, or a window without own entries, which say where a query stands.
    """
    view = _View(query, layer, logits, own=own)
    if view.simple and votes is None:
        return _joined(view, list(_probabilities(view)))
    out = query.new_zeros(view.heads, view.group, view.longest, dtype=torch.float32)
    for block in view.blocks():
        mine = out[block.head, :, : block.stop]
        weights = block.weights
        if votes is not None:
            weights = weights * votes[block.first : block.last, None]
        torch.maximum(mine, weights.amax(-2), out=mine)
    return out


def attention_at(query: Tensor, layer: LayerKV, columns: Tensor, logits: Logits = PLAIN) -> Tensor:
    """The attention that every query pays to a few entries of its own.

    Args:
        query: see `attend`.
        layer: see `attend`.
        columns: int64 [T, n], for each query the indices of entries in every head's row.
        logits: see `attend`.

    Returns:
        float32 [Hkv, G, T, n]; 0 for an entry that the query does not see.
    """
    view = _View(query, layer, logits)
    shape = (view.heads, view.group, *columns.shape)
    out = query.new_zeros(shape, dtype=torch.float32)
    for block in view.blocks():
        mine = columns[block.first : block.last]
        index = mine.clamp(max=block.stop - 1).expand(*block.weights.shape[:2], -1, -1)
        seen = block.weights.gather(-1, index)
        out[block.head, :, block.first : block.last] = seen * (mine < block.stop)
    return out


class _Block(NamedTuple):
    """Probabilities of some queries of some KV heads: [h, G, last - first, stop]."""

    head: slice
    first: int
    last: int
    stop: int
    weights: Tensor


class _View:
    """One call's query and layer, brought to [Hkv, G, T, C] and [Hkv, S, C]."""

    def __init__(self, query: Tensor, layer: LayerKV, logits: Logits, *, own: bool = True) -> None:
        self.query_heads, self.num_queries, width = query.shape
        self.heads = layer.num_kv_heads
        self.group, rest = divmod(self.query_heads, max(self.heads, 1))
        self.lengths = layer.lengths
        self.longest = max(self.lengths, default=0)
        if rest or not self.group:
            raise ShapeError(
                f"{self.query_heads} query heads cannot share the {self.heads} KV heads of layer "
                f"{layer.layer_idx}"
            )
        self.dense = layer.is_dense and not layer.apart
        some = layer.keys if self.dense else layer.row(0).keys
        narrow = layer.channels is not None
        if (not narrow and some.shape[-1] != width) or some.dtype != query.dtype:
            raise ShapeError(
                f"layer {layer.layer_idx}: queries are {query.dtype} of {width} channels, keys "
                f"{some.dtype} of {some.shape[-1]}"
            )
        if not own and logits.window is not None:
            raise ShapeError(
                f"layer {layer.layer_idx}: queries without entries of their own have no window"
            )
        if own and min(self.lengths, default=0) < self.num_queries:
            raise ShapeError(
                f"layer {layer.layer_idx} holds {min(self.lengths, default=0)} entries in a row; "
                f"expected at least the {self.num_queries} of the queries' own tokens"
            )
        self.layer = layer
        self.logits = logits
        self.own = own
        self.whole_query = query
        self.scale = width**-0.5 if logits.scale is None else logits.scale
        self.bias = layer.log_weight if self.dense else layer.row(0).log_weight
        grouped = query.unflatten(0, (self.heads, self.group))
        self.rest_query: Tensor | None = None
        if layer.rest is not None and layer.channels is not None:
            self.rest_query = _channels_of(grouped, other_channels(layer.channels, width))
        if layer.channels is not None:
            grouped = _channels_of(grouped, layer.channels)
        self.query: Tensor = grouped
        # Otherwise the order of a row says what a query sees.
        self.by_position = logits.window is not None
        ordered = self.num_queries > 1 or self.by_position
        if ordered and self.bias is not None and isinstance(layer.positions, Tensor):
            # Synthetic entries stand behind the new ones; they carry a weight.
            self.synthetic = bool((layer.positions == SYNTHETIC).any())
            self.by_position |= self.synthetic and self.num_queries > 1  # one sees everything
        else:
            self.synthetic = False

    @property
    def simple(self) -> bool:
        """Whether there is one query, which sees everything by the plain softmax."""
        plain = self.logits.is_plain and self.logits.window is None
        return self.num_queries == 1 and plain and self.layer.rest is None

    @property
    def num_old(self) -> int:
        """Entries of the longest row that were there before the queries' tokens."""
        return self.longest - self.num_queries

    def block_size(self, entries: int) -> int:
        """Queries per block so that all of a block's probabilities stay within bounds."""
        return max(BLOCK_ELEMENTS // max(entries * self.group, 1), 1)

    def rows(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Heads, keys [h, S, C], values [h, S, Dv], bias [h, S], positions [h, S].

        Heads come together when they are equally long and few enough entries are involved.
        """
        layer = self.layer
        together = self.num_queries * self.longest * self.query_heads <= BLOCK_ELEMENTS
        if self.dense and together:
            positions = layer.positions_tensor() if self.by_position else None
            yield slice(0, self.heads), layer.keys, layer.values, self.bias, positions
            return
        for head, row in enumerate(layer.rows()):
            yield (
                slice(head, head + 1),
                row.keys[None],
                row.values[None],
                None if row.log_weight is None else row.log_weight[None],
                row.positions[None] if self.by_position else None,
            )

    def blocks(self) -> Iterator[_Block]:
        """Probabilities block by block."""
        for head, keys, _, bias, positions in self.rows():
            yield from self.row_blocks(head, keys, bias, positions)

    def row_blocks(
        self, head: slice, keys: Tensor, bias: Tensor | None, positions: Tensor | None
    ) -> Iterator[_Block]:
        """The blocks of some equally long rows."""
        size = self.block_size(keys.shape[1] * keys.shape[0])
        transposed = keys.to(torch.float32).transpose(-1, -2)
        for first in range(0, self.num_queries, size):
            last = min(first + size, self.num_queries)
            queries = self.query[head, :, first:last].to(torch.float32) * self.scale
            stop = keys.shape[1]
            if self.own and not self.synthetic:
                stop += last - self.num_queries
            x = queries.flatten(1, 2) @ transposed[..., :stop]
            x = x.unflatten(1, (self.group, last - first))
            self._add_rest(x, head, first, last, keys.shape[1])
            if self.logits.softcap is not None:
                x = x.div_(self.logits.softcap).tanh_().mul_(self.logits.softcap)
            if bias is not None:
                x += bias[:, None, None, :stop]
            self._mask(x, first, last, stop, positions)
            yield _Block(head, first, last, stop, self._softmax(x, head))

    def _add_rest(self, x: Tensor, head: slice, first: int, last: int, length: int) -> None:
        """Add what the pruned channels say about the entries that still have them."""
        if self.rest_query is None or self.layer.rest is None:
            return
        tail = min(self.layer.rest.shape[1], length)
        start, stop = length - tail, x.shape[-1]
        if stop <= start:
            return
        rest = self.layer.rest[head, self.layer.rest.shape[1] - tail :][:, : stop - start]
        queries = self.rest_query[head, :, first:last].to(torch.float32) * self.scale
        more = queries.flatten(1, 2) @ rest.to(torch.float32).transpose(-1, -2)
        x[..., start:] += more.unflatten(1, (self.group, last - first))

    def _softmax(self, x: Tensor, head: slice) -> Tensor:
        """Probabilities from logits [h, G, n, stop]; reuses `x`."""
        if self.logits.sinks is not None:
            sinks = self.logits.sinks.to(torch.float32).unflatten(0, (self.heads, self.group))
            column = sinks[head, :, None, None].expand(*x.shape[:-1], 1)
            return torch.cat([x, column], dim=-1).softmax(-1)[..., :-1]
        if x.requires_grad:
            return x.softmax(-1)
        return torch.softmax(x, -1, out=x)

    def _mask(self, x: Tensor, first: int, last: int, stop: int, positions: Tensor | None) -> None:
        """Put -inf where a query may not look; `x` is [h, G, last - first, stop]."""
        if not self.own:
            return
        if positions is None:
            new = stop - (last - first)  # the block's own tokens are its last columns
            if last - first > 1:
                hidden = torch.ones(last - first, last - first, dtype=torch.bool, device=x.device)
                x[..., new:].masked_fill_(hidden.triu_(1), -torch.inf)
            return
        hidden = ~self.visible(positions, first, last)[..., :stop]
        x.masked_fill_(hidden[:, None], -torch.inf)

    def visible(self, positions: Tensor, first: int, last: int) -> Tensor:
        """Bool [h, last - first, S] by positions [h, S]; a synthetic entry is always visible."""
        real = positions != SYNTHETIC
        offset = torch.arange(first, last, device=positions.device)
        own = real.sum(-1, keepdim=True) - self.num_queries + offset  # the last real entries
        at = positions.gather(-1, own)[..., None]
        seen = positions[:, None, :] <= at
        if self.logits.window is not None:
            seen &= positions[:, None, :] > at - self.logits.window
        return seen | ~real[:, None, :]


def _explicit(view: _View, *, with_column_sums: bool) -> Attended:
    """Probabilities in float32, block by block: any form of layer, any logits."""
    layer, query = view.layer, view.query
    width = layer.row(0).values.shape[-1]
    output = query.new_empty(view.heads, view.group, view.num_queries, width)
    sums = None
    if with_column_sums:
        sums = query.new_zeros(view.heads, view.group, view.longest, dtype=torch.float32)
    for head, keys, values, bias, positions in view.rows():
        wide = values.to(torch.float32)
        for block in view.row_blocks(head, keys, bias, positions):
            mixed = block.weights.flatten(1, 2) @ wide[:, : block.stop]
            mixed = mixed.unflatten(1, (view.group, -1))
            output[head, :, block.first : block.last] = mixed.to(output.dtype)
            if sums is not None:
                sums[head, :, : block.stop] += block.weights.sum(-2)
    return Attended(output.flatten(0, 1), sums)


def _probabilities(view: _View) -> Iterator[Tensor]:
    """Of a `simple` view's query, [h, G, S] for the heads of each of `rows`."""
    query = view.query[:, :, 0].to(torch.float32) * view.scale
    for head, keys, _, bias, _ in view.rows():
        x = query[head] @ keys.to(torch.float32).transpose(-1, -2)
        if bias is not None:
            x += bias[:, None]
        yield x.softmax(-1)


def _joined(view: _View, parts: Sequence[Tensor]) -> Tensor:
    """Column sums [Hkv, G, S] from `_probabilities`: those of one query."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([nn.functional.pad(x, (0, view.longest - x.shape[-1])) for x in parts])


def _one_query(view: _View) -> Attended:
    """`_explicit` for a `simple` view."""
    parts, outputs = [], []
    for (_, _, values, _, _), x in zip(view.rows(), _probabilities(view), strict=True):
        outputs.append((x @ values.to(torch.float32)).to(view.query.dtype))
        parts.append(x)
    output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return Attended(output.flatten(0, 1)[:, None], _joined(view, parts))


def _channels_of(query: Tensor, channels: Tensor) -> Tensor:
    """The channels int64 [Hkv, C] of queries [Hkv, G, T, D]."""
    index = channels[:, None, None, :].expand(-1, *query.shape[1:3], -1)
    return query.gather(-1, index)


def _fused_rows(view: _View) -> Tensor:
    """`_fused` head by head: rows that are not equally long."""
    layer, logits = view.layer, view.logits
    out = []
    if view.num_queries == 1 and logits.window is None:
        sdpa: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention
        for q, row in zip(view.query[:, None, :, 0].unbind(), layer.rows(), strict=True):
            mask = None if row.log_weight is None else row.log_weight.to(q.dtype)[None, None, None]
            keys, values = row.keys[None, None], row.values[None, None]
            out.append(sdpa(q[None], keys, values, mask, scale=view.scale)[0, 0])
        return torch.cat(out)[:, None]
    grouped = view.whole_query.unflatten(0, (layer.num_kv_heads, -1))
    views = [_View(q, layer.alone(head), logits) for head, q in enumerate(grouped)]
    return torch.cat([_fused(one) for one in views])


def _fused(view: _View) -> Tensor:
    """`scaled_dot_product_attention` over a dense layer, with weights for a single query only."""
    layer = view.layer
    keys, values = layer.keys[None], layer.values[None]
    sdpa: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
    if view.num_queries == 1 and view.logits.window is None:
        # The group's queries stand in for the query axis: nothing is repeated, no mask is needed.
        q = view.query[:, :, 0][None]
        mask = None if view.bias is None else view.bias[None, :, None].to(q.dtype)
        found = sdpa(q, keys, values, attn_mask=mask, scale=view.scale)
        return found[0].flatten(0, 1)[:, None]
    if view.num_old == 0 and view.logits.window is None:
        q = view.query.flatten(0, 1)[None]
        # On CUDA, grouped heads in float32 would get the kernel that holds a T x T matrix.
        if keys.is_cuda and keys.dtype == torch.float32:
            keys, values = (x.repeat_interleave(view.group, dim=1) for x in (keys, values))
        whole: Tensor = sdpa(q, keys, values, scale=view.scale, is_causal=True, enable_gqa=True)
        return whole[0]
    output = view.query.new_empty(view.heads, view.group, view.num_queries, layer.values.shape[-1])
    size = max(BLOCK_ELEMENTS * 2 // max(view.longest * view.group, 1), 1)
    windowed = view.logits.window is not None
    positions = layer.positions_tensor() if windowed else None
    for first in range(0, view.num_queries, size):
        last = min(first + size, view.num_queries)
        stop = view.num_old + last
        if positions is not None:
            seen = view.visible(positions, first, last)[..., :stop]  # [Hkv, n, stop]
            mask = seen[:, None].expand(-1, view.group, -1, -1).flatten(1, 2)[None]
        else:
            row = torch.arange(first, last, device=keys.device)[:, None] + view.num_old
            mask = torch.arange(stop, device=keys.device) <= row
            mask = mask.expand(view.group, -1, -1).flatten(0, 1)[None, None]
        q = view.query[:, :, first:last].flatten(1, 2)[None]
        part = sdpa(q, keys[:, :, :stop], values[:, :, :stop], attn_mask=mask, scale=view.scale)
        output[:, :, first:last] = part[0].unflatten(1, (view.group, -1))
    return output.flatten(0, 1)
