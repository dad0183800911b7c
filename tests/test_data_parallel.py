"""The output layer in DistributedDataParallel and in fully_shard (FSDP): each rank has rows of its
own, and the gradients are those of all rows in one process, by plain tensor operations.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import ranks
import subjects
import torch
from sparse_ce import SparseLinearCrossEntropy, fused_linear_sparse_ce
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

CLASSES, FEATURES, RANKS, STEPS, TOKENS = 301, 32, 2, 2, 12
# the head in one group of parameters with all others, or in a group of its own
WAYS = ("ddp", "fsdp", "fsdp-head-apart")
CASES = [
    (way, k, tied)
    for way in WAYS
    for k in (5, None)
    for tied in (False, True)
    if not (tied and way == "fsdp-head-apart")  # two groups cannot share a parameter
]


class Model(nn.Module):
    def __init__(self, k: int | None, tied: bool, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, FEATURES)
        self.body = nn.Linear(FEATURES, FEATURES)
        self.head = SparseLinearCrossEntropy(FEATURES, CLASSES, k)
        if tied:
            self.head.weight = self.embedding.weight
        self.to(device, torch.float64)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.body(self.embedding(ids)).tanh()

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        return self.head(self.hidden(ids), target)


def batches(device: str) -> tuple[Tensor, Tensor]:
    """(RANKS, STEPS, TOKENS) inputs and targets. Each rank ignores as many: the mean over the ranks
    of means is then that of all.
    """
    torch.manual_seed(1)
    ids, target = torch.randint(CLASSES, (2, RANKS, STEPS, TOKENS))
    target[..., 3] = -100
    return ids.to(device), target.to(device)


def truth(k: int | None, tied: bool) -> dict[str, Tensor]:
    model = Model(k, tied, "cpu")
    ids, target = (t.flatten() for t in batches("cpu"))
    ids, target = ids[target != -100], target[target != -100]
    logits = model.hidden(ids) @ model.head.weight.t()
    if k is None:
        cross_entropy(logits, target).backward()
    else:
        of_target = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        (logits.topk(k).values.logsumexp(-1) - of_target).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def on_a_rank(rank: int, device: str) -> list[dict[str, Tensor] | str]:
    return [*(of_case(*case, rank, device) for case in CASES), refusal(rank, device)]


@contextlib.contextmanager
def synchronised(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of steps before the last stay with the rank."""
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if last else model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(last)
        yield


def of_case(way: str, k: int | None, tied: bool, rank: int, device: str) -> dict[str, Tensor]:
    model = wrapped = Model(k, tied, device)
    whole: Callable[[Tensor], Tensor] = torch.clone
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        sharded(model, way, device)
        whole = lambda gradient: gradient.full_tensor()  # noqa: E731
    ids, target = (t[rank] for t in batches(device))
    for step in range(STEPS):
        with synchronised(wrapped, step == STEPS - 1):
            (wrapped(ids[step], target[step]) / STEPS).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def sharded(model: Model, way: str, device: str) -> None:
    mesh = init_device_mesh(device, (RANKS,))
    for part in (model.body, *([model.head] if way == "fsdp-head-apart" else []), model):
        fully_shard(part, mesh=mesh)


def refusal(rank: int, device: str) -> str:
    """The function, which no hook of FSDP's gathers the weight for."""
    model = Model(5, False, device)
    sharded(model, "fsdp", device)
    target = batches(device)[1][rank, 0]
    hidden = torch.zeros(TOKENS, FEATURES, dtype=torch.float64, device=device)
    try:
        fused_linear_sparse_ce(hidden, model.head.weight, target, 5)
    except TypeError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module", params=subjects.DEVICES)
def found(request: pytest.FixtureRequest) -> list[list[dict[str, Tensor] | str]]:
    if ranks.available(request.param) < RANKS:
        pytest.skip(f"it takes {RANKS} ranks, of gloo, or of nccl with a GPU each")
    return ranks.run(RANKS, request.param, on_a_rank, request.param)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gradients(case: tuple[str, int | None, bool], found: list) -> None:
    _, k, tied = case
    expected = truth(k, tied)
    for of_rank in found:
        gradients = of_rank[CASES.index(case)]
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            # sums of some hundred terms in float64, in another order
            within = 1e-12 * expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=within)


def test_the_refusal_names_what_to_do(found: list) -> None:
    for of_rank in found:
        assert of_rank[-1].startswith("weight: expected a plain torch.Tensor, got a DTensor; ")
        assert "call the module that holds it: FSDP then gathers it" in of_rank[-1]
