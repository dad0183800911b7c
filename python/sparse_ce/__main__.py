"""``python -m sparse_ce``: what is available on this machine, what is not, and why."""

import importlib.metadata
import os
import platform

import torch

from . import __version__, backends, schema


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_isa() -> str:
    if schema.NATIVE_ERROR is not None:
        return "unknown without the compiled library"
    forced = " (SPARSE_CE_CPU_ISA)" if os.environ.get("SPARSE_CE_CPU_ISA") else ""
    try:
        return str(torch.ops.sparse_ce_native.cpu_isa()) + forced
    except RuntimeError as error:
        return str(error).partition("\n")[0]


def _library(note: dict[str, str]) -> str:
    if note["cpu"] == "built" and schema.NATIVE_ERROR is not None:
        return "built, but it does not load: install sparse_ce again"
    return note["cpu"]


def _built_against(note: dict[str, str]) -> str:
    if note["cpu"] != "built" or "torch" not in note:
        return "no torch"
    another = note["torch"] != torch.__version__
    return f"torch {note['torch']}" + another * ", another than this one: install sparse_ce again"


def report() -> str:
    note = schema.build_note()
    lines = [
        ("sparse_ce", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("C++ kernels", _library(note)),
        ("CUDA kernels", note["cuda"]),
        ("built against", _built_against(note)),
        ("instruction set", _cpu_isa()),
        ("threads", str(torch.get_num_threads())),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            lines.append((f"cuda:{i}", f"{properties.name}, {memory}"))
    else:
        lines.append(("GPU", "none that torch sees"))
    text = [f"{name:16} {value}" for name, value in lines]
    text += ["", "backends, in the order in which backend='auto' tries them:"]
    for row in backends.BACKENDS:
        reason = backends.unavailable(row.name)
        state = "available" if reason is None else f"not available: {reason}"
        devices = "any device" if row.devices is None else " and ".join(row.devices)
        text.append(f"  {row.name:8} {state}")
        text.append(f"  {'':8} {row.why_here}; {devices}; {_names(row.dtypes)}")
    return "\n".join(text)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


if __name__ == "__main__":
    print(report())
