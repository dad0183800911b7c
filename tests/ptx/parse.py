"""The text of a kernel to blocks of instructions, with their operands as registers and numbers.

It reads what LLVM writes for Triton and what nvcc writes, inline assembly with registers of its own
included. A register is its place in the register file; one that is read as two or four,
`{%r1, %r2}`, is a tuple.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from . import values


class Register(NamedTuple):
    index: int
    bits: int  # 1 of a predicate


class Number(NamedTuple):
    bits: int  # as many as the instruction reads


class Name(NamedTuple):
    """%tid.x, a parameter, or what is declared outside of the kernel."""

    name: str


class Address(NamedTuple):
    base: "Register | Name"
    offset: int


SINK = Name("_")  # a result that nobody wants
Operand = Register | Number | Name | Address | tuple  # a tuple of registers and numbers


@dataclass(frozen=True)
class Instruction:
    text: str
    place: str  # in the source that it was compiled from
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None = None
    unless: bool = False  # runs where the guard is false
    used_bytes: int = -1  # a mask: what of a load is looked at

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass
class Block:
    """Instructions that run in a row, the first of them alone one at which lanes of a warp wait for
    each other. `end` is a branch, an exit or a barrier, or there is none.
    """

    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None


class Variable(NamedTuple):
    """What is declared by its name, in shared or global memory."""

    space: str
    align: int
    bytes: int  # 0: as many as a launch gives
    is_set: bool = False  # to what a list of numbers says


def members(instruction: Instruction) -> Operand | None:
    """The lanes of its warp that it waits for, where it is sure to run."""
    met = instruction.name.startswith(_MEETINGS) and instruction.guard is None
    return instruction.operands[-1] if met else None


@dataclass
class Kernel:
    name: str
    parameters: dict[str, int]  # bytes of each
    threads: int | None  # None: a launch says, up to `most_threads`
    most_threads: int = 1024
    variables: dict[str, Variable] = field(default_factory=dict)
    registers: list[Register] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the block that a label stands before


_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", re.S)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\b.*?([\w$]+)(?:\[(\d+)\])?", re.S)
_VARIABLE = re.compile(
    r"\.(shared|global)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[\d*\])?\s*(=.*)?", re.S
)
_DECLARATION = re.compile(r"^(?:\.extern |\.visible )?(\.(?:shared|global)\s[^;]*);", re.M)
_LOCATION = re.compile(
    r"\s*\.loc\s+(\d+) (\d+) \d+.*?(?:inlined_at (\d+) (\d+) \d+)?\s*(?://\s*(\S+).*)?"
)
_FILE = re.compile(r'\.file\s+(\d+)\s+"(?:.*/)?(.+)"')
_STATEMENT = re.compile(r"\s*(?:([{}])|([$\w]+):(?!:)|([^;]*);)\s*", re.S)
_GUARDED = re.compile(r"@(!?)([%\w$]+)\s+(.*)", re.S)
_RANGE = re.compile(r"([%\w$]+)<\d+>")
_ENDS = ("bra", "ret", "exit", "bar.sync", "barrier.sync")
_MEETINGS = ("shfl.sync", "vote.sync", "redux.sync", "bar.warp.sync")


def parsed(ptx: str) -> Kernel:
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("there is no kernel in this text")
    name, parameters, directives = entry.groups()
    threads, most = (re.search(rf"\.{kind}ntid\s+(\d+)", directives) for kind in ("req", "max"))
    kernel = Kernel(name, _parameters(parameters), int(threads[1]) if threads else None)
    kernel.most_threads = int(most[1]) if most else kernel.most_threads
    for declaration in _DECLARATION.findall(ptx[: entry.start()]):
        kernel.variables |= _variable(declaration)
    return _Parser(kernel).run(ptx[entry.end() :])


def kernels(ptx: str) -> dict[str, str]:
    """The kernels of one text, each as a text of its own, by their names."""
    entries = re.split(r"^(?=(?:\.visible |\.weak )*\.entry )", ptx, flags=re.M)[1:]
    around = [f"{declaration};\n" for declaration in _DECLARATION.findall(ptx)]
    files = re.findall(r"^\s*\.file\s.*\n", ptx, flags=re.M)
    texts = ("".join((*around, entry, *files)) for entry in entries)
    return {_ENTRY.search(text)[1]: text for text in texts}


def _size(type_name: str, count: str | None) -> int:
    return values.type_named(type_name).bits // 8 * int((count or "1").strip("[]") or 0)


def _parameters(text: str) -> dict[str, int]:
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    found = [_PARAMETER.fullmatch(piece).groups() for piece in pieces]
    return {name: _size(type_name, count) for type_name, name, count in found}


def _variable(text: str) -> dict[str, Variable]:
    space, align, type_name, name, count, numbers = _VARIABLE.fullmatch(text).groups()
    size = _size(type_name, count)
    return {name: Variable(space, int(align or size), size, numbers is not None)}


def _statements(body: str, files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(statement, place), up to the end of the kernel; braces and labels are statements too."""
    place, waiting, depth = "?", "", 1
    for line in body.splitlines():
        location = _LOCATION.fullmatch(line)
        if location:
            inner, inner_line, file, line, place = location.groups()
            place = place or f"{files.get(inner, '?')}:{inner_line}"
            place += f" in {files.get(file, '?')}:{line}" if file else ""
            continue
        waiting += line.split("//")[0] + "\n"
        while (found := _STATEMENT.match(waiting)) is not None:
            waiting = waiting[found.end() :]
            brace, label, text = found.groups()
            depth += {"{": 1, "}": -1}.get(brace, 0)
            if depth == 0:
                return
            yield brace or (f"{label}:" if label else " ".join(text.split())), place


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    return [part.strip() for part in re.findall(r"(?:[^,{\[(]|\{.*?\}|\[.*?\]|\(.*?\))+", text)]


class _Parser:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.ranges: dict[str, int] = {}  # %r -> 32, for %r0, %r1 and so on
        self.scopes: list[dict[str, Register]] = [{}]
        self.used_bytes = -1

    def run(self, body: str) -> Kernel:
        block, blocks = Block(), self.kernel.blocks
        for text, place in _statements(body, dict(_FILE.findall(body))):
            if text.endswith(":"):
                if block.instructions:
                    blocks.append(block)
                    block = Block()
                self.kernel.labels[text[:-1]] = len(blocks)
            elif text == "{":
                self.scopes.append({})
            elif text == "}":
                self.scopes.pop()
            elif text.startswith("."):
                self._directive(text)
            elif "st.param" not in text:  # what is handed to an assertion
                instruction = self._instruction(text, place)
                if instruction.name.startswith(_MEETINGS) and block.instructions:
                    blocks.append(block)
                    block = Block()
                if instruction.name.startswith(_ENDS):
                    block.end = instruction
                    blocks.append(block)
                    block = Block()
                else:
                    block.instructions.append(instruction)
        blocks.append(block)
        return self.kernel

    def _directive(self, text: str) -> None:
        kind, _, rest = text.partition(" ")
        if kind == ".reg":
            type_name, _, names = rest.strip().partition(" ")
            bits = values.type_named(type_name.lstrip(".")).bits
            for name in _split(names):
                numbered = _RANGE.fullmatch(name)
                if numbered:
                    self.ranges[numbered[1]] = bits
                else:
                    self.scopes[-1][name] = self._new(bits)
        elif kind == ".pragma" and "used_bytes_mask" in rest:
            self.used_bytes = int(rest.strip().strip('"').split()[-1], 0)
        elif kind == ".shared":
            self.kernel.variables |= _variable(text)
        elif kind not in (".pragma", ".param"):
            raise NotImplementedError(f"{self.kernel.name}: {text}")

    def _new(self, bits: int) -> Register:
        self.kernel.registers.append(Register(len(self.kernel.registers), bits))
        return self.kernel.registers[-1]

    def _instruction(self, text: str, place: str) -> Instruction:
        guarded = _GUARDED.fullmatch(text)
        unless, guard, plain = guarded.groups() if guarded else ("", None, text)
        opcode, _, rest = plain.partition(" ")
        opcode, *modifiers = re.split(r"(?<!:)\.", opcode)
        operands = [] if opcode == "call" else _split(rest)
        used_bytes, self.used_bytes = self.used_bytes, -1
        return Instruction(
            text,
            place,
            opcode,
            tuple(modifiers),
            (Name(rest),) if opcode == "call" else tuple(map(self._operand, operands)),
            None if guard is None else self._operand(guard),
            bool(unless),
            used_bytes,
        )

    def _operand(self, text: str) -> Operand:
        if text[0] in "{" or "|" in text:
            return tuple(map(self._operand, re.split(r"\s*[,|]\s*", text.strip("{} "))))
        if text[0] == "[":
            base, _, offset = text.strip("[] ").partition("+")
            return Address(self._operand(base.strip()), int(offset or "0", 0))
        if re.match(r"0[fFdD][0-9a-fA-F]{8}", text):
            return Number(int(text[2:], 16))
        if re.match(r"-?\d", text):
            return Number(int(text.rstrip("U"), 0))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        numbered = re.fullmatch(r"(.*?)\d+", text)
        if numbered and numbered[1] in self.ranges:
            return self.scopes[0].setdefault(text, self._new(self.ranges[numbered[1]]))
        return SINK if text == "_" else Name(text)
