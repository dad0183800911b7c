"""How far a result may be from the truth, and why: the tolerances of the kernels' tests.

The truth is reference.py in float64 on the inputs as they were rounded, so the dtype of the logits
widens no tolerance: float32 logits and bfloat16 ones go through the same float32 arithmetic. A unit
is the ulp of 1 in the dtype of the statistics. (For float64 logits the truth errs as much as the
result: a unit is two ulp.) For a support of k classes, s_i = z_i - max z <= 0, l = sum exp(s_i):

addend    s_i is rounded, and again on its way to exp2: |s_i| units together; exp itself: 2 units.
log l     the addends' relative errors weighted by p_i: 2 + sum p_i |s_i| <= 2 + log k units. Their
          sum, pairwise or by lanes, half a unit per level: log2(k) / 2. The logarithm's rounding,
          and that of all that follows, is relative to the loss.
loss      w (log l + (max z - z_y)): both terms are at least 0, nothing cancels. The error of log l,
          and 4 units of the loss for the logarithm, two subtractions and the weight. With label
          smoothing a sum of k such terms, log2(k) / 2 units of the loss more. No term for the size
          of the logits: at an offset of 2^24 a loss is as exact as at 0.
lse       max z + log l: as the loss, and half a unit of |lse|.
p_i       exp(s_i - log l): 2 |log p_i| units for the rounded exponent, the error of log l, and
          2 log k, since log l <= log k is rounded too.
gradient  three terms, upstream times p_i, smoothing and target: the errors are relative to their
          absolute values, not to their sum, which may cancel. Then half an ulp of the output.

Of stem labels_ce either side of the labels is such a log-sum-exp, of the n kept z, or -z, and of
one 0 beside them. It is saved as one number: the gradient errs with the size of the logits.

negative  as the lse of n + 1 classes, and so is positive; the loss half a unit of itself more.
gradient  exp(z - negative) = q: the error of negative, 2 |log q| units for the rounded exponent, 2
          for exp and one for the product.

The distances of stem cosine, between vectors c and e of width D, cos = c . e / (|c| |e|). A sum of
D products errs by h = (1 + D / 32 + 7) / 2 units of the sum of their absolute values: each product
is rounded, there are 32 lanes or more, and seven levels to add them up. By Cauchy and Schwarz that
sum is at most |c| |e|.

cos       h, and |cos| (h + 3): half of h for either norm, and six roundings of half a unit.
1 - cos   that, and half a unit of the loss.
beta      cos / |c|^2: the error of cos over |c|^2, and |beta| (h + 1/2).
alpha     1 / (|c| |e|): h + 2.5 units.
gradient  the errors of beta c and alpha e, and 3/2 of their absolute values for products and sums.
l2        h + 1 units of the loss, for the differences; the gradient c - e is rounded twice.

Results below the smallest normal number may be flushed to zero.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from sparse_ce import reference
from torch import Tensor


def _log_sum_units(k: int) -> float:
    return 2 + math.log(k) + math.log2(k) / 2


def probability_units(k: int) -> float:
    return 2 + _log_sum_units(k) + 2 * math.log(k)


def assert_within(name: str, actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    """|actual - expected| <= tolerance for each element; NaN and infinities where expected."""
    found = actual.detach().cpu().double().reshape(expected.shape)
    tolerance = tolerance.expand(expected.shape)
    same = (found == expected) | (found.isnan() & expected.isnan())
    wrong = ~same & ~((found - expected).abs() <= tolerance)
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        e, t, a = (float(x[place]) for x in (expected, tolerance, found))
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, "
            f"first at {place}: expected {e!r} within {t:.3g}, got {a!r}"
        )


def with_rounding(expected: Tensor, tolerance: Tensor, dtype: torch.dtype) -> Tensor:
    """The tolerance of a gradient that is rounded to its dtype; what is exact stays exact."""
    output = torch.finfo(dtype)
    rounding = (expected.abs() + tolerance) * output.eps / 2 if output.bits < 32 else 0
    rounding += output.smallest_normal * (output.eps / 2 if output.bits == 16 else 1)
    return torch.where(tolerance == 0, 0, tolerance + rounding)


@dataclass
class Truth:
    """What a call of an operator should return, in float64 and with N rows, and how closely."""

    logits: Tensor  # (..., V)
    target: Tensor  # (...)
    k: int
    weight: Tensor | None = None  # (V)
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        self.dtype = self.logits.dtype
        self.z = self.logits.detach().cpu().double().reshape(-1, self.logits.shape[-1])
        self.y = self.target.cpu().long().flatten()
        self.hit = (self.y >= 0) & (self.y < self.z.shape[-1])
        self.w = (
            torch.ones(self.z.shape[-1]).double()
            if self.weight is None
            else self.weight.cpu().double()
        )
        self.indices = reference.support_indices(self.z, self.k)
        self.kept = self.z.gather(-1, self.indices)
        self.lse = self.kept.logsumexp(-1)
        self.probs = self.kept.softmax(-1)
        statistics = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.unit = torch.finfo(statistics).eps * (2 if statistics == torch.float64 else 1)
        self.smallest = torch.finfo(statistics).tiny

    @cached_property
    def _graph(self) -> tuple[Tensor, Tensor]:
        """The logits that the oracle differentiates by, and its losses, 0 where there is no hit."""
        z = self.z.clone().requires_grad_()
        no_hit = -100
        return z, reference.sparse_ce(
            z,
            self.y.where(self.hit, no_hit),
            self.k,
            weight=None if self.weight is None else self.w,
            ignore_index=no_hit,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )

    @property
    def loss(self) -> Tensor:
        return self._graph[1].detach().masked_fill(~self.hit, torch.nan)

    @cached_property
    def _weight_of_row(self) -> Tensor:
        """(N): the sum of the weights that the terms of a row's loss have."""
        at_target = self.w[self.y.where(self.hit, 0)]
        spread = self.w[self.indices].mean(-1)
        return (1 - self.label_smoothing) * at_target + self.label_smoothing * spread

    @property
    def loss_tolerance(self) -> Tensor:
        relative = 4 + (math.log2(self.k) / 2 if self.label_smoothing else 0)
        units = self._weight_of_row * _log_sum_units(self.k) + relative * self.loss.abs()
        return self.unit * units

    @property
    def lse_tolerance(self) -> Tensor:
        log_sum = self.lse - self.kept[:, 0]
        return self.unit * (_log_sum_units(self.k) + 4 * log_sum + self.lse.abs() / 2)

    @property
    def probs_tolerance(self) -> Tensor:
        exponent = 2 * torch.special.entr(self.probs)  # p |log p|
        return self.unit * (exponent + probability_units(self.k) * self.probs) + self.smallest

    def assert_forward(self, loss: Tensor, lse: Tensor, indices: Tensor, probs: Tensor) -> None:
        found = indices.cpu().long().reshape(self.indices.shape)
        assert torch.equal(found, self.indices), f"indices: expected {self.indices}, got {found}"
        self.assert_loss(loss)
        self.assert_lse(lse)
        assert_within("probs", probs, self.probs, self.probs_tolerance)

    def assert_loss(self, loss: Tensor) -> None:
        assert_within("loss", loss, self.loss, self.loss_tolerance)

    def assert_lse(self, lse: Tensor) -> None:
        # in a row of only -inf, or with +inf or NaN, it is enough that the lse is not finite
        finite = self.kept[:, 0].isfinite()
        assert not lse.cpu().flatten()[~finite].isfinite().any(), "lse: expected none of such rows"
        assert_within(
            "lse", lse.cpu().flatten()[finite], self.lse[finite], self.lse_tolerance[finite]
        )

    def assert_gradient(
        self,
        dlogits: Tensor,
        dloss: Tensor | None = None,
        dlse: Tensor | None = None,
        dprobs: Tensor | None = None,
    ) -> None:
        """Of sum(dloss loss + dlse lse + dprobs probs); exact zeros in rows without any of them."""
        assert dlogits.dtype == self.dtype, f"dlogits: expected {self.dtype}, got {dlogits.dtype}"
        rows = self.z.shape[0]
        a, b = (
            torch.zeros(rows).double() if d is None else d.detach().cpu().double().reshape(rows)
            for d in (dloss, dlse)
        )
        a = a.where(self.hit, 0)
        q = torch.zeros(rows, self.k).double()
        if dprobs is not None:
            q = dprobs.detach().cpu().double().reshape(rows, self.k)
        active = ((a != 0) | (b != 0) | (q != 0).any(-1)).nonzero().flatten()
        expected, tolerance = torch.zeros_like(self.z), torch.zeros_like(self.z)
        if active.numel():
            expected[active] = self._gradient(active, a[active], b[active], q[active])
            tolerance[active] = self._gradient_tolerance(active, a[active], b[active], q[active])
        tolerance = with_rounding(expected, tolerance, self.dtype)
        assert_within("dlogits", dlogits, expected, tolerance)

    def _gradient(self, rows: Tensor, a: Tensor, b: Tensor, q: Tensor) -> Tensor:
        z, losses = self._graph
        kept = z.gather(-1, self.indices)[rows]
        # a loss without a gradient from above stays out of the sum: it may be infinite
        counted = a != 0
        total = (a[counted] * losses[rows][counted]).sum()
        # less its maximum, which changes no gradient: float64 too loses log k beside 3e38
        shifted = kept - kept[:, :1].detach()
        total = (
            total
            + (b * shifted.logsumexp(-1))[b != 0].sum()
            + (q * kept.softmax(-1))[(q != 0).any(-1)].sum()
        )
        return torch.autograd.grad(total, z, retain_graph=True)[0][rows]

    def _gradient_tolerance(self, rows: Tensor, a: Tensor, b: Tensor, q: Tensor) -> Tensor:
        index, p = self.indices[rows], self.probs[rows]
        above = (a.abs() * self._weight_of_row[rows] + b.abs() + (p * q.abs()).sum(-1)).unsqueeze(
            -1
        ) + q.abs()
        smoothing = a.abs().unsqueeze(-1) * self.label_smoothing / self.k * self.w[index]
        units = (
            above * (2 * torch.special.entr(p) + (4 + probability_units(self.k)) * p)
            + 4 * smoothing
        )
        tolerance = (
            torch.zeros(len(rows), self.z.shape[-1])
            .double()
            .scatter(-1, index, self.unit * units + self.smallest)
        )
        y = self.y.where(self.hit, 0)[rows]
        at_target = 4 * self.unit * a.abs() * (1 - self.label_smoothing) * self.w[y]
        return tolerance.scatter_add(-1, y.unsqueeze(-1), at_target.unsqueeze(-1))


@dataclass
class LabelsTruth:
    """What labels_ce_fwd and labels_ce_bwd should return, given what is kept, as Truth."""

    logits: Tensor  # (N, V)
    negatives: Tensor  # (N, V) bool: those that are kept
    positives: Tensor  # (N, V) bool

    def __post_init__(self) -> None:
        self.dtype = self.logits.dtype
        z = self.logits.detach().cpu().double()
        statistics = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.unit = torch.finfo(statistics).eps * (2 if statistics == torch.float64 else 1)
        self.smallest = torch.finfo(statistics).tiny
        self.sides = [self._side(z, self.negatives), self._side(-z, self.positives)]

    def _side(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The log-sum-exp of a side, its tolerance, and the exponents of its gradient."""
        x = torch.cat([torch.zeros_like(x[:, :1]), x.masked_fill(~kept, -torch.inf)], -1)
        lse, n = x.logsumexp(-1), kept.sum(-1)
        log_sum_units = 2 + (n + 1).log() + (n + 1).log2() / 2
        units = log_sum_units + 4 * (lse - x.amax(-1)) + lse.abs() / 2
        return lse, self.unit * units, x[:, 1:] - lse.unsqueeze(-1)

    def assert_forward(self, loss: Tensor, negative: Tensor, positive: Tensor) -> None:
        (over, over_tolerance, _), (under, under_tolerance, _) = self.sides
        assert_within("negative", negative, over, over_tolerance)
        assert_within("positive", positive, under, under_tolerance)
        tolerance = over_tolerance + under_tolerance + self.unit * (over + under).abs() / 2
        assert_within("loss", loss, over + under, tolerance)

    def assert_gradient(self, dlogits: Tensor, dloss: Tensor) -> None:
        """Of sum(dloss loss); exact zeros in rows without it, and of what is not kept."""
        assert dlogits.dtype == self.dtype, f"dlogits: expected {self.dtype}, got {dlogits.dtype}"
        a = dloss.detach().cpu().double().unsqueeze(-1)
        expected, tolerance = (torch.zeros(self.logits.shape).double() for _ in range(2))
        for sign, kept, (_, of_lse, exponent) in zip(
            (1, -1), (self.negatives, self.positives), self.sides, strict=True
        ):
            q = exponent.exp()
            units = 2 * torch.special.entr(q) + (of_lse.unsqueeze(-1) / self.unit + 4) * q
            counted = kept & (a != 0)
            expected = torch.where(counted, sign * a * q, expected)
            within = a.abs() * (self.unit * units + self.smallest)
            tolerance = torch.where(counted, within, tolerance)
        assert_within("dlogits", dlogits, expected, with_rounding(expected, tolerance, self.dtype))


@dataclass
class DistanceTruth:
    """What a call of cosine_fwd and cosine_bwd should return, as Truth."""

    output: Tensor  # (..., D)
    target: Tensor  # (...)
    embedding: Tensor  # (V, D)
    distance: str = "cosine"

    def __post_init__(self) -> None:
        self.dtype = self.output.dtype
        self.c = self.output.detach().cpu().double().reshape(-1, self.output.shape[-1])
        y = self.target.cpu().long().flatten()
        table = self.embedding.cpu().double()
        self.hit = (y >= 0) & (y < table.shape[0])
        self.e = table[y.where(self.hit, 0)]
        no_hit = -100
        leaf = self.c.clone().requires_grad_()
        losses = reference.continuous_output(
            leaf, y.where(self.hit, no_hit), table, self.distance, ignore_index=no_hit,
            reduction="none",
        )  # fmt: skip
        self.loss = losses.detach().masked_fill(~self.hit, torch.nan)
        (self.gradient,) = torch.autograd.grad(losses.sum(), leaf)
        statistics = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.unit = torch.finfo(statistics).eps * (2 if statistics == torch.float64 else 1)
        self._derive((1 + self.c.shape[-1] / 32 + 7) / 2)

    def _derive(self, h: float) -> None:
        if self.distance == "l2":
            self.loss_tolerance = self.unit * (h + 1) * self.loss
            self.gradient_tolerance = self.unit * self.gradient.abs()
            return
        norm_c, norm_e = (v.norm(dim=-1, keepdim=True) for v in (self.c, self.e))
        cos = (1 - self.loss).unsqueeze(-1).abs()
        of_cos = h + cos * (h + 3)
        self.loss_tolerance = self.unit * (of_cos.squeeze(-1) + self.loss.abs() / 2)
        c, e = self.c.abs() / norm_c**2, self.e.abs() / (norm_c * norm_e)
        units = (of_cos + cos * (h + 0.5 + 1.5)) * c + (h + 2.5 + 1.5) * e
        directed = self.hit.unsqueeze(-1) & (norm_c > 0) & (norm_e > 0)
        self.gradient_tolerance = self.unit * torch.where(directed, units, 0)

    def assert_loss(self, loss: Tensor) -> None:
        assert_within("loss", loss, self.loss, self.loss_tolerance)

    def assert_gradient(self, doutput: Tensor, dloss: Tensor) -> None:
        """Of sum(dloss loss); exact zeros where there is none."""
        assert doutput.dtype == self.dtype and doutput.shape == self.output.shape
        a = dloss.detach().cpu().double().reshape(-1, 1)
        counted = self.hit.unsqueeze(-1) & (a != 0)
        expected = torch.where(counted, a * self.gradient, 0)
        tolerance = torch.where(counted, a.abs() * self.gradient_tolerance, 0)
        tolerance = with_rounding(expected, tolerance, self.dtype)
        assert_within("doutput", doutput, expected, tolerance)
