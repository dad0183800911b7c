"""What setup.py compiles the CUDA kernels for."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "csrc" / "cuda" / "nvcc.py"
SPEC = importlib.util.spec_from_file_location("nvcc", PATH)
nvcc = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(nvcc)

KNOWN = {"75", "80", "86", "89", "90", "100", "120"}


@pytest.mark.parametrize(
    "known, asked, present, targets",
    [
        (KNOWN, "8.0;9.0+PTX", {(8, 6)}, ["sm_80", "sm_90", "compute_90"]),
        (KNOWN, "8.0, 9.0a 12.0;", set(), ["sm_80", "sm_90a", "sm_120"]),
        (KNOWN, "", {(9, 0), (8, 6), (7, 5)}, ["sm_86", "sm_90", "compute_90"]),
        (
            KNOWN,
            "",
            set(),
            ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"],
        ),
        ({"80", "86", "90"}, "", set(), ["sm_80", "sm_86", "sm_90", "compute_90"]),
    ],
)
def test_architectures(known, asked, present, targets):
    assert nvcc.choose_targets(known, asked, present) == targets


@pytest.mark.parametrize("asked", ["Hopper", "9", "7.5", "13.0", "9.0+SASS"])
def test_architectures_that_cannot_be(asked):
    with pytest.raises(nvcc.NoCuda, match="^TORCH_CUDA_ARCH_LIST: expected .*, got ") as caught:
        nvcc.choose_targets(KNOWN, f"8.0;{asked}", set())
    assert str(caught.value).endswith(asked)


def test_only_gpus_that_are_too_old():
    with pytest.raises(nvcc.NoCuda, match="8.0 or later"):
        nvcc.choose_targets(KNOWN, "", {(7, 5)})


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(nvcc.shutil, "which", lambda place: None)
    with pytest.raises(nvcc.NoCuda, match="^no CUDA compiler was found"):
        nvcc.find_compiler()


def test_home_before_path(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/toolkit")
    monkeypatch.setattr(nvcc.shutil, "which", lambda place: place)
    assert nvcc.find_compiler() == "/toolkit/bin/nvcc"
