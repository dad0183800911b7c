"""Compiles the CUDA kernels for setup.py: finds the compiler and its toolkit, chooses the
architectures, and makes objects that the extension is linked with. As the kernels know nothing of
torch, its CUDAExtension is not needed, which guesses the toolkit from the path of nvcc.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
BINDINGS = "csrc/cuda/bindings.cpp"
# What a build for nobody in particular runs on; the kernels need 8.0.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
FLAGS = [
    *("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"),
    # line numbers, for profilers and sanitizers, cost no speed, and compressed hardly any space
    *("-lineinfo", "-Xfatbin=-compress-all"),
]


class NoCuda(Exception):
    """Why there are no CUDA kernels."""


def add_kernels(extension, torch, mode, build):
    """The kernels become a part of the extension. Returns what was built, raises NoCuda."""
    if mode == "0":
        raise NoCuda("left out by SPARSE_CE_CUDA=0")
    if not sys.platform.startswith("linux"):
        raise NoCuda("the CUDA kernels are built on Linux only")
    if torch.version.cuda is None and mode != "1":
        raise NoCuda(f"torch {torch.__version__} is not a CUDA build")
    nvcc = find_compiler()
    version = re.search(r"release ([\d.]+)", ask(nvcc, "--version"))[1]
    if torch.version.cuda and torch.version.cuda.split(".")[0] != version.split(".")[0]:
        raise NoCuda(f"nvcc is {version}, torch was built by CUDA {torch.version.cuda}")
    known = {code.removeprefix("sm_") for code in ask(nvcc, "--list-gpu-code").split()}
    targets = choose_targets(known, os.environ.get("TORCH_CUDA_ARCH_LIST", ""), gpus(torch))

    extension.extra_objects = compile_kernels(nvcc, version, targets, build)
    extension.sources.append(BINDINGS)
    extension.define_macros.append(("SPARSE_CE_CUDA_ARCHITECTURES", ",".join(targets)))
    # asked, not guessed from the path: nvcc may be a script that calls another one
    plan = ask(nvcc, "--dryrun", "-x", "cu", os.devnull)
    extension.include_dirs += dict.fromkeys(re.findall('"-I([^"]+)"', plan))
    extension.library_dirs += dict.fromkeys(re.findall('"-L([^"]+)"', plan))
    # A runtime of its own: no library is needed that torch may not bring, and as its symbols are
    # hidden they do not meet those of torch's runtime. Both share a device's context and streams.
    extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
    extension.extra_link_args.append("-Wl,--exclude-libs,libcudart_static.a")
    return f"built for {', '.join(targets)} by nvcc {version}"


def find_compiler():
    homes = filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")))
    places = (*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc")
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        raise NoCuda("no CUDA compiler was found: put nvcc on PATH, or set CUDA_HOME")
    return nvcc


def ask(nvcc, *arguments):
    done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{nvcc}: {done.stderr}")
    return done.stdout + done.stderr


def gpus(torch):
    """Capabilities of the GPUs of this machine, (9, 0)."""
    if not torch.cuda.is_available():
        return set()
    return {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}


def choose_targets(known, asked, present):
    """sm_90 is machine code, compute_90 PTX, which newer GPUs compile for themselves.

    known: what nvcc compiles for, "90"; asked: TORCH_CUDA_ARCH_LIST; present: see gpus().
    """
    if asked:
        architectures = re.split("[ ,;]+", asked.strip(" ,;"))
    elif present:
        able = sorted(capability for capability in present if capability >= (8, 0))
        if not able:
            raise NoCuda("the kernels need a GPU of compute capability 8.0 or later")
        architectures = [f"{major}.{minor}" for major, minor in able]
        architectures[-1] += "+PTX"
    else:
        architectures = [a for a in ARCHITECTURES if a.replace(".", "") in known]
        architectures[-1] += "+PTX"
    targets = []
    for architecture in architectures:
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", architecture)
        if match is None or match[1] + match[2] not in known or int(match[1]) < 8:
            raise NoCuda(
                "TORCH_CUDA_ARCH_LIST: expected compute capabilities from 8.0 on that this nvcc "
                f"compiles for, as in 8.0;9.0+PTX, got {architecture}"
            )
        number = match[1] + match[2] + match[3]
        targets += [f"sm_{number}", *([f"compute_{number}"] if match[4] else [])]
    return targets


def compile_kernels(nvcc, version, targets, build):
    """One object per source, in a folder named after all that they are made of."""
    flags = [*FLAGS]
    for target in targets:
        flags += ["-gencode", f"arch={target.replace('sm_', 'compute_')},code={target}"]
    files = sorted(path for path in HERE.iterdir() if path.suffix in (".cu", ".cuh", ".h"))
    made_of = [repr((version, flags)).encode(), *(path.read_bytes() for path in files)]
    folder = build / f"cuda-{hashlib.sha256(b''.join(made_of)).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source):
        done = folder / f"{source.stem}.o"
        if not done.exists():
            partial = folder / f"{source.stem}.{os.getpid()}.o"
            ask(nvcc, *flags, "-c", str(source), "-o", str(partial))
            partial.replace(done)
        return str(done)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        return list(pool.map(compiled, (path for path in files if path.suffix == ".cu")))
