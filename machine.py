"""What a machine has, asked in a way that works on Linux, macOS and Windows."""

import os
import sys

# What a machine has that doesn't say (Windows).
ASSUMED_MEMORY = 16e9


def cpus() -> int:
    """Return how many CPUs this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Linux alone has affinities
        return os.cpu_count() or 1


def memory() -> float:
    """Return the bytes of memory."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return ASSUMED_MEMORY


def peak_memory() -> float | None:
    """Return the most bytes that this process has held, None where nobody counts (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
