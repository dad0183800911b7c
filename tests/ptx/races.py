"""Who touched memory before, and whether anything lies between: shadow memory and findings.

A granule is what the narrowest access of a kernel touches. Its shadow holds stamps of those who
wrote and read it last: when, by which instruction, which thread. Time counts synchronisations, so
that a stamp older than the last barrier, or the last meeting of a warp, is ordered before what
comes after. Programs run one after another, and nothing orders them: a stamp from before the
start of this program is another program's.
"""

from collections import Counter

import numpy as np

from .counts import Counts

Array = np.ndarray
# of a stamp, from below: thread, flags, the number of a place, time
_THREAD, _WARP = 0x3FF, 0x3E0
_SEVERAL = 1 << 10  # of this warp more than one thread has read since it met
_ATOMIC = 1 << 11
_PLACE, _TIME = 12, 32


class Fault(Exception):
    """What a GPU would stop at, or what makes everything after it worthless."""


class Report:
    """Names what is wrong by the kernel and its source. A finding lets the kernel go on."""

    def __init__(
        self, kernel: str, places: list[str], findings: Counter[str], counts: Counts | None = None
    ) -> None:
        self.kernel, self.places, self.findings, self.counts = kernel, places, findings, counts

    def finding(self, kind: str, place: int, of: str = "", earlier: int | None = None) -> None:
        after = "" if earlier is None else f" after {self.places[earlier]}"
        where = f"{of} at {self.places[place]}" if of else f"at {self.places[place]}"
        self.findings[f"{kind}: {self.kernel}, {where}{after}"] += 1

    def fault(self, text: str, place: int) -> Fault:
        return Fault(f"{self.kernel}, at {self.places[place]}: {text}")


class Clock:
    """Time of one launch."""

    def __init__(self, warps: int) -> None:
        self.now, self.warps = 0, warps
        self.program_starts()

    def program_starts(self) -> None:
        self.barrier()
        self.started = self.now

    def barrier(self) -> None:
        self.now += 1
        self.last_barrier = self.now
        self.last_meeting = np.full(self.warps, self.now)

    def meeting(self, warps: Array) -> None:
        self.now += 1
        self.last_meeting[np.flatnonzero(warps)] = self.now


class Shadow:
    """Of `size` granules of one piece of memory.

    `unwritten`: a byte for each byte of it, 1 where nobody has written yet, or None where all is
    known to be written. `private`: each program has its own.
    """

    def __init__(
        self,
        name: str,
        size: int,
        clock: Clock,
        report: Report,
        unwritten: Array | None,
        private: bool = False,
    ) -> None:
        self.name, self.clock, self.report, self.private = name, clock, report, private
        # of each granule the last writer; the first reader, the last, and the last of another
        # warp than that: one of these conflicts with a write if any reader of this launch does
        self.writer, self.first, self.latest, self.other = np.zeros((4, size), np.int64)
        # a number for each granule, of its bytes
        self.unwritten = None if unwritten is None else unwritten.view(f"u{len(unwritten) // size}")

    def read(self, granules: Array, threads: Array, place: int) -> None:
        if self.unwritten is not None and self.unwritten[granules].any():
            self.report.finding("read of memory that nobody wrote", place, self.name)
        self._compare("write and read", self.writer[granules], threads, place)
        self._note_readers(granules, threads, self._stamps(threads, place))

    def write(
        self,
        granules: Array,
        threads: Array,
        place: int,
        unchanged: Array | None = None,
        atomic: bool = False,
    ) -> None:
        """What stays as it was, where `unchanged`, harms nobody; nor do two atomic accesses."""
        writer = self.writer[granules]
        if atomic:
            if self.unwritten is not None and self.unwritten[granules].any():
                self.report.finding("read of memory that nobody wrote", place, self.name)
            writer = np.where(writer & _ATOMIC, 0, writer)
        self._compare("two writes", writer, threads, place, unchanged)
        for readers in (self.first, self.latest, self.other):
            self._compare("read and write", readers[granules], threads, place, unchanged)
        self.writer[granules] = self._stamps(threads, place) | (_ATOMIC if atomic else 0)
        if self.unwritten is not None:
            self.unwritten[granules] = 0

    def _stamps(self, threads: Array, place: int) -> Array:
        return threads + (self.clock.now << _TIME | place << _PLACE)

    def _compare(
        self, kind: str, stamps: Array, threads: Array, place: int, harmless: Array | None = None
    ) -> None:
        clock = self.clock
        counted = True if harmless is None else ~harmless
        recent = counted & (stamps >= clock.last_barrier << _TIME)
        if not self.private:
            foreign = counted & (stamps > 0) & (stamps < clock.started << _TIME)
            if foreign.any():
                self._tell(f"{kind} by two programs", place, stamps[foreign])
        if not recent.any():
            return
        different = stamps ^ threads
        same_warp = different & _WARP == 0
        across = recent & ~same_warp
        if across.any():
            self._tell(f"{kind} by two warps without a barrier", place, stamps[across])
        same_thread = different & (_THREAD | _SEVERAL) == 0
        unmet = stamps >> _TIME >= clock.last_meeting[threads >> 5]
        within = recent & same_warp & ~same_thread & unmet
        if within.any():
            self._tell(f"{kind} by two threads of a warp that did not meet", place, stamps[within])

    def _tell(self, kind: str, place: int, stamps: Array) -> None:
        earlier = int(stamps[0]) >> _PLACE & (1 << _TIME - _PLACE) - 1
        self.report.finding(kind, place, self.name, earlier)

    def _note_readers(self, granules: Array, threads: Array, stamps: Array) -> None:
        latest, other = self.latest[granules], self.other[granules]
        fresh = self.first[granules] == 0
        if fresh.any():
            self.first[granules[fresh]] = stamps[fresh]
        met = self.clock.last_meeting[threads >> 5] << _TIME
        moves = (latest ^ threads) & _WARP != 0
        if latest.any():
            mine = np.where(moves, other, latest)
            different = mine ^ threads
            again = (
                (mine >= met) & (different & _WARP == 0) & (different & (_THREAD | _SEVERAL) != 0)
            )
            stamps = stamps | np.where(again, _SEVERAL, 0)
            self.other[granules] = np.where(moves, latest, other)
        self.latest[granules] = stamps
        # of many readers at once one is noted
        noted = self.latest[granules]
        missed = noted != stamps
        if missed.any():
            same_warp = (noted ^ stamps) & _WARP == 0
            self.latest[granules[missed & same_warp]] |= _SEVERAL
            elsewhere = missed & ~same_warp
            self.other[granules[elsewhere]] = stamps[elsewhere]
