"""A plugin for pytest: csrc/cuda as nvcc compiles it, PTX that the package ptx runs.

    make ptx
    export PYTHONPATH=tests SPARSE_CE_EMULATE=1
    EMU_ARCH=80 python -m pytest -p compiled_cuda tests/test_kernels.py -m interpreter

SPARSE_CE_EMULATE alone compiles the kernels for the processor. This takes nvcc's code for the host,
whose launches tests/cuda/runtime.cpp hands over, and its code for a GPU, with all that the twins of
platform.cuh stand for: inline PTX, intrinsics, and what the optimiser made of a kernel. Findings,
and options of the environment, are those of Triton's kernels: emulated_triton.py.
"""

import ctypes
import importlib.util
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import emulated_cuda
import emulation
import ptx
import torch
from ptx import parse, plugin
from ptx.machine import translated
from ptx.plugin import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401

_SPEC = importlib.util.spec_from_file_location("nvcc", emulation.KERNELS / "nvcc.py")
nvcc = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(nvcc)

_SOURCES = sorted(emulation.KERNELS.glob("*.cu"))
_HOST = emulation.HEADERS / "emulated.cpp", emulation.HEADERS / "runtime.cpp"
_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, *(ctypes.c_uint,) * 4, ctypes.POINTER(ctypes.c_void_p)
)


def _compile(compiler: str, flags: list[str], source: Path, folder: Path) -> None:
    """An object for the host, and the PTX beside it."""
    with tempfile.TemporaryDirectory(dir=folder) as kept:
        keep = ["--keep", "--keep-dir", kept]
        more = keep if source.suffix == ".cu" else ["-Xcompiler=-fvisibility=default"]
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *flags, *more, "-c", source, "-o", target], check=True)
        for text in Path(kept).glob("*.ptx"):
            text.rename(folder / f"{source.stem}.ptx")


def _build() -> Path:
    """The folder of all PTX, and of the library of the host's code."""
    number = plugin.ARCHITECTURE
    flags = [*nvcc.FLAGS, "-gencode", f"arch=compute_{number},code=compute_{number}"]
    flags += [f"-I{emulation.KERNELS}", f"-I{emulation.HEADERS}"]
    sources = *_SOURCES, *_HOST
    folder = emulation.FOLDER / f"compiled-{emulation.hashed(flags, sources)}"
    with emulation.locked():
        if folder.exists():
            return folder
        compiler = nvcc.find_compiler()
        unfinished = folder.with_suffix(".tmp")
        unfinished.mkdir(exist_ok=True)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda source: _compile(compiler, flags, source, unfinished), sources))
        objects = sorted(unfinished.glob("*.o"))
        library = unfinished / "kernels.so"
        subprocess.run([compiler, "-shared", "--cudart=none", *objects, "-o", library], check=True)
        unfinished.rename(folder)
    return folder


_FOLDER = _build()


@cache
def _kernels() -> dict[str, str]:
    """The PTX of each, by its mangled name."""
    found: dict[str, str] = {}
    for path in sorted(_FOLDER.glob("*.ptx")):
        found |= parse.kernels(path.read_text())
    return found


# the memory whose address was asked for, since the last operator
_given: list[ptx.Extent] = []
_outputs: list[torch.Tensor] = []
_errors: list[BaseException] = []


def _launch(name: bytes, x: int, y: int, z: int, threads: int, parameters: Any) -> int:
    try:
        text = _kernels()[name.decode()]
        sizes = translated(text, threads).parameters.values()
        bits = [ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes)]
        plugin.run(text, (x, y, z), bits, _given, threads=threads)
    except BaseException as error:
        _errors.append(error)
        return 1
    return 0


_launcher = _LAUNCHER(_launch)


def _run(arguments: ctypes.Structure) -> None:
    for output in _outputs:
        plugin.note_unwritten(output, (output.view(-1).view(torch.uint8) == 0xFF).numpy())
    _outputs.clear()
    try:
        _plain_run(arguments)
    finally:
        _given.clear()
        if _errors:
            raise _errors.pop()


def _new(self: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    found = _plain_new(self, shape, dtype)
    _given.pop()  # the memory around it
    _outputs.append(found)
    return found


def _check(self: Any) -> None:
    _plain_check(self)
    _given.clear()


def _data_ptr(self: torch.Tensor) -> int:
    begin = _plain_data_ptr(self)
    if self.numel() > 0:
        shape = "x".join(map(str, self.shape))
        _given.append(plugin.extent_of(self, begin, f"{str(self.dtype)[6:]} {shape}"))
    return begin


def _register() -> None:
    library = emulated_cuda.opened(_FOLDER / "kernels.so")
    library.launch_by(_launcher)
    emulated_cuda._library = lambda: library
    emulated_cuda.run = _run
    emulated_cuda._Outputs.new, emulated_cuda._Outputs.check = _new, _check
    torch.Tensor.data_ptr = _data_ptr


_plain_run, _plain_data_ptr = emulated_cuda.run, torch.Tensor.data_ptr
_plain_new, _plain_check = emulated_cuda._Outputs.new, emulated_cuda._Outputs.check
_register()
