"""Numbers as the lanes of a GPU compute them: arrays of bits, one element for each lane.

Registers hold bits, unsigned integers of their width; a type says how an instruction reads them.
What rounds, rounds once, to nearest even. An approximate instruction errs by as much as its manual
allows, up or down by what it is given: who computes twice gets the same bits.
"""

import ctypes
import ctypes.util
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Function = Callable[..., Array]

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_NAN = {16: 0x7FFF, 32: 0x7FFFFFFF, 64: 0x7FF8 << 48}  # what arithmetic makes of every NaN
_PARTS = {"bf16x2": ("bf16", 32), "f16x2": ("f16", 32), "f32x2": ("f32", 64)}


class Type(NamedTuple):
    """`kind`: u, s, b (bits), f, bf or pred. `bits` of a register, which may hold two parts."""

    kind: str
    bits: int
    part: str | None = None

    @property
    def floating(self) -> bool:
        return self.kind in ("f", "bf")

    @property
    def signed(self) -> bool:
        return self.kind == "s"


def type_named(name: str) -> Type:
    if name == "pred":
        return Type("pred", 1)
    if name in _PARTS:
        part, bits = _PARTS[name]
        return Type(part.rstrip("0123456789"), bits, part)
    return Type(name.rstrip("0123456789"), int(name.lstrip("usbf")))


def signed(bits: Array) -> Array:
    return bits.view(SIGNED[bits.itemsize * 8])


def unsigned(values: Array) -> Array:
    return values.view(UNSIGNED[values.itemsize * 8])


def numbers(bits: Array, of: Type) -> Array:
    return signed(bits) if of.signed else bits


def resized(bits: Array, width: int, extend_sign: bool = False) -> Array:
    """Cut to `width` bits, or extended by zeros or the sign."""
    if bits.itemsize * 8 == width:
        return bits
    return (signed(bits) if extend_sign else bits).astype(UNSIGNED[width])


# Floating point. f16 and bf16 are read as float32: a sum or product of two, rounded to float32 and
# then to 16 bits, is the one rounded once, since 24 >= 2 * 11 + 2.


def _float32(values: Array) -> Array:
    values = np.ascontiguousarray(values, np.float32)
    nan = np.isnan(values)
    bits = values.view(np.uint32)
    return np.where(nan, np.uint32(_NAN[32]), bits) if nan.any() else bits


def _float64(values: Array) -> Array:
    values = np.ascontiguousarray(values, np.float64)
    return np.where(np.isnan(values), np.uint64(_NAN[64]), values.view(np.uint64))


def _float16(values: Array) -> Array:
    halves = values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(_NAN[16]), halves)


def _bfloat16(values: Array) -> Array:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # half of what is cut away, and a tie goes to the even one
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), np.uint16(_NAN[16]), rounded.astype(np.uint16))


DECODE: dict[str, Function] = {
    "f64": lambda bits: bits.view(np.float64),
    "f32": lambda bits: bits.view(np.float32),
    "f16": lambda bits: bits.view(np.float16).astype(np.float32),
    "bf16": lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),
}
ENCODE: dict[str, Function] = {
    "f64": _float64,
    "f32": _float32,
    "f16": _float16,
    "bf16": _bfloat16,
}


def name_of(of: Type) -> str:
    """The format of a floating-point type, or of its parts."""
    return of.part or f"{of.kind}{of.bits}"


def decode(bits: Array, of: Type) -> Array:
    """Its numbers; of a register with two parts twice as many, the lower part of a lane first."""
    name = name_of(of)
    return DECODE[name](bits.view(np.uint16) if of.part and name != "f32" else bits)


def encode(values: Array, of: Type) -> Array:
    bits = ENCODE[name_of(of)](values)
    return bits.view(UNSIGNED[of.bits]) if of.part else bits


def flushed(values: Array) -> Array:
    """With zeros of the same sign for denormals."""
    small = np.abs(values) < np.finfo(values.dtype).smallest_normal
    return np.where(small, np.copysign(0, values), values) if small.any() else values


def _to_odd(total: Array, error: Array) -> Array:
    """The float64 beside total + error whose last bit is 1, unless total is exact.

    Rounded once more, to fewer than 52 bits, that is total + error rounded once (Boldo, Melquiond).
    """
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)


def _exact_fma(a: Array, b: Array, c: Array) -> Array:
    """Of float32, in float64 and rounded to odd."""
    # the product is exact, and so is the error of the sum
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    seen = total - product
    error = (product - (total - seen)) + (addend - seen)
    return _to_odd(total, error)


@cache
def _fma_of_c() -> np.ufunc:
    function = ctypes.CDLL(ctypes.util.find_library("m")).fma
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    return np.frompyfunc(function, 3, 1)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c rounded once, of float32 and of float64."""
    if a.dtype == np.float64:
        return _fma_of_c()(a, b, c).astype(np.float64)
    return _exact_fma(a, b, c).astype(np.float32)


def fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a b + c of 16-bit floats as float32, for one more rounding, to 16 bits."""
    exact = _exact_fma(a, b, c)
    nearest = exact.astype(np.float32)
    bits = nearest.view(np.int32)
    even = (bits & 1 == 0) & (nearest != exact) & np.isfinite(nearest)
    step = np.where(np.abs(exact) > np.abs(nearest), np.int32(1), np.int32(-1))
    return np.where(even, bits + step, bits).view(np.float32)


def fma_down(a: Array, b: Array, c: Array) -> Array:
    """a b + c of float32, rounded towards the lowest."""
    exact = _exact_fma(a, b, c)
    nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def saturated(values: Array) -> Array:
    """Between 0 and 1; NaN is 0."""
    return np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype)


def _of_nan(found: Array, a: Array, b: Array, keep_nan: bool) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), found) if keep_nan else found


def maximum(a: Array, b: Array, keep_nan: bool = False) -> Array:
    """+0 is larger than -0. NaN only where both are, or with `keep_nan` where one is."""
    found = np.fmax(a, b)
    # NumPy takes either zero; the sum of two is -0 only where both are
    found = np.where((a == 0) & (b == 0), a + b, found)
    return _of_nan(found, a, b, keep_nan)


def minimum(a: Array, b: Array, keep_nan: bool = False) -> Array:
    return -maximum(-a, -b, keep_nan)


def rounded_to_integer(values: Array, how: Function, of: Type) -> Array:
    """What does not fit becomes the nearest that does; NaN 0, or in 64 bits the highest bit."""
    bits, source = of.bits, values.itemsize * 8
    whole = how(values.astype(np.float64))
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1)) if of.signed else (0.0, 2.0**bits)
    inside = (whole >= low) & (whole < high)
    limits = np.iinfo((SIGNED if of.signed else UNSIGNED)[bits])
    found = np.where(inside, whole, 0).astype(limits.dtype)
    found[whole >= high], found[whole < low] = limits.max, limits.min
    of_nan = 1 << (bits - 1) if max(source, bits) == 64 else 0
    return np.where(np.isnan(whole), UNSIGNED[bits](of_nan), unsigned(found))


# Approximations. The function in float64, and the error that the manual allows.

NOISE = True  # without it an approximation is the function, rounded once


class Approximation(NamedTuple):
    function: Callable[[Array], Array]
    ulps: float = 0.0
    relative: float = 0.0
    absolute: float = 0.0  # in place of it for arguments between 1/2 and 2


APPROXIMATIONS = {
    "ex2": Approximation(np.exp2, ulps=2),
    "lg2": Approximation(np.log2, relative=2.0**-22, absolute=2.0**-22),
    "rcp": Approximation(np.reciprocal, ulps=1),
    "sqrt": Approximation(np.sqrt, relative=2.0**-23),
    "rsqrt": Approximation(lambda x: 1 / np.sqrt(x), relative=2.0**-22.9),
}


def _ulps(exact: Array) -> Array:
    return np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


def _share(*arguments: Array) -> Array:
    """Between -1 and 1, the same for the same arguments."""
    mixed = np.zeros(arguments[0].shape, np.uint32)
    for argument in arguments:
        mixed = (mixed ^ argument.view(np.uint32)) * np.uint32(2654435761)
        mixed ^= mixed >> 15
    return (mixed >> 8) / 2.0**23 - 1


def _with_error(exact: Array, error: Array, share: Array) -> Array:
    found = exact.astype(np.float32)
    if not NOISE:
        return found
    # rounding takes half a unit of what is allowed
    wrong = (exact + share * np.maximum(error - _ulps(exact) / 2, 0)).astype(np.float32)
    return np.where(np.isfinite(found) & (np.abs(exact) >= 2.0**-126), wrong, found)


def approximation(name: str) -> Function:
    function, ulps, relative, absolute = APPROXIMATIONS[name]

    def compute(x: Array) -> Array:
        exact = function(x.astype(np.float64))
        error = ulps * _ulps(exact) + relative * np.abs(exact)
        if absolute:
            error = np.where((x > 0.5) & (x < 2), absolute, error)
        # an exponent that is whole needs no approximation
        error = np.where(x == np.round(x), 0, error) if name == "ex2" else error
        return _with_error(exact, error, _share(x))

    return compute


def full_range_quotient(a: Array, b: Array) -> Array:
    exact = a.astype(np.float64) / b
    return _with_error(exact, 2 * _ulps(exact), _share(a, b))


def approximate_quotient(a: Array, b: Array) -> Array:
    """By a reciprocal, which of the largest numbers is zero."""
    large = np.abs(b) > 2.0**126
    return np.where(large, a * np.copysign(np.float32(0), b), full_range_quotient(a, b))


def gross_reciprocal(bits: Array) -> Array:
    """rcp.approx.ftz.f64: the upper half alone, of what it is given and of what it returns."""
    upper = np.uint64(0xFFFFFFFF << 32)
    found = flushed(1 / flushed((bits & upper).view(np.float64)))
    return np.where(np.isnan(found), np.uint64(0x7FFFFFFF << 32), found.view(np.uint64) & upper)


# Integers


def quotient(a: Array, b: Array) -> Array:
    """Rounded towards zero. By zero it is what the manual leaves open, all ones."""
    by = np.where(b == 0, b.dtype.type(1), b)
    floor = a // by
    floor += ((a % by != 0) & ((a < 0) != (by < 0))).astype(a.dtype)
    return np.where(b == 0, ~np.zeros_like(a), floor)


def remainder(a: Array, b: Array) -> Array:
    return a - quotient(a, b) * b


def high_product(a: Array, b: Array, of: Type) -> Array:
    return resized(wide_product(a, b, of) >> of.bits, of.bits)


def wide_product(a: Array, b: Array, of: Type) -> Array:
    wide = 2 * of.bits
    return resized(a, wide, of.signed) * resized(b, wide, of.signed)


def shifted_left(a: Array, by: Array) -> Array:
    width = a.itemsize * 8
    inside = np.minimum(by, width - 1).astype(a.dtype)
    return np.where(by < width, a << inside, a.dtype.type(0))


def shifted_right(a: Array, by: Array) -> Array:
    """Of signed integers with copies of the sign."""
    width = a.itemsize * 8
    inside = np.minimum(by, width - 1).astype(a.dtype)
    if a.dtype.kind == "i":
        return a >> inside
    return np.where(by < width, a >> inside, a.dtype.type(0))


def leading_zeros(a: Array) -> Array:
    width, found, rest = a.itemsize * 8, np.zeros(a.shape, np.uint32), a
    for step in (32, 16, 8, 4, 2, 1):
        if step < width:
            clear = rest >> a.dtype.type(width - step) == 0
            found += np.where(clear, np.uint32(step), np.uint32(0))
            rest = np.where(clear, rest << a.dtype.type(step), rest)
    return found + (a == 0)


def reversed_bits(a: Array) -> Array:
    octets = np.unpackbits(np.ascontiguousarray(a).view(np.uint8), bitorder="little")
    turned = octets.reshape(len(a), -1)[:, ::-1]
    return np.packbits(turned, axis=1, bitorder="little").view(a.dtype)[:, 0]


def inserted(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: the lowest `length` bits of a in b from `position` on."""
    position, length, width = position & 255, length & 255, a.itemsize * 8
    ones = np.where(length < width, shifted_left(np.ones_like(a), length) - 1, ~np.zeros_like(a))
    mask = shifted_left(ones.astype(a.dtype), position)
    return (b & ~mask) | (shifted_left(a, position) & mask)


def field(a: Array, position: Array, length: Array) -> Array:
    """bfe: `length` bits from `position` on, beyond the highest the sign or zero."""
    position, length, width = position & 255, length & 255, a.itemsize * 8
    bits = shifted_right(a, position)
    if a.dtype.kind == "u":
        return np.where(length < width, bits & ~shifted_left(~np.zeros_like(a), length), bits)
    # the field at the top, and down again with its sign
    up = np.maximum(width - length.astype(np.int64), 0).astype(np.uint32)
    return shifted_right(signed(shifted_left(unsigned(bits), up)), up)


# prmt: by its mode, the bytes taken for each value of the selector
PERMUTATIONS = {
    "f4e": [(i, i + 1, i + 2, i + 3) for i in range(4)],
    "b4e": [(i, (i - 1) % 8, (i - 2) % 8, (i - 3) % 8) for i in range(4)],
    "rc8": [(i,) * 4 for i in range(4)],
    "ecl": [tuple(max(i, j) for j in range(4)) for i in range(4)],
    "ecr": [tuple(min(i, j) for j in range(4)) for i in range(4)],
    "rc16": [(i % 2 * 2, i % 2 * 2 + 1) * 2 for i in range(4)],
}


def permuted(a: Array, b: Array, selector: Array, mode: str | None = None) -> Array:
    """Four of the eight bytes of a and b; the fourth bit of a choice takes a byte's sign alone."""
    given = np.concatenate([x[:, None].view(np.uint8) for x in (a, b)], 1)
    if mode is None:
        chosen = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    else:
        chosen = np.array(PERMUTATIONS[mode], np.uint32)[selector & 3]
    found = np.take_along_axis(given, (chosen & 7).astype(np.int64), 1)
    found = np.where(chosen & 8, (found >> 7) * np.uint8(255), found)
    return found.view(np.uint32)[:, 0]
