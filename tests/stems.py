"""The operators of schema.py behind one face, so that a test is written once for both regimes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from closeness import Truth
from sparse_ce import ops
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """The inputs of a forward, on the device where it is to run."""

    logits: Tensor
    target: Tensor
    k: int
    weight: Tensor | None = None
    label_smoothing: float = 0.0

    def to(self, device: str) -> "Call":
        logits, target = self.logits.to(device), self.target.to(device)
        return Call(
            logits,
            target,
            self.k,
            None if self.weight is None else self.weight.to(device),
            self.label_smoothing,
        )

    def truth(self) -> Truth:
        return Truth(self.logits, self.target, self.k, self.weight, self.label_smoothing)

    @property
    def statistics(self) -> torch.dtype:
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Stem:
    name: str
    lists: bool  # the output grows with k
    differentiable: int  # how many outputs, of loss, lse and probs, have a gradient
    outputs: Callable[[Call], list[tuple[torch.dtype, tuple[int, ...]]]]
    forward_arguments: Callable[[Call], tuple[object, ...]]
    backward_arguments: Callable[
        [Call, Sequence[Tensor], Sequence[Tensor | None]], tuple[object, ...]
    ]
    assert_forward: Callable[[Truth, Sequence[Tensor]], None]

    def __str__(self) -> str:
        return self.name

    @property
    def fwd(self) -> ops.Operator:
        return getattr(ops, f"{self.name}_fwd")

    @property
    def bwd(self) -> ops.Operator:
        return getattr(ops, f"{self.name}_bwd")

    def forward(self, call: Call, backend: str) -> tuple[Tensor, ...]:
        return self.fwd(*self.forward_arguments(call), backend)

    def backward(
        self, call: Call, outputs: Sequence[Tensor], above: Sequence[Tensor | None], backend: str
    ) -> Tensor:
        return self.bwd(*self.backward_arguments(call, outputs, above), backend)

    def above(self, call: Call, which: str) -> list[Tensor | None]:
        """Upstream gradients of loss (a), lse (b) and probs (q), as far as `which` names them."""
        torch.manual_seed(1)
        shapes = [call.target.shape, call.target.shape, (*call.target.shape, call.k)][
            : self.differentiable
        ]
        drawn = [
            torch.randn(shape, dtype=call.statistics).to(call.logits.device) for shape in shapes
        ]
        return [d if name in which else None for name, d in zip("abq", drawn, strict=False)]


def _topk_forward_arguments(call: Call) -> tuple[object, ...]:
    return call.logits, call.target, call.weight, call.k, call.label_smoothing


def _threshold_forward_arguments(call: Call) -> tuple[object, ...]:
    return call.logits, call.target, call.weight, call.k, 1.0, call.label_smoothing


def _topk_outputs(call: Call) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    rows = tuple(call.target.shape)
    per_row, listed = (call.statistics, rows), (call.statistics, (*rows, call.k))
    return [per_row, per_row, (torch.int32, (*rows, call.k)), listed]


def _topk_backward_arguments(
    call: Call, outputs: Sequence[Tensor], above: Sequence[Tensor | None]
) -> tuple[object, ...]:
    _, _, indices, probs = outputs
    rest = (call.weight, call.label_smoothing, call.logits.shape[-1], call.logits.dtype)
    return *above, call.target, indices, probs, *rest


def _threshold_outputs(call: Call) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    rows = tuple(call.target.shape)
    return [(call.statistics, rows)] * 5 + [(torch.int32, rows)] * 2


def _threshold_backward_arguments(
    call: Call, outputs: Sequence[Tensor], above: Sequence[Tensor | None]
) -> tuple[object, ...]:
    return *above, call.logits, call.target, *outputs[2:], call.weight, call.label_smoothing


def _assert_threshold_forward(truth: Truth, outputs: Sequence[Tensor]) -> None:
    """The cut describes the support: i is kept where (z_i, i) is not after (cut, cut index)."""
    loss, lse, row_max, log_sum, cut, cut_index, kept = (o.cpu().flatten() for o in outputs)
    assert (kept == truth.k).all()
    truth.assert_loss(loss)
    truth.assert_lse(lse)
    first = truth.kept[:, 0]
    finite = first.isfinite()
    assert torch.equal(row_max.double()[finite], first[finite])
    truth.assert_lse(torch.where(finite, log_sum + row_max, torch.nan))
    z, cut = truth.z, cut.double().unsqueeze(-1)
    smaller = (z < cut) | (cut.isnan() & ~z.isnan())
    equal = (z == cut) | (cut.isnan() & z.isnan())
    after = smaller | (equal & (torch.arange(z.shape[-1]) > cut_index.unsqueeze(-1)))
    support = torch.zeros_like(z, dtype=torch.bool).scatter(-1, truth.indices, True)
    assert torch.equal(~after, support)


STEMS = (
    Stem(
        "topk_ce",
        lists=True,
        differentiable=3,
        outputs=_topk_outputs,
        forward_arguments=_topk_forward_arguments,
        backward_arguments=_topk_backward_arguments,
        assert_forward=lambda truth, outputs: truth.assert_forward(*outputs),
    ),
    Stem(
        "threshold_ce",
        lists=False,
        differentiable=2,
        outputs=_threshold_outputs,
        forward_arguments=_threshold_forward_arguments,
        backward_arguments=_threshold_backward_arguments,
        assert_forward=_assert_threshold_forward,
    ),
)
