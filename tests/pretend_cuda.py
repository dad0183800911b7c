"""A plugin for pytest: a CUDA device is pretended, on which the tests of a GPU run without one.

    make pretend
    PYTHONPATH=tests python -m pytest -p pretend_cuda tests -k cuda-cuda
    PYTHONPATH=tests TRITON_INTERPRET=1 python -m pytest -p pretend_cuda tests -k triton-cuda

The tensors of pretend_cuda.cpp say cuda:0 and lie in the memory of the processor. So the glue of
csrc/cuda/bindings.cpp runs as it is, on emulated kernels, behind functions that see a GPU. What a
GPU refuses is refused: tensors of two devices, generators of the CPU, .numpy(), and what waits for
the GPU where torch.cuda.set_sync_debug_mode("error") or a capture forbids it. Backward runs on the
thread of the device. Memory that nobody has written to is NaN.

What it cannot show: the replay of a graph and what torch.compile makes, whose tests are skipped;
streams that overlap, and with them races; what memory takes, beyond the sum of the tensors; NCCL;
how a GPU rounds. Nor does it find a pointer to memory of the CPU where one of the GPU has to be.
"""

import contextlib
import ctypes
import dataclasses
import importlib.machinery
import importlib.util
import os
import runpy
import sys
import sysconfig
import types
from pathlib import Path

import emulation
import pytest

_TORCH = Path(importlib.util.find_spec("torch").origin).parent
_KINDS = {"default": 0, "warn": 1, "error": 2}
_VERSION = runpy.run_path(str(_TORCH / "version.py"))


def _refusal() -> str | None:
    if _VERSION["cuda"] is not None:
        return "this torch is built for CUDA and has a device of its own"
    if Path("/dev/nvidiactl").exists():
        return "this machine has a GPU, on which make gpu-check runs the same tests"
    if "torch" in sys.modules:
        return "torch, which looks for devices when it is imported, was imported before"
    return None


def _build() -> Path:
    includes = [_TORCH / "include", _TORCH / "include/torch/csrc/api/include"]
    flags = (
        *("-std=c++20", "-O0", "-g0", "-fno-sanitize=undefined", f"-I{emulation.KERNELS.parent}"),
        # without the warnings of torch; its version makes the library another one
        *(f"-isystem{path}" for path in (*includes, sysconfig.get_path("include"))),
        f"-DPRETENDED_IN={_VERSION['__version__']}",
        "-DSPARSE_CE_CUDA_ARCHITECTURES=sm_90",
    )
    sources = emulation.ROOT / "tests/pretend_cuda.cpp", emulation.KERNELS / "bindings.cpp"
    return emulation.build(*sources, flags=flags)


def _load() -> types.ModuleType:
    """The device has to be there before torch is imported. What its library asks of others, torch
    and the kernels, it finds among the symbols of the process.
    """
    kernels, path = emulation.build_kernels(), str(_build())
    libraries = (_TORCH / "lib" / f"lib{name}.so" for name in ("c10", "torch_cpu", "torch_python"))
    for library in (*libraries, kernels, path):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    importlib.import_module("torch")
    loader = importlib.machinery.ExtensionFileLoader("pretend_cuda_library", path)
    spec = importlib.util.spec_from_loader("pretend_cuda_library", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


_reason = _refusal()
if _reason is not None:
    raise ImportError(f"pretend_cuda: a GPU is not pretended: {_reason}")
device = _load()

import torch  # noqa: E402


class _Properties:
    name = "pretended"
    major, minor = 9, 0
    total_memory = 140 << 30
    multi_processor_count = 132
    warp_size = 32


class _Stream:
    """All work is over when it returns: there is nothing to wait for."""

    cuda_stream = 0

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass


def _skip(what):
    def skip(*arguments, **options):
        pytest.skip(f"not pretended: {what}")

    return skip


class _Graph:
    """What a capture forbids is seen. The captured has run once, at once."""

    replay = _skip("the replay of a graph")


@contextlib.contextmanager
def _capture(graph, **options):
    device.set_capturing(True)
    try:
        yield
    finally:
        device.set_capturing(False)


@contextlib.contextmanager
def _on_stream(stream):
    yield


def _synchronize(which=None):
    if device.capturing():
        device.waits("torch.cuda.synchronize")


def _pretend() -> None:
    """Put into torch.cuda what of it is compiled, where torch is built for CUDA."""
    generator, stream = device.default_generator(), _Stream()
    of_random = {
        "manual_seed": lambda seed: generator.manual_seed(int(seed)),
        "manual_seed_all": lambda seed: generator.manual_seed(int(seed)),
        "get_rng_state": lambda which=None: generator.get_state(),
        "set_rng_state": lambda state, which=None: generator.set_state(state),
    }
    of_cuda = {
        "is_available": lambda: True,
        "_initialized": True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda which: None,
        "_exchange_device": lambda which: 0,
        "_maybe_exchange_device": lambda which: 0,
        "get_device_properties": lambda which=None: _Properties,
        "get_device_capability": lambda which=None: (9, 0),
        "get_device_name": lambda which=None: _Properties.name,
        "synchronize": _synchronize,
        "empty_cache": lambda: None,
        "mem_get_info": lambda which=None: (130 << 30, 140 << 30),
        "memory_allocated": lambda which=None: device.held(),
        "max_memory_allocated": lambda which=None: device.peak(),
        "reset_peak_memory_stats": lambda which=None: device.reset_peak(),
        "default_generators": (generator,),
        "is_bf16_supported": lambda *options, **others: True,
        "is_current_stream_capturing": device.capturing,
        "get_sync_debug_mode": device.sync_mode,
        "set_sync_debug_mode": lambda mode: device.set_sync_mode(_KINDS.get(mode, mode)),
        "Stream": _Stream,
        "current_stream": lambda which=None: stream,
        "default_stream": lambda which=None: stream,
        "set_stream": lambda stream: None,
        "stream": _on_stream,
        "_sleep": lambda cycles: None,
        "CUDAGraph": _Graph,
        "graph": _capture,
    }
    for name, value in {**of_cuda, **of_random}.items():
        setattr(torch.cuda, name, value)
    for name, value in of_random.items():
        setattr(torch.cuda.random, name, value)
    # which torch.compile imports where there is a GPU
    for name in ("_cuda_CUDAAllocator_AllocatorState", "_set_cached_tensors_enabled"):
        if not hasattr(torch._C, name):
            setattr(torch._C, name, None)
    torch._C._cuda_isCurrentStreamCapturing = device.capturing
    torch._C._cuda_getCurrentRawStream = lambda which: 0
    torch._C._cuda_setStream = lambda **which: None
    torch._C._cuda_isInBadFork = lambda: False
    torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_getDeviceCount = lambda: 1
    torch.version.cuda = "13.0"
    torch._TorchCompileInductorWrapper.__call__ = _skip("the kernels of a compiler")


def _without_triton() -> None:
    """Which has no driver here."""
    from sparse_ce import backends

    backends.BACKENDS = tuple(
        dataclasses.replace(row, unavailable=lambda: "a pretended GPU runs no Triton")
        if row.name == "triton"
        else row
        for row in backends.BACKENDS
    )


def _interpreted_triton() -> None:
    """With TRITON_INTERPRET=1 Triton's backend on the device, and no other. Its interpreter copies
    tensors to the CPU and back, which no launch on a GPU does.
    """
    import subjects
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_unseen(self, *arguments, **options):
        mode, capturing = device.sync_mode(), device.capturing()
        device.set_sync_mode(0)
        device.set_capturing(False)
        try:
            return launch(self, *arguments, **options)
        finally:
            device.set_sync_mode(mode)
            device.set_capturing(capturing)

    GridExecutor.__call__ = launch_unseen
    subjects.SUBJECTS[:] = [subjects.Subject("triton", "cuda")]


_pretend()
if os.environ.get("TRITON_INTERPRET") == "1":
    _interpreted_triton()
else:
    _without_triton()
