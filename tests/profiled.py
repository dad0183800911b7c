"""What the kernels of a call cost, without a GPU: their PTX runs on the processor, and is counted.

    python tests/profiled.py cuda topk_ce bfloat16 1000 20
    python tests/profiled.py triton threshold_ce float32 32000 --rows 2 --lines 10

Prints for each kernel, per row of normal logits, the instructions of its warps, the sectors of
global memory and the passes over the banks of shared memory that they take, and in brackets how
many would do; with --lines its source lines that take most. Counted is PTX: of machine code there
is less, and its times no count shows. stem: topk_ce, threshold_ce, or tail, with 64 draws.
"""

import argparse
import importlib
import os
import shutil
import subprocess

import torch


def _run(backend: str, stem: str, logits: torch.Tensor, target: torch.Tensor, k: int) -> None:
    from sparse_ce import backends
    from stems import STEMS, Call

    if stem == "tail":
        indices = logits.float().topk(k).indices.sort().values.int()
        forward = backends.implementation(backend, "tail_fwd")
        forward(logits, target, indices, torch.rand(len(target)), 64)
        return
    found, call = next(row for row in STEMS if row.name == stem), Call(logits, target, k)
    outputs = found.forward(call, backend)
    found.backward(call, outputs, found.above(call, "a"), backend)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backend", choices=["cuda", "triton"])
    parser.add_argument("stem", choices=["topk_ce", "threshold_ce", "tail"])
    parser.add_argument("dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("classes", type=int)
    parser.add_argument("k", type=int, nargs="?", help="default: all classes")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--lines", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"EMU_COUNTS": "0", "EMU_RACE": "0"}
    if options.backend == "cuda":
        importlib.import_module("compiled_cuda")
        importlib.import_module("emulated_cuda").register()
    else:
        importlib.import_module("emulated_triton")

    torch.manual_seed(0)
    logits = torch.randn(options.rows, options.classes).to(getattr(torch, options.dtype))
    target = torch.randint(options.classes, (options.rows,))
    k = options.k or options.classes
    _run(options.backend, options.stem, logits, target, k)
    table = "\n".join(
        importlib.import_module("ptx.plugin").COUNTS.table(options.lines, options.rows)
    )
    if shutil.which("c++filt"):
        command = ["c++filt", "--no-params"]
        table = subprocess.run(command, input=table, capture_output=True, text=True).stdout
    print(table)


if __name__ == "__main__":
    main()
