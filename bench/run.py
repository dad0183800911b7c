"""Time and memory of the fused loss beside its rivals: python -m bench.run --suite quick

How providers are checked, timed and weighed: race.py. Here each is held against float64, the mean
loss over all rows and the gradient of a few.

GB/s counts what must move: the logits read once, the gradient written once. 100 % is what the
machine itself reaches in the same rounds on a buffer of the size of the logits, by the fastest of
several ways (providers.probes); writing is rated on memory that exists already, and the rate on
fresh memory is printed beside it.

"dense" marks another loss, the softmax over all classes, "adaptive" the one that drops classes
which the target beats by 0.1, "tail" the dense one whose gradient has the k largest, the target and
64 draws from the others.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch
from sparse_ce import backends
from torch import Tensor

from .problems import DATA, SUITES, Case, Problem, adaptive_probabilities, probabilities
from .providers import PROVIDERS, Forward, Provider, probes
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
)

# pass -> how often the logits are read, how often a gradient is written
MOVES = {"forward": (1, 0), "forward+backward": (1, 1), "backward": (0, 1)}
CHECKED_ROWS = 8


def enter(provider: Provider, case: Case, entrant: Entrant) -> dict[str, float]:
    logits = case.logits.clone() if provider.writes_logits else case.logits
    leaf = logits.detach().requires_grad_()
    train = provider.make(leaf, case.target, case.k)
    entrant.leaves = [leaf]
    entrant.passes = passes_of(provider.make(logits.detach(), case.target, case.k), train)
    return errors(provider.loss, case, train, leaf)


def errors(kind: str, case: Case, train: Forward, leaf: Tensor) -> dict[str, float]:
    """Of the mean loss over all rows and of the gradient of a few, in what their dtypes allow."""
    rows, classes = case.logits.shape
    kept = case.k if kind == "top-k" else classes  # whose exponentials are added up
    some = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS), device=case.logits.device).long()
    if kind == "adaptive":
        p, tied = adaptive_probabilities(case.logits[some], case.target[some])
    else:
        p, tied = probabilities(case.logits[some], kept)
    onehot = torch.zeros_like(p).scatter_(-1, case.target[some].unsqueeze(-1), 1.0)

    loss = train()
    # a power of two near N rounds nothing and keeps p / N out of the subnormals of float16
    scale = min(1 << (rows.bit_length() - 1), 1 << 15)
    loss.backward(torch.full_like(loss, scale))
    found = leaf.grad[some].double() * (rows / scale) + onehot
    leaf.grad = None
    if kind == "tail":
        found = with_whole_tail(found, p, case.logits[some], case.target[some], case.k)
    mean_of_tied = (found * tied).sum(-1, keepdim=True) / tied.sum(-1, keepdim=True)
    found = torch.where(tied, mean_of_tied, found)

    # The loss is a difference of terms as large as the logits, rounded a few times in its dtype.
    # One is the log of a sum of k exponentials, in eight accumulators of float32 at least: k / 8
    # additions of half an ulp. Its error is a relative one of p. The gradient rounds p and p - 1.
    single = torch.finfo(torch.promote_types(loss.dtype, torch.float32)).eps
    lse_error = 8 * torch.finfo(loss.dtype).eps * max(1.0, case.largest) + single * kept / 16
    info = torch.finfo(case.logits.dtype)
    smallest = info.smallest_normal * info.eps * rows / scale
    tolerance = lse_error * p + 2 * info.eps * (p + onehot) + smallest
    # a mean over the tied is as far off as the worst of them, which may be the target
    tolerance = torch.where(tied, (tolerance * tied).amax(-1, keepdim=True), tolerance)
    return {
        "loss": abs(loss.item() - case.truth[kind]) / lse_error,
        "gradient": ((found - p).abs() / tolerance).amax().item(),
    }


def with_whole_tail(found: Tensor, p: Tensor, logits: Tensor, target: Tensor, k: int) -> Tensor:
    """Of what is drawn the sum is checked: it is spread over the tail as p is, and over the classes
    equal to the k-th, of which some are kept.
    """
    kept = logits > logits.topk(k).values[:, -1:]
    kept.scatter_(-1, target.unsqueeze(-1), True)
    rest, mass = (t.masked_fill(kept, 0).sum(-1, keepdim=True) for t in (found, p))
    return torch.where(kept, found, p * (rest / mass))


def measure(
    problem: Problem,
    dtype: torch.dtype,
    data: str,
    device: torch.device,
    providers: Sequence[Provider],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """One problem, all providers in turns; what --json writes for it."""
    torch.compiler.reset()  # else the ninth shape would silently run uncompiled
    problem = problem.on(device, dtype)
    case = problem.fill(device, dtype, data)
    entrants = [
        admit(
            Entrant(provider.name, provider.ours, provider.loss),
            device,
            provider.unavailable(device, dtype),
            partial(enter, provider, case),
        )
        for provider in providers
    ]
    clock, nbytes = stopwatch(device), case.logits.nbytes
    ways = [(way, list[float]()) for way in probes(device, nbytes, torch.get_num_threads())]

    def probe() -> None:
        for way, times in ways:
            times.append(clock(way.run).ms)

    racing = take_turns(entrants, clock, rounds, seconds, probe)
    rates: dict[str, float] = {}
    for way, times in ways:
        rates[way.kind] = max(rates.get(way.kind, 0), way.bytes / spread(times)["median"] / 1e6)
    return {
        "problem": {**asdict(problem), "dtype": str(dtype).removeprefix("torch."), "data": data},
        "logits_bytes": nbytes,
        "bandwidth_GBps": rates,
        "providers": [rated(entrant.row(), nbytes, rates) for entrant in entrants],
        "ratios": ratios(racing),
    }


def rated(row: dict[str, Any], nbytes: int, rates: dict[str, float]) -> dict[str, Any]:
    read, write = (max(rates[kind], rates.get("copy", 0)) for kind in ("read", "write"))
    for name, found in row["passes"].items():
        reads, writes = MOVES[name]
        floor = nbytes * (reads / read + writes / write) / 1e6
        found["GBps"] = nbytes * (reads + writes) / found["median_ms"] / 1e6
        found["percent_of_bandwidth"] = 100 * floor / found["median_ms"]
    return row


def display(result: dict[str, Any]) -> None:
    rates = ", ".join(f"{kind} {rate:.1f}" for kind, rate in result["bandwidth_GBps"].items())
    print(
        "\nN={rows} V={classes} k={k} {dtype} {data}".format(**result["problem"]),
        f"({result['logits_bytes'] / 1e6:.1f} MB); the machine in GB/s: {rates}",
    )
    columns = {
        "GB/s": lambda row, found: f"{found['GBps']:.1f}",
        "%": lambda row, found: f"{found['percent_of_bandwidth']:.0f}",
    }
    show(result["providers"], columns)
    show_ratios(result["ratios"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("bench.run", __doc__, dtypes=("bf16", "fp32"))
    add = parser.add_argument
    add("--suite", choices=SUITES, default="quick")
    add("--shape", nargs=3, type=int, action="append", metavar=("N", "V", "K"), help="in its place")
    add("--data", choices=DATA, nargs="+", default=["normal"])
    add("--backend", choices=backends.NAMES, help="of ours only this one")
    add("--list", action="store_true", help="suites and providers, then stop")
    options = parser.parse_args(argv)
    names = chosen(parser, options.provider, (provider.name for provider in PROVIDERS))
    for rows, classes, k in options.shape or ():
        if not (rows >= 1 and 1 <= k < classes):
            parser.error(f"--shape: expected N >= 1 and 1 <= K < V, got {rows} {classes} {k}")
    device, suite = torch.device(options.device), SUITES[options.suite]
    if options.list:
        for name, listed in SUITES.items():
            print(f"{name}:", *listed.problems, sep="\n  ")
        for provider in PROVIDERS:
            reason = provider.unavailable(device, torch.float32)
            print(f"{provider.name} ({provider.loss}): {reason or 'ready'}")
        return 0
    report = Report(options.suite, options)

    def takes_part(provider: Provider) -> bool:
        if options.backend and provider.ours and provider.name.split(".")[1] != options.backend:
            return False
        left_out = not options.provider and provider.name in suite.skip
        return provider.name in names and not left_out

    providers = [provider for provider in PROVIDERS if takes_part(provider)]
    problems = [Problem(*shape) for shape in options.shape or ()] or suite.problems
    rounds = options.repeats or (suite.rounds if device.type == "cpu" else GPU_ROUNDS)
    for problem, name, data in product(problems, options.dtype, options.data):
        dtype = DTYPES[name]
        report.add(measure(problem, dtype, data, device, providers, rounds, suite.seconds))
        display(report.results[-1])
    return report.exit_status()


if __name__ == "__main__":
    sys.exit(main())
