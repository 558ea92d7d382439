"""Numbers at addresses, for kernels that numba compiles: float32, bfloat16 as the upper half of one, and whole numbers."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _pointer(builder, kind, address, index):
    """To number `index` of this kind from an address on."""
    bits = {types.float32: ir.FloatType(), types.uint16: ir.IntType(16), types.int32: ir.IntType(32)}[kind]
    return builder.gep(builder.inttoptr(address, bits.as_pointer()), [index])


@intrinsic
def whole(context, address, index):
    """The int32 that stands there."""
    return types.int64(types.int64, types.int64), lambda context, builder, signature, values: builder.sext(
        builder.load(_pointer(builder, types.int32, *values)), ir.IntType(64)
    )


@intrinsic
def read(context, kind, address, index):
    """Number `index` from an address on, as float32."""

    def reading(context, builder, signature, values):
        number = builder.load(_pointer(builder, kind, *values[1:]))
        if kind == types.float32:
            return number
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(number, word), word(16)), ir.FloatType())

    return types.float32(kind, types.int64, types.int64), reading


@intrinsic
def write(context, kind, address, index, number):
    """A float32 as number `index` from an address on: to the nearest, ties to even; NaN stays."""

    def writing(context, builder, signature, values):
        number, word = values[3], ir.IntType(32)
        if kind == types.uint16:
            bits = builder.bitcast(number, word)
            odd = builder.and_(builder.lshr(bits, word(16)), word(1))
            rounded = builder.lshr(builder.add(builder.add(bits, word(0x7FFF)), odd), word(16))
            rounded = builder.select(builder.fcmp_ordered("ord", number, number), rounded, word(0x7FC0))
            number = builder.trunc(rounded, ir.IntType(16))
        builder.store(number, _pointer(builder, kind, *values[1:3]))
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64, types.float32), writing


@intrinsic
def prefetch(context, address):
    """Have the line at an address brought into the second cache."""

    def fetching(context, builder, signature, values):
        word, bytes_at = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [bytes_at, word, word, word])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fetch, [builder.inttoptr(values[0], bytes_at), word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(types.int64), fetching


@intrinsic
def copied(context, source, target, size):
    """Bytes as they are."""

    def copying(context, builder, signature, values):
        source, target, size = values
        bytes_at = ir.IntType(8).as_pointer()
        move = builder.module.declare_intrinsic("llvm.memmove", [bytes_at, bytes_at, ir.IntType(64)])
        builder.call(
            move, [builder.inttoptr(target, bytes_at), builder.inttoptr(source, bytes_at), size, ir.IntType(1)(0)]
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), copying
