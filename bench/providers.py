"""Who is measured: one row of PROVIDERS each, the machine's own bandwidth at the foot.

To add a provider: a function (logits, target, k) -> closure that gives the mean loss, and a row.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from sparse_ce import adaptive_sparse_ce, backends, fused_sparse_ce
from torch import Tensor

from .problems import DELTA, TAIL_SAMPLES
from .race import unavailable

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Tensor, Tensor, int], Forward]
    unavailable: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    ours: bool = False
    loss: str = "top-k"  # or dense, adaptive: other losses, to which k is nothing; or tail
    writes_logits: bool = False  # it leaves its gradient in the caller's logits: it gets a copy


def _ours(backend: str, loss: str = "top-k") -> Provider:
    def make(logits: Tensor, target: Tensor, k: int) -> Forward:
        if loss == "adaptive":
            return lambda: adaptive_sparse_ce(logits, target, DELTA, backend=backend)
        if loss == "tail":
            options = {"normalizer": "full", "tail_samples": TAIL_SAMPLES, "backend": backend}
            return lambda: fused_sparse_ce(logits, target, k, **options)
        kept = k if loss == "top-k" else None
        return lambda: fused_sparse_ce(logits, target, kept, backend=backend)

    name = f"sparse_ce.{backend}" if loss == "top-k" else f"sparse_ce.{backend}.{loss}"
    return Provider(name, make, partial(unavailable, backend), ours=True, loss=loss)


def _loss(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """As a user writes it. Only the k values that are left are float32, which costs nothing."""
    values = logits.topk(k, dim=-1).values.float()
    target_logit = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1).float()
    return (values.logsumexp(-1) - target_logit).mean()


def _composition(logits: Tensor, target: Tensor, k: int) -> Forward:
    return lambda: _loss(logits, target, k)


def _compiled(logits: Tensor, target: Tensor, k: int) -> Forward:
    # fullgraph: what falls back to eager must not be timed under this name
    compiled = torch.compile(_loss, fullgraph=True, dynamic=False)
    return lambda: compiled(logits, target, k)


def _cross_entropy(logits: Tensor, target: Tensor, k: int) -> Forward:
    return lambda: F.cross_entropy(logits, target)


def _liger(logits: Tensor, target: Tensor, k: int) -> Forward:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda: liger_cross_entropy(logits, target)


def _quack(logits: Tensor, target: Tensor, k: int) -> Forward:
    from quack.cross_entropy import cross_entropy

    return lambda: cross_entropy(logits, target, reduction="mean")


def needs(package: str) -> Callable[[torch.device, torch.dtype], str | None]:
    def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return "it runs on a GPU only"
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
        return "it has no kernels for float64" if dtype == torch.float64 else None

    return unavailable


PROVIDERS = (
    *(_ours(name) for name in backends.NAMES),
    *(_ours(name, loss) for name in backends.NAMES for loss in ("dense", "adaptive", "tail")),
    Provider("composition", _composition),
    Provider("composition.compiled", _compiled),
    Provider("cross_entropy", _cross_entropy, loss="dense"),
    Provider("liger", _liger, needs("liger_kernel"), loss="dense", writes_logits=True),
    Provider("quack", _quack, needs("quack"), loss="dense"),
)


@dataclass(frozen=True)
class Probe:
    """One way to move memory. The fastest of a kind is the machine's rate."""

    kind: str  # read, write, fresh (a write of newly allocated memory), copy
    bytes: int
    run: Callable[[], object]


def probes(device: torch.device, nbytes: int, threads: int) -> list[Probe]:
    """On a buffer of nbytes, rounded up to float32."""
    buffer = torch.ones(-(-nbytes // 4), device=device)
    nbytes = buffer.nbytes
    found = [
        Probe("read", nbytes, buffer.sum),
        Probe("read", nbytes, buffer.amax),
        Probe("write", nbytes, lambda: buffer.fill_(1.0)),
    ]
    if device.type != "cpu":
        other = torch.empty_like(buffer)
        return [*found, Probe("copy", 2 * nbytes, lambda: other.copy_(buffer))]
    found.append(Probe("fresh", nbytes, lambda: torch.empty_like(buffer).fill_(1.0)))
    # the C library's own loops, a part of the buffer per thread; none of its bytes is a 1
    libc, pool = ctypes.CDLL(None), ThreadPoolExecutor(threads)
    parts = [(part.data_ptr(), part.nbytes) for part in buffer.chunk(threads)]

    def in_threads(function: Callable[..., object], byte: int) -> Callable[[], object]:
        def part(place: tuple[int, int]) -> None:
            function(ctypes.c_void_p(place[0]), byte, ctypes.c_size_t(place[1]))

        return lambda: (list(pool.map(part, parts)), buffer)  # holds the buffer

    found.append(Probe("read", nbytes, in_threads(libc.memchr, 1)))
    found.append(Probe("write", nbytes, in_threads(libc.memset, 0)))
    return found
