"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def until_asked_to_stop() -> Iterator[Callable[[], int]]:
    """The number of the signal to stop that has come to this process, or 0; a second one has its usual effect."""
    came = [0]
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread may listen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number, frame):
        del frame
        came[0] = number
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
