"""The registry: one tuple of rows. Order is priority, and the reasons for it and against a row are
data.

To add a backend: one row here and a module that defines functions named as in schema.py. Tests and
bench enumerate the rows. An operator that a backend's modules do not define runs as the tensor
operations of eager.py on the same device.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from . import schema

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
ALL_DTYPES = (*HALF_AND_SINGLE, torch.float64)

# Beyond it the list regime (indices and probabilities) would save more than the logits weigh at
# common V, and the threshold regime (a cut per row) takes over. Every backend lists k up to here.
MAX_LIST_K = 1024


@dataclass(frozen=True)
class Backend:
    name: str
    modules: tuple[str, ...]  # imported on first use; each has whole stems
    devices: tuple[str, ...] | None  # device types it runs on; None: any
    dtypes: tuple[torch.dtype, ...]
    large_k: bool  # its list regime goes beyond MAX_LIST_K
    why_here: str  # why it stands at this place of the order
    unavailable: Callable[[], str | None]  # the reason why this machine cannot run it, or None


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter, on CPU tensors: for tests, never for
    speed.
    """
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def _triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not (torch.cuda.is_available() or interpreting()):
        return "torch sees no GPU"
    try:
        importlib.import_module("sparse_ce.triton_kernels.topk_ce")
    except (ImportError, AttributeError) as error:
        return f"its kernels do not import: {error}"
    return None


def _cpu_unavailable() -> str | None:
    if schema.NATIVE_ERROR is not None:
        built = schema.build_note()["cpu"]
        return (
            f"the compiled library sparse_ce._C does not import: {schema.NATIVE_ERROR}; "
            f"on install, C++ kernels: {built}"
        )
    return None


def _cuda_unavailable() -> str | None:
    if schema.NATIVE_ERROR is not None:
        return _cpu_unavailable()
    # the library is asked, not what was written down when it was built
    if not torch._C._dispatch_has_kernel_for_dispatch_key("sparse_ce_native::topk_ce_fwd", "CUDA"):
        return f"the compiled library has no CUDA kernels: {schema.build_note()['cuda']}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    built = str(torch.ops.sparse_ce_native.cuda_architectures())
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if not any(_runs_on(architecture, capability) for architecture in built.split(",")):
            return (
                f"its kernels are built for {built}, cuda:{i} has compute capability "
                f"{capability[0]}.{capability[1]}: install sparse_ce again on this machine"
            )
    return None


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """sm_90 is machine code, which later minor versions run too; compute_90 is PTX, which all later
    GPUs compile for themselves. The letter of sm_90a ties either to its own version.
    """
    kind, _, number = architecture.partition("_")
    major, minor = int(number.rstrip("a")[:-1]), int(number.rstrip("a")[-1])
    if number.endswith("a"):
        return capability == (major, minor)
    if kind == "sm":
        return capability[0] == major and capability[1] >= minor
    return capability >= (major, minor)


BACKENDS = (
    Backend(
        "cuda",
        ("sparse_ce.native",),
        devices=("cuda",),
        dtypes=ALL_DTYPES,
        large_k=True,
        why_here="fused kernels in CUDA C++: on an H200 top-k is fastest; float64, any k",
        unavailable=_cuda_unavailable,
    ),
    Backend(
        "triton",
        (
            "sparse_ce.triton_kernels.topk_ce",
            "sparse_ce.triton_kernels.threshold_ce",
            "sparse_ce.triton_kernels.tail",
            "sparse_ce.triton_kernels.labels_ce",
            "sparse_ce.triton_kernels.plif",
            "sparse_ce.triton_kernels.plif_tables",
            "sparse_ce.triton_kernels.sparse_linear",
            "sparse_ce.triton_kernels.reduce",
            "sparse_ce.triton_kernels.cosine",
        ),
        devices=("cuda", "cpu") if interpreting() else ("cuda",),
        dtypes=HALF_AND_SINGLE,
        large_k=False,
        why_here="fused kernels for every GPU that Triton compiles for, nothing built on install",
        unavailable=_triton_unavailable,
    ),
    Backend(
        "cpu",
        ("sparse_ce.native",),
        devices=("cpu",),
        dtypes=ALL_DTYPES,
        large_k=True,
        why_here="vectorised C++ for the processor",
        unavailable=_cpu_unavailable,
    ),
    Backend(
        "eager",
        ("sparse_ce.eager",),
        devices=None,
        dtypes=ALL_DTYPES,
        large_k=True,
        why_here="tensor operations: right everywhere, fast nowhere",
        unavailable=lambda: None,
    ),
)
NAMES = tuple(row.name for row in BACKENDS)


@cache
def unavailable(name: str) -> str | None:
    """Why this machine cannot run the backend, or None. Found out once per process."""
    return next(row for row in BACKENDS if row.name == name).unavailable()


def _refusal(row: Backend, device_type: str, dtype: torch.dtype, large_k: bool) -> str | None:
    if row.devices is not None and device_type not in row.devices:
        return f"it runs on {' or '.join(row.devices)} tensors, got {device_type}"
    if dtype not in row.dtypes:
        return f"it has no kernels for {dtype}"
    if large_k and not row.large_k:
        return f"it lists at most {MAX_LIST_K} classes of a row: k, or k + 1 + tail_samples"
    return unavailable(row.name)


@cache
def _warn_of_eager() -> None:
    """Once: who measures would take it for what the library is."""
    warnings.warn(
        "sparse_ce: without the C++ kernels backend='auto' takes tensor operations, several times "
        f"slower; {unavailable('cpu')}. Install sparse_ce again "
        "(`python -m sparse_ce` shows what it finds), or ask for backend='eager'",
        stacklevel=4,
    )


def resolve(name: str, device_type: str, dtype: torch.dtype, large_k: bool) -> str:
    """The backend that runs: for "auto" the first that can, a named one or an error, never another
    in its place.
    """
    if name == "auto":
        automatic = [row for row in BACKENDS if not (row.name == "triton" and device_type == "cpu")]
        found = next(
            row.name for row in automatic if _refusal(row, device_type, dtype, large_k) is None
        )
        if found == "eager" and device_type == "cpu":
            _warn_of_eager()
        return found
    row = next(row for row in BACKENDS if row.name == name)
    reason = _refusal(row, device_type, dtype, large_k)
    if reason is not None:
        raise RuntimeError(f"backend: {name!r} cannot run here: {reason}")
    return name


# What torch.compiler.assume_constant_result does; that imports the compiler, a second and more.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def implementation(backend: str, op: str) -> Callable[..., object]:
    """The function that runs operator `op` on `backend`."""
    row = next(row for row in BACKENDS if row.name == backend)
    for name in (*row.modules, "sparse_ce.eager"):
        module: ModuleType = importlib.import_module(name)
        if hasattr(module, op) and (name != "sparse_ce.native" or _compiled(op, row.devices)):
            break
    function: Callable[..., object] = getattr(module, op)
    return function


@cache
def loss(backend: str, op: str) -> Callable[..., object] | None:
    """The function of schema.LOSSES that runs forward `op` on `backend` and reduces its losses, or
    None.
    """
    row = next(row for row in BACKENDS if row.name == backend)
    name = f"{op.removesuffix('_fwd')}_loss"
    if "sparse_ce.native" not in row.modules or name not in schema.LOSSES:
        return None
    function: Callable[..., object] = getattr(importlib.import_module("sparse_ce.native"), name)
    return function


def _compiled(op: str, devices: tuple[str, ...] | None) -> bool:
    """The library has the operator for the devices: one module stands for the CPU and for CUDA."""
    return all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_ce_native::{op}", device.upper())
        or torch._C._dispatch_has_kernel_for_dispatch_key(
            f"sparse_ce_native::{op}", "CompositeExplicitAutograd"
        )
        for device in devices or ()
    )
