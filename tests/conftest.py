"""How the suite runs.

``pytest tests``
    every backend that can run here, on the CPU and, where there is one, on the GPU.
``TRITON_INTERPRET=1 SPARSE_CE_REQUIRE=triton pytest tests -m interpreter``
    the Triton kernels on CPU tensors, in Triton's interpreter: fewer and smaller cases, since one
    operation of a kernel takes 0.1 to 3 ms there.
``SPARSE_CE_EMULATE=1 SPARSE_CE_REQUIRE=cuda pytest tests -m interpreter``
    the CUDA kernels on CPU tensors, emulated: the same tests, all cases.

``SPARSE_CE_REQUIRE=cpu,eager`` names backends that this machine has to run: if one of them cannot,
the suite fails instead of leaving its tests out.

A test that takes ``subject`` runs once per backend and device; with ``stem`` once per operator that
the backend implements itself, with ``dtype`` once per dtype of the backend, with ``size`` once per
(V, k) of cases.SIZES.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import cases
import pytest
import stems
import subjects
import torch

if subjects.INTERPRETING and importlib.util.find_spec("fast_interpreter") is not None:
    importlib.import_module("fast_interpreter").install()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "interpreter: also runs in Triton's interpreter and on emulated CUDA"
    )
    config.addinivalue_line("markers", "float64: only for backends that compute in float64")
    config.addinivalue_line("markers", "xdist_group: with --dist loadgroup on one worker")
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support is in beta state")
    if subjects.INTERPRETING:
        # what is silent on a GPU, inf - inf or nan > 0, is a warning of numpy
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:(numpy|triton)")
        # the interpreter of Triton 3.6
        config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim")
    missing = subjects.missing()
    if missing:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise pytest.UsageError(f"SPARSE_CE_REQUIRE: expected to run here, cannot: {reasons}")


def pytest_report_header() -> str:
    return f"sparse_ce subjects: {', '.join(map(str, subjects.SUBJECTS)) or 'none'}"


def _name(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "x".join(map(str, value)) if type(value) is tuple else str(value)


def _in_turn(
    table: list[dict[str, Any]], subject: Any, stem: Any, dtype: torch.dtype, size: Any
) -> bool:
    """Slow runs: a cut costs thirty looks at the row, one dtype each; in the interpreter a list
    float32 and one of 16 bits, whose kernels differ in a conversion.
    """
    dtypes, place = list(dict.fromkeys(row["dtype"] for row in table)), cases.SIZES.index(size)
    if not stem.lists:
        return dtypes[place % len(dtypes)] == dtype
    halves = [d for d in dtypes if d.itemsize == 2]
    return not subjects.INTERPRETING or dtype not in halves or halves[place % 2] == dtype


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" not in metafunc.fixturenames:
        return
    needs_float64 = metafunc.definition.get_closest_marker("float64") is not None
    table: list[dict[str, Any]] = [
        {"subject": subject}
        for subject in subjects.SUBJECTS
        if torch.float64 in subject.dtypes or not needs_float64
    ]
    if "stem" in metafunc.fixturenames:
        table = [
            row | {"stem": stem}
            for row in table
            for stem in stems.STEMS
            if row["subject"].defines(stem.name)
        ]
    if "dtype" in metafunc.fixturenames:
        table = [row | {"dtype": dtype} for row in table for dtype in row["subject"].dtypes]
    if "size" in metafunc.fixturenames:
        table = [
            row | {"size": size}
            for row in table
            for size in cases.SIZES
            if row["subject"].lists(size[1]) or not row["stem"].lists
        ]
        if subjects.INTERPRETING or subjects.EMULATING:
            table = [row for row in table if _in_turn(table, **row)]
    names = [name for name in ("subject", "stem", "dtype", "size") if name in metafunc.fixturenames]
    ids = ["-".join(_name(row[name]) for name in names) for row in table]
    metafunc.parametrize(
        ",".join(names),
        [row[names[0]] if len(names) == 1 else tuple(row.values()) for row in table],
        ids=ids,
    )


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written to is NaN, or the largest integer, in Python and in C++.

    By torch's own switch, torch.utils.deterministic.fill_uninitialized_memory, which acts in
    deterministic mode.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
