"""Who may import whom, read from the import statements."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Nothing beside torch itself: its compiler alone takes a second.
QUICK = """
import sys
import torch
before = set(sys.modules)
import sparse_ce
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("sparse_ce")))
"""
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "sparse_ce"
KERNELS = ROOT / "triton_kernels"

# module -> the modules of the package that it may import; a new module says here where it stands
ARROWS = {
    "__init__": {
        "adaptive",
        "continuous",
        "functional",
        "linear",
        "modules",
        "parallel",
        "plif",
        "schedule",
        "support",
    },
    "__main__": {"__version__", "backends", "schema"},
    "modules": {"continuous", "functional", "linear", "checks", "plif", "support"},
    "linear": {"functional", "checks", "backends", "ops", "schema", "support", "tail"},
    "parallel": {"linear", "functional", "checks", "backends", "ops", "schema", "support", "tail"},
    "functional": {"checks", "backends", "ops", "plif", "schema", "support", "tail"},
    "tail": {"backends", "ops", "schema"},
    "plif": {"checks", "backends", "ops", "schema"},
    "adaptive": {"functional", "checks", "backends", "ops", "schema"},
    "ops": {"schema", "backends"},
    "checks": {"backends"},
    "backends": {
        "schema",
        "_C",
        "native",
        "eager",
        "triton_kernels.topk_ce",
        "triton_kernels.threshold_ce",
        "triton_kernels.tail",
        "triton_kernels.labels_ce",
        "triton_kernels.plif",
        "triton_kernels.plif_tables",
        "triton_kernels.sparse_linear",
        "triton_kernels.reduce",
        "triton_kernels.cosine",
    },
    "native": {"schema"},
    "schema": {"_C"},
    "schedule": {"checks"},
    "support": {"checks"},
    "continuous": {"functional", "checks", "backends", "ops", "schema"},
    "eager": {"schema"},
    "reference": set(),
}


def imports(path):
    """Absolute names of what a file imports, by statement or by a string that names our module."""
    inside = "sparse_ce.triton_kernels" if path.parent == KERNELS else "sparse_ce"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = (
                inside.split(".")[: len(inside.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from . import a`: a is a module; `from .a import b`: b is a name
            yield from ([base] if node.module else (f"{base}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"sparse_ce(\.\w+)+", node.value):
                yield node.value


def test_imports_are_read():
    assert set(imports(PACKAGE / "native.py")) == {"torch", "sparse_ce.schema"}
    assert "sparse_ce._C" in imports(PACKAGE / "schema.py")
    assert "sparse_ce.backends" in imports(PACKAGE / "functional.py")
    assert "sparse_ce.eager" in imports(PACKAGE / "backends.py")


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_arrows(path):
    """ARROWS holds, and `import triton` is nowhere in the package."""
    assert path.stem in ARROWS, "a new module: say in ARROWS what it may import"
    ours = {
        name.removeprefix("sparse_ce.") for name in imports(path) if name.startswith("sparse_ce.")
    }
    assert ours <= ARROWS[path.stem]
    assert not {name for name in imports(path) if name.split(".")[0] == "triton"}


def test_no_arrow_goes_round():
    open_modules = dict(ARROWS)
    while open_modules:
        leaves = {
            module for module, targets in open_modules.items() if not targets & open_modules.keys()
        }
        assert leaves, f"a circle among {sorted(open_modules)}"
        open_modules = {
            module: targets for module, targets in open_modules.items() if module not in leaves
        }


def test_the_arrows_of_backends_are_its_rows():
    """They are all that the registry adds to it; one backend does not import another."""
    from sparse_ce import backends

    rows = backends.BACKENDS
    modules = {name.removeprefix("sparse_ce.") for row in rows for name in row.modules}
    assert modules | {"schema", "_C"} == ARROWS["backends"]
    for module in modules & ARROWS.keys():
        assert not ARROWS[module] & modules
    assert not any("reference" in targets for targets in ARROWS.values())


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_torch_and_triton_alone(path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for name in imports(path):
        sibling = name.startswith("sparse_ce.triton_kernels")
        assert sibling or name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_importing_is_quick():
    found = subprocess.run(
        [sys.executable, "-c", QUICK], capture_output=True, text=True, check=True
    )
    assert len(found.stdout.split()) <= 5 and "_dynamo" not in found.stdout
