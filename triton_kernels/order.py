"""The order of the classes as integers: value descending, NaN largest, -0 equal to +0, then index
ascending.

Floats are compared as integers because float comparisons lose NaNs and leave the order of ties to
chance.
"""

import triton
import triton.language as tl


@triton.jit
def max_nan(a, b):
    """The larger of two floats; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.constexpr_function
def infinity_key(dtype):
    """Key of +inf; that of -inf is its negative, that of every NaN is one more."""
    return {"fp32": 0x7F800000, "bf16": 0x7F80, "fp16": 0x7C00}[dtype.name]


@triton.jit
def value_key(x):
    """float32, bfloat16 or float16 -> int32 whose ascending order is that of the values."""
    INFINITY: tl.constexpr = infinity_key(x.dtype)
    SHIFT: tl.constexpr = 32 - x.dtype.primitive_bitwidth
    # in 32 bits up to the end: of numbers of 16 the compiler keeps two in a register, and takes
    # them apart at every step
    if x.dtype == tl.float16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << SHIFT
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    # sign and magnitude -> two's complement, which makes -0 and +0 one
    sign = bits >> 31
    key = ((bits ^ (sign & 0x7FFFFFFF)) - sign) >> SHIFT
    return tl.where((bits & 0x7FFFFFFF) > (INFINITY << SHIFT), INFINITY + 1, key)


@triton.jit
def key_value(key, dtype: tl.constexpr):
    """The inverse of `value_key`, as float32: one NaN for all, +0 for both zeros."""
    if dtype == tl.float32:
        return tl.where(key < 0, -2147483648 - key, key).to(tl.float32, bitcast=True)
    else:
        bits = tl.where(key < 0, 0x8000 - key, key).to(tl.int16)
        return bits.to(dtype, bitcast=True).to(tl.float32)


# A class of a row as one integer, which descends in the order of the classes, all distinct: of 64
# bits, or of 32 where logits have 16 bits and classes are fewer than 2^16.


@triton.jit
def pack(key, index, PACKED: tl.constexpr):
    """int32 key and index."""
    if PACKED == tl.int64:
        packed = (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    else:
        packed = (key << 16) | (0xFFFF - index)
    return packed


@triton.constexpr_function
def lowest(packed):
    """Below every packed class."""
    return -(1 << packed.primitive_bitwidth - 1)


@triton.jit
def packed_key(packed):
    if packed.dtype == tl.int64:
        key = (packed >> 32).to(tl.int32)
    else:
        key = packed >> 16
    return key


@triton.jit
def packed_index(packed):
    if packed.dtype == tl.int64:
        index = 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)
    else:
        index = 0xFFFF - (packed & 0xFFFF)
    return index


@triton.jit
def threshold(keys, low, high, k, limit):
    """A bound that at least k of the keys reach: at most `limit` of them, or else it is the k-th
    largest key itself.

    By bisection between `low`, which at least k keys reach, and `high`, which fewer than k keys
    exceed.
    """
    count = limit + 1
    while (low < high) & (count > limit):
        # the mean rounded up, without overflow
        middle = (low | high) - ((low ^ high) >> 1)
        reached = tl.sum((keys >= middle).to(tl.int32), axis=0)
        enough = reached >= k
        count = tl.where(enough, reached, count)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.constexpr_function
def octave(dtype):
    """From a number's key to that of twice the number."""
    return infinity_key(dtype) & -infinity_key(dtype)


@triton.jit
def thresholds(keys, k, limit, OCTAVE: tl.constexpr):
    """(ROWS) such bounds, of (SIZE, ROWS) keys: `threshold` for several rows at once.

    Half of the way down is too far where it is many octaves, as from a large number to one next to
    zero.
    """
    low, high = tl.min(keys, axis=0), tl.max(keys, axis=0)
    count = tl.zeros_like(low) + limit + 1
    is_open = low < high
    distance = tl.full([], OCTAVE, tl.int32)
    while tl.max(is_open.to(tl.int32), axis=0) > 0:
        middle = (low | high) - ((low ^ high) >> 1)
        middle = tl.where(high > 0, tl.maximum(middle, high - distance), middle)
        distance = 2 * tl.minimum(distance, 0x20000000)
        reached = tl.sum((keys >= middle[None, :]).to(tl.int32), axis=0)
        enough = is_open & (reached >= k)
        high = tl.where(is_open & (reached < k), middle - 1, high)
        low = tl.where(enough, middle, low)
        count = tl.where(enough, reached, count)
        is_open = (low < high) & (count > limit)
    return low
