"""An output layer's training step beside its rivals: python -m bench.linear

Loss and gradients of hidden and weight, from hidden states to gradients. How providers are checked,
timed and weighed: race.py. Here a tolerance is twice the error of the plain layer in the same
dtype, `linear` and then the loss in tensor operations, against float64: of the loss (at least a
rounding of it), and of dhidden and of dweight as a whole. "product" is the bare product of forward,
into memory that exists: no output layer is faster. "dense" marks another loss, the softmax over all
classes; "tail" is ours of that loss, whose gradient has the k largest, the target and 64 draws.

    python -m bench.linear --break-even     our two ways of backward over k: the constants of
                                            sparse_ce.linear.break_even
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from sparse_ce import backends, fused_linear_sparse_ce, linear
from torch import Tensor

from .problems import TAIL_SAMPLES
from .providers import Forward, needs
from .race import (
    DTYPES,
    GPU_ROUNDS,
    Entrant,
    Report,
    admit,
    arguments,
    chosen,
    passes_of,
    ratios,
    show,
    show_ratios,
    spread,
    stopwatch,
    take_turns,
    unavailable,
)

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
    unavailable: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    ours: bool = False
    loss: str = "top-k"
    slack: float = 1  # tolerances that its gradients are allowed


def _ours(backend: str, backward: str) -> Provider:
    def make(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
        return lambda: fused_linear_sparse_ce(
            hidden, weight, target, k, backend=backend, backward=backward
        )

    way = "" if backward == "auto" else f".{backward}"
    name = f"sparse_ce.{backend}{way}"
    return Provider(name, make, partial(unavailable, backend), ours=True)


def _ours_with_tail(backend: str) -> Provider:
    def make(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
        options = {"normalizer": "full", "tail_samples": TAIL_SAMPLES, "backend": backend}
        return lambda: fused_linear_sparse_ce(hidden, weight, target, k, **options)

    # of its gradients the mean over many draws is right, so that its loss alone is checked
    name, slack = f"sparse_ce.{backend}.tail", float("inf")
    return Provider(name, make, partial(unavailable, backend), True, loss="dense", slack=slack)


def _plain_topk(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
    def loss() -> Tensor:
        logits = F.linear(hidden, weight)
        values = logits.topk(k, dim=-1).values.float()
        target_logit = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1).float()
        return (values.logsumexp(-1) - target_logit).mean()

    return loss


def _plain_dense(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
    return lambda: F.cross_entropy(F.linear(hidden, weight), target)


def _torch_linear(**options: int) -> Make:
    """With options it goes by chunks: of its own choice, or of so many tokens."""

    def make(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Forward:
        given = {name: value for name, value in options.items() if value}
        how = torch.nn.LinearCrossEntropyOptions(**given) if options else None
        return lambda: F.linear_cross_entropy(hidden, weight, target, options=how)

    return make


def _no_torch_linear(device: torch.device, dtype: torch.dtype) -> str | None:
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

    # quack 0.6.5 refuses a chunk of as many tokens as there are features
    chunk = 8192 if hidden.shape[1] == 4096 else 4096
    return lambda: chunked_linear_cross_entropy(
        hidden, weight, target, chunk_size=chunk, reduction="mean"
    )


def _no_quack(device: torch.device, dtype: torch.dtype) -> str | None:
    narrow = None if dtype == torch.bfloat16 else "its products are of bfloat16 only"
    return needs("quack")(device, dtype) or narrow


# what is plain in each loss, and sets the tolerance of the others
PLAIN = {"top-k": _plain_topk, "dense": _plain_dense}
PROVIDERS = (
    *(_ours(name, "auto") for name in backends.NAMES),
    *(_ours_with_tail(name) for name in backends.NAMES),
    Provider("linear+composition", _plain_topk),
    Provider("linear+cross_entropy", _plain_dense, loss="dense"),
    *(
        Provider(f"linear_cross_entropy{name}", make, _no_torch_linear, loss="dense")
        for name, make in (
            ("", _torch_linear()),
            (".chunked", _torch_linear(batch_chunk_size=0)),
            (".chunks_of_256", _torch_linear(batch_chunk_size=256)),
        )
    ),
    Provider("liger", _liger, needs("liger_kernel"), loss="dense"),
    # its dhidden has 3.1 tolerances, with its filter of small gradients and without
    Provider("cce", _cce, needs("cut_cross_entropy"), loss="dense", slack=4),
    Provider("quack", _quack, _no_quack, loss="dense"),
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


def enter(
    provider: Provider, case: Case, allowed: dict[str, Any], entrant: Entrant
) -> dict[str, float]:
    entrant.leaves = (case.hidden, case.weight)
    frozen = (case.hidden.detach(), case.weight.detach())
    entrant.passes = passes_of(
        provider.make(*frozen, case.target, case.k),
        provider.make(case.hidden, case.weight, case.target, case.k),
    )
    if not allowed:
        return {}
    truth, plain = allowed[provider.loss]
    errors = case.errors(provider.make, truth)
    entrant.more["relative_errors"] = errors
    # the error of the one number that the plain loss is may be small by chance
    rounding = torch.finfo(case.hidden.dtype).eps
    floor = {"loss": max(rounding, plain["loss"])}
    slack = {"loss": 1.0, "dhidden": provider.slack, "dweight": provider.slack}
    return {
        name: error / (slack[name] * (2 * (plain | floor)[name] + 1e-6))
        for name, error in errors.items()
    }


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
    entrants = [
        admit(
            Entrant(provider.name, provider.ours, provider.loss),
            device,
            provider.unavailable(device, dtype),
            partial(enter, provider, case, allowed),
        )
        for provider in providers
    ]
    allowed.clear()
    clock = stopwatch(device)
    left, right = case.hidden.detach(), case.weight.detach().t()
    out = left.new_empty(problem.tokens, problem.classes)
    bare: list[float] = []

    def bare_product() -> None:
        bare.append(clock(lambda: torch.mm(left, right, out=out)).ms)

    racing = take_turns(entrants, clock, rounds, seconds, bare_product)
    return {
        "problem": {**asdict(problem), "dtype": str(dtype).removeprefix("torch.")},
        "product_ms": spread(bare),
        "providers": [entrant.row() for entrant in entrants],
        "ratios": ratios(racing),
    }


def display(result: dict[str, Any]) -> None:
    problem = "N={tokens} D={features} V={classes} k={k} {dtype}".format(**result["problem"])
    print(f"\n{problem}: the bare product takes {result['product_ms']['median']:.1f} ms")
    show(result["providers"])
    show_ratios(result["ratios"])


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
        entrants = [Entrant(way) for way in ways]
        for entrant in entrants:
            enter(_ours(backend, entrant.name), case, {}, entrant)
            entrant.passes = {"backward": entrant.passes["backward"]}
        take_turns(entrants, stopwatch(device), rounds + 1, seconds=float("inf"))
        # the first warms up
        medians = {e.name: spread(e.samples["backward"][1:])["median"] for e in entrants}
        rows.append({"k": k, "share": (k + 1) / problem.classes, **medians})
        times_of = "sparse {sparse:.1f} ms, dense {dense:.1f} ms".format(**medians)
        print(f"  k={k:<5} (k + 1) / V = {rows[-1]['share']:.5f}: {times_of}")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("bench.linear", __doc__, dtypes=("bf16", "fp32"))
    add = parser.add_argument
    add("--shape", nargs=4, type=int, action="append", metavar=("N", "D", "V", "K"))
    add("--seconds", type=float, default=20, help="after which a provider sits out")
    add("--break-even", action="store_true")
    options = parser.parse_args(argv)
    names = chosen(parser, options.provider, (p.name for p in PROVIDERS))
    report = Report("break-even" if options.break_even else "linear", options)
    device = report.device
    rounds = options.repeats or (7 if device.type == "cpu" else GPU_ROUNDS)
    table = BREAK_EVEN if options.break_even else FLOOR
    problems = [Problem(*shape) for shape in options.shape or ()] or table[device.type]
    providers = [p for p in PROVIDERS if p.name in names]
    for problem, dtype in product(problems, options.dtype):
        if options.break_even:
            backend = backends.resolve("auto", device.type, DTYPES[dtype], False)
            rule = linear.break_even(device.type, DTYPES[dtype])
            print(f"\n{problem} {dtype} {backend}; the rule now: up to {rule}")
            rows = break_even(problem, DTYPES[dtype], device, backend, rounds)
            report.add({"problem": {**asdict(problem), "dtype": dtype}, "rows": rows})
        else:
            report.add(measure(problem, DTYPES[dtype], device, providers, rounds, options.seconds))
            display(report.results[-1])
    return report.exit_status()


if __name__ == "__main__":
    sys.exit(main())
