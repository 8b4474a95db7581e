# SPDX-License-Identifier: Apache-2.0
"""Abstracts as records: what stands for some blocks' keys, stored beside them (`put_abstracts`).

A record of abstracts has the keys, cuts and container of the blocks' own record and another storage
fingerprint, which names its form (docs/formats/container.md, "Abstracts"). So all that a store does
for records it does for them: checksums, capacity, quotas, time to live, tiers, archives. They are a
fiftieth of the KV and read without it: who has them can choose before anything else is fetched.
They may be missing or damaged and cost nothing but the work of making them again; the KV beside
them is none the worse. And they may come later, for blocks that somebody else has stored.

What they say of keys holds for those numbers alone. Their fidelity is therefore that of the keys
that they were made from, as they come out of the store: behind a lossy codec, of decoded ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvlib.blocks import KVBlock
from kvlib.codecs.container import (
    Buffer,
    Container,
    Flag,
    LayerShape,
    Section,
    SectionFlag,
    SectionKind,
    build_container,
)
from kvlib.codecs.pack import KIND_CODES, writer_text
from kvlib.errors import CodecError, CorruptDataError, ShapeError
from kvlib.keys import BLOCK_TOKENS, BlockKey, StoreKey
from kvlib.spec import DTYPES, EXACT, KVSpec, storage_fingerprint
from kvlib.store.abstracts import AbstractForm
from kvlib.store.directory import Directory, Found, Identity
from kvlib.store.heads import local_spec
from kvlib.store.records import groups_to_write

if TYPE_CHECKING:
    from kvlib.codecs import Codec
    from kvlib.store.abstract_maker import AbstractMaker
    from kvlib.store.heads import HeadRange
    from kvlib.store.rules import Relief, Rules
    from kvlib.store.stack import TierStack
    from kvlib.store.terms import Terms
    from kvlib.store.writes import Writer

__all__ = ["AbstractRecords", "Abstracts"]


@dataclass(frozen=True, slots=True, eq=False)
class Abstracts:
    """Abstracts of whole blocks.

    Attributes:
        form: what they are.
        start: first token, a multiple of 64.
        layers: of every layer, uint8 [tokens / form.unit, row bytes] on the CPU.
    """

    form: AbstractForm
    start: int
    layers: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that they stand for."""
        return len(self.layers[0]) * self.form.unit if self.layers else 0

    @property
    def stop(self) -> int:
        """The token after the last one."""
        return self.start + self.num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for layer in self.layers)

    def slice(self, start: int, stop: int) -> "Abstracts":
        """Those of tokens [start, stop), whole blocks of them: views."""
        first, last = ((at - self.start) // self.form.unit for at in (start, stop))
        return Abstracts(self.form, start, tuple(layer[first:last] for layer in self.layers))


class AbstractRecords:
    """The part of a `KVStore` that keeps abstracts."""

    if TYPE_CHECKING:  # what the store has
        head_range: HeadRange
        _codecs: dict[str, Codec]
        _directory: Directory
        _mac_key: bytes | None
        _maker: AbstractMaker | None
        _relief: Relief
        _rules: Rules
        _stack: TierStack
        _writer: Writer

        def _begin(self, spec: KVSpec) -> None: ...
        def _spoilt(self, key: StoreKey) -> None: ...

    @property
    def gives_back(self) -> bool:
        """Whether exact blocks come back as they were put, from some tier at least."""
        return any(codec.lossless for codec in self._codecs.values())

    def _put_made(
        self, spec: KVSpec, keys: Sequence[BlockKey], block: KVBlock, terms: "Terms"
    ) -> None:
        """Store the abstracts of exact blocks that were put, if the store shall make them."""
        if self._maker is None or not self.gives_back:
            return
        identity = self._identity(spec, self._maker.form, EXACT)
        mine = keys[block.start // BLOCK_TOKENS : block.stop // BLOCK_TOKENS]
        made = self._maker.make(spec, block) if self._writer.missing(identity, mine) else None
        if made is not None:
            self._put_abstracts(spec, keys, made, EXACT, terms)

    def put_abstracts(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        abstracts: Abstracts,
        *,
        fidelity: str = EXACT,
        ttl: float | str | None = None,
    ) -> int:
        """Store the abstracts of blocks, unless they are stored; the blocks themselves may not be.

        Args:
            spec: what the numbers mean.
            keys: of the prompt's blocks from its start, at least to the end of `abstracts`.
            abstracts: of all layers, whole blocks.
            fidelity: of the keys that they were made from, as `Loaded.fidelity` says it of blocks
                whose `Loaded.ancestors` are exact. Those of other blocks are not stored: what they
                went through has no name.
            ttl: see `KVStore.put`.

        Returns:
            Blocks whose abstracts were stored now; want of room is no error.

        Raises:
            ShapeError: not of whole blocks, or not of this model's layers.
        """
        self._begin(spec)
        return self._put_abstracts(spec, keys, abstracts, fidelity, self._rules.terms(ttl, None))

    def _put_abstracts(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        abstracts: Abstracts,
        fidelity: str,
        terms: "Terms",
    ) -> int:
        form = abstracts.form
        first, last = abstracts.start // BLOCK_TOKENS, abstracts.stop // BLOCK_TOKENS
        shapes = [(x.num_kv_heads, x.k_head_dim) for x in self._shapes(spec).layers]
        rows = abstracts.num_tokens // form.unit
        if (
            abstracts.start % BLOCK_TOKENS
            or abstracts.stop % BLOCK_TOKENS
            or last > len(keys)
            or [(x.dtype, *x.shape) for x in abstracts.layers]
            != [(torch.uint8, rows, form.row_bytes(*shape)) for shape in shapes]
        ):
            raise ShapeError(
                f"cannot store abstracts {form.text} of tokens [{abstracts.start}, "
                f"{abstracts.stop}) and {len(abstracts.layers)} layers under {len(keys)} keys: "
                f"expected uint8 rows of whole blocks over {len(shapes)} layers"
            )
        identity = self._identity(spec, form, fidelity)
        stored = 0
        missing = self._writer.missing(identity, keys[first:last])
        for group in reversed(groups_to_write([first + i for i in missing])):
            mine = tuple(keys[i] for i in group)
            part = abstracts.slice(group[0] * BLOCK_TOKENS, (group[-1] + 1) * BLOCK_TOKENS)
            encode = partial(self._encode, spec, part, mine, identity)
            key = StoreKey(mine[0], identity.storage)
            stored += self._writer.record(key, mine, encode, terms=terms).stored
        self._relief.look()
        return stored

    def load_abstracts(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        form: AbstractForm,
        *,
        fidelity: str = EXACT,
        start: int = 0,
    ) -> Abstracts | None:
        """Read the stored abstracts of a prompt's leading blocks, and nothing else of them.

        Args:
            spec: what the numbers mean.
            keys: of the prompt's blocks, from its start.
            form: which abstracts.
            fidelity: of the keys that they were made from, see `put_abstracts`.
            start: first block that is wanted; what comes before is not looked at.

        Returns:
            Verified ones of blocks `start` and on, as far as there are; None if there are none.
            What is damaged ends them there, is counted and dropped.
        """
        self._begin(spec)
        identity = self._identity(spec, form, fidelity)
        parts: list[list[Tensor]] = []
        for found in self._directory.run([identity], keys[start:]):
            rows = self._read(spec, form, identity, found, start)
            if rows is None:
                break
            parts.append(rows)
        if not parts:
            return None
        layers = tuple(torch.cat(rows) for rows in zip(*parts, strict=True))
        return Abstracts(form, start * BLOCK_TOKENS, layers)

    def _shapes(self, spec: KVSpec) -> KVSpec:
        return local_spec(spec, self.head_range)

    def _identity(self, spec: KVSpec, form: AbstractForm, fidelity: str) -> Identity:
        storage = storage_fingerprint(
            spec,
            form.text,
            fidelity=fidelity,
            head_range=self.head_range,
            profile=form.profile,
        )
        return Identity(fidelity, form.text, lossless=False, storage=storage)

    def _layer_shapes(self, spec: KVSpec) -> tuple[LayerShape, ...]:
        return tuple(
            LayerShape(i, x.num_kv_heads, x.k_head_dim, x.v_head_dim, 0, KIND_CODES[x.kind])
            for i, x in enumerate(self._shapes(spec).layers)
        )

    def _encode(
        self, spec: KVSpec, part: Abstracts, keys: Sequence[BlockKey], identity: Identity
    ) -> list[Buffer]:
        sections = [
            Section(
                SectionKind.CODEC,
                index,
                layer.nbytes,
                (layer.contiguous().numpy().reshape(-1).data,),
                SectionFlag.RAW,
            )
            for index, layer in enumerate(part.layers)
        ]
        return build_container(
            sections,
            spec_fingerprint=spec.fingerprint(),
            storage_fingerprint=identity.storage,
            start=part.start,
            num_tokens=part.num_tokens,
            dtype_code=DTYPES[spec.dtype].code,
            codec=part.form.text,
            layers=self._layer_shapes(spec),
            keys=keys,
            flags=_flags(part.form),
            fidelity=identity.ancestors,
            head_range=self.head_range,
            profile=part.form.profile,
            writer=writer_text(),
            mac_key=self._mac_key,
        )

    def _read(
        self, spec: KVSpec, form: AbstractForm, identity: Identity, found: Found, start: int
    ) -> list[Tensor] | None:
        """The rows of a record's leading blocks that are ours, layer by layer; None for a miss."""
        data, _ = self._stack.read(found.key)
        if data is None:
            self._directory.forget(found.key)
            return None
        try:
            # Verified once more, wherever it comes from: it is little, and nothing behind it would
            # notice that other leaves are chosen.
            container = Container(data, mac_key=self._mac_key)
            container.verify()
            if container.header.keys != found.held:  # written again with other blocks
                self._directory.forget(found.key)
                return None
            return self._rows(spec, form, identity, container, found, start)
        except (CodecError, ShapeError):
            self._spoilt(found.key)
            return None

    def _rows(
        self,
        spec: KVSpec,
        form: AbstractForm,
        identity: Identity,
        container: Container,
        found: Found,
        start: int,
    ) -> list[Tensor]:
        header = container.header
        held = len(found.held) * BLOCK_TOKENS
        said = (
            header.start,
            header.num_tokens,
            header.codec,
            header.profile,
            header.fidelity,
            header.head_range,
            header.layers,
            header.spec_fingerprint,
            header.dtype_code,
            header.flags & ~Flag.MAC,
            [(s.kind, s.layer_idx, s.flags, s.raw_bytes - s.stored_bytes) for s in header.sections],
        )
        want = (
            (start + found.first) * BLOCK_TOKENS,
            held,
            form.text,
            form.profile,
            identity.ancestors,
            self.head_range,
            self._layer_shapes(spec),
            spec.fingerprint(),
            DTYPES[spec.dtype].code,
            _flags(form),
            [(SectionKind.CODEC, i, SectionFlag.RAW, 0) for i in range(spec.num_layers)],
        )
        if said != want:
            raise CorruptDataError("a record of abstracts that says something else than its name")
        ours = found.count * BLOCK_TOKENS // form.unit
        rows = []
        for shape in header.layers:
            info, data = container.read(SectionKind.CODEC, shape.layer_idx)
            width = form.row_bytes(shape.num_kv_heads, shape.k_head_dim)
            if info.stored_bytes != held // form.unit * width:
                raise CorruptDataError(
                    f"layer {shape.layer_idx}: {info.stored_bytes} bytes of abstracts of {held} "
                    f"tokens; expected {held // form.unit * width}"
                )
            found_rows = np.frombuffer(data, np.uint8)[: ours * width].reshape(ours, width)
            rows.append(torch.from_numpy(found_rows.copy()))
        return rows


def _flags(form: AbstractForm) -> Flag:
    return Flag.PROFILE_NEEDED if form.profile else Flag(0)
