"""Triton's interpreter, made quick and faithful enough for tests. ``install()`` patches the Triton
that is imported.

The interpreter runs a reduction whose combine function it does not know as one Python call per
element. Those of tl.sort, tl.topk and max_nan are single numpy functions. Its conversions between
bfloat16 and float32 are slow and wrong for subnormal numbers; here they are the shift and the
rounding to nearest even of the hardware. The maximum of two bfloat16, which it keeps as uint16, is
to Triton 3.9 that of the integers, where -1 is above 1; here it is that of the numbers.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_UFUNCS = {
    "_xor_combine": np.bitwise_xor,
    "_elementwise_max": np.maximum,
    "_elementwise_min": np.minimum,
    "max_nan": np.maximum,
}


def _reduce(original):
    def apply_impl(self, inputs):
        ufunc = _UFUNCS.get(
            getattr(getattr(self.combine_fn, "fn", self.combine_fn), "__name__", "")
        )
        x = inputs[0]
        # bfloat16 is stored as uint16: only the element by element path decodes it
        if ufunc is None or len(inputs) != 1 or x.dtype == tl.bfloat16:
            return original(self, inputs)
        return self.to_tensor(
            ufunc.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims), x.dtype
        )

    return apply_impl


def _widen(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values):
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def _convert(original):
    def cast_impl(self, src, dst_type):
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widen(np.ascontiguousarray(src.data)), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_narrow(np.ascontiguousarray(src.data)), tl.bfloat16)
        return original(self, src, dst_type)

    return cast_impl


def _maximum(original):
    def create_maximumf(self, lhs, rhs):
        if lhs.dtype.scalar != tl.bfloat16:
            return original(self, lhs, rhs)
        larger = np.maximum(_widen(lhs.data), _widen(rhs.data))
        return interpreter.TensorHandle(_narrow(larger), tl.bfloat16)

    return create_maximumf


# Of the tensors of the kernel that runs: where each begins and ends.
_extents: list[tuple[int, int]] = []


def _arguments(original):
    def init_args_hst(self, args, kwargs):
        args, kwargs = original(self, args, kwargs)
        _extents.clear()
        for t in (*args, *kwargs.values()):
            if hasattr(t, "data_ptr") and t.numel() > 0:
                last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
                _extents.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
        return args, kwargs

    return init_args_hst


def _guarded(original, place):
    """An access, whose pointers and whose mask stand at these places."""

    def access(self, *arguments):
        ptrs, mask = (arguments[i] for i in place)
        addresses = ptrs.data[mask.data]
        if addresses.size:
            first = int(addresses.min())
            end = int(addresses.max()) + ptrs.get_element_ty().primitive_bitwidth // 8
            if not any(low <= first and end <= high for low, high in _extents):
                raise IndexError(f"an access of [{first}, {end}) is outside of all tensors")
        return original(self, *arguments)

    return access


def install() -> None:
    builder = interpreter.InterpreterBuilder
    executor = interpreter.GridExecutor
    executor._init_args_hst = _arguments(executor._init_args_hst)
    builder.create_masked_load = _guarded(builder.create_masked_load, (0, 1))
    builder.create_masked_store = _guarded(builder.create_masked_store, (0, 2))
    builder.create_atomic_rmw = _guarded(builder.create_atomic_rmw, (1, 3))
    builder.create_maximumf = _maximum(builder.create_maximumf)
    interpreter.ReduceOps.apply_impl = _reduce(interpreter.ReduceOps.apply_impl)
    builder.cast_impl = _convert(builder.cast_impl)
