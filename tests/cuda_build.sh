#!/usr/bin/env bash
# Compiles the CUDA kernels for one architecture and links them with the glue into a package of its own, against the torch
# of $1: a python that has torch and pytest. A GPU is not needed, nor a CUDA build of torch.
set -euo pipefail
python=$(realpath -s "$(command -v "$1")")
cd "$(dirname "$0")/.."
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
SPARSE_CE_CPU=1 SPARSE_CE_CUDA=1 "$python" setup.py -q build --build-base build-cuda
export PYTHONPATH
PYTHONPATH=$(realpath build-cuda/lib.*)
"$python" - <<'PROBE'
import subprocess
import torch, sparse_ce, sparse_ce._C as library
from sparse_ce import backends, schema

assert "/build-cuda/lib" in library.__file__, library.__file__
def has(operator, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_ce_native::{operator}", key)

for operator in schema.SIGNATURES:
    assert has(operator, "CPU"), operator
    assert has(operator, "CUDA"), operator
print("built for", torch.ops.sparse_ce_native.cuda_architectures())
if not torch.cuda.is_available():
    assert backends.unavailable("cuda") == "torch sees no GPU", backends.unavailable("cuda")
symbols = subprocess.run(["nm", "-D", library.__file__], capture_output=True, text=True, check=True).stdout
assert " cuda" not in symbols, "the CUDA runtime is neither exported nor looked for elsewhere"
PROBE
export SPARSE_CE_REQUIRE=cpu,eager
"$python" -m pytest -q tests/test_backends.py
"$python" -m pytest -q tests/test_kernels.py -k "cpu-cpu and (test_layouts or test_options)"
echo "cuda: compiled, linked, and the CPU kernels still work"
