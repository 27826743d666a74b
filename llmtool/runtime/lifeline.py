"""No process outlives the one that started it, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> None:
    """The system kills this process when its parent, whose id is given, is gone; it is checked here once, since it
    may be gone already. To be called by a child, early. What is closed in order ends before that, by its own rules.

    The signal comes when the *thread* that started this process ends (prctl(2)): start it from one that stays.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
