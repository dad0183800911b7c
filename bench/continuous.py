"""An output layer without a softmax beside one with: python -m bench.continuous

The step of an output layer, from hidden states (N, 512) to the loss and the gradients of hidden
states and parameters, in float32. Ours projects to 300 numbers and compares them with the vector of
the target in a frozen table of V = 400000. The rivals multiply by (V, 512) and take the softmax:
another loss, and the one whose cost continuous outputs are there to avoid. Peak memory is what a
step allocates on top of parameters and table.

Ours is first checked against float64; then the providers take turns. "cross_entropy" needs some
four times N * V * 4 bytes, 26 GB at N = 4096: where the machine does not have them it is left out,
and "cross_entropy.chunked", N a chunk of tokens at a time with a backward of its own, stands for
it. Ours runs with a tenth of the table too: its peak must not change.
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sparse_ce import ContinuousOutputHead, backends
from torch import Tensor, nn

from .run import HERE, environment, peak_memory, spread, stopwatch

CHUNK_TOKENS = 256
# float32 sums of some hundred products, of terms that may cancel
ERROR = 1e-5

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    tokens: int = 4096
    features: int = 512
    vectors: int = 400000
    width: int = 300


@dataclass
class Case:
    hidden: Tensor
    target: Tensor
    table: Tensor

    @staticmethod
    def of(problem: Problem, device: torch.device) -> "Case":
        generator = torch.Generator(device).manual_seed(0)
        shape = {"device": device, "generator": generator}
        hidden = torch.randn(problem.tokens, problem.features, **shape).requires_grad_()
        target = torch.randint(problem.vectors, (problem.tokens,), **shape)
        return Case(hidden, target, torch.randn(problem.vectors, problem.width, **shape))


def _head(case: Case, backend: str) -> ContinuousOutputHead:
    torch.manual_seed(0)
    return ContinuousOutputHead(
        case.hidden.shape[1], case.table, device=case.hidden.device, backend=backend
    )


def _clear(case: Case, head: nn.Module) -> None:
    """Every step allocates its gradients, as where an optimizer has set them to None."""
    case.hidden.grad = None
    head.zero_grad()


def _ours(backend: str) -> Callable[[Case], Step]:
    def make(case: Case) -> Step:
        head = _head(case, backend)

        def step() -> Tensor:
            loss = head(case.hidden, case.target)
            loss.backward()
            _clear(case, head)
            return loss.detach()

        return step

    return make


def _softmax(chunk_tokens: int | None) -> Callable[[Case], Step]:
    def make(case: Case) -> Step:
        tokens, features = case.hidden.shape
        head = nn.Linear(features, case.table.shape[0], bias=False, device=case.hidden.device)

        def step() -> Tensor:
            total = case.hidden.new_zeros(())
            chunk = chunk_tokens or tokens
            for h, y in zip(case.hidden.split(chunk), case.target.split(chunk), strict=True):
                loss = F.cross_entropy(head(h), y, reduction="sum") / tokens
                loss.backward()
                total += loss.detach()
            _clear(case, head)
            return total

        return step

    return make


PROVIDERS = {
    **{f"sparse_ce.{name}": _ours(name) for name in backends.NAMES},
    "cross_entropy": _softmax(None),
    "cross_entropy.chunked": _softmax(CHUNK_TOKENS),
}


def unavailable(name: str, problem: Problem, device: torch.device) -> str | None:
    if name.startswith("sparse_ce."):
        if name == "sparse_ce.triton" and backends.interpreting():
            return "Triton's interpreter is not for timing"
        try:
            backends.resolve(name.partition(".")[2], device.type, torch.float32, False)
        except RuntimeError as error:
            return str(error)
    if name == "cross_entropy":
        needed = 4 * problem.tokens * problem.vectors * 4
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        if needed > free:
            return f"it needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
    return None


def error(case: Case, backend: str) -> float:
    """The largest relative error of loss and gradients against float64."""
    head = _head(case, backend)
    inputs = (case.hidden, head.projection.weight, head.projection.bias)
    ours = head(case.hidden, case.target)
    found = (ours, *torch.autograd.grad(ours, inputs))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    vectors = case.table[case.target].double()
    truth = (1 - F.cosine_similarity(F.linear(*exact), vectors)).mean()
    wanted = (truth, *torch.autograd.grad(truth, exact))
    return max(
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)
    )


def measure(
    problem: Problem, device: torch.device, names: Sequence[str], rounds: int
) -> dict[str, Any]:
    case, clock = Case.of(problem, device), stopwatch(device)
    rows: dict[str, dict[str, Any]] = {}
    racing: dict[str, Step] = {}
    for name in names:
        reason = unavailable(name, problem, device)
        rows[name] = {"reason": reason, "samples": []}
        if reason is not None:
            continue
        if name.startswith("sparse_ce."):
            rows[name]["error"] = error(case, name.partition(".")[2])
            if not rows[name]["error"] <= ERROR:
                rows[name]["reason"] = f"wrong: relative error {rows[name]['error']:.3g}"
                continue
            small = Case.of(replace(problem, vectors=problem.vectors // 10), device)
            rows[name]["peak_bytes_of_a_tenth"] = peak_memory(device, PROVIDERS[name](small))
        step = PROVIDERS[name](case)
        rows[name]["peak_bytes"] = peak_memory(device, step)
        racing[name] = step
    gc.collect()
    for _ in range(rounds):
        for name, step in racing.items():
            rows[name]["samples"].append(clock(step))
    return {"problem": asdict(problem), "providers": rows}


def show(result: dict[str, Any]) -> None:
    print("\nN={tokens} hidden={features} V={vectors} D={width} fp32".format(**result["problem"]))
    print(f"  {'provider':<24}{'ms':>12}{'p20':>12}{'p80':>12}{'peak MB':>10}{'V / 10':>10}")
    for name, row in result["providers"].items():
        if row["reason"] is not None:
            print(f"  {name:<24}{row['reason']}")
            continue
        times = "".join(f"{value:12.2f}" for value in spread(row["samples"]).values())
        tenth = row.get("peak_bytes_of_a_tenth")
        small = "" if tenth is None else f"{tenth / 1e6:10.1f}"
        print(f"  {name:<24}{times}{row['peak_bytes'] / 1e6:10.1f}{small}")
    timed = {name: row["samples"] for name, row in result["providers"].items() if row["samples"]}
    for name, own in timed.items():
        for rival, samples in timed.items():
            if name.startswith("sparse_ce.") and not rival.startswith("sparse_ce."):
                points = spread([b / a for a, b in zip(own, samples, strict=True)])
                print(f"  {rival} / {name}:", "{median:.0f} ({p20:.0f}-{p80:.0f})".format(**points))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "bench.continuous",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", nargs=4, type=int, metavar=("N", "HIDDEN", "V", "D"))
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--provider", nargs="+", metavar="PART", help="those with PART in their name")
    add("--threads", type=int, default=2, help="of the CPU (2)")
    add("--repeats", type=int, default=3, help="rounds (3)")
    add("--json", nargs="?", const="", metavar="PATH", help="default: in bench/results")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    about = environment(device)
    print(json.dumps(about, indent=1))
    problem = Problem(*options.shape) if options.shape else Problem()
    names = [n for n in PROVIDERS if any(part in n for part in options.provider or [""])]
    result = measure(problem, device, names, options.repeats)
    show(result)
    if options.json is not None:
        path = Path(
            options.json or HERE / "results" / f"continuous-{device.type}-{about['date']}.json"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": about, **result}, indent=1) + "\n")
    wrong = [n for n, row in result["providers"].items() if "wrong" in (row["reason"] or "")]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
