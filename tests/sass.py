"""Machine code of NVIDIA's GPUs as cuobjdump and nvdisasm show it: registers, loops, instructions.

CUDA brings the two along, and so does the package triton.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = (80, 86, 89, 90, 100, 120)

# The compiler moves a register or an instruction here and there between patch versions.
MARGIN_REGISTERS = 8
MARGIN_INSTRUCTIONS = 1.1


@dataclass(frozen=True)
class Loop:
    instructions: int
    operations: Counter[str]
    innermost: bool

    def count(self, name: str) -> int:
        return sum(n for operation, n in self.operations.items() if operation.startswith(name))


@dataclass(frozen=True)
class Report:
    """Of one kernel."""

    registers: int
    stack: int
    shared: int
    local: int
    operations: Counter[str]
    loops: list[Loop]  # innermost first where they nest, in the order of the code
    straight: int  # instructions outside of them, up to the end
    sass: str

    def spills(self) -> int:
        return sum(n for name, n in self.operations.items() if name.startswith(("LDL", "STL")))

    def streaming(self, name: str) -> Loop:
        """The loop with the most 16-byte accesses of that name."""
        return max(self.loops, key=lambda loop: loop.count(name))

    def tightest(self, *names: str) -> Loop:
        """The innermost loop with the most of all these, of fewest instructions."""
        return max(
            (loop for loop in self.loops if loop.innermost),
            key=lambda loop: (min(map(loop.count, names)), -loop.instructions),
        )

    def in_flight(self, name: str) -> int:
        """The most loads of that name that no addition stands between."""
        return max(self.batches(name), default=0)

    def batches(self, name: str) -> list[int]:
        """How many loads of that name there are from one addition to the next, where there are."""
        runs = [0]
        for operation in re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", self.sass):
            if operation.startswith(("FFMA", "FADD", "DFMA", "DADD")):
                runs.append(0)
            runs[-1] += operation == name
        return [run for run in runs if run > 0]

    def per_chunk(self, name: str) -> float:
        """Instructions per thread and 16 bytes in the streaming loop."""
        loop = self.streaming(name)
        return loop.instructions / loop.count(name)


def tool(name: str) -> Path | None:
    """The program of that name: of the package triton, or else on PATH."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return bundled
    found = shutil.which(name)
    return None if found is None else Path(found)


def read(cubin: Path) -> dict[str, Report]:
    """Of each kernel of the file, by its mangled name."""
    usage = {}
    for name, text in re.findall(r"Function (\S+):\n(.*)", _run("cuobjdump", "-res-usage", cubin)):
        usage[name] = [
            int(re.search(rf"{field}:(\d+)", text)[1])
            for field in ("REG", "STACK", "SHARED", "LOCAL")
        ]
    code = re.split(r"//-+ \.text\.(\S+) +-+", _run("nvdisasm", "-c", cubin))
    return {
        name: Report(*usage[name], *_code(sass), sass)
        for name, sass in zip(code[1::2], code[2::2], strict=True)
    }


def _code(sass: str) -> tuple[Counter[str], list[Loop], int]:
    lines, labels, waiting = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            waiting.append(label[1])
        if found := re.match(
            r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line
        ):
            labels.update(dict.fromkeys(waiting, len(lines)))
            waiting = []
            lines.append((found[2], found[3]))
    # what stands behind the end and jumps back in is no loop: shuffles of lanes that have parted
    last = max((i for i, (name, _) in enumerate(lines) if name == "EXIT"), default=len(lines))
    spans, loops, covered = [], [], []
    for end, (operation, operands) in enumerate(lines):
        target = re.search(r"`\((\.L_x_\d+)\)", operands)
        if operation.startswith("BRA") and target and labels.get(target[1], end) < end:
            start = labels[target[1]]
            if start < last < end:
                continue
            spans.append((start, end))
            covered.extend(range(start, end + 1))
    for start, end in spans:
        within = [span for span in spans if start <= span[0] and span[1] <= end]
        operations = Counter(name for name, _ in lines[start : end + 1])
        loops.append(Loop(end + 1 - start, operations, within == [(start, end)]))
    return (
        Counter(name for name, _ in lines),
        loops,
        last - len({line for line in covered if line < last}),
    )


def _run(name: str, *arguments: object) -> str:
    return subprocess.run(
        [str(tool(name)), *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout
