# SPDX-License-Identifier: Apache-2.0
"""The contract over every registered codec, and over one from outside."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from kvlib.codecs import (
    CODECS,
    Section,
    build_codec,
    codec_from_canonical,
    decode_block,
    describe_codec,
    encode_block,
)
from kvlib.codecs.base import CodecCaps
from kvlib.codecs.container import SectionFlag, SectionKind
from kvlib.errors import CorruptDataError
from kvlib.registry import describe
from kvlib.testing.codecs import CodecContract
from kvlib.testing.models import random_block, tiny_spec
from tests.oracles import fixed_rate

ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def integer_bound(codec, x):
    """step / 2 and one rounding to the dtype, by the documented formula in float64.

    The step is the least float16 that covers a group from its minimum's float16 below; so it is at
    most one float16 spacing above the real one. 2**-10 of it is float32's share in the quotient.
    """
    wide = x.double().numpy()
    rows = wide.reshape(-1, wide.shape[-1])
    if not np.isfinite(rows).all() or np.abs(rows).max() > 65504:
        return np.full(wide.shape, np.nan)  # stored raw
    bound = np.empty_like(rows)
    for first in range(0, rows.shape[1], codec.group):
        part = slice(first, first + codec.group)
        low, high = rows[:, part].min(1), rows[:, part].max(1)
        floor = low - np.maximum(np.abs(low) * 2.0**-10, 2.0**-24)
        step = (high - floor) / (2**codec.bits - 1)
        step = step + np.maximum(step * 2.0**-10, 2.0**-24)
        size = np.maximum(np.abs(floor), np.abs(high)) + step
        rounding = np.maximum(size * ULP[x.dtype], SMALLEST[x.dtype])
        bound[:, part] = (step * (0.5 + 2.0**-12) + rounding)[:, None]
    return bound.reshape(wide.shape)


BOUNDS = {"int4": integer_bound, "int8": integer_bound}


def fp8_bound(codec, rows, lengths, layer_idx, kind):
    """Half a unit in the last place, or of the least number; beyond the top of a format all."""
    found = fixed_rate.fp8(rows, lengths, codec.format, codec.scale)
    return None if found is None else found[1] * (1 + 2.0**-20)


def kivi_bound(codec, rows, lengths, layer_idx, kind):
    """Half a step, as for the integers; the residual is exact."""
    found = fixed_rate.kivi(rows, lengths, kind == 0, codec.bits, codec.group, codec.residual)
    return None if found is None else found[1] * (0.5 + 2.0**-12)


def hadamard_bound(codec, rows, lengths, layer_idx, kind):
    """The distance of the turned vector to its levels; twice that if its norm is corrected."""
    turn = fixed_rate.rotation(layer_idx, kind, rows.shape[1])
    found = fixed_rate.hadamard(rows, turn, LEVELS[codec.bits], codec.correct)
    if found is None:
        return None
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.broadcast_to(found[1] + size * 2.0**-18, rows.shape)


LEVELS = {bits: fixed_rate.lloyd_max(bits, 2000) for bits in (2, 3, 4)}
ROW_BOUNDS = {"fp8": fp8_bound, "kivi": kivi_bound, "hadamard": hadamard_bound}


def row_bound(codec, x, layer, kind):
    """The bound of a codec that looks at rows, and one rounding to the dtype; NaN where exact."""
    rows = x.double().reshape(-1, x.shape[-1]).numpy()
    bound = ROW_BOUNDS[codec.name](codec, rows, layer.lengths, layer.layer_idx, kind)
    if bound is None:
        return np.full(tuple(x.shape), np.nan)  # stored raw
    size = np.abs(rows) + bound
    rounding = np.maximum(size * (ULP[x.dtype] + 2.0**-22), SMALLEST[x.dtype])
    return (bound + rounding).reshape(tuple(x.shape))


class KnowsRows(CodecContract):
    """The contract, for bounds that need to know whose rows a matrix holds."""

    def check_block(self, codec, block, decoded):
        self.places = {
            id(x): (layer, kind)
            for layer in block.layers
            for kind, x in enumerate((layer.keys, layer.values))
        }
        super().check_block(codec, block, decoded)

    def max_error(self, codec, x):
        return row_bound(codec, x, *self.places[id(x)])


class TestRegisteredCodecs(KnowsRows):
    # cachegen needs a profile; test_kvlc.py has the contract of each preset.
    @pytest.fixture(params=[n for n in CODECS.names() if n not in ("cachegen", "kvlc")])
    def codec(self, request):
        return build_codec(request.param)

    def max_error(self, codec, x):
        if codec.lossless:
            return None
        if codec.name in ROW_BOUNDS:
            return super().max_error(codec, x)
        assert codec.name in BOUNDS, f"{codec.name} is lossy: give its bound in BOUNDS"
        return BOUNDS[codec.name](codec, x)

    def test_text_builds_an_equal_codec(self, codec):
        """A codec's text, and its canonical string in a header, build the codec again."""
        assert build_codec(describe(codec)) == codec
        assert codec_from_canonical(describe_codec(codec)) == codec
        assert codec.name in CODECS.names()

    def test_readers_find_the_codec(self, codec):
        """Without `codec_for`, the codec is found by what the header says."""
        block = random_block(tiny_spec(), 7)
        data = b"".join(encode_block(block, codec))
        assert decode_block(data, block.spec).equal(self.decode(codec, data, block.spec))


class TestOtherGroups(CodecContract):
    @pytest.fixture(params=["int4:group=3", "int8:group=1024"])
    def codec(self, request):
        return build_codec(request.param)

    def max_error(self, codec, x):
        return integer_bound(codec, x)


class TestOtherFixedRates(KnowsRows):
    @pytest.fixture(
        params=[
            "fp8:scale=none",
            "fp8:format=e5m2,scale=token",
            "kivi:bits=2,group=3,residual=2",
            "kivi:bits=3,group=1024",
            "hadamard:bits=2,correct=false",
            "hadamard:bits=3",
        ]
    )
    def codec(self, request):
        return build_codec(request.param)


@dataclass(frozen=True)
class NegatedCodec:
    """A codec that somebody else might write: every byte inverted, one secret for all layers."""

    name: ClassVar[str] = "negated"
    version: ClassVar[int] = 3
    status: ClassVar[str] = "experimental"
    lossless: ClassVar[bool] = True

    mask: int = 255

    def caps(self, spec):
        return CodecCaps()

    def encode(self, block):
        sections = [Section(SectionKind.CODEC, 0xFFFF, 0, (bytes([self.mask]),))]
        for layer in block.layers:
            for kind, x in ((SectionKind.KEYS, layer.keys), (SectionKind.VALUES, layer.values)):
                raw = x.contiguous().flatten().view(torch.uint8).numpy() if x.numel() else None
                parts = () if raw is None else ((raw ^ self.mask).tobytes(),)
                size = x.numel() * x.element_size()
                sections.append(Section(kind, layer.layer_idx, size, parts, SectionFlag(0)))
        return sections

    def decode(self, container, spec, layers):
        _, secret = container.read(SectionKind.CODEC, 0xFFFF)
        if bytes(secret) != bytes([self.mask]):
            raise CorruptDataError("another mask")
        tensors = [
            (kind, layer.layer_idx, x)
            for layer in layers
            for kind, x in ((SectionKind.KEYS, layer.keys), (SectionKind.VALUES, layer.values))
        ]
        for kind, layer_idx, out in tensors:
            _, data = container.read(kind, layer_idx)
            if data.nbytes != out.numel() * out.element_size():
                raise CorruptDataError("another size")
            if out.numel():
                raw = torch.from_numpy(np.frombuffer(data, np.uint8) ^ self.mask)
                out.copy_(raw.view(out.dtype).reshape(out.shape))


class TestOutsideCodec(CodecContract):
    @pytest.fixture
    def codec(self):
        return NegatedCodec()

    def test_never_grows(self, codec):
        """Its one byte of side information is the only thing it adds."""
        for _, block in self.blocks(codec):
            sizes = [s.stored_bytes for s in codec.encode(block)]
            assert sum(sizes) == 1 + sum(s.raw_bytes for s in codec.encode(block))

    def test_reads_only_the_layers_asked_for(self, codec):
        """The section that all layers share is verified whichever layer is read."""
        block = random_block(tiny_spec(), 3)
        data = bytearray(self.encode(codec, block))
        at = data.rindex(b"\xff" + bytes(7))  # the last section, and its padding
        data[at] ^= 1
        for layer in (0, 1):
            with pytest.raises(CorruptDataError):
                self.decode(codec, data, block.spec, layers=[layer])


def test_a_lossy_codec_without_a_bound_fails_the_contract():
    """The contract does not let a lossy codec pass without saying how lossy it is."""
    contract = CodecContract()
    x = torch.ones((1, 2, 4))
    with pytest.raises(NotImplementedError, match="max_error"):
        contract.check_matrix(build_codec("int4"), x, x)


def test_contract_catches_a_wrong_codec():
    """One wrong bit, or a tensor of NaN instead of a number, does not pass."""
    contract = TestRegisteredCodecs()
    x = torch.linspace(-1, 1, 64).reshape(1, 2, 32)
    for name in ("exact", "int4", "int8"):
        codec = build_codec(name)
        for wrong in (float("nan"), 0.2 + float(x[0, 1, 3])):
            y = x.clone()
            y[0, 1, 3] = wrong
            with pytest.raises(AssertionError):
                contract.check_matrix(codec, x, y)
    y = x.clone()
    y.view(torch.int32)[0, 0, 0] ^= 1
    with pytest.raises(AssertionError):
        contract.check_matrix(build_codec("exact"), x, y)
