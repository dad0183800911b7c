"""What a learnable function of the logits costs: python -m bench.plif

The training step of MonotonicPLIF before the softmax over all classes, and on the k largest, beside
the same step without it and beside tensor operations: cells by arithmetic, lines by indexing,
F.cross_entropy. Two goals: on the k largest at most 1.1 times the step without, over all classes at
least three times as fast as the tensor operations, with O(N) + O(K) saved.

How providers are checked, timed and weighed: race.py. Here ours with the function are held against
float64 on rows of the problem that is timed: a tolerance is twice the error of the tensor
operations, of the loss, and of dlogits and of dw as a whole. "saved" counts what autograd keeps
from forward to backward besides the logits themselves.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from sparse_ce import MonotonicPLIF, backends, fused_sparse_ce
from torch import Tensor

from .race import (
    DTYPES,
    GPU_ROUNDS,
    Entrant,
    Report,
    admit,
    arguments,
    chosen,
    passes_of,
    ratio,
    show,
    show_ratios,
    stopwatch,
    take_turns,
)

CHECKED_ROWS = 16


@dataclass(frozen=True)
class Problem:
    rows: int
    classes: int
    k: int = 20
    cells: int = 100_000


GOALS = {"cpu": (Problem(2048, 32000),), "cuda": (Problem(8192, 32000), Problem(8192, 128256))}
Loss = Callable[[Tensor, Tensor, int, MonotonicPLIF], Tensor]


def _ours(dense: bool, linked: bool, logits: Tensor, target: Tensor, k: int, link: Any) -> Tensor:
    return fused_sparse_ce(logits, target, None if dense else k, link=link if linked else None)


def composition(logits: Tensor, link: MonotonicPLIF) -> Tensor:
    """f(logits) in tensor operations, as it is published: heights above knots."""
    slopes = F.softplus(link.w.to(torch.promote_types(logits.dtype, torch.float32)))
    width = 2 * link.bound / link.num_cells
    heights = width * F.pad(slopes.cumsum(0)[:-1], (1, 0))
    z = logits.to(slopes.dtype)
    cell = ((z.detach() + link.bound) / width).long().clamp_(0, link.num_cells - 1)
    # a product of int64 with a number would be float32, in float64 too
    return slopes[cell] * (z - (cell.to(z.dtype) * width - link.bound)) + heights[cell]


def _dense_composition(logits: Tensor, target: Tensor, k: int, link: MonotonicPLIF) -> Tensor:
    return F.cross_entropy(composition(logits, link), target)


def _loss_of(indices: Tensor, logits: Tensor, target: Tensor, link: MonotonicPLIF) -> Tensor:
    places = torch.cat([indices, target.unsqueeze(-1)], -1)
    f = composition(logits.gather(-1, places), link)
    return (f[:, :-1].logsumexp(-1) - f[:, -1]).mean()


def _topk_composition(logits: Tensor, target: Tensor, k: int, link: MonotonicPLIF) -> Tensor:
    return _loss_of(logits.detach().topk(k, -1).indices, logits, target, link)


def _topk_by_index(logits: Tensor, target: Tensor, k: int, link: MonotonicPLIF) -> Tensor:
    """Of equal logits the first is kept, as by ours; torch.topk leaves that open."""
    order = logits.detach().sort(dim=-1, descending=True, stable=True).indices
    return _loss_of(order[:, :k], logits, target, link)


# name -> (its loss, ours, the plain form that its errors are held against, or None)
PROVIDERS: dict[str, tuple[Loss, bool, Loss | None]] = {
    "topk": (partial(_ours, False, False), True, None),
    "topk.plif": (partial(_ours, False, True), True, _topk_by_index),
    "topk.composition": (_topk_composition, False, None),
    "dense": (partial(_ours, True, False), True, None),
    "dense.plif": (partial(_ours, True, True), True, _dense_composition),
    "dense.composition": (_dense_composition, False, _dense_composition),
}
# what the goals compare: how many times as long the second takes
RATIOS = (
    ("topk", "topk.plif"),
    ("topk.plif", "topk.composition"),
    ("dense", "dense.plif"),
    ("dense.plif", "dense.composition"),
)


@dataclass
class Case:
    logits: Tensor
    target: Tensor
    k: int
    link: MonotonicPLIF

    @staticmethod
    def of(problem: Problem, device: torch.device, dtype: torch.dtype) -> "Case":
        """Logits of spread 3; in every other row the target leads. Trained slopes."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (problem.rows, problem.classes)
        logits = 3 * torch.randn(shape, device=device, generator=generator)
        target = torch.randint(shape[1], shape[:1], device=device, generator=generator)
        lead = torch.full((problem.rows, 1), 12.0, device=device)
        lead[1::2] = 0
        logits.scatter_add_(-1, target.unsqueeze(-1), lead)
        torch.manual_seed(0)
        link = MonotonicPLIF(problem.cells, init_std=0.1).to(device)
        return Case(logits.to(dtype).requires_grad_(), target, problem.k, link)

    def gradients(self, loss: Loss, double: bool = False) -> dict[str, Tensor]:
        """Of the first rows."""
        link = MonotonicPLIF(self.link.num_cells, self.link.bound).to(self.link.w.device)
        link.load_state_dict(self.link.state_dict())
        logits = self.logits.detach()[:CHECKED_ROWS].clone()
        if double:
            link, logits = link.double(), logits.double()
        value = loss(logits.requires_grad_(), self.target[:CHECKED_ROWS], self.k, link)
        value.backward()
        return {"loss": value.detach(), "dlogits": logits.grad, "dw": link.w.grad}

    def errors(self, loss: Loss, truth: dict[str, Tensor]) -> dict[str, float]:
        return {
            name: ((value.double() - truth[name]).norm() / truth[name].norm()).item()
            for name, value in self.gradients(loss).items()
        }


def saved_bytes(case: Case, train: Callable[[], Tensor]) -> int:
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        train()
    return sum(n for at, n in sizes.items() if at != case.logits.data_ptr())


def enter(case: Case, entrant: Entrant) -> dict[str, float]:
    loss, _, plain = PROVIDERS[entrant.name]
    train = partial(loss, case.logits, case.target, case.k, case.link)
    entrant.leaves = (case.logits, case.link.w)
    entrant.passes = passes_of(torch.no_grad()(train), train)
    entrant.more["saved_bytes"] = saved_bytes(case, train)
    if plain is None:
        return {}
    truth = case.gradients(plain, double=True)
    allowed = case.errors(plain, truth)
    errors = case.errors(loss, truth)
    entrant.more["relative_errors"] = errors
    return {part: error / (2 * allowed[part] + 1e-6) for part, error in errors.items()}


def measure(
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    case = Case.of(problem, device, dtype)
    entrants = [
        admit(Entrant(name, PROVIDERS[name][1]), device, None, partial(enter, case))
        for name in names
    ]
    racing = {e.name: e for e in take_turns(entrants, stopwatch(device), rounds, seconds)}
    found: dict[str, Any] = {}
    for base, rival in RATIOS:
        if base in racing and rival in racing:
            found.setdefault(base, {})[rival] = ratio(racing[base], racing[rival])
    return {
        "problem": {**asdict(problem), "dtype": str(dtype).removeprefix("torch.")},
        "backend": backends.resolve("auto", device.type, dtype, False),
        "providers": [entrant.row() for entrant in entrants],
        "ratios": found,
    }


def display(result: dict[str, Any]) -> None:
    problem = "N={rows} V={classes} k={k} K={cells} {dtype}".format(**result["problem"])
    print(f"\n{problem}, backend {result['backend']}")
    show(result["providers"], {"saved MB": lambda row, found: f"{row['saved_bytes'] / 1e6:.2f}"})
    show_ratios(result["ratios"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("bench.plif", __doc__, dtypes=("bf16", "fp32"))
    add = parser.add_argument
    add("--shape", nargs=4, type=int, action="append", metavar=("N", "V", "K", "CELLS"))
    add("--seconds", type=float, default=20, help="after which a provider sits out")
    options = parser.parse_args(argv)
    names = chosen(parser, options.provider, PROVIDERS)
    report = Report("plif", options)
    device = report.device
    rounds = options.repeats or (15 if device.type == "cpu" else GPU_ROUNDS)
    problems = [Problem(*shape) for shape in options.shape or ()] or GOALS[device.type]
    for problem, name in product(problems, options.dtype):
        report.add(measure(problem, DTYPES[name], device, names, rounds, options.seconds))
        display(report.results[-1])
    return report.exit_status()


if __name__ == "__main__":
    sys.exit(main())
