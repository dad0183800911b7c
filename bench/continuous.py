"""An output layer without a softmax beside one with: python -m bench.continuous

The step of an output layer, from hidden states (N, 512) to the loss and the gradients of hidden
states and parameters, in float32. Ours projects to 300 numbers and compares them with the vector of
the target in a frozen table of V = 400000. The rivals multiply by (V, 512) and take the softmax:
another loss, and the one whose cost continuous outputs are there to avoid. Peak memory is what a
step allocates on top of parameters and table.

How providers are checked, timed and weighed: race.py. Here ours is held against float64.
"cross_entropy" needs some four times N * V * 4 bytes, 26 GB at N = 4096: where the machine does not
have them it is left out, and "cross_entropy.chunked", N a chunk of tokens at a time with a backward
of its own, stands for it. Ours runs with a tenth of the table too: its peak must not change.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sparse_ce import ContinuousOutputHead, backends
from torch import Tensor, nn

from .race import (
    Entrant,
    Report,
    admit,
    arguments,
    chosen,
    peak_memory,
    ratios,
    show,
    show_ratios,
    stopwatch,
    take_turns,
    unavailable,
)

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


def missing(name: str, problem: Problem, device: torch.device) -> str | None:
    if name.startswith("sparse_ce."):
        return unavailable(name.partition(".")[2], device, torch.float32)
    if name != "cross_entropy":
        return None
    needed = 4 * problem.tokens * problem.vectors * 4
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if needed <= free:
        return None
    return f"it needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


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


def enter(problem: Problem, case: Case, entrant: Entrant) -> dict[str, float]:
    make = PROVIDERS[entrant.name]
    step = make(case)
    entrant.passes = {"step": lambda: step}
    if not entrant.ours:
        return {}
    device = case.hidden.device
    small = make(Case.of(replace(problem, vectors=problem.vectors // 10), device))
    entrant.more["peak_bytes_of_a_tenth"] = peak_memory(device, small)
    return {"loss and gradients": error(case, entrant.name.partition(".")[2]) / ERROR}


def measure(
    problem: Problem, device: torch.device, names: Sequence[str], rounds: int
) -> dict[str, Any]:
    case = Case.of(problem, device)
    entrants = [
        admit(
            Entrant(name, ours=name.startswith("sparse_ce.")),
            device,
            missing(name, problem, device),
            partial(enter, problem, case),
        )
        for name in names
    ]
    racing = take_turns(entrants, stopwatch(device), rounds, seconds=float("inf"))
    return {
        "problem": {**asdict(problem), "dtype": "float32"},
        "providers": [entrant.row() for entrant in entrants],
        "ratios": ratios(racing),
    }


def of_a_tenth(row: dict[str, Any], found: dict[str, Any]) -> str:
    peak = row.get("peak_bytes_of_a_tenth")
    return "" if peak is None else f"{peak / 1e6:.1f}"


def display(result: dict[str, Any]) -> None:
    print(
        "\nN={tokens} hidden={features} V={vectors} D={width} {dtype}".format(**result["problem"])
    )
    show(result["providers"], {"V / 10": of_a_tenth})
    show_ratios(result["ratios"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("bench.continuous", __doc__)
    parser.add_argument("--shape", nargs=4, type=int, metavar=("N", "HIDDEN", "V", "D"))
    options = parser.parse_args(argv)
    names = chosen(parser, options.provider, PROVIDERS)
    report = Report("continuous", options)
    problem = Problem(*options.shape) if options.shape else Problem()
    report.add(measure(problem, report.device, names, options.repeats or 3))
    display(report.results[-1])
    return report.exit_status()


if __name__ == "__main__":
    sys.exit(main())
