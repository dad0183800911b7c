"""How all benches time: providers are checked, weighed, and then take turns.

A provider is first checked on the very problem that is timed; one that is wrong is not timed, and
the exit status is 1. Then the providers take turns for a number of rounds, so that drift of the
machine hits all alike, and ratios are formed within a round. Reported are the median, 20th and 80th
percentile of each pass:

  forward            the loss of inputs that need no gradient
  forward+backward   with freshly allocated gradients each time, as training has it
  backward           loss.backward() alone

Before each timing on a GPU a large buffer is overwritten, which empties the cache, and the GPU then
waits for a while, so that the host runs ahead: what is timed is the GPU, not the host. "host ms" is
what the host takes for the same, and the least that a small problem takes. Peak memory is the most
that a pass holds beyond what it was given: on a GPU the allocator's maximum, on the CPU from the
allocations that torch's profiler records, which are those of torch's allocator.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from sparse_ce import backends
from torch import Tensor

DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
HERE = Path(__file__).parent
GPU_ROUNDS = 50
LEAST_ROUNDS = 3
FLUSH_BYTES = 1 << 29  # several times the cache of any GPU
WAIT_CYCLES = 4_000_000  # of a GPU, two milliseconds: more than the host takes for a step

Run = Callable[[], object]


@dataclass(frozen=True)
class Time:
    """Of one run, in milliseconds."""

    ms: float
    host_ms: float  # until the host may go on: on the CPU the same


# name of a pass -> what makes it ready, off the clock, and gives what is timed
Passes = dict[str, Callable[[], Run]]


def passes_of(infer: Callable[[], Tensor], train: Callable[[], Tensor]) -> Passes:
    return {
        "forward": lambda: infer,
        "forward+backward": lambda: lambda: train().backward(),
        "backward": lambda: train().backward,
    }


@dataclass
class Entrant:
    """A provider in a case, and what was found about it."""

    name: str
    ours: bool = False
    loss: str = ""
    status: str = "ok"  # or unavailable, error, wrong
    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)  # in tolerances
    more: dict[str, Any] = field(default_factory=dict)  # what one bench alone finds
    peak: dict[str, int] = field(default_factory=dict)  # pass -> bytes
    samples: dict[str, list[float]] = field(default_factory=dict)  # pass -> milliseconds
    host: dict[str, list[float]] = field(default_factory=dict)  # the same of the host
    passes: Passes = field(default_factory=dict)
    leaves: Sequence[Tensor] = ()  # whose gradients the passes make

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def each_pass(self, measure: Callable[[Run], Any]) -> dict[str, Any]:
        found = {}
        for name, prepare in self.passes.items():
            found[name] = measure(prepare())
            self.clear()
        return found

    def row(self) -> dict[str, Any]:
        return {
            "provider": self.name,
            "ours": self.ours,
            "loss": self.loss,
            "status": self.status,
            "reason": self.reason,
            "errors_in_tolerances": self.errors,
            **self.more,
            "passes": {
                name: {
                    **{f"{point}_ms": value for point, value in spread(times).items()},
                    "host_ms": spread(self.host[name])["median"],
                    "peak_bytes": self.peak[name],
                    "samples_ms": times,
                }
                for name, times in self.samples.items()
            },
        }


def unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why one of our backends is not timed, or None."""
    if backend == "triton" and backends.interpreting():
        return "Triton's interpreter is not for timing"
    try:
        backends.resolve(backend, device.type, dtype, False)
    except RuntimeError as error:
        return str(error)
    return None


def admit(
    entrant: Entrant,
    device: torch.device,
    missing: str | None,
    enter: Callable[[Entrant], dict[str, float]],
) -> Entrant:
    """Check a provider and weigh it. What goes wrong is a result, the others go on.

    `enter` sets passes and leaves, and gives the errors, in tolerances.
    """
    if missing is not None:
        entrant.status, entrant.reason = "unavailable", missing
        return entrant
    try:
        entrant.errors = enter(entrant)
        for name, error in entrant.errors.items():
            if not error <= 1:
                entrant.status = "wrong"
                wanted = "expected an error of at most 1 tolerance"
                entrant.reason = f"{name}: {wanted}, got {error:.3g}"
                break
        entrant.peak = entrant.each_pass(partial(peak_memory, device))
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        entrant.status, entrant.reason = "error", f"{type(error).__name__}: {first_line}"
    return entrant


def take_turns(
    entrants: Iterable[Entrant],
    clock: Callable[[Run], Time],
    rounds: int,
    seconds: float,
    between: Callable[[], object] = lambda: None,
) -> list[Entrant]:
    """Those that were admitted; one that has taken so many seconds sits out what remains.

    `between` runs before each round: the machine's own measures.
    """
    racing = [entrant for entrant in entrants if entrant.status == "ok"]
    gc.collect()
    gc.disable()
    for turn in range(rounds):
        between()
        first = turn % max(1, len(racing))
        for entrant in racing[first:] + racing[:first]:
            spent = sum(map(sum, entrant.samples.values())) / 1e3
            if turn < LEAST_ROUNDS or spent < seconds:
                for name, time_of_pass in entrant.each_pass(clock).items():
                    entrant.samples.setdefault(name, []).append(time_of_pass.ms)
                    entrant.host.setdefault(name, []).append(time_of_pass.host_ms)
    gc.enable()
    return racing


def spread(samples: Sequence[float]) -> dict[str, float]:
    points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    values = torch.tensor(samples, dtype=torch.float64).quantile(points).tolist()
    return dict(zip(("median", "p20", "p80"), values, strict=True))


def ratio(entrant: Entrant, rival: Entrant) -> dict[str, dict[str, float]]:
    """How many times as long the rival takes, over the rounds in which both took part."""
    found = {}
    for name, times in entrant.samples.items():
        pairs = zip(times, rival.samples[name], strict=False)
        found[name] = spread([theirs / own for own, theirs in pairs])
    return found


def ratios(racing: Sequence[Entrant]) -> dict[str, Any]:
    """Of each of ours to each of the others."""
    rivals = [entrant for entrant in racing if not entrant.ours]
    return {
        entrant.name: {rival.name: ratio(entrant, rival) for rival in rivals}
        for entrant in racing
        if entrant.ours
    }


def peak_memory(device: torch.device, run: Run) -> int:
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


def stopwatch(device: torch.device) -> Callable[[Run], Time]:
    """One run: wall time on the CPU, events on a GPU."""

    def wall(run: Run) -> float:
        start = time.perf_counter()
        result = run()
        stop = time.perf_counter()
        del result  # freed off the clock
        return 1e3 * (stop - start)

    def walls(run: Run) -> Time:
        ms = wall(run)
        return Time(ms, ms)

    def events(run: Run) -> Time:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(WAIT_CYCLES)
        begin.record()
        host_ms = wall(run)
        end.record()
        end.synchronize()
        return Time(begin.elapsed_time(end), host_ms)

    if device.type == "cpu":
        return walls
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    return events


def show(
    rows: Sequence[dict[str, Any]],
    columns: Mapping[str, Callable[[dict[str, Any], dict[str, Any]], str]] | None = None,
) -> None:
    """Rows as Entrant.row gives them. A column beyond the usual: (row, pass) -> its text."""
    columns = dict(columns or {})
    passes = [p for row in rows if row["status"] == "ok" for p in row["passes"].values()]
    if any(p["host_ms"] != p["median_ms"] for p in passes):
        columns["host ms"] = lambda row, p: f"{p['host_ms']:.3f}"
    titles = ("ms", "p20", "p80", "peak MB", *columns)
    print(f"  {'provider':<29}{'loss':<9}{'pass':<17}", *(f"{title:>9}" for title in titles))
    for row in rows:
        head = f"  {row['provider']:<29}{row['loss']:<9}"
        if row["status"] != "ok":
            print(f"{head}{row['status']}: {row['reason']}")
            continue
        for name, p in row["passes"].items():
            cells = [f"{p[key]:.3f}" for key in ("median_ms", "p20_ms", "p80_ms")]
            cells += [f"{p['peak_bytes'] / 1e6:.1f}", *(cell(row, p) for cell in columns.values())]
            print(f"{head}{name:<17}", *(f"{cell:>9}" for cell in cells))
            head = " " * len(head)


def show_ratios(found: dict[str, Any]) -> None:
    points = "{} {median:.2f} ({p20:.2f}-{p80:.2f})".format
    for name, rivals in found.items():
        for rival, passes in rivals.items():
            print(f"  {rival} / {name}:", ", ".join(points(p, **s) for p, s in passes.items()))


def environment(device: torch.device) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    pairs = (line.partition(":") for line in lines)
    about = {key.strip(): value.strip() for key, _, value in pairs}
    flags = about.get("flags", about.get("Features", "")).split()
    sets = ("avx2", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    packages = ("triton", "sparse_ce", "liger_kernel", "quack-kernels", "cut-cross-entropy")
    has_kernels = backends.unavailable("cpu") is None
    found = {
        "date": date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip()
        if shutil.which("git")
        else "",
        "python": platform.python_version(),
        "versions": {
            "torch": torch.__version__,
            **{name: installed.get(name) for name in packages},
        },
        "device": device.type,
        "cpu": about.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in sets if name in flags],
        # what each may use of them: SPARSE_CE_CPU_ISA, ATEN_CPU_CAPABILITY
        "used": {
            "sparse_ce": torch.ops.sparse_ce_native.cpu_isa() if has_kernels else None,
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB"
        found["cuda"] = torch.version.cuda
    return found


def arguments(program: str, about: str, dtypes: Sequence[str] = ()) -> argparse.ArgumentParser:
    """What all benches are asked; each adds its own."""
    parser = argparse.ArgumentParser(
        program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    if dtypes:
        add("--dtype", choices=DTYPES, nargs="+", default=list(dtypes))
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--provider", nargs="+", metavar="PART", help="by their names, or the ends of them")
    add("--threads", type=int, default=2, help="of the CPU (2)")
    add("--repeats", type=int, help="rounds, in place of those meant")
    add("--json", nargs="?", const="", metavar="PATH", help="default: in bench/results")
    return parser


def chosen(
    parser: argparse.ArgumentParser, parts: Sequence[str] | None, of: Iterable[str]
) -> list[str]:
    """Those that --provider names by a part, or all; a part that names nobody is an error."""
    names = list(of)
    found = {part: [n for n in names if f".{n}".endswith(f".{part}")] for part in parts or ()}
    for part, those in found.items():
        if not those:
            parser.error(f"--provider: expected some of {', '.join(names)}, got {part}")
    return [name for name in names if not parts or any(name in those for those in found.values())]


class Report:
    """What was found, written after each problem, as a time limit may end the run."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device: expected cpu where torch sees no GPU, got cuda")
        self.device = torch.device(options.device)
        if self.device.type == "cpu":
            torch.set_num_threads(options.threads)
        self.about = environment(self.device)
        print(json.dumps(self.about, indent=1))
        if self.about["load_average"] > 0.5:
            print("warning: load average above 0.5: other work disturbs the times", file=sys.stderr)
        file = f"{name}-{self.device.type}-{self.about['date']}.json"
        self.path = None
        if options.json is not None:
            self.path = Path(options.json or HERE / "results" / file)
        self.results: list[dict[str, Any]] = []

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = {"environment": self.about, "results": self.results}
            self.path.write_text(json.dumps(found, indent=1) + "\n")

    def exit_status(self) -> int:
        """A rival may fail to run, ours may not; wrong may be none."""
        rows = [row for result in self.results for row in result.get("providers", ())]
        fatal = [
            r for r in rows if r["status"] == "wrong" or (r["ours"] and r["status"] == "error")
        ]
        for row in fatal:
            print(f"{row['provider']}: {row['status']}: {row['reason']}", file=sys.stderr)
        return 1 if fatal else 0
