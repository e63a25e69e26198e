"""Ctrl-C between two steps of the engine, never within one: a step left half done is its last."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Holds an interrupt back until the yielded function is called, which raises it.

    A second one is raised at once. Outside the main thread, or where the program handles interrupts
    itself, nothing is changed.
    """
    held = False

    def hold(_signal: int, _frame: FrameType | None) -> None:
        nonlocal held
        held = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def let_go() -> None:
        nonlocal held
        if held:
            held = False
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield let_go
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield let_go
        let_go()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
