"""The CUDA kernels compiled by nvcc for GPUs that need not be there, and their code.

``python tests/cuda_aot.py`` compiles all and writes registers, shared memory and instruction counts
into tests/cuda_resources.json, under the version of nvcc that runs it.
``python tests/cuda_aot.py topk_ce_bf16 90`` prints the machine code of one file for sm_90.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import sass

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "cuda"
RESOURCES = Path(__file__).with_name("cuda_resources.json")
STEMS = (
    *("topk_ce", "threshold_ce", "tail", "labels_ce", "sparse_linear", "cosine", "plif"),
    "reduce",
)
DTYPES = {stem: ("bf16", "f16", "f32", "f64") for stem in STEMS}
DTYPES["reduce"] = ("f32", "f64")  # it meets losses alone
FILES = [f"{stem}_{dtype}" for stem in STEMS for dtype in DTYPES[stem]]
# Warnings of the host's compiler and of nvcc are errors, so are those of ptxas: of a stack frame or
# of spills, say.
FLAGS = [
    *("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"),
    *("-Xptxas", "--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error"),
    f"-I{KERNELS}",
]


def missing() -> str | None:
    """Why nothing can be compiled here and looked at, or None."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc"
    for name in ("cuobjdump", "nvdisasm"):
        if sass.tool(name) is None:
            return f"there is no {name}: CUDA brings it along, and so does the package triton"
    return None


@cache
def version() -> str:
    """Of nvcc, major and minor."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def compile_file(name: str, architecture: int) -> dict[str, sass.Report]:
    """Of each kernel of csrc/cuda/<name>.cu."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{name}.cubin"
        command = ["nvcc", *FLAGS, f"-arch=sm_{architecture}", "-cubin", "-o", cubin]
        result = subprocess.run(
            [*command, KERNELS / f"{name}.cu"], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return {_short(kernel): report for kernel, report in sass.read(cubin).items()}


def _short(mangled: str) -> str:
    """_Z...forward_long_kernelINS0_8bfloat16ELi128ELi8E... -> forward_long 128 8 ..."""
    name = re.search(r"\d([a-z_]+)_kernelI", mangled)[1]
    return " ".join([name, *re.findall(r"L(?:[ib]|NS0_5DtypeE)(\d+)E", mangled)])


def resources(kernel: str, report: sass.Report) -> dict[str, float]:
    row = {"registers": report.registers, "shared": report.shared}
    if kernel.startswith("forward_held") and kernel.endswith(" 0"):
        return row | {"per_row": held_instructions(kernel, report)}
    accesses = streamed(kernel)
    if accesses is None:
        return row
    loop = report.tightest(*accesses)
    return row | {"per_chunk": round(loop.instructions / loop.count(accesses[0]), 2)}


# Of normal logits, k = 20, 50 and 100: the steps of the bisection and the bits that the fullest
# lanes of a warp write, by the lanes of a row. Simulated.
HELD_TRIPS = {
    32: {4: (7, 13), 8: (6, 12), 16: (5, 8), 32: (5, 6)},
    64: {8: (7, 19), 16: (6, 13), 32: (6, 9)},
    128: {8: (7, 30), 16: (6, 19), 32: (5, 13)},
}


def held_instructions(kernel: str, report: sass.Report) -> int:
    """Warp-instructions of a row, an estimate: what is jumped over counts as well."""
    lanes, _, top, _ = map(int, kernel.split()[1:])
    steps, bits = HELD_TRIPS[top][lanes]
    loops = [x for x in report.loops if x.count("SHFL") or x.count("REDUX")]
    loops = [x for x in loops if not x.count("FLO")]
    bisection = min(x.instructions for x in loops)
    # that of a list, which is sorted once; the merging in it counts as well
    listed = max(x.instructions for x in loops)
    writing = max(x.instructions for x in report.loops if x.count("FLO"))
    issued = report.straight + listed + steps * bisection + bits * writing
    return round(issued * lanes / 32)


def streamed(kernel: str) -> tuple[str, ...] | None:
    """The instructions by which the kernel moves whole rows."""
    load, store = "LDG.E.128", "STG.E.128"
    if kernel.startswith("cosine"):
        return (load,) if kernel.endswith(" 16") else None
    if kernel.startswith(("gather", "piece", "segment")):
        # those for rows of whole chunks
        return None if kernel.split()[1] == "1" else (load,)
    return {
        "forward_long": (load,),
        "backward": (store,),
        "threshold_forward": (load,),
        "threshold_backward": (load, store),
        "tail_forward": (load,),
        "labels_forward": (load,),
        "labels_backward": (load, store),
        "plif_ce_forward": (load,),
        "plif_ce_backward": (load, store),
        "reduce_forward": ("LDG.E.64",),  # targets
    }.get(kernel.split()[0])


def at_once(kernel: str) -> dict[str, int]:
    """The instructions by which a thread moves all that it has, where that takes no loop."""
    if kernel.startswith("forward_held"):
        return {"LDG.E.128": int(kernel.split()[2])}
    if kernel.startswith("backward_together"):
        return {"STS.128": 1, "LDS.128": 1, "STG.E.128": 1}
    return {
        "plif_forward": {"LDG.E.128": 1, "STG.E.128": 1},
        "plif_backward": {"LDG.E.128": 2, "STG.E.128": 1},
        # the targets of four rows
        "reduce_backward": {"LDG.E.64": 4, "STG.E": 4},
    }.get(kernel, {})


def record() -> None:
    jobs = [(file, arch) for file in FILES for arch in sass.ARCHITECTURES]
    with ThreadPoolExecutor(2) as threads:
        reports = threads.map(lambda job: compile_file(*job), jobs)
    rows = {
        f"{file} sm_{arch} {kernel}": resources(kernel, report)
        for (file, arch), kernels in zip(jobs, reports, strict=True)
        for kernel, report in sorted(kernels.items())
    }
    table = json.loads(RESOURCES.read_text()) if RESOURCES.exists() else {}
    table[version()] = rows
    versions = []
    for name, kernels in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(row)}" for k, row in kernels.items())
        versions.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    RESOURCES.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", nargs="?", choices=FILES)
    parser.add_argument("architecture", nargs="?", type=int, default=90)
    arguments = parser.parse_args()
    if arguments.file is None:
        record()
        return
    for kernel, report in compile_file(arguments.file, arguments.architecture).items():
        print(report.sass)
        print(f"{kernel}: {resources(kernel, report)}, {report.spills()} spills")


if __name__ == "__main__":
    main()
