"""What a launch costs, as far as addresses and ways through the code say it: no times.

An instruction counts once for each warp in which a lane runs it, a sector of 32 bytes of global
memory once for each instruction of a warp that touches it, and shared memory by the passes over its
32 banks of four bytes that an instruction takes.
"""

from collections import Counter

import numpy as np

Array = np.ndarray
_SECTOR, _BANKS, _WORD, _PASS = 32, 32, 4, 128


class Counts:
    """Sums over launches, by kernel and line: `table` has a row for each kernel, and its lines."""

    def __init__(self) -> None:
        # by kernel and place
        self.instructions: Counter[tuple[str, str]] = Counter()
        # the same and the space: passes or sectors, and how many would do
        self.taken: Counter[tuple[str, str, str]] = Counter()
        self.least: Counter[tuple[str, str, str]] = Counter()
        self.programs: Counter[str] = Counter()

    def accessed(
        self, kernel: str, place: str, space: str, addresses: Array, bytes_: int, threads: Array
    ) -> None:
        if not len(addresses):
            return
        warps = threads.astype(np.int64) // 32
        at = addresses.astype(np.int64)
        key = kernel, place, space
        pairs = np.unique(np.stack((warps, at), 1), axis=0)
        if space == "global":
            sectors = np.unique(np.stack((pairs[:, 0], pairs[:, 1] // _SECTOR), 1), axis=0)
            _, asked = np.unique(pairs[:, 0], return_counts=True)
            self.taken[key] += len(sectors)
            self.least[key] += int(np.sum(-(-asked * bytes_ // _SECTOR)))
            return
        # as many lanes at a time as 128 bytes are for
        turn = warps * 32 + threads % 32 * bytes_ // _PASS
        offsets = np.arange(0, max(bytes_, _WORD), _WORD)
        words = (at[:, None] + offsets).ravel() // _WORD
        turns = np.repeat(turn, len(offsets))
        each = np.unique(np.stack((turns, words), 1), axis=0)
        banks, crowd = np.unique(
            np.stack((each[:, 0], each[:, 1] % _BANKS), 1), axis=0, return_counts=True
        )
        which, first = np.unique(banks[:, 0], return_index=True)
        self.taken[key] += int(np.maximum.reduceat(crowd, first).sum())
        self.least[key] += len(which)

    def ran(self, kernel: str, lines: Counter[str], warps: int) -> None:
        for place, count in lines.items():
            self.instructions[kernel, place] += count * warps

    def table(self, lines: int = 0, rows: int | None = None) -> list[str]:
        """For each kernel a line, and those of its source that cost most: of a program, or of a row
        where all launches had so many.
        """
        found = []
        for kernel, programs in sorted(self.programs.items()):
            of, each = ("program", programs) if rows is None else ("row", rows)
            places = Counter(
                {place: n for (name, place), n in self.instructions.items() if name == kernel}
            )
            taken = self._taken(kernel, list(places), each)
            total = places.total() / each
            found.append(f"{kernel}: {programs} programs; a {of}: {total:.1f} instructions{taken}")
            for place, count in places.most_common(lines):
                taken = self._taken(kernel, [place], each)
                found.append(f"    {count / each:10.1f} {place}{taken}")
        return found

    def _taken(self, kernel: str, places: list[str], each: int) -> str:
        text = ""
        for space, unit in (("global", "sectors"), ("shared", "passes")):
            keys = [(kernel, place, space) for place in places]
            taken, least = (sum(of[key] for key in keys) for of in (self.taken, self.least))
            if taken:
                text += f", {taken / each:.1f} {unit} ({least / each:.1f})"
        return text
