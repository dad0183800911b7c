"""What the plugins of pytest share that run kernels as PTX: options, findings, the summary.

EMU_SEED takes the random orders of another run, which names its own at the end. EMU_NOISE=0 lets
approximations err by nothing, EMU_RACE=0 looks for no races and no unwritten memory. EMU_ARCH is
what is compiled for, 90. EMU_COUNTS=8 adds what a program of each kernel cost, and its
eight lines that cost most; profiled.py has it for a call.
"""

import os
import secrets
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from . import values
from .counts import Counts
from .machine import launch
from .memory import Extent, Scratch

ARCHITECTURE = int(os.environ.get("EMU_ARCH", "90"))
SEED = int(os.environ.get("EMU_SEED") or secrets.randbelow(1 << 32))
RACES = os.environ.get("EMU_RACE", "1") == "1"
values.NOISE = os.environ.get("EMU_NOISE", "1") == "1"

_random = np.random.default_rng(SEED)
LINES = os.environ.get("EMU_COUNTS")
COUNTS = Counts() if LINES else None
_findings: Counter[str] = Counter()
_programs: Counter[str] = Counter()
_texts: dict[str, set[str]] = {}
# memory that kernels are to fill, while it lives
_scratch: list[tuple[StorageWeakRef, Scratch]] = []


def extent_of(tensor: torch.Tensor, begin: int, name: str) -> Extent:
    """`begin`: its address."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return Extent(begin, begin + (last + 1) * tensor.element_size(), name)


def note_unwritten(tensor: torch.Tensor, unwritten: np.ndarray | None = None) -> None:
    """Kernels are to fill this contiguous tensor: of each byte 1, unless somebody has already."""
    size = -(-tensor.nbytes // 8) * 8  # whole granules, of up to eight bytes
    mask = np.ones(size, np.uint8)
    if unwritten is not None:
        mask[: tensor.nbytes] = unwritten
    _scratch[:] = [pair for pair in _scratch if not pair[0].expired()]
    weak = StorageWeakRef(tensor.untyped_storage())
    _scratch.append((weak, Scratch(tensor.data_ptr(), mask)))


def run(
    text: str,
    grid: tuple[int, int, int],
    parameters: list[Any],
    extents: list[Extent],
    **options: Any,
) -> None:
    """A launch of a kernel, as of ptx.launch."""
    scratch = [piece for storage, piece in _scratch if not storage.expired()]
    name = launch(
        text, grid, parameters, extents, _findings,
        scratch=scratch, random=_random, races=RACES, counts=COUNTS, **options,
    )  # fmt: skip
    _programs[name] += grid[0] * grid[1] * grid[2]
    _texts.setdefault(name, set()).add(text)


def pytest_sessionfinish(session: Any) -> None:
    if _findings and session.exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in COUNTS.table(int(LINES)) if COUNTS and LINES else ():
        terminalreporter.write_line(line)
    for text, count in sorted(_findings.items()):
        terminalreporter.write_line(f"{count:7d} {text}")
    kernels = {name: len(texts) for name, texts in _texts.items()}
    terminalreporter.write_line(
        f"EMU_SEED={SEED}; programs: {dict(_programs)}; kernels compiled: {kernels}"
    )
