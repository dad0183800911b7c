"""Compiles CUDA kernels for the processor, by tests/cuda/emulation.h, into build-emulation/.

A library carries a hash of all that it is made of in its name: it is compiled once, whoever asks.
``python tests/emulation.py`` fails where there is no C++ compiler.
"""

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "cuda"
HEADERS = ROOT / "tests" / "cuda"
FOLDER = ROOT / "build-emulation"
FLAGS = [
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DSPARSE_CE_EMULATION", f"-I{HEADERS}", f"-I{KERNELS}"),
]


def compiler() -> str | None:
    """The C++ compiler, or None. By its name: g++ or clang++, which know inline assembly."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)


@cache
def _sanitizer() -> tuple[str, ...]:
    """What a GPU does not forgive, an access of 16 bytes in the wrong place, ends the process."""
    flags = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")
    command = [*shlex.split(compiler() or "c++"), *flags, *("-shared", "-fPIC", "-x", "c++")]
    source = "int sum(int a, int b) { return a + b; }"
    links = subprocess.run(
        [*command, "-", "-o", os.devnull], input=source, text=True, capture_output=True, check=False
    )
    return flags if links.returncode == 0 else ()


def hashed(command: Iterable[str], sources: Iterable[Path]) -> str:
    """Of all that a library is made of, the headers too."""
    digest = hashlib.sha256(" ".join(command).encode())
    folders = (KERNELS.parent, KERNELS, HEADERS)
    headers = [path for folder in folders for path in folder.glob("*.*h")]
    for path in sorted({*headers, *sources}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(*sources: Path, flags: tuple[str, ...] = ()) -> Path:
    """The shared library of these sources, each a file of C++ or CUDA."""
    command = [*shlex.split(compiler() or "c++"), *FLAGS, *_sanitizer(), *flags]
    library = FOLDER / f"{sources[0].stem}-{hashed(command, sources)}.so"
    with locked():
        if not library.exists():
            _compile(command, sources, library)
    return library


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """The folder of what is compiled, to which the workers of one run come at the same time."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_kernels() -> Path:
    """The shared library of all kernels."""
    return build(HEADERS / "emulated.cpp", *sorted(KERNELS.glob("*.cu")))


def _compile(command: list[str], sources: tuple[Path, ...], library: Path) -> None:
    def run(*arguments: object) -> None:
        subprocess.run([*command, *map(str, arguments)], check=True)

    objects = [library.with_name(f"{library.stem}-{path.stem}.o") for path in sources]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        jobs = [
            threads.submit(run, "-c", "-x", "c++", path, "-o", target)
            for path, target in zip(sources, objects, strict=True)
        ]
        for job in jobs:
            job.result()
    unfinished = library.with_suffix(".tmp")
    run("-shared", *objects, "-o", unfinished)
    for path in objects:
        path.unlink()
    unfinished.rename(library)


if __name__ == "__main__":
    sys.exit(compiler() is None)
