# SPDX-License-Identifier: Apache-2.0
"""Vector instructions for compiled kernels: 16 lanes of the entropy coder at a time.

rANS fits them: lanes do not depend on each other, and those of a step that need a word take the
next ones in their order, which is what an expanding move does. In the encoder, which goes the other
way, it is a compressing one. numba does not find these by itself, so this module writes the LLVM
code of one step, and numba puts it where a kernel calls `decode_step` or `encode_step`.

`Lanes`, `Mask` and `Memory` stand for values of the kernel that is being compiled: an operator on
them adds an instruction to it. That makes a step readable, and tells nothing of the numbers: no
Python `if` can look at them. Nothing is checked here. Who calls sees to it that all of the 16
places from a given one are inside.

The instructions are those of AVX-512. `SUPPORTED` says whether numba compiles for a processor that
has them; where it does not, nothing here may be called. numba keeps its cached code apart by
processor and features, so none of it is loaded where it cannot run.
"""

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from kvlib.codecs.rans import FULL_BITS, LOWEST, WORD_BITS
from kvlib.codecs.rans_tables import MAX_ALPHABET, PRECISION, TOTAL

__all__ = [
    "SUPPORTED",
    "WIDTH",
    "Lanes",
    "Mask",
    "Memory",
    "decode_step",
    "encode_step",
    "renew",
    "step",
]

WIDTH = 16
"""Lanes of a vector."""

_BIT, _U16, _U32, _U64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_VECTOR = ir.VectorType(_U32, WIDTH)
_DOUBLES = ir.VectorType(ir.DoubleType(), WIDTH)
_PAIR: Any = types.UniTuple(types.uint64, 2)  # type: ignore[no-untyped-call]
_SLOT = TOTAL - 1
_ROW = MAX_ALPHABET.bit_length() - 1


def _supported() -> bool:
    """Whether numba's target, the host unless NUMBA_CPU_NAME names another one, has AVX-512."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return {"+avx512f", "+avx512bw", "+avx512vl"} <= set(features)


SUPPORTED = _supported()


class Lanes:
    """16 numbers of 32 bits. They have no sign and wrap around; a plain number is 16 equal ones."""

    def __init__(self, builder: Any, value: Any) -> None:
        self._builder, self.value = builder, value

    @classmethod
    def equal(cls, builder: Any, number: Any) -> "Lanes":
        """16 times the low bits of a uint64 of the kernel."""
        first = builder.insert_element(_constant(0), builder.trunc(number, _U32), _U32(0))
        return cls(builder, builder.shuffle_vector(first, first, _constant(0)))

    @classmethod
    def of(cls, builder: Any, numbers: "list[Any]") -> "Lanes":
        """16 numbers of the kernel; their low bits."""
        value = _constant(0)
        for lane, x in enumerate(numbers):
            value = builder.insert_element(value, builder.trunc(x, _U32), _U32(lane))
        return cls(builder, value)

    def number(self, lane: int) -> Any:
        """That of a lane, as a uint64 of the kernel."""
        b = self._builder
        return b.zext(b.extract_element(self.value, _U32(lane)), _U64)

    def _with(self, value: Any) -> "Lanes":
        return Lanes(self._builder, value)

    def _called(self, name: str, *others: Any) -> "Lanes":
        """An instruction that LLVM has no operator for."""
        arguments = [self.value, *others]
        kind = ir.FunctionType(_VECTOR, [x.type for x in arguments])
        function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            self._builder.module, kind, f"llvm.x86.avx512.{name}"
        )
        return self._with(self._builder.call(function, arguments))

    def __add__(self, other: "Lanes | int") -> "Lanes":
        return self._with(self._builder.add(self.value, _value(other)))

    def __sub__(self, other: "Lanes | int") -> "Lanes":
        return self._with(self._builder.sub(self.value, _value(other)))

    def __rsub__(self, other: int) -> "Lanes":
        return self._with(self._builder.sub(_value(other), self.value))

    def __mul__(self, other: "Lanes | int") -> "Lanes":
        return self._with(self._builder.mul(self.value, _value(other)))

    def __and__(self, other: "Lanes | int") -> "Lanes":
        return self._with(self._builder.and_(self.value, _value(other)))

    def __or__(self, other: "Lanes | int") -> "Lanes":
        return self._with(self._builder.or_(self.value, _value(other)))

    def __lshift__(self, bits: int) -> "Lanes":
        return self._with(self._builder.shl(self.value, _value(bits)))

    def __rshift__(self, bits: int) -> "Lanes":
        return self._with(self._builder.lshr(self.value, _value(bits)))

    def __lt__(self, other: "Lanes | int") -> "Mask":
        return self._compared("<", other)

    def __ge__(self, other: "Lanes | int") -> "Mask":
        return self._compared(">=", other)

    def __gt__(self, other: "Lanes | int") -> "Mask":
        return self._compared(">", other)

    def _compared(self, how: str, other: "Lanes | int") -> "Mask":
        return Mask(self._builder, self._builder.icmp_unsigned(how, self.value, _value(other)))

    def __floordiv__(self, other: "Lanes") -> "Lanes":
        """Divide by numbers other than 0.

        It is done in float64, where dividing rounds correctly, and that is exact: if x / f is no
        whole number and n the next one, then n - x / f >= 1 / f, so it is at least
        1 / (n f) > 1 / (x + f) > 2^-33 of n, and rounding, by 2^-53, does not get to n.
        """
        b = self._builder
        quotient = b.fdiv(b.uitofp(self.value, _DOUBLES), b.uitofp(other.value, _DOUBLES))
        return self._with(b.fptoui(quotient, _VECTOR))

    def expanded(self, mask: "Mask") -> "Lanes":
        """The first numbers, in order, where the mask is set; 0 elsewhere."""
        return self._called("mask.expand.v16i32", _constant(0), mask.value)

    def compressed(self, mask: "Mask") -> "Lanes":
        """The numbers where the mask is set, in order, in front; 0 behind."""
        return self._called("mask.compress.v16i32", _constant(0), mask.value)

    def rotated(self, places: Any) -> "Lanes":
        """The first `places` numbers, a uint64 of the kernel up to 16, behind all others."""
        counting = self._with(ir.Constant(_VECTOR, list(range(WIDTH))))
        index = counting + Lanes.equal(self._builder, places)
        return self._called("permvar.si.512", index.value)


class Mask:
    """16 truth values."""

    def __init__(self, builder: Any, value: Any) -> None:
        self._builder, self.value = builder, value

    def choose(self, true: Lanes | int, false: Lanes | int) -> Lanes:
        """Numbers of one or the other."""
        chosen = self._builder.select(self.value, _value(true), _value(false))
        return Lanes(self._builder, chosen)

    def bits(self) -> Any:
        """A uint64 of the kernel, whose bit j is that of lane j."""
        return self._builder.zext(self._builder.bitcast(self.value, _U16), _U64)

    def count(self) -> Any:
        """How many are set, a uint64 of the kernel."""
        return self._builder.ctpop(self.bits())


class Memory:
    """An array of unsigned numbers, of at most 32 bits each; places in it are uint64."""

    def __init__(self, builder: Any, pointer: Any) -> None:
        self._builder, self._pointer = builder, pointer
        self._item = pointer.type.pointee

    def _at(self, place: Any, kind: Any) -> Any:
        pointer = self._builder.gep(self._pointer, [place])
        return self._builder.bitcast(pointer, kind.as_pointer())

    def load(self, place: Any) -> Lanes:
        """16 numbers that follow each other."""
        b, kind = self._builder, ir.VectorType(self._item, WIDTH)
        value = b.load(self._at(place, kind), align=self._item.width // 8)
        return Lanes(b, b.zext(value, _VECTOR))

    def store(self, place: Any, lanes: Lanes) -> None:
        """Write 16 numbers that follow each other, their low bits."""
        b, kind = self._builder, ir.VectorType(self._item, WIDTH)
        value = b.trunc(lanes.value, kind)
        b.store(value, self._at(place, kind), align=self._item.width // 8)

    def gather(self, index: Lanes) -> Lanes:
        """32 bits from each of 16 places: a number, or neighbours of fewer bits, the first lowest.

        One load each: the instruction for all of them takes as long on AMD's processors, and
        longer on those of Intel that must not let it look ahead (Downfall, CVE-2022-40982).
        """
        b, align = self._builder, self._item.width // 8
        places = map(index.number, range(WIDTH))
        return Lanes.of(b, [b.load(self._at(place, _U32), align=align) for place in places])

    def number(self, place: Any) -> Any:
        """One number, as a uint64 of the kernel."""
        b = self._builder
        return b.zext(b.load(self._at(place, self._item)), _U64)

    def up_to(self, place: Any, limit: Any) -> Any:
        """How many of 16 numbers that do not fall are at most `limit`; uint64 of the kernel."""
        b, kind = self._builder, ir.VectorType(self._item, WIDTH)
        numbers = b.load(self._at(place, kind), align=self._item.width // 8)
        first = b.insert_element(ir.Constant(kind, None), b.trunc(limit, self._item), _U32(0))
        equal = b.shuffle_vector(first, first, _constant(0))
        above = b.bitcast(b.icmp_unsigned(">", numbers, equal), _U16)
        return b.cttz(b.or_(b.zext(above, _U64), _U64(1 << WIDTH)), _BIT(1))


def _constant(value: int) -> Any:
    return ir.Constant(_VECTOR, [value] * WIDTH)


def _value(x: Lanes | int) -> Any:
    return x.value if isinstance(x, Lanes) else _constant(x)


def renew(states: Memory, lane: Any, x: Lanes, words: Memory, place: Any) -> Any:
    """Store decoded states; those too low get a word. How many did, a uint64 of the kernel."""
    low = x < LOWEST
    refilled = x << WORD_BITS | words.load(place).expanded(low)
    states.store(lane, low.choose(refilled, x))
    return low.count()


def step(output: Any = types.uint64) -> Callable[[Callable[..., Any]], Any]:
    """Make a function that adds the instructions of a step into one that kernels call.

    It gets the builder of these instructions, then what the kernel calls it with: arrays as
    `Memory`, numbers as uint64 of the kernel. It returns one of these, or more for a tuple.
    """

    def decorate(generate: Callable[..., Any]) -> Any:
        def define(_: Any, *kinds: Any) -> tuple[Any, Any]:
            taken = [x if isinstance(x, types.Array) else types.uint64 for x in kinds]
            return output(*taken), lower

        def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            taken = [
                Memory(builder, context.make_array(kind)(context, builder, x).data)
                if isinstance(kind, types.Array)
                else x
                for kind, x in zip(signature.args, arguments, strict=True)
            ]
            made = generate(builder, *taken)
            return context.make_tuple(builder, output, made) if isinstance(made, tuple) else made

        define.__name__ = generate.__name__
        define.__signature__ = inspect.signature(generate)  # type: ignore[attr-defined]
        return intrinsic(define)

    return decorate


@step()
def decode_step(
    _: Any,
    symbols: Memory,
    at: Any,
    columns: Memory,
    column: Any,
    table: Memory,
    states: Memory,
    lane: Any,
    words: Memory,
    place: Any,
) -> Any:
    """Decode the symbols at `at` of the lanes from `lane`; how many words they took, uint64.

    Arrays are those of `kvlib.codecs.rans_numba`; `table` is `Tables.decoder`.
    """
    x = states.load(lane)
    entry = table.gather(columns.load(column) << PRECISION | x & _SLOT)
    symbols.store(at, entry)
    x = ((entry >> 20) + 1) * (x >> PRECISION) + (entry >> 8 & _SLOT)
    return renew(states, lane, x, words, place)


@step(_PAIR)
def encode_step(
    builder: Any,
    symbols: Memory,
    at: Any,
    columns: Memory,
    column: Any,
    table: Memory,
    states: Memory,
    lane: Any,
    words: Memory,
    place: Any,
) -> tuple[Any, Any]:
    """Encode the symbols at `at` by the lanes from `lane`; their words end before `place`.

    The 16 numbers before `place` are overwritten, those in front of the words with anything.
    Arrays are those of `kvlib.codecs.rans_numba`; `table` is `Tables.encoder`.

    Returns:
        uint64: how many words there are; not 0 if a symbol is absent from its table.
    """
    x = states.load(lane)
    entry = table.gather(columns.load(column) << _ROW | symbols.load(at))
    f = entry >> PRECISION
    absent = f < 1
    full = x >= f << FULL_BITS
    count = full.count()
    words.store(builder.sub(place, _U64(WIDTH)), x.compressed(full).rotated(count))
    x = full.choose(x >> WORD_BITS, x)
    quotient = x // absent.choose(1, f)
    states.store(lane, x + quotient * (TOTAL - f) + (entry & _SLOT))
    return count, absent.bits()
