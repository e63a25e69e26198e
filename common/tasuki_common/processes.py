"""Children that cannot outlive their parent, whichever way it ends."""

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> Callable[[], None]:
    """A `preexec_fn`: the kernel sends the child SIGKILL when the thread that started it ends.

    So start children from the main thread. A parent that died before the child could ask is noticed
    by its changed parent.
    """
    parent = os.getpid()

    def ask_for_signal() -> None:
        if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:
            os._exit(1)

    return ask_for_signal
