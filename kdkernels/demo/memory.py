"""Peak memory of a span of a process: the growth over what was there at its start."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


class PeakMemory:
    """`growth` bytes between `start` and the peak before `stop`, and the `method` it came from.

    CUDA: the allocator's peak. Linux: the resident set's high-water mark, reset at the start.
    Elsewhere: getrusage, whose mark cannot be reset; the growth is then that of the mark, and a
    peak below what the process had reached before counts as 0. `growth` is None where none of
    them exists.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._base = 0
        self.growth: int | None = None
        self.method = "not measured"

    def start(self) -> None:
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
            self.method = "torch.cuda.max_memory_allocated, growth during training"
            return
        try:
            _CLEAR.write_text("5")  # resets VmHWM to the present resident set
            self._base = _status_bytes("VmRSS")
            self.method = "peak resident set (VmHWM), growth during training"
        except OSError:
            mark = _usage_mark()
            if mark is not None:
                self._base = mark
                self.method = "peak resident set (getrusage), growth of the mark during training"

    def stop(self) -> None:
        if self._device == "cuda":
            self.growth = torch.cuda.max_memory_allocated() - self._base
        elif "VmHWM" in self.method:
            self.growth = _status_bytes("VmHWM") - self._base
        elif "getrusage" in self.method:
            self.growth = _usage_mark() - self._base


def _usage_mark() -> int | None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark if sys.platform == "darwin" else mark * 1024
