"""What this run tests: each backend of the registry that can run here, on each of its devices."""

import importlib
import os
from typing import NamedTuple

import torch
from sparse_ce import backends, eager, schema

# Runs of their own, in which a backend for GPUs runs on CPU tensors: Triton's in the interpreter,
# which takes seconds where the other backends take none, CUDA's emulated.
INTERPRETING = backends.interpreting()
EMULATING = os.environ.get("SPARSE_CE_EMULATE", "0") == "1"
if EMULATING:
    importlib.import_module("emulated_cuda").register()

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
ROWS = {row.name: row for row in backends.BACKENDS}


class Subject(NamedTuple):
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return ROWS[self.backend].dtypes

    def lists(self, k: int) -> bool:
        """Its list regime goes up to this k."""
        return ROWS[self.backend].large_k or k <= backends.MAX_LIST_K

    def defines(self, stem: str) -> bool:
        """It implements the operator itself; otherwise the registry takes the tensor operations."""
        if self.backend == "eager":
            return True
        operators = [op for op in schema.SIGNATURES if op.startswith(f"{stem}_")]
        return any(
            backends.implementation(self.backend, op) is not getattr(eager, op) for op in operators
        )


def _subjects() -> list[Subject]:
    if INTERPRETING or EMULATING:
        name = "triton" if INTERPRETING else "cuda"
        return [Subject(name, "cpu")] if backends.unavailable(name) is None else []
    return [
        Subject(row.name, device)
        for row in backends.BACKENDS
        if backends.unavailable(row.name) is None
        for device in DEVICES
        if row.devices is None or device in row.devices
    ]


SUBJECTS = _subjects()


def missing() -> dict[str, str]:
    """The backends that SPARSE_CE_REQUIRE names and this machine cannot run, with the reasons."""
    required = [name.strip() for name in os.environ.get("SPARSE_CE_REQUIRE", "").split(",")]
    reasons = {
        name: backends.unavailable(name) if name in ROWS else "the registry has no such backend"
        for name in required
        if name
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}
