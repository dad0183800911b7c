"""What a learnable function of the logits costs: python -m bench.plif

The training step of MonotonicPLIF before the softmax over all classes, and on the k largest, beside
the same step without it and beside tensor operations: cells by arithmetic, lines by indexing,
F.cross_entropy. Two goals: on the k largest at most 1.1 times the step without, over all classes at
least three times as fast as the tensor operations, with O(N) + O(K) saved.

Ours with the function are first checked against float64 on rows of the problem that is timed:
their errors of the loss, of dlogits and of dw as a whole may be twice those of the tensor
operations. Then the providers take turns, as in bench.run; ratios are formed within a round.
"saved" counts what autograd keeps from forward to backward besides the logits themselves.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sparse_ce import MonotonicPLIF, backends, fused_sparse_ce
from torch import Tensor

from .problems import DTYPES
from .run import GPU_ROUNDS, HERE, LEAST_ROUNDS, environment, peak_memory, spread, stopwatch

PASSES = ("forward", "forward+backward", "backward")
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
    return slopes[cell] * (z - (cell * width - link.bound)) + heights[cell]


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
# what the goals compare: numerator, denominator
RATIOS = (
    ("topk.plif", "topk"),
    ("topk.composition", "topk.plif"),
    ("dense.plif", "dense"),
    ("dense.composition", "dense.plif"),
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


@dataclass
class Entrant:
    name: str
    ours: bool
    status: str = "ok"
    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    saved: int = 0
    peak: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PASSES})

    def enter(self, loss: Loss, case: Case) -> None:
        self.case = case
        self.train = partial(loss, case.logits, case.target, case.k, case.link)

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.train()

    def each_pass(self, measure: Callable[[Callable[[], object]], Any]) -> dict[str, Any]:
        found = {"forward": measure(self.infer)}
        found["forward+backward"] = measure(lambda: self.train().backward())
        self.clear()
        found["backward"] = measure(self.train().backward)
        self.clear()
        return found

    def clear(self) -> None:
        self.case.logits.grad = self.case.link.w.grad = None

    def saved_bytes(self) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.train()
        return sum(n for at, n in sizes.items() if at != self.case.logits.data_ptr())


def admit(name: str, case: Case) -> Entrant:
    loss, ours, plain = PROVIDERS[name]
    entrant = Entrant(name, ours)
    try:
        entrant.enter(loss, case)
        if plain is not None:
            truth = case.gradients(plain, double=True)
            allowed = case.errors(plain, truth)
            entrant.errors = case.errors(loss, truth)
            for part, error in entrant.errors.items():
                if not error <= 2 * allowed[part] + 1e-6:
                    entrant.status = "wrong"
                    entrant.reason = f"{part}: error {error:.3g}, plain {allowed[part]:.3g}"
                    break
        entrant.saved = entrant.saved_bytes()
        entrant.peak = entrant.each_pass(partial(peak_memory, case.logits.device))
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        entrant.status, entrant.reason = "error", f"{type(error).__name__}: {first_line}"
    return entrant


def measure(
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    case = Case.of(problem, device, dtype)
    entrants = [admit(name, case) for name in names]
    racing = [entrant for entrant in entrants if entrant.status == "ok"]
    clock = stopwatch(device)
    gc.collect()
    gc.disable()
    for turn in range(rounds):
        first = turn % max(1, len(racing))
        for entrant in racing[first:] + racing[:first]:
            spent = sum(map(sum, entrant.samples.values())) / 1e3
            if turn < LEAST_ROUNDS or spent < seconds:
                for name, milliseconds in entrant.each_pass(clock).items():
                    entrant.samples[name].append(milliseconds)
    gc.enable()
    samples = {entrant.name: entrant.samples for entrant in racing}
    return {
        "problem": {**asdict(problem), "dtype": str(dtype).removeprefix("torch.")},
        "backend": backends.resolve("auto", device.type, dtype, False),
        "providers": [row(entrant) for entrant in entrants],
        "ratios": {
            f"{a} / {b}": {
                name: spread([x / y for x, y in zip(times, samples[b][name], strict=False)])
                for name, times in samples[a].items()
            }
            for a, b in RATIOS
            if a in samples and b in samples
        },
    }


def row(entrant: Entrant) -> dict[str, Any]:
    return {
        "provider": entrant.name,
        "ours": entrant.ours,
        "status": entrant.status,
        "reason": entrant.reason,
        "relative_errors": entrant.errors,
        "saved_bytes": entrant.saved,
        "passes": {
            name: {**spread(times), "peak_bytes": entrant.peak[name], "samples": times}
            for name, times in entrant.samples.items()
            if times
        },
    }


def show(result: dict[str, Any]) -> None:
    problem = "N={rows} V={classes} k={k} K={cells} {dtype}".format(**result["problem"])
    print(f"\n{problem}, backend {result['backend']}")
    columns = f"{'ms':>10}{'p20':>10}{'p80':>10}{'peak MB':>10}{'saved MB':>10}"
    print(f"  {'provider':<19}{'pass':<17}{columns}")
    for found in result["providers"]:
        head = f"  {found['provider']:<19}"
        if found["status"] != "ok":
            print(f"{head}{found['status']}: {found['reason']}")
        for name, p in found["passes"].items():
            times = "".join(f"{p[key]:10.2f}" for key in ("median", "p20", "p80"))
            memory = f"{p['peak_bytes'] / 1e6:10.1f}{found['saved_bytes'] / 1e6:10.2f}"
            print(f"{head}{name:<17}{times}{memory}")
            head = " " * len(head)
    for pair, found in result["ratios"].items():
        points = "{} {median:.2f} ({p20:.2f}-{p80:.2f})".format
        print(f"  {pair}:", ", ".join(points(name, **s) for name, s in found.items()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "bench.plif", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", nargs=4, type=int, action="append", metavar=("N", "V", "K", "CELLS"))
    add("--dtype", choices=DTYPES, nargs="+", default=["bf16", "fp32"])
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--provider", choices=PROVIDERS, nargs="+", default=list(PROVIDERS))
    add("--threads", type=int, default=2, help="of the CPU (2)")
    add("--repeats", type=int, help="rounds (CPU 15, GPU 50)")
    add("--seconds", type=float, default=20, help="after which a provider sits out")
    add("--json", nargs="?", const="", metavar="PATH", help="default: in bench/results")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    about = environment(device)
    print(json.dumps(about, indent=1))
    rounds = options.repeats or (15 if device.type == "cpu" else GPU_ROUNDS)
    problems = [Problem(*shape) for shape in options.shape or ()] or GOALS[device.type]
    path = Path(options.json or HERE / "results" / f"plif-{device.type}-{about['date']}.json")
    results = []
    for problem, dtype in product(problems, options.dtype):
        found = measure(problem, DTYPES[dtype], device, options.provider, rounds, options.seconds)
        results.append(found)
        show(found)
        if options.json is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"environment": about, "results": results}, indent=1)
            path.write_text(text + "\n")
    rows = [row for result in results for row in result["providers"]]
    fatal = [r for r in rows if r["status"] == "wrong" or (r["ours"] and r["status"] == "error")]
    for r in fatal:
        print(f"{r['provider']}: {r['status']}: {r['reason']}", file=sys.stderr)
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(main())
