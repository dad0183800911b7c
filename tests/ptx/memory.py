"""The two memories that a kernel sees: bounds, alignment, and what a lane finds there.

Global memory is that of the process. A kernel may touch the tensors that it was given, and all of
an access lies in one of them. Shared memory is its program's own, and poisoned when that starts.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .races import Clock, Report, Shadow
from .values import UNSIGNED

Array = np.ndarray
POISON = 0xA5
MOST_GRANULES = 1 << 26  # of a tensor that is watched: of larger ones only a part exists


class Width(NamedTuple):
    """Of an access of a lane: elements of `size` bytes, and which of them are looked at."""

    size: int
    count: int
    used: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.size * self.count


class Access(NamedTuple):
    """Which threads run an instruction, and which place of the report it has."""

    threads: Array
    place: int


class Extent(NamedTuple):
    """Global memory that a kernel may touch."""

    begin: int
    end: int
    name: str


class Scratch(NamedTuple):
    """Memory that was allocated for kernels to fill. `unwritten` as in Shadow, from `begin` on."""

    begin: int
    unwritten: Array


@cache
def _offsets(width: Width, granule: int) -> Array:
    parts = range(width.size // granule)
    return np.array([width.size // granule * j + part for j in width.used for part in parts])


class Space:
    """One of the memories. `granule`: bytes of the narrowest access of the kernel to it."""

    counted: str | None = None

    def __init__(self, granule: int, report: Report) -> None:
        self.granule, self.report = granule, report

    def _check(self, addresses: Array, bytes_: int, access: Access) -> None:
        """Raises a Fault where a lane may not go."""
        raise NotImplementedError

    def _words(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """Memory as elements of a size, and the place of each address in it."""
        raise NotImplementedError

    def _shadows(self, addresses: Array) -> Iterator[tuple[Shadow, int, Any]]:
        """The shadows of these addresses, the first granule of each, and whose they are."""
        raise NotImplementedError

    def _granules(
        self, addresses: Array, width: Width, access: Access
    ) -> Iterator[tuple[Shadow, Array, Array, Any]]:
        offsets = _offsets(width, self.granule)
        for shadow, origin, chosen in self._shadows(addresses):
            first = (addresses[chosen] // self.granule).astype(np.int64) - origin
            threads = access.threads[chosen]
            if len(offsets) == 1:
                yield shadow, first + offsets, threads, chosen
            else:
                granules = (first[:, None] + offsets).ravel()
                yield shadow, granules, np.repeat(threads, len(offsets)), chosen

    def _begin(self, addresses: Array, bytes_: int, access: Access) -> None:
        self._check(addresses, bytes_, access)
        report = self.report
        if report.counts is not None and self.counted is not None:
            place = report.places[access.place]
            report.counts.accessed(
                report.kernel, place, self.counted, addresses, bytes_, access.threads
            )

    def load(self, addresses: Array, width: Width, access: Access) -> list[Array]:
        self._begin(addresses, width.bytes, access)
        for shadow, granules, threads, _ in self._granules(addresses, width, access):
            shadow.read(granules, threads, access.place)
        words, first = self._words(addresses, width.size)
        return [words[first + j] for j in range(width.count)]

    def store(self, addresses: Array, width: Width, found: list[Array], access: Access) -> None:
        self._begin(addresses, width.bytes, access)
        words, first = self._words(addresses, width.size)
        unchanged = np.stack([words[first + j] == x for j, x in enumerate(found)], 1)
        unchanged = unchanged.repeat(width.size // self.granule, 1)
        for shadow, granules, threads, chosen in self._granules(addresses, width, access):
            shadow.write(granules, threads, access.place, unchanged[chosen].ravel())
        for j, x in enumerate(found):
            words[first + j] = x
            if (words[first + j] != x).any():
                self.report.finding("an instruction stores two values at once", access.place)

    def add(
        self,
        addresses: Array,
        width: Width,
        by: Array,
        access: Access,
        total: Callable[[Array, Array], Array],
        order: Array,
    ) -> Array:
        """Atomic: what was there. `order`: who comes first, if two of them meet."""
        self._begin(addresses, width.size, access)
        for shadow, granules, threads, _ in self._granules(addresses, width, access):
            shadow.write(granules, threads, access.place, atomic=True)
        words, at = self._words(addresses, width.size)
        before = np.empty_like(by)
        alone = len(np.unique(at)) == len(at)
        for k in [slice(None)] if alone else (slice(i, i + 1) for i in order):
            before[k] = words[at[k]]
            words[at[k]] = total(before[k], by[k])
        return before


class Shared(Space):
    counted = "shared"

    def __init__(self, size: int, granule: int, clock: Clock | None, report: Report) -> None:
        super().__init__(granule, report)
        self.size = size
        # whole rows of matrices, which are read as such
        self.contents = np.empty(-(-size // 16) * 16, np.uint8)
        self.unwritten = np.empty_like(self.contents)
        self.views = {bits // 8: self.contents.view(dtype) for bits, dtype in UNSIGNED.items()}
        self.shadow = None
        if clock is not None and size:
            granules = len(self.contents) // granule
            self.shadow = Shadow("shared memory", granules, clock, report, self.unwritten, True)

    def program_starts(self) -> None:
        self.contents.fill(POISON)
        self.unwritten.fill(1)

    def _check(self, addresses: Array, bytes_: int, access: Access) -> None:
        if (addresses & (bytes_ - 1)).any():
            raise self.report.fault(f"misaligned access of {bytes_} bytes", access.place)
        last = int(addresses.max()) + bytes_
        if last > self.size:
            text = f"access up to {last}, outside of {self.size} bytes of shared memory"
            raise self.report.fault(text, access.place)

    def _words(self, addresses: Array, size: int) -> tuple[Array, Array]:
        return self.views[size], addresses.astype(np.int64) // size

    def _shadows(self, addresses: Array) -> Iterator[tuple[Shadow, int, Any]]:
        if self.shadow is not None:
            yield self.shadow, 0, slice(None)


class Parameters(Space):
    """What a launch gives, the same for all programs."""

    def __init__(self, size: int, report: Report) -> None:
        super().__init__(1, report)
        self.contents = np.zeros(size, np.uint8)
        self.views = {bits // 8: self.contents.view(dtype) for bits, dtype in UNSIGNED.items()}

    def fill(self, begin: int, given: bytes, size: int) -> None:
        if len(given) != size:
            raise ValueError(f"expected a parameter of {size} bytes, got {len(given)}")
        self.contents[begin : begin + size] = np.frombuffer(given, np.uint8)

    def _check(self, addresses: Array, bytes_: int, access: Access) -> None:
        if (addresses & (bytes_ - 1)).any() or int(addresses.max()) + bytes_ > len(self.contents):
            raise self.report.fault("access beyond the parameters", access.place)

    def _words(self, addresses: Array, size: int) -> tuple[Array, Array]:
        return self.views[size], addresses.astype(np.int64) // size

    def _shadows(self, addresses: Array) -> Iterator[tuple[Shadow, int, Any]]:
        return iter(())


class _Process:
    """NumPy's way to take memory by its address."""

    FIRST, LAST = 1 << 12, 1 << 47

    def __init__(self, dtype: type) -> None:
        size = np.dtype(dtype).itemsize
        self.__array_interface__ = {
            "shape": ((self.LAST - self.FIRST) // size,),
            "typestr": np.dtype(dtype).str,
            "data": (self.FIRST, False),
            "version": 3,
        }


# All memory of the process as elements of 1, 2, 4 and 8 bytes; touched after a check of bounds.
_EVERYTHING = {bits // 8: np.asarray(_Process(dtype)) for bits, dtype in UNSIGNED.items()}


def _merged(pieces: list[Extent]) -> list[Extent]:
    """In order; those that overlap as one, with both names."""
    found: list[Extent] = []
    for begin, end, name in sorted(pieces):
        if found and begin < found[-1][1]:
            first, last, names = found.pop()
            begin, end, name = first, max(last, end), f"{names}|{name}"
        found.append(Extent(begin, end, name))
    return found


class Global(Space):
    counted = "global"

    def __init__(
        self,
        extents: list[Extent],
        scratch: list[Scratch],
        granule: int,
        clock: Clock | None,
        report: Report,
    ) -> None:
        super().__init__(granule, report)
        self.extents = _merged(extents)
        self.begins = np.array([extent.begin for extent in self.extents], np.uint64)
        self.ends = np.array([extent.end for extent in self.extents], np.uint64)
        self.shadows: list[tuple[Shadow, int] | None] = []
        for begin, end, name in self.extents if clock is not None else ():
            first, last = begin // granule, -(-end // granule)
            if last - first > MOST_GRANULES:
                self.shadows.append(None)
                continue
            unwritten = None
            for piece in scratch:
                offset = first * granule - piece.begin
                if 0 <= offset < len(piece.unwritten):
                    unwritten = piece.unwritten[offset : last * granule - piece.begin]
            shadow = Shadow(name, last - first, clock, report, unwritten)
            self.shadows.append((shadow, first))

    def _which(self, addresses: Array) -> Array:
        return np.searchsorted(self.begins, addresses, side="right") - 1

    def _check(self, addresses: Array, bytes_: int, access: Access) -> None:
        wrong = addresses & np.uint64(bytes_ - 1) != 0
        if wrong.any():
            text = f"misaligned access of {bytes_} bytes at {int(addresses[wrong][0]):#x}"
            raise self.report.fault(text, access.place)
        which = self._which(addresses)
        outside = np.ones(len(addresses), bool)
        if len(self.ends):
            outside = (which < 0) | (addresses + np.uint64(bytes_) > self.ends[which])
        if outside.any():
            at, thread = int(addresses[outside][0]), int(access.threads[outside][0])
            text = f"thread {thread} accesses {bytes_} bytes at {at:#x}, outside of all tensors"
            raise self.report.fault(text, access.place)

    def _words(self, addresses: Array, size: int) -> tuple[Array, Array]:
        words = _EVERYTHING[size]
        return words, (addresses // np.uint64(size)).astype(np.int64) - _Process.FIRST // size

    def _shadows(self, addresses: Array) -> Iterator[tuple[Shadow, int, Any]]:
        if not self.shadows:
            return
        low, high = self._which(np.array([addresses.min(), addresses.max()]))
        which = None if low == high else self._which(addresses)
        for number in [low] if which is None else np.unique(which):
            if self.shadows[number] is not None:
                yield *self.shadows[number], slice(None) if which is None else which == number
