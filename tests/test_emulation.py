"""What tests/cuda/emulation.h says it finds, it finds: on kernels that are wrong on purpose."""

import ctypes
import re

import emulation
import pytest

RIGHT = (
    "reverse",
    "indices",
    "warps",
    "atomics",
    "wide_atomics",
    "neighbours",
    "writers_of_one_value",
)

_READ_TOO_EARLY = (
    r"race: reads values\[\d+\], which thread \d+ wrote, and no barrier lies between them$"
    r"|reads values\[\d+\], which nobody in this block has written$"
)

# case -> what is said of it, in one or another order of threads
WRONG = {
    "read_without_barrier": _READ_TOO_EARLY,
    "overwritten_without_barrier": r"race: (writes|reads) values\[\d+\], which thread",
    "two_writers": r"race: writes values\[0\], which thread \d+ wrote",
    "many_wrote_and_none_waited": r"race: (reads|writes) values\[0\], which .* (wrote|read), and",
    "overwritten_after_many_read": r"race: (writes values\[0\], which .* read|reads .* 5 wrote)",
    "shuffle_as_barrier": _READ_TOO_EARLY,
    "half_a_warp_barrier": _READ_TOO_EARLY,
    "atomic_and_plain": r"race: (reads|updates) count\[0\], which .* (wrote|read), and no barrier",
    "barrier_after_exit": r"never come: 0-63 at __syncthreads, 64-95 ended$",
    "barrier_in_a_branch": (
        r"never come: 0-31 at __syncthreads, 32-39 at __ballot_sync of lanes 0xFFFFFFFF, "
        r"40 at __syncthreads, 41-63 at __ballot_sync of lanes 0xFFFFFFFF, 64-95 ended$"
    ),
    "lane_that_never_comes": r"never come: 0-6 at __shfl of lanes 0xFFFFFFFF, 7 ended, 8-31 at",
    "lanes_that_do_not_exist": r"never come: .*32-39 at __shfl of lanes 0xFFFFFFFF$",
    "lane_not_in_its_mask": r"thread \(\d+, 0, 0\): __ballot_sync: the lane is not in its own mask",
    "lane_outside_of_the_mask": r"__shfl_sync: lane 0 reads lane 16, which is not in the mask 0xFF",
    "different_collectives": r"__(ballot|reduce_add)_sync of lanes .* but lane \d+ is at __(b|r)",
    "different_masks": r"but lane 0 is at __syncwarp of lanes 0x1$|0-31 at|1-31 at __syncwarp",
    "index_too_large": r"thread \(3, 0, 0\): index 4 of `values`, which has 4 elements$",
    "index_negative": r"thread \(3, 0, 0\): index -1 of `values`, which has 4 elements$",
    "not_initialised": r"reads values\[1\], which nobody in this block has written$",
    "left_by_another_block": r"thread \(0, 0, 0\): reads values\[0\], which nobody in this block",
    "count_not_initialised": r"updates count\[0\], which nobody in this block has written$",
    "too_much_shared_memory": r"49160 bytes of shared memory up to `others`, the limit is 48 KB$",
    "block_too_large": r"no GPU takes such a grid of such blocks$",
    "grid_too_large": r"no GPU takes such a grid of such blocks$",
    "grid_empty": r"no GPU takes such a grid of such blocks$",
    "race_in_global_memory": r"^wrong result$",
}


@pytest.fixture(scope="module", params=["", "portable"])
def library(request):
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler was found")
    flags = ("-DEMULATION_PORTABLE",) if request.param else ()
    library = ctypes.CDLL(str(emulation.build(emulation.HEADERS / "selftest.cpp", flags=flags)))
    library.names.restype = library.run.restype = ctypes.c_char_p
    return library


def found(library, name):
    error = library.run(name.encode())
    return None if error is None else error.decode()


def test_every_case_is_expected(library):
    assert library.names().decode().split() == sorted([*RIGHT, *WRONG])


@pytest.mark.parametrize("name", RIGHT)
def test_right(library, name):
    assert found(library, name) is None


@pytest.mark.parametrize("name", WRONG)
def test_wrong(library, name):
    """In all orders of threads: each run takes another one."""
    for _ in range(10):
        error = found(library, name)
        assert error is not None and re.search(WRONG[name], error), error


def test_messages_begin_with_the_place(library):
    error = found(library, "left_by_another_block")
    kernel = "selftest::left_by_another_block(int*)"
    assert error.startswith(f"{kernel}, block (1, 0, 0), thread (0, 0, 0): ")


def test_a_wrong_kernel_leaves_nothing_behind(library):
    """Neither threads that wait nor shared memory: the next kernel starts as the first did."""
    for wrong in ("barrier_in_a_branch", "lane_that_never_comes", "two_writers"):
        assert found(library, wrong) is not None
        assert found(library, "reverse") is None
        assert found(library, "not_initialised") is not None
