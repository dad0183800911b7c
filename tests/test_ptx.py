"""What the emulator of PTX says it finds, it finds: on kernels that are wrong on purpose, beside
twins that are right. And its instructions against exact integers and fractions.
"""

import importlib.metadata
import importlib.util
import itertools
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch
from ptx import machine, parse, values

# Registers by width: %rs of 16 bits, %r of 32, %rd of 64. Every line of a body is a source line.
KERNEL = """
.global .align 1 .b8 _$_str[3] = {{97, 98}};
.visible .entry wrong(
	.param .u64 .ptr .global .align 1 wrong_param_0,
	.param .u32 wrong_param_1
)
.reqntid {threads}
{{
	.reg .pred 	%p<40>;
	.reg .b16 	%rs<40>;
	.reg .b32 	%r<40>;
	.reg .b64 	%rd<40>;
	ld.param.b64 	%rd1, [wrong_param_0];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	shl.b32 	%r3, %r1, 2;
	mad.wide.u32 	%rd2, %r1, 4, %rd1; // of each thread its own four bytes
	mad.wide.u32 	%rd3, %r2, 4, %rd1; // of each program
	setp.lt.u32 	%p1, %r1, 16;
	setp.eq.b32 	%p2, %r1, 0;
	setp.eq.b32 	%p3, %r2, 0;
{body}
	ret;
                                        // -- End function
}}
	.file	1 "/somewhere/kernels.py"
"""


def kernel(body, threads=64):
    lines = [line.strip() for line in body.strip().splitlines()]
    located = [f".loc 1 {n} 5 // lines.py:{n}:5\n\t{line}" for n, line in enumerate(lines, 1)]
    return KERNEL.format(threads=threads, body="\n".join(located))


def run(body, memory=None, *, threads=64, programs=1, shared=1024, written=True, seed=0):
    """The findings of a kernel, which gets `memory`; that nobody has written yet, where it says."""
    memory = np.zeros(256, np.uint32) if memory is None else memory
    begin, end = memory.ctypes.data, memory.ctypes.data + memory.nbytes
    scratch = [] if written else [ptx.Scratch(begin, np.ones(memory.nbytes, np.uint8))]
    findings = Counter()
    ptx.launch(
        kernel(body, threads), (programs, 1, 1), [begin, 7], [ptx.Extent(begin, end, "memory")],
        findings, shared=shared, scratch=scratch, random=np.random.default_rng(seed),
    )  # fmt: skip
    return sorted(findings)


# name -> (body, what makes it right, what is wrong instead, what is said of that, how it runs).
# {} is where the two differ.
TWINS = {
    "read_without_barrier": (
        "st.shared.b32 [%r3], %r1;\n{}\nxor.b32 %r4, %r3, 128;\nld.shared.b32 %r5, [%r4];",
        *("bar.sync 0;", "bar.warp.sync -1;"),
        r"write and read by two warps .*: wrong, shared memory at lines.py:4:5 after lines.py:1:5",
        {},
    ),
    "read_before_the_warp_met": (
        "st.shared.b32 [%r3], %r1;\n{}\nxor.b32 %r4, %r3, 4;\nld.shared.b32 %r5, [%r4];",
        *("bar.warp.sync -1;", ""),
        r"write and read by two threads of a warp .*: wrong, shared memory at lines.py:4",
        {},
    ),
    "halves_of_a_warp_meet": (
        "selp.b32 %r8, 0xffff, 0xffff0000, %p1;\nst.shared.b32 [%r3], %r1;\n{}\n"
        "xor.b32 %r4, %r3, 64;\nld.shared.b32 %r5, [%r4];",
        *("bar.warp.sync -1;", "@%p1 bar.warp.sync %r8;\n@!%p1 bar.warp.sync %r8;"),
        r"write and read by two threads of a warp .*: wrong, shared memory at lines.py:6",
        {"threads": 32},
    ),
    "a_shuffle_is_no_barrier": (
        "st.shared.b32 [%r3], %r1;\n{}\nxor.b32 %r4, %r3, 4;\nld.shared.b32 %r5, [%r4];",
        *("bar.warp.sync -1;", "shfl.sync.bfly.b32 %r6, %r1, 1, 31, -1;"),
        r"write and read by two threads of a warp",
        {},
    ),
    "overwritten_without_barrier": (
        "st.shared.b32 [%r3], %r1;\nbar.sync 0;\nxor.b32 %r4, %r3, 128;\nld.shared.b32 %r5, [%r4];"
        "\n{}\nst.shared.b32 [%r3], %r5;",
        *("bar.sync 0;", ""),
        r"read and write by two warps .*: wrong, shared memory at lines.py:6:5 after lines.py:4:5",
        {},
    ),
    "overwritten_before_the_warp_met": (
        "st.shared.b32 [%r3], %r1;\nbar.sync 0;\nxor.b32 %r4, %r3, 4;\nld.shared.b32 %r5, [%r4];"
        "\n{}\nst.shared.b32 [%r3], %r5;",
        *("bar.warp.sync -1;", ""),
        r"read and write by two threads of a warp .*: wrong, shared memory at lines.py:6",
        {},
    ),
    "two_writers": (
        "st.shared.b32 [%r3], %r1;\n{}\nxor.b32 %r4, %r3, 128;\nst.shared.b32 [%r4], %r1;",
        *("bar.sync 0;", ""),
        r"two writes by two warps .*: wrong, shared memory at lines.py:4:5 after lines.py:1:5",
        {},
    ),
    "global_memory_without_barrier": (
        "st.global.b32 [%rd2], %r3;\n{}\nxor.b32 %r4, %r1, 32;\nmad.wide.u32 %rd4, %r4, 4, %rd1;\n"
        "ld.global.b32 %r5, [%rd4];",
        *("bar.sync 0;", ""),
        r"write and read by two warps .*: wrong, memory at lines.py:5:5 after lines.py:1:5",
        {},
    ),
    "a_matrix_without_barrier": (
        "st.shared.v2.b32 [%r7], {{%r1, %r1}};\n{}\nshl.b32 %r4, %r1, 4;\nand.b32 %r4, %r4, 496;\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r4];",
        *("bar.sync 0;", "bar.warp.sync -1;"),
        r"write and read by two warps .*: wrong, shared memory at lines.py:6:5 after lines.py:2:5",
        {"first": "shl.b32 %r7, %r1, 3;\n"},
    ),
    "bytes_of_one_word": (
        "st.shared.b8 [%r1], %rs1;\n{}\nst.shared.b32 [%r3], %r1;",
        *("bar.sync 0;", ""),
        r"two writes by two (warps|threads of a warp) .* at lines.py:3:5 after lines.py:1:5",
        {},
    ),
    "two_programs_write": (
        "@%p2 st.global.b32 [{}], %r2;",
        *("%rd3", "%rd1"),
        r"two writes by two programs: wrong, memory at lines.py:1:5 after lines.py:1:5",
        {"programs": 3},
    ),
    "two_programs_write_and_read": (
        "@%p2 st.global.b32 [%rd3], %r1;\nadd.s32 %r4, %r2, 1;\n@%p2 st.global.b32 [%rd3], %r4;\n"
        "@%p2 ld.global.b32 %r5, [{}];",
        *("%rd3", "%rd1+4"),
        r"(write and read|read and write) by two programs: wrong, memory at lines.py:[34]",
        {"programs": 2},
    ),
    "atomic_and_plain": (
        "red.global.relaxed.gpu.add.u32 [%rd1], 1;\n{}\nld.global.b32 %r4, [%rd1];",
        *("bar.sync 0;", ""),
        r"write and read by two (warps|threads of a warp) .* at lines.py:3:5 after lines.py:1:5",
        {},
    ),
    "plain_and_atomic": (
        "ld.shared.b32 %r5, [0];\n{}\natom.shared.add.u32 %r4, [0], 1;",
        *("bar.sync 0;", ""),
        r"read and write by two (warps|threads of a warp) .* at lines.py:4:5 after lines.py:2:5",
        {"first": "@%p2 st.shared.b32 [0], 0; bar.sync 0;\n"},
    ),
    "written_and_then_added_to": (
        "@%p2 st.shared.b32 [0], 0;\n{}\natom.shared.add.u32 %r4, [0], 1;",
        *("bar.sync 0;", ""),
        r"two writes by two (warps|threads of a warp) .* at lines.py:3:5 after lines.py:1:5",
        {},
    ),
    "two_values_at_one_address": (
        "st.global.b32 [%rd1], {};",
        *("5", "%r1"),
        r"an instruction stores two values at once: wrong, at lines.py:1:5",
        {"threads": 32},
    ),
    "two_values_at_one_address_of_shared_memory": (
        "st.shared.b32 [0], {};",
        *("5", "%r1"),
        r"an instruction stores two values at once: wrong, at lines.py:1:5",
        {"threads": 32},
    ),
    "scratch_read_before_it_is_written": (
        "{}\nld.global.b32 %r4, [%rd2];",
        *("st.global.b32 [%rd2], 0;", "mov.b32 %r4, 0;"),
        r"read of memory that nobody wrote: wrong, memory at lines.py:2:5",
        {"written": False},
    ),
    "scratch_of_which_half_is_written": (
        "st.global.b16 [%rd2], %rs1;\n{}\nld.global.b32 %r4, [%rd2];",
        *("st.global.b16 [%rd2+2], %rs1;", ""),
        r"read of memory that nobody wrote: wrong, memory at lines.py:3:5",
        {"written": False},
    ),
    "scratch_that_begins_with_a_sum": (
        "{}\nbar.sync 0;\nred.global.add.u32 [%rd1], 1;",
        *("@%p2 st.global.b32 [%rd1], 0;", "mov.b32 %r4, 0;"),
        r"read of memory that nobody wrote: wrong, memory at lines.py:3:5",
        {"written": False},
    ),
    "shared_memory_of_another_program": (
        "{} st.shared.b32 [%r3], 1;\nbar.sync 0;\nld.shared.b32 %r4, [%r3];",
        *("", "@%p3"),
        r"read of memory that nobody wrote: wrong, shared memory at lines.py:3:5",
        {"programs": 3},
    ),
    "what_is_looked_at": (
        "st.shared.b32 [%r7], 1;\nld.shared.v2.b32 {{%r4, {}}}, [%r7];",
        *("_", "%r5"),
        r"read of memory that nobody wrote: wrong, shared memory at lines.py:3:5",
        {"first": "shl.b32 %r7, %r1, 3;\n"},
    ),
    "what_a_pragma_says_is_looked_at": (
        'st.shared.b32 [%r7], 1;\n.pragma "used_bytes_mask {}";\n'
        "ld.shared.v2.b32 {{%r4, %r5}}, [%r7];",
        *("0xf", "0x1f"),
        r"read of memory that nobody wrote: wrong, shared memory at lines.py:4:5",
        {"first": "shl.b32 %r7, %r1, 3;\n"},
    ),
    "behind_a_pragma": (
        'st.shared.b32 [%r7], 1;\n.pragma "used_bytes_mask 0xf";\n'
        "ld.shared.v2.b32 {{%r4, %r5}}, [%r7];\nld.shared.v2.b32 {{%r4, {}}}, [%r7];",
        *("_", "%r5"),
        r"read of memory that nobody wrote: wrong, shared memory at lines.py:5:5",
        {"first": "shl.b32 %r7, %r1, 3;\n"},
    ),
    "a_shuffle_of_a_part": (
        "@%p1 shfl.sync.idx.b32 %r4, %r1, 3, 31, {};",
        *("0xffff", "-1"),
        r"a warp of which some lanes are missing: wrong, at lines.py:1:5",
        {"threads": 32},
    ),
    "a_shuffle_from_outside": (
        "@%p1 shfl.sync.idx.b32 %r4, %r1, {}, 31, 0xffff;",
        *("15", "16"),
        r"a warp of which some lanes are missing: wrong, at lines.py:1:5",
        {"threads": 32},
    ),
    "a_lane_outside_of_its_mask": (
        "@%p1 bar.warp.sync {};",
        *("0xffff", "0xfffe"),
        r"a warp of which some lanes are missing: wrong, at lines.py:1:5",
        {"threads": 32},
    ),
    "redux_of_absent_lanes": (
        "@%p1 redux.sync.add.s32 %r4, %r1, {};",
        *("0xffff", "0x1ffff"),
        r"a warp of which some lanes are missing: wrong, at lines.py:1:5",
        {"threads": 32},
    ),
    "a_matrix_of_a_part": (
        "st.shared.b32 [%r3], 1;\nbar.sync 0;\n"
        "{} ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r10}}, [0];",
        *("", "@%p1"),
        r"a warp of which some lanes are missing: wrong, at lines.py:3:5",
        {"threads": 32},
    ),
    "half_a_warp_meets": (
        "@%p1 bar.warp.sync {};",
        *("0xffff", "-1"),
        r"a warp of which some lanes are missing: wrong, at lines.py:1:5",
        {"threads": 32},
    ),
    "barrier_that_some_have_left": (
        "{} ret;\nbar.sync 0;",
        *("@%p4 bra THERE;\nTHERE:\n@!%p5", "@%p1"),
        r"barrier that some threads have left: wrong, at lines.py:3:5",
        {"first": "setp.ge.u32 %p5, %r1, 0; setp.lt.u32 %p4, %r1, 3;\n"},
    ),
    "two_barriers": (
        "@%p1 bra THEN;\n{}\nbra END;\nTHEN:\n{}\nEND:\nbar.sync 0;",
        *("", "bar.sync 0;"),
        r"threads wait at two barriers: wrong, at lines.py:2:5 after lines.py:5:5",
        {},
    ),
}

# what ends a launch
FAULTS = {
    "behind_all_tensors": (
        "st.global.b32 [%rd2+{}], 1;", *("768", "772"),
        r"wrong, at lines.py:1:5: thread 63 accesses 4 bytes at 0x[0-9a-f]+, outside of all tensor",
    ),
    "before_all_tensors": (
        "ld.global.b32 %r4, [%rd2+{}];", *("0", "-4"), "thread 0 accesses .* outside of all"
    ),
    "a_vector_half_outside": (
        "ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd1+{}];", *("1008", "1016"),
        "misaligned access of 16 bytes|outside of all tensors",
    ),
    "an_atomic_addition_outside": (
        "red.global.add.u32 [%rd1+{}], 1;", *("1020", "1024"), "outside of all tensors"
    ),
    "outside_of_shared_memory": (
        "st.shared.b32 [%r3+{}], 1;", *("768", "772"),
        "access up to 1028, outside of 1024 bytes of shared memory",
    ),
    "before_shared_memory": ("st.shared.b32 [%r3+{}], 1;", *("0", "-4"), "of shared memory"),
    "misaligned_vector": (
        "ld.global.v2.b32 {{%r4, %r5}}, [%rd1+{}];", *("8", "4"),
        "wrong, at lines.py:1:5: misaligned access of 8 bytes",
    ),
    "misaligned_shared_access": ("st.shared.b64 [{}], %rd1;", *("8", "4"), "misaligned"),
    "device_assert": (
        "@!%p1 bra END;\n{}\nmov.b64 %rd4, _$_str;\n{{\n.param .b64 param0;\n"
        "st.param.b64 [param0], %rd4;\ncall.uni __assertfail, (param0);\n}}\nEND:",
        *("bra END;", ""), "wrong, at lines.py:7:5: device assert",
    ),
    "trap": ("@%p{} trap;", *("4", "1"), "trap"),
    "does_not_end": (
        "add.s32 %r4, %r1, 0;\nAGAIN:\nadd.s32 %r4, %r4, {};\nsetp.lt.u32 %p5, %r4, 100;\n"
        "@%p5 bra AGAIN;",
        *("1", "0"), "wrong, at lines.py:5:5: does not end",
    ),
}  # fmt: skip


def body_of(text, filling):
    return text.replace("{}", filling).replace("{{", "{").replace("}}", "}")


@pytest.mark.parametrize("name", TWINS)
def test_findings(name):
    text, right, wrong, said, options = TWINS[name]
    options = dict(options)
    first = options.pop("first", "")
    for seed in range(3):
        assert run(first + body_of(text, right), seed=seed, **options) == []
        findings = run(first + body_of(text, wrong), seed=seed, **options)
        assert findings and all(re.search(said, finding) for finding in findings), findings


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name, monkeypatch):
    text, right, wrong, said = FAULTS[name]
    monkeypatch.setattr(machine, "MOST_BLOCKS", 500)
    # %p4: never
    never = "setp.lt.u32 %p4, %r1, 0; "
    assert run(never + body_of(text, right)) == []
    with pytest.raises(ptx.Fault, match=said):
        run(never + body_of(text, wrong))


def test_who_reads_and_who_writes_in_any_order_of_programs():
    """Two warps of the writer's own program read after the other program did."""
    body = """
        ld.global.b32 %r4, [%rd1];
        bar.sync 0;
        and.pred %p4, %p2, %p3;
        @%p4 st.global.b32 [%rd1], 5;
    """
    said = {tuple(run(body, programs=2, seed=seed)) for seed in range(8)}
    place = "by two programs: wrong, memory at lines.py"
    assert said == {
        (f"read and write {place}:4:5 after lines.py:1:5",),
        (f"write and read {place}:1:5 after lines.py:4:5",),
    }


@pytest.mark.parametrize("writer", [0, 1, 31, 32, 63])
def test_a_writer_among_many_readers(writer):
    """Whoever it is: of those who read at once one can be noted."""
    body = f"""
        @%p2 st.shared.b32 [0], 1;
        bar.sync 0;
        ld.shared.b32 %r4, [0];
        {{}}
        setp.eq.b32 %p5, %r1, {writer};
        @%p5 st.shared.b32 [0], 2;
    """
    assert run(body.format("bar.sync 0;")) == []
    for threads, by in ((32, "two threads of a warp"), (64, "two warps")):
        if writer < threads:
            findings = run(body.format(""), threads=threads)
            assert any(re.search(f"read and write by {by}", text) for text in findings), findings


def read_by(*threads):
    return "".join(
        f"setp.eq.b32 %p5, %r1, {thread};\n@%p5 ld.shared.b32 %r4, [0];\n" for thread in threads
    )


@pytest.mark.parametrize(
    "readers, found",
    [
        ([0], None),
        ([0, 0], None),
        ([0, 5, 0], "two threads of a warp"),
        ([5, 0, 0], "two threads of a warp"),
        ([0, 5, 40, 0], "two warps"),
        ([0, 40, 0], "two warps"),
        ([0, 0, 40], "two warps"),
        ([40, 0, 0], "two warps"),
        ([0, 40, 63, 0], "two warps"),
    ],
)
def test_readers_in_turns(readers, found):
    """Thread 0 writes, which may have read first and last."""
    before = "@%p2 st.shared.b32 [0], 1;\nbar.sync 0;\n"
    findings = run(before + read_by(*readers) + "@%p2 st.shared.b32 [0], 2;")
    assert bool(findings) == (found is not None)
    assert found is None or f"read and write by {found}" in " ".join(findings)
    # a barrier lies behind all of them but the writer
    body = before + read_by(*readers) + "bar.sync 0;\n" + read_by(0) + "@%p2 st.shared.b32 [0], 2;"
    assert run(body) == []


def test_readers_that_met_may_be_overwritten():
    """By their own warp; not before another warp, which read in between."""
    body = (
        "@%p2 st.shared.b32 [0], 1;\nbar.sync 0;\nsetp.lt.u32 %p5, %r1, 32;\n"
        "{} ld.shared.b32 %r4, [0];\nbar.warp.sync -1;\n@%p2 st.shared.b32 [0], 2;"
    )
    assert run(body.replace("{}", "@%p5")) == []
    findings = run(body.replace("{}", ""))
    assert findings and "read and write by two warps" in findings[0]


def test_neighbours_do_not_disturb_each_other():
    """Bytes of one word, by two warps and by two programs; the same value, by all."""
    assert run("st.shared.b8 [%r1], %rs1;\nld.shared.b8 %rs2, [%r1];") == []
    body = "mov.b16 %rs1, 1;\ncvt.u64.u32 %rd5, %r2;\nadd.s64 %rd5, %rd1, %rd5;\n"
    assert run(body + "@%p2 st.global.b8 [%rd5], %rs1;", programs=5) == []
    memory = np.full(8, 6, np.uint32)
    assert run("st.global.b32 [%rd1], 6;", memory, programs=3) == []
    assert run("st.shared.b32 [0], 6;\nst.shared.b32 [0], 6;") == []


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomic_sums(space):
    """Of all threads and programs; each finds another number there, in any order."""
    at = "[%rd1]" if space == "global" else "[512]"
    clear = "@%p2 st.shared.b32 [512], 0;\nbar.sync 0;\n" if space == "shared" else ""
    place = "mad.lo.s32 %r4, %r2, 64, %r1;\nadd.s32 %r4, %r4, 1;\nmad.wide.u32 %rd4, %r4, 4, %rd1;"
    body = f"{clear}atom.{space}.relaxed.add.u32 %r5, {at}, 1;\n{place}\nst.global.b32 [%rd4], %r5;"
    orders = []
    for seed in range(2):
        memory = np.zeros(256, np.uint32)
        assert run(body, memory, programs=3, seed=seed) == []
        parts = [memory[1:193]] if space == "global" else np.split(memory[1:193], 3)
        assert all(sorted(part) == list(range(len(part))) for part in parts)
        orders.append(memory[1:193].tolist())
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_atomic_sums_of_floats():
    memory = np.zeros(4, np.float32)
    assert run("red.global.gpu.relaxed.add.f32 [%rd1], 0f3FC00000;", memory) == []
    assert memory[0] == 64 * 1.5


def test_counts():
    """Of each warp the instructions that any lane runs, sectors of 32 bytes, passes over banks."""
    memory, counts = np.zeros(64 * 32, np.uint32), ptx.Counts()
    begin = memory.ctypes.data
    begin += -begin % 128
    body = """
        @%p1 bra HALF;
        st.shared.b32 [%r3], %r1;
        HALF:
        shl.b32 %r4, %r1, 4;
        st.shared.v2.b32 [%r4+2048], {%r1, %r1};
        shl.b32 %r4, %r1, 3;
        st.shared.v2.b32 [%r4], {%r1, %r1};
        ld.global.b32 %r5, [%rd2];
        ld.global.b32 %r5, [%rd1+4];
        shl.b32 %r4, %r1, 6;
        cvt.u64.u32 %rd4, %r4;
        add.s64 %rd4, %rd4, %rd1;
        ld.global.v2.b32 {%r5, %r6}, [%rd4];
        atom.global.add.u32 %r5, [%rd1], 1;
    """
    extents = [ptx.Extent(begin, begin + 64 * 64, "memory")]
    ptx.launch(kernel(body), (3, 1, 1), [begin, 0], extents, Counter(), shared=4096, races=False,
               counts=counts)  # fmt: skip
    assert counts.programs == {"wrong": 3}

    def of(line, space):
        key = "wrong", f"lines.py:{line}:5", space
        return counts.taken[key] / 3, counts.least[key] / 3

    def run_by(line):
        return counts.instructions["wrong", f"lines.py:{line}:5"] / 3

    assert [run_by(n) for n in (1, 2, 5, 7)] == [2, 2, 2, 2]
    assert of(2, "shared") == (2, 2)
    # 16 bytes apart sixteen lanes at a time meet in every other pair of banks, 8 apart in none
    assert of(5, "shared") == (8, 4) and of(7, "shared") == (4, 4)
    assert of(8, "global") == (8, 8) and of(9, "global") == (2, 2)
    assert of(13, "global") == (64, 16) and of(14, "global") == (2, 2)
    header, *lines = counts.table(20)
    assert re.fullmatch(
        r"wrong: 3 programs; a program: \d+\.0 instructions, 76\.0 sectors \(28\.0\), "
        r"14\.0 passes \(10\.0\)",
        header,
    )
    assert "           2.0 lines.py:13:5, 64.0 sectors (16.0)" in lines
    assert "a row: " in counts.table(0, 6)[0]


def test_scratch_is_written_by_an_earlier_launch():
    memory = np.zeros(64, np.uint32)
    begin = memory.ctypes.data
    scratch = [ptx.Scratch(begin, np.ones(memory.nbytes, np.uint8))]
    findings = Counter()
    for body in ("@%p1 st.global.b32 [%rd2], 1;", "@%p1 ld.global.b32 %r4, [%rd2];"):
        extents = [ptx.Extent(begin, begin + memory.nbytes, "memory")]
        ptx.launch(kernel(body), (1, 1, 1), [begin, 0], extents, findings, scratch=scratch)
    assert not findings
    ptx.launch(kernel("ld.global.b32 %r4, [%rd2];"), (1, 1, 1), [begin, 0], extents, findings,
               scratch=scratch)  # fmt: skip
    assert "read of memory that nobody wrote" in next(iter(findings))


def test_several_tensors():
    """An instruction that accesses two of them, the gap between them, and two that overlap."""
    memory = np.zeros(256, np.uint32)
    begin = memory.ctypes.data
    body = """
        selp.b64 %rd4, {}, 0, %p1;
        add.s64 %rd4, %rd2, %rd4;
        st.global.b32 [%rd4], %r2;
    """

    def findings(offset, *pieces):
        extents = [ptx.Extent(begin + 4 * i, begin + 4 * j, name) for i, j, name in pieces]
        found = Counter()
        ptx.launch(kernel(body.format(offset)), (2, 1, 1), [begin, 0], extents, found)
        return sorted(found)

    apart = ((128, 256, "high"), (0, 64, "low"))
    said = "two writes by two programs: wrong, {} at lines.py:3:5 after lines.py:3:5"
    assert findings(512, *apart) == [said.format("high"), said.format("low")]
    with pytest.raises(ptx.Fault, match="thread 0 accesses 4 bytes .* outside of all tensors"):
        findings(256, *apart)
    assert findings(0, (16, 17, "b"), (0, 64, "a")) == [said.format("a|b")]
    assert findings(0, (16, 64, "b"), (0, 17, "a")) == [said.format("a|b")]


def test_the_place_of_what_was_inlined():
    memory = np.zeros(64, np.uint32)
    begin = memory.ctypes.data
    text = kernel("st.global.b32 [%rd1], %r1;").replace(
        " 1 1 5 //", " 1 1 5, function_name $L__info_string0, inlined_at 1 90 30 //"
    )
    extents, findings = [ptx.Extent(begin, begin + memory.nbytes, "memory")], Counter()
    ptx.launch(text, (1, 1, 1), [begin, 0], extents, findings)
    said = "an instruction stores two values at once: wrong, at lines.py:1:5 in kernels.py:90"
    assert list(findings) == [said]


def test_a_tensor_of_which_most_is_not_there():
    memory = np.zeros(64, np.uint32)
    begin = memory.ctypes.data
    extents, findings = [ptx.Extent(begin, begin + 2**40, "memory")], Counter()
    ptx.launch(kernel("st.global.b32 [%rd2], 1;"), (1, 1, 1), [begin, 0], extents, findings)
    assert not findings and (memory == 1).all()


def test_registers_that_nobody_wrote():
    memory = np.zeros(64, np.uint32)
    run("st.global.b32 [%rd2], %r30;", memory)
    assert np.isnan(memory.view(np.float32)).all()
    run("mov.b32 %r5, 0;\n@%p30 mov.b32 %r5, 1;\nst.global.b32 [%rd2], %r5;", memory)
    assert sorted(set(memory.tolist())) == [0, 1]
    # only where the guard holds
    run("@%p1 mov.b32 %r31, 8;\nst.global.b32 [%rd2], %r31;", memory)
    assert (memory[:16] == 8).all() and np.isnan(memory[16:].view(np.float32)).all()
    run("@%p1 mov.b32 %r31, 8;\n@!%p1 mov.b32 %r31, 9;\nst.global.b32 [%rd2], %r31;", memory)
    assert memory.tolist() == [8] * 16 + [9] * 48


def test_lanes_go_their_own_ways():
    """Steps of Collatz's problem, of each thread its own number of them, and back together."""
    memory = np.zeros(64, np.uint32)
    body = """
        add.s32 %r4, %r1, 1;
        mov.b32 %r5, 0;
        bra.uni TEST;
        AGAIN:
        and.b32 %r6, %r4, 1;
        setp.eq.b32 %p5, %r6, 0;
        @%p5 bra EVEN;
        mad.lo.s32 %r4, %r4, 3, 1;
        bra NEXT;
        EVEN:
        shr.u32 %r4, %r4, 1;
        NEXT:
        add.s32 %r5, %r5, 1;
        TEST:
        setp.gt.u32 %p6, %r4, 1;
        @%p6 bra AGAIN;
        shfl.sync.bfly.b32 %r7, %r5, 0, 31, -1;
        st.global.b32 [%rd2], %r7;
    """

    def steps(n):
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    assert run(body, memory) == []
    assert memory.tolist() == [steps(n) for n in range(1, 65)]


def test_a_barrier_that_threads_reach_from_both_sides():
    body = """
        st.shared.b32 [%r3], %r1;
        @%p1 bra LATER;
        BARRIER:
        bar.sync 0;
        xor.b32 %r4, %r3, 128;
        ld.shared.b32 %r5, [%r4];
        st.global.b32 [%rd2], %r5;
        bra END;
        LATER:
        bra BARRIER;
        END:
    """
    memory = np.zeros(64, np.uint32)
    assert run(body, memory) == []
    assert memory.tolist() == [n ^ 32 for n in range(64)]


def test_parameters_and_places():
    memory = np.zeros(192, np.uint32)
    body = """
        {
        .reg .b32 %r1, own;
        ld.param.b32 %r1, [wrong_param_1];
        mov.u32 own, %nctaid.x;
        mad.lo.s32 own, own, 100, %r1;
        mov.b32 %r4, own;
        }
        mov.u32 %r5, %ntid.x;
        mad.lo.s32 %r6, %r2, %r5, %r1;
        mad.wide.u32 %rd4, %r6, 4, %rd1;
        mov.u32 %r7, %laneid;
        add.s32 %r8, %r4, %r7;
        st.global.b32 [%rd4], %r8;
    """
    assert run(body, memory, programs=3) == []
    assert memory.tolist() == [307 + n % 32 for n in range(192)]


@pytest.mark.parametrize(
    "text",
    [
        "sin.approx.f32 %r4, %r5;",
        "add.sat.s32 %r4, %r5, %r6;",
        "fma.rm.f64 %rd4, %rd5, %rd6, %rd7;",
        "mul.rz.f32 %r4, %r5, %r6;",
        "cvt.rz.f16.f32 %rs4, %r5;",
        "atom.global.acq_rel.add.u32 %r4, [%rd1], 1;",
        "atom.global.cas.b32 %r4, [%rd1], 1, 2;",
        "setp.lt.and.f16x2 %p8|%p9, %r4, %r5, %p7;",
        "mul.hi.u64 %rd4, %rd5, %rd6;",
        "ld.b32 %r4, [%rd1];",
        "bar.sync 1, 32;",
        "mov.u32 %r4, %clock;",
        "call.uni printf, (param0);",
    ],
)
def test_what_it_does_not_know_is_an_error(text):
    with pytest.raises(NotImplementedError, match=re.escape(text.rstrip(";"))):
        run(text)


def test_grids_that_no_gpu_takes():
    for grid in ((0, 1, 1), (1, 65536, 1), (1, 1, 65536)):
        with pytest.raises(ValueError, match="no GPU takes a grid"):
            ptx.launch(kernel(""), grid, [0, 0], [], Counter())


# Instructions

BITS = {16: np.uint16, 32: np.uint32, 64: np.uint64}
NAMES = {16: "%rs", 32: "%r", 64: "%rd"}


def calculate(text, result_bits, *given):
    """The bits that an instruction makes of these; {0} is its result, {1} and so on its sources.

    A result of one bit comes as 0 or 1.
    """
    count = len(given[0])
    padded = -(-count // 32) * 32
    arrays = [np.zeros(padded, np.uint64) for _ in range(len(given) + 1)]
    for array, x in zip(arrays[1:], given, strict=True):
        array[:count] = x
    memory = np.concatenate(arrays)
    lines = ["mad.lo.s32 %r4, %r2, 32, %r1;", "mad.wide.u32 %rd4, %r4, 8, %rd1;"]
    names = ["%p9" if result_bits == 1 else f"{NAMES[result_bits]}20"]
    for n, x in enumerate(given, 1):
        bits = x.dtype.itemsize * 8
        names.append(f"{NAMES[bits]}{20 + n}")
        lines.append(f"ld.global.b{bits} {names[n]}, [%rd4+{8 * n * padded}];")
    lines.append(text.format(*names))
    if result_bits == 1:
        lines.append("selp.b32 %r20, 1, 0, %p9;")
    stored = max(result_bits, 32) if result_bits == 1 else result_bits
    lines.append(f"st.global.b{stored} [%rd4], {NAMES[stored]}20;")
    assert run("\n".join(lines), memory, threads=32, programs=padded // 32) == []
    return memory[:count].astype(BITS[stored])


def columns(rows, *types):
    return [np.array(x, t) for x, t in zip(zip(*rows, strict=True), types, strict=True)]


def edges(bits):
    half = 1 << (bits - 1)
    some = [0, 1, 2, 3, 5, 7, bits - 1, bits, bits + 1, half - 1, half, half + 1, 2 * half - 2]
    return [*some, 2 * half - 1, 0x9E3779B97F4A7C15 >> (64 - bits)]


def signed(x, bits):
    return x - (1 << bits) if x >> (bits - 1) else x


def quotient(a, b):
    return int(Fraction(a, b))


# name -> the same in Python's integers, what its sources are
INTEGERS = {
    "add.{s}": lambda a, b: a + b,
    "sub.{s}": lambda a, b: a - b,
    "mul.lo.{s}": lambda a, b: a * b,
    "min.{s}": min,
    "max.{s}": max,
    "min.{u}": min,
    "max.{u}": max,
    "div.{s}": quotient,
    "div.{u}": quotient,
    "rem.{s}": lambda a, b: a - quotient(a, b) * b,
    "rem.{u}": lambda a, b: a % b,
    "and.{b}": lambda a, b: a & b,
    "or.{b}": lambda a, b: a | b,
    "xor.{b}": lambda a, b: a ^ b,
    "neg.{s}": lambda a: -a,
    "abs.{s}": abs,
    "not.{b}": lambda a: ~a,
    "mad.lo.{s}": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name, bits):
    function, kind = INTEGERS[name], re.search(r"\{(.)\}", name)[1]
    sources = function.__code__.co_argcount if hasattr(function, "__code__") else 2
    sources = 1 if function is abs else sources
    given = list(itertools.product(*[edges(bits)[:: 3 if sources == 3 else 1]] * sources))
    if name.startswith(("div", "rem")):
        given = [(a, b) for a, b in given if b != 0]
    mask = (1 << bits) - 1
    read = (lambda x: signed(x, bits)) if kind == "s" else (lambda x: x)
    expected = [function(*map(read, row)) & mask for row in given]
    text = name.format(**{k: f"{k}{bits}" for k in "sub"})
    text += " {0}, " + ", ".join(f"{{{n}}}" for n in range(1, sources + 1)) + ";"
    found = calculate(text, bits, *np.array(given, BITS[bits]).T.copy())
    assert found.tolist() == expected


@pytest.mark.parametrize("kind", ["s", "u"])
@pytest.mark.parametrize("bits", [16, 32])
def test_products_of_twice_the_width(bits, kind):
    given = list(itertools.product(edges(bits), edges(bits)))
    read = (lambda x: signed(x, bits)) if kind == "s" else (lambda x: x)
    products = [read(a) * read(b) for a, b in given]
    a, b = np.array(given, BITS[bits]).T.copy()
    wide, mask = 2 * bits, (1 << 2 * bits) - 1
    found = calculate(f"mul.wide.{kind}{bits} {{0}}, {{1}}, {{2}};", wide, a, b)
    assert found.tolist() == [x & mask for x in products]
    found = calculate(f"mul.hi.{kind}{bits} {{0}}, {{1}}, {{2}};", bits, a, b)
    assert found.tolist() == [(x >> bits) & ((1 << bits) - 1) for x in products]
    # a number beside it is as wide as the sum
    found = calculate(f"mad.wide.{kind}{bits} {{0}}, {{1}}, {{2}}, -3;", wide, a, b)
    assert found.tolist() == [(x - 3) & mask for x in products]


@pytest.mark.parametrize("bits", BITS)
def test_shifts(bits):
    by = [0, 1, bits - 1, bits, bits + 1, 64, 255, 2**31, 2**32 - 1]
    given = list(itertools.product(edges(bits), by))
    a, n = columns(given, BITS[bits], np.uint32)
    mask = (1 << bits) - 1
    for name, function in {
        f"shl.b{bits}": lambda a, n: 0 if n > 64 else (a << n) & mask,
        f"shr.u{bits}": lambda a, n: a >> n,
        f"shr.s{bits}": lambda a, n: (signed(a, bits) >> n) & mask,
    }.items():
        found = calculate(f"{name} {{0}}, {{1}}, {{2}};", bits, a, n)
        assert found.tolist() == [function(*row) for row in given]


@pytest.mark.parametrize("bits", [32, 64])
def test_counted_bits(bits):
    given = np.array(edges(bits), BITS[bits])
    for text, function in {
        f"popc.b{bits}": int.bit_count,
        f"clz.b{bits}": lambda x: bits - x.bit_length(),
        f"bfind.shiftamt.u{bits}": lambda x: bits - x.bit_length() if x else 0xFFFFFFFF,
    }.items():
        found = calculate(f"{text} {{0}}, {{1}};", 32, given)
        assert found.tolist() == [function(x) for x in edges(bits)]
    found = calculate(f"brev.b{bits} {{0}}, {{1}};", bits, given)
    assert found.tolist() == [int(f"{x:0{bits}b}"[::-1], 2) for x in edges(bits)]


def test_funnel_shift():
    given = list(itertools.product(edges(32), edges(32), [0, 1, 31, 32, 33, 2**32 - 1]))
    low, high, by = columns(given, np.uint32, np.uint32, np.uint32)
    found = calculate("shf.l.wrap.b32 {0}, {1}, {2}, {3};", 32, low, high, by)
    expected = [((b << 32 | a) << (n & 31)) >> 32 & 0xFFFFFFFF for a, b, n in given]
    assert found.tolist() == expected


@pytest.mark.parametrize("bits", [32, 64])
def test_inserted_fields(bits):
    """Bit by bit, as the manual describes it."""
    where = [0, 1, 5, 31, 32, 33, 63, 64, 255, 256 + 3]
    given = list(itertools.product(edges(bits)[::4], edges(bits)[1::4], where, where))

    def inserted(a, b, position, length):
        position, length = position & 255, length & 255
        for i in range(min(length, bits)):
            if position + i < bits:
                b = b & ~(1 << position + i) | (a >> i & 1) << position + i
        return b

    a, b, position, length = columns(given, BITS[bits], BITS[bits], np.uint32, np.uint32)
    text = f"bfi.b{bits} {{0}}, {{1}}, {{2}}, {{3}}, {{4}};"
    found = calculate(text, bits, a, b, position, length)
    assert found.tolist() == [inserted(*row) for row in given]


@pytest.mark.parametrize("kind, bits", [("u", 32), ("s", 32), ("u", 64), ("s", 64)])
def test_fields(kind, bits):
    """Bit by bit, as the manual describes it."""
    where = [0, 1, 5, 31, 32, 33, 63, 64, 255, 256 + 3]
    given = list(itertools.product(edges(bits)[::2], where, where))

    def field(a, position, length):
        position, length, top = position & 255, length & 255, bits - 1
        sign = a >> min(position + length - 1, top) & 1 if kind == "s" and length else 0
        taken = [
            a >> (position + i) & 1 if i < length and position + i <= top else sign
            for i in range(bits)
        ]
        return sum(bit << i for i, bit in enumerate(taken))

    a, position, length = columns(given, BITS[bits], np.uint32, np.uint32)
    found = calculate(f"bfe.{kind}{bits} {{0}}, {{1}}, {{2}}, {{3}};", bits, a, position, length)
    assert found.tolist() == [field(*row) for row in given]


# prmt: by its mode what the manual lists, from the upper byte down, for selectors 0 to 3
MODES = {
    "f4e": ["3210", "4321", "5432", "6543"],
    "b4e": ["5670", "6701", "7012", "0123"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"],
    "rc16": ["1010", "3232", "1010", "3232"],
}


def test_permuted_bytes():
    a, b = 0x83427F01, 0x0490FF00
    given = struct.pack("<II", a, b)
    selectors = [0x7701, 0x3210, 0x7654, 0xFEDC, 0xBA98, 0x8080, 0x0FF0, 0x5A5A]

    def byte(choice):
        taken = given[choice & 7]
        return (255 if taken & 128 else 0) if choice & 8 else taken

    expected = [
        struct.unpack("<I", bytes(byte(s >> i & 15) for i in (0, 4, 8, 12)))[0] for s in selectors
    ]
    a, b = (np.full(8, x, np.uint32) for x in (a, b))
    found = calculate("prmt.b32 {0}, {1}, {2}, {3};", 32, a, b, np.array(selectors, np.uint32))
    assert found.tolist() == expected
    for mode, rows in MODES.items():
        selector = np.array([0, 1, 2, 3, 4, 5, 6, 7], np.uint32)
        expected = [bytes(given[int(c)] for c in reversed(row)) for row in rows * 2]
        found = calculate(f"prmt.b32.{mode} {{0}}, {{1}}, {{2}}, {{3}};", 32, a, b, selector)
        assert found.tobytes() == b"".join(expected)


def test_packing():
    lower, upper = (np.array(edges(16), np.uint16) + x for x in (0, 5))
    found = calculate("mov.b32 {0}, {{{1}, {2}}};", 32, lower, upper)
    assert found.tolist() == (lower + (upper.astype(np.uint32) << 16)).tolist()
    wide = np.array(edges(64), np.uint64)
    found = calculate("mov.b64 {{_, {0}}}, {1};", 32, wide)
    assert found.tolist() == [x >> 32 for x in edges(64)]
    found = calculate("mov.b64 {{%rs30, _, {0}, _}}, {1};", 16, wide)
    assert found.tolist() == [x >> 32 & 0xFFFF for x in edges(64)]


def test_loads_and_stores_of_narrow_integers():
    memory = np.zeros(256, np.uint32)
    memory.view(np.uint8)[:64] = np.arange(64) * 5
    body = """
        cvt.u64.u32 %rd4, %r1;
        add.s64 %rd4, %rd1, %rd4;
        ld.global.{}8 %r5, [%rd4];
        st.global.b32 [%rd2+256], %r5;
        st.global.b8 [%rd4+512], %r5;
    """
    expected = np.arange(64) * 5 % 256
    for kind in "us":
        assert run(body.replace("{}", kind), memory) == []
        read = expected.astype(np.int8).astype(np.int32) if kind == "s" else expected
        assert (memory[64:128].view(np.int32) == read).all()
        assert (memory.view(np.uint8)[512:576] == expected).all()


# Exact arithmetic: precision, exponents of the least normal and the largest numbers, bits

FORMATS = {
    "f16": (11, -14, 15, 16),
    "bf16": (8, -126, 127, 16),
    "f32": (24, -126, 127, 32),
    "f64": (53, -1022, 1023, 64),
}


def number(bits, name):
    if name == "bf16":
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    return struct.unpack({"f16": "<e", "f32": "<f", "f64": "<d"}[name], _bytes(bits, name))[0]


def _bytes(bits, name):
    return bits.to_bytes(FORMATS[name][3] // 8, "little")


def nearest(value, name, negative_zero=False):
    """The bits of the number of a format beside a fraction, of two the even one."""
    precision, least, largest, bits = FORMATS[name]
    if value == 0:
        return negative_zero << (bits - 1)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, least) - precision + 1)
    count = round(size / unit)  # Python rounds halves to even
    # a carry into the next exponent comes by itself: counts of neighbours are neighbours
    found = count + (max(exponent, least) - least) * (1 << precision - 1)
    infinite = (largest - least + 2) << precision - 1
    return min(found, infinite) | (value < 0) << (bits - 1)


def special(name):
    """The bits of infinity, and what arithmetic makes of NaN."""
    precision, least, largest, bits = FORMATS[name]
    nan = (1 << bits - 1) - 1 if bits < 64 else 0x7FF8 << 48
    return (largest - least + 2) << precision - 1, nan


def float_edges(name):
    precision, least, largest, bits = FORMATS[name]
    infinity, nan = special(name)
    one = (-least + 1 << precision - 1) - (1 << precision - 1)
    tiny = 1 << precision - 1
    some = [0, 1, 2, tiny - 1, tiny, tiny + 1, one - 1, one, one + 1, one + tiny, one + tiny // 2]
    some += [one + 12345 % tiny, infinity - 1, infinity, nan, infinity + 1, one // 2, one * 3 // 2]
    return some + [x | 1 << bits - 1 for x in some]


OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": lambda a, b, c: a * b + c,
}


def exact(operation, numbers, name, flush=False):
    """What an operation returns that rounds once. Numbers are Python's floats."""
    infinity, nan = special(name)
    sign, tiny = 1 << FORMATS[name][3] - 1, 2.0 ** FORMATS[name][1]
    if flush:
        numbers = [math.copysign(0, x) if abs(x) < tiny else x for x in numbers]
    by_zero = operation == "div" and numbers[1] == 0
    if by_zero or not all(map(math.isfinite, numbers)):
        # infinities and NaN, in which nothing is rounded; large products are no infinities
        scaled = [x if not math.isfinite(x) or x == 0 else math.copysign(1, x) for x in numbers]
        with np.errstate(all="ignore"):
            found = OPERATIONS[operation](*map(np.float64, scaled))
        if np.isnan(found):
            return nan
        if np.isinf(found):
            return infinity | (sign if found < 0 else 0)
        return sign if np.signbit(found) else 0
    value = OPERATIONS[operation](*map(Fraction, numbers))
    minus = [math.copysign(1, x) < 0 for x in numbers]
    if operation in ("add", "sub"):
        negative_zero = minus[0] and minus[1] == (operation == "add")
    else:
        negative_zero = minus[0] != minus[1]
        negative_zero = negative_zero and (operation != "fma" or minus[2])
    found = nearest(value, name, negative_zero)
    if flush and 0 < found & ~sign < 1 << FORMATS[name][0] - 1:
        found &= sign
    return found


def arguments(names, count=400):
    """Of all combinations of edges some, and of random bits as many."""
    rows = list(itertools.product(*(float_edges(name) for name in names)))
    generator = np.random.default_rng(len(rows))
    if len(rows) > 2 * count:
        rows = [rows[i] for i in generator.choice(len(rows), 2 * count, replace=False)]
    near = [
        [nearest(Fraction(float(x)), name) for x, name in zip(row, names, strict=True)]
        for row in generator.normal(size=(count, len(names)))
    ]
    return rows + near


def numpy_bits(rows, names):
    return columns(rows, *(BITS[FORMATS[name][3]] for name in names))


@pytest.mark.parametrize(
    "text, operation, names, name",
    [
        ("add.f32", "add", ["f32"] * 2, "f32"),
        ("add.rn.f64", "add", ["f64"] * 2, "f64"),
        ("add.ftz.f32", "add", ["f32"] * 2, "f32"),
        ("add.bf16", "add", ["bf16"] * 2, "bf16"),
        ("sub.f16", "sub", ["f16"] * 2, "f16"),
        ("sub.rn.f32.bf16", "sub", ["bf16", "f32"], "f32"),
        ("add.rn.f32.f16", "add", ["f16", "f32"], "f32"),
        ("sub.f32", "sub", ["f32"] * 2, "f32"),
        ("mul.f32", "mul", ["f32"] * 2, "f32"),
        ("mul.ftz.f32", "mul", ["f32"] * 2, "f32"),
        ("mul.f64", "mul", ["f64"] * 2, "f64"),
        ("mul.f16", "mul", ["f16"] * 2, "f16"),
        ("mul.bf16", "mul", ["bf16"] * 2, "bf16"),
        ("div.rn.f32", "div", ["f32"] * 2, "f32"),
        ("div.rn.f64", "div", ["f64"] * 2, "f64"),
        ("fma.rn.f32", "fma", ["f32"] * 3, "f32"),
        ("fma.rn.ftz.f32", "fma", ["f32"] * 3, "f32"),
        ("fma.rn.f64", "fma", ["f64"] * 3, "f64"),
        ("fma.rn.f32.bf16", "fma", ["bf16", "bf16", "f32"], "f32"),
        ("fma.rn.bf16", "fma", ["bf16"] * 3, "bf16"),
        ("fma.rn.f16", "fma", ["f16"] * 3, "f16"),
    ],
)
def test_one_rounding(text, operation, names, name):
    rows = arguments(names)
    if operation == "fma" and name == "f32":
        # a product half way between two numbers, and what decides to which one it goes
        half, one, least = 0x33800000, 0x3F800000, 1
        rows += [(one + 1, half + 1, x) for x in (least, least | 1 << 31)]
        rows += [(one + 2, one + 1, x) for x in (least, least | 1 << 31, 0x0D000000, 0x8D000000)]
        rows += [(half, 0x3F800001, x) for x in (one, one + 1, one | 1 << 31)]
        rows = [row for row in rows if names[0] == "f32"] or arguments(names)
    places = ", ".join(f"{{{n}}}" for n in range(len(names) + 1))
    found = calculate(f"{text} {places};", FORMATS[name][3], *numpy_bits(rows, names))
    for row, bits in zip(rows, found.tolist(), strict=True):
        numbers = [number(x, of) for x, of in zip(row, names, strict=True)]
        assert bits == exact(operation, numbers, name, "ftz" in text), (text, numbers)


def test_rounded_down():
    rows = arguments(["f32"] * 3)
    found = calculate("fma.rm.f32 {0}, {1}, {2}, {3};", 32, *numpy_bits(rows, ["f32"] * 3))
    for row, bits in zip(rows, found.tolist(), strict=True):
        numbers = [number(x, "f32") for x in row]
        if not all(map(math.isfinite, numbers)):
            assert bits == exact("fma", numbers, "f32")
            continue
        value, below = OPERATIONS["fma"](*map(Fraction, numbers)), number(bits, "f32")
        with np.errstate(over="ignore"):
            above = np.nextafter(np.float32(below), np.float32(np.inf)).item()
        assert Fraction(below) <= value if math.isfinite(below) else below < 0 or value > 2**127
        assert not math.isfinite(above) or value < Fraction(above)


def test_saturation():
    given = np.array([-np.inf, -1, -0.0, 0.25, 1, 1.5, np.inf, np.nan], np.float32)
    expected = [0, 0, 0, 0.25, 1, 1, 1, 0]
    found = calculate("cvt.sat.f32.f32 {0}, {1};", 32, given.view(np.uint32))
    assert found.view(np.float32).tolist() == expected
    one = np.ones_like(given).view(np.uint32)
    found = calculate("mul.sat.f32 {0}, {1}, {2};", 32, given.view(np.uint32), one)
    assert found.view(np.float32).tolist() == expected


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma"])
def test_two_numbers_in_a_register(operation):
    rows = arguments(["f32"] * (3 if operation == "fma" else 2), 200)
    rn = ".rn" if operation == "fma" else ""
    lower, upper = rows, rows[::-1]
    pairs = [
        np.array(a, np.uint64) | np.array(b, np.uint64) << np.uint64(32)
        for a, b in zip(zip(*lower, strict=True), zip(*upper, strict=True), strict=True)
    ]
    places = ", ".join(f"{{{n}}}" for n in range(len(pairs) + 1))
    found = calculate(f"{operation}{rn}.f32x2 {places};", 64, *pairs)
    expected = [exact(operation, [number(x, "f32") for x in row], "f32") for row in rows]
    assert [x & 0xFFFFFFFF for x in found.tolist()] == expected
    assert [x >> 32 for x in found.tolist()] == expected[::-1]


def extremum(largest, a, b, name, keep_nan):
    """By the order of the bits: -0 below +0."""
    infinity, nan = special(name)
    sign = 1 << FORMATS[name][3] - 1
    is_nan = [x & ~sign > infinity for x in (a, b)]
    if all(is_nan) or (keep_nan and any(is_nan)):
        return nan
    if any(is_nan):
        return b if is_nan[0] else a
    return (max if largest else min)(a, b, key=lambda x: ~(x & ~sign) if x & sign else x)


@pytest.mark.parametrize("keep_nan", ["", ".NaN"])
@pytest.mark.parametrize("operation", ["max", "min"])
@pytest.mark.parametrize("name", ["f32", "f64", "f16", "bf16", "f16x2", "bf16x2"])
def test_extrema(name, operation, keep_nan):
    part = name.removesuffix("x2")
    rows = list(itertools.product(float_edges(part), repeat=2))
    expected = [extremum(operation == "max", a, b, part, keep_nan != "") for a, b in rows]
    given, bits = numpy_bits(rows, [part] * 2), FORMATS[part][3]
    if part != name:
        given, bits = [x.view(np.uint32) for x in given], 32
    found = calculate(f"{operation}{keep_nan}.{name} {{0}}, {{1}}, {{2}};", bits, *given)
    assert found.view(BITS[FORMATS[part][3]]).tolist() == expected
    if name == "f32":
        a, b = given
        found = calculate(f"{operation}{keep_nan}.f32 {{0}}, {{1}}, {{2}}, {{1}};", 32, a, b)
        assert found.tolist() == expected


@pytest.mark.parametrize("name", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("operation", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons(name, operation):
    """Of NaN nothing is true, unless it ends in u: not even that two are not equal."""
    rows = list(itertools.product(float_edges(name), repeat=2))
    pairs = [(number(a, name), number(b, name)) for a, b in rows]
    compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}.get(
        operation, np.greater if operation == "gt" else np.greater_equal
    )
    nan = [a != a or b != b for a, b in pairs]
    for suffix, of_nan in (("", False), ("u", True)):
        expected = [
            of_nan if n else bool(compare(a, b)) for n, (a, b) in zip(nan, pairs, strict=True)
        ]
        text = f"setp.{operation}{suffix}.{name} {{0}}, {{1}}, {{2}};"
        assert calculate(text, 1, *numpy_bits(rows, [name] * 2)).tolist() == expected
    for text, expected in (("nan", nan), ("num", [not n for n in nan])):
        found = calculate(
            f"setp.{text}.{name} {{0}}, {{1}}, {{2}};", 1, *numpy_bits(rows, [name] * 2)
        )
        assert found.tolist() == expected


def test_comparisons_of_integers_and_predicates():
    rows = list(itertools.product(edges(32), repeat=2))
    a, b = np.array(rows, np.uint32).T.copy()
    for kind, read in (("s", lambda x: signed(x, 32)), ("u", lambda x: x)):
        less = [read(a) < read(b) for a, b in rows]
        text = f"setp.lt.{kind}32 {{0}}, {{1}}, {{2}};"
        assert calculate(text, 1, a, b).tolist() == less
        if kind == "u":
            assert calculate("setp.lo.u32 {0}, {1}, {2};", 1, a, b).tolist() == less
        text = f"setp.lt.{kind}32 %p8|{{0}}, {{1}}, {{2}};"
        assert calculate(text, 1, a, b).tolist() == [not x for x in less]
        odd = "and.b32 %r9, {1}, 1; setp.eq.b32 %p7, %r9, 1;"
        for name, join in (("and", min), ("or", max), ("xor", lambda x, y: x != y)):
            text = f"{odd} setp.lt.{name}.{kind}32 {{0}}, {{1}}, {{2}}, %p7;"
            expected = [join(x, bool(row[0] & 1)) for x, row in zip(less, rows, strict=True)]
            assert calculate(text, 1, a, b).tolist() == expected
            text = f"{odd} setp.lt.{kind}32 %p6, {{1}}, {{2}}; {name}.pred {{0}}, %p6, %p7;"
            assert calculate(text, 1, a, b).tolist() == expected
    flags = "setp.gt.f16x2 %p8|{0}, {1}, {2};"
    halves = np.array([0x3C004000, 0x40003C00, 0x7E003C00], np.uint32)
    assert calculate(flags, 1, halves, np.full(3, 0x3E003E00, np.uint32)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_comparisons_of_pairs(name):
    rows = list(itertools.product(float_edges(name), repeat=2))
    given = [x.view(np.uint32) for x in numpy_bits(rows, [name] * 2)]
    for operation, compare in (("geu", lambda a, b: not a < b), ("lt", lambda a, b: a < b)):
        found = calculate(f"set.{operation}.u32.{name}x2 {{0}}, {{1}}, {{2}};", 32, *given)
        expected = [0xFFFF * compare(number(a, name), number(b, name)) for a, b in rows]
        assert found.view(np.uint16).tolist() == expected


@pytest.mark.parametrize("name", ["f32", "f64", "f16", "bf16"])
def test_signs(name):
    bits, infinity = FORMATS[name][3], special(name)[0]
    sign = 1 << bits - 1
    given = [x for x in float_edges(name) if x & ~sign <= infinity]
    (array,) = numpy_bits([(x,) for x in given], [name])
    assert calculate(f"neg.{name} {{0}}, {{1}};", bits, array).tolist() == [x ^ sign for x in given]
    assert calculate(f"abs.{name} {{0}}, {{1}};", bits, array).tolist() == [
        x & ~sign for x in given
    ]
    if bits > 16:
        found = calculate(f"copysign.{name} {{0}}, {{1}}, {{2}};", bits, array, array[::-1].copy())
        expected = [(a & sign) | (b & ~sign) for a, b in zip(given, given[::-1], strict=True)]
        assert found.tolist() == expected


@pytest.mark.parametrize(
    "source, target",
    [
        ("f32", "f16"),
        ("f32", "bf16"),
        ("f64", "f32"),
        ("f16", "f32"),
        ("bf16", "f32"),
        ("f32", "f64"),
    ],
)
def test_conversions_of_floats(source, target):
    given = [row[0] for row in arguments([source], 2000)]
    (array,) = numpy_bits([(x,) for x in given], [source])
    rounds = ".rn" if FORMATS[target][0] < FORMATS[source][0] else ""
    found = calculate(f"cvt{rounds}.{target}.{source} {{0}}, {{1}};", FORMATS[target][3], array)
    infinity, nan = special(target)
    sign = 1 << FORMATS[target][3] - 1
    for bits, result in zip(given, found.tolist(), strict=True):
        x = number(bits, source)
        if math.isfinite(x):
            expected = nearest(Fraction(x), target, math.copysign(1, x) < 0)
        else:
            expected = nan if math.isnan(x) else infinity | (sign if x < 0 else 0)
        assert result == expected, x
    if target == "bf16":
        theirs = torch.from_numpy(array.view(np.float32)).bfloat16().view(torch.int16).numpy()
        finite = np.isfinite(array.view(np.float32))
        assert (found == theirs.view(np.uint16))[finite].all()
        other = array[::-1].copy()
        pairs = calculate("cvt.rn.bf16x2.f32 {0}, {1}, {2};", 32, other, array)
        assert (pairs & 0xFFFF == found).all() and (pairs >> 16 == found[::-1]).all()


@pytest.mark.parametrize("how", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("target", ["s32", "u32", "s64", "u64"])
def test_floats_to_integers(source, target, how):
    """What is too large becomes the largest; NaN 0, or where 64 bits take part the highest bit."""
    bits, kind = int(target[1:]), target[0]
    values_ = [0.5, 1.5, 2.5, -0.5, -1.5, 0.0, -0.0, 1e-30, -1e-30, 7.0, 1e9, -1e9, math.nan]
    for power in (31, 32, 63, 64):
        values_ += [s * 2.0**power * (1 + e) for s in (1, -1) for e in (0, 2**-20, -(2**-20))]
    values_ += [math.inf, -math.inf, 1e30, -1e30]
    array = np.array(values_, np.float32 if source == "f32" else np.float64)
    found = calculate(
        f"cvt.{how}.{target}.{source} {{0}}, {{1}};", bits, array.view(f"u{array.itemsize}")
    )
    round_ = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[how]
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind == "s" else (0, 2**bits - 1)
    for x, result in zip(array.tolist(), found.tolist(), strict=True):
        if math.isnan(x):
            expected = 1 << bits - 1 if "64" in source + target else 0
        else:
            whole = round_(Fraction(x)) if math.isfinite(x) else (high if x > 0 else low)
            expected = min(max(whole, low), high) & ((1 << bits) - 1)
        assert result == expected, x


@pytest.mark.parametrize("source", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("target", ["f32", "f64", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_conversions_of_integers(source, target):
    bits = int(source[1:])
    given = edges(bits) + [(1 << 25) + 1 + 2 * n for n in range(4)] * (bits > 16)
    given += [(1 << bits - 1) - 1 - (n << max(bits - 26, 0)) for n in range(6)]
    array = np.array([x & ((1 << bits) - 1) for x in given], BITS[bits])
    rn = ".rn" if target[0] == "f" else ""
    wide = int(target[1:])
    found = calculate(f"cvt{rn}.{target}.{source} {{0}}, {{1}};", wide, array)
    for x, result in zip(array.tolist(), found.tolist(), strict=True):
        x = signed(x, bits) if source[0] == "s" else x
        expected = nearest(Fraction(x), target) if rn else x & ((1 << wide) - 1)
        assert result == expected, x


def test_conversions_of_a_part_of_a_register():
    """A register may be wider than what is read of it, or written."""
    array = np.array([0x1280, 0xFF7F, 0x80], np.uint16)
    for kind, expected in (("s", [0xFFFFFF80, 0x7F, 0xFFFFFF80]), ("u", [0x80, 0x7F, 0x80])):
        assert calculate(f"cvt.{kind}32.{kind}8 {{0}}, {{1}};", 32, array).tolist() == expected
        expected = [x & 0xFFFF for x in expected]
        assert calculate(f"cvt.{kind}8.s16 {{0}}, {{1}};", 16, array).tolist() == expected


def ulps(y):
    return np.spacing(np.abs(y).astype(np.float32)).astype(np.float64)


# name -> in float64, and the error that the manual allows beside x and its value
APPROXIMATE = {
    "ex2.approx.f32": (np.exp2, lambda x, y: 2 * ulps(y)),
    "ex2.approx.ftz.f32": (np.exp2, lambda x, y: 2 * ulps(y)),
    "lg2.approx.f32": (
        np.log2,
        lambda x, y: np.where((x > 0.5) & (x < 2), 2.0**-22, 2.0**-22 * np.abs(y)),
    ),
    "rcp.approx.f32": (lambda x: 1 / x, lambda x, y: ulps(y)),
    "sqrt.approx.f32": (np.sqrt, lambda x, y: 2.0**-23 * y),
    "rsqrt.approx.f32": (lambda x: x**-0.5, lambda x, y: 2.0**-22.9 * y),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_err_by_what_the_manual_allows(name, monkeypatch):
    function, allowed = APPROXIMATE[name]
    generator = np.random.default_rng(0)
    x = np.exp2(generator.uniform(-6, 6, 4000)).astype(np.float32)
    x = np.where(generator.random(4000) < 0.5, -x, x) if name[0] == "e" else x
    x = np.concatenate([x, 1 + generator.normal(size=96).astype(np.float32) / 1000])
    x, given = x.astype(np.float32), x.astype(np.float32).view(np.uint32)
    y = function(x.astype(np.float64))
    found = calculate(f"{name} {{0}}, {{1}};", 32, given).view(np.float32).astype(np.float64)
    bound = allowed(x.astype(np.float64), y)
    error = np.abs(found - y) / bound
    # float64 errs too, and so much the less
    assert error.max() < 1 + 1e-6 and error.max() > 0.9
    monkeypatch.setattr(values, "NOISE", False)
    found = calculate(f"{name} {{0}}, {{1}};", 32, given)
    assert (found == y.astype(np.float32).view(np.uint32)).all()


def test_approximate_quotients():
    """Of the largest numbers zero, where that is computed by a reciprocal."""
    a, b = np.random.default_rng(1).normal(size=(2, 4000)).astype(np.float32)
    a[:4], b[:4] = [1, -1, np.inf, np.nan], [2.0**127, 2.0**127, 2.0**127, 1]
    given = a.view(np.uint32), b.view(np.uint32)
    truth = a.astype(np.float64) / b
    for name, large in (
        ("div.approx.f32", [0, -0.0, np.nan]),
        ("div.full.f32", [2.0**-127, -(2.0**-127), np.inf]),
    ):
        found = calculate(f"{name} {{0}}, {{1}}, {{2}};", 32, *given).view(np.float32)
        error = np.abs(found[4:] - truth[4:]) / ulps(truth[4:])
        assert 1.8 < error.max() <= 2
        expected = np.array([*large, np.nan], np.float32)
        assert np.array_equal(found[:4], expected, equal_nan=True)
        assert np.signbit(found[1])


def test_what_is_exact_of_approximations():
    """Zero, infinities, NaN, denormals, and powers of two by whole exponents."""
    x = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3, -126, 128, -150, 1e-40, -1e-40], np.float32)
    bits = x.view(np.uint32)
    found = calculate("ex2.approx.ftz.f32 {0}, {1};", 32, bits).view(np.float32)
    expected = np.array([1, 1, np.inf, 0, np.nan, 8, 2.0**-126, np.inf, 0, 1, 1], np.float32)
    assert np.array_equal(found, expected, equal_nan=True)
    found = calculate("lg2.approx.ftz.f32 {0}, {1};", 32, bits).view(np.float32)
    expected = [-np.inf, -np.inf, np.inf, np.nan, np.nan]
    assert np.array_equal(found[:5], np.array(expected, np.float32), equal_nan=True)
    assert found[9] == -np.inf and found[10] == -np.inf
    found = calculate("rcp.approx.ftz.f32 {0}, {1};", 32, bits).view(np.float32)
    expected = [np.inf, -np.inf, 0, -0.0, np.nan]
    assert np.array_equal(found[:5], np.array(expected, np.float32), equal_nan=True)
    assert np.signbit(found[[1, 3]]).all() and found[9] == np.inf and found[10] == -np.inf
    wide = np.array([3.0, -0.0, 2.0**-1023], np.float64).view(np.uint64)
    found = calculate("rcp.approx.ftz.f64 {0}, {1};", 64, wide)
    assert (found & np.uint64(0xFFFFFFFF) == 0).all()
    assert abs(found.view(np.float64)[0] * 3 - 1) < 2**-20
    assert found.view(np.float64)[1:].tolist() == [-math.inf, math.inf]
    wide = np.array([-np.inf, np.nan, 2.0**1023], np.float64).view(np.uint64)
    found = calculate("rcp.approx.ftz.f64 {0}, {1};", 64, wide)
    assert found.tolist() == [1 << 63, 0x7FFFFFFF << 32, 0]
    squares = np.array([4, 2, 0, -0.0, np.inf, -1], np.float32)
    found = calculate("sqrt.rn.f32 {0}, {1};", 32, squares.view(np.uint32)).view(np.float32)
    expected = np.array([2, math.sqrt(2), 0, -0.0, np.inf, np.nan], np.float32)
    assert np.array_equal(found, expected, equal_nan=True) and np.signbit(found[3])


# Warps


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("bounds", [0x1F, 0, 0x181F, 0x1800, 0x1C03, 0x0F, 5])
@pytest.mark.parametrize("by", [0, 1, 3, 16, 31, 33])
def test_shuffles(mode, bounds, by):
    """Lane by lane, as the manual describes it."""
    memory = np.zeros(128, np.uint32)
    body = f"""
        mul.lo.s32 %r4, %r1, 7;
        shfl.sync.{mode}.b32 %r5|%p5, %r4, {by}, {bounds}, -1;
        st.global.b32 [%rd2], %r5;
        selp.b32 %r6, 1, 0, %p5;
        st.global.b32 [%rd2+256], %r6;
    """
    assert run(body, memory) == []
    segment, clamp, by = bounds >> 8 & 31, bounds & 31, by & 31
    for thread in range(64):
        lane = thread % 32
        least = lane & segment
        most = least | clamp & ~segment
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": least | by & ~segment,
        }[mode]
        inside = source >= most if mode == "up" else source <= most
        source = source if inside else lane
        assert memory[thread] == 7 * (thread - lane + source)
        assert memory[64 + thread] == inside


REDUCTIONS = {
    "add.s32": sum,
    "max.s32": max,
    "min.s32": min,
    "max.u32": lambda x: max(n & 0xFFFFFFFF for n in x),
    "min.u32": lambda x: min(n & 0xFFFFFFFF for n in x),
    "and.b32": np.bitwise_and.reduce,
    "or.b32": np.bitwise_or.reduce,
    "xor.b32": np.bitwise_xor.reduce,
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_redux(name):
    """Two groups of lanes in each warp, by their masks."""
    memory = np.zeros(64, np.uint32)
    body = f"""
        mul.lo.s32 %r4, %r1, 1234567891;
        and.b32 %r5, %r1, 3;
        setp.eq.b32 %p5, %r5, 1;
        selp.b32 %r6, 0x22222222, 0xdddddddd, %p5;
        redux.sync.{name} %r7, %r4, %r6;
        st.global.b32 [%rd2], %r7;
    """
    assert run(body, memory) == []
    given = [signed(n * 1234567891 & 0xFFFFFFFF, 32) for n in range(64)]
    for thread in range(64):
        group = [n for n in range(64) if n // 32 == thread // 32]
        group = [given[n] for n in group if (n % 4 == 1) == (thread % 4 == 1)]
        assert memory[thread] == int(REDUCTIONS[name](group)) & 0xFFFFFFFF


@pytest.mark.parametrize("mode", ["ballot", "any", "all"])
def test_votes(mode):
    """Two groups of lanes in each warp, of which the larger is of one mind in the first warp."""
    memory = np.zeros(64, np.uint32)
    body = f"""
        and.b32 %r5, %r1, 3;
        setp.eq.b32 %p5, %r5, 1;
        selp.b32 %r6, 0x22222222, 0xdddddddd, %p5;
        and.b32 %r7, %r1, 36;
        setp.eq.b32 %p6, %r7, 32;
        or.pred %p6, %p6, %p5;
        vote.sync.{mode}.{"b32 %r8" if mode == "ballot" else "pred %p7"}, %p6, %r6;
        {"" if mode == "ballot" else "selp.b32 %r8, 1, 0, %p7;"}
        st.global.b32 [%rd2], %r8;
    """
    assert run(body, memory) == []
    for thread in range(64):
        group = [n for n in range(64) if n // 32 == thread // 32]
        group = [n for n in group if (n % 4 == 1) == (thread % 4 == 1)]
        yes = [n % 4 == 1 or n & 36 == 32 for n in group]
        bits = sum(1 << n % 32 for n, x in zip(group, yes, strict=True) if x)
        assert memory[thread] == {"ballot": bits, "any": any(yes), "all": all(yes)}[mode]


def test_lanes_wait_for_each_other():
    """A loop whose body lies in two places: who takes the one above the vote is there first."""
    memory = np.zeros(64, np.uint32)
    body = """
        add.s32 %r4, %r1, 1;
        mov.b32 %r5, 0;
        bra.uni VOTE;
        ABOVE:
        shr.u32 %r4, %r4, 1;
        VOTE:
        setp.ne.s32 %p5, %r4, 0;
        vote.sync.any.pred %p6, %p5, -1;
        @!%p6 bra END;
        add.s32 %r5, %r5, 1;
        @%p1 bra BELOW;
        bra.uni ABOVE;
        BELOW:
        shr.u32 %r4, %r4, 1;
        bra.uni VOTE;
        END:
        st.global.b32 [%rd2], %r5;
    """
    assert run(body, memory) == []
    assert memory.tolist() == [6] * 32 + [7] * 32


@pytest.mark.parametrize("name", ["max.NaN.f32", "min.NaN.f32", "max.f32", "min.f32"])
def test_redux_of_floats(name):
    rows = [[-0.0] * 31 + [0.0], [1.5, -2.5, math.nan] * 10 + [7.0, -8.0], [math.nan] * 32]
    for row in [*rows, [0.0, *[-0.0] * 31]]:
        given = np.array(row, np.float32).view(np.uint32)
        found = calculate(f"redux.sync.{name} {{0}}, {{1}}, -1;", 32, given)
        expected = given[0].item()
        for x in given.tolist():
            expected = extremum(name.startswith("max"), expected, x, "f32", "NaN" in name)
        assert set(found.tolist()) == {expected}


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices(trans):
    """Lane i holds elements 2 (i mod 4) and the next of row i / 4, of each matrix."""
    memory = np.zeros(512, np.uint32)
    body = f"""
        mad.lo.s32 %r4, %r1, 1, 1000;
        mad.lo.s32 %r5, %r1, 65537, 65536;
        add.s32 %r6, %r5, 64;
        shl.b32 %r7, %r1, 4;
        stmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 [%r7], {{%r5, %r6}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r8, %r9}}, [%r7];
        st.global.b32 [%rd2], %r8;
        st.global.b32 [%rd2+128], %r9;
        ld.shared.b32 %r10, [%r3];
        st.global.b32 [%rd2+256], %r10;
        ld.shared.b32 %r10, [%r3+128];
        st.global.b32 [%rd2+384], %r10;
    """
    assert run(body, memory, threads=32) == []
    lane = np.arange(32, dtype=np.uint32)
    first = lane * 65537 + 65536
    assert (memory[:32] == first).all() and (memory[32:64] == first + 64).all()
    for number_, held in enumerate((first, first + 64)):
        matrix = np.zeros((8, 8), np.uint16)
        for i, pair in enumerate(held.tolist()):
            for j, x in enumerate((pair & 0xFFFF, pair >> 16)):
                at = (i // 4, 2 * (i % 4) + j)
                matrix[at[::-1] if trans else at] = x
        stored = memory[64 + 32 * number_ : 96 + 32 * number_].view(np.uint16)
        assert stored.tolist() == matrix.ravel().tolist()


# With Triton

TRITON_KERNELS = """
import torch, triton
import triton.language as tl

@triton.jit
def right(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x_ptr + at, at)
    tl.debug_barrier()
    tl.store(y_ptr + at, tl.load(x_ptr + N - 1 - at))

@triton.jit
def without_barrier(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x_ptr + at, at + 1)
    tl.store(y_ptr + at, tl.load(x_ptr + N - 1 - at))

@triton.jit
def one_too_many(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), tl.load(y_ptr + tl.arange(0, N)))

def run(kernel, x, y):
    kernel[(1,)](x, y, N=256)

def test_right():
    x, y = torch.empty(256, dtype=torch.int32), torch.empty(256, dtype=torch.int32)
    run(right, x, y)
    assert y.tolist() == list(range(255, -1, -1))

def test_wrong():
    run(without_barrier, *torch.zeros((2, 256), dtype=torch.int32))

def test_unwritten():
    x = torch.zeros(256, dtype=torch.int32)
    for y in (torch.empty(256, dtype=torch.int32), x.new_empty(256), torch.empty_like(x)):
        run(one_too_many, x, y)

# as a launcher, whose memory is watched
__name__ = "sparse_ce.triton_kernels.tried"
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
def test_the_plugin(tmp_path):
    """A run whose tests pass fails for what was found, and says where."""
    (tmp_path / "test_tried.py").write_text(TRITON_KERNELS)
    here = str(Path(__file__).parent)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "emulated_triton", "-p", "no:cacheprovider",
         "--rootdir", str(tmp_path), "test_tried.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": here, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 1 and "3 passed" in ended.stdout, ended.stdout + ended.stderr
    found = [
        line for line in ended.stdout.splitlines() if re.search(r"at test_tried\.py:\d+", line)
    ]
    # of a load Triton 3.8 and later say a line below it, or two, where earlier ones say its own
    later = tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 8)
    load, after = (22, 17) if later else (20, 16)
    patterns = [
        r"^ +3 read of memory that nobody wrote: one_too_many, y_ptr at "
        rf"test_tried.py:{load}:\d+$",
        r"^ +\d+ write and read by two warps without a barrier: without_barrier, x_ptr at "
        rf"test_tried.py:{after}:\d+ after test_tried.py:15:\d+$",
    ]
    assert len(found) == 2 and all(map(re.search, patterns, found)), ended.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
def test_a_profile():
    command = [sys.executable, "tests/profiled.py", "triton", "topk_ce", "bfloat16", "100", "20"]
    ended = subprocess.run(
        [*command, "--rows", "8", "--lines", "2"],
        cwd=Path(__file__).parents[1], env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    table = ended.stdout.splitlines()
    assert len(table) == 6 and re.match(r"_few_kernel: \d+ programs; a row: \d+\.\d ", table[0])
    assert all(re.match(r" +\d+\.\d \w+\.py:\d+:\d+", table[n]) for n in (1, 2, 4, 5))


CUDA_KERNELS = r"""
struct Given { int first; const int* from; int* to; bool wrong; };

extern "C" __global__ void barrier(Given a) {
  __shared__ int held[128];
  __shared__ double factor;
  if (threadIdx.x == 0) factor = a.first;
  held[threadIdx.x] = a.from[threadIdx.x];
  if (!a.wrong) __syncthreads();
  a.to[threadIdx.x] = held[127 - threadIdx.x] * factor;
}

extern "C" __global__ void lanes(Given a) {
  if (a.wrong && threadIdx.x % 32 == 7) return;
  const unsigned odd = __ballot_sync(~0u, a.from[threadIdx.x] & 1);
  a.to[threadIdx.x] = __popc(odd) * 64;
}

extern "C" __global__ __launch_bounds__(128) void bounds(const int* from, int* to, int n) {
  if (threadIdx.x < n) to[threadIdx.x + n / 128] = from[threadIdx.x];
}
"""


@pytest.fixture(scope="module")
def cuda_kernels(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "tried.cu").write_text(CUDA_KERNELS)
    command = ["nvcc", "-arch=compute_90", "-lineinfo", "-ptx", "tried.cu", "-o", "tried.ptx"]
    subprocess.run(command, cwd=folder, check=True)
    return parse.kernels((folder / "tried.ptx").read_text())


def run_cuda(text, *parameters, threads=128):
    """What a kernel makes of the numbers 0 to 127, and the findings."""
    given, found = np.arange(128, dtype=np.int32), np.full(128, -1, np.int32)
    extents = [
        ptx.Extent(x.ctypes.data, x.ctypes.data + x.nbytes, name)
        for x, name in ((given, "given"), (found, "found"))
    ]
    findings = Counter()
    bits = [given.ctypes.data, found.ctypes.data, *parameters]
    if "bounds" not in text.split("(")[0]:
        bits = [struct.pack("<i4xQQ?7x", 2, *bits)]
    ptx.launch(text, (1, 1, 1), bits, extents, findings, threads=threads)
    return found.tolist(), sorted(findings)


def test_kernels_of_nvcc(cuda_kernels):
    """Several of one text: parameters that are structures, variables of shared memory, and the
    lines of a source file.
    """
    assert run_cuda(cuda_kernels["barrier"], False) == ([2 * n for n in range(127, -1, -1)], [])
    _, found = run_cuda(cuda_kernels["barrier"], True)
    said = "write and read by two warps without a barrier: barrier, shared memory at tried.cu:10"
    assert f"{said} after tried.cu:7" in found and f"{said} after tried.cu:8" in found
    assert run_cuda(cuda_kernels["lanes"], False) == ([1024] * 128, [])
    _, (found,) = run_cuda(cuda_kernels["lanes"], True)
    assert re.match(r"a warp of which some lanes are missing: lanes, at .* in tried.cu:15", found)
    assert run_cuda(cuda_kernels["bounds"], 100) == ([*range(100), *[-1] * 28], [])
    with pytest.raises(ptx.Fault, match="thread 127 accesses 4 bytes .* outside of all tensors"):
        run_cuda(cuda_kernels["bounds"], 128)
    with pytest.raises(ValueError, match="bounds: 160 threads, of 128"):
        run_cuda(cuda_kernels["bounds"], 100, threads=160)
    with pytest.raises(ValueError, match="expected a parameter of 32 bytes, got 4"):
        ptx.launch(cuda_kernels["lanes"], (1, 1, 1), [b"1234"], [], Counter(), threads=128)
    with pytest.raises(ValueError, match="lanes: expected .reqntid, the number of threads"):
        ptx.launch(cuda_kernels["lanes"], (1, 1, 1), [bytes(32)], [], Counter())
