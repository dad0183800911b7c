"""The machine code of the CUDA kernels: without a GPU, so without times.

All dtypes on all architectures, four minutes on two cores. No kernel may spill, rows must move in
accesses of 16 bytes, and nothing may grow: cuda_resources.json holds registers, shared memory and
instruction counts per version of nvcc; ``python tests/cuda_aot.py`` writes it anew.
"""

import json

import cuda_aot
import pytest
import sass

if cuda_aot.missing() is not None:
    pytest.skip(cuda_aot.missing(), allow_module_level=True)

# What a block can have without asking for more, and what CUDA takes for itself of it.
STATIC_SHARED, RESERVED = 48 << 10, 1 << 10


# Kernels of a stem's files, counted by their names without numbers; with those of a file alone.
KERNELS = {
    "topk_ce": 8,
    "threshold_ce": 3,
    "tail": 1,
    "labels_ce": 2,
    "sparse_linear": 3,
    "cosine": 2,
    "plif": 6,
    "reduce": 3,
}
TABLES = {"plif_f32": 7, "plif_f64": 7}


@pytest.mark.parametrize("architecture", sass.ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("file", cuda_aot.FILES)
def test_compiled(file: str, architecture: int) -> None:
    stem = file.rpartition("_")[0]
    kernels = cuda_aot.compile_file(file, architecture)
    assert len({name.split()[0] for name in kernels}) == KERNELS[stem] + TABLES.get(file, 0)
    recorded = json.loads(cuda_aot.RESOURCES.read_text()).get(cuda_aot.version(), {})
    for name, report in kernels.items():
        assert (report.stack, report.local, report.spills()) == (0, 0, 0), name
        assert report.shared <= STATIC_SHARED + RESERVED, name
        for access in cuda_aot.streamed(name) or ():
            # rows move 16 bytes at a time, targets 8, several at once
            loop = report.tightest(*cuda_aot.streamed(name))
            few = "backward" in name and ("f64" in file or stem == "plif")
            assert loop.count(access) >= (2 if few else 4), name
            # and nothing narrower is in the loop, unless it says which rows, or is looked up; the
            # labels of a chunk have one access beside its own, a target has its loss
            beside = loop.count(access) if stem == "labels_ce" and access[:3] == "LDG" else 0
            others = stem in ("sparse_linear", "plif", "reduce")
            assert others or loop.count(access) + beside == loop.count(access[:3]), name
        if stem == "sparse_linear" and cuda_aot.streamed(name):
            # all rows of a step are under way before the first is added
            accesses = 16 if name.endswith(" 4") else 8
            loops = 3 if name.startswith("segment") else 1
            assert report.batches("LDG.E.128") == [accesses] * loops, name
        for access, number in cuda_aot.at_once(name).items():
            assert sum(n for op, n in report.operations.items() if op.startswith(access)) >= number
        # another version of nvcc compiles otherwise; what it must not do is asserted above
        if recorded:
            then = recorded[f"{file} sm_{architecture} {name}"]
            now = cuda_aot.resources(name, report)
            assert now["registers"] <= then["registers"] + sass.MARGIN_REGISTERS, name
            assert now["shared"] <= then["shared"], name
            for count in now.keys() & {"per_chunk", "per_row"}:
                assert now[count] <= sass.MARGIN_INSTRUCTIONS * then[count], name


@pytest.mark.parametrize("stem", cuda_aot.STEMS)
def test_dispatch_compiles_no_kernel(stem: str) -> None:
    """Each dtype is compiled in a file of its own, once."""
    assert cuda_aot.compile_file(stem, 90) == {}


def test_every_file_is_looked_at() -> None:
    files = {path.stem for path in cuda_aot.KERNELS.glob("*.cu")}
    assert files == {*cuda_aot.STEMS, *cuda_aot.FILES}


def test_records_are_of_the_kernels() -> None:
    """The same kernels for every architecture, and for every dtype but where lists differ."""
    for version, rows in json.loads(cuda_aot.RESOURCES.read_text()).items():
        by_file: dict[str, dict[str, set[str]]] = {}
        for name in rows:
            file, arch, kernel = name.split(" ", 2)
            by_file.setdefault(file, {}).setdefault(arch, set()).add(kernel)
        assert set(by_file) == set(cuda_aot.FILES), version
        for kernels in by_file.values():
            assert set(kernels) == {f"sm_{arch}" for arch in sass.ARCHITECTURES}, version
            assert len({frozenset(names) for names in kernels.values()}) == 1, version
