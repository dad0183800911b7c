"""Runs a function on every rank of a process group: a process each, on the processor by gloo, on
GPUs by nccl, a GPU each.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def available(device: str) -> int:
    """How many ranks a test may have: 0 where torch lacks what it takes."""
    if not dist.is_available():
        return 0
    if device == "cuda":
        return torch.cuda.device_count() if dist.is_nccl_available() else 0
    return 3 if dist.is_gloo_available() else 0


def run(ranks: int, device: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(rank, *arguments) returns on each of them, moved to the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, device, folder, function, arguments), nprocs=ranks)
        return [torch.load(Path(folder) / str(rank), "cpu") for rank in range(ranks)]


@contextmanager
def alone(device: str) -> Iterator[None]:
    """A process group of this process."""
    with tempfile.TemporaryDirectory() as folder:
        _join(0, 1, device, folder)
        yield
        dist.destroy_process_group()


def _join(rank: int, ranks: int, device: str, folder: str) -> None:
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=3),
    )


def _rank(
    rank: int,
    ranks: int,
    device: str,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    import subjects

    if subjects.INTERPRETING and importlib.util.find_spec("fast_interpreter") is not None:
        importlib.import_module("fast_interpreter").install()
    if device == "cuda":
        torch.cuda.set_device(rank)
    _join(rank, ranks, device, folder)
    try:
        torch.save(function(rank, *arguments), Path(folder) / str(rank))
    finally:
        dist.destroy_process_group()
