"""Reuses read buffers, since the first access to newly allocated memory takes longer than reading into it.

A buffer is free when nothing refers to it any more: no array made from it, no tensor on its memory, no entry of
a queue. Callers need not return a buffer; it is reused when the last reference to it is gone.
"""

from __future__ import annotations

import sys
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SIZE = 8 << 20  # bytes of a buffer: as many as readers of weights request at a time
SMALL = SIZE // 8
KEPT = 16  # buffers kept for reuse; further ones are allocated and freed


class Buffers:
    """Hands out buffers of up to `SIZE` bytes, if possible used ones; larger requests get new memory."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._buffers: list[np.ndarray] = []
        self._idle = 0  # references to a buffer that nobody uses: those of this class

    def take(self, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], content undefined. The memory is not reused while anything refers to it."""
        import numpy as np

        if not SMALL < nbytes <= SIZE:  # a small request would gain nothing, and occupy a large buffer
            return np.empty(nbytes, np.uint8)
        with self._lock:
            for number in range(len(self._buffers)):
                if sys.getrefcount(self._buffers[number]) == self._idle:
                    return self._buffers[number][:nbytes]
            fresh = np.empty(SIZE, np.uint8)
            if len(self._buffers) < KEPT:
                self._buffers.append(fresh)
                del fresh
                self._idle = sys.getrefcount(self._buffers[-1])
                return self._buffers[-1][:nbytes]
            return fresh[:nbytes]
