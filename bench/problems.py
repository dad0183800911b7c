"""What is measured: problems, the data that fills them, the right answers, and the suites.

To add a problem: one Problem in a suite at the foot. To add a kind of data: a function in DATA.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from sparse_ce import backends
from torch import Tensor

# On a GPU a pass over less than this does not show its bandwidth.
_GPU_BYTES = 2e9

# Of adaptive sparse softmax.
DELTA = 0.1

# Of the dense loss with a sparse gradient.
TAIL_SAMPLES = 64

# Elements of the float64 and float32 temporaries that exist at a time.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Problem:
    rows: int
    classes: int
    k: int
    grow: bool = True  # a GPU doubles the rows until the logits weigh _GPU_BYTES

    def on(self, device: torch.device, dtype: torch.dtype) -> "Problem":
        rows, row_bytes = self.rows, self.classes * dtype.itemsize
        while device.type != "cpu" and self.grow and rows * row_bytes < _GPU_BYTES:
            rows *= 2
        return replace(self, rows=rows)

    def fill(self, device: torch.device, dtype: torch.dtype, data: str) -> "Case":
        """In every other row the target leads."""
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.empty(self.rows, self.classes, device=device, dtype=dtype)
        target = torch.randint(self.classes, (self.rows,), device=device, generator=generator)
        for z, y in _chunks(logits, target):
            noise = torch.randn(z.shape, device=device, generator=generator)
            z.copy_(DATA[data](noise, y))
            y[::2] = z[::2].argmax(-1)
        largest = max(map(abs, torch.stack(logits.aminmax()).tolist()))
        truth = {
            "top-k": mean_loss(logits, target, self.k),
            "dense": mean_loss(logits, target, self.classes),
            "adaptive": mean_loss(logits, target, None),
        }
        truth["tail"] = truth["dense"]
        return Case(logits, target, self.k, largest, truth)


@dataclass(frozen=True)
class Case:
    """A problem with data, shared by its providers."""

    logits: Tensor  # (N, V)
    target: Tensor  # (N,) int64
    k: int
    largest: float  # of |logits|
    truth: dict[str, float]  # kind of loss -> its mean over all rows, from float64


def _chunks(logits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    yield from zip(logits.split(step), target.split(step), strict=True)


def _normal(noise: Tensor, target: Tensor) -> Tensor:
    return noise


def _peaked(noise: Tensor, target: Tensor) -> Tensor:
    """As a language model has them: Zipf's prior, 0.8 of the mass on 20 classes, a good target."""
    rank = torch.arange(1, noise.shape[-1] + 1, device=noise.device)
    z = 4 * noise - rank.log()
    place = target.unsqueeze(-1)
    return z.scatter(-1, place, z.amax(-1, keepdim=True) + 2 * noise.gather(-1, place))


def _ties(noise: Tensor, target: Tensor) -> Tensor:
    """Some twenty different values in a row: the k-th largest is tied with many others."""
    return (2 * noise).round() / 2


DATA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": _normal,
    "peaked": _peaked,
    "ties": _ties,
}


def mean_loss(logits: Tensor, target: Tensor, k: int | None) -> float:
    """Over all rows, in float64. k = V: the dense softmax. None: of what DELTA leaves of it."""
    total = 0.0
    for z, y in _chunks(logits, target):
        z_y = z.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        if k is None:
            kept = z.double().masked_fill(~_near(z.double(), y), -torch.inf)
        else:
            kept = z.topk(k).values if k < z.shape[-1] else z
        total += (kept.double().logsumexp(-1) - z_y.double()).sum().item()
    return total / logits.shape[0]


def probabilities(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(n, V) -> the softmax over the k largest, float64; the classes equal to the k-th value, bool.

    Which of those are kept is a convention that not all providers share: each gets their mean.
    """
    z = logits.double()
    values = z.topk(k).values
    tied, above = z == values[:, -1:], z > values[:, -1:]
    share = (k - above.double().sum(-1, keepdim=True)) / tied.sum(-1, keepdim=True)
    p = (z - values.logsumexp(-1, keepdim=True)).exp()
    return torch.where(tied, p * share, p * above), tied


def _near(z: Tensor, target: Tensor) -> Tensor:
    """(n, V) bool: the classes that the target does not beat by more than DELTA."""
    p = z.softmax(-1)
    return p.gather(-1, target.unsqueeze(-1)) - p <= DELTA


def adaptive_probabilities(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over what DELTA leaves, float64; none are tied: which stay is no convention."""
    z = logits.double()
    near = _near(z, target)
    return z.masked_fill(~near, -torch.inf).softmax(-1), torch.zeros_like(near)


@dataclass(frozen=True)
class Suite:
    problems: tuple[Problem, ...]
    rounds: int  # on the CPU; a GPU takes more
    seconds: float  # a provider that has taken so long in a problem sits out its remaining rounds
    skip: tuple[str, ...] = ()  # providers that take part only when named


# the shapes whose numbers the project must reach
FLOOR = (
    Problem(2048, 32000, 20),
    Problem(512, 128256, 20),
    *(Problem(65536, classes, 20) for classes in (100, 256, 1000)),
    Problem(16384, 4096, 20),
    *(Problem(2048, 32000, k) for k in (10, 100)),
)
SWEEPS = (
    *(Problem(2048, 32000, k) for k in (1, 10, 20, 50, 100, 500, 2000)),
    *(Problem(rows, 32000, 20, grow=False) for rows in (256, 512, 1024, 2048, 4096)),
    *(Problem((1 << 26) >> bits, 1 << bits, 20) for bits in range(12, 19)),
)
_LISTED = tuple(f"sparse_ce.{name}" for name in backends.NAMES)
_THRESHOLD = tuple(f"{name}.{kind}" for name in _LISTED for kind in ("dense", "adaptive"))
_TAIL = tuple(f"{name}.tail" for name in _LISTED)
_OTHERS = (*_THRESHOLD, *_TAIL)
QUICK = (Problem(256, 32000, 20), Problem(64, 128256, 20), Problem(8192, 256, 20))
SUITES = {
    # about a minute on two cores, of which a compiler would take most
    "quick": Suite(QUICK, rounds=5, seconds=2, skip=("composition.compiled", *_OTHERS)),
    # of the dense softmax, and of what a cut leaves of it; --data normal peaked shows both
    "threshold": Suite(
        FLOOR[:2], rounds=15, seconds=10, skip=(*_LISTED, *_TAIL, "composition.compiled")
    ),
    # beside the loss of k classes and the dense one, between which it stands
    "tail": Suite(FLOOR[:2], rounds=15, seconds=10, skip=("composition", "composition.compiled")),
    "floor": Suite(FLOOR, rounds=15, seconds=10, skip=_OTHERS),
    # rows that instructions bind, not memory: what a longer list costs them
    "short": Suite(
        tuple(
            Problem(rows, classes, k)
            for rows, classes in ((65536, 1000), (16384, 4096))
            for k in (20, 50, 100)
        ),
        rounds=15,
        seconds=10,
        skip=_OTHERS,
    ),
    # what a call costs where there is little to do
    "small": Suite(
        tuple(
            Problem(rows, classes, 20, grow=False)
            for rows, classes in ((256, 100), (256, 1000), (32, 32000), (8, 128256))
        ),
        rounds=60,
        seconds=10,
        skip=(*_OTHERS, "composition.compiled"),
    ),
    "full": Suite(tuple(dict.fromkeys(FLOOR + SWEEPS)), rounds=15, seconds=10, skip=_OTHERS),
}
