"""Builds the compiled library, sparse_ce._C, where there is a C++ compiler and torch, with CUDA
kernels in it where there is a CUDA compiler and a CUDA build of torch; installs without where there
is not.

SPARSE_CE_CPU=auto|0|1   0 leaves the library out, 1 makes its failure an error
SPARSE_CE_CUDA=auto|0|1  0 leaves the CUDA kernels out, 1 makes their failure an error, and builds
                         them against a CPU build of torch too, to prove that they compile and link
TORCH_CUDA_ARCH_LIST     8.0;9.0+PTX: for these, else for the GPUs of this machine, else for all
MAX_JOBS                 how many compilers run at a time

What was built, against which torch, or why not, goes into sparse_ce/_build.json, which `python -m
sparse_ce` prints.
"""

import copy
import json
import os
import re
import shutil
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc  # noqa: E402

SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
# errno and floating-point traps are nobody's concern here, and in the way of vectorising a loop
# over exponentials
UNIX_FLAGS = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
MODE = os.environ.get("SPARSE_CE_CPU", "auto")
CUDA_MODE = os.environ.get("SPARSE_CE_CUDA", "auto")


def import_torch():
    """torch of the environment that is installed into, which a build environment of pip's own does
    not show.
    """
    try:
        import torch
    except ImportError:
        folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        folders.append(site.getusersitepackages())
        # of a virtual environment that sees those of the Python that it was made from
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        config = Path(sys.prefix, "pyvenv.cfg")
        if config.exists() and re.search(
            r"^include-system-site-packages\s*=\s*true", config.read_text(), re.M | re.I
        ):
            folders += [sysconfig.get_path(kind, vars=base) for kind in ("purelib", "platlib")]
        for folder in dict.fromkeys(folders):
            site.addsitedir(folder)
        try:
            import torch
        except ImportError:
            return None
    return torch


def extension_and_command():
    """The extension, the command that builds it, and the reason why there is none."""
    if MODE == "0":
        return None, build_ext, "left out by SPARSE_CE_CPU=0"
    torch = import_torch()
    if torch is None:
        return (
            None,
            build_ext,
            "the build found no torch: install torch, then sparse_ce again; where it is installed, "
            "with --no-build-isolation",
        )
    compiler = os.environ.get("CXX") or next(
        filter(shutil.which, ("c++", "g++", "clang++", "cl")), None
    )
    if compiler is None:
        return None, build_ext, "no C++ compiler was found: install one, or set CXX"
    from torch.utils import cpp_extension

    flags = ["/O2", "/openmp"] if os.name == "nt" else [*UNIX_FLAGS]
    # compiled for OpenMP but not linked with it: the symbols then come from the runtime that torch
    # itself uses, so that there is one thread pool and torch.set_num_threads holds
    if sys.platform.startswith("linux"):
        flags.append("-fopenmp")
    elif sys.platform == "darwin" and any(
        Path(folder, "omp.h").exists() for folder in cpp_extension.include_paths()
    ):
        # Apple's compiler takes it this way alone, and has no header of its own; torch brings one
        flags += ["-Xclang", "-fopenmp"]
    extension = cpp_extension.CppExtension(
        "sparse_ce._C",
        sorted(SOURCES - {nvcc.BINDINGS}),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": flags},
    )
    return extension, cpp_extension.BuildExtension, None


EXTENSION, BASE_COMMAND, REASON = extension_and_command()


def reason(error):
    if isinstance(error, nvcc.NoCuda):
        return str(error)
    return f"the build failed: {' '.join(str(error).split())[:500]}"


class BuildExtension(BASE_COMMAND):
    """Builds what can be built and writes down what was."""

    def run(self):
        for name, mode in (("SPARSE_CE_CPU", MODE), ("SPARSE_CE_CUDA", CUDA_MODE)):
            if mode == "1" and EXTENSION is None:
                raise SystemExit(f"{name}=1: {REASON}")
        fresh = {"inplace": self.inplace, "compiler": self.compiler}
        folder = (
            ROOT / "python" / "sparse_ce"
            if fresh["inplace"]
            else Path(self.build_lib) / "sparse_ce"
        )
        note = {"cpu": REASON, "cuda": REASON}
        if EXTENSION is not None:
            note["torch"] = import_torch().__version__
            if self.torch_of(folder) != note["torch"]:
                # what is compiled against another torch looks up to date all the same
                shutil.rmtree(self.build_temp, ignore_errors=True)
                self.remove_library(folder)
            plain = copy.deepcopy(vars(EXTENSION))
            try:
                note["cuda"] = nvcc.add_kernels(
                    EXTENSION, import_torch(), CUDA_MODE, ROOT / "build"
                )
                super().run()
                note["cpu"] = "built"
            except Exception as error:
                if CUDA_MODE == "1":
                    raise
                note["cuda"] = reason(error)
                vars(EXTENSION).update(plain)
                vars(self).update(fresh)
                note["cpu"] = self.without_cuda()
        if note["cpu"] != "built":
            # that of an earlier run would be installed in its place
            self.remove_library(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(note) + "\n")
        for kind in ("cpu", "cuda"):
            print(f"sparse_ce: {kind} kernels: {note[kind]}", file=sys.stderr)

    @staticmethod
    def torch_of(folder):
        """What the library that lies there was built against, None where that is not known."""
        note = folder / "_build.json"
        return json.loads(note.read_text()).get("torch") if note.exists() else None

    @staticmethod
    def remove_library(folder):
        for library in folder.glob("_C.*"):
            library.unlink()

    def without_cuda(self):
        try:
            super().run()
        except Exception as error:
            if MODE == "1":
                raise
            return reason(error)
        return "built"


setup(
    packages=["sparse_ce", "sparse_ce.triton_kernels"],
    package_dir={"sparse_ce": "python/sparse_ce", "sparse_ce.triton_kernels": "triton_kernels"},
    # an extension of no sources keeps the command running, and the note written, where nothing is
    # compiled
    ext_modules=[EXTENSION or Extension("sparse_ce._C", [], optional=True)],
    cmdclass={"build_ext": BuildExtension},
)
