"""Timeouts for requests that make no progress: the request runs in a thread, which is abandoned after the timeout.

An HTTP client's own timeout starts again with every byte, so it never ends if a server sends single bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Event, Thread
from time import monotonic
from typing import Any, TypeVar

STEP = 0.5  # seconds between two checks
T = TypeVar("T")


def within(
    seconds: float,
    call: Callable[[], T],
    arrived: Callable[[], int] = lambda: 0,
    least: int = 1,
    stopped: Event | None = None,
) -> T:
    """The result of `call`. Raises TimeoutError if fewer than `least` bytes arrive within `seconds`, or if `stopped`.

    `arrived` gives the bytes that have arrived so far. After a timeout the call continues in a daemon thread.
    """
    done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:  # raised again where the result is awaited
            done.put((None, error))

    before, since = arrived(), monotonic()
    Thread(target=run, name="request", daemon=True).start()
    while True:
        try:
            value, error = done.get(timeout=min(seconds, STEP))
        except Empty:
            if stopped is not None and stopped.is_set():
                raise TimeoutError("stopped") from None
            if monotonic() - since >= seconds:
                now = arrived()
                if now - before < least:
                    raise TimeoutError(f"less than {least} bytes in {seconds:g} seconds") from None
                before, since = now, monotonic()
            continue
        if error is not None:
            raise error
        result: T = value
        return result
