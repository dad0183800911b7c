"""The registry: what runs where, why not, and that a named backend never gives way to another."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import subjects
import torch
from sparse_ce import backends, eager, fused_sparse_ce, schema, sparse_softmax
from stems import STEMS

ROOT = Path(__file__).parent.parent
LOGITS = torch.randn(3, 2003)
TARGET = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("name", backends.NAMES)
def test_runs_on_this_machine(name):
    """A skip shows which backend this run leaves out, and why; SPARSE_CE_REQUIRE forbids it."""
    reason = backends.unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    assert subjects.INTERPRETING or name in {subject.backend for subject in subjects.SUBJECTS}


@pytest.mark.interpreter
def test_a_backend_defines_whole_operators(subject):
    """Forward and backward of a stem, or neither, with the arguments of the signature."""
    for stem in STEMS:
        own = [backends.implementation(subject.backend, f"{stem.name}_{d}") for d in ("fwd", "bwd")]
        fallback = [getattr(eager, f"{stem.name}_{d}") for d in ("fwd", "bwd")]
        defined = subject.defines(stem.name)
        assert [f is g for f, g in zip(own, fallback, strict=True)] == [
            not defined or subject.backend == "eager"
        ] * 2
        for direction, function in zip(("fwd", "bwd"), own, strict=True):
            arguments, _ = schema.SIGNATURES[f"{stem.name}_{direction}"]
            names = [argument.split()[-1] for argument in arguments.split(", ")]
            if inspect.isfunction(function):
                assert list(inspect.signature(function).parameters) == names


# device, dtype, large_k of a call -> why the row refuses it, for those rows that do
REFUSALS = [
    (
        "meta",
        torch.float32,
        False,
        lambda row: row.devices is not None,
        "it runs on .* tensors, got meta",
    ),
    (None, torch.int8, False, lambda row: True, "it has no kernels for torch.int8"),
    (
        None,
        torch.float32,
        True,
        lambda row: not row.large_k,
        "it lists at most 1024 classes of a row: k, or k [+] 1 [+] tail_samples",
    ),
]


@pytest.mark.parametrize("row", backends.BACKENDS, ids=lambda row: row.name)
@pytest.mark.parametrize("refusal", REFUSALS, ids=["device", "dtype", "large k"])
def test_a_named_backend_raises_what_it_cannot_do(row, refusal):
    device, dtype, large_k, refuses, reason = refusal
    device = device or (row.devices[0] if row.devices else "cpu")
    if not refuses(row):
        if backends.unavailable(row.name) is not None:
            pytest.skip(backends.unavailable(row.name))
        assert backends.resolve(row.name, device, dtype, large_k) == row.name
        return
    with pytest.raises(RuntimeError, match=f"^backend: '{row.name}' cannot run here: {reason}"):
        backends.resolve(row.name, device, dtype, large_k)


@pytest.mark.parametrize(
    "name", [name for name in backends.NAMES if backends.unavailable(name) is not None]
)
def test_a_named_backend_that_is_not_there_raises(name):
    device = subjects.ROWS[name].devices[0]
    with pytest.raises(RuntimeError, match=f"^backend: '{name}' cannot run here: ") as caught:
        backends.resolve(name, device, torch.float32, False)
    assert backends.unavailable(name) in str(caught.value)


@pytest.mark.skipif(subjects.INTERPRETING, reason="the interpreter runs triton on CPU tensors")
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize(
    "call",
    [
        lambda **o: fused_sparse_ce(LOGITS, TARGET, 2, **o),
        lambda **o: sparse_softmax(LOGITS, 2, **o),
    ],
)
def test_backends_of_gpus_refuse_cpu_tensors(call, name):
    with pytest.raises(
        RuntimeError, match=f"^backend: '{name}' cannot run here: it runs on cuda tensors, got cpu"
    ):
        call(backend=name)


def test_the_cpu_backend_refuses_gpu_tensors():
    """It shares its module with `cuda`: the device of the tensors alone would choose the other."""
    with pytest.raises(
        RuntimeError, match="^backend: 'cpu' cannot run here: it runs on cpu tensors, got cuda"
    ):
        backends.resolve("cpu", "cuda", torch.float32, False)


@pytest.mark.interpreter
def test_the_named_backend_runs(subject, monkeypatch):
    """Forward and backward run on it, also in the thread of the GPU's backward."""
    called = []

    def spy_on(name):
        original = getattr(backends, name)

        def spy(backend, op):
            found = original(backend, op)
            if found is not None:
                called.append((name, backend, op))
            return found

        monkeypatch.setattr(backends, name, spy)

    spy_on("implementation")
    spy_on("loss")
    logits = LOGITS.to(subject.device).requires_grad_()
    fused_sparse_ce(logits, TARGET.to(subject.device), 20, backend=subject.backend).backward()
    steps = ("topk_ce_fwd", "reduce_fwd", "reduce_bwd", "topk_ce_bwd")
    one_by_one = [("implementation", subject.backend, step) for step in steps]
    # the compiled library has the rest in it, which goes by the device
    at_once = [("loss", subject.backend, "topk_ce_fwd")]
    compiled = subjects.ROWS[subject.backend].modules == ("sparse_ce.native",)
    assert called == (at_once if compiled else one_by_one)


def test_automatic_choice_skips_what_cannot_run(monkeypatch):
    monkeypatch.setattr(
        backends, "unavailable", lambda name: None if name == "eager" else "it is told so"
    )
    assert backends.resolve("auto", "cpu", torch.float32, False) == "eager"
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    automatic = [
        row.name for row in backends.BACKENDS if row.devices is None or "cuda" in row.devices
    ]
    assert backends.resolve("auto", "cuda", torch.float32, False) == automatic[0]


# what is missing, dtype, large_k of a call on a GPU -> who takes it
AUTOMATIC_ON_A_GPU = [
    ((), torch.bfloat16, False, "cuda"),
    ((), torch.float64, False, "cuda"),
    ((), torch.bfloat16, True, "cuda"),
    (("triton",), torch.bfloat16, False, "cuda"),
    (("cuda",), torch.bfloat16, False, "triton"),
    (("cuda",), torch.float64, False, "eager"),
    (("triton", "cuda"), torch.bfloat16, False, "eager"),
]


@pytest.mark.parametrize("missing, dtype, large_k, chosen", AUTOMATIC_ON_A_GPU)
def test_automatic_choice_on_a_gpu(missing, dtype, large_k, chosen, monkeypatch):
    monkeypatch.setattr(
        backends, "unavailable", lambda name: "it is told so" if name in missing else None
    )
    assert backends.resolve("auto", "cuda", dtype, large_k) == chosen


@pytest.mark.parametrize(
    "architecture, runs, does_not",
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_89", [(8, 9)], [(8, 0), (8, 6), (9, 0), (12, 0)]),
        ("sm_90a", [(9, 0)], [(10, 0)]),
        ("sm_120", [(12, 0), (12, 1)], [(10, 0), (11, 0)]),
        ("compute_90", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
    ],
)
def test_gpus_that_an_architecture_runs_on(architecture, runs, does_not):
    assert all(backends._runs_on(architecture, capability) for capability in runs)
    assert not any(backends._runs_on(architecture, capability) for capability in does_not)


HAS_CUDA_KERNELS = schema.NATIVE_ERROR is None and (
    torch._C._dispatch_has_kernel_for_dispatch_key("sparse_ce_native::topk_ce_fwd", "CUDA")
)


@pytest.mark.skipif(HAS_CUDA_KERNELS, reason="the library has CUDA kernels")
@pytest.mark.skipif(schema.NATIVE_ERROR is not None, reason=str(schema.NATIVE_ERROR))
def test_a_library_without_cuda_kernels_says_why():
    reason = "the compiled library has no CUDA kernels: " + schema.build_note()["cuda"]
    assert backends.unavailable("cuda") == reason


@pytest.mark.skipif(not HAS_CUDA_KERNELS, reason="the library has no CUDA kernels")
def test_a_gpu_that_the_cuda_kernels_are_not_built_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    built = torch.ops.sparse_ce_native.cuda_architectures()
    *_, last = built.split(",")
    fits = int(last.partition("_")[2].rstrip("a"))
    capabilities = [divmod(fits, 10), (7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    reason = f"its kernels are built for {built}, cuda:1 has compute capability 7.5: install "
    assert backends._cuda_unavailable().startswith(reason)
    capabilities[1] = capabilities[0]
    assert backends._cuda_unavailable() is None


def test_interpreted_kernels_are_never_chosen_automatically(monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    assert backends.resolve("auto", "cpu", torch.float32, False) != "triton"


def python(program, tmp_path, *, path=(), **environment):
    """Exit status and outputs of a program in a new process."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "SPARSE_CE_REQUIRE": "", **environment}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


USE = """
import torch, sparse_ce
from sparse_ce import backends
logits = torch.tensor([[3.0, 2, 1, 0]], requires_grad=True)
loss = sparse_ce.fused_sparse_ce(logits, torch.tensor([2]), 2)
loss.backward()
assert abs(loss.item() - 2.3133) < 5e-5 and logits.grad[0, 2] == -1
print(backends.resolve("auto", "cpu", torch.float32, False))
for name in backends.NAMES:
    print(name, backends.unavailable(name))
    try:
        sparse_ce.fused_sparse_ce(logits, torch.tensor([2]), 2, backend=name)
    except RuntimeError as error:
        print(error)
"""


def test_without_triton(tmp_path):
    code, out, err = python(f"import sys; sys.modules['triton'] = None\n{USE}", tmp_path)
    assert code == 0, err
    assert "triton the package triton is not installed" in out


def test_with_a_triton_that_does_not_import(tmp_path):
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise ImportError('libtriton.so: cannot open shared object file')\n"
    )
    code, out, err = python(USE, tmp_path, path=[tmp_path], TRITON_INTERPRET="1")
    assert code == 0, err
    assert (
        "backend: 'triton' cannot run here: its kernels do not import: libtriton.so: cannot open"
        in out
    )


def test_without_the_compiled_library(tmp_path):
    code, out, err = python(f"import sys; sys.modules['sparse_ce._C'] = None\n{USE}", tmp_path)
    assert code == 0, err
    assert out.splitlines()[0] == "eager"
    assert (
        "backend: 'cpu' cannot run here: the compiled library sparse_ce._C does not import: " in out
    )
    assert "cuda the compiled library sparse_ce._C does not import: " in out


def test_with_a_compiled_library_that_does_not_load(tmp_path):
    """As after an update of torch: the dynamic linker's message reaches the user."""
    program = f"""
import importlib.machinery, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "sparse_ce._C":
            raise ImportError("_C.so: undefined symbol: _ZN3c10")
sys.meta_path.insert(0, Broken())
{USE}"""
    code, out, err = python(program, tmp_path)
    assert code == 0, err
    assert (
        "backend: 'cpu' cannot run here: the compiled library sparse_ce._C does not import: "
        "_C.so: undefined symbol" in out
    )


def test_with_a_compiled_library_of_other_signatures(tmp_path):
    """A stale build: an error that says how to rebuild, not an abort of the process."""
    program = """
import sys, types, torch
sys.modules["sparse_ce._C"] = types.ModuleType("sparse_ce._C")
library = torch.library.Library("sparse_ce_native", "FRAGMENT")
library.define("topk_ce_fwd(Tensor logits) -> Tensor")
import sparse_ce
"""
    code, _, err = python(program, tmp_path)
    assert code == 1
    assert (
        "ImportError: sparse_ce: the compiled library does not fit these Python sources; rebuild it"
        in err
    )


def test_kernels_imported_under_the_name_of_another_package(tmp_path):
    """`triton_kernels` is somebody else's package too, and the root of this repository has one."""
    code, _, err = python("import triton_kernels", tmp_path, path=[ROOT])
    assert code == 1
    assert (
        "ImportError: triton_kernels: these are the kernels of sparse_ce, "
        "to be imported as sparse_ce.triton_kernels" in err
    )


def test_a_required_backend_that_is_missing_fails_the_suite(tmp_path):
    environment = {**os.environ, "SPARSE_CE_REQUIRE": "eager, abacus"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        str(ROOT / "tests" / "test_imports.py"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert (
        "SPARSE_CE_REQUIRE: expected to run here, cannot: abacus: the registry has no such backend"
        in done.stderr
    )


def test_eager_in_the_place_of_kernels_is_said_once():
    """Where the library does not load 'auto' is several times slower."""
    code = """
import sys, warnings
sys.modules["sparse_ce._C"] = None
import torch
from sparse_ce import fused_sparse_ce
z, y = torch.randn(3, 7), torch.arange(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fused_sparse_ce(z, y, 2, backend="eager")
    assert not caught
    fused_sparse_ce(z, y, 2)
    fused_sparse_ce(z, y, 3)
(warning,) = caught
print(warning.filename, warning.message)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("<string> sparse_ce: without the C++ kernels backend='auto' takes")
    assert "does not import" in run.stdout
