"""What each instruction does: a table from its name in the manual to a function of that name.

Such a function reads an instruction's modifiers, once, and returns what the instruction does to
the arrays of bits that it is given. A modifier that nobody has read is an error, as is a name that
the table does not have: nothing is ignored in silence.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import values
from .memory import Access, Width
from .parse import SINK, Instruction, Operand
from .values import Array, Type, decode, encode, numbers, resized, unsigned

Function = Callable[..., Any]
Step = Callable[[Any, list[Array], Array | None], None]  # program, registers, who is active


class Meaning(NamedTuple):
    """Of an instruction. `widths`: bits of its sources, of the last one for all that follow.

    An `effect` is a function of the program and an Access before its sources, any other function
    of its sources alone.
    """

    function: Function
    widths: tuple[int, ...]
    effect: bool = False
    results: bool = True  # the first operand is where these go


def _flat(operand: Operand) -> tuple[Any, ...]:
    return operand if type(operand) is tuple else (operand,)


class Form:
    """An instruction as its function in the table reads it."""

    def __init__(self, instruction: Instruction, granules: dict[str, int]) -> None:
        self.instruction, self.left = instruction, list(instruction.modifiers)
        self.granules = granules  # by space, of the narrowest access so far
        # of the first two operands what they are made of: registers, numbers
        self.first, self.second = map(_flat, (*instruction.operands, (), ())[:2])

    def take(self, *names: str) -> str | None:
        """The modifier of these that it has, which is then read."""
        found = next((name for name in names if name in self.left), None)
        if found is not None:
            self.left.remove(found)
        return found

    def need(self, *names: str) -> str:
        found = self.take(*names)
        if found is None:
            raise KeyError(f"expected one of {names}")
        return found

    def type(self) -> Type:
        """The last modifier."""
        return values.type_named(self.left.pop())

    def width(self, space: str, of: Type, used: tuple[int, ...], count: int) -> Width:
        size = of.bits // 8
        self.granules[space] = min(size, self.granules[space])
        return Width(size, count, used)


TABLE: dict[str, Callable[[Form], Meaning]] = {}


def _in_table(function: Callable[[Form], Meaning]) -> Callable[[Form], Meaning]:
    TABLE[function.__name__.rstrip("_")] = function
    return function


# Arithmetic


def _floats(form: Form, function: Function) -> Meaning:
    """Of numbers, flushed where it says so. All but the last source may be of 16 bits, exactly."""
    first = of = form.type()
    if form.left and form.left[-1] == "f32":
        of = form.type()
    form.take("rn")
    flush = values.flushed if form.take("ftz") else None
    saturate = values.saturated if form.take("sat") else None

    def compute(*bits):
        given = [*(decode(x, first) for x in bits[:-1]), decode(bits[-1], of)]
        found = function(*given) if flush is None else flush(function(*map(flush, given)))
        return encode(found if saturate is None else saturate(found), of)

    sources = len(form.instruction.operands) - 1
    return Meaning(compute, (first.bits,) * (sources - 1) + (of.bits,))


def _integers(form: Form, function: Function) -> Meaning:
    """Of numbers that are signed where the type is."""
    of = form.type()
    return Meaning(lambda *bits: unsigned(function(*(numbers(x, of) for x in bits))), (of.bits,))


def _numbers(of_floats: Function | None, of_integers: Function | None) -> Function:
    def read(form: Form) -> Meaning:
        floating = values.type_named(form.left[-1]).floating
        function = of_floats if floating else of_integers
        if function is None:
            raise KeyError(form.left[-1])
        return (_floats if floating else _integers)(form, function)

    return read


def _bitwise(function: Function) -> Function:
    return lambda form: Meaning(function, (form.type().bits,))


TABLE |= {
    "add": _numbers(np.add, np.add),
    "sub": _numbers(np.subtract, np.subtract),
    "neg": _numbers(np.negative, np.negative),
    "abs": _numbers(np.abs, np.abs),
    "rem": _numbers(None, values.remainder),
    "and": _bitwise(operator.and_),
    "or": _bitwise(operator.or_),
    "xor": _bitwise(operator.xor),
    "not": _bitwise(operator.invert),
    "popc": _bitwise(lambda a: np.bitwise_count(a).astype(np.uint32)),
    "clz": _bitwise(values.leading_zeros),
    "brev": _bitwise(values.reversed_bits),
    "bfi": lambda form: Meaning(values.inserted, (form.type().bits,) * 2 + (32, 32)),
}


@_in_table
def bfind(form: Form) -> Meaning:
    """How far the highest bit is from the top, or all ones where there is none."""
    of = form.type()
    form.need("shiftamt")
    if of.signed:
        raise KeyError(of)
    zero = np.uint32(0xFFFFFFFF)
    return Meaning(lambda a: np.where(a == 0, zero, values.leading_zeros(a)), (of.bits,))


@_in_table
def shf(form: Form) -> Meaning:
    """The upper half of two registers, the first of them below, shifted left."""
    form.need("b32"), form.need("l"), form.need("wrap")

    def shift(low, high, by):
        both = high.astype(np.uint64) << 32 | low
        return (both << (by & 31) >> 32).astype(np.uint32)

    return Meaning(shift, (32,))


def _product(form: Form) -> tuple[Function, Type, int]:
    """Of integers: the function, their type, and bits of the result."""
    of, part = form.type(), form.need("lo", "hi", "wide")
    if part == "lo":
        return np.multiply, of, of.bits
    if of.bits > 32:
        raise KeyError(of)
    function = values.wide_product if part == "wide" else values.high_product
    bits = 2 * of.bits if part == "wide" else of.bits
    return lambda a, b: function(a, b, of), of, bits


@_in_table
def mul(form: Form) -> Meaning:
    if values.type_named(form.left[-1]).floating:
        return _floats(form, np.multiply)
    product, of, _ = _product(form)
    return Meaning(product, (of.bits,))


@_in_table
def mad(form: Form) -> Meaning:
    product, of, bits = _product(form)
    return Meaning(lambda a, b, c: product(a, b) + c, (of.bits, of.bits, bits))


@_in_table
def fma(form: Form) -> Meaning:
    if form.left[-1] in ("f16", "bf16", "f16x2", "bf16x2") and "f32" not in form.left:
        return _floats(form, values.fma_to_odd)
    down = form.take("rm")
    if down and form.left[-1] != "f32":
        raise KeyError(form.left[-1])
    return _floats(form, values.fma_down if down else values.fma)


@_in_table
def div(form: Form) -> Meaning:
    function = {
        "approx": values.approximate_quotient,
        "full": values.full_range_quotient,
        None: np.divide,
    }[form.take("approx", "full")]
    return _numbers(function, values.quotient)(form)


def _extremum(of_floats: Function, of_integers: Function) -> Function:
    def read(form: Form) -> Meaning:
        keep_nan = form.take("NaN") is not None

        def of_two_or_three(first, *others):
            for other in others:
                first = of_floats(first, other, keep_nan)
            return first

        return _numbers(of_two_or_three, of_integers)(form)

    return read


TABLE |= {
    "max": _extremum(values.maximum, np.maximum),
    "min": _extremum(values.minimum, np.minimum),
}


@_in_table
def copysign(form: Form) -> Meaning:
    """The sign of the first, the rest of the second."""
    bits = form.type().bits
    sign = values.UNSIGNED[bits](1 << (bits - 1))
    return Meaning(lambda a, b: (a & sign) | (b & ~sign), (bits,))


def _rounded_or_approximate(form: Form) -> Meaning:
    name = form.instruction.opcode
    exact = {"sqrt": np.sqrt, "rcp": np.reciprocal}.get(name)
    if exact is not None and form.take("rn"):
        return _floats(form, exact)
    form.need("approx")
    if name == "rcp" and form.take("f64"):
        form.need("ftz")
        return Meaning(values.gross_reciprocal, (64,))
    if form.left[-1] != "f32":
        raise KeyError(form.left[-1])
    return _floats(form, values.approximation(name))


TABLE |= dict.fromkeys(values.APPROXIMATIONS, _rounded_or_approximate)


@_in_table
def shl(form: Form) -> Meaning:
    return Meaning(values.shifted_left, (form.type().bits, 32))


@_in_table
def shr(form: Form) -> Meaning:
    of = form.type()
    return Meaning(lambda a, by: unsigned(values.shifted_right(numbers(a, of), by)), (of.bits, 32))


@_in_table
def bfe(form: Form) -> Meaning:
    of = form.type()
    return Meaning(
        lambda a, *where: unsigned(values.field(numbers(a, of), *where)), (of.bits, 32, 32)
    )


@_in_table
def prmt(form: Form) -> Meaning:
    form.need("b32")
    mode = form.take(*values.PERMUTATIONS)
    return Meaning(lambda a, b, selector: values.permuted(a, b, selector, mode), (32,))


# Comparisons, choices, copies, conversions

_ORDER: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_OF_UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_LOGIC: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(form: Form, of: Type) -> Function:
    if not of.floating:
        orders = _ORDER if of.signed else _ORDER | _OF_UNSIGNED
        order = orders[form.need(*orders)]
        return lambda a, b: order(numbers(a, of), numbers(b, of))
    name = form.need(*_ORDER, *(f"{name}u" for name in _ORDER), "num", "nan")
    flush = values.flushed if form.take("ftz") else lambda x: x

    def compare(a, b):
        a, b = flush(decode(a, of)), flush(decode(b, of))
        nan = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return nan if name == "nan" else ~nan
        found = _ORDER[name[:2]](a, b)
        return found | nan if name.endswith("u") else found & ~nan

    return compare


@_in_table
def setp(form: Form) -> Meaning:
    """One predicate; with a second result its opposite, or of two parts one of each."""
    of = form.type()
    compare, two = _comparison(form, of), len(form.first) == 2
    logic = None if of.part else _LOGIC.get(form.take(*_LOGIC) or "")

    def compute(a, b, other=None):
        found = compare(a, b)
        if of.part:
            return found[0::2], found[1::2]
        both = (found, ~found) if two else (found,)
        both = both if logic is None else tuple(logic(one, other) for one in both)
        return both if two else both[0]

    return Meaning(compute, (of.bits, of.bits, 1))


@_in_table
def set_(form: Form) -> Meaning:
    """All bits of what compares so, of each part."""
    of = form.type()
    form.need("u32")
    part = values.UNSIGNED[16 if of.part else 32]
    compare = _comparison(form, of)
    return Meaning(
        lambda a, b: np.where(compare(a, b), ~part(0), part(0)).view(np.uint32), (of.bits,)
    )


@_in_table
def selp(form: Form) -> Meaning:
    bits = form.type().bits
    return Meaning(lambda a, b, which: np.where(which, a, b), (bits, bits, 1))


@_in_table
def mov(form: Form) -> Meaning:
    """Also from several registers to one as wide as all of them, or the other way."""
    bits = form.type().bits
    if len(form.first) > 1:
        part = values.UNSIGNED[bits // len(form.first)]
        return Meaning(lambda a: tuple(a.view(part).reshape(len(a), -1).T.copy()), (bits,))
    if len(form.second) > 1:
        whole = values.UNSIGNED[bits]
        part_bits = bits // len(form.second)
        return Meaning(lambda *parts: np.stack(parts, 1).view(whole)[:, 0], (part_bits,))
    return Meaning(lambda a: a, (bits,))


@_in_table
def cvta(form: Form) -> Meaning:
    """Generic addresses are global ones here, and none of them is shared."""
    form.take("to")
    form.need("global")
    return Meaning(lambda a: a, (form.type().bits,))


_TO_INTEGER: dict[str, Function] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


@_in_table
def cvt(form: Form) -> Meaning:
    source, target = form.type(), form.type()
    flush = values.flushed if form.take("ftz") else lambda x: x
    if target.part:
        # the first of two numbers goes to the upper half
        form.need("rn")

        def compute(upper, lower):
            return encode(flush(decode(np.stack((lower, upper), 1).ravel(), source)), target)

    elif source.floating and target.floating:
        if target.bits < source.bits:
            form.need("rn")
        limit = values.saturated if form.take("sat") else lambda x: x

        def compute(a):
            return encode(limit(flush(decode(a, source))), target)

    elif source.floating:
        how = _TO_INTEGER[form.need(*_TO_INTEGER)]

        def compute(a):
            return values.rounded_to_integer(flush(decode(a, source)), how, target)

    elif target.floating:
        form.need("rn")
        dtype = {"f32": np.float32, "f64": np.float64}[values.name_of(target)]

        def compute(a):
            return encode(numbers(resized(a, source.bits), source).astype(dtype), target)

    else:
        (result,) = form.first

        def compute(a):
            # a register may be wider than what is read of it, or written
            read = resized(resized(a, source.bits), target.bits, source.signed)
            return resized(read, result.bits, target.signed)

    return Meaning(compute, (source.bits,))


# Memory. Hints to caches, and who sees an atomic access, mean nothing here; an order does.

_HINTS = (
    *("volatile", "relaxed", "weak", "cta", "cluster", "gpu", "sys", "ca", "cg", "cs", "lu", "cv"),
    *("wb", "wt", "nc", "L1::evict_last", "L1::evict_first", "L1::evict_normal"),
    *("L1::no_allocate", "L2::64B", "L2::128B", "L2::256B"),
)


def _space(form: Form) -> str:
    while form.take(*_HINTS):
        pass
    return form.need("global", "shared", "shared::cta", "param").removesuffix("::cta")


@_in_table
def ld(form: Form) -> Meaning:
    of, count = form.type(), len(form.first)
    targets = [of.bits if result == SINK else result.bits for result in form.first]
    space, size, mask = _space(form), of.bits // 8, form.instruction.used_bytes
    form.take(f"v{count}")
    looked_at = [mask >> j * size & (1 << size) - 1 and form.first[j] != SINK for j in range(count)]
    width = form.width(space, of, tuple(np.flatnonzero(looked_at)), count)

    def load(program, access, addresses):
        if not len(access.threads):
            return None
        found = program.memory[space].load(addresses[access.threads], width, access)
        return tuple(
            program.spread(resized(x, bits, of.signed), access)
            for x, bits in zip(found, targets, strict=True)
        )

    return Meaning(load, (64,), effect=True)


@_in_table
def st(form: Form) -> Meaning:
    of, count = form.type(), len(form.second)
    space = _space(form)
    form.take(f"v{count}")
    width = form.width(space, of, tuple(range(count)), count)

    def store(program, access, addresses, *found):
        if len(access.threads):
            cut = [resized(x[access.threads], of.bits) for x in found]
            program.memory[space].store(addresses[access.threads], width, cut, access)

    return Meaning(store, (64, of.bits), effect=True, results=False)


def _atomic(form: Form) -> Meaning:
    of, space, results = form.type(), _space(form), form.instruction.opcode == "atom"
    form.need("add")
    width = form.width(space, of, (0,), 1)
    if of.floating and of != values.type_named("f32"):
        raise KeyError(of)

    def total(a, b):
        return encode(decode(a, of) + decode(b, of), of) if of.floating else a + b

    def update(program, access, addresses, by):
        threads = access.threads
        if not len(threads):
            return None
        order = program.random.permutation(len(threads))
        memory = program.memory[space]
        before = memory.add(addresses[threads], width, by[threads], access, total, order)
        return program.spread(before, access) if results else None

    return Meaning(update, (64, of.bits), effect=True, results=results)


TABLE |= {"atom": _atomic, "red": _atomic}

# Which two elements beside each other, of a matrix of 8 x 8, each lane holds.
_ROW, _COLUMN = np.arange(32) // 4, 2 * (np.arange(32) % 4)


def _matrices(form: Form, registers: tuple[Any, ...]) -> tuple[Width, Function]:
    """Of rows in shared memory; and for each matrix the rows of all warps, who gives them."""
    of = form.type()
    for name in ("sync", "aligned", "m8n8", f"x{len(registers)}"):
        form.need(name)
    _space(form)

    def rows(program, access, addresses, number):
        warps = np.flatnonzero(program.whole_warps(access))
        threads = (warps[:, None] * 32 + np.arange(8 * number, 8 * number + 8)).ravel()
        return addresses[threads], access._replace(threads=threads), warps

    return form.width("shared", of, tuple(range(8)), 8), rows


@_in_table
def ldmatrix(form: Form) -> Meaning:
    transposed, count = form.take("trans") is not None, len(form.first)
    width, rows = _matrices(form, form.first)

    def load(program, access, addresses):
        found = np.zeros((count, program.threads // 32, 32), np.uint32)
        for number in range(count):
            where, who, warps = rows(program, access, addresses, number)
            if len(warps):
                elements = program.memory["shared"].load(where, width, who)
                matrix = np.stack(elements, 1).reshape(-1, 8, 8)
                matrix = matrix.swapaxes(1, 2) if transposed else matrix
                pairs = np.stack((matrix[:, _ROW, _COLUMN], matrix[:, _ROW, _COLUMN + 1]), 2)
                found[number, warps] = pairs.view(np.uint32)[..., 0]
        return tuple(found.reshape(count, -1))

    return Meaning(load, (32,), effect=True)


@_in_table
def stmatrix(form: Form) -> Meaning:
    transposed = form.take("trans") is not None
    width, rows = _matrices(form, form.second)

    def store(program, access, addresses, *found):
        for number, pairs in enumerate(found):
            where, who, warps = rows(program, access, addresses, number)
            if len(warps):
                halves = pairs.reshape(-1, 32, 1)[warps].view(np.uint16)
                matrix = np.empty((len(warps), 8, 8), np.uint16)
                matrix[:, _ROW, _COLUMN] = halves[..., 0]
                matrix[:, _ROW, _COLUMN + 1] = halves[..., 1]
                matrix = matrix.swapaxes(1, 2) if transposed else matrix
                program.memory["shared"].store(where, width, list(matrix.reshape(-1, 8).T), who)

    return Meaning(store, (32,), effect=True, results=False)


# What the lanes of a warp do together


def _source_lanes(mode: str, lane: Array, by: Array, bounds: Array) -> tuple[Array, Array]:
    """The lane that each one reads, by the manual's formulas, and whether it lies inside."""
    by = (by & 31).astype(np.int64)
    segment, clamp = (bounds >> 8 & 31).astype(np.int64), (bounds & 31).astype(np.int64)
    first = lane & segment
    last = first | clamp & ~segment
    there = {
        "up": lane - by,
        "down": lane + by,
        "bfly": lane ^ by,
        "idx": first | by & ~segment,
    }[mode]
    inside = there >= last if mode == "up" else there <= last
    return np.where(inside, there, lane), inside


@_in_table
def shfl(form: Form) -> Meaning:
    form.need("sync"), form.need("b32")
    mode, two = form.need("up", "down", "bfly", "idx"), len(form.first) == 2
    # no register is written in place: the same arrays, mostly constants, say the same
    known: list[Any] = [None, None]

    def exchange(program, access, a, by, bounds, members):
        if known[0] is not by or known[1] is not bounds:
            known[:] = by, bounds, *_source_lanes(mode, program.lanes, by, bounds)
        source, inside = known[2:]
        program.check_members(members, access, source)
        found = a[program.first_of_warp + source]
        return (found, inside) if two else found

    return Meaning(exchange, (32,), effect=True)


@_in_table
def vote(form: Form) -> Meaning:
    form.need("sync"), form.need("pred", "b32")
    mode = form.need("ballot", "any", "all")

    def count(program, access, mine, members):
        program.check_members(members, access)
        found = program.present(program.here(access) & mine) & members
        return {"ballot": found, "any": found != 0, "all": found == members}[mode]

    return Meaning(count, (1, 32), effect=True)


@_in_table
def redux(form: Form) -> Meaning:
    form.need("sync")
    of, name = form.type(), form.need("add", "min", "max", "and", "or", "xor")
    if of.floating:
        extremum = {"min": values.minimum, "max": values.maximum}[name]
        keep_nan = form.take("NaN") is not None

        def join(a, b):
            return encode(extremum(decode(a, of), decode(b, of), keep_nan), of)
    else:
        ufunc = {"add": np.add, "min": np.minimum, "max": np.maximum}.get(name)
        function = ufunc or {"and": np.bitwise_and, "or": np.bitwise_or}.get(name, np.bitwise_xor)

        def join(a, b):
            return unsigned(function(numbers(a, of), numbers(b, of)))

    def gather(program, access, a, members):
        program.check_members(members, access)
        found = a.copy()
        mine = np.stack((access.threads // 32 * 32, members[access.threads]), 1)
        for first, mask in np.unique(mine, axis=0):
            lanes = first + np.flatnonzero(int(mask) >> np.arange(32) & 1)
            total = a[lanes[:1]]
            for lane in lanes[1:]:
                total = join(total, a[lane : lane + 1])
            found[lanes] = total
        return found

    return Meaning(gather, (32,), effect=True)


@_in_table
def bar(form: Form) -> Meaning:
    """bar.warp.sync; a barrier of the whole program ends a block, and machine.py has it.

    Where a part of a warp meets, nothing is known of the order: less than the manual promises.
    """
    form.need("warp"), form.need("sync")

    def meet(program, access, members):
        program.check_members(members, access)
        program.clock.meeting(np.bincount(access.threads // 32) == 32)

    return Meaning(meet, (32,), effect=True, results=False)


def _stop(what: str) -> Meaning:
    def stop(program, access, *_):
        if len(access.threads):
            raise program.report.fault(what, access.place)

    return Meaning(stop, (), effect=True, results=False)


@_in_table
def call(form: Form) -> Meaning:
    form.take("uni")
    if "__assertfail" not in form.first[0].name:
        raise KeyError("no such function here")
    return _stop("device assert")


@_in_table
def trap(form: Form) -> Meaning:
    return _stop("trap")


# Binding: an instruction with its registers, as a function that runs it


def bound(instruction: Instruction, place: int, file: Any, granules: dict[str, int]) -> Step:
    """`file`: where its registers are. Raises NotImplementedError where the table has no such."""
    form = Form(instruction, granules)
    try:
        meaning = TABLE[instruction.opcode](form)
        if form.left:
            raise KeyError(*form.left)
        operands = instruction.operands[1:] if meaning.results else instruction.operands
        sources = [source for operand in operands for source in _flat(operand)]
        widths = meaning.widths + meaning.widths[-1:] * len(sources)
        found = [file.source(source, bits) for source, bits in zip(sources, widths, strict=False)]
    except (KeyError, IndexError, ValueError) as error:
        raise NotImplementedError(f"{instruction.text} ({error})") from error
    targets = [None if r == SINK else r.index for r in form.first] if meaning.results else []
    run = (_effect if meaning.effect else _arithmetic)(meaning.function, targets, found, place)
    if instruction.guard is None:
        return run
    guard, unless = instruction.guard.index, instruction.unless

    def run_guarded(program, registers, active):
        mine = registers[guard] ^ unless
        run(program, registers, mine if active is None else mine & active)

    return run_guarded


def _keep(registers: list[Array], targets: list[int | None], found: Any, active: Any) -> None:
    for target, result in zip(targets, found if type(found) is tuple else (found,), strict=True):
        if target is not None:
            before = registers[target]
            registers[target] = result if active is None else np.where(active, result, before)


def _arithmetic(
    function: Function, targets: list[int | None], sources: list[tuple[int, Any]], place: int
) -> Step:
    indices = [index for index, _ in sources]
    if len(targets) > 1:
        return lambda program, registers, active: _keep(
            registers, targets, function(*[registers[index] for index in indices]), active
        )
    (target,) = targets

    def run(program, registers, active):
        result = function(*[registers[index] for index in indices])
        registers[target] = (
            result if active is None else np.where(active, result, registers[target])
        )

    return run


def _effect(
    function: Function, targets: list[int | None], sources: list[tuple[int, Any]], place: int
) -> Step:
    def run(program, registers, active):
        threads = program.all_threads if active is None else np.flatnonzero(active)
        given = [registers[i] if offset is None else registers[i] + offset for i, offset in sources]
        found = function(program, Access(threads, place), *given)
        if found is not None:
            _keep(registers, targets, found, active)

    return run
