"""Launches of kernels: programs one after another, the lanes of each in lockstep, as NumPy arrays.

Lanes that branch apart run one path at a time, those first who are furthest behind. A shuffle waits
for the lanes that it names, a barrier opens when all lanes wait that are left. Who waits elsewhere,
or has left, is a finding.
"""

from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np

from .counts import Counts
from .instructions import Step, bound
from .memory import Access, Extent, Global, Parameters, Scratch, Shared
from .parse import Instruction, Kernel, Name, Number, Operand, Register, members, parsed
from .races import Clock, Report
from .values import UNSIGNED

Array = np.ndarray
MOST_BLOCKS = 2_000_000  # of a program that ends
_LARGEST_GRID = (2**31 - 1, 65535, 65535)
# numbers as unlike any others as can be: NaN, and far outside as indices
_POISON = {8: 0xEE, 16: 0xFFEE, 32: 0xFFEEDEAD, 64: 0xFFF8DEADBEEFDEAD}


class RegisterFile:
    """Arrays of one element for each thread: declared registers, then constants and parameters."""

    def __init__(self, kernel: Kernel, threads: int) -> None:
        self.threads, self.variables = threads, kernel.variables
        # each where any of a GPU may begin
        places = np.cumsum([0, *(-(-size // 16) * 16 for size in kernel.parameters.values())])
        self.parameters = dict(zip(kernel.parameters, map(int, places[:-1]), strict=True))
        self.parameter_bytes = int(places[-1])
        self.shared: dict[str, int] = {}  # where variables lie that are looked at
        self.shared_bytes = 0
        self.globals: dict[str, Array] = {}
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
        if isinstance(base, Name):
            return self._constant(self._place(base.name) + offset, bits), None
        index, _ = self.source(base, bits)
        if not offset:
            return index, None
        wide = self.arrays[index].itemsize * 8
        return index, UNSIGNED[wide](offset & (1 << wide) - 1)

    def _named(self, name: str, bits: int) -> int:
        if name in self.names:
            return self.names[name]
        if name.startswith(("%ctaid.", "%nctaid.", "%ntid.")):
            return self._add(name, None)  # filled in by a launch
        if name.startswith("%"):
            raise KeyError(name)
        return self._constant(self._place(name), bits)

    def _place(self, name: str) -> int:
        """The address of what has a name, in the memory where it is."""
        if name in self.parameters:
            return self.parameters[name]
        variable = self.variables[name]
        if variable.space == "global" and not variable.is_set:
            if name not in self.globals:
                self.globals[name] = np.zeros(variable.bytes, np.uint8)
            return self.globals[name].ctypes.data
        if variable.space == "global" or not variable.bytes:
            # no string of an assertion is read, and what a launch gives begins at 0
            return 0
        if name not in self.shared:
            self.shared[name] = -(-self.shared_bytes // variable.align) * variable.align
            self.shared_bytes = self.shared[name] + variable.bytes
        return self.shared[name]


class _Block:
    def __init__(
        self,
        steps: list[Step],
        end: Instruction | None,
        place: int,
        target: int,
        members: int | None,
        lines: Counter[str],
    ) -> None:
        self.steps, self.end, self.place, self.target = steps, end, place, target
        self.members = members  # the register of those whom a lane waits for, before it runs this
        self.lines = lines  # how many instructions of each are here
        self.barrier = end is not None and end.opcode in ("bar", "barrier")
        self.guard = None if end is None or end.guard is None else end.guard.index


class Translated:
    """A kernel as functions of its registers."""

    def __init__(self, ptx: str, threads: int | None = None) -> None:
        kernel = parsed(ptx)
        self.name, self.parameters = kernel.name, kernel.parameters
        self.threads = threads or kernel.threads
        if self.threads is None:
            raise ValueError(f"{kernel.name}: expected .reqntid, the number of threads")
        if self.threads > kernel.most_threads:
            raise ValueError(f"{kernel.name}: {self.threads} threads, of {kernel.most_threads}")
        if self.threads % 32:
            raise NotImplementedError(f"{kernel.name}: {self.threads} threads, not whole warps")
        self.file = RegisterFile(kernel, self.threads)
        self.granules = {"global": 8, "shared": 8, "param": 8}
        numbers: dict[str, int] = {}
        self.blocks = []
        for block in kernel.blocks:
            steps = [
                bound(i, numbers.setdefault(i.place, len(numbers)), self.file, self.granules)
                for i in block.instructions
            ]
            end = block.end
            place = numbers.setdefault(end.place if end else "?", len(numbers))
            waits_for = members(block.instructions[0]) if block.instructions else None
            mask = None if waits_for is None else self.file.source(waits_for, 32)[0]
            lines = Counter(i.place for i in (*block.instructions, *filter(None, [end])))
            self.blocks.append(_Block(steps, end, place, self._target(kernel, end), mask, lines))
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
                self.registers[kernel.file.names[name]] = np.full(self.threads, number, np.uint32)
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
        here = self.here(access)
        missing = (members & ~self.present(here) != 0) | (members & self.lane_bit == 0)
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
            if self.report.counts is not None:
                warps = self.threads // 32
                if active is not None:
                    warps = int(active.reshape(-1, 32).any(1).sum())
                self.report.counts.ran(self.kernel.name, block.lines, warps)
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
        places = np.unique(self.position[running])
        for at in places:
            active = running & (self.position == at)
            mask = self.kernel.blocks[at].members
            if mask is not None:
                active &= self.registers[mask] & ~self.present(active) == 0
            if active.any():
                return int(at), active
        # nobody can go on: they run as if all had come, which is a finding
        return int(places[0]), running & (self.position == places[0])

    def here(self, access: Access) -> Array:
        found = np.zeros(self.threads, bool)
        found[access.threads] = True
        return found

    def present(self, active: Array) -> Array:
        """For each lane a mask of the lanes of its warp that are active."""
        return (self.lane_bit * active).reshape(-1, 32).sum(1, dtype=np.uint32).repeat(32)

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
    parameters: list[int | bytes],
    extents: list[Extent],
    findings: Counter[str],
    *,
    threads: int | None = None,
    shared: int = 0,
    scratch: list[Scratch] | None = None,
    random: np.random.Generator | None = None,
    races: bool = True,
    counts: Counts | None = None,
) -> str:
    """Runs a kernel, its programs in random order, and returns its name.

    `parameters`: the bits of each. `extents`: the memory that it may touch. `threads`: of a
    program, where the kernel does not say it. `shared`: bytes of shared memory beside those that
    it declares. `races`: whether to look for them. `counts`: what adds up what it costs. Raises
    Fault, or adds to `findings`.
    """
    kernel = translated(ptx, threads)
    if not all(1 <= n <= most for n, most in zip(grid, _LARGEST_GRID, strict=True)):
        raise ValueError(f"{kernel.name}: no GPU takes a grid of {grid}")
    random = random or np.random.default_rng(0)
    report = Report(kernel.name, kernel.places, findings, counts)
    clock = Clock(kernel.threads // 32)
    if counts is not None:
        counts.programs[kernel.name] += grid[0] * grid[1] * grid[2]
    watch = clock if races else None
    file, granules = kernel.file, kernel.granules
    own = [Extent(a.ctypes.data, a.ctypes.data + len(a), n) for n, a in file.globals.items()]
    memory = {
        "global": Global(extents + own, scratch or [], granules["global"], watch, report),
        "shared": Shared(shared + file.shared_bytes, granules["shared"], watch, report),
        "param": Parameters(file.parameter_bytes, report),
    }
    for (name, size), given in zip(kernel.parameters.items(), parameters, strict=True):
        bits = given.to_bytes(8, "little")[:size] if isinstance(given, int) else given
        memory["param"].fill(file.parameters[name], bits, size)
    launched = {f"%nctaid.{axis}": n for axis, n in zip("xyz", grid, strict=True)}
    launched["%ntid.x"] = kernel.threads
    with np.errstate(all="ignore"):
        for number in random.permutation(grid[0] * grid[1] * grid[2]):
            z, y, x = np.unravel_index(number, grid[::-1])
            coordinates = {"%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
            Program(kernel, memory, launched | coordinates, clock, report, random).run()
    return kernel.name
