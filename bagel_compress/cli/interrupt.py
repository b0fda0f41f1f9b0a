"""Ctrl-C that leaves no lock behind.

Python raises KeyboardInterrupt between any two bytecodes of the main thread. Where these are the standard library's own
lock code, as at the first line of `threading.Condition.__exit__`, a lock stays taken for ever, and whoever waits for a
thread that needs it, as every `with ThreadPoolExecutor()` does at its end, waits for ever. So an interrupt that comes
there comes again a moment later, when that code is done. Code that waits in a lock is there for long, and waiting is a
safe place: after LONGEST the interrupt is raised wherever it comes.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 0.01  # seconds from an interrupt in lock code to its next try
LONGEST = 0.2  # seconds that an interrupt is put off
# Packages whose functions take and give back locks, or, as contextlib, begin what gives things back.
LOCK_CODE = {
    "threading", "queue", "concurrent", "multiprocessing", "logging", "tqdm", "contextlib", "importlib",
    "_frozen_importlib",
}  # fmt: skip


@contextmanager
def safe_interrupts() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt outside of lock code; one that is put off until the end is dropped.

    Does nothing outside of the main thread, or where SIGINT is ignored or has a handler of its own.
    """
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    handler = _Handler()
    try:
        signal.signal(signal.SIGINT, handler)
        yield
    finally:
        handler.close()
        signal.signal(signal.SIGINT, usual)


class _Handler:
    """A handler of SIGINT. Takes no lock of Python's, which the interrupted code may hold, and makes no Thread."""

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._first = 0.0  # when an interrupt was first put off; 0: none is
        self._closed = False
        self._sending = _thread.allocate_lock()  # taken while a signal is sent, and for ever once closed

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if _in_lock_code(frame) and (not self._first or now - self._first < LONGEST):
            self._first = self._first or now
            _thread.start_new_thread(self._send_again, ())
        elif not self._closed:
            self._first = 0.0
            raise KeyboardInterrupt

    def close(self) -> None:
        """From here on no interrupt comes."""
        self._closed = True
        self._sending.acquire()

    def _send_again(self) -> None:
        time.sleep(AGAIN)
        if self._sending.acquire(blocking=False):
            try:
                if sys.platform == "win32":
                    _thread.interrupt_main(signal.SIGINT)
                else:
                    signal.pthread_kill(self._main, signal.SIGINT)
            finally:
                self._sending.release()


def _in_lock_code(frame: FrameType | None) -> bool:
    """Whether a function of the standard library's locks, or what it calls, was interrupted."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in LOCK_CODE:
            return True
        frame = frame.f_back
    return False
