"""A plugin for pytest: Triton's kernels become PTX, which the package ptx runs on CPU tensors.

    make ptx
    PYTHONPATH=tests EMU_ARCH=80 python -m pytest -p emulated_triton tests -m interpreter

Everything up to the PTX is what a GPU gets: the launchers, the specialisation of arguments, the
layouts and barriers of the compiler. The summary lists findings: races within a program, between
programs and in shared memory, reads of memory that a launcher allocated and no kernel has written,
barriers and shuffles of which lanes are missing. A finding fails the run, and so does an access
outside of the tensors or a misaligned one.

Options of the environment: ptx/plugin.py.
"""

import dataclasses
import os
import struct
import sys
import tempfile

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="emulated-triton-"))

import torch
from ptx import plugin
from ptx.plugin import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401
from sparse_ce import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

TARGET = GPUTarget("cuda", plugin.ARCHITECTURE, 32)


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


def _unwritten(allocate):
    """What it allocates for a launcher is known to be unwritten, until a kernel writes there."""

    def allocate_and_note(*arguments, **options):
        tensor = allocate(*arguments, **options)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("sparse_ce.triton_kernels."):
            plugin.note_unwritten(tensor)
        return tensor

    return allocate_and_note


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
            plugin.extent_of(value, value.data_ptr(), name)
            for name, kind, value in found
            if kind.startswith("*") and value.numel() > 0
        ]
        # what the compiler adds: scratch of its own, and of the profiler
        bits = [_bits(kind, value) for _, kind, value in found] + [0, 0]
        plugin.run(text, (x, y, z), bits, extents, shared=self.metadata.shared)

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
