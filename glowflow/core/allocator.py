"""Keeps freed CPU memory in the process, so that every training step does not ask the kernel for it again.

glibc gives large freed blocks back at once. A training step frees all its activations, so the next one pays a page
fault for each 4 KiB of them; for small models on a CPU these faults cost a few per cent of the step.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import platform

__all__ = ["keep_freed_memory", "return_freed_memory"]

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def keep_freed_memory(block_bytes: int = 64 * 2**20, total_bytes: int = 512 * 2**20) -> bool:
    """Tell glibc to reuse freed blocks instead of returning them.

    Args:
        block_bytes: blocks up to this size come from the reusable heap; larger ones from the kernel, as before.
        total_bytes: this much free memory at the heap's end is kept; what is beyond goes back.

    Returns:
        Whether the C library took the settings (only glibc has them).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # glibc refuses an mmap threshold above half its heap size limit (32 MiB on 64 bit): take the largest it takes.
    while block_bytes > 2**20 and not mallopt(_M_MMAP_THRESHOLD, block_bytes):
        block_bytes //= 2
    kept = bool(mallopt(_M_TRIM_THRESHOLD, total_bytes))
    logger.info(
        "malloc keeps up to %d MiB of freed memory, in blocks up to %d MiB", total_bytes >> 20, block_bytes >> 20
    )
    return kept


def return_freed_memory() -> None:
    """Give freed memory back to the system, where malloc can (glibc): for a process that goes on with other work.

    glibc keeps a heap per thread, so that what one thread has freed is of no use to the next.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
