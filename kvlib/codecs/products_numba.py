# SPDX-License-Identifier: Apache-2.0
"""Products of float32 matrices compiled by numba, for processors with AVX-512.

The BLAS that NumPy brings may not know a processor, and then falls back to half of its speed; and
its sums depend on where in the matrix a row lies. Here each number of the result is
fma(a[k], b[k], sum) from k = 0 on, whatever else is multiplied with it.

A tile of 6 rows by 64 columns stays in registers: 24 vectors of sums, 4 of the right matrix and one
number of the left one in all 16 places. The right matrix comes as panels of 64 columns, so that a
step reads 256 consecutive bytes of it.
"""

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from kvlib.codecs.rans_numba import _compiled, _input, _output
from kvlib.codecs.rans_vector import WIDTH

__all__ = ["COLUMNS", "multiply", "panels"]

Float = NDArray[np.float32]

_ROWS, _VECTORS = 6, 4
COLUMNS = _VECTORS * WIDTH
"""Of a panel."""
_u64 = np.uint64

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, WIDTH)
_INDEX = ir.IntType(64)


def _tile(rows: int) -> Any:
    """An intrinsic that multiplies so many rows with one panel."""

    @intrinsic
    def tile(
        typing: Any, a: Any, at: Any, stride: Any, b: Any, b_at: Any, depth: Any, out: Any,
        out_at: Any, out_stride: Any,
    ) -> Any:  # fmt: skip
        """out[i, :64] = a[i, :depth] @ b; nothing is checked."""

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            def memory(i: int) -> Any:
                return context.make_array(signature.args[i])(context, builder, given[i]).data

            def vector(pointer: Any, index: Any) -> Any:
                place = builder.gep(pointer, [index])
                return builder.bitcast(place, _VECTOR.as_pointer())

            left, right, result = memory(0), memory(3), memory(6)
            at, stride, b_at, depth, out_at, out_stride = (given[i] for i in (1, 2, 4, 5, 7, 8))
            fma = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
                builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), "llvm.fma.v16f32"
            )
            zero = ir.Constant(_VECTOR, None)
            room: Any = cgutils.alloca_once_value
            sums = [[room(builder, zero) for _ in range(_VECTORS)] for _ in range(rows)]
            starts = [builder.add(at, builder.mul(stride, _INDEX(i))) for i in range(rows)]
            same = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), None)
            with cgutils.for_range(builder, depth) as loop:
                first = builder.add(b_at, builder.mul(loop.index, _INDEX(COLUMNS)))
                columns = [
                    builder.load(vector(right, builder.add(first, _INDEX(v * WIDTH))), align=4)
                    for v in range(_VECTORS)
                ]
                for i in range(rows):
                    x = builder.load(builder.gep(left, [builder.add(starts[i], loop.index)]))
                    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), x, _INDEX(0))
                    every = builder.shuffle_vector(one, one, same)
                    for total, column in zip(sums[i], columns, strict=True):
                        builder.store(
                            builder.call(fma, [every, column, builder.load(total)]), total
                        )
            for i in range(rows):
                place = builder.add(out_at, builder.mul(out_stride, _INDEX(i)))
                for v, total in enumerate(sums[i]):
                    to = vector(result, builder.add(place, _INDEX(v * WIDTH)))
                    builder.store(builder.load(total), to, align=4)
            return context.get_dummy_value()

        return types.void(a, at, stride, b, b_at, depth, out, out_at, out_stride), generate

    return tile


_many, _one = _tile(_ROWS), _tile(1)


@_compiled(
    _input(types.float32),
    types.int64,
    types.int64,
    _input(types.float32),
    types.int64,
    _output(types.float32),
    types.int64,
    types.int64,
)
def _multiply(
    a: Float, n: int, depth: int, b: Float, rank: int, out: Float, first: int, width: int
) -> int:
    """Fill columns of out [n, width] from `first` on with a [n, depth] times all panels b."""
    for panel in range(b.size // (rank * COLUMNS)):
        b_at, column = _u64(panel * rank * COLUMNS), _u64(first + panel * COLUMNS)
        if n < _ROWS:
            for t in range(n):
                _one(
                    a, _u64(t * depth), _u64(depth), b, b_at, _u64(depth), out,
                    _u64(t * width) + column, _u64(width),
                )  # fmt: skip
            continue
        for t in range(0, n, _ROWS):
            row = _u64(min(t, n - _ROWS))  # the last tile may do rows again
            _many(
                a, row * _u64(depth), _u64(depth), b, b_at, _u64(depth), out,
                row * _u64(width) + column, _u64(width),
            )  # fmt: skip
    return 0


def panels(matrix: Float) -> Float:
    """A matrix [r, width], width a multiple of 64, as [width / 64, r, 64]."""
    return np.ascontiguousarray(matrix.reshape(len(matrix), -1, COLUMNS).transpose(1, 0, 2))


def multiply(a: Float, b: Float, out: Float, first: int) -> None:
    """Columns of a product.

    Args:
        a: [n, depth], contiguous.
        b: `panels` of a matrix [r, width], r >= depth, of which the first rows are taken.
        out: [n, C], contiguous; its columns first..first + width are filled.
        first: see `out`.
    """
    n, depth = a.shape
    count, rank, _ = b.shape
    assert depth <= rank  # noqa: S101 (what the tiles rely on)
    assert out.shape[0] == n  # noqa: S101
    assert first + count * COLUMNS <= out.shape[1]  # noqa: S101
    _multiply(a.reshape(-1), n, depth, b.reshape(-1), rank, out.reshape(-1), first, out.shape[1])
