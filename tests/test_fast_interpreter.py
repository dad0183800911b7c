"""What fast_interpreter.py adds to Triton's interpreter: an access outside of all tensors is an
error. Kernels that are wrong on purpose.
"""

import pytest
import subjects
import torch

pytestmark = pytest.mark.interpreter
if not subjects.INTERPRETING:
    pytest.skip("Triton's interpreter", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def _read(x_ptr, y_ptr, first, last, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    tl.store(y_ptr + tl.arange(0, SIZE), tl.load(x_ptr + at, mask=at < last, other=0.0))


@triton.jit
def _write(x_ptr, first, last, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    tl.store(x_ptr + at, at.to(tl.float32), mask=at < last)


@triton.jit
def _add(x_ptr, first, last, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    tl.atomic_add(x_ptr + at, 1.0, mask=at < last)


@pytest.mark.parametrize("first, last", [(0, 9), (-1, 8), (100, 101)])
def test_what_lies_outside(first, last):
    # of a view: the rest of its memory is not given either
    x, y = torch.zeros(24)[8:16], torch.zeros(16)
    with pytest.raises(Exception, match="outside of all tensors"):
        _read[(1,)](x, y, first, last, SIZE=16)
    for kernel in (_write, _add):
        with pytest.raises(Exception, match="outside of all tensors"):
            kernel[(1,)](x, first, last, SIZE=16)
    assert not x.any()


def test_what_lies_inside():
    x, y = torch.arange(24.0)[8:16], torch.zeros(16)
    _read[(1,)](x, y, 0, 8, SIZE=16)
    assert torch.equal(y[:8], x) and not y[8:].any()
    _add[(1,)](x, 0, 8, SIZE=16)
    assert torch.equal(x, torch.arange(9.0, 17.0))
    _write[(1,)](x, 0, 8, SIZE=16)
    assert torch.equal(x, torch.arange(8.0))
    # nothing is asked for
    _read[(1,)](x, y, 100, 0, SIZE=16)
