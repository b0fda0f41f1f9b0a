"""An end to waiting: a request runs beside, and is left to itself once nothing (or next to nothing) comes back.

A client's own timeouts start anew with every byte, so a server that sends one now and then is waited for without end.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Event, Thread
from time import monotonic
from typing import Any, TypeVar

STEP = 0.5  # seconds between two looks at whether to go on waiting
T = TypeVar("T")


def within(
    seconds: float,
    call: Callable[[], T],
    arrived: Callable[[], int] = lambda: 0,
    least: int = 1,
    stopped: Event | None = None,
) -> T:
    """The result of `call`. Raises TimeoutError once fewer than `least` bytes `arrived` in `seconds`, or if `stopped`.

    The call goes on in a thread that does not keep the process from ending.
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
