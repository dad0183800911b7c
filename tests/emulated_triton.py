"""A plugin for pytest: Triton's kernels become PTX, which emulated_ptx.py runs on CPU tensors.

    make ptx
    PYTHONPATH=tests EMU_ARCH=80 python -m pytest -p emulated_triton tests -m interpreter

Everything up to the PTX is what a GPU gets: the launchers, the specialisation of arguments, the
layouts and barriers of the compiler. The summary lists findings: races within a program, between
programs and in shared memory, reads of scratch (what emulated_ptx.py knows as such by its name)
that the launch has not written, barriers and shuffles of which lanes are missing. A finding fails
the run, and so does an access outside of the tensors or a misaligned one.
"""

import dataclasses
import os
import struct
import tempfile

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="emulated-triton-"))

import emulated_ptx
import torch
from sparse_ce import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

TARGET = GPUTarget("cuda", int(os.environ.get("EMU_ARCH", "90")), 32)
COMPILED: dict[str, set[str]] = {}


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
    return begin, begin + (last + 1) * tensor.element_size(), name


def _init_handles(self):
    if self.module is not None:
        return
    self.module, self.function = 1, self
    signature, ptx = self.src.signature, self.asm["ptx"]
    ptx = ptx.decode() if isinstance(ptx, bytes) else ptx

    def run(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        given = zip(signature.items(), arguments, strict=True)
        found = [(name, kind, value) for (name, kind), value in given if kind != "constexpr"]
        tensors = [
            _extent(value, name)
            for name, kind, value in found
            if kind.startswith("*") and value.numel() > 0
        ]
        assert min(x, y, z) >= 1
        COMPILED.setdefault(self.src.fn.__name__, set()).add(self.hash)
        # what the compiler adds: two kinds of scratch, and of the profiler
        values = [_bits(kind, value) for _, kind, value in found] + [0, 0, 0]
        emulated_ptx.launch(ptx, (x, y, z), values, tensors, self.metadata.shared)

    self._run = run


def _register():
    driver.set_active(_Driver())
    _only_to_ptx()
    CompiledKernel._init_handles = _init_handles
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
    if emulated_ptx.FINDINGS and session.exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    for (kind, text), count in sorted(emulated_ptx.FINDINGS.items()):
        terminalreporter.write_line(f"{count:7d} {kind}: {text}")
    kernels = {name: len(hashes) for name, hashes in COMPILED.items()}
    terminalreporter.write_line(f"emulated: {emulated_ptx.STATS}; kernels compiled: {kernels}")
