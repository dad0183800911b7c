"""torch.func and forward mode: what autograd says elsewhere, or an error."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sparse_ce import (
    MonotonicPLIF,
    adaptive_sparse_ce,
    continuous_output_loss,
    fused_linear_sparse_ce,
    fused_sparse_ce,
    sparse_softmax,
)
from torch import Tensor
from torch.autograd import forward_ad

ROWS, CLASSES, WIDTH = 5, 11, 7
# a fallback row by row, of which torch warns
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGET = torch.tensor([3, 0, -100, 10, 5])
TABLE = draw(CLASSES, WIDTH, seed=1)
LABELS = draw(ROWS, CLASSES, seed=2) > 0.7
# name -> a function of one tensor, a point, whether it has a second derivative
Function = Callable[[Tensor], Tensor]
FUNCTIONS: dict[str, tuple[Function, Tensor, bool]] = {
    "k": (lambda z: fused_sparse_ce(z, TARGET, 4), draw(ROWS, CLASSES), True),
    "dense": (lambda z: fused_sparse_ce(z, TARGET, None), draw(ROWS, CLASSES), True),
    "none": (
        lambda z: fused_sparse_ce(z, TARGET, 4, label_smoothing=0.1, reduction="none").sum(),
        draw(ROWS, CLASSES),
        True,
    ),
    "adaptive": (lambda z: adaptive_sparse_ce(z, TARGET, 0.1), draw(ROWS, CLASSES), True),
    "labels": (lambda z: adaptive_sparse_ce(z, LABELS, 0.5), draw(ROWS, CLASSES), True),
    "softmax": (lambda z: sparse_softmax(z, 4).square().sum(), draw(ROWS, CLASSES), True),
    "linear": (lambda h: fused_linear_sparse_ce(h, TABLE, TARGET, 4), draw(ROWS, WIDTH), False),
    "linear dense": (
        lambda h: fused_linear_sparse_ce(h, TABLE, TARGET, None),
        draw(ROWS, WIDTH),
        False,
    ),
    "continuous": (lambda c: continuous_output_loss(c, TARGET, TABLE), draw(ROWS, WIDTH), True),
}


def plif_losses() -> dict[str, tuple[Function, Tensor, bool]]:
    plif = MonotonicPLIF(50, bound=4.0, init_std=1.0).requires_grad_(False)
    z = draw(ROWS, CLASSES)
    return {
        "plif": (lambda z: plif(z).square().sum(), z, False),
        "plif k": (lambda z: fused_sparse_ce(z, TARGET, 4, link=plif), z, False),
        "plif dense": (lambda z: fused_sparse_ce(z, TARGET, None, link=plif), z, False),
    }


CASES = {**FUNCTIONS, **plif_losses()}


def gradient(function: Function, x: Tensor, create_graph: bool = False) -> Tensor:
    (found,) = torch.autograd.grad(function(x), x, create_graph=create_graph)
    return found


@pytest.mark.parametrize("name", CASES)
def test_grad_and_jacrev(name):
    function, x, _ = CASES[name]
    wanted = gradient(function, x.clone().requires_grad_())
    for transform in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(transform(function)(x), wanted)
    value, vjp = torch.func.vjp(function, x)
    torch.testing.assert_close(vjp(torch.full_like(value, 2.0))[0], 2 * wanted)


@pytest.mark.parametrize("name", CASES)
def test_the_level_above_is_differentiated_too(name):
    """A gradient of a gradient, which lost its inner level would be 0 without a word."""
    function, x, twice = CASES[name]

    def penalty(x: Tensor) -> Tensor:
        return torch.func.grad(function)(x).square().sum()

    if not twice:
        with pytest.raises(RuntimeError, match="expected a first derivative only"):
            torch.func.grad(penalty)(x)
        return
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(gradient(function, leaf, True).square().sum(), leaf)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(torch.func.grad(penalty)(x), wanted)


def test_hessian_of_the_dense_softmax():
    z, target = draw(ROWS, CLASSES), TARGET
    found = torch.func.jacrev(torch.func.grad(lambda z: fused_sparse_ce(z, target, None)))(z)
    wanted = torch.func.hessian(lambda z: F.cross_entropy(z, target))(z)
    torch.testing.assert_close(found, wanted)


def test_gradients_of_each_row_by_vmap():
    z, target = draw(ROWS, CLASSES), TARGET
    each = torch.func.vmap(torch.func.grad(lambda z, y: fused_sparse_ce(z, y, 4)))(z, target)
    leaf = z.clone().requires_grad_()
    torch.testing.assert_close(
        each, gradient(lambda z: fused_sparse_ce(z, target, 4, reduction="sum"), leaf)
    )


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_is_refused(name):
    function, x, _ = CASES[name]
    refused = pytest.raises(NotImplementedError, match="expected derivatives in reverse mode only")
    with refused:
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with refused, forward_ad.dual_level():
        function(forward_ad.make_dual(x, torch.ones_like(x)))
    with refused, forward_ad.dual_level():
        function(forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x)))
    with refused:  # forward over reverse
        torch.func.hessian(function)(x)
    # a constant among dual numbers is none
    with forward_ad.dual_level():
        function(x)


@pytest.mark.parametrize("name", ["k", "none", "dense", "adaptive", "linear", "linear dense"])
def test_batched_gradients(name):
    """functional.jacobian(vectorize=True), whose vmap is another one than that of torch.func."""
    function, z, _ = FUNCTIONS[name]
    scales = draw(3, seed=3)

    def scaled(z: Tensor) -> Tensor:
        return function(z) * scales

    found = torch.autograd.functional.jacobian(scaled, z, vectorize=True)
    assert torch.allclose(found, torch.autograd.functional.jacobian(scaled, z), rtol=1e-12)
