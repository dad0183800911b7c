"""Runs the PTX of a kernel on the processor, and tells what is wrong with it.

    parse.py         the text to blocks of instructions
    values.py        numbers as lanes compute them
    instructions.py  what each instruction does
    memory.py        addresses, bounds, alignment
    races.py         who touched memory before: findings
    counts.py        what a launch costs: instructions, sectors, passes over banks
    machine.py       programs, branches, barriers, launches
    plugin.py        what the plugins of pytest share

Findings: races between programs, warps and lanes, reads of memory that nobody wrote, lanes missing
at a barrier, a shuffle or a sum of a warp. An access outside of all tensors or of shared memory, a
misaligned one, a device assertion and a program that does not end are errors, and so is what this
emulator does not know. Registers that nobody wrote hold NaN. An order that no GPU promises is
random: that of programs, and of atomic additions.
"""

from .counts import Counts
from .machine import launch
from .memory import Extent, Scratch
from .races import Fault

__all__ = ["Counts", "Extent", "Fault", "Scratch", "launch"]
