"""The inputs of the suite: logits that are hard for a top-k, targets, sizes, memory layouts."""

import math
from collections.abc import Callable

import subjects
import torch
from torch import Tensor

Filler = Callable[[int, int, torch.dtype], Tensor]

_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def bits(values: Tensor) -> Tensor:
    """The same memory as integers: equal where NaN is, different where only the sign of zero is."""
    return values.view(_INTEGERS[values.dtype]) if values.dtype in _INTEGERS else values


def _from_bits(pattern: Tensor, dtype: torch.dtype) -> Tensor:
    return pattern.to(_INTEGERS[dtype]).view(dtype)


def _random(n: int, v: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, v).to(dtype)


def _peaked(n: int, v: int, dtype: torch.dtype) -> Tensor:
    """The largest logit is 10 above itself: p is close to 1, and p - 1 to 0."""
    z = torch.randn(n, v)
    return z.scatter_add(-1, z.argmax(-1, keepdim=True), torch.full((n, 1), 10.0)).to(dtype)


def _steps_above_one(n: int, v: int, dtype: torch.dtype, scale: float) -> Tensor:
    """Numbers with a common leading part: scale times 1, 1 + ulp, 1 + 2 ulp, ..., shuffled."""
    steps = (
        torch.stack([torch.randperm(v) for _ in range(n)])
        .double()
        .remainder(1 / torch.finfo(dtype).eps)
    )
    return (scale * (1 + steps * torch.finfo(dtype).eps)).to(dtype)


def _last_bits(n: int, v: int, dtype: torch.dtype) -> Tensor:
    return _steps_above_one(n, v, dtype, 1.0)


def _offset(n: int, v: int, dtype: torch.dtype) -> Tensor:
    """2^24 and what follows (2^14 in float16, 2^53 in float64): only z - max z has a precision."""
    exponent = {torch.float16: 14, torch.float64: 53}.get(dtype, 24)
    return _steps_above_one(n, v, dtype, 2.0**exponent)


def _ties(n: int, v: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-3, 4, (n, v)).to(dtype)


def _constant(n: int, v: int, dtype: torch.dtype) -> Tensor:
    return torch.full((n, v), 0.75, dtype=dtype)


def _zeros_of_both_signs(n: int, v: int, dtype: torch.dtype) -> Tensor:
    z = torch.where(torch.rand(n, v) < 0.5, -0.0, 0.0)
    return torch.where(torch.rand(n, v) < 0.01, torch.randn(n, v), z).to(dtype)


def _nan(sign: int, share: float) -> Filler:
    def fill(n: int, v: int, dtype: torch.dtype) -> Tensor:
        # all mantissa bits set: as an integer such a NaN is the largest, with a sign the smallest
        pattern = torch.iinfo(_INTEGERS[dtype]).max if sign > 0 else -1
        nan = _from_bits(torch.full((n, v), pattern), dtype)
        here = torch.rand(n, v) < share
        here[torch.arange(n), torch.randint(v, (n,))] = True
        return torch.where(here, nan, _random(n, v, dtype))

    return fill


def _signalling_nan(n: int, v: int, dtype: torch.dtype) -> Tensor:
    """The lowest mantissa bit alone: a processor's own minimum loses the other number to it."""
    infinity = int(bits(torch.tensor(math.inf, dtype=dtype)).item())
    nan = _from_bits(torch.full((n, v), infinity + 1), dtype)
    z = torch.where(torch.rand(n, v) < 0.02, -math.inf, torch.randn(n, v)).to(dtype)
    return torch.where(torch.rand(n, v) < 0.01, nan, z)


def _nan_of_both_signs(n: int, v: int, dtype: torch.dtype) -> Tensor:
    return torch.where(
        torch.rand(n, v) < 0.5, _nan(1, 0.3)(n, v, dtype), _nan(-1, 0.3)(n, v, dtype)
    )


def _some(value: float, share: float) -> Filler:
    def fill(n: int, v: int, dtype: torch.dtype) -> Tensor:
        return _random(n, v, dtype).masked_fill(torch.rand(n, v) < share, value)

    return fill


def _infinities(n: int, v: int, dtype: torch.dtype) -> Tensor:
    return _some(math.inf, 0.01)(n, v, dtype).masked_fill(torch.rand(n, v) < 0.5, -math.inf)


def _ascending(n: int, v: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(-5, 5, v).expand(n, v).to(dtype)


def _descending(n: int, v: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(5, -5, v).expand(n, v).to(dtype)


def _clustered(n: int, v: int, dtype: torch.dtype) -> Tensor:
    """The largest stand side by side: one block, one segment, one thread has them all."""
    start = v // 3
    z = torch.randn(n, v)
    z[:, start : start + 150] += 30
    return z.to(dtype)


def _strided(stride: int) -> Filler:
    """The largest are a stride apart: where blocks are interleaved, one of them has them all."""

    def fill(n: int, v: int, dtype: torch.dtype) -> Tensor:
        z = torch.randn(n, v)
        z[:, :: max(1, min(stride, v // 3))] += 20
        return z.to(dtype)

    return fill


def _denormal(n: int, v: int, dtype: torch.dtype) -> Tensor:
    """Below the smallest normal number, both signs: ties for whoever flushes them to zero."""
    largest = int(bits(torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype)).item())
    magnitude = torch.randint(0, largest, (n, v))
    return _from_bits(
        torch.where(torch.rand(n, v) < 0.5, magnitude, magnitude - largest - _lowest(dtype)), dtype
    )


def _lowest(dtype: torch.dtype) -> int:
    return torch.iinfo(_INTEGERS[dtype]).min


def _wide(n: int, v: int, dtype: torch.dtype) -> Tensor:
    """The whole range of the dtype, both signs: probabilities underflow, differences overflow."""
    scale = torch.rand(n, v) * math.log2(torch.finfo(dtype).max)
    return (torch.randn(n, v).sign().double() * scale.double().exp2()).to(dtype)


FILLERS: dict[str, Filler] = {
    "random": _random,
    "peaked": _peaked,
    "last_bits": _last_bits,
    "offset": _offset,
    "ties": _ties,
    "constant": _constant,
    "zeros_of_both_signs": _zeros_of_both_signs,
    "one_nan": _nan(1, 0.0),
    "one_negative_nan": _nan(-1, 0.0),
    "many_nan_of_both_signs": _nan_of_both_signs,
    "all_nan": _nan(1, 1.0),
    "signalling_nan": _signalling_nan,
    "plus_inf": _some(math.inf, 0.01),
    "both_inf": _infinities,
    "90_percent_minus_inf": _some(-math.inf, 0.9),
    "99_percent_minus_inf": _some(-math.inf, 0.99),
    "all_minus_inf": _some(-math.inf, 1.0),
    "ascending": _ascending,
    "descending": _descending,
    "clustered": _clustered,
    **{f"stride_{2**power}": _strided(2**power) for power in range(5, 12)},
    "denormal": _denormal,
    "wide": _wide,
}


def logits(filler: str, rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return FILLERS[filler](rows, classes, dtype)


def targets(z: Tensor, k: int) -> Tensor:
    """(N) for (N, V) logits: the first of the support, the first class outside, the last of the
    support, the last class, the first, and classes out of range by one and by 2^32, in turn.
    """
    order = z.double().nan_to_num(nan=math.inf).sort(dim=-1, descending=True, stable=True).indices
    v = z.shape[-1]
    kinds = (
        order[:, 0],
        order[:, min(k, v - 1)],
        order[:, k - 1],
        *(torch.full((z.shape[0],), y) for y in (-1, v - 1, v, 0, 2**32, -(2**32) + 1)),
    )
    return torch.stack([kinds[row % len(kinds)][row] for row in range(z.shape[0])])


_CLASSES = (
    1,
    2,
    3,
    5,
    7,
    8,
    31,
    32,
    33,
    37,
    100,
    127,
    128,
    129,
    255,
    257,
    1000,
    1003,
    2047,
    4096,
    5001,
)
_KEPT = (1, 2, 5, 19, 20, 21, 100, 128, 129, 300, 1000, 1024)


def _sizes() -> list[tuple[int, int]]:
    if subjects.INTERPRETING:  # every V, every k, V - 1 and V, but not all their pairs
        pairs = []
        for place, v in enumerate(_CLASSES):
            fitting = [k for k in _KEPT if k <= v]
            pairs += [(v, fitting[place % len(fitting)]), (v, v - place % 2 or 1)]
        return sorted({(v, k) for v, k in [*pairs, *((5001, k) for k in _KEPT)] if k <= 1024})
    return sorted({(v, k) for v in _CLASSES for k in (*_KEPT, v - 1, v) if 1 <= k <= v})


SIZES = _sizes()

# (B, T, V) logits -> the same values in other strides, with unit stride in V. Around them is NaN,
# which would come first in every support.


def _padded(z: Tensor, before: tuple[int, int, int], after: tuple[int, int, int]) -> Tensor:
    shape = [b + s + a for b, s, a in zip(before, z.shape, after, strict=True)]
    base = torch.full(shape, torch.nan, dtype=z.dtype, device=z.device)
    view = base[tuple(slice(b, b + s) for b, s in zip(before, z.shape, strict=True))]
    view.copy_(z)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda z: z,
    "two_dimensions": lambda z: z.flatten(0, 1),
    "shifted_by_one_token": lambda z: _padded(z, (0, 0, 0), (0, 1, 0)),
    "sliced_batch": lambda z: _padded(z, (1, 0, 0), (1, 0, 0)),
    "sliced_classes": lambda z: _padded(z, (0, 0, 0), (0, 0, 3)),
    "misaligned": lambda z: _padded(z, (0, 0, 1), (0, 0, 0)),
    "misaligned_rows": lambda z: _padded(z.flatten(0, 1).unsqueeze(0), (0, 0, 1), (0, 2, 2))[0],
    "batch_and_tokens_swapped": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded_rows": lambda z: z[:1, :1].expand(*z.shape[:2], -1),
    "expanded_batch": lambda z: z[:1].expand(z.shape[0], -1, -1),
}

# Those that only the public functions take.
PUBLIC_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "classes_not_last_in_memory": lambda z: z.movedim(-1, 0).contiguous().movedim(0, -1),
    "every_second_class": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "expanded_classes": lambda z: z[..., :1].expand(*z.shape),
    "one_dimension": lambda z: z[0, 0],
    "four_dimensions": lambda z: z.unflatten(1, (-1, 1)),
    "four_dimensions_strided": lambda z: z.unflatten(1, (-1, 1)).transpose(0, 1),
    "no_rows": lambda z: z[:0],
}
