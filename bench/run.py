"""Time and memory of the fused loss beside its rivals: python -m bench.run --suite quick

Every provider is first checked against float64 on the very problem that is timed: the mean loss
over all rows, the gradient of a few. One that is wrong is not timed, and the exit status is 1.
Then the providers take turns for a number of rounds, so that drift of the machine hits all alike,
and ratios are formed within a round. Reported are the median, 20th and 80th percentile of

  forward            the loss of logits that need no gradient
  forward+backward   with a freshly allocated gradient each time, as training has it
  backward           loss.backward() alone

GB/s counts what must move: the logits read once, the gradient written once. 100 % is what the
machine itself reaches in the same rounds on a buffer of the size of the logits, by the fastest of
several ways (providers.probes); writing is rated on memory that exists already, and the rate on
fresh memory is printed beside it. Before each timing on a GPU a large buffer is overwritten, which
empties the cache and lets the host run ahead.

Peak memory is the most that a pass holds beyond what it was given: on a GPU the allocator's
maximum, on the CPU from the allocations that torch's profiler records, which are those of torch's
allocator. "dense" marks another loss, the softmax over all classes, "adaptive" the one that drops
classes which the target beats by 0.1.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch
from sparse_ce import backends

from .problems import (
    DATA,
    DTYPES,
    SUITES,
    Case,
    Problem,
    adaptive_probabilities,
    probabilities,
)
from .providers import PROVIDERS, Provider, probes

# name -> how often the logits are read, how often a gradient is written
PASSES = {"forward": (1, 0), "forward+backward": (1, 1), "backward": (0, 1)}
HERE = Path(__file__).parent
GPU_ROUNDS = 50
LEAST_ROUNDS = 3
CHECKED_ROWS = 8
FLUSH_BYTES = 1 << 29  # several times the cache of any GPU


@dataclass
class Entrant:
    """A provider in a case, and what was found about it."""

    provider: Provider
    status: str = "ok"  # or unavailable, error, wrong
    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)  # of loss and gradient, in tolerances
    peak: dict[str, int] = field(default_factory=dict)  # pass -> bytes
    samples: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PASSES})

    def enter(self, case: Case) -> None:
        logits = case.logits.clone() if self.provider.writes_logits else case.logits
        self.leaf = logits.detach().requires_grad_()
        self.infer = self.provider.make(logits.detach(), case.target, case.k)
        self.train = self.provider.make(self.leaf, case.target, case.k)

    def each_pass(self, measure: Callable[[Callable[[], object]], Any]) -> dict[str, Any]:
        found = {"forward": measure(self.infer)}
        found["forward+backward"] = measure(lambda: self.train().backward())
        self.leaf.grad = None
        found["backward"] = measure(self.train().backward)
        self.leaf.grad = None
        return found


def check(entrant: Entrant, case: Case) -> None:
    """Mean loss over all rows, gradient of a few: against float64, to what their dtypes allow."""
    kind, (rows, classes) = entrant.provider.loss, case.logits.shape
    kept = case.k if kind == "top-k" else classes
    some = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS), device=case.logits.device).long()
    if kind == "adaptive":
        p, tied = adaptive_probabilities(case.logits[some], case.target[some])
    else:
        p, tied = probabilities(case.logits[some], kept)
    onehot = torch.zeros_like(p).scatter_(-1, case.target[some].unsqueeze(-1), 1.0)

    loss = entrant.train()
    # a power of two near N rounds nothing and keeps p / N out of the subnormals of float16
    scale = min(1 << (rows.bit_length() - 1), 1 << 15)
    loss.backward(torch.full_like(loss, scale))
    found = entrant.leaf.grad[some].double() * (rows / scale) + onehot
    entrant.leaf.grad = None
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
    entrant.errors = {
        "loss": abs(loss.item() - case.truth[kind]) / lse_error,
        "gradient": ((found - p).abs() / tolerance).amax().item(),
    }
    for name, error in entrant.errors.items():
        if not error <= 1:
            entrant.status = "wrong"
            entrant.reason = f"{name}: expected an error of at most 1 tolerance, got {error:.3g}"


def peak_memory(device: torch.device, run: Callable[[], object]) -> int:
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    held = highest = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        highest = max(highest, held)
    return highest


def admit(provider: Provider, case: Case) -> Entrant:
    """Check a provider and weigh it. What goes wrong is a result, the others go on."""
    entrant, device = Entrant(provider), case.logits.device
    entrant.reason = provider.unavailable(device, case.logits.dtype)
    if entrant.reason is not None:
        entrant.status = "unavailable"
        return entrant
    try:
        entrant.enter(case)
        check(entrant, case)
        entrant.peak = entrant.each_pass(partial(peak_memory, device))
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        entrant.status, entrant.reason = "error", f"{type(error).__name__}: {first_line}"
    return entrant


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Milliseconds of one run: wall time on the CPU, events on a GPU."""

    def wall(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        result = run()
        stop = time.perf_counter()
        del result  # freed off the clock
        return 1e3 * (stop - start)

    def events(run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    if device.type == "cpu":
        return wall
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    return events


def spread(samples: Sequence[float]) -> dict[str, float]:
    points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    values = torch.tensor(samples, dtype=torch.float64).quantile(points).tolist()
    return dict(zip(("median", "p20", "p80"), values, strict=True))


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
    entrants = [admit(provider, case) for provider in providers]
    racing = [entrant for entrant in entrants if entrant.status == "ok"]

    clock, nbytes = stopwatch(device), case.logits.nbytes
    ways = [(way, list[float]()) for way in probes(device, nbytes, torch.get_num_threads())]
    gc.collect()
    gc.disable()
    for turn in range(rounds):
        for way, times in ways:
            times.append(clock(way.run))
        first = turn % max(1, len(racing))
        for entrant in racing[first:] + racing[:first]:
            spent = sum(map(sum, entrant.samples.values())) / 1e3
            if turn < LEAST_ROUNDS or spent < seconds:
                for name, milliseconds in entrant.each_pass(clock).items():
                    entrant.samples[name].append(milliseconds)
    gc.enable()

    rates: dict[str, float] = {}
    for way, times in ways:
        rates[way.kind] = max(rates.get(way.kind, 0), way.bytes / spread(times)["median"] / 1e6)
    ours = [entrant for entrant in racing if entrant.provider.ours]
    rivals = [entrant for entrant in racing if not entrant.provider.ours]
    return {
        "problem": {**asdict(problem), "dtype": str(dtype).removeprefix("torch."), "data": data},
        "logits_bytes": nbytes,
        "bandwidth_GBps": rates,
        "providers": [row(entrant, nbytes, rates) for entrant in entrants],
        "ratios": {
            entrant.provider.name: {rival.provider.name: ratio(entrant, rival) for rival in rivals}
            for entrant in ours
        },
    }


def row(entrant: Entrant, nbytes: int, rates: dict[str, float]) -> dict[str, Any]:
    read, write = (max(rates[kind], rates.get("copy", 0)) for kind in ("read", "write"))
    passes = {}
    for name, samples in entrant.samples.items():
        if samples:
            times, (reads, writes) = spread(samples), PASSES[name]
            floor = nbytes * (reads / read + writes / write) / 1e6
            passes[name] = {
                **{f"{point}_ms": value for point, value in times.items()},
                "GBps": nbytes * (reads + writes) / times["median"] / 1e6,
                "percent_of_bandwidth": 100 * floor / times["median"],
                "peak_bytes": entrant.peak[name],
                "samples_ms": samples,
            }
    return {
        "provider": entrant.provider.name,
        "ours": entrant.provider.ours,
        "loss": entrant.provider.loss,
        "status": entrant.status,
        "reason": entrant.reason,
        "errors_in_tolerances": entrant.errors,
        "passes": passes,
    }


def ratio(entrant: Entrant, rival: Entrant) -> dict[str, Any]:
    """How many times as long the rival takes, over the rounds in which both took part."""
    found = {}
    for name in PASSES:
        pairs = zip(entrant.samples[name], rival.samples[name], strict=False)
        found[name] = spread([theirs / own for own, theirs in pairs])
    return found


def show(result: dict[str, Any]) -> None:
    problem = result["problem"]
    rates = ", ".join(f"{kind} {rate:.1f}" for kind, rate in result["bandwidth_GBps"].items())
    print(
        "\nN={rows} V={classes} k={k} {dtype} {data}".format(**problem),
        f"({result['logits_bytes'] / 1e6:.1f} MB); the machine in GB/s: {rates}",
    )
    columns = f"{'ms':>10}{'p20':>10}{'p80':>10}{'GB/s':>8}{'%':>5}{'peak MB':>9}"
    print(f"  {'provider':<24}{'loss':<9}{'pass':<17}{columns}")
    for found in result["providers"]:
        head = f"  {found['provider']:<24}{found['loss']:<9}"
        if found["status"] != "ok":
            print(f"{head}{found['status']}: {found['reason']}")
        for name, p in found["passes"].items():
            times = "".join(f"{p[key]:10.3f}" for key in ("median_ms", "p20_ms", "p80_ms"))
            rate = f"{p['GBps']:8.1f}{p['percent_of_bandwidth']:5.0f}{p['peak_bytes'] / 1e6:9.1f}"
            print(f"{head}{name:<17}{times}{rate}")
            head = " " * len(head)
    losses = {found["provider"]: found["loss"] for found in result["providers"]}
    for name, rivals in result["ratios"].items():
        for rival, found in rivals.items():
            points = "{} {median:.2f} ({p20:.2f}-{p80:.2f})".format
            spreads = (points(key, **spread) for key, spread in found.items())
            print(f"  {rival} ({losses[rival]}) / {name}: {', '.join(spreads)}")


def environment(device: torch.device) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    pairs = (line.partition(":") for line in lines)
    about = {key.strip(): value.strip() for key, _, value in pairs}
    flags = about.get("flags", about.get("Features", "")).split()
    sets = ("avx2", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    packages = ("torch", "triton", "sparse_ce", "liger_kernel", "quack-kernels")
    found = {
        "date": date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip()
        if shutil.which("git")
        else "",
        "python": platform.python_version(),
        "versions": {name: installed.get(name) for name in packages},
        "device": device.type,
        "cpu": about.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in sets if name in flags],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB"
        found["cuda"] = torch.version.cuda
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=SUITES, default="quick")
    add("--shape", nargs=3, type=int, action="append", metavar=("N", "V", "K"), help="in its place")
    add("--data", choices=DATA, nargs="+", default=["normal"])
    add("--dtype", choices=DTYPES, nargs="+", default=["bf16", "fp32"])
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=best)
    add("--provider", nargs="+", metavar="PART", help="by their names, or the ends of them")
    add("--backend", choices=backends.NAMES, help="of ours only this one")
    add("--threads", type=int, default=2, help="of the CPU (2)")
    add("--repeats", type=int, help="rounds, in place of the suite's")
    add("--json", nargs="?", const="", metavar="PATH", help="default: in bench/results")
    add("--list", action="store_true", help="suites and providers, then stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    device, suite = torch.device(options.device), SUITES[options.suite]
    if options.list:
        for name, listed in SUITES.items():
            print(f"{name}:", *listed.problems, sep="\n  ")
        for provider in PROVIDERS:
            reason = provider.unavailable(device, torch.float32)
            print(f"{provider.name} ({provider.loss}): {reason or 'ready'}")
        return 0
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    about = environment(device)
    print(json.dumps(about, indent=1))
    if about["load_average"] > 0.5:
        print("warning: load average above 0.5, the machine is not ours alone", file=sys.stderr)

    providers = [p for p in PROVIDERS if p.name not in suite.skip]
    if options.provider:
        providers = [
            p
            for p in PROVIDERS
            if any(f".{p.name}".endswith(f".{part}") for part in options.provider)
        ]
    if options.backend:
        providers = [p for p in providers if not p.ours or p.name.split(".")[1] == options.backend]
    problems = [Problem(*shape) for shape in options.shape or ()] or suite.problems
    rounds = options.repeats or (suite.rounds if device.type == "cpu" else GPU_ROUNDS)
    file = f"{options.suite}-{device.type}-{about['date']}.json"
    path = Path(options.json or HERE / "results" / file)
    results = []
    for problem, name, data in product(problems, options.dtype, options.data):
        dtype = DTYPES[name]
        results.append(measure(problem, dtype, data, device, providers, rounds, suite.seconds))
        show(results[-1])
        if options.json is not None:
            # after each, as a time limit may end the run
            path.parent.mkdir(parents=True, exist_ok=True)
            found = {"environment": about, "results": results}
            path.write_text(json.dumps(found, indent=1) + "\n")
    # a rival may fail to run, ours may not
    found = [row for result in results for row in result["providers"]]
    fatal = [r for r in found if r["status"] == "wrong" or (r["ours"] and r["status"] == "error")]
    for r in fatal:
        print(f"{r['provider']}: {r['status']}: {r['reason']}", file=sys.stderr)
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(main())
