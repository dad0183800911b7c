"""What the examples show while they run, and their clock."""

import sys
import time

import torch


def now(device: torch.device) -> float:
    """Seconds, when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Progress:
    """A bar that redraws itself on a terminal; elsewhere only the line of what is finished."""

    def __init__(self, title: str, steps: int) -> None:
        self.title, self.steps, self.width, self.last = title, steps, 0, 0.0

    def show(self, step: int) -> None:
        if sys.stdout.isatty() and time.monotonic() - self.last > 0.1:
            self.last = time.monotonic()
            done = 30 * step // self.steps
            self._write(f"{self.title}  [{'#' * done}{'.' * (30 - done)}] {step}/{self.steps}", "")

    def done(self, text: str) -> None:
        self._write(f"{self.title}  {text}", "\n")

    def _write(self, text: str, end: str) -> None:
        start = "\r" if sys.stdout.isatty() else ""
        print(start + text.ljust(self.width), end=end, flush=True)
        self.width = len(text)
