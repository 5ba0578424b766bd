"""How much memory there is, and how much of it this process takes."""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


class Memory:
    """The memory that a device computes in: how much of it this process has at its peak, and how much it could have.

    Of a GPU it is what the tensors take (the caching allocator gives back what it holds beyond that before it fails); of a CPU
    the resident memory of the process, Python and libraries included.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.limit = self._limit()
        self._before = 0  # bytes of a peak that could not be forgotten

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            trim()  # it may have been kept
            self._before = resident_peak() or 0
            with contextlib.suppress(OSError):  # Linux alone can forget it
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
                self._before = 0

    def peak(self) -> int | None:
        """Bytes at the peak since :meth:`reset`. None where that cannot be known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resident_peak() if self.device.type == "cpu" else None
        return peak if peak is not None and peak > self._before else None

    def _limit(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        if self.device.type != "cpu":
            return None
        status = kibibytes("/proc/self/status")
        if "VmRSS" not in status:
            with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows knows no sysconf
                return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return None
        rooms = [kibibytes("/proc/meminfo").get("MemAvailable"), *_control_group_rooms()]
        return status["VmRSS"] + min(room for room in rooms if room is not None)


def resident_peak() -> int | None:
    """Bytes of memory this process had at most. None where that cannot be asked."""
    if "VmHWM" in (status := kibibytes("/proc/self/status")):
        return status["VmHWM"]
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def kibibytes(path: str) -> dict[str, int]:
    """The sizes that a file of /proc tells, in bytes; none where there is no such file."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in words if len(line) == 3 and line[2] == "kB"}


def _control_group_rooms(root: str = "/sys/fs/cgroup") -> Iterator[int]:
    """What a container's limits leave, in bytes: of control groups version 2 and 1."""
    names = (
        (Path(root), "memory.max", "memory.current", "inactive_file"),
        (Path(root, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder, limit, usage, reclaimable in names:
        with contextlib.suppress(OSError, ValueError):  # no such group, or no limit ("max")
            most, now = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
            details = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            yield max(0, most - now + int(details.get(reclaimable, 0)))


def keep_freed_memory() -> None:
    """Have the C library keep what is freed instead of giving it back to the system, where it is glibc; otherwise do nothing.

    A training step asks for the same few hundred megabytes again and again. Given back in between, they come as pages that the
    system must clear first: a quarter of a small model's step on two cores. Memory once needed stays with the process.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return  # another allocator, or one that somebody has set already
    mallopt = ctypes.CDLL(None).mallopt
    if not mallopt(-3, 2**30):  # M_MMAP_THRESHOLD: what is smaller comes from the heap
        mallopt(-3, 2**25)  # the most that an older glibc takes
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: so much may lie unused at the heap's end


def trim() -> None:
    """Give back what the C library keeps of freed memory, which would count in the next peak."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc alone can
        ctypes.CDLL(None).malloc_trim(0)
