"""An output layer's training step beside its rivals: python -m bench.linear

Loss and gradients of hidden and weight, from hidden states to gradients. Every provider is first
checked on the problem that is timed: its errors against float64, of the loss, of dhidden and of
dweight as a whole, may be twice those of the plain layer in the same dtype, `linear` and then the
loss in tensor operations. Then the providers take turns, as in bench.run; ratios are formed within
a round. "product" is the bare product of forward, into memory that exists: no output layer is
faster. "dense" marks another loss, the softmax over all classes.

    python -m bench.linear --break-even     our two ways of backward over k: the constants of
                                            sparse_ce.linear.break_even
"""

import argparse
import gc
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sparse_ce import backends, fused_linear_sparse_ce, linear
from torch import Tensor

from .problems import DTYPES
from .providers import Forward
from .run import GPU_ROUNDS, HERE, LEAST_ROUNDS, environment, peak_memory, spread, stopwatch

PASSES = ("forward", "forward+backward", "backward")
Make = Callable[[Tensor, Tensor, Tensor, int], Forward]


@dataclass(frozen=True)
class Problem:
    tokens: int
    features: int
    classes: int
    k: int = 20


# the shapes whose numbers the project must reach
FLOOR = {
    "cpu": (Problem(1024, 576, 49152), Problem(512, 2048, 32000)),
    "cuda": (Problem(8192, 4096, 128256), Problem(16384, 4096, 128256)),
}
BREAK_EVEN = {
    "cpu": (Problem(512, 576, 32000), Problem(256, 576, 128256), Problem(512, 2048, 4096)),
    "cuda": (Problem(8192, 4096, 32000), Problem(8192, 4096, 128256)),
}
SHARES = (1 / 2000, 1 / 1000, 1 / 500, 1 / 250, 1 / 125, 1 / 60, 1 / 30, 1 / 15, 1 / 8, 1 / 4)


@dataclass(frozen=True)
class Provider:
    name: str
    make: Make
    unavailable: Callable[[torch.device], str | None] = lambda device: None
    ours: bool = False
    loss: str = "top-k"


def _ours(backend: str, backward: str) -> Provider:
    def make(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
        return lambda: fused_linear_sparse_ce(
            hidden, weight, target, k, backend=backend, backward=backward
        )

    def unavailable(device: torch.device) -> str | None:
        if backend == "triton" and backends.interpreting():
            return "Triton's interpreter is not for timing"
        try:
            backends.resolve(backend, device.type, torch.float32, False)
        except RuntimeError as error:
            return str(error)
        return None

    way = "" if backward == "auto" else f".{backward}"
    return Provider(f"sparse_ce.{backend}{way}", make, unavailable, ours=True)


def _plain_topk(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
    def loss() -> Tensor:
        logits = F.linear(hidden, weight)
        values = logits.topk(k, dim=-1).values.float()
        target_logit = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1).float()
        return (values.logsumexp(-1) - target_logit).mean()

    return loss


def _plain_dense(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
    return lambda: F.cross_entropy(F.linear(hidden, weight), target)


def _torch_linear(options: bool) -> Make:
    def make(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
        how = torch.nn.LinearCrossEntropyOptions() if options else None
        return lambda: F.linear_cross_entropy(hidden, weight, target, options=how)

    return make


def _no_torch_linear(device: torch.device) -> str | None:
    missing = not hasattr(F, "linear_cross_entropy")
    return "this torch has no F.linear_cross_entropy" if missing else None


def _liger(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda: liger_fused_linear_cross_entropy(hidden, weight, target)


def _cce(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(hidden, weight, target)


def _quack(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: chunked_linear_cross_entropy(hidden, weight, target, reduction="mean")


def _needs(package: str) -> Callable[[torch.device], str | None]:
    def unavailable(device: torch.device) -> str | None:
        if device.type != "cuda":
            return "it runs on a GPU only"
        missing = importlib.util.find_spec(package) is None
        return f"the package {package} is not installed" if missing else None

    return unavailable


# what is plain in each loss, and sets the tolerance of the others
PLAIN = {"top-k": _plain_topk, "dense": _plain_dense}
PROVIDERS = (
    *(_ours(name, "auto") for name in backends.NAMES),
    Provider("linear+composition", _plain_topk),
    Provider("linear+cross_entropy", _plain_dense, loss="dense"),
    Provider("linear_cross_entropy", _torch_linear(False), _no_torch_linear, loss="dense"),
    Provider("linear_cross_entropy.chunked", _torch_linear(True), _no_torch_linear, loss="dense"),
    Provider("liger", _liger, _needs("liger_kernel"), loss="dense"),
    Provider("cce", _cce, _needs("cut_cross_entropy"), loss="dense"),
    Provider("quack", _quack, _needs("quack"), loss="dense"),
)


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    k: int

    @staticmethod
    def of(problem: Problem, device: torch.device, dtype: torch.dtype) -> "Case":
        """A trained layer's logits: spread 3, and in every other row the target leads."""
        generator = torch.Generator(device).manual_seed(0)
        shape = {"device": device, "generator": generator}
        hidden = torch.randn(problem.tokens, problem.features, **shape)
        weight = torch.randn(problem.classes, problem.features, **shape)
        target = torch.randint(problem.classes, (problem.tokens,), **shape)
        hidden[::2] += 0.3 * weight[target[::2]]
        hidden *= 3 / problem.features**0.5
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        return Case(*leaves, target, problem.k)

    def errors(self, make: Make, truth: dict[str, Tensor]) -> dict[str, float]:
        """Relative, of the loss and of the gradients as a whole."""
        loss = make(self.hidden, self.weight, self.target, self.k)()
        loss.backward()
        found = {"loss": loss.detach(), "dhidden": self.hidden.grad, "dweight": self.weight.grad}
        self.hidden.grad = self.weight.grad = None
        return {
            name: ((value.double() - truth[name]).norm() / truth[name].norm()).item()
            for name, value in found.items()
        }

    def truth(self, loss: str) -> dict[str, Tensor]:
        """In float64, by chunks of tokens."""
        hidden, weight = (t.detach().double() for t in (self.hidden, self.weight))
        total, dweight = hidden.new_zeros(()), torch.zeros_like(weight)
        dhidden, tokens = torch.empty_like(hidden), hidden.shape[0]
        for part in (slice(i, i + 256) for i in range(0, tokens, 256)):
            h = hidden[part].requires_grad_()
            z = F.linear(h.detach(), weight)
            kept = z.topk(self.k, -1) if loss == "top-k" else None
            values = z if kept is None else kept.values
            lse = values.logsumexp(-1)
            p = (values - lse.unsqueeze(-1)).exp()
            g = p if kept is None else torch.zeros_like(z).scatter_(-1, kept.indices, p)
            place = self.target[part].unsqueeze(-1)
            total += (lse - z.gather(-1, place).squeeze(-1)).sum()
            g.scatter_add_(-1, place, torch.full_like(p[:, :1], -1.0))
            dhidden[part] = g @ weight
            dweight += g.t() @ h.detach()
        return {"loss": total / tokens, "dhidden": dhidden / tokens, "dweight": dweight / tokens}


@dataclass
class Entrant:
    provider: Provider
    status: str = "ok"
    reason: str | None = None
    errors: dict[str, float] | None = None
    peak: dict[str, int] | None = None

    def __post_init__(self) -> None:
        self.samples: dict[str, list[float]] = {name: [] for name in PASSES}

    def enter(self, case: Case) -> None:
        self.case = case
        frozen = (case.hidden.detach(), case.weight.detach())
        self.infer = self.provider.make(*frozen, case.target, case.k)
        self.train = self.provider.make(case.hidden, case.weight, case.target, case.k)

    def each_pass(self, measure: Callable[[Callable[[], object]], Any]) -> dict[str, Any]:
        found = {"forward": measure(self.infer)}
        found["forward+backward"] = measure(lambda: self.train().backward())
        self.clear()
        found["backward"] = measure(self.train().backward)
        self.clear()
        return found

    def clear(self) -> None:
        self.case.hidden.grad = self.case.weight.grad = None


def admit(provider: Provider, case: Case, allowed: dict[str, Any]) -> Entrant:
    entrant, device = Entrant(provider), case.hidden.device
    entrant.reason = provider.unavailable(device)
    if entrant.reason is not None:
        entrant.status = "unavailable"
        return entrant
    try:
        entrant.enter(case)
        truth, plain = allowed[provider.loss]
        entrant.errors = case.errors(provider.make, truth)
        for name, error in entrant.errors.items():
            if not error <= 2 * plain[name] + 1e-6:
                entrant.status = "wrong"
                entrant.reason = f"{name}: error {error:.3g}, the plain layer's {plain[name]:.3g}"
        entrant.peak = entrant.each_pass(partial(peak_memory, device))
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        entrant.status, entrant.reason = "error", f"{type(error).__name__}: {first_line}"
    return entrant


def measure(
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    providers: Sequence[Provider],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    case = Case.of(problem, device, dtype)
    allowed = {}
    for loss in {provider.loss for provider in providers}:
        truth = case.truth(loss)
        allowed[loss] = (truth, case.errors(PLAIN[loss], truth))
    entrants = [admit(provider, case, allowed) for provider in providers]
    del allowed
    racing = [entrant for entrant in entrants if entrant.status == "ok"]
    clock = stopwatch(device)
    left, right = case.hidden.detach(), case.weight.detach().t()
    out = left.new_empty(problem.tokens, problem.classes)
    bare: list[float] = []
    gc.collect()
    gc.disable()
    for turn in range(rounds):
        bare.append(clock(lambda: torch.mm(left, right, out=out)))
        first = turn % max(1, len(racing))
        for entrant in racing[first:] + racing[:first]:
            spent = sum(map(sum, entrant.samples.values())) / 1e3
            if turn < LEAST_ROUNDS or spent < seconds:
                for name, milliseconds in entrant.each_pass(clock).items():
                    entrant.samples[name].append(milliseconds)
    gc.enable()
    return {
        "problem": {**asdict(problem), "dtype": str(dtype).removeprefix("torch.")},
        "product_ms": spread(bare),
        "providers": [row(entrant) for entrant in entrants],
        "ratios": {
            own.provider.name: {
                rival.provider.name: {
                    name: spread([b / a for a, b in zip(own.samples[name], times, strict=False)])
                    for name, times in rival.samples.items()
                }
                for rival in racing
                if rival is not own
            }
            for own in racing
            if own.provider.ours
        },
    }


def row(entrant: Entrant) -> dict[str, Any]:
    return {
        "provider": entrant.provider.name,
        "ours": entrant.provider.ours,
        "loss": entrant.provider.loss,
        "status": entrant.status,
        "reason": entrant.reason,
        "relative_errors": entrant.errors,
        "passes": {
            name: {**spread(samples), "peak_bytes": (entrant.peak or {})[name], "samples": samples}
            for name, samples in entrant.samples.items()
            if samples
        },
    }


def show(result: dict[str, Any]) -> None:
    problem = "N={tokens} D={features} V={classes} k={k} {dtype}".format(**result["problem"])
    print(f"\n{problem}: the bare product takes {result['product_ms']['median']:.1f} ms")
    columns = f"{'ms':>10}{'p20':>10}{'p80':>10}{'peak MB':>9}"
    print(f"  {'provider':<29}{'loss':<6} {'pass':<17}{columns}")
    for found in result["providers"]:
        head = f"  {found['provider']:<29}{found['loss']:<6} "
        if found["status"] != "ok":
            print(f"{head}{found['status']}: {found['reason']}")
        for name, p in found["passes"].items():
            times = "".join(f"{p[key]:10.2f}" for key in ("median", "p20", "p80"))
            print(f"{head}{name:<17}{times}{p['peak_bytes'] / 1e6:9.1f}")
            head = " " * len(head)
    for name, rivals in result["ratios"].items():
        for rival, found in rivals.items():
            points = "{} {median:.2f} ({p20:.2f}-{p80:.2f})".format
            print(f"  {rival} / {name}:", ", ".join(points(p, **s) for p, s in found.items()))


def break_even(
    problem: Problem, dtype: torch.dtype, device: torch.device, backend: str, rounds: int
) -> list[dict[str, float]]:
    """Medians of backward for a range of k, by gathers and by products."""
    ways = ("sparse", "dense")
    rows = []
    for k in sorted({max(1, round(share * problem.classes) - 1) for share in SHARES}):
        if k > backends.MAX_LIST_K:
            continue
        case = Case.of(replace(problem, k=k), device, dtype)
        entrants = [Entrant(_ours(backend, way)) for way in ways]
        times: dict[str, list[float]] = {way: [] for way in ways}
        clock = stopwatch(device)
        for entrant in entrants:
            entrant.enter(case)
        for _ in range(rounds + 1):  # the first warms up
            for way, entrant in zip(ways, entrants, strict=True):
                times[way].append(clock(entrant.train().backward))
                entrant.clear()
        medians = {way: spread(t[1:])["median"] for way, t in times.items()}
        rows.append({"k": k, "share": (k + 1) / problem.classes, **medians})
        times_of = "sparse {sparse:.1f} ms, dense {dense:.1f} ms".format(**medians)
        print(f"  k={k:<5} (k + 1) / V = {rows[-1]['share']:.5f}: {times_of}")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "bench.linear", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", nargs=4, type=int, action="append", metavar=("N", "D", "V", "K"))
    add("--dtype", choices=DTYPES, nargs="+", default=["bf16", "fp32"])
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--provider", nargs="+", metavar="PART", help="those with PART in their name")
    add("--threads", type=int, default=2, help="of the CPU (2)")
    add("--repeats", type=int, help="rounds (CPU 7, GPU 50)")
    add("--seconds", type=float, default=20, help="after which a provider sits out")
    add("--break-even", action="store_true")
    add("--json", nargs="?", const="", metavar="PATH", help="default: in bench/results")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    about = environment(device)
    print(json.dumps(about, indent=1))
    rounds = options.repeats or (7 if device.type == "cpu" else GPU_ROUNDS)
    table = BREAK_EVEN if options.break_even else FLOOR
    problems = [Problem(*shape) for shape in options.shape or ()] or table[device.type]
    providers = [p for p in PROVIDERS if any(part in p.name for part in options.provider or [""])]
    name = "break-even" if options.break_even else "linear"
    path = Path(options.json or HERE / "results" / f"{name}-{device.type}-{about['date']}.json")
    results: list[dict[str, Any]] = []
    for problem, dtype in product(problems, options.dtype):
        if options.break_even:
            backend = backends.resolve("auto", device.type, DTYPES[dtype], False)
            rule = linear.break_even(device.type, DTYPES[dtype])
            print(f"\n{problem} {dtype} {backend}; the rule now: up to {rule}")
            rows = break_even(problem, DTYPES[dtype], device, backend, rounds)
            results.append({"problem": {**asdict(problem), "dtype": dtype}, "rows": rows})
        else:
            results.append(
                measure(problem, DTYPES[dtype], device, providers, rounds, options.seconds)
            )
            show(results[-1])
        if options.json is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"environment": about, "results": results}, indent=1)
            path.write_text(text + "\n")
    found = [row for result in results for row in result.get("providers", [])]
    fatal = [r for r in found if r["status"] == "wrong" or (r["ours"] and r["status"] == "error")]
    for r in fatal:
        print(f"{r['provider']}: {r['status']}: {r['reason']}", file=sys.stderr)
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(main())
