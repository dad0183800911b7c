"""A plugin for pytest: Triton's kernels become PTX, which the package ptx runs on CPU tensors.

    make ptx
    PYTHONPATH=tests EMU_ARCH=80 python -m pytest -p emulated_triton tests -m interpreter

Everything up to the PTX is what a GPU gets: the launchers, the specialisation of arguments, the
layouts and barriers of the compiler. The summary lists findings: races within a program, between
programs and in shared memory, reads of memory that a launcher allocated and no kernel has written,
barriers and shuffles of which lanes are missing. A finding fails the run, and so does an access
outside of the tensors or a misaligned one.

EMU_SEED takes the random orders of another run, which names its own at the end. EMU_NOISE=0 lets
approximations err by nothing, EMU_RACE=0 looks for no races and no unwritten memory.
"""

import dataclasses
import os
import secrets
import struct
import sys
import tempfile
from collections import Counter

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="emulated-triton-"))

import numpy as np
import ptx
import torch
from ptx import values
from sparse_ce import backends
from torch.multiprocessing.reductions import StorageWeakRef
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

TARGET = GPUTarget("cuda", int(os.environ.get("EMU_ARCH", "90")), 32)
SEED = int(os.environ.get("EMU_SEED") or secrets.randbelow(1 << 32))
RANDOM = np.random.default_rng(SEED)
RACES = os.environ.get("EMU_RACE", "1") == "1"
values.NOISE = os.environ.get("EMU_NOISE", "1") == "1"
FINDINGS: Counter[str] = Counter()
PROGRAMS: Counter[str] = Counter()
COMPILED: dict[str, set[str]] = {}
# What torch.empty and its like gave to a launcher, while it lives.
SCRATCH: list[tuple[StorageWeakRef, ptx.Scratch]] = []


class _Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}


class _Driver:
    utils = _Utils()
    launcher_cls = None

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind):
        return kind


def _only_to_ptx():
    add_stages, init = CUDABackend.add_stages, CUDABackend.__init__

    def stages_to_ptx(self, stages, *arguments, **options):
        add_stages(self, stages, *arguments, **options)
        stages.pop("cubin", None)

    def init_for_ptx(self, target):
        init(self, target)
        self.binary_ext = "ptx"

    CUDABackend.add_stages, CUDABackend.__init__ = stages_to_ptx, init_for_ptx


def _bits(kind, value):
    if kind.startswith("*"):
        return value.data_ptr()
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    if kind == "fp64":
        return struct.unpack("<Q", struct.pack("<d", value))[0]
    width = int(kind[1:])
    assert -(1 << (width - 1)) <= value < 1 << (width - 1), (kind, value)
    return value & ((1 << width) - 1)


def _extent(tensor, name):
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return ptx.Extent(begin, begin + (last + 1) * tensor.element_size(), name)


def _unwritten(allocate):
    """What it allocates for a launcher is known to be unwritten, until a kernel writes there."""

    def allocate_and_note(*arguments, **options):
        tensor = allocate(*arguments, **options)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("sparse_ce.triton_kernels."):
            storage = tensor.untyped_storage()
            # whole granules, of up to eight bytes
            unwritten = np.ones(-(-storage.nbytes() // 8) * 8, np.uint8)
            scratch = ptx.Scratch(storage.data_ptr(), unwritten)
            SCRATCH[:] = [pair for pair in SCRATCH if not pair[0].expired()]
            SCRATCH.append((StorageWeakRef(storage), scratch))
        return tensor

    return allocate_and_note


def _living_scratch():
    return [scratch for storage, scratch in SCRATCH if not storage.expired()]


def _init_handles(self):
    if self.module is not None:
        return
    self.module, self.function = 1, self
    signature, text = self.src.signature, self.asm["ptx"]
    text = text.decode() if isinstance(text, bytes) else text

    def run(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        given = zip(signature.items(), arguments, strict=True)
        found = [(name, kind, value) for (name, kind), value in given if kind != "constexpr"]
        extents = [
            _extent(value, name)
            for name, kind, value in found
            if kind.startswith("*") and value.numel() > 0
        ]
        COMPILED.setdefault(self.src.fn.__name__, set()).add(self.hash)
        # what the compiler adds: scratch of its own, and of the profiler
        bits = [_bits(kind, value) for _, kind, value in found] + [0, 0]
        name = ptx.launch(
            text, (x, y, z), bits, extents, FINDINGS,
            shared=self.metadata.shared, scratch=_living_scratch(), random=RANDOM, races=RACES,
        )  # fmt: skip
        PROGRAMS[name] += x * y * z

    self._run = run


def _register():
    driver.set_active(_Driver())
    _only_to_ptx()
    CompiledKernel._init_handles = _init_handles
    torch.empty, torch.empty_like = _unwritten(torch.empty), _unwritten(torch.empty_like)
    torch.Tensor.new_empty = _unwritten(torch.Tensor.new_empty)
    backends.BACKENDS = tuple(
        dataclasses.replace(row, devices=("cuda", "cpu"), unavailable=lambda: None)
        if row.name == "triton"
        else row
        for row in backends.BACKENDS
    )
    backends.unavailable.cache_clear()
    backends.implementation.cache_clear()
    backends.interpreting = lambda: True


_register()


def pytest_sessionfinish(session):
    if FINDINGS and session.exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    for text, count in sorted(FINDINGS.items()):
        terminalreporter.write_line(f"{count:7d} {text}")
    kernels = {name: len(hashes) for name, hashes in COMPILED.items()}
    terminalreporter.write_line(
        f"EMU_SEED={SEED}; programs: {dict(PROGRAMS)}; kernels compiled: {kernels}"
    )
