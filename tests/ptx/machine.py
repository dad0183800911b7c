"""Launches of kernels: programs one after another, the lanes of each in lockstep, as NumPy arrays.

Lanes that branch apart run one path at a time, those first who are furthest behind. A barrier
opens when all lanes wait that are left; who waits elsewhere, or has left, is a finding.
"""

from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np

from .instructions import Step, bound
from .memory import Access, Extent, Global, Scratch, Shared
from .parse import Instruction, Kernel, Name, Number, Operand, Register, parsed
from .races import Clock, Report
from .values import UNSIGNED

Array = np.ndarray
MOST_BLOCKS = 2_000_000  # of a program that ends
_LARGEST_GRID = (2**31 - 1, 65535, 65535)
# numbers as unlike any others as can be: NaN, and far outside as indices
_POISON = {8: 0xEE, 16: 0xFFEE, 32: 0xFFEEDEAD, 64: 0xFFF8DEADBEEFDEAD}


class RegisterFile:
    """Arrays of one element for each thread: declared registers, then constants and parameters."""

    def __init__(self, kernel: Kernel) -> None:
        self.threads, self.parameters = kernel.threads, kernel.parameters
        self.arrays = [self._poison(register.bits) for register in kernel.registers]
        self.numbers: dict[tuple[int, int], int] = {}
        self.names: dict[str, int] = {}
        thread = np.arange(self.threads, dtype=np.uint32)
        self._add("%tid.x", thread)
        self._add("%laneid", thread & 31)

    def _poison(self, bits: int) -> Array:
        if bits == 1:
            return np.arange(self.threads) % 2 == 0
        return np.full(self.threads, _POISON[bits], UNSIGNED[bits])

    def _add(self, name: str, array: Array) -> int:
        self.names[name] = len(self.arrays)
        self.arrays.append(array)
        return self.names[name]

    def _constant(self, number: int, bits: int) -> int:
        if (number, bits) not in self.numbers:
            dtype = bool if bits == 1 else UNSIGNED[bits]
            self.numbers[number, bits] = len(self.arrays)
            self.arrays.append(np.full(self.threads, number & (1 << bits) - 1, dtype))
        return self.numbers[number, bits]

    def source(self, operand: Operand, bits: int) -> tuple[int, Any]:
        """The register to read, and what to add to an address."""
        if isinstance(operand, Register):
            return operand.index, None
        if isinstance(operand, Number):
            return self._constant(operand.bits, bits), None
        if isinstance(operand, Name):
            return self._named(operand.name, bits), None
        base, offset = operand
        if isinstance(base, Name) and base.name not in self.parameters:
            # shared memory begins at 0
            return self._constant(offset, 32), None
        index, _ = self.source(base, bits)
        if not offset:
            return index, None
        wide = self.arrays[index].itemsize * 8
        return index, UNSIGNED[wide](offset & (1 << wide) - 1)

    def _named(self, name: str, bits: int) -> int:
        if name in self.names:
            return self.names[name]
        if name in self.parameters or name.startswith(("%ctaid.", "%nctaid.", "%ntid.")):
            return self._add(name, None)  # filled in by a launch
        if name.startswith("%"):
            raise KeyError(name)
        # shared memory begins at 0, and no string of an assertion is read
        return self._constant(0, bits)


class _Block:
    def __init__(self, steps: list[Step], end: Instruction | None, place: int, target: int) -> None:
        self.steps, self.end, self.place, self.target = steps, end, place, target
        self.barrier = end is not None and end.opcode in ("bar", "barrier")
        self.guard = None if end is None or end.guard is None else end.guard.index


class Translated:
    """A kernel as functions of its registers."""

    def __init__(self, ptx: str) -> None:
        kernel = parsed(ptx)
        self.name, self.threads, self.parameters = kernel.name, kernel.threads, kernel.parameters
        if kernel.threads % 32:
            raise NotImplementedError(f"{kernel.name}: {kernel.threads} threads, not whole warps")
        self.file, self.granules = RegisterFile(kernel), {"global": 8, "shared": 8}
        numbers: dict[str, int] = {}
        self.blocks = []
        for block in kernel.blocks:
            steps = [
                bound(i, numbers.setdefault(i.place, len(numbers)), self.file, self.granules)
                for i in block.instructions
            ]
            end = block.end
            place = numbers.setdefault(end.place if end else "?", len(numbers))
            self.blocks.append(_Block(steps, end, place, self._target(kernel, end)))
        self.places = list(numbers)

    @staticmethod
    def _target(kernel: Kernel, end: Instruction | None) -> int:
        """The block that a jump goes to; behind the last one the program has ended."""
        if end is None or end.opcode in ("ret", "exit"):
            return len(kernel.blocks)
        if end.opcode == "bra":
            return kernel.labels[end.operands[0].name]
        if end.guard is not None or end.operands[1:] or end.operands[0] != Number(0):
            raise NotImplementedError(f"{end.text} (expected a barrier of all threads)")
        return -1


class Program:
    """One program of a launch: its registers, where its threads stand, and who waits."""

    def __init__(
        self, kernel: Translated, memory: dict[str, Any], launched: dict[str, int],
        clock: Clock, report: Report, random: np.random.Generator,
    ) -> None:  # fmt: skip
        self.kernel, self.memory, self.clock = kernel, memory, clock
        self.report, self.random, self.threads = report, random, kernel.threads
        self.all_threads = np.arange(self.threads)
        self.lanes = self.all_threads & 31
        self.lane_bit = np.uint32(1) << self.lanes.astype(np.uint32)
        self.first_of_warp = self.all_threads - self.lanes
        self.registers = list(kernel.file.arrays)
        for name, number in launched.items():
            if name in kernel.file.names:
                dtype = np.uint32 if name.startswith("%") else np.uint64
                self.registers[kernel.file.names[name]] = np.full(self.threads, number, dtype)
        self.together: int | None = 0  # the block where all threads stand, while they do
        self.position = np.zeros(self.threads, np.int64)
        self.waiting = np.zeros(self.threads, bool)
        clock.program_starts()
        memory["shared"].program_starts()

    # what instructions ask for

    def spread(self, found: Array, access: Access) -> Array:
        """What some threads found, as an array of all."""
        if len(found) == self.threads:
            return found
        result = np.zeros(self.threads, found.dtype)
        result[access.threads] = found
        return result

    def _lanes_missing(self, missing: Array, access: Access) -> None:
        if missing.any():
            self.report.finding("a warp of which some lanes are missing", access.place)

    def whole_warps(self, access: Access) -> Array:
        """Which warps have come, for what takes all of one."""
        lanes = np.bincount(access.threads // 32, minlength=self.threads // 32)
        self._lanes_missing((lanes > 0) & (lanes < 32), access)
        return lanes > 0

    def check_members(self, members: Array, access: Access, source: Array | None = None) -> None:
        """That a lane has not come which an instruction of its warp names is a finding.

        It has to name itself, and `source`, the lane that each one reads.
        """
        if len(access.threads) == self.threads and not (members != 0xFFFFFFFF).any():
            return
        here = np.zeros(self.threads, bool)
        here[access.threads] = True
        present = (self.lane_bit * here).reshape(-1, 32).sum(1, dtype=np.uint32).repeat(32)
        missing = (members & ~present != 0) | (members & self.lane_bit == 0)
        if source is not None:
            missing |= members & self.lane_bit[source] == 0
        self._lanes_missing(here & missing, access)

    # how it runs

    def run(self) -> None:
        blocks = self.kernel.blocks
        for _ in range(MOST_BLOCKS):
            at, active = (self.together, None) if self.together is not None else self._next()
            if at == len(blocks):
                return
            block, registers = blocks[at], self.registers
            for step in block.steps:
                step(self, registers, active)
            self._leave(block, at, active)
        raise self.report.fault("does not end", blocks[at].place)

    def _next(self) -> tuple[int, Array | None]:
        """The block that is furthest behind, and who runs it."""
        running = ~self.waiting
        running &= self.position < len(self.kernel.blocks)
        if not running.any():
            if not self.waiting.any():
                return len(self.kernel.blocks), None
            self._open_barrier()
            return (self.together, None) if self.together is not None else self._next()
        at = int(self.position[running].min())
        return at, running & (self.position == at)

    def _open_barrier(self) -> None:
        places = np.unique(self.position[self.waiting])
        place = self.kernel.blocks[places[0] - 1].place
        if not self.waiting.all():
            self.report.finding("barrier that some threads have left", place)
        if len(places) > 1:
            other = self.kernel.blocks[places[1] - 1].place
            self.report.finding("threads wait at two barriers", place, earlier=other)
        self.clock.barrier()
        self.waiting[:] = False
        self._reunite()

    def _reunite(self) -> None:
        if not self.waiting.any() and (self.position == self.position[0]).all():
            self.together = int(self.position[0])

    def _leave(self, block: _Block, at: int, active: Array | None) -> None:
        target, taken = block.target, None
        if block.barrier:
            if active is None:
                self.clock.barrier()
                self.together = at + 1
            else:
                self.position[active] = at + 1
                self.waiting |= active
            return
        if block.end is None:
            target = at + 1
        elif block.guard is not None:
            taken = self.registers[block.guard]
            taken = ~taken if block.end.unless else taken
        if active is None:
            if taken is None or taken.all():
                self.together = target
            elif not taken.any():
                self.together = at + 1
            else:
                self.together = None
                self.position = np.where(taken, target, at + 1)
            return
        self.position[active] = target if taken is None else np.where(taken, target, at + 1)[active]
        self._reunite()


translated = lru_cache(maxsize=None)(Translated)


def launch(
    ptx: str,
    grid: tuple[int, int, int],
    parameters: list[int],
    extents: list[Extent],
    findings: Counter[str],
    *,
    shared: int = 0,
    scratch: list[Scratch] | None = None,
    random: np.random.Generator | None = None,
    races: bool = True,
) -> str:
    """Runs a kernel, its programs in random order, and returns its name.

    `parameters`: the bits of each. `extents`: the memory that it may touch. `shared`: bytes of
    shared memory. `races`: whether to look for them. Raises Fault, or adds to `findings`.
    """
    kernel = translated(ptx)
    if not all(1 <= n <= most for n, most in zip(grid, _LARGEST_GRID, strict=True)):
        raise ValueError(f"{kernel.name}: no GPU takes a grid of {grid}")
    random = random or np.random.default_rng(0)
    report, clock = Report(kernel.name, kernel.places, findings), Clock(kernel.threads // 32)
    watch = clock if races else None
    memory = {
        "global": Global(extents, scratch or [], kernel.granules["global"], watch, report),
        "shared": Shared(shared, kernel.granules["shared"], watch, report),
    }
    launched = dict(zip(kernel.parameters, parameters, strict=True))
    launched |= {f"%nctaid.{axis}": n for axis, n in zip("xyz", grid, strict=True)}
    launched["%ntid.x"] = kernel.threads
    with np.errstate(all="ignore"):
        for number in random.permutation(grid[0] * grid[1] * grid[2]):
            z, y, x = np.unravel_index(number, grid[::-1])
            coordinates = {"%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
            Program(kernel, memory, launched | coordinates, clock, report, random).run()
    return kernel.name
