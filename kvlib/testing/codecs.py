# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S101 (these are tests)
"""The tests that every codec passes: an outside codec's author subclasses `CodecContract`."""

import gc
import itertools
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvlib.blocks import SYNTHETIC, KVBlock, LayerKV, Row
from kvlib.codecs import Codec, Container, decode_block, describe_codec, encode_block
from kvlib.errors import CodecError, CorruptDataError, UnsupportedInputError
from kvlib.keys import BLOCK_TOKENS
from kvlib.registry import identity
from kvlib.spec import DTYPES, KVSpec, LayerKind, LayerSpec
from kvlib.testing.strategies import CONTENTS, Content, draw_numbers

__all__ = ["CodecContract", "sample_blocks", "sample_spec"]

_TOKENS = (0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1)


def sample_spec(dtype: str) -> KVSpec:
    """A hybrid model: even and odd head dims, keys wider than values, one channel, MLA."""
    shapes = ((2, 8, 8), (3, 5, 3), (1, 1, 1), (2, 33, 64), (1, 4, 0))
    layers = [LayerSpec(num_kv_heads=h, k_head_dim=k, v_head_dim=v) for h, k, v in shapes]
    mla = LayerSpec(kind=LayerKind.MLA, num_kv_heads=1, k_head_dim=20, v_head_dim=0)
    return KVSpec(model_id="contract", layers=(*layers, mla), dtype=dtype)


def sample_blocks(
    dtype: str, *, tokens: tuple[int, ...] = _TOKENS, contents: tuple[Content, ...] = CONTENTS
) -> Iterator[tuple[str, KVBlock]]:
    """Named blocks of `sample_spec`: dense of every length and content, evicted, ragged, pruned."""
    spec = sample_spec(dtype)
    for seed, (n, content) in enumerate(itertools.product(tokens, contents)):
        rng = np.random.default_rng(seed)
        pairs = [
            (
                draw_numbers(rng, (x.num_kv_heads, n, x.k_head_dim), dtype, content),
                draw_numbers(rng, (x.num_kv_heads, n, x.v_head_dim), dtype, content),
            )
            for x in spec.layers
        ]
        dense = KVBlock.dense(spec, pairs, start=BLOCK_TOKENS)
        yield f"dense of {n}, {content}", dense
        if n:
            ragged = tuple(_evict(layer, rng) for layer in dense.layers)
            yield f"evicted from {n}, {content}", replace(dense, layers=ragged)


def _evict(layer: LayerKV, rng: np.random.Generator) -> LayerKV:
    """Some entries of each head, a synthetic one, weights and fewer channels by turns."""
    n = layer.lengths[0]
    odd = layer.layer_idx % 2 == 1
    rows = []
    for head, row in enumerate(layer.rows()):
        size = n if head == 1 else int(rng.integers(0, n + 1))
        index = torch.from_numpy(np.sort(rng.permutation(n)[:size]))
        positions = row.positions[index].clone()
        if odd and size:
            positions[-1] = SYNTHETIC
        weight = torch.from_numpy(rng.standard_normal(size, dtype=np.float32)) if odd else None
        rows.append(Row(row.keys[index], row.values[index], positions, weight))
    evicted = LayerKV.from_rows(layer.layer_idx, rows)
    width = layer.keys.shape[-1]
    if odd or width < 2:
        return evicted
    lists = [np.sort(rng.permutation(width)[: width // 2]) for _ in rows]
    channels = torch.from_numpy(np.stack(lists).astype(np.int64))
    pruned = [
        row._replace(keys=row.keys[:, kept])
        for row, kept in zip(evicted.rows(), channels, strict=True)
    ]
    return LayerKV.from_rows(layer.layer_idx, pruned, channels=channels)


def _matrices(block: KVBlock) -> Iterator[Tensor]:
    for layer in block.layers:
        yield layer.keys
        yield layer.values


def _bits(x: Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""


class CodecContract:
    """Subclass this in a test file, and give the fixture `codec`; pytest runs the rest.

    A lossy codec also overrides `max_error` with the bound its documentation promises. Every test
    reads what it wrote with the codec at hand, so the codec need not be registered.
    """

    @pytest.fixture
    def codec(self) -> Codec:
        """The codec under test."""
        raise NotImplementedError("a codec contract needs the fixture `codec`")

    def blocks(
        self,
        codec: Codec,
        *,
        tokens: tuple[int, ...] = (5,),
        contents: tuple[Content, ...] = ("normal", "bits"),
    ) -> Iterator[tuple[str, KVBlock]]:
        """`sample_blocks` of every element type that the codec takes."""
        for dtype in DTYPES:
            if self.takes(codec, dtype):
                yield from sample_blocks(dtype, tokens=tokens, contents=contents)

    def takes(self, codec: Codec, dtype: str) -> bool:
        """Whether the codec takes that element type; if not, it must say so."""
        block = next(block for _, block in sample_blocks(dtype, tokens=(2,), contents=("normal",)))
        try:
            codec.encode(block)
        except UnsupportedInputError:
            return False
        return True

    def max_error(self, codec: Codec, x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """Largest |decoded - x| allowed, float64 of `x`'s shape [..., T, D]; NaN: the bits of `x`.

        None means that every bit must come back, as it must with a lossless codec.
        """
        if codec.lossless:
            return None
        raise NotImplementedError(f"{codec.name} is lossy: override max_error with its bound")

    def encode(self, codec: Codec, block: KVBlock, **options: Any) -> bytes:
        """A container in one piece."""
        return b"".join(encode_block(block, codec, **options))

    def decode(self, codec: Codec, data: Any, spec: KVSpec, **options: Any) -> KVBlock:
        """Decode with the codec at hand, registered or not."""

        def find(text: str) -> Codec:
            assert text == describe_codec(codec)
            return codec

        return decode_block(data, spec, codec_for=find, **options)

    def check_block(self, codec: Codec, block: KVBlock, decoded: KVBlock) -> None:
        """Everything but keys and values is equal; those are within the bound."""
        assert (decoded.start, decoded.num_tokens) == (block.start, block.num_tokens)
        assert [x.layer_idx for x in decoded.layers] == [x.layer_idx for x in block.layers]
        for theirs, mine in zip(decoded.layers, block.layers, strict=True):
            assert theirs.row_lengths == mine.row_lengths
            assert type(theirs.positions) is type(mine.positions)
            assert replace(theirs, keys=mine.keys, values=mine.values).equal(mine)
        for y, x in zip(_matrices(decoded), _matrices(block), strict=True):
            self.check_matrix(codec, x, y)

    def check_matrix(self, codec: Codec, x: Tensor, y: Tensor) -> None:
        """`y` is what `x` may decode to."""
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        bound = self.max_error(codec, x) if x.numel() else None
        if bound is None:
            assert _bits(x) == _bits(y)
            return
        assert bound.shape == tuple(x.shape)
        exact = np.isnan(bound)
        wide = np.frombuffer(_bits(x), np.uint8).reshape(*x.shape, -1)
        seen = np.frombuffer(_bits(y), np.uint8).reshape(*x.shape, -1)
        assert (wide[exact] == seen[exact]).all()
        error = np.abs(y.double().numpy()[~exact] - x.double().numpy()[~exact])
        assert (error <= bound[~exact]).all(), float(np.max(error - bound[~exact]))

    def test_declares_itself(self, codec: Codec) -> None:
        """A codec is a frozen dataclass with name, version, status and losslessness."""
        assert isinstance(codec, Codec)
        assert is_dataclass(codec)
        assert codec.name
        assert codec.version >= 1
        assert codec.status in ("stable", "experimental")
        assert isinstance(codec.lossless, bool)
        for field in fields(codec):
            with pytest.raises(FrozenInstanceError):
                setattr(codec, field.name, getattr(codec, field.name))

    def test_configuration_is_text(self, codec: Codec) -> None:
        """Every parameter is in the canonical string; an equal codec has the same string."""
        assert is_dataclass(codec)
        text = describe_codec(codec)
        assert text.startswith(f"{codec.name}@{codec.version}")
        twin = type(codec)(**{f.name: getattr(codec, f.name) for f in fields(codec) if f.init})
        assert twin == codec
        assert describe_codec(twin) == text
        assert identity(codec) == text.replace(f"@{codec.version}", "", 1)

    def test_refuses_other_dtypes_by_name(self, codec: Codec) -> None:
        """Some element type is taken; the refusal of another names it."""
        taken = [dtype for dtype in DTYPES if self.takes(codec, dtype)]
        assert taken
        for dtype in set(DTYPES) - set(taken):
            for _, block in sample_blocks(dtype, tokens=(2,), contents=("normal",)):
                with pytest.raises(UnsupportedInputError, match=dtype):
                    codec.encode(block)

    def test_round_trip(self, codec: Codec) -> None:
        """Blocks of every form, length and content come back, within the bound."""
        for name, block in self.blocks(codec, tokens=_TOKENS, contents=CONTENTS):
            data = self.encode(codec, block)
            decoded = self.decode(codec, data, block.spec)
            try:
                self.check_block(codec, block, decoded)
            except AssertionError as exc:
                exc.add_note(name)
                raise

    def test_never_grows(self, codec: Codec) -> None:
        """A container is no larger than the block's own bytes, its header and padding."""
        for _, block in self.blocks(codec, tokens=_TOKENS):
            data = self.encode(codec, block)
            header = Container(data).header
            sections = len(header.sections) + 1
            for info in header.sections:
                assert info.stored_bytes <= info.raw_bytes
            room = sections * (header.alignment - 1)
            assert len(data) <= header.header_bytes + block.nbytes + room

    def test_raw_sections_are_exact(self, codec: Codec) -> None:
        """Where a codec stepped aside, every bit comes back, also from a lossy one."""
        for _, block in self.blocks(codec, contents=CONTENTS):
            container = Container(self.encode(codec, block))
            decoded = self.decode(codec, container, block.spec)
            for layer, back in zip(block.layers, decoded.layers, strict=True):
                for x, y, kind in ((layer.keys, back.keys, 1), (layer.values, back.values, 2)):
                    info = next(
                        s
                        for s in container.header.sections
                        if (s.kind, s.layer_idx) == (kind, layer.layer_idx)
                    )
                    if info.flags:
                        assert _bits(x) == _bits(y)

    def test_deterministic(self, codec: Codec) -> None:
        """The same block gives the same bytes, call after call and on many threads at once."""
        blocks = [block for _, block in self.blocks(codec, tokens=(1, BLOCK_TOKENS))]
        expected = [self.encode(codec, block) for block in blocks]
        decoded = [
            self.decode(codec, data, block.spec)
            for data, block in zip(expected, blocks, strict=True)
        ]
        with ThreadPoolExecutor(4) as pool:
            again = list(pool.map(lambda b: self.encode(codec, b), blocks * 2))
            back = list(pool.map(lambda d, b: self.decode(codec, d, b.spec), expected, blocks))
        assert again == expected * 2
        assert all(x.equal(y) for x, y in zip(back, decoded, strict=True))

    def test_layout_does_not_matter(self, codec: Codec) -> None:
        """Views with other strides encode to the same bytes as contiguous tensors."""
        for _, block in self.blocks(codec):
            layers = []
            for layer in block.layers:
                strided = []
                for x in (layer.keys, layer.values):
                    wide = torch.zeros((*x.shape[:-1], x.shape[-1] * 2 + 1), dtype=x.dtype)
                    view = wide[..., 1::2]
                    view.copy_(x)
                    strided.append(view)
                layers.append(replace(layer, keys=strided[0], values=strided[1]))
            other = replace(block, layers=tuple(layers))
            assert self.encode(codec, other) == self.encode(codec, block)

    def test_input_is_left_alone(self, codec: Codec) -> None:
        """Encoding does not change its input, and once joined its bytes do not depend on it."""
        for name, block in self.blocks(codec, tokens=(0, 5)):
            before = [_bits(x) for x in _matrices(block)]
            data = self.encode(codec, block)
            assert [_bits(x) for x in _matrices(block)] == before, name
            decoded = self.decode(codec, data, block.spec)
            for x in _matrices(block):
                x.copy_(draw_numbers(np.random.default_rng(9), x.shape, block.spec.dtype, "bits"))
            assert decoded.equal(self.decode(codec, data, block.spec)), name

    def test_keeps_nothing(self, codec: Codec) -> None:
        """When the pieces are gone, neither the codec nor a container holds the input's memory."""
        for _, block in self.blocks(codec, contents=("normal",)):
            layers, held = [], []
            for layer in block.layers:
                pair = []
                for x in (layer.keys, layer.values):
                    memory = np.frombuffer(_bits(x) or bytes(4), np.uint8).copy()
                    held.append(weakref.ref(memory))
                    y = torch.from_numpy(memory).view(x.dtype)
                    pair.append(y.reshape(x.shape) if x.numel() else x)
                    del memory, y
                layers.append(replace(layer, keys=pair[0], values=pair[1]))
            data = self.encode(codec, replace(block, layers=tuple(layers)))
            assert any(ref() is not None for ref in held)
            del layers, pair
            assert all(ref() is None for ref in held)
            self.decode(codec, data, block.spec)

    def test_result_aliases_nothing(self, codec: Codec) -> None:
        """A decoded block is its own: changes elsewhere are unseen."""
        for _, block in self.blocks(codec):
            data = bytearray(self.encode(codec, block))
            first = self.decode(codec, data, block.spec)
            second = self.decode(codec, data, block.spec)
            assert first.equal(second)
            for layer in second.layers:
                tensors = [layer.keys, layer.values, layer.log_weight, layer.channels]
                if isinstance(layer.positions, Tensor):
                    tensors.append(layer.positions)
                for x in tensors:
                    if x is not None:
                        x.zero_()
            third = self.decode(codec, data, block.spec)
            assert first.equal(third)
            data[:] = bytes(len(data))
            data.clear()  # raises BufferError if a view of it were kept
            assert first.equal(third)

    def test_lends_what_is_stored_raw(self, codec: Codec) -> None:
        """With `lend`, the same numbers; checked as ever, and for as long as somebody uses them."""
        for name, block in self.blocks(codec):
            data = self.encode(codec, block)
            expected = self.decode(codec, data, block.spec)
            lent = self.decode(codec, bytes(data), block.spec, lend=True)
            gc.collect()
            assert lent.equal(expected), name
            middle = len(data) // 2
            spoilt = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            with pytest.raises(CodecError):
                self.decode(codec, spoilt, block.spec, lend=True)

    def test_decodes_into_strided_views(self, codec: Codec) -> None:
        """With `out`, numbers land in the given views and nowhere else."""
        for name, block in self.blocks(codec, tokens=(1, 5)):
            if not all(layer.is_dense for layer in block.layers):
                continue
            data = self.encode(codec, block)
            expected = self.decode(codec, data, block.spec)
            frames, out = [], {}
            for layer in block.layers:
                pair = []
                for x in (layer.keys, layer.values):
                    h, t, d = x.shape
                    frame = torch.zeros((t + 2, h + 1, d + 3), dtype=torch.float32)
                    frame = (frame + 1.0).to(x.dtype)  # tokens first, as in an engine's pages
                    pair.append(frame[1 : t + 1, :h, 2 : d + 2].transpose(0, 1))
                    frames.append((frame, pair[-1]))
                out[layer.layer_idx] = (pair[0], pair[1])
            decoded = self.decode(codec, data, block.spec, out=out)
            assert decoded.equal(expected), name
            for layer in decoded.layers:
                assert layer.keys is out[layer.layer_idx][0]
                assert layer.values is out[layer.layer_idx][1]
            for frame, view in frames:
                view.fill_(1.0)
                assert (frame.float() == 1.0).all(), name

    def test_reads_only_the_layers_asked_for(self, codec: Codec) -> None:
        """`layers=` neither verifies nor reads other layers; what is asked for is verified."""
        _, block = next(self.blocks(codec, contents=("normal",)))
        data = self.encode(codec, block)
        whole = self.decode(codec, data, block.spec)
        sections = [s for s in Container(data).header.sections if s.stored_bytes]
        for info in sections:
            mutant = bytearray(data)
            mutant[info.offset] ^= 1
            others = [x.layer_idx for x in block.layers if x.layer_idx != info.layer_idx]
            part = self.decode(codec, mutant, block.spec, layers=others)
            assert [x.layer_idx for x in part.layers] == others
            for layer in part.layers:
                assert layer.equal(whole.layers[layer.layer_idx])
            for wanted in ([info.layer_idx], None):
                with pytest.raises(CorruptDataError):
                    self.decode(codec, mutant, block.spec, layers=wanted)

    def test_executor_changes_nothing(self, codec: Codec) -> None:
        """Decoding layers on threads gives the same block, and the same errors."""
        with ThreadPoolExecutor(3) as pool:
            for _, block in self.blocks(codec):
                data = self.encode(codec, block)
                threaded = self.decode(codec, data, block.spec, executor=pool)
                assert threaded.equal(self.decode(codec, data, block.spec))
            mutant = bytearray(data)
            last = [s for s in Container(data).header.sections if s.stored_bytes][-1]
            mutant[last.offset] ^= 1
            with pytest.raises(CorruptDataError):
                self.decode(codec, mutant, block.spec, executor=pool)

    def test_foreign_sections_are_refused(self, codec: Codec) -> None:
        """Sections cut, grown or overwritten, under right checksums, are errors or other numbers.

        Never another exception: whoever can write a record can write its checksums.
        """
        _, block = next(self.blocks(codec, tokens=(9,), contents=("normal",)))
        original = {(s.kind, s.layer_idx): s for s in codec.encode(block)}
        rng = np.random.default_rng(0)
        for (kind, layer_idx), section in original.items():
            body = b"".join(bytes(part) for part in section.parts)
            for change in range(24):
                mutant = bytearray(body)
                if change < 8:
                    mutant = mutant[: len(mutant) * change // 8]
                elif change < 12:
                    mutant += bytes(change - 7)
                elif mutant:
                    at = int(rng.integers(len(mutant)))
                    mutant[at : at + 4] = rng.bytes(min(4, len(mutant) - at))
                forged = replace(section, parts=(bytes(mutant),))
                sections = {**original, (kind, layer_idx): forged}
                replay: Any = _Replay(codec, list(sections.values()))
                data = self.encode(replay, block)
                try:
                    decoded = self.decode(codec, data, block.spec)
                except CodecError:
                    continue
                for x, y in zip(_matrices(decoded), _matrices(block), strict=True):
                    assert x.shape == y.shape


class _Replay:
    """A codec that writes given sections under another's name."""

    def __init__(self, codec: Codec, sections: list[Any]) -> None:
        self._codec = codec
        self._sections = sections

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def encode(self, block: KVBlock) -> list[Any]:
        return self._sections
